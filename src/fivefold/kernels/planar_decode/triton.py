"""Attention of a decoding step over planar pages of any kind (see `Planar`), in Triton.

The work lists, the parts that are left, and how codes become float16 numbers are those of `packed_decode`. A plane of
keys, and one of values, becomes a tile of float16 numbers: what was quantised, `code * scale + zero`, and what outliers
add. An outlier is found by comparing: the tokens of a channel's outliers with those of the plane, two at a time. The
low-rank product is never made: queries times the right factor, once a page, times the left one.

Queries are divided by their largest number first, so that float16 holds them whatever they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import power_of_2
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN, searched
from fivefold.kernels.packed_decode.triton import _SHIFTS, _code_planes, _leave, _queries, _row, _share
from fivefold.kernels.planar_decode.reference import Planar

_LIFT = 15
"""A code is first multiplied with the largest power of two that is a float16; the rest goes into its scale."""


@triton.constexpr_function
def _code_asm(bits, plane):
    shift, bit = _SHIFTS[int(bits)][int(plane)]
    mask = f"0x{((2 ** int(bits) - 1) << bit) * 0x10001:08X}"
    lift = f"0x{((_LIFT + 15) << 10) * 0x10001:08X}"
    move = "mov.b32 t, $1;" if shift == 0 else f"shl.b32 t, $1, {shift};" if shift > 0 else f"shr.u32 t, $1, {-shift};"
    return f"{{ .reg .b32 t, u; {move} and.b32 t, t, {mask}; mov.b32 u, {lift}; mul.rn.f16x2 $0, t, u; }}"


@triton.constexpr_function
def _rest(bits, plane):
    """What is left of the factor of a plane's codes after `_code`."""
    return 2.0 ** (24 - _LIFT - _SHIFTS[int(bits)][int(plane)][1])


