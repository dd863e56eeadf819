"""Scores of rotated keys in plain PyTorch: what the kernel is held against.

Keys of `together` rows (heads) at a time are n = block * head_dim channels, before RoPE and in its paired order, times
a Hadamard matrix of order n; then sorted, cut into rows again, and quantised per token in groups of channels.
"""

from __future__ import annotations

import torch

from fivefold.kernels.hadamard import transform_columns
from fivefold.kernels.planar import shifts


def rotated_columns(
    words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, places: torch.Tensor, n: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys before RoPE, a channel's tokens in the last axes.

    words: int16 `[teams, channels, pages, 32]`, the rows that are together in one; scale, zero: float32 `[teams *
    groups, planes, pages, 32]`; places: int64 `[teams * channels]`, where in the sorted order every channel is.
    Returns float32 `[teams, channels, planes, pages, 32]`, and memory of that shape that is not needed any more.
    """
    codes = (words.flatten(2)[:, :, None] >> shifts(bits, words.device)[:, None]).bitwise_and_(2**bits - 1)
    scale, zero = (x.flatten(2)[:, None] for x in (scale, zero))
    x = codes.float().view(len(scale), -1, *scale.shape[2:])
    x = torch.addcmul(zero, scale, x, out=x).view(words.shape[0] * words.shape[1], -1)
    # Back to where the channels stand, and then the rotation undone.
    shape = (-1, n, x.shape[1])
    both = transform_columns(x.index_select(0, places).view(shape), True, x.view(shape))
    columns, spare = (part.view(*words.shape[:2], -1, *words.shape[2:]) for part in both)
    return columns, spare
