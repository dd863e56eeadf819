"""`reference.py` as one launch for up to `MOST` parts, however their outputs are strided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, power_of_2
from fivefold.kernels.merge.reference import Part

MOST = 4
"""Parts of one launch; of more, what the first ones make is merged with the others."""
NUMBERS = 2048
"""Numbers of one program."""
TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What outputs are read and written in."""


@triton.jit
def _weights(lse, top):
    """`exp(lse - top)`, as if `top` were 0 where all there is is infinite (so does torch's `logsumexp`)."""
    return tl.exp(lse - tl.where(tl.abs(top) == float("inf"), 0.0, top))


@triton.jit
def _part(x, row, head, token, d, seen, by_row, by_head, by_token):
    at = x + row.to(tl.int64) * by_row + head.to(tl.int64) * by_head + token.to(tl.int64) * by_token
    return tl.load(at[:, None] + d[None, :], mask=seen, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("lines", "heads", "tokens"))
def _merge(
    out, lse, lines, heads, tokens, out_row, out_head, out_token,
    a, a_lse, a_row, a_head, a_token, b, b_lse, b_row, b_head, b_token,
    c, c_lse, c_row, c_head, c_token, e, e_lse, e_row, e_head, e_token,
    PARTS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK lines, each of one query of one head. Log-sum-exps are contiguous. Grid: (lines / BLOCK,)."""
    line = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = line < lines
    token, row = line % tokens, line // tokens // heads
    head = line // tokens % heads
    d = tl.arange(0, WIDTH)
    seen = live[:, None] & (d < D)[None, :]
    la = tl.load(a_lse + line, mask=live, other=0.0)
    lb = tl.load(b_lse + line, mask=live, other=0.0)
    top = tl.maximum(la, lb)
    if PARTS > 2:
        lc = tl.load(c_lse + line, mask=live, other=0.0)
        top = tl.maximum(top, lc)
    if PARTS > 3:
        le = tl.load(e_lse + line, mask=live, other=0.0)
        top = tl.maximum(top, le)
    whole = _weights(la, top) + _weights(lb, top)
    if PARTS > 2:
        whole += _weights(lc, top)
    if PARTS > 3:
        whole += _weights(le, top)
    total = tl.log(whole) + tl.where(tl.abs(top) == float("inf"), 0.0, top)
    sums = _part(a, row, head, token, d, seen, a_row, a_head, a_token) * tl.exp(la - total)[:, None]
    sums += _part(b, row, head, token, d, seen, b_row, b_head, b_token) * tl.exp(lb - total)[:, None]
    if PARTS > 2:
        sums += _part(c, row, head, token, d, seen, c_row, c_head, c_token) * tl.exp(lc - total)[:, None]
    if PARTS > 3:
        sums += _part(e, row, head, token, d, seen, e_row, e_head, e_token) * tl.exp(le - total)[:, None]
    tl.store(lse + line, total, mask=live)
    to = out + row.to(tl.int64) * out_row + head.to(tl.int64) * out_head + token.to(tl.int64) * out_token
    tl.store(to[:, None] + d[None, :], sums.to(out.dtype.element_ty), mask=seen)


def merge_parts(parts: Sequence[Part], out: torch.Tensor) -> torch.Tensor:
    """See `merge_reference`: of outputs `[rows, head, head_dim]` or `[rows, head, token, head_dim]` into `out` of that
    shape, of any strides and one of `TYPES` each. Returns the log-sum-exp."""
    while len(parts) > MOST:
        some = torch.empty(out.shape, dtype=torch.float32, device=out.device)
        parts = [(some, merge_parts(parts[:MOST], some)), *parts[MOST:]]
    total, dim = torch.empty(out.shape[:-1], dtype=torch.float32, device=out.device), out.shape[-1]
    given: list[object] = []
    for part, lse in parts:
        part = part if part.shape == out.shape else part.expand(out.shape)
        part = part if part.stride(-1) == 1 else part.contiguous()
        lse = lse if lse.is_contiguous() else lse.contiguous()
        given += [part, lse, *_strides(part)]
    given += given[:5] * (MOST - len(parts))
    lines, width = total.numel(), power_of_2(dim)
    block = max(1, NUMBERS // width)
    with on(out.device):
        _merge[(-(-lines // block),)](
            out, total, lines, out.shape[1], out.shape[2] if out.ndim == 4 else 1, *_strides(out), *given,
            PARTS=len(parts), D=dim, WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return total


def _strides(x: torch.Tensor) -> tuple[int, int, int]:
    """Of row, head and token."""
    return x.stride()[:3] if x.ndim == 4 else (*x.stride()[:2], 0)  # type: ignore[return-value]
