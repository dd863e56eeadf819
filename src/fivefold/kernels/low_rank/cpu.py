"""Attention on pages of low-rank features in C++ (`low_rank.cpp`): to be called where `takes_cpp`."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.compiled import Field, library, pointer

_SOURCE = Path(__file__).with_name("low_rank.cpp")
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
Side = tuple[torch.Tensor, ...]
"""Features of keys or of values of pages: numbers `[rows, pages, tokens, rank]`; or planar words int16 `[rows, pages,
32, rank]`, scale and zero float16 `[rows, pages, planes, rank]`."""


def feature_scores(
    queries: torch.Tensor,
    side: Side,
    bits: int,
    up: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    together: int,
) -> torch.Tensor:
    """Inner products of queries with keys that are made of features, then turned.

    queries: float32 `[rows, query, head_dim]` in the paired order; bits: 0 for numbers; up: float32 `[teams or 1,
    together * head_dim, together * rank]`, channels in the paired order; cos_sin: cosine and sine, float32 `[teams or
    1, 1, pairs, 1, pages, tokens of a page]`. Returns float32 `[rows, query, pages * tokens]`.
    """
    (rows, query, dim), pages = queries.shape, side[0].shape[1]
    queries, up = queries.contiguous(), up.contiguous()
    cosine, sine = (x.contiguous() for x in cos_sin)
    out = queries.new_empty((rows, query, pages * cosine.shape[5]))
    kernels = _library(side, bits, together, dim, query, cosine.shape[2])
    kernels.scores(
        pointer(queries), *_fields(side), pointer(up), _apart(up), pointer(cosine), pointer(sine), _apart(cosine),
        pointer(out), rows, pages, torch.get_num_threads(),
    )  # fmt: skip
    return out


def feature_sums(weights: torch.Tensor, side: Side, bits: int, together: int) -> torch.Tensor:
    """Features of values, weighted: those of all rows that are together with each row's weights.

    weights: float32 `[rows, query, pages * tokens]`. Returns float32 `[teams, together * query, together * rank]`.
    """
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    rows, query, _ = weights.shape
    pages, rank = side[0].shape[1], side[0].shape[3]
    out = weights.new_empty((rows // together, pages, together * query, together * rank))
    _library(side, bits, together, 8, query, 0).sums(
        pointer(weights), *map(ctypes.c_int64, weights.stride()[:2]), *_fields(side), pointer(out), rows, pages,
        torch.get_num_threads(),
    )  # fmt: skip
    return out.sum(1)


def _library(side: Side, bits: int, together: int, dim: int, query: int, pairs: int) -> Any:
    tokens = 32 * side[1].shape[2] if bits else side[0].shape[2]
    return library(
        _SOURCE, BITS=bits, KIND=0 if bits else _KINDS[side[0].dtype], TOKENS=tokens, RANK=side[0].shape[3],
        HEADS=together, D=dim, PAIRS=pairs, QUERIES=query,
    )  # fmt: skip


def _fields(side: Side) -> tuple[Field, Field, Field]:
    """With strides counted in 16-bit numbers."""
    found = [Field.of(x) for x in side]
    for field, x in zip(found, side):
        field.row, field.page = (field.row * x.element_size() // 2, field.page * x.element_size() // 2)
    first = found[0]
    return (first, first, first) if len(found) == 1 else (found[0], found[1], found[2])


def _apart(x: torch.Tensor) -> ctypes.c_int64:
    """How far a tensor's teams lie apart: not at all if there is one for all of them."""
    return ctypes.c_int64(0 if len(x) == 1 else x.stride(0))
