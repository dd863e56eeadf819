"""Scores of keys that were rotated over their channels before RoPE."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from fivefold.kernels.compiled import Field, library, pointer
from fivefold.kernels.hadamard import core
from fivefold.kernels.rotated.reference import rotated_columns

__all__ = ["rotated_columns", "rotated_scores"]

_SOURCE = Path(__file__).with_name("rotated.cpp")


def rotated_scores(
    queries: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    order: torch.Tensor,
    n: int,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    bits: int,
) -> torch.Tensor:
    """Inner products of queries with rotated keys (see `reference.py`), by the kernel: to be called where `takes_cpp`.

    queries: float32 `[rows, query, head_dim]` in the paired order; words, scale, zero: of pages, `[rows, pages,
    *shape]` int16 `[head_dim, 32]` and float16 `[planes, groups, 32]`; order: int64 `[teams or 1, channels]`, which
    channel every sorted one is; n: the order of the Hadamard matrix; cos_sin: cosine and sine, float32 `[teams or 1, 1,
    pairs, planes, pages, 32]`. Returns float32 `[rows, query, pages * planes * 32]`.
    """
    matrix, (rows, query, dim) = core(n), queries.shape
    pages, planes, groups = scale.shape[1:4]
    queries, order = (queries * n**-0.5).contiguous(), order.contiguous()
    cosine, sine = (x.contiguous() for x in cos_sin)
    out = queries.new_empty((rows, query, pages * planes * 32))
    kernel = library(
        _SOURCE, BITS=bits, PLANES=planes, D=dim, GROUP=dim // groups, HEADS=order.shape[1] // dim, N=n,
        CORE=len(matrix), PAIRS=cosine.shape[2], QUERIES=query,
    )  # fmt: skip
    kernel.scores(
        pointer(queries), Field.of(words), Field.of(scale), Field.of(zero), pointer(order), _apart(order),
        pointer(matrix), pointer(cosine), pointer(sine), _apart(cosine), pointer(out), rows, pages,
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _apart(x: torch.Tensor) -> ctypes.c_int64:
    """How far a tensor's teams lie apart: not at all if there is one for all of them."""
    return ctypes.c_int64(0 if len(x) == 1 else x.stride(0))
