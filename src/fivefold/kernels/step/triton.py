"""What surrounds attention in a decoding step of a Llama's kind, in Triton: see `reference.py` for what each computes.

A step of few tokens is bound by the bytes of the weights. So each kernel reads rows of weights once, front to back,
and does the small operations before and behind the product on the way: RMSNorm before, and behind it RoPE and the
writing of keys and values into their pages, `act(gate) * up`, or the residual.

`_few` multiplies up to `FEW` tokens in registers: every program has a few rows of the weights, and loads a tile ahead.
`_many` multiplies up to `COLUMNS` tokens by tensor cores. A program has two sets of rows, A and B, which belong
together: those of gate and up, or the two halves of a head that RoPE turns into each other.

On a GPU of compute capability 9.0 or more kernels start before the one before them has ended (programmatic dependent
launch): they load their first weights, which no kernel writes, and then wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as dependent

from fivefold.kernels.device import on, overlaps, power_of_2
from fivefold.kernels.packed_decode.schedule import SPAN
from fivefold.kernels.step.reference import Biases, Heads, Norm, Pages, Turn

COLUMNS = 16
"""Tokens (sequences) that the kernels multiply. More go to torch's products, and kernels do what is between them."""

FEW = 2
"""Of them, how many are multiplied in registers; with more the tensor cores are faster."""

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _acted(x, ACT: tl.constexpr):
    """An activation, float32."""
    if ACT == "silu":
        return x / (1.0 + tl.exp(-x))
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))


@triton.jit
def _place(w0, w1, w2, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, TOOK: tl.constexpr):
    """The weights of this program: address, which of the three, its number among those of them, and how many rows they
    have. TOOK: rows that a program takes."""
    P0: tl.constexpr = (N0 + TOOK - 1) // TOOK
    P1: tl.constexpr = (N1 + TOOK - 1) // TOOK
    pid = tl.program_id(0)
    which = (pid >= P0).to(tl.int32)
    address = w0.to(tl.int64)
    number = pid
    rows = tl.where(which == 0, N0, N1)
    if N1 > 0:
        address = tl.where(which == 0, address, w1.to(tl.int64))
        number = tl.where(which == 0, pid, pid - P0)
    if N2 > 0:
        which += (pid >= P0 + P1).to(tl.int32)
        address = tl.where(which == 2, w2.to(tl.int64), address)
        number = tl.where(which == 2, pid - P0 - P1, number)
        rows = tl.where(which == 2, N2, rows)
    return address, which, number, rows


@triton.jit
def _rms(h, gain, eps, k, K: tl.constexpr, TYPE: tl.constexpr):
    """RMSNorm of one token's numbers `k`, float32: there are K, and then zeros. Rounded as transformers rounds it."""
    scale = 1.0 / tl.sqrt(tl.sum(h * h, 0) / K + eps)
    g = tl.load(gain + k, mask=k < K, other=0.0).to(tl.float32)
    return ((h * scale).to(TYPE).to(tl.float32) * g).to(TYPE)


