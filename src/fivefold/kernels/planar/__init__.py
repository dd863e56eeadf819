"""The planar packed page: group quantisation, packing, and attention on the packed form."""

from fivefold.kernels.planar.reference import (
    PLANES,
    by_token,
    dequantise,
    pack,
    planar_output,
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
