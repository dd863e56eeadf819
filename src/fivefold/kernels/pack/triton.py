"""Tokens into planar KIVI pages in one launch: read once from memory, quantised in registers, written as records.

The arithmetic is that of `planar.quantise`, step by step, so that the same tokens give the same bytes: float32, codes
against the stored (float16) scale and zero point, round half to even, constant groups exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.packed_decode.reference import Form


@triton.jit
def _ends(low, high, STEPS: tl.constexpr):
    """float16 scale and zero point of groups from their ends."""
    zero = low.to(tl.float16)
    scale = tl.div_rn(tl.maximum(high - zero.to(tl.float32), 0.0), tl.full(high.shape, STEPS, tl.float32))
    return scale.to(tl.float16), zero


@triton.jit
def _codes(x, scale, zero, STEPS: tl.constexpr):
    """int32 codes of float32 x, with scale and zero point in float32 and of x's shape."""
    y = tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0))
    # Adding and taking off 1.5 * 2**23 rounds half to even.
    y = (y + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(y, 0.0), STEPS).to(tl.int32)


@triton.jit(do_not_specialize=("tokens", "plane"))
def _pack(
    keys, values, records, tokens, plane,
    D: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The keys (0) or the values (1) of a page, from a plane on. Grid: (pages, 2)."""
    page = tl.program_id(0).to(tl.int64)
    STEPS: tl.constexpr = 2**BITS - 1
    SHARE: tl.constexpr = GROUP // 32
    VALUE_GROUPS: tl.constexpr = D // CHANNELS
    KEY_SIDE: tl.constexpr = 32 * D + 2 * (TOKENS // GROUP) * D
    PAGE: tl.constexpr = KEY_SIDE + 32 * D + 2 * TOKENS * VALUE_GROUPS
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    inside = r[:, None] * D + d[None, :]
    record = records + page * PAGE
    if tl.program_id(1) == 1:
        record += KEY_SIDE
    half = record.to(tl.pointer_type(tl.float16)) + 32 * D
    words = tl.load(record + inside).to(tl.int32) & ((1 << (BITS * plane)) - 1)
    if tl.program_id(1) == 0:
        source = keys + page * tokens * D + inside
        for group in range(plane // SHARE, (plane + tokens // 32) // SHARE):
            low = tl.full([D], float("inf"), tl.float32)
            high = tl.full([D], float("-inf"), tl.float32)
            for i in tl.static_range(SHARE):
                x = tl.load(source + (group * SHARE + i - plane) * 32 * D).to(tl.float32)
                low = tl.minimum(low, tl.min(x, 0))
                high = tl.maximum(high, tl.max(x, 0))
            scale, zero = _ends(low, high, STEPS)
            tl.store(half + group * D + d, scale)
            tl.store(half + (TOKENS // GROUP + group) * D + d, zero)
            spread = tl.broadcast_to(scale.to(tl.float32)[None, :], [32, D])
            shift = tl.broadcast_to(zero.to(tl.float32)[None, :], [32, D])
            for i in tl.static_range(SHARE):
                x = tl.load(source + (group * SHARE + i - plane) * 32 * D).to(tl.float32)
                words |= _codes(x, spread, shift, STEPS) << (BITS * (group * SHARE + i))
    else:
        source = values + page * tokens * D + inside
        g = tl.arange(0, VALUE_GROUPS)
        at = g[None, :] * 32 + r[:, None]
        for j in range(plane, plane + tokens // 32):
            x = tl.load(source + (j - plane) * 32 * D).to(tl.float32)
            x = tl.reshape(x, [32, VALUE_GROUPS, CHANNELS])
            scale, zero = _ends(tl.min(x, 2), tl.max(x, 2), STEPS)
            tl.store(half + j * 32 * VALUE_GROUPS + at, scale)
            tl.store(half + (TOKENS + j * 32) * VALUE_GROUPS + at, zero)
            spread = tl.broadcast_to(scale.to(tl.float32)[:, :, None], [32, VALUE_GROUPS, CHANNELS])
            shift = tl.broadcast_to(zero.to(tl.float32)[:, :, None], [32, VALUE_GROUPS, CHANNELS])
            codes = tl.reshape(_codes(x, spread, shift, STEPS), [32, D])
            words |= codes << (BITS * j)
    tl.store(record + inside, words.to(tl.int16))


def pack_pages(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """`pack_reference` as one launch; the fields are views of one record per page."""
    pages, tokens, dim = keys.shape
    records = torch.zeros((pages, form.nbytes // 2), dtype=torch.int16, device=keys.device)
    fields = _fields(form, records)
    if opened is not None:
        for field, old in zip(fields, opened):
            field.copy_(old)
    _pack[(pages, 2)](
        keys.contiguous(), values.contiguous(), records, tokens, slot // 32,
        D=dim, BITS=form.bits, TOKENS=form.tokens, GROUP=form.group, CHANNELS=form.channels,
        num_warps=4 if dim <= 128 else 8,
    )  # fmt: skip
    return fields


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
