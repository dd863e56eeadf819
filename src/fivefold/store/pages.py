"""Fixed-size pages, their pool, and the byte cap.

A page holds `layout.tokens` tokens of one KV head. What a page is made of is declared by whoever uses it
(the exact tier, or a codec) as named fields; the pool allocates a *slab* of many pages at once: one tensor per
field, so that consecutive pages of one field are contiguous memory and can be attended on without a copy, or one
for all (`PageLayout.record`), so that a kernel finds a page by one address.

Page ids are int64: `slab << SLAB_SHIFT | index`. Ids in one slab are consecutive, ids of two slabs never are.
Pages are reference-counted: sharing (beam search, forks, layers that share storage) is one more reference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from fivefold.errors import CacheFullError
from fivefold.kernels.choice import choose, loaded
from fivefold.kernels.device import sent
from fivefold.store.layout import PageLayout, fields_of, records_of, tensors_of
from fivefold.store.rows import run_of
from fivefold.store.scattered import joined, put_at, rows_from, steps
from fivefold.store.slabs import INDEX_MASK, SLAB_SHIFT, Slab, Slabs, locked

# For a few pages a slab of this fraction of the pool is added, so that slabs are few: the first for a step's, since
# after a prompt's chunk nothing more may be wanted; the second else, and where a step has many rows.
_GROWTH_STEP, _GROWTH = 16, 128
# When no run of consecutive free pages is left, up to this many scattered ones are used before growing.
_SCATTER = 64
# More than this part (one over it) of a pool that is free is too much.
_SHRINK = 8
# Memory for convenience is taken while this part of the cap (one over it) stays free.
_RESERVE = 8
# Addresses that a kernel is given count so many bytes.
_UNIT = 16


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
            self.make_room(nbytes - self.charged.get(owner, 0))
            self.count(owner, nbytes)

    def count(self, owner: int, nbytes: int) -> None:
        """The same of bytes that are there already, under another owner."""
        with self.lock:
            self.charged[owner] = nbytes
            if not nbytes:
                del self.charged[owner]

    def make_room(self, nbytes: int) -> None:
        """So many bytes more are to come. Raises `CacheFullError`."""
        if nbytes > 0 and not self.room_for(nbytes):
            self.trim()
            if not self.room_for(nbytes):
                raise self.full(nbytes)

    def full(self, nbytes: int) -> CacheFullError:
        """The error that says that so many bytes more do not fit."""
        taken = self.used + sum(self.charged.values())
        return CacheFullError(
            f"the cache is full: {nbytes:,} bytes more are needed, and {taken:,} of the cap of {self.limit:,} bytes "
            "are in use; nothing was stored: raise max_bytes, or use a recipe that keeps less."
        )

    def trim(self) -> None:
        """Give wholly free slabs of every pool back to the system."""
        for pool in self.pools:
            pool.trim()


class Location(NamedTuple):
    """Where pages lie: a regular grid in one slab (`strides` in pages), several such side by side (`runs`), or indices
    to gather per slab; `far` are pages in several slabs that a kernel gathers."""

    shape: tuple[int, ...]
    slab: Slab | None
    first: int
    strides: tuple[int, int]
    parts: tuple[tuple[Slab, torch.Tensor | slice, Any], ...]
    runs: tuple[Any, ...] = ()
    far: np.ndarray | None = None


class PagePool(Slabs):
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
        self._nbytes = {part.name: part.nbytes for part in layout.fields}
        steps = {part.name: layout.nbytes if layout.record else part.nbytes for part in layout.fields}
        super().__init__(self.budget.lock, steps)

    # -- memory -------------------------------------------------------------------------------------------

    @property
    def allocated_bytes(self) -> int:
        return self.total_pages * self.layout.nbytes

    def _grow(self, pages: int) -> int:
        layout, pages = self.layout, min(pages, 1 << SLAB_SHIFT)
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            return self._add(Slab(*tensors_of(layout, pages, self.device), pages))

    def _add(self, slab: Slab, number: int | None = None) -> int:
        number = super()._add(slab, number)
        self.budget.used += len(slab.references) * self.layout.nbytes
        return number

    def _remove(self, number: int) -> Slab:
        slab = super()._remove(number)
        self.budget.used -= len(slab.references) * self.layout.nbytes
        return slab

    @locked
    def take_over(self, other: PagePool) -> np.ndarray:
        """All slabs of another pool of this layout, as they are: the number that each has here, int64 `[slabs]`."""
        numbers = np.full(len(other._slabs), -1, dtype=np.int64)
        for number, _ in list(other._live()):
            numbers[number] = self._add(other._remove(number))
        return numbers

    @locked
    def hand_back(self, other: PagePool, numbers: np.ndarray) -> None:
        """Undo `take_over`, which returned these numbers."""
        for number, here in enumerate(numbers.tolist()):
            if here >= 0:
                other._add(self._remove(here), number)

    @locked
    def trim(self) -> None:
        """Give wholly free slabs back to the system."""
        for number in np.flatnonzero((self._free == self._pages) & (self._pages > 0)).tolist():
            self._remove(number)

    @locked
    def shrink(self) -> None:
        """Give wholly free slabs back where much is free: what is packed or evicted leaves pages of another pool."""
        free = self.free_pages
        if (free > _SCATTER and free * _SHRINK > self.total_pages) or free * 2 >= self.total_pages:
            self.trim()

    def ample(self, count: int) -> bool:
        """Whether so many pages are free, and the cap is far: nobody will miss them."""
        return self.free_pages >= count and self.budget.room_for(count * self.layout.nbytes, _RESERVE)

    @locked
    def allocate(self, count: int, step: bool = False) -> np.ndarray:
        """`count` pages with one reference each, consecutive where possible. Contents are undefined.

        step: for a decoding step: what is free is used up before the pool grows, which it then does ahead of the next
        steps.

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
        # scattered pages are used. A step has one page of each row: they are no run of any row's.
        few = count <= _SCATTER
        ahead = self.total_pages // (_GROWTH_STEP if step and few else _GROWTH)
        ample = max(count, ahead) if step or few else count
        wanted = missing > 0 or (count > _SCATTER and not step)
        if wanted and self.budget.room_for(ample * self.layout.nbytes, _RESERVE):
            self._grow(ample)
            run = self._run(count)
            if run is not None:
                return run
        while self.free_pages < count:
            self._grow(count - self.free_pages)
        return self._scattered(count)

    def sparse(self) -> list[int]:
        """Slabs whose pages all fit into what is free elsewhere, the emptiest first."""
        used = self._pages - self._free
        slabs = sorted((int(used[number]), int(self._free[number]), number) for number, _ in self._live())
        room, out = self.free_pages, []
        for held, free, number in slabs:
            room -= free
            if 0 < held <= room:
                room -= held
                out.append(number)
            elif held:
                break
        return out

    @locked
    def thin(self, movable: np.ndarray, worth: int) -> list[int]:
        """Slabs that are empty once pages of them, all of which are among `movable`, are in a new slab, the emptiest
        first: as many as leave no more than the `worth`-th part of the pool free. They hold no more than is free now,
        since for a moment there are both; and so much is free in each that a page that goes costs few that move."""
        held = np.bincount(movable >> SLAB_SHIFT, minlength=len(self._pages))
        used, free, total = self._pages - self._free, self.free_pages, self.total_pages
        room, out = free, []
        for number in np.argsort(used / np.maximum(self._pages, 1), kind="stable").tolist():
            if free * worth <= total or used[number] > room or self._free[number] * worth < self._pages[number]:
                break
            if 0 < used[number] == held[number]:
                out.append(number)
                room, free, total = (x - y[number] for x, y in ((room, used), (free, self._free), (total, self._free)))
        return out

    @locked
    def allocate_elsewhere(self, count: int, slabs: list[int], grow: bool = False) -> np.ndarray:
        """At most `count` free pages of other slabs than these. grow: they are a new slab, where the cap is far; else
        no memory is added for them."""
        if grow and self.budget.room_for(count * self.layout.nbytes, _RESERVE):
            number = self._grow(count)
            return self._take(number, np.arange(self._pages[number]))
        return self._scattered(count, slabs)

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
                return Location(pages.shape, slab, first & INDEX_MASK, (stride, step), ())
        if runs := self._runs(pages):
            return Location(pages.shape, None, 0, (0, 0), (), runs)
        if self._far(pages) and all(part.nbytes % _UNIT == 0 for part in self.layout.fields):
            return Location(pages.shape, None, 0, (0, 0), (), (), pages.flatten())
        return Location(pages.shape, None, 0, (0, 0), tuple(self._indexed(pages.reshape(-1))))

    def _far(self, pages: np.ndarray) -> bool:
        """Whether pages are in several slabs, and a kernel moves what is there by its addresses."""
        slabs = pages >> SLAB_SHIFT
        return pages.size > 1 and by_address(self.device) and bool((slabs != slabs.flat[0]).any())

    def _slab_of(self, pages: np.ndarray) -> Slab:
        """That of the first one."""
        return cast(Slab, self._slabs[int(pages.flat[0]) >> SLAB_SHIFT])

    def _there(self, name: str, pages: np.ndarray, offset: np.ndarray | int = 0) -> torch.Tensor:
        """Addresses of a field of pages, `offset` bytes behind its beginning, for that kernel."""
        return sent(self.device, (self.addresses(name, pages) + offset) // _UNIT)[0]

    def _runs(self, pages: np.ndarray) -> tuple[Location, ...]:
        """The regular grids that a table is made of, from column to column, if these are few: a chunk leaves one."""
        rows, columns = pages.shape
        breaks = (pages[:, 1:] - pages[:, :-1] != 1).any(0).nonzero()[0] + 1
        starts, stops = np.concatenate([[0], breaks]), np.concatenate([breaks, [columns]])
        first, slabs = pages[:, starts], pages[0, starts] >> SLAB_SHIFT
        steps = first[1] - first[0] if rows > 1 else np.ones_like(slabs)
        few = len(starts) <= 2 + 2 * np.count_nonzero(slabs[1:] != slabs[:-1])
        regular = (first == first[0] + steps * np.arange(rows)[:, None]).all() and (steps > 0).all()
        if not few or not regular or (pages[-1, stops - 1] >> SLAB_SHIFT != slabs).any():
            return ()
        return tuple(
            Location((rows, stop - start), cast(Slab, self._slabs[slab]), page & INDEX_MASK, (step, 1), ())
            for start, stop, slab, page, step in zip(*(x.tolist() for x in (starts, stops, slabs, first[0], steps)))
        )

    def _indexed(self, pages: np.ndarray, slots: np.ndarray | None = None) -> list[tuple[Slab, Any, Any]]:
        """(slab, places in it, where they stand in `pages`, None if all of them) on the device: slices, which nobody
        sends, where they go up by one step, and where they are a run; the others are sent together. slots: places are
        those of tokens, one of each page."""
        found, places = list(self._by_slab(pages)), list[Any]()
        for _, index, where in found:
            if slots is None:
                places.append(steps(index))
            else:
                places.append(index * self.layout.tokens + (slots if where is None else slots[where]))
        places += [None if where is None else run_of(where) or where for _, _, where in found]
        arrays = [x for x in places if isinstance(x, np.ndarray)]
        tensors = iter(sent(self.device, *arrays) if arrays else ())
        places = [next(tensors) if isinstance(x, np.ndarray) else x for x in places]
        return [(slab, *both) for (slab, _, _), *both in zip(found, places, places[len(found) :])]

    def _fetch(self, location: Location, of: Callable[[Slab], torch.Tensor], name: str, nbytes: int) -> torch.Tensor:
        """What `of` gives of a slab, of the pages at a location: from where field `name` begins, so many bytes."""
        if location.far is not None:
            like = of(self._slab_of(location.far))
            found = loaded("move.triton").gather(self._there(name, location.far), nbytes).view(like.dtype)
            return found.view(*location.shape, *like.shape[1:])
        if location.slab is not None:
            return _grid(of(location.slab), location)
        if location.runs:
            return torch.cat([_grid(of(cast(Slab, run.slab)), run) for run in location.runs], 1)
        found = ((where, of(slab), at) for slab, at, where in location.parts)
        parts = ((where, x[at] if isinstance(at, slice) else x.index_select(0, at)) for where, x, at in found)
        return rows_from(parts, prod(location.shape)).unflatten(0, location.shape)

    def fetch(self, name: str, location: Location) -> torch.Tensor:
        """Field `name` of the pages at a location: `[rows, columns, *shape]`; of a regular grid a view."""
        return self._fetch(location, lambda slab: slab.tensors[name], name, self._nbytes[name])

    def fetch_all(self, location: Location) -> dict[str, torch.Tensor]:
        """Every field of the pages at a location: records are gathered as they are."""
        if location.slab is None and self.layout.record:
            first = self.layout.fields[0].name
            return fields_of(self.layout, self._fetch(location, _records, first, self.layout.nbytes))
        return {part.name: self.fetch(part.name, location) for part in self.layout.fields}

    def copies(self, pages: np.ndarray) -> dict[str, torch.Tensor]:
        """Every field of a list of pages, as they are now: `[len(pages), *shape]`."""
        place = self.locate(pages.reshape(1, -1))
        gathered = len(place.parts) > 1 or len(place.runs) > 1 or place.far is not None
        return {name: x[0] if gathered else x[0].clone() for name, x in self.fetch_all(place).items()}

    def read(self, name: str, pages: np.ndarray) -> torch.Tensor:
        """Field `name` of a list of pages: `[len(pages), *shape]`; a view where they are consecutive."""
        return self.fetch(name, self.locate(pages.reshape(1, -1)))[0]

    def write(self, name: str, pages: np.ndarray, values: torch.Tensor, at: slice | None = None) -> None:
        """Write field `name` of `pages`, or its part `at` of the first axis: `[len(pages), *shape]`."""
        self.write_fields(pages, {name: [values]}, at)

    def write_fields(
        self, pages: np.ndarray, fields: Mapping[str, Sequence[torch.Tensor]], at: slice | None = None
    ) -> None:
        """The same of several fields, by name, each in pieces that come one after the other; the pages of a piece may
        have several axes."""
        pages = pages.reshape(-1)
        if not len(pages):
            return
        if at is None and self._far(pages) and all(part.nbytes % _UNIT == 0 for part in self.layout.fields):
            self._scatter(pages, fields)
            return
        places = self._indexed(pages)
        runs = all(isinstance(among, slice) for _, _, among in places)
        if runs:
            places.sort(key=lambda place: place[2].start)
        targets, sources = list[torch.Tensor](), list[torch.Tensor]()
        tensors = [slab.tensors for slab, _, _ in places]
        if self.layout.record and at is None and len(places) > 1 and len(fields) == len(self.layout.fields):
            tensors = [{"": _records(slab)} for slab, _, _ in places]
            fields = {"": [self._whole(len(pages), fields).view(tensors[0][""].dtype)]}
        for name, pieces in fields.items():
            _, rows, among = places[0]
            first = tensors[0][name]
            if among is None and at is None and isinstance(rows, slice) and rows.step == 1:
                run = first[rows].view(-1, *pieces[0].shape[1:])
                run.copy_(pieces[0]) if len(pieces) == 1 else torch.cat(list(pieces), out=run)
                continue
            values = joined(pieces)
            values = values.reshape(len(pages), *values.shape[1 - first.ndim :])
            if runs:
                parts = values.split([among.stop - among.start for _, _, among in places])
            else:
                parts = [values if among is None else values[among] for _, _, among in places]
            for (_, rows, _), part, of in zip(places, parts, tensors):
                target = of[name]
                if isinstance(rows, slice):
                    targets.append(target[rows] if at is None else target[rows, at])
                    sources.append(part)
                elif at is None:
                    put_at(target, rows, part.to(target.dtype))
                else:
                    target[rows, at] = part.to(target.dtype)
        if targets:
            torch._foreach_copy_(targets, sources)

    def _whole(self, count: int, fields: Mapping[str, Sequence[torch.Tensor]]) -> torch.Tensor:
        """Records of so many pages, in bytes."""
        return records_of(self.layout, {name: joined(x).reshape(count, -1) for name, x in fields.items()})

    def _scatter(self, pages: np.ndarray, fields: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """`write_fields` of whole pages in several slabs."""
        if self.layout.record and len(fields) == len(self.layout.fields):
            first = self.layout.fields[0].name
            loaded("move.triton").scatter(self._there(first, pages), self._whole(len(pages), fields))
            return
        for part in self.layout.fields:
            if part.name in fields:
                values = joined(fields[part.name]).reshape(len(pages), -1).to(part.dtype).contiguous()
                loaded("move.triton").scatter(self._there(part.name, pages), values)

    def read_tokens(self, name: str, pages: np.ndarray, slots: np.ndarray) -> torch.Tensor:
        """One token of each of `pages`, that in its slot `slots`: `[len(pages), *shape[1:]]`."""
        size = self._nbytes[name] // self.layout.tokens
        if size % _UNIT == 0 and self._far(pages):
            like = self._slab_of(pages).tensors[name]
            found = loaded("move.triton").gather(self._there(name, pages, slots * size), size)
            return found.view(like.dtype).view(len(pages), *like.shape[2:])
        places = self._indexed(pages, slots)
        return rows_from(((where, _tokens(x, name).index_select(0, at)) for x, at, where in places), len(pages))

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
        size = self._nbytes[name] // self.layout.tokens
        if size % _UNIT == 0 and self._far(pages):
            values = values.to(self._slab_of(pages).tensors[name].dtype).contiguous()
            loaded("move.triton").scatter(self._there(name, pages, slots * size), values)
            return
        for slab, at, where in self._indexed(pages, slots):
            put_at(_tokens(slab, name), at, values if where is None else values[where])

    def copy(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy whole pages."""
        self.write_fields(target, {name: [x] for name, x in self.copies(source).items()})


def by_address(device: torch.device) -> bool:
    """Whether a kernel reads and writes what lies anywhere in memory."""
    return device.type == "cuda" and choose(device).triton


def _records(slab: Slab) -> torch.Tensor:
    assert slab.records is not None
    return slab.records


def _tokens(slab: Slab, name: str) -> torch.Tensor:
    """Of a slab of no records."""
    return slab.tensors[name].flatten(0, 1)


def _grid(field: torch.Tensor, location: Location) -> torch.Tensor:
    """A field of the pages of a regular grid: a view `[rows, columns, *shape]`."""
    page, *inner = field.stride()
    rows, columns = location.strides
    start = field.storage_offset() + location.first * page
    return field.as_strided((*location.shape, *field.shape[1:]), (rows * page, columns * page, *inner), start)
