"""Chunks that layers have attended over are stored for several layers at once: the tables are worked on once for all.

They wait until all layers have seen the forward's tokens, or until they are many: what waits is memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fivefold.store.bank import Bank
from fivefold.store.chunk import Part, take_each
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache

MOST = 1 << 25
"""Numbers of keys and values that wait at most, but for those that later layers share."""


class Arrival(NamedTuple):
    """Tokens of some rows of a layer: keys and values `[rows, tokens, head_dim]`. observed: see `LayerCache.append`."""

    store: LayerCache
    group: RowGroup
    keys: torch.Tensor
    values: torch.Tensor
    observed: torch.Tensor | None


class Arrivals:
    """What has come in a forward and is not stored yet. shared: whether later layers read what a layer is given, and
    see it as that layer did: it is stored when all are done."""

    def __init__(self, shared: bool = False) -> None:
        self.shared = shared
        self.clear()

    def clear(self) -> None:
        self._waiting: list[Arrival] = []
        self._numbers = 0

    def take(self, one: Arrival, revocable: int) -> None:
        """Store a chunk, now or later. The newest `revocable` tokens may be taken back."""
        self._waiting.append(one)
        self._numbers += 2 * one.keys.numel()
        alone = one.group.held is not None or one.store.bank.paired
        if not self.shared and (alone or self._numbers >= MOST):
            self.store(revocable)

    def store(self, revocable: int) -> None:
        """Store all that waits."""
        waiting, plain = self._waiting, dict[Bank, list[Part]]()
        self.clear()
        for store, group, keys, values, observed in waiting:
            if group.flat[0] != store.base + group.rows[0]:  # layers have got common tables
                group = RowGroup(store, group.rows, group.bounds, group.number)
            if group.held is not None or store.bank.paired:
                store.append(group, keys, values, revocable=revocable, observed=observed)
            else:
                plain.setdefault(store.bank, []).append(Part(group, keys, values))
        for bank, parts in plain.items():
            with bank.atomic():
                take_each(bank, parts, revocable)
        for store, group, *_ in waiting:
            store.know(group)
