"""One decoding step over pages of low-rank features, in Triton: `Features.attend`.

A team, the rows that have features together, is shared out over programs that take whole tiles of tokens (`_features`);
what they leave is merged and made into values by `_expand`.

- Keys are made again a tile at a time, for all heads of a team: features `[T, n]` times `[n, head_dim]`, head by head;
  the matrix comes from the L2 cache. They meet the queries of all heads, and only the scores of their own are taken.
- Queries are turned back by the angle of the tile's first token, keys on by that of a slot in a tile: so one small
  table serves all pages, whatever their positions.
- Values are never made: features are weighted, and only the sums are multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, overlaps, power_of_2
from fivefold.kernels.low_rank import cuda
from fivefold.kernels.low_rank.reference import CHUNK, Features, padded
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN, searched
from fivefold.kernels.packed_decode.triton import _TYPES, _row


@triton.constexpr_function
def _chunks(features):
    """(start, size) of pieces of that many features, sizes powers of two from 16 to CHUNK."""
    left, start, out = -(-int(features) // 16) * 16, 0, []
    while left:
        size = min(CHUNK, 1 << (left.bit_length() - 1))
        out.append((start, size))
        start, left = start + size, left - size
    return tuple(out)


@triton.constexpr_function
def _count(features):
    return len(_chunks(features))


@triton.constexpr_function
def _start(features, i):
    return _chunks(features)[int(i)][0]


@triton.constexpr_function
def _size(features, i):
    return _chunks(features)[int(i)][1]


@triton.constexpr_function
def _planes(bits):
    return 16 // int(bits)


@triton.jit
def _tile(
    table, columns, first, page, most, slot, OFFSET: tl.constexpr, RANK: tl.constexpr, HEADS: tl.constexpr,
    BITS: tl.constexpr, DTYPE: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, TOKENS: tl.constexpr,
    TWO: tl.constexpr,
):  # fmt: skip
    """Features START.. of slots `[T]` of a page, `[T, SIZE]`, of the rows from `first` on; those that are not there 0.
    With TWO, of that page and the next one, which is at most number `most`."""
    # Two features of 16 bits at a time where a row's are so many.
    BOTH: tl.constexpr = 2 if BITS == 0 and RANK % 2 == 0 and DTYPE.primitive_bitwidth == 16 else 1
    f = START + tl.arange(0, SIZE // BOTH) * BOTH
    there = f < RANK * HEADS
    line = table + (first + f // RANK) * columns
    own = f % RANK
    record = (tl.load(line + page, mask=there, other=0) * 16 + OFFSET)[None, :]
    if TWO:
        after = tl.load(line + tl.minimum(page + 1, most), mask=there, other=0) * 16 + OFFSET
        record = tl.where(slot[:, None] < TOKENS, record, after[None, :])
        slot = slot % TOKENS
    if BOTH == 2:
        words = record.to(tl.pointer_type(tl.int32)) + (slot[:, None] * (RANK // 2) + (own // 2)[None, :])
        word = tl.load(words, mask=there[None, :], other=0)
        low = word.to(tl.int16).to(DTYPE, bitcast=True)
        high = (word >> 16).to(tl.int16).to(DTYPE, bitcast=True)
        x = tl.reshape(tl.join(low, high), [slot.shape[0], SIZE])
    elif BITS == 0:
        x = tl.load(
            record.to(tl.pointer_type(DTYPE)) + (slot[:, None] * RANK + own[None, :]), mask=there[None, :], other=0.0
        )
    else:
        PLANES: tl.constexpr = _planes(BITS)
        plane = slot // 32
        words = record.to(tl.pointer_type(tl.int16)) + ((slot % 32)[:, None] * RANK + own[None, :])
        code = tl.load(words, mask=there[None, :], other=0).to(tl.int32)
        code = (code >> (plane * BITS)[:, None]) & ((1 << BITS) - 1)
        scales = (record + 64 * RANK).to(tl.pointer_type(tl.float16)) + (plane[:, None] * RANK + own[None, :])
        scale = tl.load(scales, mask=there[None, :], other=0.0)
        zero = tl.load(scales + PLANES * RANK, mask=there[None, :], other=0.0)
        x = (code.to(tl.float32) * scale + zero).to(tl.float16)
    return x


@triton.jit
def _products(x, up, first, D: tl.constexpr, T: tl.constexpr, N: tl.constexpr, F: tl.constexpr):
    """x (a tuple of tiles of features) times columns first.. of `up [F, D]`: float32 `[T, N]`."""
    out = tl.zeros([T, N], tl.float32)
    for c in tl.static_range(_count(F)):
        k = _start(F, c) + tl.arange(0, _size(F, c))
        at = up + k[:, None] * D + (first + tl.arange(0, N))[None, :]
        out = tl.dot(x[c], tl.load(at).to(x[c].dtype), out, input_precision="ieee")
    return out


@triton.jit
def _turn(angles, base, i):
    """Cosine and sine of the angles `i` at a position, float32."""
    angle = base * tl.load(angles + i)
    angle = (angle - tl.floor(angle * 0.15915494309189535) * 6.283185307179586).to(tl.float32)
    return tl.cos(angle), tl.sin(angle)


@triton.jit
def _channels(i, NEIGHBOURS: tl.constexpr, PAIRS: tl.constexpr):
    """Where in a head the channels of pairs `i` are."""
    if NEIGHBOURS:
        return 2 * i, 2 * i + 1
    first = tl.where(i < PAIRS, i, 2 * i)
    return first, first + tl.where(i < PAIRS, PAIRS, 1)


@triton.jit
def _shuffled(x, T: tl.constexpr, PB: tl.constexpr):
    """x `[T, PB]` with columns 0, 4, 1, 5, 2, 6, 3, 7 of every eight: where a product left them and where the next one
    wants them is then the same thread."""
    return tl.reshape(tl.permute(tl.reshape(x, [T, PB // 8, 2, 4]), (0, 1, 3, 2)), [T, PB])


@triton.jit(do_not_specialize=("rows", "columns"))
def _features(
    queries, table, spans, starts, key_up, waves, angles, sums, sums_lse, scale, rows, columns,
    M: tl.constexpr, NQ: tl.constexpr, BLOCKS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    RK: tl.constexpr, RV: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr,
    TOKENS: tl.constexpr, T: tl.constexpr, PB: tl.constexpr, OFFSET: tl.constexpr, NEIGHBOURS: tl.constexpr,
    PAIRS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One share of the pages of a team. Grid: (programs,).

    sums: float32 `[programs, HEADS * M, NV]`, sums_lse: `[programs, HEADS * M]`, weighted features, divided. M query
    heads a row; NQ is at least HEADS * M.
    """
    row = _row(starts, rows, R)
    if row >= rows:
        return
    work = tl.float32 if WIDE else DTYPE
    HALF: tl.constexpr = D // 2
    PARTS: tl.constexpr = HALF // PB
    first_row = row // HEADS * HEADS
    begin = tl.load(starts + first_row)
    programs = tl.load(starts + first_row + HEADS) - begin
    share = tl.program_id(0) - begin
    low = tl.load(spans + first_row * SPAN)
    high = tl.load(spans + first_row * SPAN + 1)
    position = tl.load(spans + first_row * SPAN + 7)
    most = tl.maximum(tl.cdiv(high, TOKENS), 1) - 1
    tiles = tl.cdiv(high, T) - low // T
    first = low // T + share * tiles // programs
    last = low // T + (share + 1) * tiles // programs

    t = tl.arange(0, T)
    q = tl.arange(0, NQ)
    channel = tl.arange(0, 2 * PB)
    pair = tl.arange(0, PB)
    pair = pair // 8 * 8 + pair % 2 * 4 + pair % 8 // 2  # in the order of `_shuffled`
    up = key_up + (row // HEADS % BLOCKS) * (HEADS * NK * D)
    m = tl.full([NQ], -1e30, tl.float32)
    weight = tl.zeros([T, NQ], tl.float32)
    acc = ()
    for c in tl.static_range(_count(NV)):
        acc = acc + (tl.zeros([_size(NV, c), NQ], tl.float32),)
    for tile in range(first, last):
        page = tile * T // TOKENS
        # (The minimum is 0, which the compiler does not know: else it would keep all addresses, in registers.)
        slot = tile * T % TOKENS + t + tl.minimum(tile, 0)
        x = ()
        for c in tl.static_range(_count(NK)):
            one = _tile(
                table, columns, first_row, page, most, slot, 0, RK, HEADS, BITS, DTYPE, _start(NK, c), _size(NK, c),
                TOKENS, T > TOKENS,
            )  # fmt: skip
            x = x + (one.to(work),)
        base = (position + tile * T).to(tl.float64)
        score = tl.zeros([T, NQ], tl.float32)
        for part in tl.static_range(PARTS):
            # The queries of all heads, turned back to where the tile begins.
            i = part * PB + pair
            pc, ps = _turn(angles, base, i)
            ia, ib = _channels(i, NEIGHBOURS, PAIRS)
            at = queries + (first_row * M + q[None, :]) * D
            qa = tl.load(at + ia[:, None], mask=q[None, :] < HEADS * M, other=0.0).to(tl.float32) * scale
            qb = tl.load(at + ib[:, None], mask=q[None, :] < HEADS * M, other=0.0).to(tl.float32) * scale
            first_query = (qa * pc[:, None] + qb * ps[:, None]).to(work)
            second_query = (qb * pc[:, None] - qa * ps[:, None]).to(work)
            wave = tl.load(waves + t[:, None] * D + (part * (2 * PB) + channel)[None, :])
            for head in tl.range(0, HEADS, num_stages=STAGES):
                k = _products(x, up + head * (NK * D), part * (2 * PB), D, T, 2 * PB, NK)
                k1, k2 = tl.split(tl.reshape(k, [T, PB, 2]))
                tc, ts = tl.split(tl.reshape(wave, [T, PB, 2]).to(tl.float32))
                ka = _shuffled((k1 * tc - k2 * ts).to(work), T, PB)
                kb = _shuffled((k2 * tc + k1 * ts).to(work), T, PB)
                found = tl.dot(ka, first_query, input_precision="ieee")
                found = tl.dot(kb, second_query, found, input_precision="ieee")
                score = tl.where((q // M == head)[None, :], score + found, score)
        token = tile * T + t
        seen = (token >= low) & (token < high)
        score = tl.where(seen[:, None], score, -1e30)
        above = tl.maximum(m, tl.max(score, 0))
        shrink = tl.exp2(m - above)
        m = above
        p = tl.where(seen[:, None], tl.exp2(score - m[None, :]), 0.0)
        weight = weight * shrink[None, :] + p
        p = p.to(work)
        slot = tile * T % TOKENS + t + tl.minimum(tile + 1, 0)
        new = ()
        for c in tl.static_range(_count(NV)):
            y = _tile(
                table, columns, first_row, page, most, slot, OFFSET, RV, HEADS, BITS, DTYPE, _start(NV, c),
                _size(NV, c), TOKENS, T > TOKENS,
            )  # fmt: skip
            y = tl.where(seen[:, None], y, 0.0).to(work)  # what is not seen may be anything
            new = new + (tl.dot(tl.trans(y), p, acc[c] * shrink[None, :], input_precision="ieee"),)
        acc = new
    total = tl.sum(weight, 0)
    some = total > 0
    safe = tl.where(some, total, 1.0)
    place = tl.program_id(0) * (HEADS * M) + q
    tl.store(sums_lse + place, tl.where(some, m + tl.log2(safe), -1e30), mask=q < HEADS * M)
    for c in tl.static_range(_count(NV)):
        f = _start(NV, c) + tl.arange(0, _size(NV, c))
        tl.store(sums + place[None, :] * NV + f[:, None], acc[c] / safe[None, :], mask=q[None, :] < HEADS * M)


@triton.jit(do_not_specialize=("processors",))
def _expand(
    sums, sums_lse, starts, value_up, out, lse, processors, BLOCKS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    NV: tl.constexpr, P: tl.constexpr, W: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the weighted features of one head of a row, and make N channels of a value of them: the part of the team's
    first program. Grid: (rows, query heads of a row, D / N); W: at least NV.

    SPLIT: 0 where every program of the team has a part, else as `cuda.features` says. EARLY: it was launched before the
    kernel in front of it was done.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0)
    heads = tl.num_programs(1)
    mine = row % HEADS * heads + tl.program_id(1)
    d = tl.program_id(2) * N + tl.arange(0, N)
    w = tl.arange(0, W)
    begin = tl.load(starts + row // HEADS * HEADS)
    last = tl.load(starts + row // HEADS * HEADS + HEADS)
    if SPLIT:
        each = tl.maximum(1, tl.cdiv(tl.load(starts + tl.num_programs(0)) * SPLIT, processors))
        last = tl.where(last > begin, begin + tl.maximum(1, (last - begin) // each), last)
    up = value_up + row % (BLOCKS * HEADS) * (NV * D)
    made = tl.load(up + w[:, None] * D + d[None, :], mask=w[:, None] < NV, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    m = -1e30
    total = 0.0
    acc = tl.zeros([W], tl.float32)
    for first in range(begin, last, P):
        p = first + tl.arange(0, P)
        at = p * (HEADS * heads) + mine
        part = tl.load(sums_lse + at, mask=p < last, other=-1e30)
        held = part > -1e29
        x = tl.load(sums + at[:, None] * NV + w[None, :], mask=held[:, None] & (w[None, :] < NV), other=0.0)
        above = tl.maximum(m, tl.max(part, 0))
        share = tl.where(held, tl.exp2(part - above), 0.0)
        shrink = tl.exp2(m - above)
        m = above
        total = total * shrink + tl.sum(share, 0)
        acc = acc * shrink + tl.sum(x * share[:, None], 0)
    if begin < last:
        some = total > 0
        safe = tl.where(some, total, 1.0)
        at = begin * (HEADS * heads) + mine
        tl.store(out + at * D + d, tl.sum(acc[:, None] * made.to(tl.float32), 0) / safe)
        tl.store(lse + at, tl.where(some, m + tl.log2(safe), -1e30))


@triton.jit(do_not_specialize=("rows", "columns"))
def _weigh(
    scores, table, spans, starts, sums, sums_lse, rows, columns, M: tl.constexpr, NQ: tl.constexpr, HEADS: tl.constexpr,
    RV: tl.constexpr, RP: tl.constexpr, NV: tl.constexpr, DTYPE: tl.constexpr, TOKENS: tl.constexpr,
    OFFSET: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum one row's features of values by `scores [teams, columns * TOKENS, HEADS * M]` of a share of a team's pages.
    Grid: (programs, HEADS). RP: at least RV. See `_features` for the rest; numbers alone, none in bits."""
    row = _row(starts, rows, R)
    if row >= rows:
        return
    work = tl.float32 if WIDE else DTYPE
    first_row = row // HEADS * HEADS
    source = tl.program_id(1)
    begin = tl.load(starts + first_row)
    programs = tl.load(starts + first_row + HEADS) - begin
    share = tl.program_id(0) - begin
    low = tl.load(spans + first_row * SPAN)
    high = tl.load(spans + first_row * SPAN + 1)
    tiles = tl.cdiv(high, TOKENS) - low // TOKENS
    t = tl.arange(0, TOKENS)
    q = tl.arange(0, NQ)
    f = tl.arange(0, RP)
    scores += (row // HEADS).to(tl.int64) * columns * TOKENS * (HEADS * M)
    m = tl.full([NQ], -1e30, tl.float32)
    weight = tl.zeros([TOKENS, NQ], tl.float32)
    acc = tl.zeros([RP, NQ], tl.float32)
    for tile in range(low // TOKENS + share * tiles // programs, low // TOKENS + (share + 1) * tiles // programs):
        token = tile * TOKENS + t
        seen = (token >= low) & (token < high)
        record = tl.load(table + (first_row + source) * columns + tile) * 16 + OFFSET
        values = tl.multiple_of(record.to(tl.pointer_type(DTYPE)), 16) + (t[:, None] * RV + f[None, :])
        v = tl.load(values, mask=seen[:, None] & (f < RV)[None, :], other=0.0).to(work)
        at = scores + token.to(tl.int64)[:, None] * (HEADS * M) + q[None, :]
        s = tl.load(at, mask=seen[:, None] & (q < HEADS * M)[None, :], other=-1e30)
        above = tl.maximum(m, tl.max(s, 0))
        shrink = tl.exp2(m - above)
        m = above
        p = tl.where(seen[:, None], tl.exp2(s - m[None, :]), 0.0)
        weight = weight * shrink[None, :] + p
        acc = tl.dot(tl.trans(v), p.to(work), acc * shrink[None, :], input_precision="ieee")
    total = tl.sum(weight, 0)
    safe = tl.where(total > 0, total, 1.0)
    place = tl.program_id(0) * (HEADS * M) + q
    to = sums + place[None, :] * NV + (source * RV + f)[:, None]
    tl.store(to, acc / safe[None, :], mask=(q < HEADS * M)[None, :] & (f < RV)[:, None])
    if source == 0:
        tl.store(sums_lse + place, tl.where(total > 0, m + tl.log2(safe), -1e30), mask=q < HEADS * M)


def settings_of(form: Features, room: int = 220 << 10) -> dict[str, int]:
    """How a form's pages are worked on: slots of a tile, pairs of channels at a time, stages, warps; room: bytes of
    shared memory."""
    size, features = form.work.itemsize, max(padded(form.team * rank) for rank in form.ranks)
    tokens, pairs, stages = (32 if size == 4 else min(form.tokens, 128)), form.head_dim // 2, (1 if size == 4 else 2)
    while features * size * (tokens + stages * 2 * pairs) > room:
        if pairs > 16:
            pairs //= 2
        elif stages > 1:
            stages -= 1
        elif tokens > 32:
            tokens //= 2
        else:
            break
    return {"T": tokens, "PB": pairs, "STAGES": stages, "num_warps": 8 if tokens > 64 else 4}


def weigh(
    form: Features, table: torch.Tensor, heads: int, scores: torch.Tensor, spans: torch.Tensor, starts: torch.Tensor,
    sums: torch.Tensor, sums_lse: torch.Tensor,
) -> None:  # fmt: skip
    """Sums of values' features by their scores, of every program: see `_weigh`; heads: query heads a row."""
    rows, columns = table.shape
    nq, rank = max(16, power_of_2(heads * form.team)), form.ranks[1]
    _weigh[(len(sums), form.team)](
        scores, table, spans, starts, sums, sums_lse, rows, columns, M=heads, NQ=nq, HEADS=form.team, RV=rank,
        RP=max(16, power_of_2(rank)), NV=padded(form.team * rank), DTYPE=_TYPES[form.work],
        TOKENS=form.tokens, OFFSET=form.side(form.ranks[0]), SPAN=SPAN, R=searched(rows),
        WIDE=table.device.type != "cuda", num_warps=4, num_stages=3,
    )  # fmt: skip


def _room(device: torch.device) -> int:
    """Bytes of shared memory that a program may take, less what is taken besides."""
    if device.type != "cuda":
        return 220 << 10
    there = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 100 << 10)
    return int(there) - (12 << 10)


def attend(
    form: Features,
    packed: Packed,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    early: bool = False,
    settings: dict[str, int] | None = None,
) -> None:
    """`Reader.attend` of `Features`. settings: what `settings_of` gives, to try others; of the kernel in Triton."""
    if packed.order is not None:
        queries = queries.index_select(0, packed.order)
    rows, heads, dim = queries.shape
    device, made, programs = queries.device, form.prepared, len(out)
    nk, nv = (padded(form.team * rank) for rank in form.ranks)

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    sums, sums_lse = empty(programs, form.team * heads, nv), empty(programs, form.team * heads)
    split = processors = 0
    with on(device):
        if made.blocked:
            alone = cuda.scores_alone(form)
            slots = packed.table.shape[1] * form.tokens
            scores = empty(rows // form.team, slots, form.team * heads) if alone else sums
            made_by = cuda.features(form, packed.table, queries, scale, spans, starts, sums, sums_lse, scores, early)
            if alone:
                weigh(form, packed.table, heads, scores, spans, starts, sums, sums_lse)
            else:
                split, processors = made_by
        else:
            given = {**settings_of(form, _room(device)), **(settings or {})}
            nq = max(16, power_of_2(heads * form.team))
            _features[(programs,)](
                queries, packed.table, spans, starts, made.keys, made.waves, made.angles, sums, sums_lse, scale, rows,
                packed.table.shape[1], M=heads, NQ=nq, BLOCKS=form.blocks, HEADS=form.team, D=dim, RK=form.ranks[0],
                RV=form.ranks[1], NK=nk, NV=nv, BITS=form.bits or 0, DTYPE=_TYPES[form.work], TOKENS=form.tokens,
                OFFSET=form.side(form.ranks[0]), NEIGHBOURS=form.neighbours, PAIRS=form.pairs, SPAN=SPAN,
                R=searched(rows), WIDE=device.type != "cuda", **given,
            )  # fmt: skip
        begins = overlaps(device)
        _expand[(rows, heads, dim // 64)](
            sums, sums_lse, starts, made.values, out, lse, processors, BLOCKS=form.blocks, HEADS=form.team, D=dim,
            NV=nv, P=32, W=power_of_2(nv), N=64, SPLIT=split, EARLY=begins, num_warps=8,
            **({"launch_pdl": True} if begins else {}),
        )  # fmt: skip
