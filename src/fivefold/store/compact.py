"""Memory comes back: pages move out of slabs that are mostly free, which can then be given up."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import numpy as np

from fivefold.store.bank import Bank
from fivefold.store.pages import SLAB_SHIFT, PagePool
from fivefold.store.tier import EMPTY, Tier

# Less than this part (one over it) of a pool that is free is not worth moving pages for.
_WORTH = 8


def due(pools: Iterable[PagePool]) -> list[PagePool]:
    """The pools of which much is free, but not in whole slabs."""
    return [pool for pool in pools if pool.free_pages * _WORTH > pool.total_pages]


def compact(bank: Bank, pool: PagePool) -> None:
    """Move a bank's pages of a pool out of sparse slabs, as a whole or not at all. Those that somebody else holds too
    stay where they are."""
    for tier, columns in bank.columns():
        for number, one in enumerate(tier.pools):
            if one is pool:
                _move(bank, tier, number, columns)


def _move(bank: Bank, tier: Tier, number: int, columns: np.ndarray) -> None:
    pool, table = tier.pools[number], tier.tables[number]
    sparse = pool.sparse()
    if not sparse:
        return
    rows, places = np.nonzero(np.arange(table.shape[1]) < columns[:, None])
    pages, place, counts = np.unique(table[rows, places], return_inverse=True, return_counts=True)
    moved = np.flatnonzero(np.isin(pages >> SLAB_SHIFT, sparse) & (pool.references(pages) == counts))
    if not len(moved):
        return
    with bank.atomic() as change:
        new = change.adopt(pool, pool.allocate_elsewhere(len(moved), sparse))
        moved = moved[: len(new)]
        pool.copy(pages[moved], new)
        # Two layers may have a page in common.
        more = np.repeat(new, counts[moved] - 1)
        pool.retain(more)
        change.undo(partial(pool.release, more))
        target = np.full(len(pages), EMPTY, dtype=np.int64)
        target[moved] = new
        where = np.flatnonzero(target[place] != EMPTY)
        tier.move(change, rows[where], places[where], target[place[where]], number)
    bank.touch(rows[where])
