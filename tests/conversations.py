"""Conversations for tests: text in chunks, given to a model and a cache one after another."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from conftest import VOCAB


def text(tokens: int, batch: int = 1, seed: int = 7) -> torch.Tensor:
    """Random ids `[batch, tokens]`, none of them the padding's 0."""
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Conversation:
    """Chunks of a text.

    ids: int64 `[batch, tokens]`. sizes: of the chunks. mask: int64 `[batch, tokens]`, 0 at padding; None if there is
    none.
    """

    ids: torch.Tensor
    sizes: tuple[int, ...]
    mask: torch.Tensor | None = None

    @classmethod
    def of(cls, *sizes: int, lengths: Sequence[int] | None = None, seed: int = 7) -> Conversation:
        """Chunks of these sizes of one sequence; or of several, the first chunk padded on the left to `lengths`."""
        ids = text(sum(sizes), len(lengths or [0]), seed)
        if lengths is None:
            return cls(ids, sizes)
        mask = (torch.arange(sum(sizes)) >= sizes[0] - torch.tensor(lengths)[:, None]).long()
        return cls(ids * mask, sizes, mask)

    def __len__(self) -> int:
        return len(self.sizes)

    def then(self, after: int, *sizes: int) -> Conversation:
        """The chunks up to and with number `after`, then chunks of these sizes of the same text."""
        return replace(self, sizes=(*self.sizes[: after + 1], *sizes))

    @torch.inference_mode()
    def give(
        self, number: int, model: Any, cache: Any, within: AbstractContextManager[Any] | None = None
    ) -> torch.Tensor:
        """Give a chunk to the model: the logits of its tokens `[tokens, vocab]`, those of padding left out. within: a
        context that the model is called in, and nothing else."""
        start, stop = sum(self.sizes[:number]), sum(self.sizes[: number + 1])
        settings, ids = {}, self.ids[:, start:stop]
        if self.mask is not None:
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
            settings = {"attention_mask": self.mask[:, :stop], "position_ids": positions}
        with within or nullcontext():
            logits = model(ids, past_key_values=cache, **settings).logits
        return logits.flatten(0, 1) if self.mask is None else logits[self.mask[:, start:stop].bool()]

    def alone(self, row: int) -> Conversation:
        """One sequence without its padding; a chunk that is nothing else has size 0."""
        if self.mask is None:
            return replace(self, ids=self.ids[row : row + 1])
        real = self.mask[row].bool()
        sizes = tuple(int(part.sum()) for part in real.split(self.sizes))
        return Conversation(self.ids[row : row + 1, real], sizes)

    def rows(self, number: int, logits: torch.Tensor) -> list[torch.Tensor]:
        """What `give` returned for a chunk, sequence by sequence."""
        start, stop = sum(self.sizes[:number]), sum(self.sizes[: number + 1])
        if self.mask is None:
            return list(logits.chunk(len(self.ids)))
        return list(logits.split(self.mask[:, start:stop].sum(1).tolist()))
