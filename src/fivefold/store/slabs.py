"""The slabs of a pool: who holds their pages, and where these lie in memory.

What is counted stands in common arrays, so that asking about pages is a few operations however many slabs they are in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import numpy as np
import torch

F = TypeVar("F", bound=Callable[..., Any])
SLAB_SHIFT = 20
INDEX_MASK = (1 << SLAB_SHIFT) - 1
_GIVEN_BACK = -(1 << SLAB_SHIFT)
_SEEN = 16
"""How many times what is wanted is looked for among scattered pages: steps that follow want as many each."""


def locked(method: F) -> F:
    """A method of a pool that runs under the lock of its budget."""

    @functools.wraps(method)
    def run(self: Slabs, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return cast(F, run)


class Slab:
    """Memory of many pages. tensors: by field; records: what these are views of, if they are; counts: of each page how
    many hold it, and which change took it, int32 `[2, pages]`, a part of an array for all slabs."""

    __slots__ = ("counts", "records", "tensors")

    def __init__(self, tensors: dict[str, torch.Tensor], records: torch.Tensor | None, pages: int) -> None:
        self.tensors, self.records, self.counts = tensors, records, np.zeros((2, pages), dtype=np.int32)

    @property
    def references(self) -> np.ndarray:
        return self.counts[0]


class Slabs:
    """All slabs by number. steps: how many bytes apart the pages of a slab lie, of each field."""

    def __init__(self, lock: AbstractContextManager[Any], steps: Mapping[str, int]) -> None:
        self.lock = lock
        self._slabs: list[Slab | None] = []
        self._steps = {name: (row, step) for row, (name, step) in enumerate(steps.items(), 1)}
        # Of each slab: where its references begin, and then its fields in memory.
        self._starts = np.zeros((1 + len(steps), 0), dtype=np.int64)
        # How many pages it has, how many are free, how many of these at most stand in succession, and how many pages at
        # least are taken before the first free one.
        self._pages, self._free, self._longest, self._first = (np.zeros(0, dtype=np.int64) for _ in range(4))
        self._counts = np.zeros((2, 0), dtype=np.int32)
        self._end = 0
        """So many of them belong to slabs, or to such as were given back."""
        self._next = np.empty(0, dtype=np.int64)
        """Pages that were free when they were looked for, to be asked for again."""

    @property
    def total_pages(self) -> int:
        return int(self._pages.sum())

    @property
    def free_pages(self) -> int:
        return int(self._free.sum())

    @property
    def pages_in_use(self) -> int:
        return self.total_pages - self.free_pages

    def _live(self) -> Iterator[tuple[int, Slab]]:
        for number, slab in enumerate(self._slabs):
            if slab is not None:
                yield number, slab

    def _add(self, slab: Slab, number: int | None = None) -> int:
        """Returns the number that it gets."""
        if number is None:
            number = self._slabs.index(None) if None in self._slabs else len(self._slabs)
        if number == len(self._slabs):
            self._slabs.append(None)
            for name in ("_starts", "_pages", "_free", "_longest", "_first"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros_like(old, shape=(*old.shape[:-1], 1))], -1))
        pages = len(slab.references)
        if self._end + pages > self._counts.shape[1]:
            self._counts, self._end = np.zeros((2, 2 * (self.total_pages + pages)), dtype=np.int32), 0
            for other, one in self._live():
                self._place(other, one)
        self._slabs[number] = slab
        self._place(number, slab)
        self._starts[1:, number] = [slab.tensors[name].data_ptr() for name in self._steps]
        self._pages[number], self._first[number] = pages, 0
        self._free[number] = self._longest[number] = pages - np.count_nonzero(slab.references)
        return number

    def _place(self, number: int, slab: Slab) -> None:
        self._starts[0, number] = self._end
        counts = self._counts[:, self._end : self._end + slab.counts.shape[1]]
        counts[:] = slab.counts
        slab.counts, self._end = counts, self._end + counts.shape[1]

    def _remove(self, number: int) -> Slab:
        slab = self._slabs[number]
        assert slab is not None
        self._slabs[number], self._starts[0, number] = None, _GIVEN_BACK
        self._next = self._next[:0]
        self._pages[number] = self._free[number] = self._longest[number] = 0
        return slab

    def _take(self, number: int, index: np.ndarray) -> np.ndarray:
        """The ids of free pages side by side that are free no more."""
        cast(Slab, self._slabs[number]).references[index[0] : index[-1] + 1] = 1
        self._free[number] -= len(index)
        self._longest[number] = min(self._longest[number], self._free[number])
        if index[0] == self._first[number]:
            self._first[number] = index[-1] + 1
        return (number << SLAB_SHIFT) + index

    def _run(self, count: int) -> np.ndarray | None:
        """Consecutive free pages of one slab, if there are so many."""
        for number in np.flatnonzero(self._longest >= count).tolist():
            references, first = cast(Slab, self._slabs[number]).references, int(self._first[number])
            if references[first]:
                first += int(references[first:].argmin())
                self._first[number] = first
            if first + count > len(references) or references[first : first + count].any():  # not where one is at first
                used = np.concatenate([[-1], references.nonzero()[0], [len(references)]])
                gaps = used[1:] - used[:-1] - 1
                self._longest[number] = gaps.max()
                if self._longest[number] < count:
                    continue
                first = int(used[np.argmax(gaps >= count)]) + 1
            return self._take(number, np.arange(first, first + count))
        return None

    def _scattered(self, count: int, without: Sequence[int] = ()) -> np.ndarray:
        """At most so many free pages, the first ones of all slabs but these. What a step wants is in many slabs, a few
        pages in each."""
        pages, at = self._next[:count], np.empty(0, dtype=np.int64)
        if not len(without) and len(pages) == count:
            at = self._at(pages)
        if not len(at) or self._counts[0, at].any():
            pages, self._next = np.split(self._seen(count * _SEEN, without), [count])
            at = self._at(pages)
        else:
            self._next = self._next[count:]
        self._counts[0, at] = 1
        self._free -= np.bincount(pages >> SLAB_SHIFT, minlength=len(self._free))
        self._longest = np.minimum(self._longest, self._free)
        return pages

    def _seen(self, count: int, without: Sequence[int]) -> np.ndarray:
        """At most so many pages that are free just now."""
        numbers = np.flatnonzero(self._free)
        if len(without):
            numbers = numbers[~np.isin(numbers, without)]
        ends = self._free[numbers].cumsum()
        numbers = numbers[: int(ends.searchsorted(count)) + 1]
        if not count or not len(numbers):
            return np.empty(0, dtype=np.int64)
        starts, pages = self._starts[0, numbers], self._pages[numbers]
        parts = [self._counts[0, first : first + many] for first, many in zip(starts.tolist(), pages.tolist())]
        found = np.flatnonzero(np.concatenate(parts) == 0)[:count]
        ends = pages.cumsum()
        which = ends.searchsorted(found, "right")
        return (numbers[which] << SLAB_SHIFT) + found - (ends - pages)[which]

    def _at(self, pages: np.ndarray) -> np.ndarray:
        """Where the counts of pages stand."""
        at = self._starts[0][pages >> SLAB_SHIFT] + (pages & INDEX_MASK)
        assert (at >= 0).all(), "page of a slab that was given back"
        return at

    @locked
    def retain(self, pages: np.ndarray) -> None:
        """One more reference to each page (a page may stand in `pages` more than once)."""
        at, references = self._at(pages.reshape(-1)), self._counts[0]
        assert (references[at] > 0).all(), "a free page cannot be shared"
        np.add.at(references, at, np.int32(1))

    @locked
    def release(self, pages: np.ndarray) -> None:
        """One reference less to each page; pages without any are free again."""
        pages = pages.reshape(-1)
        at, references = self._at(pages), self._counts[0]
        np.subtract.at(references, at, np.int32(1))
        left = references[at]
        assert (left >= 0).all(), "a page was released more often than it was held"
        gone = np.sort(pages[left == 0])
        gone = gone[np.diff(gone, prepend=-1) > 0]
        freed = np.bincount(gone >> SLAB_SHIFT, minlength=len(self._free))
        self._free += freed
        np.minimum.at(self._first, gone >> SLAB_SHIFT, gone & INDEX_MASK)
        # Each may have joined the free pages on its two sides.
        self._longest = np.minimum((freed + 1) * self._longest + freed, self._free)

    @locked
    def references(self, pages: np.ndarray) -> np.ndarray:
        """How many hold each page: int32, the shape of `pages`."""
        return self._counts[0][self._at(pages)]

    @locked
    def mark(self, pages: np.ndarray, change: int) -> None:
        """Say which change took these pages."""
        self._counts[1][self._at(pages)] = change

    @locked
    def marks(self, pages: np.ndarray) -> np.ndarray:
        """Which change took each page, int32, as far as anybody has said so; 0 where the slab was given back."""
        slabs, index = pages >> SLAB_SHIFT, pages & INDEX_MASK
        there = index < self._pages[slabs]
        return np.where(there, self._counts[1][np.where(there, self._starts[0][slabs] + index, 0)], 0)

    def addresses(self, name: str, pages: np.ndarray) -> np.ndarray:
        """Where field `name` of each page begins in memory, in bytes: int64, the shape of `pages`."""
        row, step = self._steps[name]
        starts = self._starts[row] - (np.arange(self._starts.shape[1]) << SLAB_SHIFT) * step
        out = starts[pages >> SLAB_SHIFT]
        out += pages * step
        return out

    def _by_slab(self, pages: np.ndarray) -> Iterator[tuple[Slab, np.ndarray, np.ndarray | None]]:
        """(slab, indices in it, where they stand in `pages`; None if all of them)."""
        numbers = pages >> SLAB_SHIFT
        first = int(numbers[0])
        if (numbers == first).all():
            slab = self._slabs[first]
            assert slab is not None, "page of a slab that was given back"
            yield slab, pages & INDEX_MASK, None
            return
        order = np.argsort(numbers, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            slab = self._slabs[int(numbers[where[0]])]
            assert slab is not None, "page of a slab that was given back"
            yield slab, pages[where] & INDEX_MASK, where
