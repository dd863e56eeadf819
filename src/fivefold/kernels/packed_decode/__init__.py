"""One decoding step over packed and exact pages. `triton.py` needs Triton and is imported only where it is used."""

from fivefold.kernels.packed_decode.reference import Form, decode_page, decode_reference

__all__ = ["Form", "decode_page", "decode_reference"]
