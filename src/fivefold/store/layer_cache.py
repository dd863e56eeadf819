"""The tiers of one layer, for every sequence and KV head of a batch.

A *row* is one (sequence, kv head). Rows whose `Geometry` is equal form a `Cohort`: their page tables are one
array, and everything that happens to them (append, pack, evict, attend) is one tensor operation. A batch
without padding and without per-head policies is a single cohort.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from fivefold.errors import CacheStateError
from fivefold.store.pages import Budget, Field, Location, PageLayout, PagePool
from fivefold.store.tiers import PAGE, Extent, Geometry, Packing

if TYPE_CHECKING:
    from fivefold.methods.base import Codec


# Numbers of one field that are gathered at a time where pages do not lie in a row: small enough for the
# processor's cache.
GATHERED = 1 << 19


@dataclass(frozen=True)
class LayerSpec:
    """What a method may know about the layer it works for."""

    layer: int
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    model: str = ""


def exact_layout(head_dim: int, dtype: torch.dtype) -> PageLayout:
    """Pages of the exact tier: keys (after RoPE) and values as the model made them."""
    return PageLayout(
        "exact",
        PAGE,
        (
            Field("keys", (PAGE, head_dim), dtype, "exact"),
            Field("values", (PAGE, head_dim), dtype, "exact"),
        ),
    )


class Pools:
    """The pools of one cache: one per page layout, under one byte cap. Forks of a cache share them."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.budget = Budget(max_bytes)
        self._pools: dict[tuple[PageLayout, torch.device], PagePool] = {}

    def of(self, layout: PageLayout, device: torch.device) -> PagePool:
        key = (layout, device)
        if key not in self._pools:
            self._pools[key] = PagePool(layout, device, self.budget)
        return self._pools[key]

    def __iter__(self) -> Iterator[PagePool]:
        return iter(self._pools.values())


class Cohort:
    """Rows of equal geometry and their pages.

    rows: int64 `[rows]`, index `sequence * kv_heads + kv_head`, ascending.
    exact: int64 `[rows, pinned_pages + window_pages]` page ids; packed and own: `[rows, packed_pages]`.
    Whoever changes `exact` calls `touched_exact`, and whoever changes `packed` or `own`, `touched_packed`:
    what was worked out from the tables is then worked out anew.
    """

    __slots__ = (
        "exact", "exact_blocks", "exact_table", "geometry", "own", "packed", "packed_blocks", "packed_table", "rows",
        "rows_tensor", "shared", "tail",
    )  # fmt: skip

    def __init__(
        self,
        rows: np.ndarray,
        geometry: Geometry,
        exact: np.ndarray,
        packed: np.ndarray,
        own: np.ndarray,
        shared: bool = False,
    ) -> None:
        self.rows = rows
        self.geometry = geometry
        self.exact = exact
        self.packed = packed
        self.own = own
        self.rows_tensor = torch.from_numpy(rows)
        # Pages may be held by somebody else too, so writing looks at their references first.
        self.shared = shared
        self.touched_exact()
        self.touched_packed()

    def touched_exact(self) -> None:
        self.exact_blocks: list[tuple[int, int, Location]] | None = None
        self.exact_table: torch.Tensor | None = None  # addresses of pages, for kernels
        self.tail: tuple[torch.Tensor, torch.Tensor] | None = None

    def touched_packed(self) -> None:
        self.packed_blocks: list[tuple[int, int, Location, Location | None]] | None = None
        self.packed_table: torch.Tensor | None = None

    def pick(self, rows: np.ndarray, index: np.ndarray, shared: bool) -> Cohort:
        """The pages of the rows `index` of this cohort, now called `rows`."""
        return Cohort(rows, self.geometry, self.exact[index], self.packed[index], self.own[index], shared)


