"""Tokens into planar KIVI pages in one launch: read from memory, quantised in registers, written as records. And back.

The arithmetic is that of `planar.quantise`, so that the same tokens give the same bytes: float32, codes against the
stored (float16) scale and zero point, round half to even, constant groups exact. Only the division differs: a product
with the reciprocal and one step of correction (Markstein), which gives the same correctly rounded quotient in a third
of the instructions.

A program takes some channels of one side (keys or values) of a page, a plane or a group of keys at a time: tiles of
2048 numbers of each plane, fewer rows where a value's group is wide, half as many channels where a key's group is long.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on
from fivefold.kernels.gather.triton import rows_at
from fivefold.kernels.pack.reference import fields_of
from fivefold.kernels.packed_decode.reference import Form

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _ends(low, high, STEPS: tl.constexpr):
    """float16 scale and zero point of groups from their ends."""
    zero = low.to(tl.float16)
    scale = tl.div_rn(tl.maximum(high - zero.to(tl.float32), 0.0), tl.full(high.shape, STEPS, tl.float32))
    return scale.to(tl.float16), zero


@triton.jit
def _step(scale):
    """What is divided by, and its reciprocal, float32."""
    step = scale.to(tl.float32)
    step = tl.where(step > 0, step, 1.0)
    return step, tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)


@triton.jit
def _codes(x, zero, step, inverse, STEPS: tl.constexpr, FUSED: tl.constexpr):
    """int32 codes of float32 x; the others are of x's shape."""
    x = x - zero
    if FUSED:
        y = x * inverse
        y = tl.fma(tl.fma(-y, step, x), inverse, y)
    else:
        y = tl.div_rn(x, step)
    # Adding 1.5 * 2**23 rounds half to even, and leaves the whole number in the low bits.
    y = tl.minimum(tl.maximum(y, 0.0), STEPS) + 12582912.0
    return y.to(tl.int32, bitcast=True) & STEPS


@triton.jit
def _load(keys, sources, item, plane, planes, side, inside, DTYPE: tl.constexpr, D: tl.constexpr, PAGED: tl.constexpr):
    """A plane's tokens, float32."""
    if PAGED:
        address = tl.load(sources + (item * planes + plane) * 2 + side)
        source = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
    else:
        source = keys + (item * planes + plane) * 32 * D
    return tl.load(source + inside).to(tl.float32)


@triton.jit
def _before(words, plane, BITS: tl.constexpr):
    """What stands in a page before a plane; what follows it is zero."""
    return tl.load(words, mask=plane > 0, other=0).to(tl.int32) & ((1 << (BITS * plane)) - 1)


@triton.jit
def _most(most, x):
    """The larger of absolute values; not a number counts as infinite."""
    return tl.maximum(most, tl.where(x == x, tl.abs(x), float("inf")))