@triton.jit
def _code(words, BITS: tl.constexpr, J: tl.constexpr, ASM: tl.constexpr):
    """The codes of plane J as float16, divided by `_rest`."""
    if ASM:
        return tl.inline_asm_elementwise(_code_asm(BITS, J), "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    codes = (words.to(tl.int32) >> (BITS * J)) & (2**BITS - 1)
    return (codes.to(tl.float32) * (1.0 / _rest(BITS, J))).to(tl.float16)


@triton.jit
def _patch(x, place, here, outlier, ASM: tl.constexpr):
    """x, and an outlier where its place is here; all float16."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; set.eq.f16x2.f16x2 t, $2, $3; fma.rn.f16x2 $0, t, $4, $1; }", "=r,r,r,r,r",
            [x, place, here, outlier], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    return x + tl.where(place == here, outlier, 0.0).to(tl.float16)


@triton.jit
def _place(x):
    """A number below 1024 as a float16, 1024 larger: it is the last bits of that."""
    return (x.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)


@triton.jit
def _spread(x, J: tl.constexpr, G: tl.constexpr, C: tl.constexpr):
    """Scales `[G, 32]` of groups of channels as `[G * C, 32]`."""
    return tl.reshape(tl.broadcast_to(x[:, None, :], [G, C, 32]), [G * C, 32])


@triton.jit(do_not_specialize=("rows", "columns", "heads", "slots"))
def _planar(
    queries, balance, table, spans, starts, out, lse, found, scale, rows, columns, heads, slots,
    N: tl.constexpr, D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, PLANES: tl.constexpr,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, RANK: tl.constexpr, R16: tl.constexpr, KEY_OUT: tl.constexpr,
    VALUE_OUT: tl.constexpr, UNBIAS: tl.constexpr, BALANCED: tl.constexpr, FIELDS: tl.constexpr,
    KEY_SCALE: tl.constexpr, KEY_ZERO: tl.constexpr, VALUE_WORDS: tl.constexpr, VALUE_SCALE: tl.constexpr,
    VALUE_ZERO: tl.constexpr, KEY_LEFT: tl.constexpr, KEY_RIGHT: tl.constexpr, KEY_OUTLIERS: tl.constexpr,
    VALUE_LEFT: tl.constexpr, VALUE_RIGHT: tl.constexpr, VALUE_OUTLIERS: tl.constexpr, KEY_PLACES: tl.constexpr,
    VALUE_PLACES: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, ASM: tl.constexpr, FOUND: tl.constexpr,
):  # fmt: skip
    """One share of the packed pages of a row. Grid: (programs,).

    FIELDS: addresses of a page in the table, 1 where a page is a record, whose fields begin KEY_SCALE ... bytes behind
    its beginning. R16: room for the rank. FOUND: scores go to `found [rows, heads, slots]`, too.
    """
    row = _row(starts, rows, R)
    if row >= rows:
        return
    TOKENS: tl.constexpr = PLANES * 32
    G: tl.constexpr = D // CHANNELS
    KEY_PLANES: tl.constexpr = _code_planes(KEY_BITS)
    VALUE_PLANES: tl.constexpr = _code_planes(VALUE_BITS)
    KEY_SHEETS: tl.constexpr = (PLANES + KEY_PLANES - 1) // KEY_PLANES
    VALUE_SHEETS: tl.constexpr = (PLANES + VALUE_PLANES - 1) // VALUE_PLANES

    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    g = tl.arange(0, G)
    i = tl.arange(0, R16)
    h = tl.arange(0, N)
    word = r[:, None] * D + d[None, :]
    q = _queries(queries, row, heads, N, D).to(tl.float32)
    if BALANCED:
        q = q / tl.load(balance + row * D + d)[:, None]
    largest = tl.maximum(tl.max(tl.abs(q), 0), 1e-30)
    q = q / largest[None, :]
    scale = scale * largest  # [N]
    if UNBIAS:
        # Of scores to the base 2: ln 2 / 24 of the squares of what they are multiplied with.
        off = q * q * (scale * scale * 0.02888113252333105)[None, :]
        if GROUP == 0:
            off = tl.sum(tl.reshape(off, [G, CHANNELS, N]), 1)  # [G, N]
    q = q.to(tl.float16)
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    first += low // TOKENS
    last += low // TOKENS

    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([32, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    for page in range(first, last):
        at = table + (row.to(tl.int64) * columns + page) * FIELDS
        if FIELDS == 1:
            a0 = tl.load(at) * 16
            a1, a2, a3 = a0 + KEY_SCALE, a0 + KEY_ZERO, a0 + VALUE_WORDS
            a4, a5 = a0 + VALUE_SCALE, a0 + VALUE_ZERO
        else:
            a0, a1, a2 = tl.load(at) * 16, tl.load(at + 1) * 16, tl.load(at + 2) * 16
            a3, a4, a5 = tl.load(at + 3) * 16, tl.load(at + 4) * 16, tl.load(at + 5) * 16
        key_at = tl.multiple_of(a0.to(tl.pointer_type(tl.int16)), 16)
        value_at = tl.multiple_of(a3.to(tl.pointer_type(tl.int16)), 16)
        key_scale_at = tl.multiple_of(a1.to(tl.pointer_type(tl.float16)), 16)
        key_zero_at = tl.multiple_of(a2.to(tl.pointer_type(tl.float16)), 16)
        value_scale_at = tl.multiple_of(a4.to(tl.pointer_type(tl.float16)), 16)
        value_zero_at = tl.multiple_of(a5.to(tl.pointer_type(tl.float16)), 16)
        words = ()
        for sheet in tl.static_range(KEY_SHEETS):
            words = words + (tl.load(key_at + sheet * 32 * D + word),)
        value_words = ()
        for sheet in tl.static_range(VALUE_SHEETS):
            value_words = value_words + (tl.load(value_at + sheet * 32 * D + word),)
        if RANK:
            right_at = tl.multiple_of((a0 + KEY_RIGHT).to(tl.pointer_type(tl.float16)), 16)
            right = tl.load(right_at + i[:, None] * D + d[None, :], mask=i[:, None] < RANK, other=0.0)
            turned = tl.dot(right, q).to(tl.float16)  # [R16, N]
            left_at = tl.multiple_of((a0 + KEY_LEFT).to(tl.pointer_type(tl.float16)), 16)
            value_left_at = tl.multiple_of((a0 + VALUE_LEFT).to(tl.pointer_type(tl.float16)), 16)
            through = tl.zeros([R16, N], tl.float32)
        places = ()
        outliers = ()
        for n in tl.static_range(KEY_OUT):
            place = tl.load((a0 + KEY_PLACES).to(tl.pointer_type(tl.uint8)) + d * KEY_OUT + n)
            places = places + (_place(place),)
            outliers = outliers + (tl.load((a0 + KEY_OUTLIERS).to(tl.pointer_type(tl.float16)) + d * KEY_OUT + n),)

        scores = ()
        for j in tl.static_range(PLANES):
            k = _code(words[j // KEY_PLANES], KEY_BITS, j % KEY_PLANES, ASM)
            if GROUP > 0:
                steps = tl.load(key_scale_at + j * 32 // GROUP * D + d)
                k = k * (steps * _rest(KEY_BITS, j % KEY_PLANES)).to(tl.float16)[None, :]
                k = k + tl.load(key_zero_at + j * 32 // GROUP * D + d)[None, :]
                for n in tl.static_range(KEY_OUT):
                    k = _patch(k, places[n][None, :], _place(j * 32 + r)[:, None], outliers[n][None, :], ASM)
                s = tl.dot(k, q)
            else:
                part = j * 32 * G + g[:, None] * 32 + r[None, :]
                steps = tl.load(key_scale_at + part)
                zero = tl.load(key_zero_at + part)
                kt = tl.trans(k) * _spread((steps * _rest(KEY_BITS, j % KEY_PLANES)).to(tl.float16), j, G, CHANNELS)
                s = tl.dot(tl.trans(kt + _spread(zero, j, G, CHANNELS)), q)
            if RANK:
                inside = (j * 32 + r)[:, None] * RANK + i[None, :]
                left = tl.load(left_at + inside, mask=i[None, :] < RANK, other=0.0)
                s = tl.dot(left, turned, s)
            s = s * scale[None, :]
            if UNBIAS:
                steps = steps.to(tl.float32)
                if GROUP > 0:
                    s -= tl.sum((steps * steps)[:, None] * off, 0)[None, :]
                else:
                    s -= tl.sum((steps * steps)[:, :, None] * off[:, None, :], 0)
            token = page * TOKENS + j * 32 + r
            seen = (token >= low) & (token < high)
            if FOUND:
                target = found + (row * heads + h[None, :]).to(tl.int64) * slots + token[:, None]
                tl.store(target, s, mask=seen[:, None] & (h[None, :] < heads))
            scores = scores + (tl.where(seen[:, None], s, -1e30),)
        top = scores[0]
        for j in tl.static_range(1, PLANES):
            top = tl.maximum(top, scores[j])
        above = tl.maximum(m, tl.max(top, 0))
        shrink = tl.exp2(m - above)
        m = above
        weight = weight * shrink[None, :]
        acc = acc * shrink[None, :]
        for j in tl.static_range(PLANES):
            p = tl.exp2(scores[j] - m[None, :])
            weight += p
            p = p.to(tl.float16)
            part = j * 32 * G + g[:, None] * 32 + r[None, :]
            steps = (tl.load(value_scale_at + part) * _rest(VALUE_BITS, j % VALUE_PLANES)).to(tl.float16)
            zero = tl.load(value_zero_at + part)
            v = tl.trans(_code(value_words[j // VALUE_PLANES], VALUE_BITS, j % VALUE_PLANES, ASM))
            v = v * _spread(steps, j, G, CHANNELS) + _spread(zero, j, G, CHANNELS)
            for n in tl.static_range(VALUE_OUT):
                inside = (j * 32 + r) * VALUE_OUT + n
                place = _place(tl.load((a0 + VALUE_PLACES).to(tl.pointer_type(tl.uint8)) + inside))
                outlier = tl.load((a0 + VALUE_OUTLIERS).to(tl.pointer_type(tl.float16)) + inside)
                v = _patch(v, place[None, :], _place(d)[:, None], outlier[None, :], ASM)
            acc = tl.dot(v, p, acc)
            if RANK:
                inside = (j * 32 + r)[:, None] * RANK + i[None, :]
                left = tl.load(value_left_at + inside, mask=i[None, :] < RANK, other=0.0)
                through = tl.dot(tl.trans(left), p, through)
        if RANK:
            right_at = tl.multiple_of((a0 + VALUE_RIGHT).to(tl.pointer_type(tl.float16)), 16)
            right = tl.load(right_at + i[:, None] * D + d[None, :], mask=i[:, None] < RANK, other=0.0)
            acc = tl.dot(tl.trans(right), through.to(tl.float16), acc)
    _leave(out, lse, tl.program_id(0), acc, m, tl.sum(weight, 0), heads, N, D)


def attend(
    form: Planar,
    packed: Packed,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor | None = None,
    warps: int = 2,
    registers: int | None = None,
) -> None:
    """See `Reader.attend`."""
    rows, heads, dim = queries.shape
    names = [f"{side}_{part}" for side in ("key", "value") for part in ("left", "right", "outliers", "places")]
    names += ["key_scale", "key_zero", "value_words", "value_scale", "value_zero"]
    at = form.offsets()
    balance = packed.learned[0] if form.balanced else queries
    _planar[(len(out),)](
        queries, balance, packed.table, spans, starts, out, lse, out if scores is None else scores, scale, rows,
        packed.table.shape[1], heads, 0 if scores is None else scores.shape[2],
        N=8 if heads <= 8 else 16, D=dim, KEY_BITS=form.key_bits, VALUE_BITS=form.value_bits, PLANES=form.planes,
        GROUP=form.group, CHANNELS=form.channels, RANK=form.rank, R16=max(16, power_of_2(form.rank)),
        KEY_OUT=form.key_outliers, VALUE_OUT=form.value_outliers, UNBIAS=form.unbias, BALANCED=form.balanced,
        FIELDS=1 if form.record else len(form.fields), **{name.upper(): at.get(name, 0) for name in names}, SPAN=SPAN,
        R=searched(rows), ASM=queries.device.type == "cuda", FOUND=scores is not None,
        num_warps=warps, num_stages=1, maxnreg=registers,
    )  # fmt: skip
