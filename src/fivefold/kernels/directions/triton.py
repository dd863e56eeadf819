"""One decoding step over pages of shared directions, in Triton: `Directions.attend`.

A token's norm is a factor of its score, and of its weight. Where directions are as they are, a token that is kept is
read from its own place. Packed ones are read as `packed_decode/triton.py` reads KIVI's pages: the own score of a token
that is kept takes the place of the other, and its weight goes to what is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, overlaps
from fivefold.kernels.directions.reference import Directions
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN, searched
from fivefold.kernels.packed_decode.triton import (
    _TYPES,
    _code_planes,
    _factor,
    _fold,
    _leave,
    _log2_factor,
    _log2_unfold,
    _plane,
    _queries,
    _row,
    _scaled,
    _share,
    _times,
)  # fmt: skip

_TILE = 64, 2
"""Tokens of a tile of directions as they are, and stages of the loop over tiles."""


@triton.jit
def _line(table, row, columns, page, there, FIELDS: tl.constexpr):
    """Where the fields of a page begin, in units of 2 bytes: a tuple."""
    out = ()
    for field in tl.static_range(FIELDS):
        out = out + (tl.load(table + (row * columns + page) * FIELDS + field, mask=there, other=0),)
    return out


@triton.jit
def _when(there, line, FIELDS: tl.constexpr):
    """The same, zeros where there is none. (A loop that hands on what it was handed is not pipelined.)"""
    out = ()
    for field in tl.static_range(FIELDS):
        out = out + (tl.where(there, line[field], 0),)
    return out


@triton.jit
def _field(line, FIELD: tl.constexpr, DTYPE: tl.constexpr, UNIT: tl.constexpr):
    """Where a field of a page begins."""
    return tl.multiple_of((line[FIELD] * 2).to(tl.pointer_type(DTYPE)), UNIT)


@triton.jit
def _slots(slots, PLACES: tl.constexpr):
    """Which slots of a page are kept: a tuple."""
    out = ()
    for place in tl.static_range(PLACES):
        out = out + (tl.load(slots + place).to(tl.int32),)
    return out


@triton.jit
def _kept_scores(q, kept, PLACES: tl.constexpr, D: tl.constexpr):
    """Products of queries float32 `[D, N]` with what is kept: a tuple of `[N]`."""
    d = tl.arange(0, D)
    out = ()
    for place in tl.static_range(PLACES):
        key = tl.load(kept + place * D + d).to(tl.float32)
        out = out + (tl.sum(q * key[:, None], 0),)
    return out


@triton.jit
def _put(s, scores, slots, token, PLACES: tl.constexpr):
    """Scores `s [T, N]` of tokens (slots of a page, `[T]`), those of what is kept put into their places."""
    for place in tl.static_range(PLACES):
        s = tl.where((token == slots[place])[:, None], scores[place][None, :], s)
    return s


@triton.jit
def _take(p, sums, slots, token, PLACES: tl.constexpr):
    """(`p [T, N]` without the weights of what is kept, `sums` and these)"""
    out = ()
    for place in tl.static_range(PLACES):
        mine = (token == slots[place])[:, None]
        out = out + (sums[place] + tl.sum(tl.where(mine, p, 0.0), 0),)
        p = tl.where(mine, 0.0, p)
    return p, out


@triton.jit
def _nothing(PLACES: tl.constexpr, N: tl.constexpr):
    out = ()
    for _ in tl.static_range(PLACES):
        out = out + (tl.zeros([N], tl.float32),)
    return out


@triton.jit
def _kept_values(acc, sums, kept, PLACES: tl.constexpr, D: tl.constexpr):
    """acc `[D, N]` and what is kept, weighted."""
    d = tl.arange(0, D)
    for place in tl.static_range(PLACES):
        acc += tl.load(kept + place * D + d).to(tl.float32)[:, None] * sums[place][None, :]
    return acc


@triton.jit
def _page_slots(line, FIELD: tl.constexpr, there, PLACES: tl.constexpr):
    """Which slots of a page are kept, -1 for none: a tuple."""
    out = ()
    for place in tl.static_range(PLACES):
        out = out + (tl.load(_field(line, FIELD, tl.int16, 2) + place, mask=there, other=-1).to(tl.int32),)
    return out


@triton.jit
def _where(
    line,
    FIELD: tl.constexpr,
    KEPT: tl.constexpr,
    slots,
    token,
    DTYPE: tl.constexpr,
    D: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Where tokens `[T]` of a page begin: in its directions, or where they are kept, and whether they are."""
    WIDTH: tl.constexpr = D * DTYPE.primitive_bitwidth // 16
    at = line[FIELD] + token * WIDTH
    own = token < 0
    for place in tl.static_range(PLACES):
        mine = token == slots[place]
        at = tl.where(mine, line[KEPT] + place * WIDTH, at)
        own = own | mine
    return tl.multiple_of((at * 2).to(tl.pointer_type(DTYPE)), 16), own


