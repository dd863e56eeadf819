"""One decoding step over planar pages of other kinds than KIVI's. `triton.py` is imported only where it is used."""

from fivefold.kernels.planar_decode.reference import Planar, attend_planar, decode_planar

__all__ = ["Planar", "attend_planar", "decode_planar"]
