"""The merge of parts of an attention. `triton.py` needs Triton and is imported only where it is used."""

from fivefold.kernels.merge.reference import Part, merge_reference

__all__ = ["Part", "merge_reference"]
