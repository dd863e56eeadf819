"""The planar packed page: group quantisation, packing, and attention on the packed form. `numba.py` is imported only
where it is used."""

import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.planar import reference
from fivefold.kernels.planar.reference import (
    PLANES,
    by_token,
    dequantise,
    pack,
    planar_scores,
    planar_token_scores,
    planes_of,
    quantise,
    sheets_of,
    shifts,
    unbias_,
    unpack,
    unpack_planes,
)

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


def planar_output(
    weights: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int
) -> torch.Tensor:
    """`reference.planar_output`, by the kernel where that runs."""
    if choose(words.device).path != "numba":
        return reference.planar_output(weights, words, scale, zero, bits)
    from fivefold.kernels.compiled import flat
    from fivefold.kernels.planar import numba as kernel

    (rows, pages, lines, dim), (planes, groups) = words.shape, scale.shape[2:4]
    out = torch.empty((rows, pages, weights.shape[1], dim))
    sheets = lines // kernel.ROWS
    kernel.output(weights, *flat(words), *flat(scale), *flat(zero), out, bits, sheets, planes, groups)
    return out.sum(1)
