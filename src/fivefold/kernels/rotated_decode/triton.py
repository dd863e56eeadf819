"""Attention of a decoding step over pages of rotated keys and values (see `Rotated`), in Triton.

Two kernels, with the work lists and parts of `packed_decode`. `_scores` makes keys again, 64 tokens of a head at a
time: channels are loaded from where they were sorted to, so that no tile is permuted; the Hadamard matrix over channels
is undone by a product with entries +-1, and that over heads by signs of the scores, since all heads turn alike. RoPE
turns what comes out, by the angle of the first token (in whole numbers, reduced) and that of a token in its tile added
up. It leaves scores, float32. `_values` reads them, and undoes the values' rotation once, on the weighted sum.

Attention sinks, which are exact, are among the slots: a page says which, and their scores and values are put in the
others' places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.choice import choose
from fivefold.kernels.device import power_of_2, processors
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN, searched
from fivefold.kernels.packed_decode.triton import _code_planes, _leave, _row, _row_of, _share, _share_of
from fivefold.kernels.planar_decode.triton import _code, _rest, _spread
from fivefold.kernels.rotated_decode import cuda
from fivefold.kernels.rotated_decode.reference import Rotated


@triton.constexpr_function
def _field_asm(bits):
    mask = (2 ** int(bits) - 1) * 0x10001
    return (
        f"{{ .reg .b32 t, u; shr.u32 t, $1, $2; lop3.b32 t, t, 0x{mask:08X}, 0x64006400, 0xEA; "
        "mov.b32 u, 0x64006400; sub.rn.f16x2 $0, t, u; }"
    )


@triton.constexpr_function
def _log2(n):
    return int(n).bit_length() - 1


@triton.jit
def _half(x, ASM: tl.constexpr):
    """float32 as float16, two at a time."""
    if ASM:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], dtype=tl.float16, is_pure=True, pack=2
        )
    return x.to(tl.float16)


@triton.jit
def _field(words, shift, BITS: tl.constexpr, ASM: tl.constexpr):
    """The codes that stand `shift` bits up in words, as float16. (1024 and a code is a float16 with the code as its
    last bits.)"""
    if ASM:
        # Two words at a time in one register; the shift, which is the same for both, in two.
        return tl.inline_asm_elementwise(
            _field_asm(BITS), "=r,r,r,r", [words, shift], dtype=tl.float16, is_pure=True, pack=2
        )
    return ((words.to(tl.int32) >> shift) & (2**BITS - 1)).to(tl.float16)


@triton.jit
def _cos(x, ASM: tl.constexpr):
    """Of angles of at most pi, to 2**-20."""
    if ASM:
        return tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.cos(x)


@triton.jit
def _sin(x, ASM: tl.constexpr):
    if ASM:
        return tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.sin(x)


@triton.jit
def _address(table, row, columns, page, field, FIELDS: tl.constexpr):
    return tl.load(table + (row.to(tl.int64) * columns + page) * FIELDS + field) * 2


@triton.jit(do_not_specialize=("rows", "columns", "heads", "slots"))
def _scores(
    queries, order, table, spans, starts, places, turns, small, matrices, sink_keys, scores, scale, rows, columns,
    heads, slots, ORDERED: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, CHANNELS: tl.constexpr,
    KV_HEADS: tl.constexpr, TEAM: tl.constexpr, EACH: tl.constexpr, COLUMNS: tl.constexpr, SPLIT: tl.constexpr,
    NEIGHBOURS: tl.constexpr, SINKS: tl.constexpr, S: tl.constexpr, FIELDS: tl.constexpr, SPAN: tl.constexpr,
    R: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores, to the base 2, of one share of the pages of TEAM rows, or of some of it: float32 `[rows, heads, slots]`.
    Grid: (programs or more, 1 if SPLIT else TEAM): where the matrix does not split, a program is for one row.

    The queries of a team are the COLUMNS of one operand, EACH for a row; ORDERED: they stand where `order` says. S:
    room for the sinks. WIDE: planes of a tile, 1 or 2.
    """
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    TILES: tl.constexpr = PLANES // WIDE
    # Where there are few shares, several programs take tiles of one, each as many, one behind the other.
    split = tl.minimum(TILES, tl.maximum(1, tl.num_programs(0) // tl.maximum(1, tl.load(starts + rows))))
    part = tl.program_id(0) // split
    row = _row_of(starts, rows, part, R)
    if row >= rows:
        return
    G: tl.constexpr = D // CHANNELS
    HALF: tl.constexpr = D // 2
    d = tl.arange(0, D)
    i = tl.arange(0, HALF)
    k = tl.arange(0, S)
    t = tl.arange(0, 32 * WIDE)
    c = tl.arange(0, COLUMNS)
    first_row = row // KV_HEADS * KV_HEADS
    even = 2 * i if NEIGHBOURS else i
    odd = 2 * i + 1 if NEIGHBOURS else i + HALF
    whose = c // EACH
    mine = (whose < TEAM) & (c % EACH < heads)
    if not SPLIT:
        mine = mine & (whose == tl.program_id(1))
    line = (row + whose) * heads + c % EACH
    asked = line
    if ORDERED:
        asked = tl.load(order + row + whose, mask=mine, other=0) * heads + c % EACH
    a = tl.load(queries + asked[None, :] * D + even[:, None], mask=mine[None, :], other=0.0).to(tl.float32)
    b = tl.load(queries + asked[None, :] * D + odd[:, None], mask=mine[None, :], other=0.0).to(tl.float32)
    largest = tl.maximum(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)), 1e-30)
    a = a / largest[None, :]
    b = b / largest[None, :]
    scale = scale * largest  # [COLUMNS]
    query_even = a.to(tl.float16)
    query_odd = b.to(tl.float16)
    undo = matrices + d[:, None] * HALF + i[None, :]
    if SPLIT:
        undo_even = tl.load(undo)
        undo_odd = tl.load(undo + D * HALF)
    revolutions = tl.load(turns + i)
    plane_at = t // 32 * (32 * G) + t % 32
    small_at = small + t[:, None] * HALF + i[None, :]
    norm = (TEAM * D) ** -0.5
    score_at = scores + line.to(tl.int64) * slots

    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    base = tl.load(spans + row * SPAN + 7)
    first, last = _share_of(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS, part)
    tiles, sub = (last - first) * TILES, tl.program_id(0) % split
    begin, end = tiles * sub // split, tiles * (sub + 1) // split
    first += low // TOKENS
    for tile in range(begin, end):
        page = first + tile // TILES
        j = tile % TILES * WIDE
        # Parts of 2**64 of a revolution: what is beyond a whole one falls off by itself.
        angle = ((revolutions * (base + page * TOKENS + j * 32)) >> 32).to(tl.float32) * 1.4629180792671596e-09
        cos_base = (_cos(angle, ASM) * norm)[None, :]
        sin_base = (_sin(angle, ASM) * norm)[None, :]
        cos_small = tl.load(small_at)
        sin_small = tl.load(small_at + 64 * HALF)
        cosine = (cos_base * cos_small - sin_base * sin_small).to(tl.float16)
        sine = (sin_base * cos_small + cos_base * sin_small).to(tl.float16)
        s = tl.zeros([32 * WIDE, COLUMNS], tl.float32)
        for g in tl.range(TEAM, num_stages=STAGES):
            # Where the rotated channels of this head of the team stand.
            place = tl.load(places + (row - first_row + g) * D + d)
            entry = table + ((first_row + (place >> _log2(D))).to(tl.int64) * columns + page) * FIELDS
            inside = place & (D - 1)
            word_at = (tl.load(entry) * 2).to(tl.pointer_type(tl.int16)) + inside * 32
            group = (inside >> _log2(CHANNELS)) * 32
            step_at = (tl.load(entry + 1) * 2).to(tl.pointer_type(tl.float16)) + group
            zero_at = (tl.load(entry + 2) * 2).to(tl.pointer_type(tl.float16)) + group
            words = tl.load(tl.multiple_of(word_at, 16)[:, None] + (t % 32)[None, :])
            step = tl.load(tl.multiple_of(step_at + j * 32 * G, 16)[:, None] + plane_at[None, :])
            zero = tl.load(tl.multiple_of(zero_at + j * 32 * G, 16)[:, None] + plane_at[None, :])
            shift = tl.broadcast_to(((j + t // 32) * BITS)[None, :], [D, 32 * WIDE])
            keys = tl.trans(_field(words, shift, BITS, ASM) * step + zero)
            if SPLIT:
                # Heads are added up behind the product with the queries, which is linear.
                both = whose & g
                sign = 1.0 - 2.0 * ((both ^ (both >> 1)) & 1).to(tl.float32)
                s += _turned(keys, undo_even, undo_odd, cosine, sine, query_even, query_odd, ASM) * sign[None, :]
            else:
                at = undo + (tl.program_id(1) * TEAM + g) * 2 * D * HALF
                s += _turned(keys, tl.load(at), tl.load(at + D * HALF), cosine, sine, query_even, query_odd, ASM)
        slot = page * TOKENS + j * 32 + t
        seen = (slot >= low) & (slot < high)
        tl.store(score_at[None, :] + slot[:, None], s * scale[None, :], mask=seen[:, None] & mine[None, :])
    if SINKS > 0:
        tl.debug_barrier()  # they come after what stands in their places
        for page in range(first + begin // TILES, first + tl.cdiv(end, TILES)):
            marks = tl.load(table + ((row + whose).to(tl.int64) * columns + page) * FIELDS + 6, mask=mine, other=0) * 2
            marks = marks.to(tl.pointer_type(tl.int16))
            mark = tl.load(marks[None, :] + k[:, None], mask=(k < SINKS)[:, None] & mine[None, :], other=-1)
            slot_of = page * TOKENS + mark.to(tl.int32)
            tile_of = (page - first) * TILES + mark.to(tl.int32) // (32 * WIDE)
            there = (mark >= 0) & (slot_of >= low) & (slot_of < high) & (tile_of >= begin) & (tile_of < end)
            if tl.max(there.to(tl.int32)) > 0:
                exact = tl.zeros([S, COLUMNS], tl.float32)
                for g in range(TEAM):
                    sink_at = sink_keys + ((row + g) * SINKS + k[:, None]) * D
                    x = tl.load(sink_at + even[None, :], mask=k[:, None] < SINKS, other=0.0).to(tl.float32)
                    y = tl.load(sink_at + odd[None, :], mask=k[:, None] < SINKS, other=0.0).to(tl.float32)
                    both = tl.dot(y, b, tl.dot(x, a, input_precision="ieee"), input_precision="ieee")
                    exact = tl.where(whose[None, :] == g, both, exact)
                exact = exact * scale[None, :]
                tl.store(score_at[None, :] + slot_of, exact, mask=there & mine[None, :])


@triton.jit
def _turned(keys, undo_even, undo_odd, cosine, sine, query_even, query_odd, ASM: tl.constexpr):
    """Inner products of queries with keys whose rotation is undone, and then RoPE done: `[tokens, columns]`."""
    k_even = _half(tl.dot(keys, undo_even), ASM)
    k_odd = _half(tl.dot(keys, undo_odd), ASM)
    s = tl.dot(k_even * cosine - k_odd * sine, query_even)
    return tl.dot(k_odd * cosine + k_even * sine, query_odd, s)


@triton.jit(do_not_specialize=("rows", "columns", "heads", "slots"))
def _values(
    scores, table, spans, starts, matrix, sink_values, out, lse, rows, columns, heads, slots,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, CHANNELS: tl.constexpr, TEAM: tl.constexpr,
    SINKS: tl.constexpr, S: tl.constexpr, FIELDS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The values of one share of a row's pages, weighted by the scores that `_scores` left. Grid: (programs, TEAM)."""
    row = _row(starts, rows, R)
    if row >= rows:
        return
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    G: tl.constexpr = D // CHANNELS
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    g = tl.arange(0, G)
    h = tl.arange(0, N)
    k = tl.arange(0, S)
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    first += low // TOKENS
    last += low // TOKENS
    row += tl.program_id(1)
    score_at = scores + (row * heads + h[None, :]).to(tl.int64) * slots
    turn = tl.load(matrix + d[:, None] * D + d[None, :])
    if SINKS > 0:
        at = sink_values + (row * SINKS + k[:, None]) * D + d[None, :]
        exact = tl.load(at, mask=k[:, None] < SINKS, other=0.0).to(tl.float16)
        # As values are: times the matrix.
        exact = (tl.dot(exact, turn) * D**-0.5).to(tl.float16)  # [S, D]
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([32, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    for page in range(first, last):
        word_at = tl.multiple_of(_address(table, row, columns, page, 3, FIELDS).to(tl.pointer_type(tl.int16)), 16)
        words = tl.load(word_at + r[:, None] * D + d[None, :])
        scale_at = tl.multiple_of(_address(table, row, columns, page, 4, FIELDS), 16).to(tl.pointer_type(tl.float16))
        zero_at = tl.multiple_of(_address(table, row, columns, page, 5, FIELDS), 16).to(tl.pointer_type(tl.float16))
        if SINKS > 0:
            marks = _address(table, row, columns, page, 6, FIELDS).to(tl.pointer_type(tl.int16))
            marks = tl.load(marks + k, mask=k < SINKS, other=-1).to(tl.int32)
        found = ()
        for j in tl.static_range(PLANES):
            token = page * TOKENS + j * 32 + r
            seen = ((token >= low) & (token < high))[:, None] & (h[None, :] < heads)
            found = found + (tl.load(score_at + token[:, None], mask=seen, other=-1e30),)
        top = found[0]
        for j in tl.static_range(1, PLANES):
            top = tl.maximum(top, found[j])
        above = tl.maximum(m, tl.max(top, 0))
        shrink = tl.exp2(m - above)
        m = above
        weight = weight * shrink[None, :]
        acc = acc * shrink[None, :]
        for j in tl.static_range(PLANES):
            p = tl.exp2(found[j] - m[None, :])
            weight += p
            part = j * 32 * G + g[:, None] * 32 + r[None, :]
            steps = (tl.load(scale_at + part) * _rest(BITS, j)).to(tl.float16)
            zero = tl.load(zero_at + part)
            v = tl.trans(_code(words, BITS, j, ASM))
            v = v * _spread(steps, j, G, CHANNELS) + _spread(zero, j, G, CHANNELS)
            acc = tl.dot(v, p.to(tl.float16), acc)
        if SINKS > 0:  # noqa: SIM102 (one is known when it is compiled)
            if tl.max(marks, 0) >= 0:
                # What is exact, in the place of what was added up for it just now.
                token_of = page * TOKENS + marks
                there = (marks >= 0) & (token_of >= low) & (token_of < high)
                score = tl.load(score_at + token_of[:, None], mask=there[:, None] & (h[None, :] < heads), other=-1e30)
                p_of = tl.where(there[:, None], tl.exp2(score - m[None, :]), 0.0).to(tl.float16)
                mark = tl.maximum(marks, 0)
                coarse = tl.load(word_at + (mark % 32)[:, None] * D + d[None, :]).to(tl.int32)
                coarse = (coarse >> (mark // 32 * BITS)[:, None]) & (2**BITS - 1)
                part_at = (mark // 32 * (32 * G) + mark % 32)[:, None] + (d // CHANNELS * 32)[None, :]
                coarse = coarse.to(tl.float32) * tl.load(scale_at + part_at).to(tl.float32)
                coarse = exact.to(tl.float32) - (coarse + tl.load(zero_at + part_at).to(tl.float32))
                acc = tl.dot(tl.trans(coarse.to(tl.float16)), p_of, acc)
    total = tl.sum(weight, 0)
    # Undo the values' rotation, in two parts of float16 each: what is rounded off the first is the second.
    o = acc / tl.where(total > 0, total, 1.0)[None, :]
    near = o.to(tl.float16)
    o = tl.dot(turn, near) + tl.dot(turn, (o - near.to(tl.float32)).to(tl.float16))
    place = tl.program_id(0) * TEAM + tl.program_id(1)
    _leave(out, lse, place, o * (D**-0.5 * total)[None, :], m, total, heads, N, D)


def attend(
    form: Rotated,
    packed: Packed,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor | None = None,
    early: bool = False,
    warps: tuple[int, int] = (4, 2),
    stages: int = 1,
    registers: tuple[int | None, int | None] = (None, None),
) -> None:
    """See `Reader.attend`."""
    rows, (_, heads, dim) = len(packed.table), queries.shape
    columns, (places,), (turns, small, matrices, values) = packed.table.shape[1], form.constants, form.tables
    slots = columns * form.tokens
    if scores is None:
        scores = torch.empty((rows, heads, slots), dtype=torch.float32, device=queries.device)
    sink_keys, sink_values = packed.learned if form.sinks else (queries, queries)
    compiled = queries.is_cuda and choose(queries.device).path == "cuda" and sink_keys.dtype == queries.dtype
    if compiled and cuda.supports(form, heads, queries.dtype):
        cuda.attend(form, packed, queries, scale, spans, starts, out, lse, scores, early)
        return
    each = power_of_2(heads)
    common = {
        "D": dim, "BITS": form.bits, "CHANNELS": form.channels, "TEAM": form.team,
        "SINKS": form.sinks, "S": 16 if form.sinks <= 16 else 32, "FIELDS": len(form.fields), "SPAN": SPAN,
        "R": searched(rows), "ASM": queries.device.type == "cuda",
    }  # fmt: skip
    order = packed.table if packed.order is None else packed.order
    _scores[(max(len(out), 2 * processors(queries.device)), 1 if form.split else form.team)](
        queries, order, packed.table, spans, starts, places, turns, small, matrices, sink_keys, scores, scale, rows,
        columns, heads, slots, ORDERED=packed.order is not None, KV_HEADS=form.kv_heads, EACH=each,
        COLUMNS=max(8, power_of_2(each * form.team)), SPLIT=form.split, NEIGHBOURS=form.neighbours,
        WIDE=2 - form.planes % 2, STAGES=stages, num_warps=warps[0], num_stages=stages,
        maxnreg=registers[0], **common,
    )  # fmt: skip
    _values[(len(out), form.team)](
        scores, packed.table, spans, starts, values, sink_values, out, lse, rows, columns, heads, slots,
        N=8 if heads <= 8 else 16, num_warps=warps[1], num_stages=1, maxnreg=registers[1], **common,
    )  # fmt: skip
