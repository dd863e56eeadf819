"""`reference.py` in one launch, wherever the pages lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on
from fivefold.kernels.gather.reference import PAGE

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit(do_not_specialize=("columns", "tokens", "stride", "first_row", "first_column"))
def _gather(
    table, lines, keys, values, columns, tokens, stride, first_row, first_column,
    DTYPE: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, NAMED: tl.constexpr,
):  # fmt: skip
    """One side of a page. Grid: (rows * columns, 2); stride: of a row of the table. NAMED: `lines` are its rows; else
    they come one after the other."""
    page = tl.program_id(0).to(tl.int64)
    side = tl.program_id(1)
    row = page // columns
    column = page % columns
    r = tl.arange(0, PAGE)
    d = tl.arange(0, D)
    source = tl.load(lines + row) if NAMED else first_row + row
    address = tl.load(table + source * stride + 2 * (first_column + column) + side) * 16
    there = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
    seen = (column * PAGE + r < tokens)[:, None] & (d < D)[None, :]
    x = tl.load(there + r[:, None] * D + d[None, :], mask=seen)
    out = (keys if side == 0 else values) + (row * tokens + column * PAGE) * D
    tl.store(out + r[:, None] * D + d[None, :], x, mask=seen)


def gather_pages(
    table: torch.Tensor,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    at: torch.Tensor | slice | None = None,
    first: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.gather_pages`, of pages on the device of the table, whose last two axes are contiguous; of a
    head_dim that is a power of two. at: which rows of the table, int64 `[rows]` or a run; None is all. first: the
    column in which the first token is."""
    columns, named = -(-tokens // PAGE), isinstance(at, torch.Tensor)
    begin, rows = rows_at(table, at)
    keys, values = (torch.empty((rows, tokens, head_dim), dtype=dtype, device=table.device) for _ in range(2))
    with on(table.device):
        _gather[(rows * columns, 2)](
            table, at if named else table, keys, values, columns, tokens, table.stride(0), begin, first,
            DTYPE=_TYPES[dtype], PAGE=PAGE, D=head_dim, NAMED=named, num_warps=4,
        )  # fmt: skip
    return keys, values


def rows_at(table: torch.Tensor, at: torch.Tensor | slice | None) -> tuple[int, int]:
    """The first row of a run of a table's rows, and how many there are, named or not."""
    if isinstance(at, slice):
        return at.start, at.stop - at.start
    return 0, table.shape[0] if at is None else at.shape[0]
