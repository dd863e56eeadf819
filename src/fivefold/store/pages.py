"""Fixed-size pages, their pool, and the byte cap.

A page holds `layout.tokens` tokens of one KV head. What a page is made of is declared by whoever uses it
(the exact tier, or a codec) as named fields; the pool allocates a *slab* of many pages at once: one tensor per
field, so that consecutive pages of one field are contiguous memory and can be attended on without a copy, or one
for all (`PageLayout.record`), so that a kernel finds a page by one address.

Page ids are int64: `slab << SLAB_SHIFT | index`. Ids in one slab are consecutive, ids of two slabs never are.
Pages are reference-counted: sharing (beam search, forks, layers that share storage) is one more reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from fivefold.errors import CacheFullError

SLAB_SHIFT = 20
_INDEX_MASK = (1 << SLAB_SHIFT) - 1
# For a few pages (decoding) a slab of this fraction of the pool is added: few slabs, and at most 6% unused.
_GROWTH = 16
# When no run of consecutive free pages is left, up to this many scattered ones are used before growing.
_SCATTER = 64


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


@dataclass
class Budget:
    """A hard cap in bytes over every pool that was given it. `limit=None` is no cap."""

    limit: int | None = None
    used: int = 0
    pools: list[PagePool] = field(default_factory=list)

    # What the step that is under way has been promised (see `reserve`).
    reserved: int = 0

    def room_for(self, nbytes: int, spare: bool = False) -> int:
        """Bytes left after taking `nbytes` (negative: too many); `spare`: and leaving what is reserved."""
        if self.limit is None:
            return 0
        return self.limit - self.used - nbytes - (self.reserved if spare else 0)

    def full(self, nbytes: int) -> CacheFullError:
        return CacheFullError(
            f"the cache is full: {nbytes:,} bytes more are needed, and {self.used:,} of the cap of "
            f"{self.limit:,} bytes are in use; nothing was stored: raise max_bytes, or use a recipe that "
            "keeps less."
        )

    def trim(self) -> None:
        """Give wholly free slabs of every pool back to the system."""
        for pool in self.pools:
            pool.trim()

    def reserve(self, pages: dict[PagePool, int]) -> None:
        """Make sure that `pages[pool]` more pages of every pool can be had together.

        Until the next call, no pool grows into these bytes for convenience. Raises `CacheFullError`.
        """
        if self.limit is None:
            return
        self.reserved = 0

        def need() -> int:
            return sum(max(0, count - pool.free_pages) * pool.layout.nbytes for pool, count in pages.items())

        if self.room_for(need()) < 0:
            self.trim()
            if self.room_for(need()) < 0:
                raise self.full(need())
        self.reserved = need()


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
        self.free_pages = 0
        self.total_pages = 0
        self.trimmed = 0
        """How often memory was given back: until it is again, a page's id stands for one address."""

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
        self.budget.used += pages * self.layout.nbytes
        self.free_pages += pages
        self.total_pages += pages
        for number, old in enumerate(self._slabs):
            if old is None:
                self._slabs[number] = slab
                return number, slab
        self._slabs.append(slab)
        return len(self._slabs) - 1, slab

    def trim(self) -> None:
        """Give wholly free slabs back to the system."""
        for number, slab in enumerate(self._slabs):
            if slab is not None and slab.free == len(slab.references):
                self._slabs[number] = None
                self.trimmed += 1
                self.free_pages -= slab.free
                self.total_pages -= slab.free
                self.budget.used -= slab.free * self.layout.nbytes

    def _live(self) -> Iterator[tuple[int, _Slab]]:
        for number, slab in enumerate(self._slabs):
            if slab is not None:
                yield number, slab

    def allocate(self, count: int) -> np.ndarray:
        """`count` pages with one reference each, consecutive where possible. Contents are undefined.

        Returns: int64 `[count]`. Raises `CacheFullError` (and takes nothing) if the cap forbids it.
        """
        if count == 0:
            return np.empty(0, dtype=np.int64)
        for number, slab in self._live():
            if slab.free >= count:
                free = np.flatnonzero(slab.references == 0)
                starts = np.flatnonzero(free[count - 1 :] - free[: len(free) - count + 1] == count - 1)
                if len(starts):
                    return self._take(number, slab, free[starts[0] : starts[0] + count])
        missing = count - self.free_pages
        if missing > 0 and self.budget.room_for(missing * self.layout.nbytes) < 0:
            self.budget.trim()
            missing = count - self.free_pages
            if self.budget.room_for(missing * self.layout.nbytes) < 0:
                raise self.budget.full(missing * self.layout.nbytes)
        # A run of its own is worth memory that nobody has announced a need for (`Budget.reserve`); else only
        # what is missing is added and scattered pages are used.
        ample = count if count > _SCATTER else max(count, self.total_pages // _GROWTH)
        if missing > 0 or count > _SCATTER:
            for pages in (ample, count) if missing > 0 else (count,):
                if missing == pages or self.budget.room_for(pages * self.layout.nbytes, spare=True) >= 0:
                    number, slab = self._grow(pages)
                    if slab.free >= count:
                        return self._take(number, slab, np.arange(count))
                    break
            else:
                if missing > 0:
                    self._grow(missing)
        parts = []
        for number, slab in self._live():
            take = min(count, slab.free)
            if take:
                parts.append(self._take(number, slab, np.flatnonzero(slab.references == 0)[:take]))
                count -= take
            if count == 0:
                break
        while count:  # only beyond 2**SLAB_SHIFT pages at once
            number, slab = self._grow(count)
            take = min(count, slab.free)
            parts.append(self._take(number, slab, np.arange(take)))
            count -= take
        return np.concatenate(parts)

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
        for number in np.unique(numbers):
            slab = self._slabs[int(number)]
            assert slab is not None, "page of a slab that was given back"
            where = np.flatnonzero(numbers == number)
            yield slab, pages[where] & _INDEX_MASK, where

    def retain(self, pages: np.ndarray) -> None:
        """One more reference to each page (a page may stand in `pages` more than once)."""
        if pages.size:
            for slab, index, _ in self._by_slab(pages.reshape(-1)):
                assert (slab.references[index] > 0).all(), "a free page cannot be shared"
                np.add.at(slab.references, index, 1)

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
        out = np.empty(pages.size, dtype=np.int64)
        if pages.size:
            for slab, index, where in self._by_slab(pages.reshape(-1)):
                field = slab.tensors[name]
                step = field.stride(0) * field.itemsize
                out[slice(None) if where is None else where] = field.data_ptr() + index * step
        return out.reshape(pages.shape)

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
            out.index_copy_(0, where, slab.tensors[name].index_select(0, index))
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
                    target.index_copy_(0, rows, part.to(target.dtype))
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
            out.index_copy_(0, torch.from_numpy(where).to(self.device), part)
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
            target.index_copy_(0, at.to(self.device), part)

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages."""
        for part in self.layout.fields:
            # What is read may be a view of the slab that is written into.
            self.write(part.name, target, self.read(part.name, source).clone())

    def unshare(self, pages: np.ndarray) -> np.ndarray:
        """Copy-on-write: `pages` with every shared one replaced by a copy of its own.

        The reference to the shared page passes on to the copy.
        """
        shared = self.references(pages) > 1
        if not shared.any():
            return pages
        old = pages[shared]
        new = self.allocate(len(old))
        self.copy(old, new)
        self.release(old)
        pages = pages.copy()
        pages[shared] = new
        return pages
