"""Tokens that a layer has picked for the layers after it to read, in one forward."""

from __future__ import annotations

import numpy as np
import torch

from fivefold.store.group import RowGroup


class Picks:
    """At most `top` tokens of each row, by position."""

    def __init__(self, top: int) -> None:
        self.top = top
        self._picks: torch.Tensor | None = None
        self._picked = np.zeros(0, dtype=bool)

    def put(self, group: RowGroup, positions: torch.Tensor) -> None:
        """A layer has picked these, `[rows, n]`."""
        rows, wide = group.layer.rows, torch.nn.functional.pad(positions, (0, self.top - positions.shape[1]), value=-1)
        if self._picks is None or len(group.rows) == rows:
            self._picks = wide if len(group.rows) == rows else wide.new_full((rows, self.top), -1)
            self._picked = np.zeros(rows, dtype=bool)
        self._picked[group.rows] = True
        if len(group.rows) < rows:
            self._picks = self._picks.index_copy(0, group.rows_tensor.to(wide.device), wide)

    def of(self, group: RowGroup) -> torch.Tensor | None:
        """What was picked for the rows of a group, `[rows, top]`, -1 for none; None if nothing was for one of them, or
        if all that there is would be read anyway."""
        if self._picks is None or self.top >= group.bounds.length or not self._picked[group.rows].all():
            return None
        picks = self._picks.to(group.layer.spec.device)
        return picks if len(group.rows) == group.layer.rows else picks[group.rows_tensor.to(picks.device)]
