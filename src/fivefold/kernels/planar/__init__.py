"""The planar packed page: group quantisation, packing, and attention on the packed form."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from fivefold.kernels.choice import takes_cpp
from fivefold.kernels.compiled import Field, library, pointer
from fivefold.kernels.planar import reference
from fivefold.kernels.planar.reference import (
    PLANES,
    by_token,
    dequantise,
    pack,
    planes_of,
    quantise,
    sheets_of,
    shifts,
    unbias_,
    unpack,
    unpack_planes,
)

_SOURCE = Path(__file__).with_name("planar.cpp")

__all__ = [
    "PLANES",
    "by_token",
    "dequantise",
    "pack",
    "planar_output",
    "planar_scores",
    "planar_token_scores",
    "planes_of",
    "quantise",
    "sheets_of",
    "shifts",
    "unbias_",
    "unpack",
    "unpack_planes",
]


def planar_scores(
    queries: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    planes: int | None = None,
) -> torch.Tensor:
    """`reference.planar_scores`, by the kernel where that runs."""
    if not takes_cpp(queries):
        return reference.planar_scores(queries, words, scale, zero, bits, planes)
    return _scores("channel_scores", queries, words, scale, zero, bits, planes or PLANES[bits], scale.shape[2])


def planar_token_scores(
    queries: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """`reference.planar_token_scores`, by the kernel where that runs."""
    if not takes_cpp(queries):
        return reference.planar_token_scores(queries, words, scale, zero, bits)
    return _scores("token_scores", queries, words, scale, zero, bits, *scale.shape[2:4])


def planar_output(
    weights: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """`reference.planar_output`, by the kernel where that runs."""
    if not takes_cpp(weights):
        return reference.planar_output(weights, words, scale, zero, bits)
    (rows, pages, _, dim), (planes, groups), query = words.shape, scale.shape[2:4], weights.shape[1]
    weights = weights if weights.stride(2) == 1 else weights.contiguous()
    out = weights.new_empty((rows, pages, query, dim))
    library(_SOURCE, BITS=bits, PLANES=planes, GROUPS=groups, D=dim, QUERIES=query).output(
        pointer(weights), *map(ctypes.c_int64, weights.stride()[:2]), Field.of(words), Field.of(scale), Field.of(zero),
        pointer(out), rows, pages, torch.get_num_threads(),
    )  # fmt: skip
    return out.sum(1)


def _scores(
    name: str, queries: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int,
    planes: int, groups: int,
) -> torch.Tensor:  # fmt: skip
    queries, (rows, pages, _, dim), query = queries.contiguous(), words.shape, queries.shape[1]
    out = queries.new_empty((rows, query, pages * planes * 32))
    kernels = library(_SOURCE, BITS=bits, PLANES=planes, GROUPS=groups, D=dim, QUERIES=query)
    getattr(kernels, name)(
        pointer(queries), Field.of(words), Field.of(scale), Field.of(zero), pointer(out), rows, pages,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
