"""Tokens into planar KIVI pages, and out of them. `triton.py` needs Triton and is imported only where it is used."""

import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.pack.reference import fill_rows, pack_keys, pack_reference, pack_values
from fivefold.kernels.packed_decode.reference import Form, decode_page

__all__ = ["fill_rows", "pack_keys", "pack_pages", "pack_reference", "pack_values", "unpack_pages"]


def pack_pages(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """`pack_reference`, by the kernel where that runs; the bytes are the same."""
    if _has_kernel(form, keys.device):
        from fivefold.kernels.pack import triton as kernel

        return kernel.pack_pages(form, keys, values, slot, opened)
    return pack_reference(form, keys, values, slot, opened)


def unpack_pages(form: Form, fields: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode_page` in float32, by the kernel where that runs."""
    if _has_kernel(form, fields[0].device):
        from fivefold.kernels.pack import triton as kernel

        return kernel.unpack_pages(form, fields)
    return decode_page(form, fields)


def _has_kernel(form: Form, device: torch.device) -> bool:
    return form.head_dim in (64, 128, 256) and choose(device).path != "reference"
