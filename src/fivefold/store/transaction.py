"""What makes a change of a cache happen as a whole or not at all.

Three rules keep this cheap. Committed tokens are hardly ever written over: a change writes to slots behind them, or to
fresh pages. A page that is given up keeps its owner until the change is committed. And what little is changed in place
(page tables, packed pages whose tokens are replaced) is noted beforehand. So beginning costs next to nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from fivefold.kernels.device import Beside, coming
from fivefold.store.pages import PagePool

_numbers = itertools.count()


class Transaction:
    """The pages that a change took and gives up, and what brings back what it changed."""

    def __init__(self, step: bool = False) -> None:
        self._number = 1 + next(_numbers) % 0x7FFFFFFF
        self.step = step
        """Whether it is a decoding step, which has pages that were taken ahead (see `PagePool.allocate`, too)."""
        self.beside: Beside | None = None
        """Of a step that a device is given as a whole: where what need not wait for it runs, once it has been given."""
        self._postponed: list[Callable[[], None]] = []
        self._fresh: dict[PagePool, list[np.ndarray]] = {}
        self._released: list[tuple[PagePool, np.ndarray]] = []
        self._undo: list[Callable[[], None]] = []
        self._checks: list[tuple[Callable[[], list[float]], Callable[[list[float]], None]]] = []
        self._last: list[tuple[torch.Tensor, Callable[[list[float]], None]]] = []
        self.members: list[Any] = []
        """The banks that are being changed."""

    def allocate(self, pool: PagePool, count: int) -> np.ndarray:
        """Fresh pages, which a rollback gives back: int64 `[count]`."""
        return self.adopt(pool, pool.allocate(count, self.step))

    def adopt(self, pool: PagePool, pages: np.ndarray) -> np.ndarray:
        """Pages that were just allocated otherwise, as if by `allocate`."""
        self._fresh.setdefault(pool, []).append(pages)
        pool.mark(pages, self._number)
        return pages

    def release(self, pool: PagePool, pages: np.ndarray) -> None:
        """Give pages up: those that were taken by this very change at once, all others when it is committed."""
        pages = pages.reshape(-1)
        own = pool.marks(pages) == self._number
        if own.any():
            pool.mark(pages[own], 0)
            pool.release(pages[own])
            pages = pages[~own]
        if len(pages):
            self._released.append((pool, pages))

    def keep(self, pool: PagePool, pages: np.ndarray) -> None:
        """Note what pages hold, for a rollback, before committed tokens in them are written over."""
        pages = pages[pool.marks(pages) != self._number]  # the others go anyway, and may be somebody else's by then
        if not len(pages):
            return
        self.undo(partial(pool.write_fields, pages, {name: [x] for name, x in pool.copies(pages).items()}))

    def undo(self, action: Callable[[], None]) -> None:
        """What a rollback has to do, the latest first."""
        self._undo.append(action)

    def postpone(self, action: Callable[[], None]) -> None:
        """Do it beside the step, once a device is at work on that; at once where nobody waits for such a moment."""
        if self.beside is None:
            action()
        else:
            self._postponed.append(action)

    def launched(self) -> None:
        """The device has been given the step."""
        postponed, self._postponed = self._postponed, []
        if postponed and self.beside is not None:
            with self.beside.running():
                for action in postponed:
                    action()

    def check(self, numbers: torch.Tensor, action: Callable[[list[float]], None], last: bool = False) -> None:
        """What is known only when a device has done its part: `action` is given the numbers (of any shape) and raises
        where the change cannot stand. last: the device has nothing else to do by then, so that all of these come to the
        host together."""
        if last:
            self._last.append((numbers.reshape(-1), action))
        else:
            self._checks.append((coming(numbers.reshape(-1)), action))

    def verify(self) -> None:
        """Ask all that, as late as can be: before `commit`. What came after the last of them is not waited for."""
        self.launched()
        checks, self._checks = self._checks, []
        for numbers, action in checks:
            action(numbers())
        waiting, self._last = self._last, []
        for kind in dict.fromkeys((x.dtype, x.device) for x, _ in waiting):
            some = [(x, action) for x, action in waiting if (x.dtype, x.device) == kind]
            found = coming(torch.cat([x for x, _ in some]))()
            begin = 0
            for x, action in some:
                action(found[begin : begin + len(x)])
                begin += len(x)

    def _close(self) -> None:
        try:
            if self.beside is not None:
                self.beside.join()  # pages that it worked on may be another's from now on
        finally:
            for bank in self.members:
                bank.change = None

    def commit(self) -> None:
        """Let go of what was replaced."""
        assert not self._checks and not self._last
        self._close()
        self._undo, self._fresh = [], {}
        while self._released:
            pool, pages = self._released.pop()
            pool.release(pages)

    def rollback(self) -> None:
        """Bring back what was before."""
        self._close()
        self._released, self._checks, self._last, self._postponed = [], [], [], []
        failed: BaseException | None = None
        while self._undo:
            try:
                self._undo.pop()()
            except BaseException as error:  # the others bring back what they can
                failed = failed or error
        while self._fresh:
            pool, parts = self._fresh.popitem()
            pages = np.unique(np.concatenate(parts))
            pool.release(pages[pool.marks(pages) == self._number])
        if failed is not None:
            raise failed
