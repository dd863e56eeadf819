"""Memory comes back: pages move out of slabs that are mostly free, which can then be given up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from fivefold.store.bank import Bank
from fivefold.store.pages import SLAB_SHIFT, PagePool
from fivefold.store.tier import EMPTY, Tier

# Less than this part (one over it) of a pool that is free is not worth moving pages for.
_WORTH = 8


def due(pools: Iterable[PagePool]) -> list[PagePool]:
    """The pools of which much is free, but not in whole slabs."""
    return [pool for pool in pools if pool.free_pages * _WORTH > pool.total_pages]


class Named(NamedTuple):
    """The pages of a pool that a table names: at which rows and columns, which of `pages` (all different) stands there,
    and which of these nobody else holds, so that they can move."""

    rows: np.ndarray
    columns: np.ndarray
    place: np.ndarray
    pages: np.ndarray
    counts: np.ndarray
    mine: np.ndarray

    @classmethod
    def by(cls, tier: Tier, number: int, columns: np.ndarray) -> Named:
        pool, table = tier.pools[number], tier.tables[number]
        rows, places = np.nonzero(np.arange(table.shape[1]) < columns[:, None])
        pages, place, counts = np.unique(table[rows, places], return_inverse=True, return_counts=True)
        return cls(rows, places, place, pages, counts, pool.references(pages) == counts)


def compact(banks: Sequence[Bank], pool: PagePool) -> None:
    """Move banks' pages of a pool out of sparse slabs, those of a table as a whole or not at all. Those that somebody
    else holds too stay where they are."""
    for bank, tier, number, columns in _tables(banks, pool):
        if slabs := pool.sparse():
            _move(bank, tier, number, columns, slabs)
    pool.trim()
    if not due([pool]):
        return
    # What is left is free in slabs that a few pages hold (sinks, of windows that have slid on), and nowhere else.
    found = [Named.by(tier, number, columns) for _, tier, number, columns in _tables(banks, pool)]
    slabs = pool.thin(np.concatenate([np.empty(0, dtype=np.int64), *(x.pages[x.mine] for x in found)]), _WORTH)
    for bank, tier, number, columns in _tables(banks, pool) if slabs else ():
        _move(bank, tier, number, columns, slabs, grow=True)


def _tables(banks: Sequence[Bank], pool: PagePool) -> Iterator[tuple[Bank, Tier, int, np.ndarray]]:
    """The tables that name pages of a pool: of which bank and tier, the number in it, and how many columns count."""
    for bank in banks:
        for tier, columns in bank.columns():
            for number, one in enumerate(tier.pools):
                if one is pool:
                    yield bank, tier, number, columns


def _move(bank: Bank, tier: Tier, number: int, columns: np.ndarray, slabs: list[int], grow: bool = False) -> None:
    pool, named = tier.pools[number], Named.by(tier, number, columns)
    pages, moved = named.pages, np.flatnonzero(np.isin(named.pages >> SLAB_SHIFT, slabs) & named.mine)
    if not len(moved):
        return
    with bank.atomic() as change:
        new = change.adopt(pool, pool.allocate_elsewhere(len(moved), slabs, grow))
        if not len(new):
            return
        moved = moved[: len(new)]
        pool.copy(pages[moved], new)
        # Two layers may have a page in common.
        more = np.repeat(new, named.counts[moved] - 1)
        pool.retain(more)
        change.undo(partial(pool.release, more))
        target = np.full(len(pages), EMPTY, dtype=np.int64)
        target[moved] = new
        where = np.flatnonzero(target[named.place] != EMPTY)
        rows, at = named.rows[where], named.columns[where]
        tier.move(change, rows, at, target[named.place[where]], number)
    bank.touch(rows)
