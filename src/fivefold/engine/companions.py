"""Layers of a model that a cache does not compress."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch


class Companions(Protocol):
    """Layers of the model that this cache does not compress, and keeps in step with those that it does."""

    @property
    def nbytes(self) -> int: ...

    def snapshot(self) -> Callable[[], None]:
        """What brings them back as they are now."""

    def crop(self, tokens: int, length: int) -> None:
        """Forget the last `tokens` of `length` tokens, or raise before any has."""

    def record(self, on: bool) -> None:
        """Whether they keep what a `crop` may have to show again. Where they do not, that goes."""

    def select(self, sequences: np.ndarray) -> None:
        """Sequence i becomes what sequence `sequences[i]` was."""

    def reset(self) -> None: ...

    def fork(self) -> Any: ...

    def new(self) -> Any:
        """Empty ones of the same kind."""

    def join(self, other: Any, batch: int, length: int) -> None:
        """Those of `other` come behind the `batch` sequences here; all have the logical length `length` then."""

    def take(self, indices: np.ndarray, rest: np.ndarray, length: int, left: int) -> Any:
        """Sequences `indices` leave, with the logical length `length`; `rest` stay, with `left`."""

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """All that they hold: plain values, and tensors."""

    def install(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        """Hold that."""
