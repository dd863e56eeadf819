"""Budgets that depend on each other: layers choose their tokens when all of them have seen a chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fivefold.store.layer_cache import LayerCache
from fivefold.store.pages import Budget


def choose(stores: Mapping[int, LayerCache], first: int, batch: int, budget: Budget) -> None:
    """Share the budgets of all layers out, and choose; nothing where each layer's is its own. first: a layer."""
    policy: Any = stores[first].policy
    if policy is None or not policy.together:
        return
    statistics = torch.zeros(len(stores), batch)
    for row, store in enumerate(stores.values()):
        for held in store.held:
            sequences = held.sequences.cpu()
            counts = sequences.bincount(minlength=batch)
            statistics[row].index_add_(0, sequences, policy.statistic(held).cpu() / counts[sequences])
    for row, store in enumerate(stores.values()):
        store.after_layers(dict(enumerate(policy.shares(statistics)[row].tolist())))
        budget.trim()  # it has held the whole chunk
