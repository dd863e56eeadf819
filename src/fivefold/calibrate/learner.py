"""What a method learns from: tensors captured from a model that reads text, one layer of one chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from fivefold.store.spec import LayerSpec

Capture = Literal[
    "keys", "queries", "values", "inputs", "attention", "attending_queries", "attending_keys", "residual", "added"
]
"""keys, queries: before RoPE and behind any norm that the model applies to them, float32
`[batch, kv_head or query_head, tokens, head_dim]`. values: the shape of keys. inputs: what the attention module is
given, float32 `[batch, tokens, hidden]`. attention: the weights of the chunk's `OBSERVED` newest queries, float32
`[batch, query_head, OBSERVED, tokens]`. attending_queries, attending_keys: as they meet, after RoPE, the queries times
the scaling, in the shapes of queries and keys: a score is their inner product. residual: the residual stream that
enters the layer, before any norm, and added: what the layer's attention adds to it, behind any norm or factor, float32
`[batch, tokens, hidden]`."""
CAPTURES: tuple[Capture, ...] = get_args(Capture)
OBSERVED = 32

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done)."""


@dataclass(frozen=True)
class Subject:
    """What is learned from. model, tokenizer: of transformers. specs: the layers that are compressed. texts: what is
    read, `tokens` tokens of it, drawn by `seed`."""

    model: Any
    tokenizer: Any
    specs: Sequence[LayerSpec]
    texts: Sequence[str]
    tokens: int
    seed: int


class Work:
    """Steps that make a profile: reading, training or measuring. A run can be broken off between two of them.

    Whatever it has to remember is in `sums`, tensors by name on the CPU: they are saved while a run is under way, and
    given back when it is resumed. A step may depend on them, on its number and on the subject alone, so that a resumed
    run makes the same bytes as one that was never broken off.
    """

    total: int
    """How many steps there are."""
    tokens: int
    """How many tokens of text it learns from."""
    what: str = "Reading"
    """What it does, for people who watch."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def step(self, number: int) -> None:
        """Do one of the steps, which are counted from 0."""
        raise NotImplementedError

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The profile's settings (plain JSON values) and tensors."""
        raise NotImplementedError

    def close(self) -> None:
        """Leave the model as it was; called whatever happens."""


def second_moments(x: torch.Tensor) -> torch.Tensor:
    """Of keys or values of all heads side by side, float64 `[n, n]`: x `[batch, head, tokens, head_dim]`."""
    flat = x.transpose(1, 2).flatten(2).flatten(0, 1).double()
    return flat.T @ flat


class Learner:
    """Takes in what a model shows and makes the settings and tensors of a profile of it.

    Whatever it has to remember is in `sums`, tensors by name on the CPU, of a size that does not grow with the text:
    they are saved while a run is under way, and given back when it is resumed. The same tensors in the same order must
    give the same sums, bit by bit.
    """

    passes: int = 1
    """How often the text is read."""
    length: int | None = None
    """Tokens of a piece of text, where it wants longer or shorter ones than others do; the model's positions, if these
    are fewer."""
    number: int = 0
    """The pass that is under way, counted from 0; set by whoever runs it."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor) -> None:
        """Add to a running sum; the first value is its beginning and its dtype."""
        value = value.detach().cpu()
        self.sums[name] = self.sums[name] + value.to(self.sums[name].dtype) if name in self.sums else value.clone()

    def pieces(self, subject: Subject) -> list[torch.Tensor] | None:
        """Token ids to read, int64 `[1, tokens]` each, where it wants other ones than those of the text."""
        return None

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        """One layer of a chunk: what the method's `captures` names."""
        raise NotImplementedError

    def next_pass(self) -> None:
        """After every pass but the last; what it works out belongs into `sums`."""

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """The profile's settings (plain JSON values) and tensors."""
        raise NotImplementedError
