"""What makes a change of a cache happen as a whole or not at all.

Three rules keep this cheap. Committed tokens are hardly ever written over: a change writes to slots behind them, or to
fresh pages. A page that is given up keeps its owner until the change is committed. And what little is changed in place
(page tables, packed pages whose tokens are replaced) is noted beforehand. So beginning costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fivefold.store.pages import PagePool


class Transaction:
    """The pages that a change took and gives up, and what brings back what it changed."""

    def __init__(self) -> None:
        self._fresh: dict[PagePool, list[np.ndarray]] = {}
        self._released: list[tuple[PagePool, np.ndarray]] = []
        self._undo: list[Callable[[], None]] = []

    def allocate(self, pool: PagePool, count: int) -> np.ndarray:
        """Fresh pages, which a rollback gives back: int64 `[count]`."""
        pages = pool.allocate(count)
        return self.adopt(pool, pages) if count else pages

    def adopt(self, pool: PagePool, pages: np.ndarray) -> np.ndarray:
        """Pages that were just allocated otherwise, as if by `allocate`."""
        self._fresh.setdefault(pool, []).append(pages)
        return pages

    def release(self, pool: PagePool, pages: np.ndarray) -> None:
        """Give pages up: those that were taken by this very change at once, all others when it is committed."""
        pages = pages.reshape(-1)
        if not len(pages):
            return
        fresh = self._fresh.get(pool)
        if fresh:
            mine = np.concatenate(fresh)
            own = np.isin(pages, mine)
            if own.any():
                self._fresh[pool] = [mine[~np.isin(mine, pages)]]
                pool.release(pages[own])
                pages = pages[~own]
        if len(pages):
            self._released.append((pool, pages))

    def keep(self, pool: PagePool, pages: np.ndarray) -> None:
        """Note what pages hold, for a rollback, before committed tokens in them are written over."""
        fresh = self._fresh.get(pool)
        if fresh:
            pages = pages[~np.isin(pages, np.concatenate(fresh))]  # those go anyway, and may be somebody else's by then
        if not len(pages):
            return
        before = [(part.name, pool.read(part.name, pages).clone()) for part in pool.layout.fields]

        def restore() -> None:
            for name, x in before:
                pool.write(name, pages, x)

        self.undo(restore)

    def undo(self, action: Callable[[], None]) -> None:
        """What a rollback has to do, the latest first."""
        self._undo.append(action)

    def commit(self) -> None:
        """Let go of what was replaced."""
        self._undo, self._fresh = [], {}
        while self._released:
            pool, pages = self._released.pop()
            pool.release(pages)

    def rollback(self) -> None:
        """Bring back what was before."""
        self._released = []
        while self._undo:
            self._undo.pop()()
        for pool, parts in self._fresh.items():
            while parts:
                pool.release(parts.pop())