def _blocks(ids: np.ndarray, longest: int, shortest: int = 8) -> list[tuple[int, int]]:
    """Split the columns of a page table into blocks of at most `longest`.

    Runs of pages that are consecutive in every row get blocks of their own, unless they are shorter than
    `shortest`.
    """
    columns = ids.shape[1]
    if columns == 0:
        return []
    breaks = np.flatnonzero((np.diff(ids, axis=1) != 1).any(axis=0)) + 1
    edges = [0, *breaks.tolist(), columns]
    out: list[tuple[int, int]] = []
    joinable = False
    for start, stop in pairwise(edges):
        short = stop - start < shortest
        if short and joinable and stop - out[-1][0] <= longest:
            out[-1] = (out[-1][0], stop)
        else:
            out.extend((first, min(first + longest, stop)) for first in range(start, stop, longest))
        joinable = short
    return out


class LayerCache:
    """One layer's keys and values in tiers.

    Args:
        spec: the layer.
        pools: where pages come from; shared by the layers and the forks of a cache.
        extents: what each KV head holds.
        codec: how tokens older than `residual` are packed; None keeps all exact.
        residual: tokens that always stay exact.
    """

    def __init__(
        self,
        spec: LayerSpec,
        pools: Pools,
        extents: Sequence[Extent],
        codec: Codec | None = None,
        residual: int = 0,
    ) -> None:
        if len(extents) != spec.kv_heads:
            raise ValueError(f"{len(extents)} extents for {spec.kv_heads} kv heads")
        self.spec = spec
        self.pools = pools
        self.extents = tuple(extents)
        self.codec = codec
        self.packing = None if codec is None else Packing(codec.group, residual, codec.layout.tokens)
        self.exact_pool = pools.of(exact_layout(spec.head_dim, spec.dtype), spec.device)
        self.packed_pool: PagePool | None = None
        self.own_pool: PagePool | None = None
        if codec is not None:
            shared, own = codec.layout.split()
            self.packed_pool = pools.of(shared, spec.device)
            self.own_pool = None if own is None else pools.of(own, spec.device)
        self.batch = 0
        self.cohorts: list[Cohort] = []

    # -- sequences ----------------------------------------------------------------------------------------

    def start(self, batch: int) -> None:
        """Begin `batch` empty sequences."""
        assert not self.cohorts
        self.batch = batch
        heads = self.spec.kv_heads
        for extent in dict.fromkeys(self.extents):
            mine = np.array([h for h in range(heads) if self.extents[h] == extent], dtype=np.int64)
            rows = (np.arange(batch, dtype=np.int64)[:, None] * heads + mine).reshape(-1)
            empty = np.empty((len(rows), 0), dtype=np.int64)
            self.cohorts.append(Cohort(rows, Geometry(extent), empty, empty, empty))

    def lengths(self) -> np.ndarray:
        """Tokens seen by each sequence: int64 `[batch]`."""
        out = np.zeros(self.batch, dtype=np.int64)
        for cohort in self.cohorts:
            out[cohort.rows // self.spec.kv_heads] = cohort.geometry.length
        return out

    def split_by(self, tokens: np.ndarray) -> list[tuple[Cohort, int]]:
        """Cohorts with how many tokens each is about to receive, split where `tokens: [batch]` differ."""
        if (tokens == tokens[0]).all():
            return [(cohort, int(tokens[0])) for cohort in self.cohorts]
        out: list[tuple[Cohort, int]] = []
        for cohort in self.cohorts:
            per_row = tokens[cohort.rows // self.spec.kv_heads]
            for count in np.unique(per_row):
                pick = np.flatnonzero(per_row == count)
                out.append((cohort.pick(cohort.rows[pick], pick, cohort.shared), int(count)))
        self.cohorts = [cohort for cohort, _ in out]
        return out

    def free(self) -> None:
        """Give every page back."""
        for cohort in self.cohorts:
            self._release(cohort.exact, cohort.packed, cohort.own)
        self.cohorts = []
        self.batch = 0

    def _release(self, exact: np.ndarray, packed: np.ndarray, own: np.ndarray) -> None:
        self.exact_pool.release(exact)
        if self.packed_pool is not None:
            self.packed_pool.release(packed)
        if self.own_pool is not None:
            self.own_pool.release(own)

    def _retain(self, exact: np.ndarray, packed: np.ndarray, own: np.ndarray) -> None:
        self.exact_pool.retain(exact)
        if self.packed_pool is not None:
            self.packed_pool.retain(packed)
        if self.own_pool is not None:
            self.own_pool.retain(own)

    def select(self, sequences: np.ndarray) -> None:
        """Sequence i becomes what sequence `sequences[i]` was: repeats share pages, absent ones are freed."""
        old = self.cohorts
        kept = self._pick(sequences)
        for cohort in kept:
            self._retain(cohort.exact, cohort.packed, cohort.own)
        for cohort in old:
            self._release(cohort.exact, cohort.packed, cohort.own)
        self.cohorts = kept
        self.batch = len(sequences)

    def _pick(self, sequences: np.ndarray) -> list[Cohort]:
        heads = self.spec.kv_heads
        source = (sequences[:, None] * heads + np.arange(heads)).reshape(-1)
        out = []
        for cohort in self.cohorts:
            place = np.full(self.batch * heads, -1, dtype=np.int64)
            place[cohort.rows] = np.arange(len(cohort.rows))
            rows = np.flatnonzero(place[source] >= 0)
            if len(rows):
                out.append(cohort.pick(rows, place[source[rows]], shared=True))
        return out

    def fork(self) -> LayerCache:
        """A second cache of the same tokens that shares every page until either writes."""
        twin = LayerCache(self.spec, self.pools, self.extents, self.codec, self.packing.residual if self.packing else 0)
        twin.batch = self.batch
        for cohort in self.cohorts:
            cohort.shared = True
        twin.cohorts = self._pick(np.arange(self.batch)) if self.batch else []
        for cohort in twin.cohorts:
            self._retain(cohort.exact, cohort.packed, cohort.own)
        return twin

    def share_packed(self, other: LayerCache) -> None:
        """Replace this layer's packed pages by `other`'s, keeping the fields marked `own`.

        For methods that let layers share storage; both layers must have equal geometry and layouts.
        """
        assert self.packed_pool is other.packed_pool and self.packed_pool is not None
        alike = len(self.cohorts) == len(other.cohorts) and all(
            mine.geometry == theirs.geometry and np.array_equal(mine.rows, theirs.rows)
            for mine, theirs in zip(self.cohorts, other.cohorts)
        )
        if not alike:
            raise CacheStateError("layers can share packed pages only where they hold the same tokens.")
        for mine, theirs in zip(self.cohorts, other.cohorts):
            self.packed_pool.retain(theirs.packed)
            self.packed_pool.release(mine.packed)
            mine.packed = theirs.packed.copy()
            mine.touched_packed()
            theirs.shared = True
            mine.shared = True

    # -- tokens -------------------------------------------------------------------------------------------

    def demand(self, tokens: np.ndarray, horizon: int = 0) -> dict[PagePool, tuple[int, int]]:
        """(pages taken, pages given back after that) per pool if `tokens: [batch]` more arrive.

        Never less taken, nor more given back, than will be.
        """
        out: dict[PagePool, tuple[int, int]] = {}

        def note(pool: PagePool, fresh: int, opened: np.ndarray | None, dropped: np.ndarray | None) -> None:
            """`opened` pages are written to, which copies shared ones; dropping those frees nothing."""
            copied = 0 if opened is None else int((pool.references(opened) > 1).sum())
            freed = 0 if dropped is None else int((pool.references(dropped) == 1).sum())
            before = out.get(pool, (0, 0))
            out[pool] = before[0] + max(0, fresh) + copied, before[1] + freed

        for cohort in self.cohorts:
            old = cohort.geometry
            per_row = tokens[cohort.rows // self.spec.kv_heads]
            for count in set(per_row.tolist()):
                rows = np.flatnonzero(per_row == count)
                added = old.appended(count)
                new = added.settled(self.packing, horizon)
                # A token alone passes through the exact tier; a chunk goes straight to where it belongs.
                late = new if count > 1 else added
                gone = min(old.window_pages, (new.exact_base - old.exact_base) // PAGE)
                before = old.pinned_pages + old.window_pages - (gone if count > 1 else 0)
                note(
                    self.exact_pool,
                    len(rows) * (late.pinned_pages + late.window_pages - before),
                    cohort.exact[rows, -1] if cohort.shared and old.length % PAGE else None,
                    cohort.exact[rows, old.pinned_pages : old.pinned_pages + gone] if count and gone else None,
                )
                for pool, table in ((self.packed_pool, cohort.packed), (self.own_pool, cohort.own)):
                    if pool is not None and self.packing is not None:
                        gone, columns = self._packed_columns(old, new), table.shape[1]
                        open_page = cohort.shared and columns > 0 and new.packed_stop > old.packed_stop
                        note(
                            pool,
                            len(rows) * (new.packed_pages(self.packing) - (columns - gone)),
                            table[rows, -1] if open_page else None,
                            table[rows, :gone] if count and gone else None,
                        )
        return out

    def _packed_columns(self, old: Geometry, new: Geometry) -> int:
        """How many packed pages at the front of a row are given up between two geometries."""
        assert self.packing is not None
        columns = old.packed_pages(self.packing)
        if new.packed_stop == new.packed_base or new.packed_base >= old.packed_stop:
            return columns
        return min(columns, (new.packed_base - old.packed_base) // self.packing.page)

    def append(
        self,
        cohort: Cohort,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        settle: bool = True,
        horizon: int = 0,
    ) -> None:
        """Take a chunk's tokens into the tiers, then let the policy move what is due.

        keys, values: `[rows of the cohort, tokens, head_dim]`, or None to only settle. The newest `horizon`
        tokens may be taken back: nothing is moved on their account.
        """
        old = cohort.geometry
        tokens = 0 if keys is None else keys.shape[1]
        if tokens == 1 and not settle and keys is not None and values is not None and self._put(cohort, keys, values):
            return
        new = old.appended(tokens)
        if settle:
            new = new.settled(self.packing, horizon)
        if new == old:
            return
        if self.packing is not None and (new.packed_stop, new.packed_base) != (
            old.packed_stop,
            old.packed_base,
        ):
            self._repack(cohort, old, new, keys, values)
        self._rewindow(cohort, old, new, keys, values)
        cohort.geometry = new

    def _put(self, cohort: Cohort, keys: torch.Tensor, values: torch.Tensor) -> bool:
        """One token into the open exact page of each row, as nearly always; False if that cannot be done."""
        slot = cohort.geometry.length % PAGE
        if slot == 0 or cohort.exact.shape[1] == 0:
            return False
        if cohort.tail is None:
            # Whoever shares the pages from now on resets the tail, so one look at the references is enough.
            if cohort.shared and (self.exact_pool.references(cohort.exact[:, -1]) > 1).any():
                return False
            location = self.exact_pool.locate(cohort.exact[:, -1:])
            if location.slab is None:
                return False
            cohort.tail = (
                self.exact_pool.fetch("keys", location)[:, 0],
                self.exact_pool.fetch("values", location)[:, 0],
            )
        cohort.tail[0][:, slot].copy_(keys[:, 0])
        cohort.tail[1][:, slot].copy_(values[:, 0])
        cohort.geometry = cohort.geometry.appended(1)
        return True

    def _repack(
        self,
        cohort: Cohort,
        old: Geometry,
        new: Geometry,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> None:
        """Drop packed pages that slid out of the window; encode the groups that became due."""
        assert self.packing is not None and self.codec is not None and self.packed_pool is not None
        gone = self._packed_columns(old, new)
        columns = cohort.packed.shape[1]
        fresh = new.packed_pages(self.packing) - (columns - gone)
        page, rows = self.packing.page, len(cohort.rows)
        position = old.packed_stop if gone < columns else new.packed_base
        # Whole runs of fresh pages in bounded pieces; the rest of an open page first.
        step = max(1, (1 << 21) // (page * rows * self.spec.head_dim)) * page
        try:
            cohort.packed = self._widen(self.packed_pool, cohort.packed, fresh)
            if self.own_pool is not None:
                cohort.own = self._widen(self.own_pool, cohort.own, fresh)
            while position < new.packed_stop:
                column, slot = divmod(position - new.packed_base, page)
                stop = min(new.packed_stop, position - slot + (page if slot else step))
                chunk_keys, chunk_values = self._collect(cohort, old, position, stop, keys, values)
                last = -(-(stop - new.packed_base) // page)
                self._encode(cohort, gone + column, gone + last, slot, chunk_keys, chunk_values)
                position = stop
        except BaseException:
            self._drop_packed(cohort, slice(columns, None))
            raise
        self._drop_packed(cohort, slice(0, gone))

    @staticmethod
    def _widen(pool: PagePool, table: np.ndarray, columns: int) -> np.ndarray:
        """A table with so many fresh columns more."""
        if columns == 0:
            return table
        fresh = pool.allocate(len(table) * columns).reshape(len(table), columns)
        return np.concatenate([table, fresh], axis=1)

    def _drop_packed(self, cohort: Cohort, columns: slice) -> None:
        """Give up packed pages."""
        self._release(cohort.exact[:, :0], cohort.packed[:, columns], cohort.own[:, columns])
        cohort.packed = np.delete(cohort.packed, columns, axis=1)
        cohort.own = np.delete(cohort.own, columns, axis=1)
        cohort.touched_packed()

    def _collect(
        self,
        cohort: Cohort,
        old: Geometry,
        start: int,
        stop: int,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions start..stop, from pages and the chunk: `[rows, tokens, head_dim]`."""
        parts = []
        if start < old.length:
            first = old.pinned_pages + (start - old.exact_base) // PAGE
            last = old.pinned_pages + -(-(min(stop, old.length) - old.exact_base) // PAGE)
            begin = (start - old.exact_base) % PAGE
            size = min(stop, old.length) - start
            pages = cohort.exact[:, first:last]
            parts.append(
                [
                    self.exact_pool.read(name, pages).reshape(len(cohort.rows), -1, self.spec.head_dim)[
                        :, begin : begin + size
                    ]
                    for name in ("keys", "values")
                ]
            )
        if stop > old.length:
            assert keys is not None and values is not None
            window = slice(max(0, start - old.length), stop - old.length)
            parts.append([keys[:, window], values[:, window]])
        if len(parts) == 1:
            return parts[0][0], parts[0][1]
        return torch.cat([parts[0][0], parts[1][0]], 1), torch.cat([parts[0][1], parts[1][1]], 1)

    def _encode(
        self, cohort: Cohort, first: int, last: int, slot: int, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        """Encode tokens into columns first..last of the packed table, from `slot` of the first page on."""
        assert self.packing is not None and self.codec is not None and self.packed_pool is not None
        rows, page, dim = len(cohort.rows), self.packing.page, self.spec.head_dim
        columns, tokens = last - first, keys.shape[1]
        opened = None
        if slot:
            opened = {name: field[:, 0] for name, field in self.packed_fields(cohort, first, last).items()}
            if cohort.shared:
                cohort.packed[:, first] = self.packed_pool.unshare(cohort.packed[:, first])
                if self.own_pool is not None:
                    cohort.own[:, first] = self.own_pool.unshare(cohort.own[:, first])
        whole = tokens // page if not slot else 0
        pieces = [(first, whole, keys[:, : whole * page], values[:, : whole * page])] if whole else []
        if tokens > whole * page:
            pieces.append((first + whole, columns - whole, keys[:, whole * page :], values[:, whole * page :]))
        for column, count, piece_keys, piece_values in pieces:
            fields = self.codec.encode(
                piece_keys.reshape(rows * count, -1, dim),
                piece_values.reshape(rows * count, -1, dim),
                slot,
                opened,
            )
            pages = cohort.packed[:, column : column + count].reshape(-1)
            for part in self.packed_pool.layout.fields:
                self.packed_pool.write(part.name, pages, fields[part.name])
            if self.own_pool is not None:
                pages = cohort.own[:, column : column + count].reshape(-1)
                for part in self.own_pool.layout.fields:
                    self.own_pool.write(part.name, pages, fields[part.name])

    def _rewindow(
        self,
        cohort: Cohort,
        old: Geometry,
        new: Geometry,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> None:
        """Give up exact pages that were packed or slid out of the window; write the chunk into the others."""
        pool, rows = self.exact_pool, len(cohort.rows)
        dropped = min(old.window_pages, (new.exact_base - old.exact_base) // PAGE)
        if dropped:
            gone = slice(old.pinned_pages, old.pinned_pages + dropped)
            pool.release(cohort.exact[:, gone])
            cohort.exact = np.delete(cohort.exact, gone, axis=1)
        if keys is None or values is None:
            if dropped:
                cohort.touched_exact()
            return
        before = cohort.exact.shape[1]
        fresh = new.pinned_pages - old.pinned_pages + new.window_pages - (before - old.pinned_pages)
        cohort.exact = self._widen(pool, cohort.exact, fresh)
        if fresh or dropped:
            cohort.touched_exact()
        # Pinned pages come first in the table, and window pages exist only once those are full.
        pinned_stop = new.extent.pinned * PAGE
        for start, stop, column_zero, base in (
            (old.length, min(new.length, pinned_stop), 0, 0),
            (max(old.length, new.exact_base), new.length, new.pinned_pages, new.exact_base),
        ):
            position = start
            while position < stop:
                column, slot = divmod(position - base, PAGE)
                column += column_zero
                if slot or stop - position < PAGE:
                    count = min(PAGE - slot, stop - position)
                    if slot and cohort.shared:
                        cohort.exact[:, column] = pool.unshare(cohort.exact[:, column])
                        cohort.touched_exact()
                    pages, at = cohort.exact[:, column], slice(slot, slot + count)
                    shape = (rows, count, self.spec.head_dim)
                else:
                    columns = (stop - position) // PAGE
                    count = columns * PAGE
                    pages, at = cohort.exact[:, column : column + columns], None
                    shape = (rows * columns, PAGE, self.spec.head_dim)
                window = slice(position - old.length, position - old.length + count)
                pool.write("keys", pages, keys[:, window].reshape(shape), at)
                pool.write("values", pages, values[:, window].reshape(shape), at)
                position += count

    def plan_crop(self, tokens: int) -> tuple[list[Geometry], int]:
        """What `crop` would make of each cohort, and how many exact pages it would take at most.

        Raises `CacheStateError` where it would.
        """
        plans, missing = [], 0
        for cohort in self.cohorts:
            new = cohort.geometry.cropped(min(tokens, cohort.geometry.length), self.packing)
            if new is None:
                raise CacheStateError(
                    f"cannot take back {tokens} tokens: heads with a window of "
                    f"{cohort.geometry.extent.recent} tokens have already given up what they would have to "
                    "show again; fork() the cache before the tokens that may be taken back."
                )
            plans.append(new)
            if new.exact_base < cohort.geometry.exact_base:
                freed = self.exact_pool.references(cohort.exact[:, new.pinned_pages :]) == 1
                missing += max(0, len(cohort.rows) * new.window_pages - int(freed.sum()))
        return plans, missing

    def crop(self, tokens: int) -> None:
        """Forget the last `tokens` tokens of every sequence (all of one that has fewer).

        Tokens that were packed stay as lossy as they were packed. Raises `CacheStateError`, changing nothing,
        where a head has already given up tokens that it would have to show again, and `CacheFullError`
        likewise where the cap has no room for tokens of a packed group that come back to the exact tier.
        """
        plans, missing = self.plan_crop(tokens)
        self.pools.budget.reserve({self.exact_pool: missing})
        for cohort, new in zip(self.cohorts, plans):
            self._crop(cohort, new)

    def _crop(self, cohort: Cohort, new: Geometry) -> None:
        old, rows = cohort.geometry, len(cohort.rows)
        unpacked = None
        if new.exact_base < min(old.exact_base, new.length):
            # The crop ends inside a packed group: its first tokens go back to the exact tier, as decoded.
            assert self.packing is not None and self.codec is not None
            column, slot = divmod(new.packed_stop - new.packed_base, self.packing.page)
            fields = self.packed_fields(cohort, column, column + 1)
            keys, values = self.codec.decode({name: field.flatten(0, 1) for name, field in fields.items()})
            unpacked = slice(slot, slot + new.length - new.packed_stop)
        # Where packed groups go, so does every page after them.
        keep = new.pinned_pages + (new.window_pages if new.exact_base == old.exact_base else 0)
        self.exact_pool.release(cohort.exact[:, keep:])
        cohort.exact = cohort.exact[:, :keep]
        cohort.touched_exact()
        self._drop_packed(cohort, slice(new.packed_pages(self.packing), None))
        cohort.geometry = new
        if unpacked is not None:
            cohort.geometry = replace(new, length=new.packed_stop)
            self.append(
                cohort,
                keys[:, unpacked].to(self.spec.dtype).reshape(rows, -1, self.spec.head_dim),
                values[:, unpacked].to(self.spec.dtype).reshape(rows, -1, self.spec.head_dim),
                settle=False,
            )

    # -- reading ------------------------------------------------------------------------------------------

    def exact_blocks(self, cohort: Cohort) -> list[tuple[int, int, Location]]:
        """(first column, last column, location) of blocks that cover the exact tier."""
        if cohort.exact_blocks is None:
            longest = max(1, GATHERED // (PAGE * len(cohort.rows) * self.spec.head_dim))
            cohort.exact_blocks = []
            for first, last in _blocks(cohort.exact, cohort.exact.shape[1]):
                whole = self.exact_pool.locate(cohort.exact[:, first:last])
                if whole.slab is not None and whole.strides[1] == 1:
                    cohort.exact_blocks.append((first, last, whole))
                    continue
                for start in range(first, last, longest):
                    stop = min(start + longest, last)
                    location = self.exact_pool.locate(cohort.exact[:, start:stop])
                    cohort.exact_blocks.append((start, stop, location))
        return cohort.exact_blocks

    def exact(self, name: str, location: Location) -> torch.Tensor:
        """Keys or values of a block of the exact tier, a view if it can be: `[rows, tokens, head_dim]`."""
        return self.exact_pool.fetch(name, location).flatten(1, 2)

    def packed_blocks(self, cohort: Cohort, numbers: int) -> list[tuple[int, int, Location, Location | None]]:
        """(first column, last column, location, own location) of blocks that cover the packed tier.

        Each is of at most about `numbers` keys times channels.
        """
        assert self.packed_pool is not None and self.packing is not None
        if cohort.packed_blocks is None:
            longest = max(1, numbers // (self.packing.page * len(cohort.rows) * self.spec.head_dim))
            cohort.packed_blocks = []
            for first, last in _blocks(cohort.packed, longest):
                own = None if self.own_pool is None else self.own_pool.locate(cohort.own[:, first:last])
                location = self.packed_pool.locate(cohort.packed[:, first:last])
                cohort.packed_blocks.append((first, last, location, own))
        return cohort.packed_blocks

    def packed(self, location: Location, own: Location | None) -> dict[str, torch.Tensor]:
        """Every field of a block of the packed tier: `[rows, columns, *shape]`."""
        assert self.packed_pool is not None
        out = {part.name: self.packed_pool.fetch(part.name, location) for part in self.packed_pool.layout.fields}
        if own is not None and self.own_pool is not None:
            for part in self.own_pool.layout.fields:
                out[part.name] = self.own_pool.fetch(part.name, own)
        return out

    def exact_positions(self, geometry: Geometry) -> torch.Tensor:
        """The position of every slot of the exact columns: int64 `[columns * PAGE]`."""
        pinned = torch.arange(geometry.pinned_pages * PAGE)
        window = torch.arange(geometry.window_pages * PAGE) + geometry.exact_base
        return torch.cat([pinned, window])

    def packed_fields(self, cohort: Cohort, first: int, last: int) -> dict[str, torch.Tensor]:
        """Every field of packed columns first..last: `[rows, columns, *shape]`."""
        assert self.packed_pool is not None
        own = None if self.own_pool is None else self.own_pool.locate(cohort.own[:, first:last])
        return self.packed(self.packed_pool.locate(cohort.packed[:, first:last]), own)

    @property
    def table_bytes(self) -> int:
        """Bytes of the page tables and of the indices worked out from them where pages are scattered."""
        tables = sum(c.rows.nbytes + c.exact.nbytes + c.packed.nbytes + c.own.nbytes for c in self.cohorts)
        located = [
            location
            for cohort in self.cohorts
            for block in (*(cohort.exact_blocks or ()), *(cohort.packed_blocks or ()))
            for location in block[2:]
            if location is not None
        ]
        indices = [index for location in located for part in location.parts for index in part[1:]]
        indices += [table for cohort in self.cohorts for table in (cohort.exact_table, cohort.packed_table)]
        return tables + sum(index.nbytes for index in indices if index is not None)
