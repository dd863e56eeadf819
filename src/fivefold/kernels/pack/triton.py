"""Tokens into planar KIVI pages in one launch: read from memory, quantised in registers, written as records.

The arithmetic is that of `planar.quantise`, so that the same tokens give the same bytes: float32, codes against the
stored (float16) scale and zero point, round half to even, constant groups exact. Only the division differs: a product
with the reciprocal and one step of correction (Markstein), which gives the same correctly rounded quotient in a third
of the instructions.

A program takes one side (keys or values) of `W` channels of a page, a plane at a time; one warp holds 64 channels, so
that a minimum needs no shared memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=("planes", "plane"))
def _pack(
    keys, values, sources, records, places, peak, planes, plane,
    D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
    CHANNELS: tl.constexpr, DTYPE: tl.constexpr, PAGED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """`planes` planes of the keys (0) or the values (1) of a page, from a plane on. Grid: (pages, 2, D / W).

    PAGED: the tokens lie in exact pages, `sources [pages, planes, 2]`, and the record is found at `places [pages, 2]`,
    which also says from what plane on; both are addresses in units of 16 bytes. Their largest absolute value is left at
    `peak`, as the bits of a float32.
    """
    item = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    STEPS: tl.constexpr = 2**BITS - 1
    SHARE: tl.constexpr = GROUP // 32
    VALUE_GROUPS: tl.constexpr = D // CHANNELS
    KEY_SIDE: tl.constexpr = 32 * D + 2 * (TOKENS // GROUP) * D
    PAGE: tl.constexpr = KEY_SIDE + 32 * D + 2 * TOKENS * VALUE_GROUPS
    r = tl.arange(0, 32)
    d = tl.program_id(2) * W + tl.arange(0, W)
    inside = r[:, None] * D + d[None, :]
    if PAGED:
        plane = tl.load(places + 2 * item + 1).to(tl.int32)
        record = tl.multiple_of((tl.load(places + 2 * item) * 16).to(tl.pointer_type(tl.int16)), 16)
    else:
        record = records + item * PAGE
    if side == 1:
        record += KEY_SIDE
    half = record.to(tl.pointer_type(tl.float16)) + 32 * D
    # What stands before the planes stays; what follows them is zero.
    before = tl.load(record + inside, mask=(d[None, :] < D) & (plane > 0), other=0)
    words = before.to(tl.int32) & ((1 << (BITS * plane)) - 1)
    most = tl.full([32, W], 0.0, tl.float32)
    if side == 0:
        for group in range(plane // SHARE, (plane + planes) // SHARE):
            first = group * SHARE - plane
            x = _load(keys, sources, item, first, planes, 0, inside, DTYPE, D, PAGED)
            low = tl.min(x, 0)
            high = tl.max(x, 0)
            for i in tl.static_range(1, SHARE):
                y = _load(keys, sources, item, first + i, planes, 0, inside, DTYPE, D, PAGED)
                low = tl.minimum(low, tl.min(y, 0))
                high = tl.maximum(high, tl.max(y, 0))
            scale, zero = _ends(low, high, STEPS)
            tl.store(half + group * D + d, scale)
            tl.store(half + (TOKENS // GROUP + group) * D + d, zero)
            step, inverse = _step(scale)
            shift = zero.to(tl.float32)
            for i in tl.static_range(SHARE):
                if i > 0:
                    x = _load(keys, sources, item, first + i, planes, 0, inside, DTYPE, D, PAGED)
                if PAGED:
                    most = tl.maximum(most, tl.where(x == x, tl.abs(x), float("inf")))
                codes = _codes(x, shift[None, :], step[None, :], inverse[None, :], STEPS, FUSED)
                words |= codes << (BITS * (group * SHARE + i))
        for group in range((plane + planes) // SHARE, TOKENS // GROUP):
            tl.store(half + group * D + d, tl.zeros([W], tl.float16))
            tl.store(half + (TOKENS // GROUP + group) * D + d, tl.zeros([W], tl.float16))
    else:
        g = tl.program_id(2) * (W // CHANNELS) + tl.arange(0, W // CHANNELS)
        at = g[None, :] * 32 + r[:, None]
        for j in range(plane, plane + planes):
            x = _load(values, sources, item, j - plane, planes, 1, inside, DTYPE, D, PAGED)
            if PAGED:
                most = tl.maximum(most, tl.where(x == x, tl.abs(x), float("inf")))
            x = tl.reshape(x, [32, W // CHANNELS, CHANNELS])
            scale, zero = _ends(tl.min(x, 2), tl.max(x, 2), STEPS)
            tl.store(half + j * 32 * VALUE_GROUPS + at, scale)
            tl.store(half + (TOKENS + j * 32) * VALUE_GROUPS + at, zero)
            step, inverse = _step(scale)
            shift = zero.to(tl.float32)
            codes = _codes(x, shift[:, :, None], step[:, :, None], inverse[:, :, None], STEPS, FUSED)
            words |= tl.reshape(codes, [32, W]) << (BITS * j)
        for j in range(plane + planes, TOKENS // 32):
            none = tl.zeros([32, W // CHANNELS], tl.float16)
            tl.store(half + j * 32 * VALUE_GROUPS + at, none)
            tl.store(half + (TOKENS + j * 32) * VALUE_GROUPS + at, none)
    tl.store(record + inside, words.to(tl.int16))
    if PAGED:
        tl.atomic_max(peak, tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True))


def _launch(
    form: Form, pages: int, device: torch.device, *tensors: torch.Tensor, planes: int, **settings: object
) -> None:
    width = max(min(64, form.head_dim), form.channels)
    _pack[(pages, 2, form.head_dim // width)](
        *tensors, planes,
        D=form.head_dim, W=width, BITS=form.bits, TOKENS=form.tokens, GROUP=form.group, CHANNELS=form.channels,
        FUSED=device.type == "cuda", num_warps=max(1, width // 64), **settings,
    )  # fmt: skip


def pack_pages(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """`pack_reference` as one launch; the fields are views of one record per page."""
    pages, tokens, _ = keys.shape
    records = torch.empty((pages, form.nbytes // 2), dtype=torch.int16, device=keys.device)
    fields = _fields(form, records)
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
    absolute value that was packed, infinity for NaN: float32 `[1]`.
    """
    peak = torch.zeros(1, dtype=torch.float32, device=sources.device)
    _launch(
        form, len(sources), sources.device, peak, peak, sources, peak, places, peak.view(torch.int32),
        planes=sources.shape[1], plane=0, DTYPE=_TYPES[dtype], PAGED=True,
    )  # fmt: skip
    return peak


def _fields(form: Form, records: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The fields of records int16 `[pages, nbytes / 2]`, in order, as views."""
    dim, half = form.head_dim, torch.float16
    key, value = (form.tokens // form.group, dim), (form.tokens // 32, dim // form.channels, 32)
    out, start = [], 0
    for shape, dtype in (
        ((32, dim), torch.int16), (key, half), (key, half), ((32, dim), torch.int16), (value, half), (value, half),
    ):  # fmt: skip
        size = torch.Size(shape).numel()
        out.append(records[:, start : start + size].view(dtype).unflatten(1, shape))
        start += size
    return tuple(out)
