"""Numbers from and to many places of host memory: what the kernel must equal bit for bit.

addresses: int64 `[n]`, in units of 16 bytes.
"""

from __future__ import annotations

import ctypes

import torch


def gather(addresses: torch.Tensor, nbytes: int) -> torch.Tensor:
    """What stands at these places, so many bytes at each: int32 `[n, nbytes / 4]`."""
    parts = [bytearray(ctypes.string_at(address << 4, nbytes)) for address in addresses.tolist()]
    return torch.stack([torch.frombuffer(part, dtype=torch.int32) for part in parts])


def scatter(addresses: torch.Tensor, values: torch.Tensor) -> None:
    """Write values `[n, ...]`, contiguous, each to its place."""
    size = values[0].nbytes
    for number, address in enumerate(addresses.tolist()):
        ctypes.memmove(address << 4, values.data_ptr() + number * size, size)
