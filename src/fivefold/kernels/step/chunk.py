"""What surrounds the products of a chunk of a prompt, in Triton: see `reference.py` for what each computes.

Products of many tokens are torch's. What is between them moves bytes, and costs a launch each: by the model's own code
a layer takes some thirty of them, of which these and `gate_times` leave four.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, power_of_2
from fivefold.kernels.step.reference import Norm, Turn
from fivefold.kernels.step.triton import _TYPES, _rms, _rms_halves, _turned

TOKENS = 32
"""Tokens of a program of `spread`."""


@triton.jit
def _added_normed(x, residual, gain, eps, total, out, K: tl.constexpr, KP: tl.constexpr, TYPE: tl.constexpr):
    """Grid: (tokens,)."""
    k = tl.arange(0, KP)
    at = tl.program_id(0).to(tl.int64) * K + k
    h = tl.load(x + at, mask=k < K, other=0.0).to(tl.float32) + tl.load(residual + at, mask=k < K, other=0.0)
    h = h.to(TYPE)
    tl.store(total + at, h, mask=k < K)
    tl.store(out + at, _rms(h.to(tl.float32), gain, eps, k, K, TYPE), mask=k < K)


@triton.jit(do_not_specialize=("count", "every", "q_stride", "k_stride", "v_stride"))
def _spread(
    q, k, v, q_stride, k_stride, v_stride, cos, sin, q_gain, k_gain, q_eps, k_eps, q_out, k_out, v_out, count, every,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, NORM: tl.constexpr,
    TYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RMSNorm of each query and key, RoPE, and every head's tokens side by side. count: tokens of all sequences; every:
    of each. Grid: (tokens / BLOCK, HEADS + 2 KV_HEADS)."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    live = (c[None, :] < count) & (d[:, None] < D // 2)
    one = c.to(tl.int64)
    side = 0
    stride = q_stride
    source = q.to(tl.int64)
    target = q_out.to(tl.int64)
    mine = head
    heads = HEADS
    if head >= HEADS:
        mine = head - HEADS
        heads = KV_HEADS
        source = k.to(tl.int64)
        stride = k_stride
        target = k_out.to(tl.int64)
        if head >= HEADS + KV_HEADS:
            mine = head - HEADS - KV_HEADS
            source = v.to(tl.int64)
            stride = v_stride
            target = v_out.to(tl.int64)
            side = 1
    at = source.to(tl.pointer_type(TYPE)) + one[None, :] * stride + mine * D + d[:, None]
    a = tl.load(at, mask=live, other=0.0)
    b = tl.load(at + D // 2, mask=live, other=0.0)
    if NORM:
        eps = q_eps
        gain = q_gain
        if head >= HEADS:
            gain = k_gain
            eps = k_eps
        if side == 0:
            a, b = _rms_halves(a, b, gain, eps, d, D, TYPE)
    if side == 0:
        a, b = _turned(a, b, cos, sin, one, d, TYPE, D, live)
    sequence = c // every
    place = (sequence.to(tl.int64) * heads + mine) * every + (c - sequence * every)
    to = target.to(tl.pointer_type(TYPE)) + place[None, :] * D + d[:, None]
    tl.store(to, a, mask=live)
    tl.store(to + D // 2, b, mask=live)


def added_normed(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.added_normed`. What was `x` holds the sum then."""
    count, width = x.shape
    out = torch.empty_like(x)
    with on(x.device):
        _added_normed[(count,)](
            x, residual, norm.gain, norm.eps, x, out, K=width, KP=power_of_2(width),
            TYPE=_TYPES[x.dtype], num_warps=8 if width > 2048 else 4,
        )  # fmt: skip
    return x, out


def spread(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn, batch: int) -> tuple[torch.Tensor, ...]:
    """See `reference.spread`."""
    count, dim = q.shape[0], turn.cos.shape[1]
    heads, kv_heads = q.shape[1] // dim, k.shape[1] // dim
    outs = [x.new_empty((batch, n, count // batch, dim)) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads))]
    first, second = turn.norms
    normed = first is not None and second is not None
    gains = (q, q, 0.0, 0.0) if first is None or second is None else (first.gain, second.gain, first.eps, second.eps)
    block = TOKENS if q.device.type == "cuda" else power_of_2(count)
    with on(q.device):
        _spread[(-(-count // block), heads + 2 * kv_heads)](
            q, k, v, q.stride(0), k.stride(0), v.stride(0), turn.cos, turn.sin, *gains, *outs, count, count // batch,
            HEADS=heads, KV_HEADS=kv_heads, D=dim, DP=power_of_2(dim // 2), NORM=normed,
            TYPE=_TYPES[q.dtype], BLOCK=block, num_warps=4,
        )  # fmt: skip
    return tuple(outs)