@triton.jit
def _rms_halves(a, b, gain, eps, d, D: tl.constexpr, TYPE: tl.constexpr):
    """The same of heads, as two halves `[d, columns]`."""
    x = a.to(tl.float32)
    y = b.to(tl.float32)
    scale = 1.0 / tl.sqrt((tl.sum(x * x, 0) + tl.sum(y * y, 0)) / D + eps)
    first = tl.load(gain + d, mask=d < D // 2, other=0.0).to(tl.float32)[:, None]
    second = tl.load(gain + d + D // 2, mask=d < D // 2, other=0.0).to(tl.float32)[:, None]
    a = ((x * scale[None, :]).to(TYPE).to(tl.float32) * first).to(TYPE)
    b = ((y * scale[None, :]).to(TYPE).to(tl.float32) * second).to(TYPE)
    return a, b


@triton.jit
def _turned(a, b, cos, sin, c, d, TYPE: tl.constexpr, D: tl.constexpr, live):
    """RoPE of two halves `[rows, columns]` of heads, already rounded, as transformers rounds it."""
    at = c[None, :] * D + d[:, None]
    ca = tl.load(cos + at, mask=live, other=0.0).to(tl.float32)
    cb = tl.load(cos + at + D // 2, mask=live, other=0.0).to(tl.float32)
    sa = tl.load(sin + at, mask=live, other=0.0).to(tl.float32)
    sb = tl.load(sin + at + D // 2, mask=live, other=0.0).to(tl.float32)
    a = a.to(tl.float32)
    b = b.to(tl.float32)
    first = (a * ca).to(TYPE).to(tl.float32) - (b * sa).to(TYPE).to(tl.float32)
    second = (b * cb).to(TYPE).to(tl.float32) + (a * sb).to(TYPE).to(tl.float32)
    return first.to(TYPE), second.to(TYPE)


@triton.jit
def _slot(table, spans, rows, side, columns, TYPE: tl.constexpr, D: tl.constexpr, SPAN: tl.constexpr, live):
    """Where the newest token of cache rows lies: pointers to its first number. side: 0 keys, 1 values."""
    slot = tl.load(spans + rows * SPAN + 4, mask=live, other=1) - 1
    address = tl.load(table + (rows * columns + slot // 32) * 2 + side, mask=live, other=0)
    return (address * 16).to(tl.pointer_type(TYPE)) + (slot % 32) * D


@triton.jit
def _finish(
    a, b, c, live, which, first, second, rows, out, residual, bias0, bias1, bias2, cos, sin, table, spans, columns,
    N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, ACT: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, APPEND: tl.constexpr, TYPE: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """What is done with products a and b, float32 `[R, columns]`, of rows `first` and `second` with tokens c."""
    inside = (first < rows)[:, None] & live[None, :]
    if BIAS:
        if which == 0:
            bias = bias0
        elif which == 1:
            bias = bias1
        else:
            bias = bias2
        a += tl.load(bias + first, mask=first < rows, other=0.0).to(tl.float32)[:, None]
        if KIND == "heads":
            b += tl.load(bias + second, mask=first < rows, other=0.0).to(tl.float32)[:, None]
        elif KIND == "gated":
            b += tl.load(bias1 + first, mask=first < rows, other=0.0).to(tl.float32)[:, None]
    a = a.to(TYPE)
    b = b.to(TYPE)
    base = tl.where(which == 0, 0, tl.where(which == 1, N0, N0 + N1))
    if KIND == "gated":
        acted = _acted(a.to(tl.float32), ACT).to(TYPE).to(tl.float32)
        tl.store(out + c[None, :] * N0 + first[:, None], (acted * b.to(tl.float32)).to(TYPE), mask=inside)
    elif KIND == "heads":
        d = first % D
        turned, other = _turned(a, b, cos, sin, c, d, TYPE, D, inside)
        a = tl.where(which == 2, a, turned)
        b = tl.where(which == 2, b, other)
        width: tl.constexpr = N0 if APPEND else N0 + N1 + N2
        at = out + c[None, :] * width + (base + first)[:, None]
        if APPEND:  # noqa: SIM102 - known when it is compiled
            if which > 0:
                row = c[None, :] * (N1 // D) + (first // D)[:, None]
                at = _slot(table, spans, row, which - 1, columns, TYPE, D, SPAN, inside) + d[:, None]
        tl.store(at, a, mask=inside)
        tl.store(at + D // 2, b, mask=inside)
    else:
        at = c[None, :] * (N0 + N1 + N2) + (base + first)[:, None]
        if RESIDUAL:
            before = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
            a = (a.to(tl.float32) + before).to(TYPE)
        tl.store(out + at, a, mask=inside)


@triton.jit
def _rows_of(number, r, KIND: tl.constexpr, R: tl.constexpr, D: tl.constexpr):
    """The rows A and B of the weights that a program takes."""
    if KIND == "heads":
        per: tl.constexpr = D // 2 // R
        first = number // per * D + number % per * R + r
        return first, first + D // 2
    else:
        return number * R + r, number * R + r


@triton.jit
def _products(w, x, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, sums):
    """A tile w `[R, BK]` times each of C tokens x, added to `sums`."""
    out = ()
    for c in tl.static_range(C):
        out = out + (sums[c] + tl.sum(tl.reshape(w * x[c][None, :], [R, BK // 8, 8]), 2),)
    return out


@triton.jit(do_not_specialize=("columns",))
def _few(
    x, gain, w0, w1, w2, bias0, bias1, bias2, residual, cos, sin, table, spans, out, eps, columns,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr,
    ACT: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, APPEND: tl.constexpr,
    TYPE: tl.constexpr, SPAN: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BK: tl.constexpr, KP: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """C tokens x `[C, K]` times rows of weights `[N, K]`. Grid: (programs,).

    LATE: the root mean square divides the products, not the tokens.
    """
    PAIR: tl.constexpr = KIND != "plain"
    if PDL:
        dependent.gdc_launch_dependents()
    if KIND == "gated":
        address, which, number, rows = _place(w0, w0, w0, N0, 0, 0, R)
    elif PAIR:
        address, which, number, rows = _place(w0, w1, w2, N0, N1, N2, 2 * R)
    else:
        address, which, number, rows = _place(w0, w1, w2, N0, N1, N2, R)
    r = tl.arange(0, R)
    first, second = _rows_of(number, r, KIND, R, D)
    k = tl.arange(0, BK)
    pa = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
    pb = pa
    if KIND == "gated":
        pb = w1
    pa += tl.minimum(first, rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    pb += tl.minimum(second, rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    wa = tl.load(pa, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    wb = wa
    if PAIR:
        wb = tl.load(pb, mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
    if PDL:
        dependent.gdc_wait()
    scales = ()
    a = ()
    b = ()
    squares = ()
    for c in tl.static_range(C):
        if NORM and not LATE:
            whole = tl.arange(0, KP)
            token = tl.load(x + c * K + whole, mask=whole < K, other=0.0).to(tl.float32)
            scales = scales + (1.0 / tl.sqrt(tl.sum(token * token, 0) / K + eps),)
        a = a + (tl.zeros([R, BK // 8], tl.float32),)
        b = b + (tl.zeros([R if PAIR else 1, BK // 8], tl.float32),)
        squares = squares + (tl.zeros([BK // 8], tl.float32),)
    for start in range(0, K, BK):
        ahead = (start + BK + k < K)[None, :]
        na = tl.load(pa + (start + BK), mask=ahead, other=0.0, eviction_policy="evict_first")
        nb = na
        if PAIR:
            nb = tl.load(pb + (start + BK), mask=ahead, other=0.0, eviction_policy="evict_first")
        there = start + k < K
        tokens = ()
        sums = ()
        if NORM:
            g = tl.load(gain + start + k, mask=there, other=0.0).to(tl.float32)
        for c in tl.static_range(C):
            h = tl.load(x + c * K + start + k, mask=there, other=0.0).to(tl.float32)
            if NORM and LATE:
                sums = sums + (squares[c] + tl.sum(tl.reshape(h * h, [BK // 8, 8]), 1),)
                h = h * g
            elif NORM:
                h = ((h * scales[c]).to(TYPE).to(tl.float32) * g).to(TYPE).to(tl.float32)
            tokens = tokens + (h,)
        if NORM and LATE:
            squares = sums
        a = _products(wa.to(tl.float32), tokens, C, R, BK, a)
        if PAIR:
            b = _products(wb.to(tl.float32), tokens, C, R, BK, b)
        wa = na
        wb = nb
    for c in tl.static_range(C):
        ya = tl.sum(a[c], 1)
        yb = ya
        if PAIR:
            yb = tl.sum(b[c], 1)
        if NORM and LATE:
            scale = 1.0 / tl.sqrt(tl.sum(squares[c], 0) / K + eps)
            ya *= scale
            yb *= scale
        token = tl.zeros([1], tl.int32) + c
        _finish(
            ya[:, None], yb[:, None], token, token >= 0, which, first, second, rows, out, residual, bias0, bias1, bias2,
            cos, sin, table, spans, columns, N0, N1, N2, D, KIND, ACT, BIAS, RESIDUAL, APPEND, TYPE, SPAN,
        )  # fmt: skip


@triton.jit(do_not_specialize=("columns", "count"))
def _many(
    x, w0, w1, w2, bias0, bias1, bias2, residual, cos, sin, table, spans, out, columns, count,
    K: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr,
    ACT: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, APPEND: tl.constexpr, TYPE: tl.constexpr,
    SPAN: tl.constexpr, R: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, WIDE: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`count` tokens x `[count, K]`, at most C, times rows of weights. Grid: (programs,).

    WIDE multiplies in float32 whatever the dtype: the interpreter has no products of bfloat16.
    """
    PAIR: tl.constexpr = KIND != "plain"
    WORK: tl.constexpr = tl.float32 if WIDE else TYPE
    if PDL and not LATE:
        dependent.gdc_launch_dependents()
    if KIND == "gated":
        address, which, number, rows = _place(w0, w0, w0, N0, 0, 0, R)
    elif PAIR:
        address, which, number, rows = _place(w0, w1, w2, N0, N1, N2, 2 * R)
    else:
        address, which, number, rows = _place(w0, w1, w2, N0, N1, N2, R)
    r = tl.arange(0, R)
    c = tl.arange(0, C)
    live = c < count
    first, second = _rows_of(number, r, KIND, R, D)
    k = tl.arange(0, BK)
    pa = tl.multiple_of(address.to(tl.pointer_type(TYPE)), 16)
    pb = pa
    if KIND == "gated":
        pb = w1
    pa += tl.minimum(first, rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    pb += tl.minimum(second, rows - 1).to(tl.int64)[:, None] * K + k[None, :]
    px = x + c[None, :] * K + k[:, None]
    if PDL:
        dependent.gdc_wait()
    a = tl.zeros([R, C], tl.float32)
    b = tl.zeros([R, C], tl.float32)
    for start in tl.range(0, K, BK, num_stages=STAGES):
        there = start + k < K
        wa = tl.load(pa + start, mask=there[None, :], other=0.0, eviction_policy="evict_first").to(WORK)
        h = tl.load(px + start, mask=live[None, :] & there[:, None], other=0.0).to(WORK)
        a = tl.dot(wa, h, a, input_precision="ieee")
        if PAIR:
            wb = tl.load(pb + start, mask=there[None, :], other=0.0, eviction_policy="evict_first").to(WORK)
            b = tl.dot(wb, h, b, input_precision="ieee")
    if PDL and LATE:
        dependent.gdc_launch_dependents()
    _finish(
        a, b, c, live, which, first, second, rows, out, residual, bias0, bias1, bias2, cos, sin, table, spans,
        columns, N0, N1, N2, D, KIND, ACT, BIAS, RESIDUAL, APPEND, TYPE, SPAN,
    )  # fmt: skip


@triton.jit
def _normed(x, gain, eps, out, K: tl.constexpr, KP: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr):
    """RMSNorm of tokens `[count, K]`. Grid: (count,)."""
    if PDL:
        dependent.gdc_launch_dependents()
        dependent.gdc_wait()
    k = tl.arange(0, KP)
    at = tl.program_id(0) * K + k
    h = tl.load(x + at, mask=k < K, other=0.0).to(tl.float32)
    tl.store(out + at, _rms(h, gain, eps, k, K, TYPE), mask=k < K)


@triton.jit
def _gate(gate, up, out, count, BLOCK: tl.constexpr, ACT: tl.constexpr, TYPE: tl.constexpr, PDL: tl.constexpr):
    """`act(gate) * up`, elementwise."""
    if PDL:
        dependent.gdc_launch_dependents()
        dependent.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = _acted(tl.load(gate + at, mask=at < count, other=0.0).to(tl.float32), ACT).to(TYPE).to(tl.float32)
    b = tl.load(up + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, (a * b).to(TYPE), mask=at < count)


@triton.jit(do_not_specialize=("columns", "q_stride", "k_stride", "v_stride"))
def _rotate_append(
    q, k, v, q_stride, k_stride, v_stride, cos, sin, q_gain, k_gain, q_eps, k_eps, table, spans, out, columns,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, APPEND: tl.constexpr,
    TYPE: tl.constexpr, SPAN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RMSNorm of each query and key, RoPE, and what is new into its pages. Grid: (tokens, HEADS + 2 KV_HEADS)."""
    if PDL:
        dependent.gdc_launch_dependents()
        dependent.gdc_wait()
    c = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, D // 2)
    one = tl.zeros([1], tl.int32) + c
    live = (d >= 0)[:, None]
    side = 0
    if head < HEADS:
        source = q + c * q_stride + head * D
    elif head < HEADS + KV_HEADS:
        source = k + c * k_stride + (head - HEADS) * D
    else:
        source = v + c * v_stride + (head - HEADS - KV_HEADS) * D
        side = 1
    a = tl.load(source + d)[:, None]
    b = tl.load(source + d + D // 2)[:, None]
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
    width: tl.constexpr = HEADS if APPEND else HEADS + 2 * KV_HEADS
    at = out + (one[None, :] * width + head) * D + d[:, None]
    if APPEND:  # noqa: SIM102 - known when it is compiled
        if head >= HEADS:
            row = one[None, :] * KV_HEADS + (head - HEADS - side * KV_HEADS)
            at = _slot(table, spans, row, side, columns, TYPE, D, SPAN, row >= 0) + d[:, None]
    tl.store(at, a)
    tl.store(at + D // 2, b)


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows of each set of a program, numbers of them at a time, warps, and tiles loaded ahead (of
    `_many`). late: whether the norm comes after the product (of `_few`), or the next kernel may start only then (of
    `_many`, whose shared memory it would take)."""

    rows: int
    block: int
    warps: int
    stages: int = 1
    late: bool = False


def tiles_for(kind: str, count: int, width: int, dim: int, norm: bool, device: torch.device) -> Tiles:
    """How a product of `count` tokens of `width` numbers is cut: what was fastest on an H100. dim: of heads; norm:
    whether one comes before."""
    block, one = power_of_2(width), count == 1
    if device.type == "cpu":  # the interpreter has few programs rather than small ones
        return Tiles(dim // 2 if kind == "heads" else 256, max(16, block), 4)
    if count > FEW:
        return Tiles(16, min(256, max(32, block)), 2, 4, late=True)
    if kind == "plain" and one:
        if norm:
            return Tiles(8, min(1024, max(256, block)), 8, late=True)
        return Tiles(8, 2048, 4) if width > 8192 else Tiles(2, min(2048, max(256, block)), 8)
    if kind == "plain" and width > 8192:
        return Tiles(4, 2048, 8, late=norm)
    return Tiles(2 if kind != "plain" and not one else 4, min(1024, max(128, block)), 4, late=norm)


def _launch(
    kind: str,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Biases,
    norm: Norm | None,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
    act: str = "silu",
    turn: Turn | None = None,
    pages: Pages | None = None,
    tiles: Tiles | None = None,
    pdl: bool | None = None,
) -> None:
    (count, width), device = x.shape, x.device
    if norm is not None and count > FEW:
        x, norm = normed(x, norm, pdl), None
    sizes = [len(weight) for weight in weights] if kind != "gated" else [len(weights[0])]
    tiles = tiles or tiles_for(kind, count, width, 2 if turn is None else turn.cos.shape[1], norm is not None, device)
    took = tiles.rows * (2 if kind == "heads" else 1)
    grid = (sum(-(-size // took) for size in sizes),)
    sizes += [0] * (3 - len(sizes))
    w = [*weights, *[weights[0]] * (3 - len(weights))]
    b = [x if bias is None else bias for bias in (*biases, *[biases[0]] * (3 - len(biases)))]
    pdl = overlaps(device) if pdl is None else pdl
    more = {"launch_pdl": True} if pdl else {}
    cos, sin, dim = (x, x, 2) if turn is None else (turn.cos, turn.sin, turn.cos.shape[1])
    table, spans, columns = (x, x, 0) if pages is None else (pages.exact.table, pages.spans, pages.exact.table.shape[1])
    gain, eps = (x, 0.0) if norm is None else (norm.gain, norm.eps)
    places = *w, *b, x if residual is None else residual, cos, sin, table, spans, out
    common = {
        "K": width, "N0": sizes[0], "N1": sizes[1], "N2": sizes[2], "D": dim, "KIND": kind, "ACT": act,
        "BIAS": biases[0] is not None, "RESIDUAL": residual is not None, "LATE": tiles.late,
        "APPEND": pages is not None, "TYPE": _TYPES[x.dtype], "SPAN": SPAN, "R": tiles.rows, "BK": tiles.block,
        "PDL": pdl, "num_warps": tiles.warps, **more,
    }  # fmt: skip
    with on(device):
        if count <= FEW:
            _few[grid](
                x, gain, *places, eps, columns, C=count, KP=power_of_2(width), NORM=norm is not None,
                **common,
            )  # fmt: skip
        else:
            _many[grid](
                x, *places, columns, count, C=max(8, power_of_2(count)), STAGES=tiles.stages,
                WIDE=device.type != "cuda", **common,
            )  # fmt: skip


def products(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases, norm: Norm | None, **how: Any
) -> list[torch.Tensor]:
    """See `reference.products`. Of several weights the results are columns of one tensor."""
    if len(x) > COLUMNS:
        h = x if norm is None else normed(x, norm)
        return [torch.nn.functional.linear(h, weight, bias) for weight, bias in zip(weights, biases)]
    sizes = [len(weight) for weight in weights]
    out = torch.empty((len(x), sum(sizes)), dtype=x.dtype, device=x.device)
    _launch("plain", x, weights, biases, norm, out, **how)
    return list(out.split(sizes, 1))


def added(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, **how: Any
) -> torch.Tensor:
    """See `reference.added`."""
    if len(x) > COLUMNS:
        return torch.addmm(residual if bias is None else residual + bias, x, weight.t())
    out = torch.empty_like(residual)
    _launch("plain", x, (weight,), (bias,), None, out, residual, **how)
    return out


def gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, biases: Biases, norm: Norm | None, act: str, **how: Any
) -> torch.Tensor:
    """See `reference.gated`."""
    if len(x) > COLUMNS:
        first, second = products(x, (gate, up), biases, norm)
        return gate_times(first, second, act)
    out = torch.empty((len(x), len(gate)), dtype=x.dtype, device=x.device)
    _launch("gated", x, (gate, up), biases, norm, out, act=act, **how)
    return out


def heads(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Biases,
    norm: Norm | None,
    turn: Turn,
    pages: Pages | None = None,
    **how: Any,
) -> Heads:
    """See `reference.heads`. With `pages`, keys and values go there instead."""
    if turn.norms != (None, None) or len(x) > COLUMNS:
        q, k, v = products(x, weights, biases, norm, **how)
        return turned(q, k, v, turn, pages)
    sizes = [len(weight) for weight in weights]
    out = x.new_empty((len(x), sizes[0] if pages is not None else sum(sizes)))
    _launch("heads", x, weights, biases, norm, out, turn=turn, pages=pages, **how)
    return _heads(out, sizes, turn, pages)


def _heads(out: torch.Tensor, sizes: list[int], turn: Turn, pages: Pages | None) -> Heads:
    parts = [part.view(len(out), -1, turn.cos.shape[1]) for part in out.split(sizes[:1] if pages else sizes, 1)]
    return (parts[0], None, None) if pages else (parts[0], parts[1], parts[2])


def turned(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn, pages: Pages | None = None, pdl: bool | None = None
) -> Heads:
    """See `reference.turned`. With `pages`, keys and values go there instead."""
    count, dim, device = len(q), turn.cos.shape[1], q.device
    sizes = [x.shape[1] for x in (q, k, v)]
    out = q.new_empty((count, sizes[0] if pages is not None else sum(sizes)))
    table, spans, columns = (q, q, 0) if pages is None else (pages.exact.table, pages.spans, pages.exact.table.shape[1])
    first, second = turn.norms
    normed = first is not None and second is not None
    gains = (q, q, 0.0, 0.0) if first is None or second is None else (first.gain, second.gain, first.eps, second.eps)
    pdl = overlaps(device) if pdl is None else pdl
    more = {"launch_pdl": True} if pdl else {}
    with on(device):
        _rotate_append[(count, (sizes[0] + 2 * sizes[1]) // dim)](
            q, k, v, q.stride(0), k.stride(0), v.stride(0), turn.cos, turn.sin, *gains, table, spans, out, columns,
            HEADS=sizes[0] // dim, KV_HEADS=sizes[1] // dim, D=dim, NORM=normed, APPEND=pages is not None,
            TYPE=_TYPES[q.dtype], SPAN=SPAN, PDL=pdl, num_warps=1, **more,
        )  # fmt: skip
    return _heads(out, sizes, turn, pages)


def normed(x: torch.Tensor, norm: Norm, pdl: bool | None = None) -> torch.Tensor:
    """See `reference.normed`."""
    count, width = x.shape
    out = torch.empty_like(x)
    pdl = overlaps(x.device) if pdl is None else pdl
    more = {"launch_pdl": True} if pdl else {}
    with on(x.device):
        _normed[(count,)](
            x, norm.gain, norm.eps, out, K=width, KP=power_of_2(width), TYPE=_TYPES[x.dtype], PDL=pdl,
            num_warps=8 if width > 2048 else 4, **more,
        )  # fmt: skip
    return out


def gate_times(
    gate: torch.Tensor, up: torch.Tensor, act: str, pdl: bool | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.gate_times`. out: where it goes, which may be `gate`."""
    out = torch.empty_like(gate) if out is None else out
    pdl = overlaps(gate.device) if pdl is None else pdl
    more = {"launch_pdl": True} if pdl else {}
    with on(gate.device):
        _gate[(-(-gate.numel() // 1024),)](
            gate, up, out, gate.numel(), BLOCK=1024, ACT=act, TYPE=_TYPES[gate.dtype], PDL=pdl, num_warps=4, **more
        )
    return out
