"""Rows of tensors that come from several places, or go there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch


def steps(at: np.ndarray) -> slice | np.ndarray:
    """Places as a slice where they go up by one step."""
    first, last = int(at[0]), int(at[-1])
    step = int(at[1]) - first if len(at) > 1 else 1
    even = step >= 1 and last - first == step * (len(at) - 1) and (np.diff(at) == step).all()
    return slice(first, last + 1, step) if even else at


def joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Pieces that come one after the other."""
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def rows_from(parts: Iterable[tuple[Any, torch.Tensor]], count: int) -> torch.Tensor:
    """`count` rows from parts of them, each with where its rows belong; None is all."""
    found = list(parts)
    if len(found) == 1:
        return found[0][1]
    if all(isinstance(where, slice) for where, _ in found):
        return torch.cat([part for _, part in sorted(found, key=lambda one: one[0].start)])
    out = found[0][1].new_empty((count, *found[0][1].shape[1:]))
    for where, part in found:
        put_at(out, where, part)
    return out


def put_at(target: torch.Tensor, rows: torch.Tensor | slice, values: torch.Tensor) -> None:
    """`index_copy_` along the first axis, which PyTorch lacks for numbers of eight bits with a floating point."""
    if isinstance(rows, slice):
        target[rows] = values
        return
    if target.dtype.itemsize == 1:
        target, values = target.view(torch.uint8), values.view(torch.uint8)
    target.index_copy_(0, rows, values)


class Copies:
    """Tensors of all layers that are copied in one call."""

    def __init__(self) -> None:
        self._sides: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}

    def add(self, target: torch.Tensor, source: torch.Tensor) -> None:
        for side, x in zip(self._sides.setdefault(target.dtype, ([], [])), (target, source)):
            side.append(x)

    def of(self, source: torch.Tensor) -> torch.Tensor:
        """What will be a copy."""
        out = torch.empty_like(source, memory_format=torch.contiguous_format)
        self.add(out, source)
        return out

    def now(self) -> None:
        for sides in self._sides.values():
            torch._foreach_copy_(*sides)
