"""Tokens that a layer has picked for the layers after it to read, in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fivefold.kernels.device import sent
from fivefold.methods import ReadPolicy
from fivefold.store.group import RowGroup
from fivefold.store.spec import LayerSpec


@dataclass(frozen=True)
class Reads:
    """What decoding steps read, by layer (see `ReadPolicy`): roles, how many tokens are picked, of which the first
    `sink` and the last `recent` always are, and of sparse layers the layer that picks for them and those of its KV
    heads from which each head may take over, the best first, int64 `[kv_head, rank]`."""

    roles: Mapping[int, str] = field(default_factory=dict)
    top: int = 0
    sink: int = 0
    recent: int = 0
    nearest: Mapping[int, tuple[int, np.ndarray]] = field(default_factory=dict)

    @classmethod
    def of(cls, method: object, specs: Sequence[LayerSpec]) -> Reads:
        """Of a recipe's method, for the layers that hold the whole context; the default if it is no `ReadPolicy`."""
        if not isinstance(method, ReadPolicy):
            return cls()
        layers, roles, nearest = [spec.layer for spec in specs], method.roles(specs), {}
        for i, heads in method.nearest(specs).items():
            picking = max(j for j in range(i) if roles[j] == "select")
            nearest[layers[i]] = layers[picking], np.array(heads)
        return cls(dict(zip(layers, roles)), method.top, method.sink, method.recent, nearest)


class Picks:
    """At most `top` tokens of each row, by position."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self._picks: torch.Tensor | None = None
        self._picked = np.zeros(0, dtype=bool)
        self._layer = -1
        self._found: dict[bytes, torch.Tensor] = {}
        """What has been asked for since the layer picked."""

    def put(self, group: RowGroup, positions: torch.Tensor) -> None:
        """A layer has picked these, `[rows, n]`."""
        rows, layer = group.layer.rows, group.layer.spec.layer
        whole = len(group.rows) == rows
        wide = torch.nn.functional.pad(positions, (0, self.reads.top - positions.shape[1]), value=-1)
        stale = bool(self.reads.nearest) and self._layer != layer  # which heads are alike is known of one layer alone
        if self._picks is None or whole or stale:
            self._picks = wide if whole else wide.new_full((rows, self.reads.top), -1)
            self._picked, self._layer = np.zeros(rows, dtype=bool), layer
        self._picked[group.rows] = True
        self._found.clear()
        if not whole:
            self._picks = self._picks.index_copy(0, group.rows_on(self._picks.device), wide.to(self._picks.device))

    def of(self, group: RowGroup) -> torch.Tensor | None:
        """What was picked for the rows of a group, `[rows, top]`, -1 for none; None if nothing was for one of them, or
        if all that there is would be read anyway."""
        if self._picks is None or self.reads.top >= group.bounds.length:
            return None
        spec, rows = group.layer.spec, group.rows
        if spec.layer in self.reads.nearest:
            picking, nearest = self.reads.nearest[spec.layer]
            if picking != self._layer:
                return None
            sequences, heads = np.divmod(rows, spec.kv_heads)
            among = sequences[:, None] * spec.kv_heads + nearest[heads]
            # The first of them that has picked: one with a window has not.
            rows = among[np.arange(len(among)), self._picked[among].argmax(1)]
        if not self._picked[rows].all():
            return None
        key = rows.tobytes()
        if key not in self._found or self._found[key].device != spec.device:
            picks = self._picks.to(spec.device)
            self._found[key] = picks[sent(picks.device, rows)[0]]
        return self._found[key]
