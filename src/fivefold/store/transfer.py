"""Pages whose cache becomes part of another one: their slabs change the pool, and nothing is copied."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import numpy as np

from fivefold.errors import CacheStateError
from fivefold.store.bank import Bank
from fivefold.store.pages import SLAB_SHIFT, PagePool
from fivefold.store.spec import Pools
from fivefold.store.tier import Tier
from fivefold.store.transaction import Transaction

Moved = dict[PagePool, tuple[PagePool, np.ndarray]]
"""Of a pool: the pool that has its slabs now, and the number of each there, int64 `[slabs]`."""


def absorb(change: Transaction, mine: Pools, other: Pools, owner: object) -> Moved:
    """All slabs of `other` become slabs of `mine`. Raises `CacheFullError`, and `CacheStateError` where somebody else
    than `owner` has pages of `other`."""
    out: Moved = {}
    with ExitStack() as locks:
        for budget in sorted({mine.budget, other.budget}, key=id):
            locks.enter_context(budget.lock)
        if any(user is not owner and user.batch for user in other.users):
            raise CacheStateError(
                "a cache whose pages are shared with forks of it cannot join another one: free() the forks, or make "
                "both caches from one with new()."
            )
        other.budget.trim()
        mine.budget.make_room(other.budget.used)
        for (layout, device), pool in other.items():
            target = mine.of(layout, device)
            out[pool] = target, target.take_over(pool)
            change.undo(partial(target.hand_back, *(pool, out[pool][1])))
    return out


def renumber(bank: Bank, moved: Moved) -> None:
    """The page tables of a bank, after the slabs of its pools have moved."""

    def renamed(tier: Tier) -> Tier:
        out = Tier([moved[pool][0] for pool in tier.pools], 0)
        for number, (pool, table) in enumerate(zip(tier.pools, tier.tables)):
            slabs = moved[pool][1]
            known = np.append(slabs, 0)[np.clip(table >> SLAB_SHIFT, -1, len(slabs) - 1)]
            out.tables[number] = (known << SLAB_SHIFT) + (table & ((1 << SLAB_SHIFT) - 1))
        out.shared = tier.shared
        return out

    bank.exact = renamed(bank.exact)
    bank.packed = None if bank.packed is None else renamed(bank.packed)
