"""`reference.py` in one launch: each program leaves the largest magnitude of what it has seen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, power_of_2

PROGRAMS = 32
"""Of one side at most: few numbers for the host to look at."""
NUMBERS = 4096
"""Numbers that a program takes at a time."""


@triton.jit(do_not_specialize=("lines", "tokens"))
def _peaks(
    keys, values, out, lines, tokens, key_row, key_token, value_row, value_token,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bits of an absolute value are ordered as it is, with infinity and then NaN above all others. Grid: (programs,
    2)."""
    side = tl.program_id(1)
    x = keys if side == 0 else values
    by_row = tl.where(side == 0, key_row, value_row).to(tl.int64)
    by_token = tl.where(side == 0, key_token, value_token).to(tl.int64)
    d = tl.arange(0, WIDTH)
    most = tl.zeros([BLOCK, WIDTH], tl.int32)
    for first in range(tl.program_id(0) * BLOCK, lines, tl.num_programs(0) * BLOCK):
        line = first + tl.arange(0, BLOCK)
        at = x + line // tokens * by_row + line % tokens * by_token
        found = tl.load(at[:, None] + d[None, :], mask=(line < lines)[:, None] & (d < D)[None, :], other=0.0)
        most = tl.maximum(most, tl.abs(found.to(tl.float32)).to(tl.int32, bitcast=True))
    tl.store(out + side * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(most, 1), 0))


def peaks(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The largest absolute value of parts of keys and of values, `[rows, tokens, head_dim]` of one dtype: float32
    `[2, parts]`, NaN of a part with a number that is none."""
    keys, values = (x if x.stride(2) == 1 else x.contiguous() for x in (keys, values))
    rows, tokens, dim = keys.shape
    width = power_of_2(dim)
    lines, block = rows * tokens, max(1, NUMBERS // width)
    programs = max(1, min(PROGRAMS, -(-lines // block)))
    out = torch.empty((2, programs), dtype=torch.int32, device=keys.device)
    with on(keys.device):
        _peaks[programs, 2](
            keys, values, out, lines, tokens, *keys.stride()[:2], *values.stride()[:2],
            D=dim, WIDTH=width, BLOCK=block, num_warps=4,
        )  # fmt: skip
    return out.view(torch.float32)
