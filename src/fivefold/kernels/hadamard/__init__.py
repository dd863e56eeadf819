"""Products with Hadamard matrices."""

from fivefold.kernels.hadamard.reference import core, exists, fwht, hadamard, split, transform, transform_columns

__all__ = ["core", "exists", "fwht", "hadamard", "split", "transform", "transform_columns"]
