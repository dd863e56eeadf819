"""One decoding step over planar KIVI pages and exact pages, in Triton.

Three kernels. `_packed` attends over packed pages and `_exact` over exact ones; `_combine` merges what they leave. Each
program takes one share of one row's (sequence, kv head) pages and leaves a part (output, log-sum-exp). A work list
(`starts_of`) says which programs are whose: a row gets as many as it has pages, so that all programs end together,
however much longer some rows are than others. Pages are found by their addresses, in tables on the device, so they may
lie anywhere; lengths and the work list are on the device too, so that a captured graph stays right while they grow.

What makes the packed loop fast:

- Unpacking is one AND. A bit-field of a word, masked where it lies and read as float16, is the subnormal number
  `code * 2**(bit - 24)`; the word is shifted once or twice so that no field reaches the exponent (`_SHIFTS`). The
  factor 2**(24 - bit) goes into the scale, but for 2**FOLD, which goes into the softmax scale (keys) or into the
  output (values): so nothing overflows float16 while `|x| <= LIMIT`.
- Tokens are the rows of the products and the query heads its few columns; a plane of a page is a whole operand.
- One softmax per page: the maximum over planes is elementwise, the sum is reduced once at the end.
- Scales are loaded at the top, and multiplied there: `_times` is declared impure because the compiler would
  otherwise move it behind the change of layout, where there are sixteen times as many of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
import triton
import triton.language as tl

from fivefold.kernels.choice import choose
from fivefold.kernels.device import numbered, on, overlaps, power_of_2, processors
from fivefold.kernels.pack.triton import _codes, _ends, _step
from fivefold.kernels.packed_decode import cuda
from fivefold.kernels.packed_decode.reader import Divided, Reader
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import (
    LIMIT,
    PICKS,
    SPAN,
    TILE,
    Exact,
    Packed,
    Programs,
    pages_of,
    searched,
    starts_of,
    supports,
)

__all__ = [
    "LIMIT",
    "PICKS",
    "SPAN",
    "TILE",
    "Exact",
    "Packed",
    "append",
    "by_cuda",
    "decode",
    "pages_of",
    "programs_for",
    "starts_of",
    "supports",
]

# Left shift (negative: right) of the word, and the bit where the field then lies, for every plane.
_SHIFTS = {
    2: ((4, 4), (4, 6), (0, 4), (0, 6), (0, 8), (-6, 4), (-6, 6), (-6, 8)),
    3: ((6, 6), (0, 3), (0, 6), (-6, 3), (-6, 6)),
    4: ((4, 4), (0, 4), (-4, 4), (-6, 6)),
    8: ((2, 2), (-6, 2)),
}
_FOLD = {2: 13, 3: 13, 4: 11, 8: 9}

_STAGES = {2: 1, 3: 1, 4: 2, 8: 2}
"""Pages that the packed loop loads ahead, counting its own. Two cost registers, of which two bits need all."""
RESIDENT = 4
"""Programs of two warps that fit on a processor at a time."""
ALONE = 16
"""Rows that programs of exact pages share so that these fill the device once, if nothing is packed."""
ROUNDED = 4, 1, 128
"""Of a program for rounded pages, which have more to do for a token: warps, tiles that are under way, and a thread's
registers, at most, so that as many fit on a processor."""

PDL = True
"""Launch what merges the parts before the kernel that leaves them is done (programmatic dependent launch)."""
EARLY = True
"""In a captured step, launch the first of them before the kernel in front of it is done, too. (Outside of one that may
be what writes the tables.)"""

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.constexpr_function
def _shift(bits, plane):
    return _SHIFTS[int(bits)][int(plane)][0]


@triton.constexpr_function
def _mask(bits, plane):
    return (2 ** int(bits) - 1) << _SHIFTS[int(bits)][int(plane)][1]


@triton.constexpr_function
def _factor(bits, plane):
    return 2.0 ** (24 - _SHIFTS[int(bits)][int(plane)][1] - _FOLD[int(bits)])


@triton.constexpr_function
def _fold(bits):
    return 2.0 ** _FOLD[int(bits)]


@triton.constexpr_function
def _code_planes(bits):
    return len(_SHIFTS[int(bits)])


@triton.constexpr_function
def _plane_asm(bits, plane):
    shift, bit = _SHIFTS[int(bits)][int(plane)]
    mask = f"0x{((2 ** int(bits) - 1) << bit) * 0x10001:08X}"
    if shift == 0:
        return f"and.b32 $0, $1, {mask};"
    move = f"shl.b32 t, $1, {shift};" if shift > 0 else f"shr.u32 t, $1, {-shift};"
    return f"{{ .reg .b32 t; {move} and.b32 $0, t, {mask}; }}"


@triton.constexpr_function
def _times_asm(log2):
    return f"{{ .reg .b32 t; mov.b32 t, 0x{((int(log2) + 15) << 10) * 0x10001:08X}; mul.rn.f16x2 $0, $1, t; }}"


@triton.constexpr_function
def _log2_factor(bits, plane):
    return 24 - _SHIFTS[int(bits)][int(plane)][1] - _FOLD[int(bits)]


@triton.constexpr_function
def _log2_unfold(bits):
    return -_FOLD[int(bits)]


@triton.jit
def _plane(words, BITS: tl.constexpr, J: tl.constexpr, ASM: tl.constexpr):
    """The codes of plane J as float16 `code * 2**(bit - 24)`."""
    if ASM:
        return tl.inline_asm_elementwise(_plane_asm(BITS, J), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    SHIFT: tl.constexpr = _shift(BITS, J)
    MASK: tl.constexpr = _mask(BITS, J)
    if SHIFT > 0:
        words = words << SHIFT
    elif SHIFT < 0:
        words = words >> -SHIFT
    return (words & MASK).to(tl.float16, bitcast=True)


@triton.jit
def _times(x, LOG2: tl.constexpr, ASM: tl.constexpr):
    """float16 `x * 2**LOG2`."""
    if ASM:
        return tl.inline_asm_elementwise(_times_asm(LOG2), "=r,r", [x], dtype=tl.float16, is_pure=False, pack=2)
    return (x * 2.0**LOG2).to(tl.float16)


@triton.jit
def _queries(queries, row, heads, N: tl.constexpr, D: tl.constexpr):
    """The queries of a row: `[D, N]`, those behind `heads` zero."""
    d = tl.arange(0, D)
    h = tl.arange(0, N)
    return tl.load(queries + row * heads * D + h[None, :] * D + d[:, None], mask=h[None, :] < heads, other=0.0)


@triton.jit
def _scaled(q):
    """q `[D, N]` as float16, each column scaled by a power of two to be below 64, and these powers' inverses `[N]`."""
    most = tl.max(tl.abs(q.to(tl.float32)), 0)
    # The exponent of a float32, so that nothing is rounded.
    e = tl.minimum(tl.maximum(((most.to(tl.int32, bitcast=True) >> 23) & 255) - 127, -30), 100) - 5
    f = ((127 - e) << 23).to(tl.float32, bitcast=True)
    return (q.to(tl.float32) * f[None, :]).to(tl.float16), ((127 + e) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _row(starts, rows, R: tl.constexpr):
    """The row that this program works for, `rows` if none; see `_row_of`."""
    return _row_of(starts, rows, tl.program_id(0), R)


@triton.jit
def _row_of(starts, rows, part, R: tl.constexpr):
    """The row that a part is of, `rows` if none; starts: the first part of each, and how many in all. R: see
    `schedule.searched`; of more rows than that, first the R that it is among are looked for."""
    i = tl.arange(0, R)
    # (Behind a condition Triton 3.7 would forget what it knows of the addresses that follow, and load numbers singly.)
    lasts = tl.load(starts + (i + 1) * R, mask=(i + 1) * R <= rows, other=2147483647)
    first = R * tl.sum((lasts <= part).to(tl.int32), 0)
    found = tl.load(starts + 1 + first + i, mask=first + i < rows, other=2147483647) <= part
    return first + tl.sum(found.to(tl.int32), 0)


@triton.jit
def _share(starts, row, pages):
    """The pages [first, last) of the row's that are this program's."""
    return _share_of(starts, row, pages, tl.program_id(0))


@triton.jit
def _share_of(starts, row, pages, part):
    """The pages [first, last) of the row's that are a part's."""
    start = tl.load(starts + row)
    programs = tl.load(starts + row + 1) - start
    share = part - start
    return share * pages // programs, (share + 1) * pages // programs


@triton.jit
def _leave(out, lse, place, o, m, total, heads, N: tl.constexpr, D: tl.constexpr):
    """Store a part: o `[D, N]` not yet divided by the `total: [N]` of weights whose log2 maximum was m."""
    d = tl.arange(0, D)
    h = tl.arange(0, N)
    some = total > 0
    o = o / tl.where(some, total, 1.0)[None, :]
    tl.store(out + (place * heads + h[None, :]) * D + d[:, None], o, mask=h[None, :] < heads)
    tl.store(lse + place * heads + h, tl.where(some, m + tl.log2(tl.where(some, total, 1.0)), -1e30), mask=h < heads)


@triton.jit(do_not_specialize=("rows", "columns", "heads"))
def _packed(
    queries, table, spans, starts, out, lse, scale, rows, columns, heads,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    SPAN: tl.constexpr, R: tl.constexpr, ASM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One share of the packed pages of a row. Grid: (programs,)."""
    row = _row(starts, rows, R)
    if row >= rows:
        return
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    KEY_GROUPS: tl.constexpr = TOKENS // GROUP
    VALUE_GROUPS: tl.constexpr = D // CHANNELS
    # Where the fields of a record begin, in 16-bit words.
    KEY_SCALE: tl.constexpr = 32 * D
    KEY_ZERO: tl.constexpr = KEY_SCALE + KEY_GROUPS * D
    VALUE_WORDS: tl.constexpr = KEY_ZERO + KEY_GROUPS * D
    VALUE_SCALE: tl.constexpr = VALUE_WORDS + 32 * D
    VALUE_ZERO: tl.constexpr = VALUE_SCALE + TOKENS * VALUE_GROUPS
    UNFOLD: tl.constexpr = _log2_unfold(BITS)

    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    g = tl.arange(0, VALUE_GROUPS)
    word = r[:, None] * D + d[None, :]
    q, unscale = _scaled(_queries(queries, row, heads, N, D))
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    first += low // TOKENS
    last += low // TOKENS

    scale = scale * _fold(BITS) * unscale
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([32, N], tl.float32)
    offset = tl.zeros([32, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    address = tl.load(table + row * columns + first, mask=first < last, other=0)
    for page in tl.range(first, last, num_stages=STAGES):
        record = tl.multiple_of((address * 16).to(tl.pointer_type(tl.int16)), 16)
        address = tl.load(table + row * columns + page + 1, mask=page + 1 < last, other=0)
        half = record.to(tl.pointer_type(tl.float16))
        words = tl.load(record + word)
        key_scale = ()
        key_zero = ()
        value_scale = ()
        value_zero = ()
        for j in tl.static_range(PLANES):
            at = j * 32 // GROUP * D + d
            key_scale = key_scale + (_times(tl.load(half + KEY_SCALE + at), _log2_factor(BITS, j), ASM),)
            key_zero = key_zero + (_times(tl.load(half + KEY_ZERO + at), UNFOLD, ASM),)
        for j in tl.static_range(PLANES):
            if VALUE_GROUPS == 1:
                value_scale = value_scale + (tl.load(half + VALUE_SCALE + j * 32 + r).to(tl.float32),)
                value_zero = value_zero + (tl.load(half + VALUE_ZERO + j * 32 + r).to(tl.float32),)
            else:
                at = j * 32 * VALUE_GROUPS + g[:, None] * 32 + r[None, :]
                value_scale = value_scale + (_times(tl.load(half + VALUE_SCALE + at), _log2_factor(BITS, j), ASM),)
                value_zero = value_zero + (_times(tl.load(half + VALUE_ZERO + at), UNFOLD, ASM),)
        value_words = tl.load(record + VALUE_WORDS + word)

        scores = ()
        for j in tl.static_range(PLANES):
            k = _plane(words, BITS, j, ASM) * key_scale[j][None, :] + key_zero[j][None, :]
            token = page * TOKENS + j * 32 + r
            s = tl.where(((token >= low) & (token < high))[:, None], tl.dot(k, q), -1e30)
            scores = scores + (s,)
        top = scores[0]
        for j in tl.static_range(1, PLANES):
            top = tl.maximum(top, scores[j])
        above = tl.maximum(m, tl.max(top, 0) * scale)
        shrink = tl.exp2(m - above)
        m = above
        weight = weight * shrink[None, :]
        offset = offset * shrink[None, :]
        acc = acc * shrink[None, :]
        for j in tl.static_range(PLANES):
            p = tl.exp2(scores[j] * scale[None, :] - m[None, :])
            weight += p
            v = tl.trans(_plane(value_words, BITS, j, ASM))
            if VALUE_GROUPS == 1:
                # A token's scale and zero point go into its weight.
                offset += p * value_zero[j][:, None]
                p = p * (value_scale[j] * _factor(BITS, j))[:, None]
            else:
                spread = tl.broadcast_to(value_scale[j][:, None, :], [VALUE_GROUPS, CHANNELS, 32])
                shift = tl.broadcast_to(value_zero[j][:, None, :], [VALUE_GROUPS, CHANNELS, 32])
                v = v * tl.reshape(spread, [D, 32]) + tl.reshape(shift, [D, 32])
            acc = tl.dot(v, p.to(tl.float16), acc)
    acc = acc * _fold(BITS)
    if VALUE_GROUPS == 1:
        acc += tl.sum(offset, 0)[None, :]
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


@triton.jit
def _tokens(at, inside, held, seen, SIDE: tl.constexpr, DTYPE: tl.constexpr, D: tl.constexpr, FIELDS: tl.constexpr):
    """Keys or values of tokens, `[T, D]` in DTYPE; at: where the addresses of their pages stand."""
    d = tl.arange(0, D)
    address = tl.load(at + SIDE, mask=held, other=0) * 16
    place = inside[:, None] * D + d[None, :]
    if FIELDS == 2:
        page = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        return tl.load(page[:, None] + place, mask=seen[:, None], other=0.0)
    page = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
    codes = tl.load(page[:, None] + place, mask=seen[:, None], other=0).to(tl.float32)
    scales = (tl.load(at + 2 * SIDE + 2, mask=held, other=0) * 16).to(tl.pointer_type(tl.float16))
    zeros = (tl.load(at + 2 * SIDE + 3, mask=held, other=0) * 16).to(tl.pointer_type(tl.float16))
    scale = tl.load(scales + inside, mask=seen, other=0.0).to(tl.float32)
    zero = tl.load(zeros + inside, mask=seen, other=0.0).to(tl.float32)
    return (codes * scale[:, None] + zero[:, None]).to(DTYPE)


@triton.jit(do_not_specialize=("rows", "columns", "heads", "width"))
def _exact(
    queries, table, spans, starts, picks, out, lse, scores, scale, rows, columns, heads, width,
    DTYPE: tl.constexpr, N: tl.constexpr, D: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    TILE: tl.constexpr, WIDE: tl.constexpr, PICKED: tl.constexpr, SCORED: tl.constexpr, EARLY: tl.constexpr,
    BEHIND: tl.constexpr, PDL: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One share of the exact slots of a row, in tiles of TILE. table: `[rows, columns, FIELDS]`. Grid: (programs,).

    PICKED: of the slots named in `picks`, a row's `stop` of them one behind the other; negative ones are none.
    WIDE multiplies in float32 whatever the pages hold: the interpreter has no products of bfloat16. SCORED: scaled
    scores go to `scores [rows, heads, width]`, -1e30 where a slot is not seen.
    EARLY: it was launched before the kernel in front of it was done. BEHIND: that is one over packed pages, which lets
    nothing begin before queries are there (see `Reader.attend`). PDL: what comes behind may be launched early.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    row = _row(starts, rows, R)
    if row >= rows:
        if EARLY:
            tl.extra.cuda.gdc_wait()
        return
    work = tl.float32 if WIDE else DTYPE
    t = tl.arange(0, T)
    if EARLY and not BEHIND:
        tl.extra.cuda.gdc_wait()
    q = _queries(queries, row, heads, N, D)
    if work == tl.float16:
        q, unscale = _scaled(q)
        scale = scale * unscale[None, :]
    else:
        q = q.to(work)
    sink = tl.load(spans + row * SPAN + 2)
    start = tl.load(spans + row * SPAN + 3)
    stop = tl.load(spans + row * SPAN + 4)
    fading = tl.load(spans + row * SPAN + 5)
    faded = tl.load(spans + row * SPAN + 6)
    first, last = _share(starts, row, tl.cdiv(stop, TILE))
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([T, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    for tile in range(first * (TILE // T), last * (TILE // T)):
        slot = tile * T + t
        held = slot < stop
        if PICKED:
            slot = tl.load(picks + row * stop + slot, mask=held, other=-1)
            held = slot >= 0
            slot = tl.maximum(slot, 0)
        at = table + (row * columns + slot // 32) * FIELDS
        # What is not seen is not read: it may be anything, also not a number.
        seen = held & ((slot < sink) | (slot >= start) | ((slot >= fading) & (slot < faded)))
        k = _tokens(at, slot % 32, held, seen, 0, DTYPE, D, FIELDS).to(work)
        v = _tokens(at, slot % 32, held, seen, 1, DTYPE, D, FIELDS).to(work)
        s = tl.where(seen[:, None], tl.dot(k, q, input_precision="ieee") * scale, -1e30)
        if SCORED:
            h = tl.arange(0, N)
            to = scores + (row.to(tl.int64) * heads + h[None, :]) * width + slot[:, None]
            tl.store(to, s * 0.6931471805599453, mask=held[:, None] & (h[None, :] < heads))
        above = tl.maximum(m, tl.max(s, 0))
        shrink = tl.exp2(m - above)
        m = above
        p = tl.where(seen[:, None], tl.exp2(s - m[None, :]), 0.0)
        weight = weight * shrink[None, :] + p
        acc = tl.dot(tl.trans(v), p.to(work), acc * shrink[None, :], input_precision="ieee")
    if EARLY and BEHIND:
        tl.extra.cuda.gdc_wait()
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


@triton.jit(do_not_specialize=("rows", "columns", "heads", "count"))
def _picked(
    queries, table, picks, spans, starts, out, lse, scale, rows, columns, heads, count,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    SPAN: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """One share of the packed slots that `picks [rows, count]` names, in tiles of TILE; negative ones are none.
    WITHIN: nor are those that the row's span does not show.

    A token takes one field of its words, and all of the scales of its channels. Grid: (programs,).
    """
    row = _row(starts, rows, R)
    if row >= rows:
        return
    TOKENS: tl.constexpr = _code_planes(BITS) * 32
    KEY_SCALE: tl.constexpr = 32 * D
    KEY_ZERO: tl.constexpr = KEY_SCALE + TOKENS // GROUP * D
    VALUE_WORDS: tl.constexpr = KEY_ZERO + TOKENS // GROUP * D
    VALUE_SCALE: tl.constexpr = VALUE_WORDS + 32 * D
    VALUE_ZERO: tl.constexpr = VALUE_SCALE + TOKENS * (D // CHANNELS)
    t = tl.arange(0, TILE)
    d = tl.arange(0, D)
    q, unscale = _scaled(_queries(queries, row, heads, N, D))
    scale = scale * unscale[None, :]
    first, last = _share(starts, row, tl.cdiv(count, TILE))
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([TILE, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    for tile in range(first, last):
        slot = tl.load(picks + row * count + tile * TILE + t, mask=tile * TILE + t < count, other=-1)
        held = slot >= 0
        if WITHIN:
            held = held & (slot < tl.load(spans + row * SPAN + 1))
        slot = tl.maximum(slot, 0)
        inside = slot % TOKENS
        plane = inside // 32
        r = inside % 32
        address = tl.load(table + row * columns + slot // TOKENS, mask=held, other=0) * 16
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)[:, None] + (r[:, None] * D + d[None, :])
        half = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)[:, None]
        group = (inside // GROUP)[:, None] * D + d[None, :]
        part = plane[:, None] * (32 * (D // CHANNELS)) + (d // CHANNELS * 32)[None, :] + r[:, None]
        seen = held[:, None]
        move = (plane * BITS)[:, None]
        k = (tl.load(words, mask=seen, other=0).to(tl.int32) >> move) & (2**BITS - 1)
        v = (tl.load(words + VALUE_WORDS, mask=seen, other=0).to(tl.int32) >> move) & (2**BITS - 1)
        scales = tl.load(half + (KEY_SCALE + group), mask=seen, other=0.0).to(tl.float32)
        zeros = tl.load(half + (KEY_ZERO + group), mask=seen, other=0.0).to(tl.float32)
        k = (k.to(tl.float32) * scales + zeros).to(tl.float16)
        scales = tl.load(half + (VALUE_SCALE + part), mask=seen, other=0.0).to(tl.float32)
        zeros = tl.load(half + (VALUE_ZERO + part), mask=seen, other=0.0).to(tl.float32)
        v = (v.to(tl.float32) * scales + zeros).to(tl.float16)
        s = tl.where(seen, tl.dot(k, q) * scale, -1e30)
        above = tl.maximum(m, tl.max(s, 0))
        shrink = tl.exp2(m - above)
        m = above
        p = tl.where(seen, tl.exp2(s - m[None, :]), 0.0)
        weight = weight * shrink[None, :] + p
        acc = tl.dot(tl.trans(v), p.to(tl.float16), acc * shrink[None, :])
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


@triton.jit(do_not_specialize=("columns",))
def _append(
    keys, values, table, spans, columns, DTYPE: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, FIELDS: tl.constexpr
):
    """The newest token of a row into its last exact slot: `[rows, D]` each. Grid: (rows, 2)."""
    row = tl.program_id(0)
    side = tl.program_id(1)
    d = tl.arange(0, D)
    slot = tl.load(spans + row * SPAN + 4) - 1
    at = table + (row * columns + slot // 32) * FIELDS
    address = tl.load(at + side) * 16
    inside = slot % 32
    source = keys if side == 0 else values
    x = tl.load(source + row * D + d)
    if FIELDS == 2:
        page = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        tl.store(page + inside * D + d, x)
    else:  # as `planar.quantise` does, bit for bit
        x = x.to(tl.float32)[None, :]
        scale, zero = _ends(tl.min(x, 1), tl.max(x, 1), 255)
        step, inverse = _step(scale)
        codes = _codes(x, zero.to(tl.float32)[:, None], step[:, None], inverse[:, None], 255, False)
        page = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 16)
        tl.store(page + inside * D + d[None, :], codes.to(tl.uint8))
        one = inside + tl.arange(0, 1)
        tl.store((tl.load(at + 2 * side + 2) * 16).to(tl.pointer_type(tl.float16)) + one, scale)
        tl.store((tl.load(at + 2 * side + 3) * 16).to(tl.pointer_type(tl.float16)) + one, zero)


@triton.jit
def _combine(
    packed_out, packed_lse, exact_out, exact_lse, starts, exact_starts, merged, merged_lse,
    D: tl.constexpr, C: tl.constexpr, P: tl.constexpr, WITH_LSE: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, TEAM: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr, DIVIDED: tl.constexpr,
):  # fmt: skip
    """Merge the parts of C channels of one head of a row. Grid: (rows, heads, D // C).

    TEAM, WHOLE: see `Reader`. EARLY: it was launched before the kernel in front of it was done. DIVIDED: starts are the
    parts of `Divided`.
    """
    row = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.program_id(2) * C
    heads = tl.num_programs(1)
    if DIVIDED:
        first = tl.load(starts + row * 4)
        last = tl.load(starts + row * 4 + 1)
        line = tl.load(starts + row * 4 + 2)
        apart = tl.load(starts + row * 4 + 3)
    else:
        lead = row // TEAM * TEAM
        first = tl.load(starts + lead)
        last = tl.load(starts + lead + 1)
        line = row % TEAM * heads
        apart = heads * TEAM
    if WHOLE:
        last = tl.minimum(last, first + 1)
    first_exact = tl.load(exact_starts + row)
    last_exact = tl.load(exact_starts + row + 1)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    # Those of exact pages behind those of packed ones, so that all are read at once.
    packed = last - first if PACKED else 0
    count = packed + last_exact - first_exact if EXACT else packed
    c = begin + tl.arange(0, C)
    m = -1e30
    total = 0.0
    acc = tl.zeros([C], tl.float32)
    for start in range(0, count, P):
        p = start + tl.arange(0, P)
        held = p < count
        if EXACT:
            at = (first_exact + p - packed) * heads + head
            weights, parts = exact_lse + at, exact_out + at.to(tl.int64) * D
        if PACKED:
            at = (first + p) * apart + line + head
            if EXACT:
                weights = tl.where(p < packed, packed_lse + at, weights)
                parts = tl.where(p < packed, packed_out + at.to(tl.int64) * D, parts)
            else:
                weights, parts = packed_lse + at, packed_out + at.to(tl.int64) * D
        part = tl.load(weights, mask=held, other=-1e30)
        o = tl.load(parts[:, None] + c[None, :], mask=held[:, None], other=0.0)
        above = tl.maximum(m, tl.max(part, 0))
        w = tl.where(part > -1e29, tl.exp2(part - above), 0.0)
        shrink = tl.exp2(m - above)
        m = above
        total = total * shrink + tl.sum(w, 0)
        acc = acc * shrink + tl.sum(o * w[:, None], 0)
    at = row * heads + head
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)
    tl.store(merged + at * D + c, acc.to(merged.dtype.element_ty))
    if WITH_LSE and begin == 0:
        natural = (m + tl.log2(tl.where(some, total, 1.0))) * 0.6931471805599453
        tl.store(merged_lse + at, tl.where(some, natural, float("-inf")))


def by_cuda(form: Reader, heads: int, device: torch.device) -> bool:
    """Whether `cuda.py` attends over packed pages of this form."""
    return device.type == "cuda" and choose(device).path == "cuda" and cuda.supports(form, heads)


def programs_for(
    rows: int, device: torch.device, form: Reader | None = None, heads: int = 1, dtype: torch.dtype | None = None
) -> Programs:
    """How many programs work on the packed pages of that many rows, and on their exact ones, whose dtype may be given:
    none where the first do both (`pages_of(joined=True)`).

    Few rows are cut so that the device is filled once, many so that it is filled several times over and none waits long
    for the last. Where nothing is packed, from 3 sequences of 8 heads on: by eight times as many programs, steps of 4
    to 16 sequences are 3% to 5% shorter (`benchmarks/exact_programs.py`, H200), and of 2 are 6% longer, though their
    attention alone is faster. How many it is depends on how much there is to read (`schedule.starts_of`).
    """
    resident, team = (RESIDENT, 1) if form is None else (form.resident, form.team)
    if form is not None and by_cuda(form, heads, device):
        resident = cuda.resident(form, device, 8 if isinstance(form, Form) else heads)
    once = max(1, int(resident * processors(device)))
    packed, exact = (
        once if 8 * rows <= once else max(8 * once, 2 * rows)
        for rows, once in ((rows // team, once), (rows, RESIDENT * processors(device)))
    )
    if alone := form is None and rows > ALONE:
        exact = max(8 * once, 2 * rows)
    if form is not None and by_cuda(form, heads, device) and cuda.joins(dtype):
        exact = 0
    return Programs(packed, exact, once, 1 if form is None else form.share, alone)


def append(keys: torch.Tensor, values: torch.Tensor, spans: torch.Tensor, exact: Exact) -> None:
    """Write the newest token of each row, contiguous `[rows, head_dim]` in the pages' dtype, into the last exact slot
    that `spans` says there is."""
    rows, dim = keys.shape
    with on(keys.device):
        _append[(rows, 2)](
            keys, values, exact.table, spans, exact.table.shape[1], DTYPE=_TYPES[exact.dtype], D=dim, SPAN=SPAN,
            FIELDS=exact.table.shape[2], num_warps=1,
        )  # fmt: skip


def decode(
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    packed: Packed | Divided | None = None,
    exact: Exact | None = None,
    with_lse: bool = False,
    asm: bool | None = None,
    starts: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    programs: Programs | tuple[int, int] | None = None,
    picks: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
    within: bool = False,
    packed_scores: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    follows: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one query per row and head over packed and exact pages: see `decode_reference`.

    queries: contiguous `[rows, query_heads, head_dim]`, float16, bfloat16 or float32; spans: int32 `[rows, SPAN]`;
    starts: int32 `[2, rows + 1]`, the work lists of packed and exact pages for at most `programs` programs (made here,
    waiting for the device, if not given). picks: int32 `[rows, n]`, the packed slots that are attended on if there
    are packed pages, else the exact ones, whose span must then be `0, 0, n`; negative ones are none. The first of
    `starts` then shares out `PICKS` of them at a time. within: packed slots that the spans do not show are none either.
    scores: float32 `[rows, query_heads, some]`, which takes the scaled scores of the exact slots (not of picked ones).
    packed_scores: of the packed ones, see `Reader.attend`; not of KIVI's pages. out: takes the output, contiguous and
    of the queries' shape. follows: a captured step has waited for what read the scores of an earlier layer before the
    kernel in front of this.
    Packed pages are attended on in float16, exact ones in their dtype, both with float32 sums.
    Returns the output in the dtype of the queries and, if asked for, the natural log-sum-exp, float32.
    """
    rows, heads, dim = queries.shape
    device = queries.device
    divided, packed = (packed, None) if isinstance(packed, Divided) else (None, packed)
    assert divided is None or (picks is None and packed_scores is None and starts is not None)
    asm = device.type == "cuda" if asm is None else asm
    scale = scaling * 1.4426950408889634
    n = 8 if heads <= 8 else 16
    form = packed.form if packed is not None and picks is None else None
    dtype = None if exact is None or exact.rounded else exact.dtype
    programs = programs or programs_for(rows, device, form, heads, dtype)
    joined = exact if programs[1] == 0 else None
    """Exact pages that the kernel of the packed ones attends over."""
    once = programs.turns if isinstance(programs, Programs) else 0
    pdl = PDL and overlaps(device)
    # Where scores are wanted a captured step may also wait for what read those of an earlier layer.
    alone = follows or (scores is None and packed_scores is None)
    early = EARLY and pdl and alone and torch.cuda.is_current_stream_capturing()
    # In a graph sets of heads are branches.
    apart = divided is not None and device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if starts is None:
        page, team = (TILE, 1) if packed is None else (packed.form.tokens, packed.form.team)
        pages = pages_of(spans.cpu().numpy(), page, team, joined is not None)
        if picks is not None and packed is not None:
            pages[0] = -(-picks.shape[1] // PICKS)
        starts = torch.from_numpy(starts_of(pages, programs if picks is None else programs[:2])).to(device)
    common = {"N": n, "D": dim, "SPAN": SPAN, "R": searched(rows)}
    # Only CUDA C++ counts from a base.
    if packed is not None and packed.base and not (picks is None and by_cuda(packed.form, heads, device)):
        packed = replace(packed, table=packed.table + packed.base, base=0)
    if exact is not None and exact.base and joined is None:
        exact = replace(exact, table=exact.table + exact.base, base=0)

    def parts(programs: int, most: int, team: int = 1) -> tuple[int, torch.Tensor, torch.Tensor]:
        count = max(1, min(programs, most))
        room = max(1, min(max(programs, once + rows), most)) if once else count
        out = torch.empty((room, heads * team, dim), dtype=torch.float32, device=device)
        return count, out, torch.empty((room, heads * team), dtype=torch.float32, device=device)

    def compiled_for_cuda(form: Reader, count: int) -> None:
        """The parts of `count` programs by `cuda.py`."""
        assert packed is not None
        found, scored = packed_scores, None if joined is None else scores
        begins = starts[1] if once else None
        kind = queries.dtype, None if joined is None else joined.dtype, device, SPAN, heads
        cuda.kernel(form, *kind, found is not None, scored is not None)(
            count, queries, packed, joined, spans, starts[0], packed_out, packed_lse, scale, found, scored,
            begins=begins, once=once, early=early,
        )  # fmt: skip

    with on(device):
        packed_out, packed_lse = exact_out, exact_lse = queries, queries
        whole = packed is not None and packed.form.whole
        team = 1
        if divided is not None:
            whole = divided.sets[0][0].form.whole
            packed_out, packed_lse = _attend_divided(divided, queries, scale, early, apart)
        elif packed is not None and isinstance(packed.form, Form):
            form = packed.form
            tiles = packed.table.numel() if picks is None else -(-picks.shape[1] // PICKS) * rows
            tiles += 0 if joined is None else joined.table.numel() // 2
            count, packed_out, packed_lse = parts(programs[0], tiles)
            if picks is not None:
                _picked[(count,)](
                    queries, packed.table, picks, spans, starts[0], packed_out, packed_lse, scale, rows,
                    packed.table.shape[1], heads, picks.shape[1], BITS=form.bits, GROUP=form.group,
                    CHANNELS=form.channels, TILE=PICKS, WITHIN=within, num_warps=2, **common,
                )  # fmt: skip
            elif by_cuda(form, heads, device):
                compiled_for_cuda(form, count)
            else:
                _packed[(count,)](
                    queries, packed.table, spans, starts[0], packed_out, packed_lse, scale, rows, packed.table.shape[1],
                    heads, BITS=form.bits, GROUP=form.group, CHANNELS=form.channels, ASM=asm,
                    STAGES=_STAGES[form.bits], num_warps=2, num_stages=_STAGES[form.bits], **common,
                )  # fmt: skip
        elif packed is not None:
            form, team = packed.form, packed.form.team
            tiles = rows * packed.table.shape[1] // team + (0 if joined is None else joined.table.numel() // 2)
            count, packed_out, packed_lse = parts(programs[0], tiles, team)
            if by_cuda(form, heads, device):
                compiled_for_cuda(form, count)
            else:
                form.attend(packed, queries, scale, spans, starts[0], packed_out, packed_lse, packed_scores, early)
        if exact is not None and joined is None:
            wide = exact.dtype.itemsize == 4
            picked = picks if packed is None else None
            slots = exact.table.shape[1] * 32 if picked is None else picked.shape[1]
            warps, stages, registers = ROUNDED if exact.rounded else (2, 1 if wide else 3, None)
            behind = packed is not None or divided is not None
            # One before it has waited for all that may still read the scores of an earlier layer.
            begins = pdl and not apart if behind else early
            count, exact_out, exact_lse = parts(programs[1], -(-slots // TILE) * rows)
            _exact[(count,)](
                queries, exact.table, spans, starts[1], spans if picked is None else picked, exact_out, exact_lse,
                exact_lse if scores is None else scores, scale, rows, exact.table.shape[1], heads,
                1 if scores is None else scores.shape[2], DTYPE=_TYPES[exact.dtype], T=32 if wide else TILE,
                TILE=TILE, WIDE=not asm, PICKED=picked is not None, SCORED=scores is not None, EARLY=begins,
                BEHIND=behind, PDL=pdl, FIELDS=exact.table.shape[2], num_warps=warps, num_stages=stages,
                maxnreg=registers, **common,
                **({"launch_pdl": True} if begins else {}),
            )  # fmt: skip
        merged = torch.empty_like(queries) if out is None else out
        merged_lse = torch.empty((rows, heads), dtype=torch.float32, device=device) if with_lse else None
        some = packed is not None or divided is not None
        begins = pdl and (exact is not joined or some)
        # Of few rows each has so many parts that their channels are shared out. Those of more rows are merged by single
        # warps, of which no more than fill the device once share a head.
        units, parts_each = rows * heads, -(-max(programs[:2]) // rows)
        few = units <= processors(device)
        wide = 32 if few else dim
        while wide > 32 and 2 * units * (dim // wide) <= 32 * processors(device):
            wide //= 2
        most = 128 if few else 1024 // wide
        many = most if divided is not None else max(4, min(most, power_of_2(parts_each * (2 if few else 1))))
        _combine[(rows, heads, dim // wide)](
            packed_out, packed_lse, exact_out, exact_lse, starts[0] if divided is None else divided.parts, starts[1],
            merged, merged_lse if with_lse else exact_lse,
            D=dim, C=wide, P=many, WITH_LSE=with_lse, PACKED=some, EXACT=exact is not joined, TEAM=team,
            WHOLE=whole, EARLY=begins, DIVIDED=divided is not None, num_warps=max(1, many * wide // 512) if few else 1,
            **({"launch_pdl": True} if begins else {}),
        )  # fmt: skip
    return merged, merged_lse


def _attend_divided(
    divided: Divided, queries: torch.Tensor, scale: float, early: bool, apart: bool
) -> tuple[torch.Tensor, ...]:
    """Parts of the packed pages of all sets, one behind the other: float32 `[lines, head_dim]` and `[lines]`. apart:
    all sets but the last are attended on beside it, each on a stream of its own."""
    (_, heads, dim), device = queries.shape, queries.device
    sizes = [programs * packed.form.team * heads for packed, _, programs in divided.sets]
    out = torch.empty((sum(sizes), dim), dtype=torch.float32, device=device)
    lse, row, line = torch.empty(sum(sizes), dtype=torch.float32, device=device), 0, 0
    beside = [_stream(numbered(device), i) for i in range(len(sizes) - 1)] if apart else []
    for i, ((packed, starts, programs), lines) in enumerate(zip(divided.sets, sizes)):
        rows, at = slice(row, row + len(packed.table)), slice(line, line + lines)
        packed = replace(packed, order=divided.order[rows])
        given = queries, scale, divided.spans[rows], starts, out[at].view(programs, -1, dim), lse[at].view(programs, -1)
        if i < len(beside):
            beside[i].wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(beside[i]):
                packed.form.attend(packed, *given)
        else:
            packed.form.attend(packed, *given, early=early)
        row, line = rows.stop, at.stop
    for stream in beside:
        torch.cuda.current_stream(device).wait_stream(stream)
    return out, lse


@cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