@triton.jit
def _any(slots, token, PLACES: tl.constexpr):
    """Whether tokens are among the slots."""
    out = token < 0
    for place in tl.static_range(PLACES):
        out = out | (token == slots[place])
    return out


@triton.jit
def _apart(table, row, columns, first, last, S: tl.constexpr, T: tl.constexpr, PLACES: tl.constexpr):
    """Of T // S pages from `first` on, the tokens of which a key or a value is kept, one each `[T]`: (fields of its
    page, its slot or -1, which slots of its page are kept, of keys and of values)."""
    i = tl.arange(0, T)
    page = first + i // S
    there = (page < last) & (i < T // S * S)
    line = _line(table, row, columns, page, there, 8)
    key_slots = _page_slots(line, 2, there, PLACES)
    value_slots = _page_slots(line, 5, there, PLACES)
    slot = tl.full([T], -1, tl.int32)
    for place in tl.static_range(PLACES):
        slot = tl.where(i % S == place, key_slots[place], slot)
        # One of which both are kept has come with its key.
        once = (i % S == PLACES + place) & ~_any(key_slots, value_slots[place], PLACES)
        slot = tl.where(once, value_slots[place], slot)
    return line, slot, key_slots, value_slots


@triton.jit
def _norms(line, token, seen, NORMS: tl.constexpr):
    """Norms of keys and of values of tokens `[T]` of a page, float32."""
    keys = tl.load(_field(line, 3, NORMS, 16) + token, mask=seen, other=0.0).to(tl.float32)
    return keys, tl.load(_field(line, 6, NORMS, 16) + token, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _attend(q, scale, k, v, key_norm, value_norm, seen, m, weight, acc):
    """(m, weight, acc) with one tile more: k, v `[T, D]` times norms `[T]`, of which those `seen` count."""
    s = tl.dot(k, q, input_precision="ieee") * scale * key_norm[:, None]
    s = tl.where(seen[:, None], s, -1e30)
    above = tl.maximum(m, tl.max(s, 0))
    shrink = tl.exp2(m - above)
    p = tl.where(seen[:, None], tl.exp2(s - above[None, :]), 0.0)
    weight = weight * shrink[None, :] + p
    p = (p * value_norm[:, None]).to(v.dtype)
    return above, weight, tl.dot(tl.trans(v), p, acc * shrink[None, :], input_precision="ieee")


@triton.constexpr_function
def _fetch_asm(nbytes):
    return f"{{ cp.async.bulk.prefetch.L2.global [$1], {int(nbytes)}; mov.b32 $0, 0; }}"


@triton.jit
def _fetch(address, PIECES: tl.constexpr, NBYTES: tl.constexpr):
    """Begin to read so many pieces of NBYTES each into the L2 cache, from an address in units of 2 bytes on: one for
    each thread."""
    at = address * 2 + tl.arange(0, PIECES) * NBYTES
    tl.inline_asm_elementwise(_fetch_asm(NBYTES), "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit(do_not_specialize=("rows", "columns", "heads"))
def _plain(
    queries, table, spans, starts, out, lse, scale, rows, columns, heads,
    N: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, NORMS: tl.constexpr, TOKENS: tl.constexpr, T: tl.constexpr,
    PLACES: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One share of a row's pages of directions as they are. Grid: (programs,).

    Tokens of which something is kept come first, those of many pages in one tile, and are left out of the tiles of
    their pages, which so are read as they lie. What is small is read a tile ahead: nobody waits for it.
    EARLY: it was launched before the kernel in front of it was done, and begins to read what that one does not write.
    PDL: what comes behind may be launched early, and begins once that one is done.
    """
    row = _row(starts, rows, R)
    if row >= rows:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        return
    work = tl.float32 if WIDE else DTYPE
    WIDTH: tl.constexpr = D * DTYPE.primitive_bitwidth // 16
    TILES: tl.constexpr = TOKENS // T
    S: tl.constexpr = 2 * PLACES
    t = tl.arange(0, T)
    d = tl.arange(0, D)
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    first += low // TOKENS
    last += low // TOKENS
    line = _line(table, row, columns, first, first < last, 8)
    if EARLY:  # noqa: SIM102 (a constant of the compiler's)
        if first < last:
            _fetch(line[0], 64, TOKENS * WIDTH // 32)
            _fetch(line[1], 64, TOKENS * WIDTH // 32)
    where, slot, key_slots, value_slots = _apart(table, row, columns, first, last, S, T, PLACES)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    q = _queries(queries, row, heads, N, D)
    if work == tl.float16:
        q, unscale = _scaled(q)
        scale = scale * unscale[None, :]
    else:
        q = q.to(work)
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([T, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    for page in range(first, last, T // S):
        if tl.max(slot, 0) >= 0:
            at = (page + t // S) * TOKENS + slot
            seen = (slot >= 0) & (at >= low) & (at < high)
            keys, key_own = _where(where, 0, 4, key_slots, slot, DTYPE, D, PLACES)
            values, value_own = _where(where, 1, 7, value_slots, slot, DTYPE, D, PLACES)
            k = tl.load(keys[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(work)
            v = tl.load(values[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(work)
            key_norm, value_norm = _norms(where, slot, seen, NORMS)
            key_norm = tl.where(key_own, 1.0, key_norm)
            value_norm = tl.where(value_own, 1.0, value_norm)
            m, weight, acc = _attend(q, scale, k, v, key_norm, value_norm, seen, m, weight, acc)
        where, slot, key_slots, value_slots = _apart(table, row, columns, page + T // S, last, S, T, PLACES)
    first *= TILES
    last *= TILES
    after = _line(table, row, columns, (first + 1) // TILES, first + 1 < last, 8)
    key_at = _page_slots(line, 2, first < last, PLACES)
    value_at = _page_slots(line, 5, first < last, PLACES)
    key_norm, value_norm = _norms(line, first % TILES * T + t, first < last, NORMS)
    for tile in tl.range(first, last):
        token = tile % TILES * T + t
        there = (tile * T + t >= low) & (tile * T + t < high)
        inside = token[:, None] * D + d[None, :]
        k = tl.load(_field(line, 0, DTYPE, 16) + inside, mask=there[:, None], other=0.0).to(work)
        v = tl.load(_field(line, 1, DTYPE, 16) + inside, mask=there[:, None], other=0.0).to(work)
        seen = there & ~_any(key_at, token, PLACES) & ~_any(value_at, token, PLACES)
        # A norm of what is not there yet may be anything.
        key_size = tl.where(seen, key_norm, 0.0)
        value_size = tl.where(seen, value_norm, 0.0)
        more = tile + 1 < last
        line = _when(more, after, 8)
        key_norm, value_norm = _norms(line, (tile + 1) % TILES * T + t, more, NORMS)
        key_at = _page_slots(line, 2, more, PLACES)
        value_at = _page_slots(line, 5, more, PLACES)
        after = _line(table, row, columns, (tile + 2) // TILES, tile + 2 < last, 8)
        m, weight, acc = _attend(q, scale, k, v, key_size, value_size, seen, m, weight, acc)
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


@triton.jit(do_not_specialize=("rows", "columns", "heads"))
def _planar(
    queries, table, spans, starts, out, lse, scale, unscale, rows, columns, heads,
    N: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, NORMS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    ASM: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One share of a row's pages of packed directions, which are to be multiplied by `unscale`. EARLY, PDL: see
    `_plain`. Grid: (programs,)."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = _row(starts, rows, R)
    if row >= rows:
        return
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    VALUE_GROUPS: tl.constexpr = D // CHANNELS
    UNFOLD: tl.constexpr = _log2_unfold(BITS)
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    g = tl.arange(0, VALUE_GROUPS)
    word = r[:, None] * D + d[None, :]
    wide = _queries(queries, row, heads, N, D).to(tl.float32) * scale
    q = wide.to(tl.float16)
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([32, N], tl.float32)
    offset = tl.zeros([32, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)  # times 2**-FOLD
    kept = tl.zeros([D, N], tl.float32)
    first += low // TOKENS
    last += low // TOKENS
    after = _line(table, row, columns, first, first < last, 12)
    for page in range(first, last):
        line = after
        after = _line(table, row, columns, page + 1, page + 1 < last, 12)
        words = tl.load(_field(line, 0, tl.int16, 16) + word)
        value_words = tl.load(_field(line, 3, tl.int16, 16) + word)
        key_scale = _field(line, 1, tl.float16, 16)
        key_zero = _field(line, 2, tl.float16, 16)
        value_scale = _field(line, 4, tl.float16, 16)
        value_zero = _field(line, 5, tl.float16, 16)
        key_norm = _field(line, 7, NORMS, 16)
        value_norm = _field(line, 10, NORMS, 16)
        slots = _slots(_field(line, 6, tl.int16, 2), PLACES)
        # All of a page's scales at the top, or they would be waited for one by one.
        key_scales = ()
        key_zeros = ()
        key_norms = ()
        value_scales = ()
        value_zeros = ()
        value_norms = ()
        for j in tl.static_range(PLANES):
            token = page * TOKENS + j * 32 + r
            seen = (token >= low) & (token < high)
            place = j * 32 // GROUP * D + d
            key_scales = key_scales + (_times(tl.load(key_scale + place), _log2_factor(BITS, j), ASM),)
            key_zeros = key_zeros + (_times(tl.load(key_zero + place), UNFOLD, ASM),)
            key_norms = key_norms + (tl.load(key_norm + j * 32 + r).to(tl.float32) * (unscale * _fold(BITS)),)
            norm = tl.load(value_norm + j * 32 + r, mask=seen, other=0.0).to(tl.float32) * unscale
            value_norms = value_norms + (norm,)
            if VALUE_GROUPS == 1:
                scales = tl.load(value_scale + j * 32 + r, mask=seen, other=0.0).to(tl.float32)
                zeros = tl.load(value_zero + j * 32 + r, mask=seen, other=0.0).to(tl.float32)
                value_scales = value_scales + (scales * norm * _factor(BITS, j),)
                value_zeros = value_zeros + (zeros * norm,)
            else:
                place = j * 32 * VALUE_GROUPS + g[:, None] * 32 + r[None, :]
                value_scales = value_scales + (_times(tl.load(value_scale + place), _log2_factor(BITS, j), ASM),)
                value_zeros = value_zeros + (_times(tl.load(value_zero + place), UNFOLD, ASM),)
        own = _kept_scores(wide, _field(line, 8, DTYPE, 16), PLACES, D)
        scores = ()
        for j in tl.static_range(PLANES):
            k = _plane(words, BITS, j, ASM) * key_scales[j][None, :] + key_zeros[j][None, :]
            s = tl.dot(k, q) * key_norms[j][:, None]
            s = _put(s, own, slots, j * 32 + r, PLACES)
            token = page * TOKENS + j * 32 + r
            scores = scores + (tl.where(((token >= low) & (token < high))[:, None], s, -1e30),)
        top = scores[0]
        for j in tl.static_range(1, PLANES):
            top = tl.maximum(top, scores[j])
        above = tl.maximum(m, tl.max(top, 0))
        shrink = tl.exp2(m - above)
        m = above
        weight = weight * shrink[None, :]
        offset = offset * shrink[None, :]
        acc = acc * shrink[None, :]
        slots = _slots(_field(line, 9, tl.int16, 2), PLACES)
        sums = _nothing(PLACES, N)
        for j in tl.static_range(PLANES):
            token = page * TOKENS + j * 32 + r
            seen = (token >= low) & (token < high)
            p = tl.where(seen[:, None], tl.exp2(scores[j] - m[None, :]), 0.0)
            weight += p
            p, sums = _take(p, sums, slots, j * 32 + r, PLACES)
            v = tl.trans(_plane(value_words, BITS, j, ASM))
            if VALUE_GROUPS == 1:
                offset += p * value_zeros[j][:, None]
                p = p * value_scales[j][:, None]
            else:
                p = p * value_norms[j][:, None]
                spread = tl.broadcast_to(value_scales[j][:, None, :], [VALUE_GROUPS, CHANNELS, 32])
                shift = tl.broadcast_to(value_zeros[j][:, None, :], [VALUE_GROUPS, CHANNELS, 32])
                v = v * tl.reshape(spread, [D, 32]) + tl.reshape(shift, [D, 32])
            acc = tl.dot(v, p.to(tl.float16), acc)
        kept = _kept_values(kept * shrink[None, :], sums, _field(line, 11, DTYPE, 16), PLACES, D)
    acc = acc * _fold(BITS) + kept
    if VALUE_GROUPS == 1:
        acc += tl.sum(offset, 0)[None, :]
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


def attend(
    form: Directions,
    packed: Packed,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    early: bool = False,
) -> None:
    """`Reader.attend` of `Directions`."""
    rows, heads, dim = queries.shape
    device, inner = queries.device, form.inner
    interpreted = device.type != "cuda"
    norms = tl.float32 if form.dtype is torch.float32 else tl.float16
    common = {
        "N": 8 if heads <= 8 else 16, "D": dim, "DTYPE": _TYPES[form.dtype], "NORMS": norms, "PLACES": form.places,
        "SPAN": SPAN, "R": searched(rows), "EARLY": early, "PDL": overlaps(device),
        **({"launch_pdl": True} if early else {}),
    }  # fmt: skip
    given = rows, packed.table.shape[1], heads
    with on(device):
        if inner is None:
            tile, stages = (32, 1) if form.dtype is torch.float32 else _TILE
            _plain[(len(out),)](
                queries, packed.table, spans, starts, out, lse, scale, *given, TOKENS=form.tokens, T=tile,
                WIDE=interpreted, num_warps=2, num_stages=stages, **common,
            )  # fmt: skip
        else:
            _planar[(len(out),)](
                queries, packed.table, spans, starts, out, lse, scale, 1.0 / form.scale, *given, BITS=inner.bits,
                GROUP=inner.group, CHANNELS=inner.channels, ASM=not interpreted, num_warps=2, num_stages=1, **common,
            )  # fmt: skip
