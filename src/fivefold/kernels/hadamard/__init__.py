"""Products with Hadamard matrices."""

from fivefold.kernels.hadamard.reference import exists, fwht, hadamard, split, transform

__all__ = ["exists", "fwht", "hadamard", "split", "transform"]
