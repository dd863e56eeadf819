"""One decoding step over pages of rotated keys and values. `triton.py` is imported only where it is used."""

from fivefold.kernels.rotated_decode.reference import Rotated, attend_rotated

__all__ = ["Rotated", "attend_rotated"]
