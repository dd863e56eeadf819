"""The largest magnitude among keys and values. `triton.py` needs Triton and is imported only where it is used."""

import torch

from fivefold.kernels.choice import choose, loaded
from fivefold.kernels.peak.reference import peaks_reference

__all__ = ["peaks", "peaks_reference"]


def peaks(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """What `peaks_reference` gives, in one or more numbers a side, of which the largest counts, or one that is NaN:
    float32 `[2, n]`. By the kernel where that runs."""
    if choose(keys.device).triton and keys.dtype == values.dtype:
        found: torch.Tensor = loaded("peak.triton").peaks(keys, values)
        return found
    return peaks_reference(keys, values)
