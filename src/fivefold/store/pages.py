"""Fixed-size pages, their pool, and the byte cap.

A page holds `layout.tokens` tokens of one KV head. What a page is made of is declared by whoever uses it
(the exact tier, or a codec) as named fields; the pool allocates a *slab* of many pages at once: one tensor per
field, so that consecutive pages of one field are contiguous memory and can be attended on without a copy, or one
for all (`PageLayout.record`), so that a kernel finds a page by one address.

Page ids are int64: `slab << SLAB_SHIFT | index`. Ids in one slab are consecutive, ids of two slabs never are.
Pages are reference-counted: sharing (beam search, forks, layers that share storage) is one more reference.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch

from fivefold.errors import CacheFullError

F = TypeVar("F", bound=Callable[..., Any])
SLAB_SHIFT = 20
_INDEX_MASK = (1 << SLAB_SHIFT) - 1
# For a few pages (decoding) a slab of this fraction of the pool is added: few slabs, and at most 6% unused.
_GROWTH = 16
# When no run of consecutive free pages is left, up to this many scattered ones are used before growing.
_SCATTER = 64
# More than this part (one over it) of a pool that is free is too much.
_SHRINK = 8
# Memory for convenience is taken while this part of the cap (one over it) stays free.
_RESERVE = 8


@dataclass(frozen=True)
class Field:
    """One named part of a page.

    `shape` is per page; `kind` is the line of the report its bytes belong to ("exact", "codes", "scales",
    or any other word); `own` marks a field that every sharer of a page keeps for itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    own: bool = False

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PageLayout:
    """What a page of `tokens` tokens is made of.

    A `record` keeps a page's fields together, in the order given: one address finds all of them. Else every field
    lies by itself, so that consecutive pages of a field are one stretch of memory.
    """

    name: str
    tokens: int
    fields: tuple[Field, ...]
    record: bool = False
    holds: torch.dtype | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.fields)

    def bytes_by_kind(self) -> dict[str, int]:
        kinds: dict[str, int] = {}
        for part in self.fields:
            kinds[part.kind] = kinds.get(part.kind, 0) + part.nbytes
        return kinds

    def split(self) -> tuple[PageLayout, PageLayout | None]:
        """The layout of what sharers of a page share, and of what each keeps for itself (None if nothing)."""
        own = tuple(part for part in self.fields if part.own)
        if not own:
            return self, None
        shared = tuple(part for part in self.fields if not part.own)
        return (
            PageLayout(self.name, self.tokens, shared, self.record),
            PageLayout(f"{self.name}.own", self.tokens, own, self.record),
        )


