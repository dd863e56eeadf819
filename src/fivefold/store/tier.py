"""The pages of many rows in one format: a pool (two, if sharers of a page keep part of it) and a padded page table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fivefold.store.pages import PagePool
from fivefold.store.transaction import Transaction

EMPTY = -1
_SPARE = 4  # columns that a table grows by at least


class Tier:
    """Page tables of rows: `tables[i]` int64 `[rows, capacity]` of pages of `pools[i]`.

    How many columns of a row count is known to its `Bounds` alone; what stands behind them is nobody's. A pool beside
    the first holds the fields that every sharer of a page keeps for itself.

    changed: (rows, columns), arrays that are broadcast together, of the places that the device tables do not know yet;
    None where there are none.
    """

    def __init__(self, pools: list[PagePool], rows: int) -> None:
        self.pools = pools
        self.tables = [np.full((rows, 0), EMPTY, dtype=np.int64) for _ in pools]
        self.shared = False
        """Whether somebody else may hold these pages too, so that writing looks at their references first."""
        self.changed: list[tuple[np.ndarray, np.ndarray]] | None = None
        self.reach = 0
        """How many columns the device tables need for that."""

    @classmethod
    def gathered(cls, parts: Sequence[tuple[Tier, int, np.ndarray]], layers: int, heads: int, shared: bool) -> Tier:
        """Sequences of tiers of the same pools, those of one part behind those of the other; references are the
        caller's to count. parts: a tier, how many sequences it has, and which of them. shared: whether pages get
        several owners by that."""
        out = cls(parts[0][0].pools, 0)
        width, count = max(tier.capacity for tier, _, _ in parts), sum(len(which) for _, _, which in parts)
        for number in range(len(out.pools)):
            table = np.full((layers, count, heads, width), EMPTY, dtype=np.int64)
            first = 0
            for tier, batch, which in parts:
                old = tier.tables[number].reshape(layers, batch, heads, tier.capacity)
                whole = len(which) == batch and (which == np.arange(batch)).all()
                table[:, first : first + len(which), :, : tier.capacity] = old if whole else old[:, which]
                first += len(which)
            out.tables[number] = table.reshape(layers * count * heads, width)
        out.shared = shared or any(tier.shared for tier, _, _ in parts)
        return out

    @property
    def pool(self) -> PagePool:
        return self.pools[0]

    @property
    def table(self) -> np.ndarray:
        return self.tables[0]

    @property
    def capacity(self) -> int:
        return self.tables[0].shape[1]

    def fields(self) -> list[tuple[PagePool, str, int]]:
        """(pool, field, number of the table) of all fields."""
        return [(pool, part.name, i) for i, pool in enumerate(self.pools) for part in pool.layout.fields]

    def read(self, rows: np.ndarray, columns: np.ndarray) -> dict[str, torch.Tensor]:
        """Every field of a page of each row: `[rows, *shape]`."""
        places = [pool.locate(table[rows, columns][None]) for pool, table in zip(self.pools, self.tables)]
        found = (pool.fetch_all(place) for pool, place in zip(self.pools, places))
        return {name: x[0] for fields in found for name, x in fields.items()}

    def open(self, change: Transaction, rows: np.ndarray, columns: np.ndarray) -> dict[str, torch.Tensor]:
        """`read` of pages that are written anew with more tokens: a codec may put what they hold in other places."""
        self.keep(change, rows, columns)
        return self.read(rows, columns)

    def keep(self, change: Transaction, rows: np.ndarray, columns: np.ndarray) -> None:
        """Note what a page of each row holds (`Transaction.keep`)."""
        for pool, table in zip(self.pools, self.tables):
            change.keep(pool, table[rows, columns])

    def write(self, rows: np.ndarray, columns: np.ndarray, fields: dict[str, torch.Tensor]) -> None:
        """Write fields of pages, of those rows and columns (arrays that are broadcast together), `[pages, *shape]`:
        those that are among `fields`."""
        for pool, table in zip(self.pools, self.tables):
            mine = {part.name: [fields[part.name]] for part in pool.layout.fields if part.name in fields}
            pool.write_fields(table[rows, columns], mine)

    def reserve(self, columns: int) -> None:
        """Make the tables wide enough."""
        missing = columns - self.capacity
        if missing > 0:
            wider = ((0, 0), (0, max(missing, _SPARE, self.capacity // 2)))
            self.tables = [np.pad(table, wider, constant_values=EMPTY) for table in self.tables]

    def narrow(self, columns: int) -> None:
        """Give up the columns behind, which are nobody's."""
        if columns < self.capacity:
            self.tables = [table[:, :columns].copy() for table in self.tables]

    def track(self) -> None:
        """From now on remember what the device tables do not know, which is everything."""
        self.known()
        self.change(np.arange(len(self.table))[:, None], np.arange(self.capacity))

    def change(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """These places (arrays that are broadcast together) have other pages."""
        if self.changed is not None:
            self.changed.append((rows, columns))
            self.reach = max(self.reach, int(columns.max(initial=-1)) + 1)

    def known(self) -> None:
        """The device tables know everything."""
        self.changed, self.reach = [], 0

    def widen(self, change: Transaction, rows: np.ndarray, at: np.ndarray | int, count: int) -> None:
        """Fresh pages in the `count` columns from `at` on (of each row its own), behind those that count."""
        if not len(rows) or count <= 0:
            return
        first, last = int(np.min(at)), int(np.max(at)) + count
        self.reserve(last)
        if last - first == count:
            which, columns = self._index(rows), np.arange(first, last)
            for pool, table in zip(self.pools, self.tables):
                table[which, first:last] = change.allocate(pool, count * len(rows)).reshape(-1, count)
            self.change(rows[:, None], columns)
            return
        columns = np.broadcast_to(np.asarray(at), rows.shape)[:, None] + np.arange(count)
        for pool, table in zip(self.pools, self.tables):
            table[rows[:, None], columns] = change.allocate(pool, columns.size).reshape(columns.shape)
        self.change(rows[:, None], columns)

    def reach_out(self, version: int, rows: np.ndarray, columns: np.ndarray) -> Ahead | None:
        """A page for each row in its column, behind those that count and part of no change; None where so many are not
        free, or may be missed by others."""
        with self.pool.lock:
            if self.shared or not self.pool.ample(len(rows)):
                return None
            pages = self.pool.allocate(len(rows), step=True)
        self.reserve(int(columns.max()) + 1)
        self.table[rows, columns] = pages
        return Ahead(version, self, rows, columns, pages)

    def drop(
        self,
        change: Transaction,
        rows: np.ndarray,
        first: np.ndarray | int,
        count: np.ndarray | int,
        columns: np.ndarray | int,
    ) -> None:
        """Give up `count` of a row's `columns` from `first` on (of each row its own); those behind move up."""
        some = np.broadcast_to(count, rows.shape) > 0
        if not some.any():
            return
        if not some.all():
            rows = rows[some]
            first, count, columns = (x if np.ndim(x) == 0 else np.asarray(x)[some] for x in (first, count, columns))
        if all(np.min(x) == np.max(x) for x in (first, count, columns)):
            self._drop_alike(change, rows, *(int(np.min(x)) for x in (first, count, columns)))
            return
        first, count, columns = (np.broadcast_to(x, rows.shape)[:, None] for x in (first, count, columns))
        stop = int(columns.max())
        at = np.arange(stop)
        gone = (at >= first) & (at < first + count)
        source = np.minimum(np.where(at < first, at, at + count), stop - 1)
        self._keep(change, rows, stop)
        for pool, table in zip(self.pools, self.tables):
            old = table[rows, :stop]
            change.release(pool, old[gone])
            table[rows, :stop] = np.take_along_axis(old, source, 1)
        self.change(rows[:, None], np.arange(int(first.min()), stop))

    def _drop_alike(self, change: Transaction, rows: np.ndarray, first: int, count: int, columns: int) -> None:
        """The same of the same columns of all rows."""
        which, last = self._index(rows), first + count
        before = self._keep(change, rows, columns)
        for pool, table, old in zip(self.pools, self.tables, before):
            change.release(pool, old[:, first:last])
            table[which, first : columns - count] = old[:, last:]
        if last < columns:
            self.change(rows[:, None], np.arange(first, columns - count))

    def _index(self, rows: np.ndarray) -> np.ndarray | slice:
        """All rows as a slice, for less work."""
        whole = len(rows) == len(self.table) and np.array_equal(rows, np.arange(len(rows)))
        return slice(None) if whole else rows

    def move(
        self, change: Transaction, rows: np.ndarray, columns: np.ndarray, pages: np.ndarray, number: int = 0
    ) -> None:
        """Single pages of `pools[number]` have been copied to `pages`; those that they were are given up."""
        self._keep(change, np.unique(rows), int(columns.max()) + 1)
        table = self.tables[number]
        change.release(self.pools[number], table[rows, columns])
        table[rows, columns] = pages
        self.change(rows, columns)

    def unshare(self, change: Transaction, rows: np.ndarray, columns: np.ndarray | int) -> None:
        """Copies of its own for every page of `columns [rows]` that somebody else holds too, before it is written."""
        if not self.shared or not len(rows):
            return
        for number in range(len(self.pools)):
            self.copy_shared(change, number, (rows,), np.broadcast_to(np.asarray(columns), rows.shape))

    def copy_shared(self, change: Transaction, number: int, sides: Sequence[np.ndarray], columns: np.ndarray) -> None:
        """The same for pages of `pools[number]` that the rows of all `sides` have in common, and have afterwards."""
        pool = self.pools[number]
        old = self.tables[number][sides[0], columns]
        where = np.flatnonzero(pool.references(old) > len(sides))
        if not len(where):
            return
        new = change.allocate(pool, len(where))
        pool.copy(old[where], new)
        for _ in sides[1:]:
            pool.retain(new)
            change.undo(partial(pool.release, new))
        for rows in sides:
            self.move(change, rows[where], columns[where], new, number)

    def _keep(self, change: Transaction, rows: np.ndarray, stop: int) -> list[np.ndarray]:
        """Note what the first columns of rows are, for a rollback; returns it, which is not to be written to."""
        which = self._index(rows)
        before = [np.array(table[which, :stop]) for table in self.tables]

        def restore() -> None:
            for table, old in zip(self.tables, before):
                table[which, :stop] = old
            self.change(rows[:, None], np.arange(stop))

        change.undo(restore)
        return before

    def pages(self, rows: np.ndarray | slice, columns: int, which: int = 0) -> np.ndarray:
        """The first columns of rows: int64 `[rows, columns]`, a view for a slice of rows."""
        return self.tables[which][rows, :columns]

    def held(self, columns: np.ndarray, which: int = 0) -> np.ndarray:
        """Every page that counts, where row i has `columns[i]` columns."""
        table = self.tables[which]
        return table[np.arange(table.shape[1]) < columns[:, None]]

    def retain(self, change: Transaction, columns: np.ndarray) -> None:
        """One more owner for everything that counts."""
        for i, pool in enumerate(self.pools):
            pages = self.held(columns, i)
            pool.retain(pages)
            change.undo(partial(pool.release, pages))

    def release(self, change: Transaction, columns: np.ndarray) -> None:
        """Give up everything that counts."""
        for i, pool in enumerate(self.pools):
            change.release(pool, self.held(columns, i))

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)


@dataclass(frozen=True)
class Ahead:
    """Pages of a tier for the next token of rows whose last page is full, in columns behind those that count. version:
    of the bounds (`Standing`) that they were taken for; known: whether the device tables know them."""

    version: int
    tier: Tier
    rows: np.ndarray
    columns: np.ndarray
    pages: np.ndarray
    known: bool = False
