"""What a method learns from: tensors captured from a model that reads text, one layer of one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

Capture = Literal["keys", "queries", "values", "inputs", "attention"]
"""keys, queries: before RoPE and behind any norm that the model applies to them, float32
`[batch, kv_head or query_head, tokens, head_dim]`. values: the shape of keys. inputs: what the attention module is
given, float32 `[batch, tokens, hidden]`. attention: the weights of the chunk's `OBSERVED` newest queries, float32
`[batch, query_head, OBSERVED, tokens]`."""
CAPTURES: tuple[Capture, ...] = ("keys", "queries", "values", "inputs", "attention")
OBSERVED = 32

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


class Learner:
    """Takes in what a model shows and makes the settings and tensors of a profile of it.

    Whatever it has to remember is in `sums`, tensors by name on the CPU, of a size that does not grow with the text:
    they are saved while a run is under way, and given back when it is resumed. The same tensors in the same order must
    give the same sums, bit by bit.
    """

    passes: int = 1
    """How often the text is read."""
    number: int = 0
    """The pass that is under way, counted from 0; set by whoever runs it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add to a running sum; the first value is its beginning and its dtype."""
        value = value.detach().cpu()
        self.sums[name] = self.sums[name] + value.to(self.sums[name].dtype) if name in self.sums else value.clone()

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        """One layer of a chunk: what the method's `captures` names."""
        raise NotImplementedError

    def next_pass(self) -> None:
        """After every pass but the last; what it works out belongs into `sums`."""

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The profile's settings (plain JSON values) and tensors."""
        raise NotImplementedError
