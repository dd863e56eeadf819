"""Products with Hadamard matrices."""

from fivefold.kernels.hadamard.reference import exists, fwht, hadamard, split, transform, transform_columns

__all__ = ["exists", "fwht", "hadamard", "split", "transform", "transform_columns"]
