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
from fivefold.store.context import Context, Rope, running
from fivefold.store.held import Held
from fivefold.store.pages import Budget, Field, Location, PageLayout, PagePool
from fivefold.store.rounded import RoundedPool, rounded_layout
from fivefold.store.tiers import PAGE, Extent, Geometry, Packing

if TYPE_CHECKING:
    from fivefold.methods.base import Codec, TokenPolicy


# Numbers of one field that are gathered at a time where pages do not lie in a row: small enough for the
# processor's cache.
GATHERED = 1 << 19


@dataclass(frozen=True)
class LayerSpec:
    """What a method may know about the layer it works for.

    rope: how its keys are turned by position; None where that is unknown, and then `no_rope` says why.
    """

    layer: int
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    model: str = ""
    config: str = ""
    rope: Rope | None = None
    no_rope: str = "its rotary embedding is not known"


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
            kind = PagePool if layout.holds is None else RoundedPool
            self._pools[key] = kind(layout, device, self.budget)
        return self._pools[key]

    def __iter__(self) -> Iterator[PagePool]:
        return iter(self._pools.values())


class Cohort:
    """Rows of equal geometry and their pages.

    rows: int64 `[rows]`, index `sequence * kv_heads + kv_head`, ascending.
    exact: int64 `[rows, pinned_pages + window_pages]` page ids (and one more column where a token has just gone and
    the next is due); packed and own: `[rows, packed_pages]`. held: with a policy that chooses, what it knows.
    offset: with a contextual codec, int64 `[rows]`: the position that the model gave a row's first token.
    learned: what that codec knows of the rows, `[rows, ...]` each.
    Whoever changes `exact` calls `touched_exact`, and whoever changes `packed` or `own`, `touched_packed`:
    what was worked out from the tables is then worked out anew.
    """

    __slots__ = (
        "exact", "exact_blocks", "exact_fixed", "exact_table", "geometry", "held", "learned", "offset", "own", "packed",
        "packed_blocks", "packed_fixed", "packed_table", "rows", "rows_tensor", "shared", "tail",
    )  # fmt: skip

    def __init__(
        self,
        rows: np.ndarray,
        geometry: Geometry,
        exact: np.ndarray,
        packed: np.ndarray,
        own: np.ndarray,
        shared: bool = False,
        held: Held | None = None,
        offset: np.ndarray | None = None,
        learned: dict[str, torch.Tensor] | None = None,
    ) -> None:
        self.rows = rows
        self.held = held
        self.offset = offset
        self.learned = learned or {}
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
        self.exact_fixed: object | None = None  # the `FixedTables` that know them
        self.tail: list[torch.Tensor] | None = None

    def touched_packed(self) -> None:
        self.packed_blocks: list[tuple[int, int, Location, Location | None]] | None = None
        self.packed_table: torch.Tensor | None = None
        self.packed_fixed: object | None = None

    def pick(self, rows: np.ndarray, index: np.ndarray, shared: bool) -> Cohort:
        """The pages of the rows `index` of this cohort, now called `rows`."""
        held = self.held
        if held is not None:
            device = held.positions.device
            held = held.pick(torch.from_numpy(index).to(device), torch.from_numpy(rows).to(device))
        learned = {name: x[torch.from_numpy(index).to(x.device)] for name, x in self.learned.items()}
        tables = self.exact[index], self.packed[index], self.own[index]
        offset = None if self.offset is None else self.offset[index]
        return Cohort(rows, self.geometry, *tables, shared, held, offset, learned)


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
        policy: chooses the tokens of the heads that no extent limits; None holds all.
    """

    def __init__(
        self,
        spec: LayerSpec,
        pools: Pools,
        extents: Sequence[Extent],
        codec: Codec | None = None,
        residual: int = 0,
        policy: TokenPolicy | None = None,
    ) -> None:
        if len(extents) != spec.kv_heads:
            raise ValueError(f"{len(extents)} extents for {spec.kv_heads} kv heads")
        self.spec = spec
        self.pools = pools
        self.extents = tuple(extents)
        self.codec = codec
        self.policy = policy
        self.packing = None if codec is None else Packing(codec.group, residual, codec.layout.tokens)
        rounded = policy is not None and policy.high == 8
        layout = rounded_layout(PAGE, spec.head_dim, spec.dtype) if rounded else exact_layout(spec.head_dim, spec.dtype)
        self.exact_pool = pools.of(layout, spec.device)
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
            held = None
            if self.policy is not None and extent.recent is None:
                held = Held.empty(self.spec.layer, heads, torch.from_numpy(rows).to(self.spec.device))
            self.cohorts.append(Cohort(rows, Geometry(extent), empty, empty, empty, held=held))

    def lengths(self) -> np.ndarray:
        """Tokens seen by each sequence: int64 `[batch]`."""
        out = np.zeros(self.batch, dtype=np.int64)
        for cohort in self.cohorts:
            out[cohort.rows // self.spec.kv_heads] = cohort.geometry.seen
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
                out.append(cohort.pick(rows, place[source[rows]], True))
        return out

    def fork(self) -> LayerCache:
        """A second cache of the same tokens that shares every page until either writes."""
        residual = self.packing.residual if self.packing else 0
        twin = LayerCache(self.spec, self.pools, self.extents, self.codec, residual, self.policy)
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
                if cohort.held is not None:
                    for needed, fresh in self._held_demand(cohort, rows, count, horizon):
                        note(needed, fresh, None, None)
                    continue
                added = old.appended(count)
                new = added.settled(self._packing_of(cohort), horizon)
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

    def _held_demand(
        self, cohort: Cohort, rows: np.ndarray, count: int, horizon: int
    ) -> Iterator[tuple[PagePool, int]]:
        """Pages per pool that rows whose tokens a policy chooses may take for `count` more tokens.

        Choosing anew writes everything anew, after giving back what nobody else holds.
        """
        assert self.policy is not None and cohort.held is not None
        old = cohort.geometry
        new = old.appended(count)
        if count > 1 and self.policy.evicts and not self.policy.waits:
            seen = cohort.held.seen + count
            room = self._room(replace(cohort.held, prompt=seen, seen=seen), horizon)
            new = Geometry(old.extent, min(new.length, room))
        after = replace(cohort.held, seen=cohort.held.seen + count)
        settled = new.settled(self._packing_of(cohort, after), horizon)
        late = new if count == 1 or self.policy.waits else settled
        packed = settled.packed_pages(self.packing)
        needs: list[tuple[PagePool | None, np.ndarray, int]] = [
            (self.exact_pool, cohort.exact, late.window_pages),
            (self.packed_pool, cohort.packed, packed),
            (self.own_pool, cohort.own, packed),
        ]
        for pool, table, pages in needs:
            if pool is not None:
                yield pool, len(rows) * pages - int((pool.references(table[rows]) == 1).sum())

    def _packing_of(self, cohort: Cohort, held: Held | None = None) -> Packing | None:
        """How the rows of a cohort pack; held: as they will be, if not as they are."""
        policy, held = self.policy, held or cohort.held
        if self.packing is None or policy is None or not policy.demotes:
            return self.packing
        residual = policy.residual(cohort.geometry.extent) if held is None else policy.budget(held)
        return replace(self.packing, residual=residual)

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
        observed: torch.Tensor | None = None,
    ) -> None:
        """Take a chunk's tokens into the tiers, then let the policy move what is due.

        keys, values: `[rows of the cohort, tokens, head_dim]`, or None to only settle. The newest `horizon`
        tokens may be taken back: nothing is moved on their account. observed: what the policy made of the chunk's
        attention, float32 `[rows, slots]`, the chunk's own slots last.
        """
        if cohort.held is not None:
            self._append_held(cohort, keys, values, settle, horizon, observed)
        else:
            self._append(cohort, keys, values, settle, horizon)

    def _append(
        self,
        cohort: Cohort,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        settle: bool,
        horizon: int,
        held: Held | None = None,
    ) -> None:
        """`held`: as it will be afterwards, if not as it is."""
        old = cohort.geometry
        tokens = 0 if keys is None else keys.shape[1]
        if tokens == 1 and not settle and keys is not None and values is not None and self._put(cohort, keys, values):
            return
        new = old.appended(tokens)
        if settle:
            new = new.settled(self._packing_of(cohort, held), horizon)
        if new == old:
            return
        if self.packing is not None and (new.packed_stop, new.packed_base) != (
            old.packed_stop,
            old.packed_base,
        ):
            self._repack(cohort, old, new, keys, values, held or cohort.held)
        self._rewindow(cohort, old, new, keys, values)
        cohort.geometry = new

    # -- tokens that a policy chooses ---------------------------------------------------------------------

    def _room(self, held: Held, horizon: int) -> int:
        assert self.policy is not None
        return self.policy.budget(held) + horizon

    def _append_held(
        self,
        cohort: Cohort,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        settle: bool,
        horizon: int,
        observed: torch.Tensor | None,
    ) -> None:
        assert self.policy is not None and cohort.held is not None
        held = cohort.held
        if keys is None or values is None:
            self._trim(cohort, horizon)
            return
        tokens = keys.shape[1]
        after = held.arrived(tokens)
        if not settle:
            self._append(cohort, keys, values, False, horizon, after)
            cohort.held = replace(after, before=replace(held, before=None))
            return
        scores = after.scores if self.policy.accumulates else torch.zeros_like(after.scores)
        scores = scores if observed is None else scores + observed
        after = replace(after, scores=scores, prompt=after.seen, before=None)
        if self.policy.demotes:
            self._demote(cohort, after, horizon, keys, values)
        elif not self.policy.evicts or self.policy.waits or self._room(after, horizon) >= after.slots:
            self._append(cohort, keys, values, not (self.policy.evicts and self.policy.waits), horizon, after)
            cohort.held = after
        else:
            self._choose(cohort, after, horizon, keys, values)

    def observe(self, cohort: Cohort, weights: torch.Tensor) -> None:
        """Tell the policy of a decoding step's attention, `[rows, query_heads per kv head, slots]`."""
        assert self.policy is not None and cohort.held is not None
        held = cohort.held
        added = self.policy.observe(weights[:, :, None], held, held.seen - 1)
        cohort.held = replace(held, scores=held.scores + added)

    def _choose(
        self,
        cohort: Cohort,
        held: Held,
        horizon: int = 0,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> None:
        """Hold the policy's choice of what is stored and of a chunk; everything is written anew, by position."""
        assert self.policy is not None
        count = min(held.slots, self._room(held, horizon))
        priority = self.policy.priority(held, count - horizon)
        if horizon:
            priority = priority.masked_fill(held.newest(horizon), float("inf"))
        kept = torch.sort(priority, dim=1, descending=True, stable=True).indices[:, :count]
        kept = kept.gather(1, held.positions.gather(1, kept).argsort(1))
        if cohort.geometry.length:
            stored = self.dense(cohort)
            keys, values = (
                old if new is None else torch.cat([old, new], 1) for old, new in zip(stored, (keys, values))
            )
        assert keys is not None and values is not None
        extra = held.extra
        if self.policy.merges if held.prompt == held.seen else self.policy.merges_steps:
            keys, values, extra = self.policy.merge(held, keys.float(), values.float(), kept)
        else:
            index = kept[:, :, None].expand(-1, -1, self.spec.head_dim)
            keys, values = keys.gather(1, index), values.gather(1, index)
        self._release(cohort.exact, cohort.packed, cohort.own)
        cohort.exact, cohort.packed, cohort.own = cohort.exact[:, :0], cohort.packed[:, :0], cohort.own[:, :0]
        cohort.touched_exact()
        cohort.touched_packed()
        if self.policy.waits:
            self.pools.budget.trim()  # all layers have held the whole chunk
        cohort.geometry = Geometry(cohort.geometry.extent, evicted=held.seen - count)
        chosen = replace(held.chosen(kept), extra=extra, settled=held.seen - horizon)
        self._append(cohort, keys.to(self.spec.dtype), values.to(self.spec.dtype), True, horizon, chosen)
        cohort.held = chosen

    def _demote(
        self,
        cohort: Cohort,
        held: Held,
        horizon: int,
        keys: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> None:
        """Pack what the policy does not choose of the exact tier and of a chunk; what was packed before stays so."""
        assert self.policy is not None
        old, rows, stop = cohort.geometry, len(cohort.rows), cohort.geometry.packed_stop
        count = min(held.slots - stop, self._room(held, horizon))
        priority = self.policy.priority(held, count)[:, stop:]
        if horizon:
            priority = priority.masked_fill(held.newest(horizon)[:, stop:], float("inf"))
        best = torch.sort(priority, dim=1, descending=True, stable=True).indices[:, :count]
        stays = torch.zeros_like(priority, dtype=torch.int64).scatter_(1, best, 1)
        # Both parts by position, those that go into the packed tier first.
        order = (held.positions[:, stop:] + stays * (1 << 32)).argsort(1)
        chunk = []
        for name, new in (("keys", keys), ("values", values)):
            parts = [*self._exact_parts(cohort, name), *(() if new is None else (new,))]
            chunk.append(torch.cat(parts, 1).gather(1, order[:, :, None].expand(-1, -1, self.spec.head_dim)))
        self.exact_pool.release(cohort.exact)
        cohort.exact = np.empty((rows, 0), dtype=np.int64)
        cohort.touched_exact()
        cohort.geometry = replace(old, length=stop, exact_base=stop)
        first = torch.arange(stop, device=order.device).expand(rows, -1)
        held = replace(held.chosen(torch.cat([first, order + stop], 1)), settled=held.seen - horizon)
        self._append(cohort, chunk[0], chunk[1], True, horizon, held)
        cohort.held = held

    def choose_together(self, share: dict[int, float]) -> None:
        """What a policy that `waits` has chosen, after all layers have seen the chunk: `share` by sequence."""
        whole = self.cohorts
        self.cohorts = []
        for cohort in whole:
            if cohort.held is None:
                self.cohorts.append(cohort)
                continue
            shares = np.array([share[int(s)] for s in cohort.rows // self.spec.kv_heads])
            for value in np.unique(shares):
                rows = np.flatnonzero(shares == value)
                part = cohort
                if len(rows) < len(cohort.rows):
                    part = cohort.pick(cohort.rows[rows], rows, cohort.shared)
                assert part.held is not None
                part.held = replace(part.held, share=float(value))
                self.cohorts.append(part)
        for cohort in self.cohorts:
            if cohort.held is not None:
                if self._room(cohort.held, 0) < cohort.held.slots:
                    self._choose(cohort, cohort.held)
                else:
                    self._append(cohort, None, None, True, 0)

    def _trim(self, cohort: Cohort, horizon: int) -> None:
        """After decoding steps: back to the budget, and pack what is due."""
        assert self.policy is not None and cohort.held is not None
        held = replace(cohort.held, before=None)
        cohort.held = held
        old = cohort.geometry
        if self.policy.demotes:
            if old.settled(self._packing_of(cohort), horizon) != old:
                self._demote(cohort, held, horizon)
            return
        excess = 0
        if self.policy.evicts and self.policy.trims and held.prompt:
            excess = old.length - self._room(held, horizon)
        if excess <= 0:
            self._append(cohort, None, None, True, horizon)
        elif old.packed_stop:
            due = old.settled(self.packing, horizon).packed_stop - old.packed_stop
            if due and excess >= due:
                if self.policy.merges_steps:
                    self._choose(cohort, held, horizon)
                else:
                    self._pack_over(cohort, held, due)
            else:
                self._append(cohort, None, None, True, horizon)
        elif excess == 1 and horizon == 0:
            goes = self.policy.victims(held, self.policy.budget(held), 1)[:, 0]
            if self.policy.merges_steps:
                gone = self.tokens(cohort, goes[:, None])
                into, weights, extra = self.policy.merge_step(
                    held, self._exact_parts(cohort, "keys"), goes, gone[0][:, 0]
                )
                stays = self.tokens(cohort, into[:, None])
                merged = [weights[:, :1] * a[:, 0] + weights[:, 1:] * b[:, 0] for a, b in zip(stays, gone)]
                self._overwrite(cohort, into, merged[0], merged[1])
                held = replace(held, extra=extra)
            self._replace_by_last(cohort, held, goes)
        else:
            self._choose(cohort, held, horizon)

    def _replace_by_last(self, cohort: Cohort, held: Held, slots: torch.Tensor) -> None:
        """Give up one token of each row: the last one takes its slot, `[rows]`."""
        last = cohort.geometry.length - 1
        column = cohort.exact[:, last // PAGE]
        keys, values = (self.exact_pool.read(name, column)[:, last % PAGE].clone() for name in ("keys", "values"))
        self._overwrite(cohort, slots, keys, values)
        cohort.geometry = replace(cohort.geometry, length=last, evicted=cohort.geometry.evicted + 1)
        at = slots[:, None]
        cohort.held = replace(
            held,
            positions=held.positions.scatter(1, at, held.positions[:, -1:])[:, :-1],
            scores=held.scores.scatter(1, at, held.scores[:, -1:])[:, :-1],
            settled=held.seen,
        )

    def _overwrite(self, cohort: Cohort, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put tokens `[rows, head_dim]` into exact slots `[rows]`."""
        index, rows = slots.cpu().numpy(), np.arange(len(cohort.rows))
        column = index // PAGE
        if cohort.shared:
            before = cohort.exact[rows, column]
            own = self.exact_pool.unshare(before)
            if own is not before:
                cohort.exact[rows, column] = own
                cohort.touched_exact()
        for name, x in (("keys", keys), ("values", values)):
            self.exact_pool.write_tokens(name, cohort.exact[rows, column], index % PAGE, x.to(self.spec.dtype))

    def _pack_over(self, cohort: Cohort, held: Held, due: int) -> None:
        """Give up `due` of the packed tokens and of the `due` oldest exact ones, which take the places of those that
        go. Pages in which nothing changes are left alone."""
        assert self.policy is not None and self.codec is not None and self.packing is not None
        assert self.packed_pool is not None
        old, dim, page = cohort.geometry, self.spec.head_dim, self.packing.page
        stop = old.packed_stop
        among = torch.zeros_like(held.scores, dtype=torch.bool)
        among[:, : stop + due] = True
        victims = self.policy.victims(held, self.policy.budget(held), due, among)
        gone = torch.zeros_like(among).scatter_(1, victims, True)
        # Each row: as many tokens of the group stay as packed ones go; they are matched in order.
        goes = gone[:, :stop].cpu().numpy()
        stays = ~gone[:, stop : stop + due].cpu().numpy()
        row, slot = np.nonzero(goes)
        _, place = np.nonzero(stays)
        columns, first = np.unique(row * cohort.packed.shape[1] + slot // page), stop // page
        touched = [
            columns[columns % cohort.packed.shape[1] < first],
            columns[columns % cohort.packed.shape[1] >= first],
        ]
        group = [self.exact_pool.read(name, cohort.exact[:, : due // PAGE]) for name in ("keys", "values")]
        new = [x.reshape(len(cohort.rows), due, dim)[row, place] for x in group]
        rows_at, slots_at, places = (torch.from_numpy(x).to(held.scores.device) for x in (row, slot, place + stop))
        moved = []
        for x in (held.positions, held.scores):
            x = x.clone()
            x[rows_at, slots_at] = x[rows_at, places]
            moved.append(x)
        after = replace(held, positions=moved[0])
        for pages in touched:
            if not len(pages):
                continue
            r, c = np.divmod(pages, cohort.packed.shape[1])
            if cohort.shared:
                cohort.packed[r, c] = self.packed_pool.unshare(cohort.packed[r, c])
                if self.own_pool is not None:
                    cohort.own[r, c] = self.own_pool.unshare(cohort.own[r, c])
                cohort.touched_packed()
            fields = {
                f.name: self.packed_pool.read(f.name, cohort.packed[r, c]) for f in self.packed_pool.layout.fields
            }
            if self.own_pool is not None:
                fields |= {f.name: self.own_pool.read(f.name, cohort.own[r, c]) for f in self.own_pool.layout.fields}
            filled = page if int(c[0]) < first else stop % page
            codec = self.codec
            if codec.contextual:
                slots = torch.from_numpy(c * page)[:, None] + torch.arange(page)
                codec = self.codec.of(self._context(cohort, self._positions_at(cohort, slots, r), r))
            tokens = [x[:, :filled] for x in codec.decode(fields)]
            mine = np.isin(row * cohort.packed.shape[1] + slot // page, pages)
            which = np.searchsorted(pages, (row * cohort.packed.shape[1] + slot // page)[mine])
            for x, y in zip(tokens, new):
                x[which, slot[mine] % page] = y[mine].to(x.dtype)
            if codec.contextual:
                codec = self.codec.of(self._context(cohort, self._positions_at(cohort, slots[:, :filled], r, after), r))
            made = codec.encode(tokens[0], tokens[1], 0, None)
            for f in self.packed_pool.layout.fields:
                self.packed_pool.write(f.name, cohort.packed[r, c], made[f.name])
            if self.own_pool is not None:
                for f in self.own_pool.layout.fields:
                    self.own_pool.write(f.name, cohort.own[r, c], made[f.name])
        self.exact_pool.release(cohort.exact[:, : due // PAGE])
        cohort.exact = cohort.exact[:, due // PAGE :]
        cohort.touched_exact()
        cohort.geometry = replace(old, length=old.length - due, evicted=old.evicted + due)
        arrays = [torch.cat([x[:, :stop], x[:, stop + due :]], 1) for x in moved]
        cohort.held = replace(held, positions=arrays[0], scores=arrays[1], settled=held.seen)

    def dense(self, cohort: Cohort) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots, packed ones decoded: `[rows, slots, head_dim]` in the layer's dtype."""
        return self.dense_part(cohort, 0), self.dense_part(cohort, 1)

    def dense_part(self, cohort: Cohort, which: int) -> torch.Tensor:
        """The keys (0) or values (1) of all slots: `[rows, slots, head_dim]` in the layer's dtype."""
        parts = []
        if cohort.packed.shape[1]:
            assert self.codec is not None
            fields = {n: x.flatten(0, 1) for n, x in self.packed_fields(cohort, 0, cohort.packed.shape[1]).items()}
            codec = self.codec_of(cohort, 0, cohort.packed.shape[1])
            packed = codec.decode(fields)[which].to(self.spec.dtype)
            parts.append(packed.reshape(len(cohort.rows), -1, self.spec.head_dim)[:, : cohort.geometry.packed_stop])
        parts += self._exact_parts(cohort, ("keys", "values")[which])
        if not parts:
            return torch.empty(
                (len(cohort.rows), 0, self.spec.head_dim), dtype=self.spec.dtype, device=self.spec.device
            )
        return torch.cat(parts, 1)

    def make_room(self, cohort: Cohort) -> None:
        """A slot for the next token of each row at the end of the last exact page, which nobody shares. A kernel writes
        it; until the geometry says that it is there, nothing has changed."""
        old = cohort.geometry
        new = old.appended(1)
        fresh = new.pinned_pages + new.window_pages - cohort.exact.shape[1]
        if fresh > 0:
            cohort.exact = self._widen(self.exact_pool, cohort.exact, fresh)
            cohort.touched_exact()
        elif cohort.shared:
            before = cohort.exact[:, -1]
            own = self.exact_pool.unshare(before)
            if own is not before:
                cohort.exact = np.concatenate([cohort.exact[:, :-1], own[:, None]], 1)
                cohort.touched_exact()

    def _exact_parts(self, cohort: Cohort, name: str) -> list[torch.Tensor]:
        """Keys or values of the slots of the exact tier, views where they can be: `[rows, some slots, head_dim]`
        each."""
        left = cohort.geometry.length - cohort.geometry.exact_base
        return [
            self.exact(name, location)[:, : max(0, left - first * PAGE)]
            for first, _, location in self.exact_blocks(cohort)
        ]

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
            cohort.tail = self.exact_pool.tail(location)
        self.exact_pool.put(cohort.tail, slot, keys[:, 0], values[:, 0])
        cohort.geometry = cohort.geometry.appended(1)
        return True

    def _repack(
        self,
        cohort: Cohort,
        old: Geometry,
        new: Geometry,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        held: Held | None,
    ) -> None:
        """Drop packed pages that slid out of the window; encode the groups that became due."""
        assert self.packing is not None and self.codec is not None and self.packed_pool is not None
        gone = self._packed_columns(old, new)
        columns = cohort.packed.shape[1]
        fresh = new.packed_pages(self.packing) - (columns - gone)
        page, rows = self.packing.page, len(cohort.rows)
        position = old.packed_stop if gone < columns else new.packed_base
        # Whole runs of fresh pages in bounded pieces; the rest of an open page first.
        numbers = 1 << (21 if self.spec.device.type == "cpu" else 25)
        step = max(1, numbers // (page * rows * self.spec.head_dim)) * page
        try:
            cohort.packed = self._widen(self.packed_pool, cohort.packed, fresh)
            if self.own_pool is not None:
                cohort.own = self._widen(self.own_pool, cohort.own, fresh)
            while position < new.packed_stop:
                column, slot = divmod(position - new.packed_base, page)
                stop = min(new.packed_stop, position - slot + (page if slot else step))
                chunk_keys, chunk_values = self._collect(cohort, old, position, stop, keys, values)
                last = -(-(stop - new.packed_base) // page)
                positions = self._positions(cohort, held, position, stop)
                self._encode(cohort, gone + column, gone + last, slot, chunk_keys, chunk_values, positions)
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
        self,
        cohort: Cohort,
        first: int,
        last: int,
        slot: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor | None,
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
        at = 0
        for column, count, piece_keys, piece_values in pieces:
            codec, begin = self.codec, at
            at += piece_keys.shape[1]
            if positions is not None:
                codec = codec.of(self._context(cohort, positions[:, begin:at]))
            fields = codec.encode(
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
            if cohort.held is not None:
                self._check_crop(cohort.held, tokens)
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

    def _check_crop(self, held: Held, tokens: int) -> None:
        assert self.policy is not None
        # A step that is not settled can be undone; so can tokens whose attention counts for nothing.
        undone = tokens == 1 and held.before is not None
        given_up = self.policy.commits or held.seen - tokens < held.settled
        if given_up and tokens < held.seen and not undone:
            raise CacheStateError(
                f"cannot take back {tokens} tokens: {self.policy.name} has counted their attention and may have given "
                "up others for them; fork() the cache before the tokens that may be taken back."
            )

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
            if cohort.held is not None:
                cohort.held = self._forget(cohort.held, tokens)

    def _forget(self, held: Held, tokens: int) -> Held:
        if tokens >= held.seen:
            return Held.empty(held.layer, held.kv_heads, held.places)
        if held.before is not None and tokens == 1:
            return held.before
        left = held.slots - tokens
        return replace(
            held, positions=held.positions[:, :left], scores=held.scores[:, :left], seen=held.seen - tokens,
            prompt=min(held.prompt, held.seen - tokens), before=None,
        )  # fmt: skip

    def _crop(self, cohort: Cohort, new: Geometry) -> None:
        old, rows = cohort.geometry, len(cohort.rows)
        unpacked = None
        if new.exact_base < min(old.exact_base, new.length):
            # The crop ends inside a packed group: its first tokens go back to the exact tier, as decoded.
            assert self.packing is not None and self.codec is not None
            column, slot = divmod(new.packed_stop - new.packed_base, self.packing.page)
            fields = self.packed_fields(cohort, column, column + 1)
            codec = self.codec_of(cohort, column, column + 1)
            keys, values = codec.decode({name: field.flatten(0, 1) for name, field in fields.items()})
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

    def slots_of(self, cohort: Cohort, positions: torch.Tensor) -> torch.Tensor:
        """The slots of tokens by their position in the text, int64 `[rows, tokens]`; -1 where a row does not hold
        one."""
        if cohort.held is None:
            return positions.long()
        ordered, slots = cohort.held.positions.sort(1)
        place = torch.searchsorted(ordered, positions.to(ordered.dtype)).clamp_(max=ordered.shape[1] - 1)
        return torch.where(ordered.gather(1, place) == positions, slots.gather(1, place), -1)

    def tokens(self, cohort: Cohort, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of single tokens, of slots `[rows, tokens]` that are all in one tier:
        `[rows, tokens, head_dim]`."""
        index = slots.cpu().numpy()
        packed_stop, shape = cohort.geometry.packed_stop, (*slots.shape, self.spec.head_dim)
        rows = np.repeat(np.arange(len(index)), index.shape[1])
        flat = index.reshape(-1)
        if not flat.size or flat[0] >= packed_stop:
            column, slot = np.divmod(flat - packed_stop, PAGE)
            pages = cohort.exact[rows, column]
            keys, values = (self.exact_pool.read_tokens(name, pages, slot) for name in ("keys", "values"))
            return keys.view(shape), values.view(shape)
        assert self.packing is not None and self.codec is not None and self.packed_pool is not None
        column, slot = np.divmod(flat, self.packing.page)
        if self.codec.contextual:
            keys, values = self._take(cohort, rows, column, slot)
            return keys.view(shape), values.view(shape)
        if self.own_pool is not None:
            unique, place = np.unique(rows * cohort.packed.shape[1] + column, return_inverse=True)
            r, c = np.divmod(unique, cohort.packed.shape[1])
            fields = self.packed(
                self.packed_pool.locate(cohort.packed[r, c][None]), self.own_pool.locate(cohort.own[r, c][None])
            )
            which, inside = torch.from_numpy(place), torch.from_numpy(slot)
            keys, values = self.codec.take({name: x[0] for name, x in fields.items()}, which, inside)
            return keys.view(shape), values.view(shape)
        out = torch.empty((2, len(flat), self.spec.head_dim), device=self.spec.device)
        for tensors, at, where in self.packed_pool.by_slab(cohort.packed[rows, column]):
            ids, inside, target = (torch.from_numpy(x).to(self.spec.device) for x in (at, slot[where], where))
            for whole, part in zip(out, self.codec.take(tensors, ids, inside)):
                whole.index_copy_(0, target, part)
        return out[0].view(shape), out[1].view(shape)

    def _take(
        self, cohort: Cohort, rows: np.ndarray, columns: np.ndarray, slots: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Single packed tokens, by a codec that wants to know whose they are: the rows that share pages are given to it
        together."""
        assert self.codec is not None and self.packing is not None
        together, width, page = self.together(cohort), cohort.packed.shape[1], self.packing.page
        pairs, place = np.unique(rows // together * width + columns, return_inverse=True)
        r = (pairs // width * together)[:, None] + np.arange(together)
        r, c = r.reshape(-1), np.repeat(pairs % width, together)
        first = torch.from_numpy(cohort.geometry.packed_base + c * page)[:, None]
        codec = self.codec.of(self._context(cohort, self._positions_at(cohort, first + torch.arange(page), r), r))
        which = torch.from_numpy(place * together + rows % together).to(self.spec.device)
        return codec.take(self._fields_at(cohort, r, c), which, torch.from_numpy(slots).to(self.spec.device))

    def _fields_at(self, cohort: Cohort, rows: np.ndarray, columns: np.ndarray) -> dict[str, torch.Tensor]:
        """Every field of single packed pages, `[pages, *shape]`."""
        assert self.packed_pool is not None
        own = None if self.own_pool is None else self.own_pool.locate(cohort.own[rows, columns][None])
        fields = self.packed(self.packed_pool.locate(cohort.packed[rows, columns][None]), own)
        return {name: x[0] for name, x in fields.items()}

    # -- what codecs know about rows ------------------------------------------------------------------------

    def together(self, cohort: Cohort) -> int:
        """How many rows in succession hold the same tokens of a sequence, one of each of its heads in this cohort."""
        return 1 if cohort.held is not None else len(np.unique(cohort.rows % self.spec.kv_heads))

    def learn(
        self,
        cohort: Cohort,
        offset: np.ndarray,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        inputs: torch.Tensor,
    ) -> None:
        """The first tokens of some rows have come: tell a codec that wants to know about rows.

        offset: int64 `[rows]`, the first token's position; the others are as in `Codec.learn`.
        """
        assert self.codec is not None
        cohort.offset = offset
        cohort.learned = self.codec.learn(queries, keys, values, inputs)

    def codec_of(self, cohort: Cohort, first: int, last: int) -> Codec:
        """The codec for packed columns first..last of a cohort's rows."""
        assert self.codec is not None and self.packing is not None
        if not self.codec.contextual:
            return self.codec
        base, page = cohort.geometry.packed_base, self.packing.page
        positions = self._positions(cohort, cohort.held, base + first * page, base + last * page)
        return self.codec.of(self._context(cohort, positions))

    def _context(self, cohort: Cohort, positions: torch.Tensor | None, rows: np.ndarray | None = None) -> Context:
        """What the codec may know of the rows with these indices; None is all of them."""
        assert positions is not None
        heads, learned = cohort.rows % self.spec.kv_heads, cohort.learned
        if rows is not None:
            heads = heads[rows]
            learned = {name: x[torch.from_numpy(rows).to(x.device)] for name, x in learned.items()}
        return Context(tuple(heads.tolist()), self.together(cohort), positions, learned)

    def _positions(self, cohort: Cohort, held: Held | None, start: int, stop: int) -> torch.Tensor | None:
        """The model's positions of the tokens in slots start..stop: int64 `[rows or 1, tokens]`; None if the codec does
        not want them."""
        if self.codec is None or not self.codec.contextual:
            return None
        if not self.codec.positional:
            return running(start, stop, self.spec.device)  # nobody looks at them
        assert cohort.offset is not None
        first = int(cohort.offset[0])
        if held is None and (cohort.offset == first).all():
            return running(start + first, stop + first, self.spec.device)
        slots = running(start, stop, self.spec.device).expand(len(cohort.rows), -1)
        return self._positions_at(cohort, slots, np.arange(len(cohort.rows)), held)

    def _positions_at(
        self, cohort: Cohort, slots: torch.Tensor, rows: np.ndarray, held: Held | None = None
    ) -> torch.Tensor:
        """The same for slots `[rows, tokens]` of the rows with these indices."""
        assert cohort.offset is not None
        held, slots = held or cohort.held, slots.to(self.spec.device)
        if held is not None:
            slots = held.positions[torch.from_numpy(rows).to(self.spec.device)].gather(
                1, slots.clamp(max=held.slots - 1)
            )
        return slots.long() + torch.from_numpy(cohort.offset[rows]).to(self.spec.device)[:, None]

    def exact_blocks(self, cohort: Cohort) -> list[tuple[int, int, Location]]:
        """(first column, last column, location) of blocks that cover the exact tier."""
        if cohort.exact_blocks is None:
            longest = max(1, GATHERED // (PAGE * len(cohort.rows) * self.spec.head_dim))
            cohort.exact_blocks = []
            for first, last in _blocks(cohort.exact, cohort.exact.shape[1]):
                whole = self.exact_pool.locate(cohort.exact[:, first:last])
                if whole.slab is not None and whole.strides[1] == 1 and self.exact_pool.layout.holds is None:
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

    def exact_positions(self, geometry: Geometry) -> np.ndarray:
        """The position of every slot of the exact columns: int64 `[columns * PAGE]`."""
        pinned = np.arange(geometry.pinned_pages * PAGE)
        return np.concatenate([pinned, np.arange(geometry.window_pages * PAGE) + geometry.exact_base])

    def packed_fields(self, cohort: Cohort, first: int, last: int) -> dict[str, torch.Tensor]:
        """Every field of packed columns first..last: `[rows, columns, *shape]`."""
        assert self.packed_pool is not None
        own = None if self.own_pool is None else self.own_pool.locate(cohort.own[:, first:last])
        return self.packed(self.packed_pool.locate(cohort.packed[:, first:last]), own)

    @property
    def statistics_bytes(self) -> int:
        """Bytes of what a policy knows about the tokens, and a codec about the rows."""
        held = sum(cohort.held.nbytes for cohort in self.cohorts if cohort.held is not None)
        return held + sum(x.nbytes for cohort in self.cohorts for x in cohort.learned.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of the page tables and of the indices worked out from them where pages are scattered."""
        arrays = [x for c in self.cohorts for x in (c.rows, c.exact, c.packed, c.own, c.offset) if x is not None]
        tables = sum(x.nbytes for x in arrays)
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
