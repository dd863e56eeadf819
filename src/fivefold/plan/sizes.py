"""What `fivefold plan --measure` measures, on a GPU and (to try it) on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

BITS = (2, 3, 4, 8)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
DIMS, EXTENTS = (64, 128), ("small", "large")


@dataclass(frozen=True)
class Sizes:
    """What is measured. attention: tokens and sequences of caches, the smallest first. mlps: a small and a large one,
    `[wide, hidden]`. prompt: of small and of large ones; past: of
    chunks and of what is stored before them, small and large. matrix: of a small and a large product, `[out, in]`.
    steps: shape of a Llama whose steps are timed, contexts, and how many; read: tokens and chunks of its prompts;
    narrow: shape of one for what the host takes, and the tokens of its chunks. copied: bytes."""

    attention: tuple[tuple[int, int], ...]
    mlps: tuple[tuple[int, int], tuple[int, int]]
    prompt: tuple[tuple[int, ...], tuple[int, ...]]
    past: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]
    unpacked: int
    products: tuple[int, int, int]
    matrix: tuple[tuple[int, int], tuple[int, int]]
    rows: tuple[int, ...]
    weights: int
    step: Mapping[str, Any]
    layers: tuple[int, int]
    batches: tuple[int, ...]
    context: int
    steps: int
    read: tuple[tuple[int, int | None], ...]
    narrow: Mapping[str, Any]
    narrow_chunk: int
    copied: int
    switched: tuple[int, int]


_WIDE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "rope_theta": 500000.0,
}  # fmt: skip
_NARROW = {
    "vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 1024, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
GPU = Sizes(
    ((4096, 1), (32768, 1), (131072, 1), (524288, 1), (32768, 64)), ((8192, 2048), (14336, 4096)),
    ((4096, 8192), (32768, 131072)), (((2048, 8192), (2048, 30720)), ((8192, 16384), (8192, 32768))), 131072,
    (8192, 4096, 14336), ((2048, 2048), (14336, 4096)), ROWS, 1 << 31, _WIDE, (4, 12), (1, 8, 32, 256), 1024, 24,
    ((8192, None), (32768, 8192)), _NARROW, 1024, 1 << 30, (32768, 131072),
)  # fmt: skip
CPU = Sizes(
    ((512, 1), (2048, 1)), ((256, 128), (512, 256)), ((128,), (512,)), (((64, 256),), ((64, 512),)), 512,
    (64, 256, 512), ((64, 64), (512, 256)), (1, 16), 1 << 22, _NARROW, (1, 2), (1, 2, 4), 256, 4,
    ((256, None), (256, 64)), _NARROW, 128, 1 << 20, (256, 1024),
)  # fmt: skip


def sizes_for(device: torch.device) -> Sizes:
    """What is measured on a device."""
    return GPU if device.type == "cuda" else CPU
