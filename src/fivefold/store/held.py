"""What is known about the tokens that rows hold, where a policy chooses them one by one.

A row's tokens stand in *slots*: the packed tier's first, then the exact tier's. All rows of a
`Held` fill as many, with tokens of their own, in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Held:
    """What a token policy knows about rows that it chooses for together.

    layer: which layer of the model this is. places: int64 `[rows]`, sequence * kv_heads + kv_head of each row.
    positions: int32 `[rows, slots]`, where in the text the token of a slot stands. scores: float32 `[rows, slots]`, the
    policy's statistic. extra: more of it, float32 `[rows]` each. prompt: tokens seen when the last chunk of several had
    come, 0 while none has; seen: all tokens seen. share: how much of an even share of the model's budget this layer
    has. final: nothing before this position can be taken back.

    Nothing here is ever written into: a change makes new tensors, so that forks may share them.
    """

    layer: int
    kv_heads: int
    places: torch.Tensor
    positions: torch.Tensor
    scores: torch.Tensor
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    prompt: int = 0
    seen: int = 0
    share: float = 1.0
    final: int = 0

    @classmethod
    def empty(cls, layer: int, kv_heads: int, places: torch.Tensor, device: torch.device) -> Held:
        """Of rows that hold no token yet; device: where what is known of tokens lies."""
        none = torch.empty((len(places), 0), device=device)
        return cls(layer, kv_heads, places, none.to(torch.int32), none)

    @property
    def sequences(self) -> torch.Tensor:
        """Which sequence of the batch a row belongs to: int64 `[rows]`."""
        return self.places // self.kv_heads

    @property
    def rows(self) -> int:
        return self.positions.shape[0]

    @property
    def slots(self) -> int:
        return self.positions.shape[1]

    @property
    def basis(self) -> int:
        """How many tokens a budget is a share of: `prompt`; of a text that came token by token, all of them."""
        return self.prompt or self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of what is known."""
        # A row's last slot may just have gone: the tensors are then views of one more.
        return sum(
            x.untyped_storage().nbytes() for x in (self.places, self.positions, self.scores, *self.extra.values())
        )

    def rows_at(self, rows: torch.Tensor, places: torch.Tensor) -> Held:
        """The rows with these indices, now at these places."""
        return replace(
            self,
            places=places,
            positions=self.positions[rows],
            scores=self.scores[rows],
            extra={name: value[rows] for name, value in self.extra.items()},
        )

    def arrived(self, tokens: int) -> Held:
        """With the next tokens of the text in slots behind the others; their score is 0."""
        new = torch.arange(self.seen, self.seen + tokens, dtype=torch.int32, device=self.positions.device)
        return replace(
            self,
            positions=torch.cat([self.positions, new.expand(self.rows, -1)], 1),
            scores=torch.cat([self.scores, self.scores.new_zeros(self.rows, tokens)], 1),
            seen=self.seen + tokens,
        )

    def select(self, slots: torch.Tensor) -> Held:
        """With the tokens of these slots only, `[rows, kept]`, in that order."""
        return replace(self, positions=self.positions.gather(1, slots), scores=self.scores.gather(1, slots))

    def without_newest(self, tokens: int) -> Held:
        """Before the last tokens came, none of which has counted for anything."""
        if tokens >= self.seen:
            return Held.empty(self.layer, self.kv_heads, self.places, self.scores.device)
        left = self.slots - tokens
        return replace(
            self, positions=self.positions[:, :left], scores=self.scores[:, :left], seen=self.seen - tokens,
            prompt=min(self.prompt, self.seen - tokens),
        )  # fmt: skip

    def newest(self, tokens: int) -> torch.Tensor:
        """Whether the token of a slot is one of the newest `tokens` of the text: bool `[rows, slots]`."""
        return self.positions >= self.seen - tokens

    def over_heads(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over all rows of the same sequence, for each of them; the shape of `values`, `[rows, ...]`."""
        which, place, counts = self.sequences.unique(return_inverse=True, return_counts=True)
        place, counts = (x.to(values.device) for x in (place, counts))
        sums = values.new_zeros(len(which), *values.shape[1:]).index_add_(0, place, values)
        return (sums / counts.view(-1, *[1] * (values.ndim - 1)))[place]


class Holds:
    """Of a layer: what its policy knows of the tokens of its rows, while a step on a device does not (`Bank.live`)."""

    bank: Any
    known: list[Held]
    """The same, without bringing back what a device has: positions and scores are missing then."""
    learned: dict[str, torch.Tensor]

    @property
    def held(self) -> list[Held]:
        self.bank.settle()
        return self.known

    @held.setter
    def held(self, held: list[Held]) -> None:
        self.known = held

    @property
    def statistics_bytes(self) -> int:
        """Bytes of what a policy knows of the tokens, and a codec of the rows; tables say what a device has."""
        return sum(held.nbytes for held in self.known) + sum(x.nbytes for x in self.learned.values())


Known = tuple[list[Held], dict[str, torch.Tensor]]


def joined(parts: Sequence[tuple[Known, int]]) -> Known:
    """What the policy and the codec know of rows that come one after the other, from what they know of parts of them
    and how many rows each part has."""
    held, learned, first = [], [dict(known[1]) for known, _ in parts], 0
    for (known, _), rows in parts:
        held += [replace(one, places=one.places + first) if first else one for one in known]
        first += rows
    names = {name: x for one in learned for name, x in one.items()}
    for (_, rows), one in zip(parts, learned):
        one.update({name: x.new_zeros((rows, *x.shape[1:])) for name, x in names.items() if name not in one})
    return held, {name: torch.cat([one[name] for one in learned]) for name in names}
