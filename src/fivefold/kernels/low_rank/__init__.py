"""One decoding step over pages of low-rank features. `triton.py` needs Triton and is imported only where it is used."""

from fivefold.kernels.low_rank.reference import Features, decode_features, decode_reference

__all__ = ["Features", "decode_features", "decode_reference"]
