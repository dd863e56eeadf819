"""`reference.py` in one launch, wherever the pages lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on
from fivefold.kernels.gather.reference import PAGE

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=("columns", "tokens", "stride"))
def _gather(
    table, lines, keys, values, columns, tokens, stride,
    DTYPE: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    """One side of a page. Grid: (rows * columns, 2); stride: of a row of the table. NAMED: `lines` are its rows."""
    page = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    row = page // columns
    column = page % columns
    r = tl.arange(0, PAGE)
    d = tl.arange(0, D)
    source = tl.load(lines + row) if NAMED else row
    address = tl.load(table + source * stride + 2 * column + side) * 16
    there = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    seen = (column * PAGE + r < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(there + r[:, None] * D + d[None, :], mask=seen)
    out = (keys if side == 0 else values) + (row * tokens + column * PAGE) * D
    tl.store(out + r[:, None] * D + d[None, :], x, mask=seen)


def gather_pages(
    table: torch.Tensor, tokens: int, head_dim: int, dtype: torch.dtype, at: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.gather_pages`, of pages on the device of the table, whose last two axes are contiguous; of a
    head_dim that is a power of two. at: int64 `[rows]`, which rows of the table; None is all."""
    rows, columns = len(table) if at is None else len(at), table.shape[1]
    keys, values = (torch.empty((rows, tokens, head_dim), dtype=dtype, device=table.device) for _ in range(2))
    with on(table.device):
        _gather[(rows * columns, 2)](
            table, table if at is None else at, keys, values, columns, tokens, table.stride(0),
            DTYPE=_TYPES[dtype], PAGE=PAGE, D=head_dim, NAMED=at is not None, num_warps=4,
        )  # fmt: skip
    return keys, values
