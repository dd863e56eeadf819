"""How much is measured at once, and what makes one batch of many texts and questions.

Texts of equal length are read as one batch, and what is asked of them is asked of forks of it, whose rows are those of
the batch in any order and as often as wanted: pages are shared, so a fork costs its page tables. Only sequences of
equal length are fed together, so that there is no padding, and every sequence computes what it computes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from fivefold.errors import InputError
from fivefold.models.graph import Step

_SHARE = 0.6
"""Of the free memory, what a batch is planned for."""
_MOST_TEXTS, _MOST_ROWS = 64, 256
_ROWS = 8
"""Sequences that are asked at once for each text, where the number of texts was given."""


@dataclass(frozen=True)
class Room:
    """What is done at once. texts: that are read together; rows: sequences (questions, choices) that are fed together.
    One of each is one by one."""

    texts: int = 1
    rows: int = 1

    @classmethod
    def of(cls, model: Any, context: int, batch: int | None, continuation: int) -> Room:
        """`batch` texts together; None: one by one on a CPU, where it is no slower, else what the free memory of the
        GPU is good for. context: tokens of a text. Raises `InputError`."""
        if batch is not None:
            if batch < 1:
                raise InputError(f"a batch of {batch} texts is none: use at least 1.")
            return cls(batch, 1 if batch == 1 else _ROWS * batch)
        if model.device.type != "cuda":
            return cls()
        config, size = model.config.get_text_config(), model.dtype.itemsize
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        held = 2 * config.num_hidden_layers * heads * dim * (context + continuation) * size
        hidden = context * (8 * config.hidden_size + 3 * getattr(config, "intermediate_size", 0)) * size
        said = continuation * config.vocab_size * 4
        free, _ = torch.cuda.mem_get_info(model.device)
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        # The exact cache's forks are copies, and it copies itself as it grows.
        texts = int(_SHARE * free / (4 * held + hidden + 3 * said))
        rows = int(_SHARE * free / (3 * held + said))
        return cls(max(1, min(_MOST_TEXTS, texts)), max(1, min(_MOST_ROWS, rows)))

    @property
    def halved(self) -> Room | None:
        """Half of it; None if it is one by one."""
        return None if self == Room() else Room(max(1, self.texts // 2), max(1, self.rows // 2))


def twin(cache: Any) -> Any:
    """The same tokens in a cache of its own: shared pages where the cache is ours; of the exact cache its tensors,
    which it never writes into; else a copy."""
    if hasattr(cache, "fork"):
        return cache.fork()
    layers = getattr(cache, "layers", None)
    if layers is None or any(type(layer) is not DynamicLayer for layer in layers):
        return copy.deepcopy(cache)
    shared = copy.copy(cache)
    shared.layers = [copy.copy(layer) for layer in layers]
    return shared


def rows_of(cache: Any, rows: Sequence[int], batch: int = 1) -> Any:
    """A cache of its own with sequences `rows` of the `batch` that `cache` holds."""
    fork = twin(cache)
    if list(rows) != list(range(batch)):
        fork.batch_select_indices(torch.tensor(rows))
    return fork


def grouped(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of equal lengths together, at most `most` of them, in order."""
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    return [of[start : start + most] for of in places.values() for start in range(0, len(of), most)]


def eager(cache: Any) -> Any:
    """The cache, its steps no graph: a model's hooks are then called, and few steps are not worth a capture."""
    if getattr(cache, "step", None) is not None:
        cache.step = None
    return cache


def graphs_if_possible(cache: Any) -> None:
    """No graphs, and no warning, where steps of this cache depend on the host."""
    if getattr(cache, "step", None) is not None and Step.why_not(cache.session) is not None:
        cache.step = None


def steps_at_once(cache: Any) -> bool:
    """Whether a step of sequences of different lengths is no more work than one of equal lengths: a kernel takes all
    rows at once."""
    return all(why is None for why in cache.session.why_not_fused().values())