@triton.jit
def _pack_keys(
    keys, sources, record, peak, item, planes, plane, part,
    D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr, PAGED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = 2**BITS - 1
    SHARE: tl.constexpr = GROUP // 32
    r = tl.arange(0, 32)
    d = part * W + tl.arange(0, W)
    inside = r[:, None] * D + d[None, :]
    scales = record.to(tl.pointer_type(tl.float16)) + 32 * D + d
    zeros = scales + TOKENS // GROUP * D
    words = _before(record + inside, plane, BITS)
    most = tl.zeros([32, W], tl.float32)
    for group in range(plane // SHARE, (plane + planes) // SHARE):
        # All planes of a group at once, so that they are on their way together.
        xs = ()
        for i in tl.static_range(SHARE):
            xs = xs + (_load(keys, sources, item, group * SHARE - plane + i, planes, 0, inside, DTYPE, D, PAGED),)
        low = xs[0]
        high = xs[0]
        for i in tl.static_range(1, SHARE):
            low = tl.minimum(low, xs[i])
            high = tl.maximum(high, xs[i])
        scale, zero = _ends(tl.min(low, 0), tl.max(high, 0), STEPS)
        tl.store(scales + group * D, scale)
        tl.store(zeros + group * D, zero)
        step, inverse = _step(scale)
        shift = zero.to(tl.float32)
        for i in tl.static_range(SHARE):
            if PAGED:
                most = _most(most, xs[i])
            codes = _codes(xs[i], shift[None, :], step[None, :], inverse[None, :], STEPS, FUSED)
            words |= codes << (BITS * (group * SHARE + i))
    for group in range((plane + planes) // SHARE, TOKENS // GROUP):
        tl.store(scales + group * D, tl.zeros([W], tl.float16))
        tl.store(zeros + group * D, tl.zeros([W], tl.float16))
    tl.store(record + inside, words.to(tl.int16))
    if PAGED:
        tl.atomic_max(peak, tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True))


@triton.jit
def _pack_values(
    values, sources, record, peak, item, planes, plane, part,
    D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr, PAGED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = 2**BITS - 1
    GROUPS: tl.constexpr = W // CHANNELS
    PLANE: tl.constexpr = 32 * (D // CHANNELS)
    ROWS: tl.constexpr = 2048 // W  # of the 32
    SHARES: tl.constexpr = 32 // ROWS
    r = part % SHARES * ROWS + tl.arange(0, ROWS)
    d = part // SHARES * W + tl.arange(0, W)
    g = part // SHARES * GROUPS + tl.arange(0, GROUPS)
    inside = r[:, None] * D + d[None, :]
    scales = record.to(tl.pointer_type(tl.float16)) + 32 * D + g[None, :] * 32 + r[:, None]
    zeros = scales + TOKENS // 32 * PLANE
    words = _before(record + inside, plane, BITS)
    most = tl.zeros([ROWS, W], tl.float32)
    for j in range(plane, plane + planes):
        x = _load(values, sources, item, j - plane, planes, 1, inside, DTYPE, D, PAGED)
        if PAGED:
            most = _most(most, x)
        x = tl.reshape(x, [ROWS, GROUPS, CHANNELS])
        scale, zero = _ends(tl.min(x, 2), tl.max(x, 2), STEPS)
        tl.store(scales + j * PLANE, scale)
        tl.store(zeros + j * PLANE, zero)
        step, inverse = _step(scale)
        shift = zero.to(tl.float32)
        codes = _codes(x, shift[:, :, None], step[:, :, None], inverse[:, :, None], STEPS, FUSED)
        words |= tl.reshape(codes, [ROWS, W]) << (BITS * j)
    for j in range(plane + planes, TOKENS // 32):
        tl.store(scales + j * PLANE, tl.zeros([ROWS, GROUPS], tl.float16))
        tl.store(zeros + j * PLANE, tl.zeros([ROWS, GROUPS], tl.float16))
    tl.store(record + inside, words.to(tl.int16))
    if PAGED:
        tl.atomic_max(peak, tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=("planes", "plane"))
def _pack(
    keys, values, sources, records, places, peak, planes, plane,
    D: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    GROUP: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr, PAGED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """`planes` planes of some channels of the keys or values of a page, from a plane on.

    Grid: (pages, D / KEY_WIDTH + D / 64).
    PAGED: the tokens lie in exact pages, `sources [pages, planes, 2]`, and the record is found at `places [pages, 2]`,
    which also says from what plane on; both are addresses in units of 16 bytes. Their largest absolute value is left at
    `peak`, as the bits of a float32.
    """
    item = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    KEY_SIDE: tl.constexpr = 32 * D + 2 * (TOKENS // GROUP) * D
    PAGE: tl.constexpr = KEY_SIDE + 32 * D + 2 * TOKENS * (D // CHANNELS)
    KEY_PARTS: tl.constexpr = D // KEY_WIDTH
    if PAGED:
        plane = tl.load(places + 2 * item + 1).to(tl.int32)
        record = tl.multiple_of((tl.load(places + 2 * item) * 16).to(tl.pointer_type(tl.int16)), 16)
    else:
        record = records + item * PAGE
    peak += item
    if part < KEY_PARTS:
        _pack_keys(
            keys, sources, record, peak, item, planes, plane, part,
            D, KEY_WIDTH, BITS, TOKENS, GROUP, DTYPE, PAGED, FUSED,
        )  # fmt: skip
    else:
        _pack_values(
            values, sources, record + KEY_SIDE, peak, item, planes, plane, part - KEY_PARTS,
            D, VALUE_WIDTH, BITS, TOKENS, CHANNELS, DTYPE, PAGED, FUSED,
        )  # fmt: skip


def _launch(
    form: Form, pages: int, device: torch.device, *tensors: torch.Tensor, planes: int, **settings: object
) -> None:
    key_width, value_width = 64 if form.group <= 64 else 32, max(64, form.channels)
    with on(device):
        _pack[(pages, form.head_dim // key_width + form.head_dim // 64)](
            *tensors, planes,
            D=form.head_dim, KEY_WIDTH=key_width, VALUE_WIDTH=value_width, BITS=form.bits, TOKENS=form.tokens,
            GROUP=form.group, CHANNELS=form.channels, FUSED=device.type == "cuda", num_warps=2, **settings,
        )  # fmt: skip


def pack_pages(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """`pack_reference` as one launch; the fields are views of one record per page."""
    pages, tokens, _ = keys.shape
    records = torch.empty((pages, form.nbytes // 2), dtype=torch.int16, device=keys.device)
    fields = fields_of(form, records)
    if opened is not None:
        for field, old in zip(fields, opened):
            field.copy_(old)
    elif slot:
        records.zero_()
    _launch(
        form, pages, keys.device, keys.contiguous(), values.contiguous(), records, records, records, records,
        planes=tokens // 32, plane=slot // 32, DTYPE=_TYPES[keys.dtype], PAGED=False,
    )  # fmt: skip
    return fields


def pack_exact(form: Form, sources: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack exact pages as they lie into pages as they lie.

    sources: int64 `[pages, planes, 2]`, addresses of the exact pages' keys and values, in units of 16 bytes; places:
    int64 `[pages, 2]`, address of the packed page and the plane from which on it is filled. Returns the largest
    absolute value that was packed into each page, infinity for NaN: float32 `[pages]`.
    """
    peak = torch.zeros(len(sources), dtype=torch.float32, device=sources.device)
    _launch(
        form, len(sources), sources.device, peak, peak, sources, peak, places, peak.view(torch.int32),
        planes=sources.shape[1], plane=0, DTYPE=_TYPES[dtype], PAGED=True,
    )  # fmt: skip
    return peak


@triton.jit(do_not_specialize=("columns", "tokens", "stride", "first_row", "first_column"))
def _unpack(
    table, lines, keys, values, columns, tokens, stride, first_row, first_column,
    D: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
    NAMED: tl.constexpr,
):  # fmt: skip
    """One side of a page, as many of `[TOKENS, D]` as are among a row's first `tokens`, where `table` says it lies.
    Grid: (rows * columns, 2). NAMED: `lines` are the rows of it; else they come one after the other."""
    page = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    SIDE: tl.constexpr = 32 * D + 2 * (TOKENS // GROUP) * D
    row = page // columns
    column = page % columns
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    inside = r[:, None] * D + d[None, :]
    source = tl.load(lines + row) if NAMED else first_row + row
    address = tl.load(table + source * stride + first_column + column) * 16
    words = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16) + side * SIDE
    scales = words.to(tl.pointer_type(tl.float16)) + 32 * D
    packed = tl.load(words + inside).to(tl.int32)
    out = (keys if side == 0 else values) + (row * tokens + column * TOKENS) * D + inside
    for j in tl.static_range(TOKENS // 32):
        if side == 0:
            at = (j * 32 // GROUP * D + d)[None, :] + tl.zeros([32, 1], tl.int32)
            zeros = scales + TOKENS // GROUP * D
        else:
            at = j * 32 * (D // CHANNELS) + (d // CHANNELS * 32)[None, :] + r[:, None]
            zeros = scales + TOKENS * (D // CHANNELS)
        codes = ((packed >> (BITS * j)) & (2**BITS - 1)).to(tl.float32)
        x = codes * tl.load(scales + at).to(tl.float32) + tl.load(zeros + at).to(tl.float32)
        seen = (column * TOKENS + j * 32 + r < tokens)[:, None]
        tl.store(out + j * 32 * D, x.to(keys.dtype.element_ty), mask=seen)


def unpack_pages(
    form: Form,
    table: torch.Tensor,
    dtype: torch.dtype,
    at: torch.Tensor | slice | None = None,
    first: int = 0,
    tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of pages as they lie, `[rows, tokens, head_dim]` in a dtype: `decode_page` in one launch.

    table: int64 `[rows, columns]` of their addresses in units of 16 bytes; its last axis is contiguous. at: which rows
    of it, int64 `[rows]` or a run; None is all. first: the column in which the first token is; tokens: None is all that
    the columns from there on have room for.
    """
    tokens = (table.shape[1] - first) * form.tokens if tokens is None else tokens
    columns, named = -(-tokens // form.tokens), isinstance(at, torch.Tensor)
    begin, rows = rows_at(table, at)
    keys, values = (torch.empty((rows, tokens, form.head_dim), dtype=dtype, device=table.device) for _ in range(2))
    with on(table.device):
        _unpack[(rows * columns, 2)](
            table, at if named else table, keys, values, columns, tokens, table.stride(0), begin, first,
            D=form.head_dim, BITS=form.bits, TOKENS=form.tokens, GROUP=form.group, CHANNELS=form.channels,
            NAMED=named, num_warps=4,
        )  # fmt: skip
    return keys, values
