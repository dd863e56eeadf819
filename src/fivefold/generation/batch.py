"""The sequences that are decoded together, in one cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from fivefold.errors import CacheFullError
from fivefold.generation.request import Request, Result
from fivefold.generation.sampling import Picker, pick
from fivefold.models.cache import FivefoldCache

FULL = (CacheFullError, torch.OutOfMemoryError)
"""What is raised where there is no room; a forward may then be tried again."""


class Handle:
    """A request that was submitted. result: what came of it; None until then."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.result: Result | None = None


@dataclass(frozen=True)
class Event:
    """Something happened to a request: it has one more `token`, or it has ended with a `result`."""

    handle: Handle
    token: int | None = None
    result: Result | None = None


class Running:
    """A sequence that is being read, decoded, or set aside.

    number: its age, in the order in which requests were submitted. prompt: what is to be read: of a conversation also
    what it has not read before. cache: its own, while it is not in the batch. before: of a conversation the cache as it
    was before this turn, and what that had not read. read: tokens of the prompt that the cache holds. ends: token ids
    that end it.
    """

    def __init__(self, handle: Handle, number: int, ends: frozenset[int]) -> None:
        self.handle, self.request, self.number, self.ends = handle, handle.request, number, ends
        self.prompt: tuple[int, ...] = tuple(handle.request.prompt)
        self.cache: FivefoldCache | None = None
        self.before: tuple[FivefoldCache, tuple[int, ...]] | None = None
        self.read = self.shared = self.preemptions = 0
        self.stuck: tuple[int, int] | None = None
        """How far it had come when there was no room for more."""
        self.digests: list[bytes] = []
        """Hashes of the prompt's blocks, where there is a prefix store."""
        self.tokens: list[int] = []
        self.picker = Picker.of(self.request)
        self.submitted = time.perf_counter()
        self.started: float | None = None
        self.first_token: float | None = None
        self.first_step: int | None = None

    @property
    def is_read(self) -> bool:
        return self.read == len(self.prompt)

    @property
    def length(self) -> int:
        """Tokens of the prompt and those that were generated."""
        return len(self.prompt) + len(self.tokens)


class Batch:
    """Sequences in the order in which the cache holds them."""

    def __init__(self, model: PreTrainedModel, cache: FivefoldCache, most: int) -> None:
        self.model, self.cache, self.most = model, cache, most
        self.sequences: list[Running] = []

    def join(self, sequence: Running) -> None:
        """A sequence whose prompt has been read comes in. Raises `CacheFullError`, changing nothing."""
        assert sequence.cache is not None
        self.cache.join(sequence.cache)
        sequence.cache = None
        self.sequences.append(sequence)

    def take(self, sequence: Running) -> None:
        """A sequence leaves with a cache of its own."""
        index = self.sequences.index(sequence)
        sequence.cache = self.cache.take([index])
        sequence.cache.step = None  # what is alone for a while is not worth a graph
        del self.sequences[index]

    def drop(self, gone: Sequence[Running]) -> None:
        """Those of these sequences that are still here leave, and their pages are free."""
        gone = [sequence for sequence in gone if sequence in self.sequences]
        if gone:
            self.cache.drop([self.sequences.index(sequence) for sequence in gone])
            self.sequences = [sequence for sequence in self.sequences if sequence not in gone]

    def step(self) -> list[int]:
        """One decoding step: the next token of each sequence, -1 where its logits are not finite. Whatever it raises,
        nothing has changed."""
        logits = forward(self.model, self.cache, [[sequence.tokens[-1]] for sequence in self.sequences])
        return pick(logits, [sequence.picker for sequence in self.sequences])


def forward(model: Any, cache: FivefoldCache, ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """Give a cache the next tokens of its sequences, equally many of each: the newest one's logits `[sequences,
    vocabulary]`. Masks and positions follow from the cache."""
    given = torch.tensor(ids, dtype=torch.int64, device=model.device)
    return model(given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def too_small(sequence: Running, root: FivefoldCache, error: BaseException) -> str:
    """What to say of a sequence that does not fit alone."""
    held = f"this request, of {sequence.length:,} tokens so far"
    if isinstance(error, CacheFullError):
        return (
            f"the cap of {root.session.pools.budget.limit:,} bytes is too small for {held}, even alone: raise "
            "max_bytes, or use a recipe that keeps less."
        )
    return f"the device lacks the memory for {held}, even alone: use a recipe that keeps less, or a smaller chunk."
