"""One decoding step over pages of directions that two layers share. `triton.py` needs Triton and is imported only where
it is used."""

from fivefold.kernels.directions.reference import Directions, decode_directions, decode_reference

__all__ = ["Directions", "decode_directions", "decode_reference"]
