"""What GEAR adds to its quantised base: low-rank factors and outliers, in C++ where that runs."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.choice import takes_cpp
from fivefold.kernels.compiled import Field, library, pointer
from fivefold.kernels.gear import reference
from fivefold.kernels.gear.reference import Extras

__all__ = ["Extras", "add_scores", "extra_output"]

_SOURCE = Path(__file__).with_name("gear.cpp")


def add_scores(out: torch.Tensor, queries: torch.Tensor, extras: Extras) -> None:
    """`reference.add_scores`, by the kernel where that runs."""
    if not takes_cpp(queries):
        reference.add_scores(out, queries, extras)
        return
    queries, (rows, query, dim) = queries.contiguous(), queries.shape
    pages = extras.pages
    _library(extras, out.shape[2] // pages, dim, query).add_scores(
        pointer(queries), *_fields(extras), pointer(out), rows, pages, torch.get_num_threads()
    )


def extra_output(weights: torch.Tensor, extras: Extras, dim: int) -> torch.Tensor:
    """`reference.extra_output`, by the kernel where that runs."""
    if not takes_cpp(weights):
        return reference.extra_output(weights, extras, dim)
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    (rows, query, tokens), pages = weights.shape, extras.pages
    out = weights.new_empty((rows, pages, query, dim))
    _library(extras, tokens // pages, dim, query).output(
        pointer(weights), *map(ctypes.c_int64, weights.stride()[:2]), *_fields(extras), pointer(out), rows, pages,
        torch.get_num_threads(),
    )  # fmt: skip
    return out.sum(1)


def _library(extras: Extras, tokens: int, dim: int, query: int) -> Any:
    rank = 0 if extras.left is None else extras.left.shape[3]
    outliers = 0 if extras.outliers is None else extras.outliers.shape[3]
    return library(_SOURCE, T=tokens, D=dim, R=rank, OUTLIERS=outliers, QUERIES=query, BITS=0)


def _fields(extras: Extras) -> list[Field]:
    return [Field() if x is None else Field.of(x) for x in extras]
