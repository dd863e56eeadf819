"""Exact pages into dense keys and values, in plain PyTorch: what the kernel must equal bit for bit."""

from __future__ import annotations

import ctypes

import torch

PAGE = 32
"""Tokens of an exact page."""


def gather_pages(
    table: torch.Tensor, tokens: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[rows, tokens, head_dim]` of the first tokens of pages in host memory.

    table: int64 `[rows, columns, 2]`, the addresses of a page's keys and of its values, `[32, head_dim]` each, in units
    of 16 bytes; dtype: of the pages.
    """
    nbytes = PAGE * head_dim * dtype.itemsize
    sides = []
    for side in table.unbind(2):
        pages = [
            torch.frombuffer(bytearray(ctypes.string_at(address << 4, nbytes)), dtype=dtype)
            for address in side.reshape(-1).tolist()
        ]
        whole = torch.stack(pages).view(len(table), -1, head_dim)
        sides.append(whole[:, :tokens].contiguous())
    return sides[0], sides[1]
