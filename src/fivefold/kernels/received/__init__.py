"""The attention that keys receive from a chunk. `triton.py` needs Triton and is imported only where it is used."""

import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.received.reference import received_reference

__all__ = ["HEAD_DIMS", "has_kernel", "received", "received_reference"]


HEAD_DIMS = (16, 32, 64, 128, 256)
"""What the kernel takes."""


def has_kernel(keys: torch.Tensor) -> bool:
    """Whether `received` never makes a [query, key] tensor of these keys, `[rows, tokens, head_dim]`."""
    return keys.shape[2] in HEAD_DIMS and choose(keys.device).triton


def received(queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scaling: float) -> torch.Tensor:
    """`received_reference`, by the kernel where that runs."""
    if has_kernel(keys):
        from fivefold.kernels.received import triton as kernel

        return kernel.received(queries, keys, lse, scaling)
    return received_reference(queries, keys, lse, scaling)
