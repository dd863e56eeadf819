"""One decoding step over pages of shared directions, in Triton: `Directions.attend`.

A token's norm is a factor of its score, and of its weight. Where directions are as they are, a token that is kept is
read from its own place. Packed ones are read as `packed_decode/triton.py` reads KIVI's pages: the own score of a token
that is kept takes the place of the other, and its weight goes to what is kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on
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

_AHEAD = 64, 1
"""Tokens of a tile of directions as they are, and stages of the loop over tiles."""


@triton.jit
def _line(table, row, columns, page, there, FIELDS: tl.constexpr):
    """Where the fields of a page begin, in units of 2 bytes: a tuple."""
    out = ()
    for field in tl.static_range(FIELDS):
        out = out + (tl.load(table + (row * columns + page) * FIELDS + field, mask=there, other=0),)
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


@triton.jit(do_not_specialize=("rows", "columns", "heads"))
def _plain(
    queries, table, spans, starts, out, lse, scale, rows, columns, heads,
    N: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, NORMS: tl.constexpr, TOKENS: tl.constexpr, T: tl.constexpr,
    PLACES: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One share of a row's pages of directions as they are. Grid: (programs,).

    A token that is kept is read from where it is, and its norm is 1. Addresses, and which tokens are kept, are read a
    tile ahead: nobody waits for them.
    """
    row = _row(starts, rows, R)
    if row >= rows:
        return
    work = tl.float32 if WIDE else DTYPE
    t = tl.arange(0, T)
    d = tl.arange(0, D)
    q = _queries(queries, row, heads, N, D)
    if work == tl.float16:
        q, unscale = _scaled(q)
        scale = scale * unscale[None, :]
    else:
        q = q.to(work)
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    TILES: tl.constexpr = TOKENS // T
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([T, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    first = (first + low // TOKENS) * TILES
    last = (last + low // TOKENS) * TILES
    line = _line(table, row, columns, first // TILES, first < last, 8)
    key_slots = _page_slots(line, 2, first < last, PLACES)
    value_slots = _page_slots(line, 5, first < last, PLACES)
    for tile in range(first, last):
        token = tile % TILES * T + t
        seen = (tile * T + t >= low) & (tile * T + t < high)
        keys, key_own = _where(line, 0, 4, key_slots, token, DTYPE, D, PLACES)
        values, value_own = _where(line, 1, 7, value_slots, token, DTYPE, D, PLACES)
        k = tl.load(keys[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(work)
        v = tl.load(values[:, None] + d[None, :], mask=seen[:, None], other=0.0).to(work)
        key_norm = tl.load(_field(line, 3, NORMS, 16) + token, mask=seen, other=0.0).to(tl.float32)
        value_norm = tl.load(_field(line, 6, NORMS, 16) + token, mask=seen, other=0.0).to(tl.float32)
        line = _line(table, row, columns, (tile + 1) // TILES, tile + 1 < last, 8)
        s = tl.dot(k, q, input_precision="ieee") * scale * tl.where(key_own, 1.0, key_norm)[:, None]
        s = tl.where(seen[:, None], s, -1e30)
        above = tl.maximum(m, tl.max(s, 0))
        shrink = tl.exp2(m - above)
        m = above
        p = tl.where(seen[:, None], tl.exp2(s - m[None, :]), 0.0)
        weight = weight * shrink[None, :] + p
        p = p * tl.where(value_own, 1.0, value_norm)[:, None]
        key_slots = _page_slots(line, 2, tile + 1 < last, PLACES)
        value_slots = _page_slots(line, 5, tile + 1 < last, PLACES)
        acc = tl.dot(tl.trans(v), p.to(work), acc * shrink[None, :], input_precision="ieee")
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


@triton.jit(do_not_specialize=("rows", "columns", "heads"))
def _planar(
    queries, table, spans, starts, out, lse, scale, unscale, rows, columns, heads,
    N: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, NORMS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, PLACES: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One share of a row's pages of packed directions, which are to be multiplied by `unscale`. Grid: (programs,)."""
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
) -> None:
    """`Reader.attend` of `Directions`."""
    rows, heads, dim = queries.shape
    device, inner = queries.device, form.inner
    interpreted = device.type != "cuda"
    norms = tl.float32 if form.dtype is torch.float32 else tl.float16
    common = {
        "N": 8 if heads <= 8 else 16, "D": dim, "DTYPE": _TYPES[form.dtype], "NORMS": norms, "PLACES": form.places,
        "SPAN": SPAN, "R": searched(rows),
    }  # fmt: skip
    given = rows, packed.table.shape[1], heads
    with on(device):
        if inner is None:
            tile, stages = (32, 1) if form.dtype is torch.float32 else _AHEAD
            _plain[(len(out),)](
                queries, packed.table, spans, starts, out, lse, scale, *given, TOKENS=form.tokens, T=tile,
                WIDE=interpreted, num_warps=2, num_stages=stages, **common,
            )  # fmt: skip
        else:
            _planar[(len(out),)](
                queries, packed.table, spans, starts, out, lse, scale, 1.0 / form.scale, *given, BITS=inner.bits,
                GROUP=inner.group, CHANNELS=inner.channels, ASM=not interpreted, num_warps=2, num_stages=1, **common,
            )  # fmt: skip