class Budget:
    """A hard cap in bytes over every pool that was given it, and over what its owners charge to it besides.

    `limit=None` is no cap. Pools that share a budget share its lock: forks of a cache may live in several threads.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.used = 0
        """Bytes of all pages that are allocated."""
        self.charged: dict[int, int] = {}
        """Bytes that are not pages (what policies know, a model's own sliding layers), by owner."""
        self.pools: list[PagePool] = []
        self.lock = threading.RLock()

    def room_for(self, nbytes: int, share: int = 0) -> bool:
        """Whether so many bytes more are within the cap, and the `share`-th part of it stays free."""
        if self.limit is None:
            return True
        kept = self.limit // share if share else 0
        return self.used + sum(self.charged.values()) + nbytes + kept <= self.limit

    def charge(self, owner: int, nbytes: int) -> None:
        """Count `nbytes` that are not pages for an owner, instead of what it had before. Raises `CacheFullError`."""
        with self.lock:
            more = nbytes - self.charged.get(owner, 0)
            if more > 0 and not self.room_for(more):
                self.trim()
                if not self.room_for(more):
                    raise self.full(more)
            self.charged[owner] = nbytes
            if not nbytes:
                del self.charged[owner]

    def full(self, nbytes: int) -> CacheFullError:
        taken = self.used + sum(self.charged.values())
        return CacheFullError(
            f"the cache is full: {nbytes:,} bytes more are needed, and {taken:,} of the cap of {self.limit:,} bytes "
            "are in use; nothing was stored: raise max_bytes, or use a recipe that keeps less."
        )

    def trim(self) -> None:
        """Give wholly free slabs of every pool back to the system."""
        for pool in self.pools:
            pool.trim()


def _locked(method: F) -> F:
    """A method of a pool that runs under the lock of its budget."""

    @functools.wraps(method)
    def run(self: PagePool, *args: Any, **kwargs: Any) -> Any:
        with self.budget.lock:
            return method(self, *args, **kwargs)

    return cast(F, run)


class _Slab:
    __slots__ = ("free", "references", "tensors")

    def __init__(self, layout: PageLayout, pages: int, device: torch.device) -> None:
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.tensors = (
                _records(layout, pages, device)
                if layout.record
                else {
                    part.name: torch.empty((pages, *part.shape), dtype=part.dtype, device=device)
                    for part in layout.fields
                }
            )
        self.references = np.zeros(pages, dtype=np.int32)
        self.free = pages


def _records(layout: PageLayout, pages: int, device: torch.device) -> dict[str, torch.Tensor]:
    """The fields of `pages` pages as views of one tensor."""
    records = torch.empty((pages, layout.nbytes), dtype=torch.uint8, device=device)
    tensors, start = {}, 0
    for part in layout.fields:
        stretch = records[:, start : start + part.nbytes]
        tensors[part.name] = stretch.view(part.dtype).unflatten(1, part.shape)
        start += part.nbytes
    return tensors


class Location(NamedTuple):
    """Where pages lie: a regular grid in one slab (`strides` in pages), or indices to gather per slab."""

    shape: tuple[int, ...]
    slab: _Slab | None
    first: int
    strides: tuple[int, int]
    parts: tuple[tuple[_Slab, torch.Tensor, torch.Tensor | None], ...]


class PagePool:
    """Reference-counted pages of one layout.

    Args:
        layout: what a page is made of.
        device: where its tensors live.
        budget: the cap it counts against.
    """

    def __init__(self, layout: PageLayout, device: torch.device, budget: Budget | None = None) -> None:
        self.layout = layout
        self.device = device
        self.budget = budget if budget is not None else Budget()
        self.budget.pools.append(self)
        self._slabs: list[_Slab | None] = []
        self._bases: dict[str, np.ndarray] = {}
        """Where a field of each slab begins, as far as anybody has asked."""
        self.free_pages = 0
        self.total_pages = 0

    # -- memory -------------------------------------------------------------------------------------------

    @property
    def pages_in_use(self) -> int:
        return self.total_pages - self.free_pages

    @property
    def allocated_bytes(self) -> int:
        return self.total_pages * self.layout.nbytes

    def _grow(self, pages: int) -> tuple[int, _Slab]:
        pages = min(pages, 1 << SLAB_SHIFT)
        slab = _Slab(self.layout, pages, self.device)
        self._bases = {}
        self.budget.used += pages * self.layout.nbytes
        self.free_pages += pages
        self.total_pages += pages
        for number, old in enumerate(self._slabs):
            if old is None:
                self._slabs[number] = slab
                return number, slab
        self._slabs.append(slab)
        return len(self._slabs) - 1, slab

    @_locked
    def trim(self) -> None:
        """Give wholly free slabs back to the system."""
        for number, slab in enumerate(self._slabs):
            if slab is not None and slab.free == len(slab.references):
                self._slabs[number] = None
                self.free_pages -= slab.free
                self.total_pages -= slab.free
                self.budget.used -= slab.free * self.layout.nbytes

    @_locked
    def shrink(self) -> None:
        """Give wholly free slabs back where much is free: what is packed or evicted leaves pages of another pool."""
        much = self.free_pages > _SCATTER and self.free_pages * _SHRINK > self.total_pages
        if much or self.free_pages * 2 >= self.total_pages:
            self.trim()

    def _live(self) -> Iterator[tuple[int, _Slab]]:
        for number, slab in enumerate(self._slabs):
            if slab is not None:
                yield number, slab

    @_locked
    def allocate(self, count: int) -> np.ndarray:
        """`count` pages with one reference each, consecutive where possible. Contents are undefined.

        Returns: int64 `[count]`. Raises `CacheFullError` (and takes nothing) if the cap forbids it.
        """
        if count == 0:
            return np.empty(0, dtype=np.int64)
        run = self._run(count)
        if run is not None:
            return run
        missing = count - self.free_pages
        if missing > 0 and not self.budget.room_for(missing * self.layout.nbytes):
            self.budget.trim()
            missing = count - self.free_pages
            if not self.budget.room_for(missing * self.layout.nbytes):
                raise self.budget.full(missing * self.layout.nbytes)
        # A run of its own is worth some memory, as long as the cap is far; else only what is missing is added and
        # scattered pages are used.
        ample = count if count > _SCATTER else max(count, self.total_pages // _GROWTH)
        if (missing > 0 or count > _SCATTER) and self.budget.room_for(ample * self.layout.nbytes, _RESERVE):
            self._grow(ample)
            run = self._run(count)
            if run is not None:
                return run
        while self.free_pages < count:
            self._grow(count - self.free_pages)
        parts = []
        for number, slab in self._live():
            take = min(count, slab.free)
            if take:
                parts.append(self._take(number, slab, np.flatnonzero(slab.references == 0)[:take]))
                count -= take
            if count == 0:
                break
        return np.concatenate(parts)

    def sparse(self) -> list[int]:
        """Slabs whose pages all fit into what is free elsewhere, the emptiest first."""
        slabs = sorted((len(slab.references) - slab.free, slab.free, number) for number, slab in self._live())
        room, out = self.free_pages, []
        for used, free, number in slabs:
            room -= free
            if 0 < used <= room:
                room -= used
                out.append(number)
            elif used:
                break
        return out

    @_locked
    def allocate_elsewhere(self, count: int, slabs: list[int]) -> np.ndarray:
        """At most `count` free pages of other slabs than these; no memory is added for them."""
        parts = [np.empty(0, dtype=np.int64)]
        for number, slab in self._live():
            take = 0 if number in slabs else min(count, slab.free)
            if take:
                parts.append(self._take(number, slab, np.flatnonzero(slab.references == 0)[:take]))
                count -= take
        return np.concatenate(parts)

    def _run(self, count: int) -> np.ndarray | None:
        """Consecutive free pages of one slab, if there are so many."""
        for number, slab in self._live():
            if slab.free >= count:
                free = np.flatnonzero(slab.references == 0)
                starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
                if len(starts):
                    return self._take(number, slab, free[starts[0] : starts[0] + count])
        return None

    def _take(self, number: int, slab: _Slab, index: np.ndarray) -> np.ndarray:
        slab.references[index] = 1
        slab.free -= len(index)
        self.free_pages -= len(index)
        return (number << SLAB_SHIFT) + index.astype(np.int64)

    def _by_slab(self, pages: np.ndarray) -> Iterator[tuple[_Slab, np.ndarray, np.ndarray | None]]:
        """(slab, indices in it, where they stand in `pages`; None if all of them)."""
        numbers = pages >> SLAB_SHIFT
        first = int(numbers[0])
        if (numbers == first).all():
            slab = self._slabs[first]
            assert slab is not None, "page of a slab that was given back"
            yield slab, pages & _INDEX_MASK, None
            return
        order = np.argsort(numbers, kind="stable")
        for where in np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1):
            slab = self._slabs[int(numbers[where[0]])]
            assert slab is not None, "page of a slab that was given back"
            yield slab, pages[where] & _INDEX_MASK, where

    @_locked
    def retain(self, pages: np.ndarray) -> None:
        """One more reference to each page (a page may stand in `pages` more than once)."""
        if pages.size:
            for slab, index, _ in self._by_slab(pages.reshape(-1)):
                assert (slab.references[index] > 0).all(), "a free page cannot be shared"
                np.add.at(slab.references, index, 1)

    @_locked
    def release(self, pages: np.ndarray) -> None:
        """One reference less to each page; pages without any are free again."""
        if pages.size:
            for slab, index, _ in self._by_slab(pages.reshape(-1)):
                np.subtract.at(slab.references, index, 1)
                touched = slab.references[np.unique(index)]
                assert (touched >= 0).all(), "a page was released more often than it was held"
                freed = int((touched == 0).sum())
                slab.free += freed
                self.free_pages += freed

    @_locked
    def references(self, pages: np.ndarray) -> np.ndarray:
        """How many hold each page: int32, the shape of `pages`."""
        flat = pages.reshape(-1)
        counts = np.empty(flat.shape, dtype=np.int32)
        if flat.size:
            for slab, index, where in self._by_slab(flat):
                counts[slice(None) if where is None else where] = slab.references[index]
        return counts.reshape(pages.shape)

    # -- contents -----------------------------------------------------------------------------------------

    def locate(self, pages: np.ndarray) -> Location:
        """Where a table of pages `[rows, columns]` lies; valid as long as the table is."""
        rows, columns = pages.shape
        first, last = int(pages[0, 0]), int(pages[-1, -1])
        if first >> SLAB_SHIFT == last >> SLAB_SHIFT and last >= first:
            step = int(pages[0, 1]) - first if columns > 1 else 1
            stride = int(pages[1, 0]) - first if rows > 1 else 1
            grid = first + stride * np.arange(rows)[:, None] + step * np.arange(columns)
            if step > 0 and stride > 0 and (pages == grid).all():
                slab = self._slabs[first >> SLAB_SHIFT]
                assert slab is not None
                return Location(pages.shape, slab, first & _INDEX_MASK, (stride, step), ())
        parts = []
        for slab, index, where in self._by_slab(pages.reshape(-1)):
            target = None if where is None else torch.from_numpy(where).to(self.device)
            parts.append((slab, torch.from_numpy(index).to(self.device), target))
        return Location(pages.shape, None, 0, (0, 0), tuple(parts))

    def addresses(self, name: str, pages: np.ndarray) -> np.ndarray:
        """Where field `name` of each page begins in memory, in bytes: int64, the shape of `pages`."""
        if name not in self._bases:
            fields = [None if slab is None else slab.tensors[name] for slab in self._slabs]
            self._bases[name] = np.array([0 if field is None else field.data_ptr() for field in fields], dtype=np.int64)
        part = next(part for part in self.layout.fields if part.name == name)
        step = self.layout.nbytes if self.layout.record else part.nbytes
        return self._bases[name][pages >> SLAB_SHIFT] + (pages & _INDEX_MASK) * step

    def fetch(self, name: str, location: Location) -> torch.Tensor:
        """Field `name` of the pages at a location: `[rows, columns, *shape]`; of a regular grid a view."""
        if location.slab is not None:
            field = location.slab.tensors[name]
            page = field.stride(0)
            strides = (location.strides[0] * page, location.strides[1] * page, *field.stride()[1:])
            start = field.storage_offset() + location.first * page
            return field.as_strided((*location.shape, *field.shape[1:]), strides, start)
        if len(location.parts) == 1:
            slab, index, _ = location.parts[0]
            return slab.tensors[name].index_select(0, index).unflatten(0, location.shape)
        like = location.parts[0][0].tensors[name]
        out = like.new_empty((location.shape[0] * location.shape[1], *like.shape[1:]))
        for slab, index, where in location.parts:
            assert where is not None
            _put_at(out, where, slab.tensors[name].index_select(0, index))
        return out.unflatten(0, location.shape)

    def read(self, name: str, pages: np.ndarray) -> torch.Tensor:
        """Field `name` of a list of pages: `[len(pages), *shape]`; a view where they are consecutive."""
        return self.fetch(name, self.locate(pages.reshape(1, -1)))[0]

    def write(self, name: str, pages: np.ndarray, values: torch.Tensor, at: slice | None = None) -> None:
        """Write field `name` of `pages`, or its part `at` of the first axis: `[len(pages), *shape]`."""
        pages = pages.reshape(-1)
        if not len(pages):
            return
        for slab, index, where in self._by_slab(pages):
            target = slab.tensors[name]
            part = values if where is None else values[torch.from_numpy(where).to(self.device)]
            if len(index) == 1 or (np.diff(index) == 1).all():
                run = target[int(index[0]) : int(index[0]) + len(index)]
                (run if at is None else run[:, at]).copy_(part)
            else:
                rows = torch.from_numpy(index).to(self.device)
                if at is None:
                    _put_at(target, rows, part.to(target.dtype))
                else:
                    target[rows, at] = part.to(target.dtype)

    def read_tokens(self, name: str, pages: np.ndarray, slots: np.ndarray) -> torch.Tensor:
        """One token of each of `pages`, that in its slot `slots`: `[len(pages), *shape[1:]]`."""
        parts = []
        for slab, index, where in self._by_slab(pages):
            at = torch.from_numpy(index * self.layout.tokens + (slots if where is None else slots[where]))
            parts.append((where, slab.tensors[name].flatten(0, 1).index_select(0, at.to(self.device))))
        if len(parts) == 1:
            return parts[0][1]
        out = parts[0][1].new_empty((len(pages), *parts[0][1].shape[1:]))
        for where, part in parts:
            _put_at(out, torch.from_numpy(where).to(self.device), part)
        return out

    def tail(self, location: Location) -> list[torch.Tensor]:
        """The fields of single pages on a regular grid, as views, for `put`: `[rows, *shape]` each."""
        return [PagePool.fetch(self, part.name, location)[:, 0] for part in self.layout.fields]

    def put(self, tail: list[torch.Tensor], slot: int, *tokens: torch.Tensor) -> None:
        """One token into a slot of each page of a `tail`: its part of every field, `[rows, *shape[1:]]` each."""
        for page, x in zip(tail, tokens, strict=True):
            page[:, slot].copy_(x)

    def by_slab(self, pages: np.ndarray) -> Iterator[tuple[dict[str, torch.Tensor], np.ndarray, np.ndarray]]:
        """(fields of a slab, indices in it, where they stand in `pages`) for every slab of a list of pages."""
        for slab, index, where in self._by_slab(pages):
            yield slab.tensors, index, np.arange(len(pages)) if where is None else where

    def write_tokens(self, name: str, pages: np.ndarray, slots: np.ndarray, values: torch.Tensor) -> None:
        """Write one token of each of `pages`, that in its slot `slots`: `[len(pages), *shape[1:]]`."""
        for slab, index, where in self._by_slab(pages):
            target = slab.tensors[name].flatten(0, 1)
            at = torch.from_numpy(index * self.layout.tokens + (slots if where is None else slots[where]))
            part = values if where is None else values[torch.from_numpy(where).to(self.device)]
            _put_at(target, at.to(self.device), part)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages."""
        for part in self.layout.fields:
            # What is read may be a view of the slab that is written into.
            self.write(part.name, target, self.read(part.name, source).clone())


def _put_at(target: torch.Tensor, rows: torch.Tensor, values: torch.Tensor) -> None:
    """`index_copy_` along the first axis, which PyTorch lacks for numbers of eight bits with a floating point."""
    if target.dtype.itemsize == 1:
        target, values = target.view(torch.uint8), values.view(torch.uint8)
    target.index_copy_(0, rows, values)
