"""Scores of keys that were rotated over their channels before RoPE. `numba.py` is imported only where it is used."""

from __future__ import annotations

import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.hadamard import core
from fivefold.kernels.rotated.reference import rotated_columns

__all__ = ["has_kernel", "rotated_columns", "rotated_scores"]


def has_kernel(device: torch.device) -> bool:
    return choose(device).path == "numba"


def rotated_scores(
    queries: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    order: torch.Tensor,
    n: int,
    waves: tuple[torch.Tensor, torch.Tensor],
    bits: int,
) -> torch.Tensor:
    """Inner products of queries with rotated keys (see `reference.py`), by the kernel: to be called where `has_kernel`.

    queries: float32 `[rows, query, head_dim]` in the paired order; words, scale, zero: of pages, `[rows, pages,
    *shape]` int16 `[head_dim, 32]` and float16 `[planes, groups, 32]`; order: int64 `[teams or 1, channels]`, which
    channel every sorted one is; n: the order of the Hadamard matrix; waves: cosine and sine, float32 `[teams or 1, 1,
    pairs, planes, pages, 32]`. Returns float32 `[rows, query, pages * planes * 32]`.
    """
    from fivefold.kernels.compiled import flat
    from fivefold.kernels.rotated import numba as kernel

    matrix, (rows, query, dim) = core(n), queries.shape
    pages, planes, groups = scale.shape[1:4]
    out = queries.new_empty((rows, query, pages, planes, kernel.LANES))
    kernel.scores(
        *flat(words), *flat(scale), *flat(zero), order, matrix, n, waves[0][:, 0], waves[1][:, 0],
        (queries * n**-0.5).contiguous(), out, bits, dim // groups,
    )  # fmt: skip
    return out.flatten(2)
