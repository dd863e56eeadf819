"""Tokens into planar KIVI pages. `triton.py` needs Triton and is imported only where it is used."""

import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.pack import cpu
from fivefold.kernels.pack.reference import fill_rows, pack_keys, pack_reference, pack_values
from fivefold.kernels.packed_decode.reference import Form

__all__ = ["fill_rows", "pack_keys", "pack_pages", "pack_reference", "pack_values"]


def pack_pages(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """`pack_reference`, by the kernel where that runs; the bytes are the same."""
    choice = choose(keys.device)
    if choice.path == "cpp" and cpu.supports(form, keys.dtype) and values.dtype == keys.dtype:
        return cpu.pack_pages(form, keys, values, slot, opened)
    if form.head_dim in (64, 128, 256) and choice.triton:
        from fivefold.kernels.pack import triton as kernel

        return kernel.pack_pages(form, keys, values, slot, opened)
    return pack_reference(form, keys, values, slot, opened)
