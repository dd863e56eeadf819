"""One decoding step over packed and exact pages. `triton.py` needs Triton and is imported only where it is used."""

from fivefold.kernels.packed_decode.reader import Reader
from fivefold.kernels.packed_decode.reference import Form, decode_keys, decode_page, decode_reference, decode_values

__all__ = ["Form", "Reader", "decode_keys", "decode_page", "decode_reference", "decode_values"]
