"""A decoding step whose every input has a fixed place on the device, so that a CUDA graph of it can be replayed.

A step's kernels read where pages are and what is seen from `FixedTables`; `update` makes those say what the caches'
page tables say, and sends only what has changed. Nothing else of a step hangs on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from fivefold.attention.fused import kernels, spans
from fivefold.store.layer_cache import Cohort, LayerCache
from fivefold.store.pages import PagePool


class FixedTables:
    """The page tables and spans of all layers of a cache, with room to grow.

    For a layer of `rows` (sequence, kv head): addresses of exact pages int64 `[rows, columns, 2]` and of packed pages
    `[rows, columns]`, in units of 16 bytes, and spans int32 `[rows, SPAN]` (see `kernels/packed_decode`).
    """

    def __init__(self, stores: dict[int, LayerCache]) -> None:
        first = next(iter(stores.values()))
        self.device = first.spec.device
        self.rows = first.batch * first.spec.kv_heads
        self.stores = stores
        self.key = object()
        cohorts = [cohort for store in stores.values() for cohort in store.cohorts]
        # Where tokens are packed the exact tier stays as it is; else it grows, as the packed one does.
        grows = first.codec is None
        self.exact_columns = _ample(max(cohort.exact.shape[1] for cohort in cohorts), 64 if grows else 8)
        self.packed_columns = 0 if grows else _ample(max(cohort.packed.shape[1] for cohort in cohorts), 32)
        exact, packed = self.rows * self.exact_columns * 2, self.rows * self.packed_columns
        self._size, self._packed_at = exact + packed, exact
        self._page = first.packing.page if first.packing else kernels().TILE
        form, heads = first.codec and first.codec.form, first.spec.query_heads // first.spec.kv_heads
        self._programs = kernels().programs_for(self.rows, self.device, form, heads)
        # What the work lists were made for.
        self._pages: np.ndarray | None = None
        self._starts = np.zeros(0, dtype=np.int32)
        self._number = {index: number for number, index in enumerate(stores)}
        with torch.inference_mode(False):
            self._tables = torch.zeros(len(stores) * self._size, dtype=torch.int64, device=self.device)
            # A layer's spans, then its starts.
            self._width = self.rows * kernels().SPAN
            shape = len(stores), self._width + 2 * (self.rows + 1)
            self._spans = torch.zeros(shape, dtype=torch.int32, device=self.device)
            # Two, because the device may still be reading the one of the step before.
            cuda = self.device.type == "cuda"
            self._hosts = [torch.zeros_like(self._spans, device="cpu", pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._turn = 0
        # Page ids as the device knows them.
        self._exact_ids = np.full((len(stores), self.rows, self.exact_columns), -1, dtype=np.int64)
        self._packed_ids = np.full((len(stores), self.rows, self.packed_columns), -1, dtype=np.int64)
        self._pools = {pool: pool.trimmed for store in stores.values() for pool in _pools(store)}
        self._parts = {index: self._layer(index, store) for index, store in stores.items()}

    def _layer(self, index: int, store: LayerCache) -> tuple:
        """Spans, starts, packed and exact pages of a layer."""
        kernel, number = kernels(), self._number[index]
        table = self._tables[number * self._size : (number + 1) * self._size]
        exact = kernel.Exact(table[: self._packed_at].view(self.rows, self.exact_columns, 2), store.spec.dtype)
        packed = None
        if store.codec is not None:
            assert store.codec.form is not None
            packed = kernel.Packed(table[self._packed_at :].view(self.rows, self.packed_columns), store.codec.form)
        mine = self._spans[number]
        return mine[: self._width].view(self.rows, -1), mine[self._width :].view(2, -1), packed, exact

    @property
    def nbytes(self) -> int:
        return self._tables.nbytes + self._spans.nbytes

    def fit(self) -> bool:
        """Whether there is still room for what the caches hold."""
        first = next(iter(self.stores.values()))
        return first.batch * first.spec.kv_heads == self.rows and all(
            cohort.exact.shape[1] <= self.exact_columns and cohort.packed.shape[1] <= self.packed_columns
            for store in self.stores.values()
            for cohort in store.cohorts
        )

    def update(self) -> None:
        """Make the device's tables those of the caches as they are now."""
        if any(pool.trimmed != before for pool, before in self._pools.items()):
            self._pools = {pool: pool.trimmed for pool in self._pools}
            self._exact_ids.fill(-1)
            self._packed_ids.fill(-1)
            self.key = object()
        turn = self._turn = 1 - self._turn
        event, host = self._events[turn], self._hosts[turn]
        if event is not None:
            event.synchronize()
        numbers = host.numpy()
        seen = numbers[:, : self._width].reshape(len(self.stores), self.rows, -1)  # a view
        places: list[np.ndarray] = []
        addresses: list[np.ndarray] = []
        for index, store in self.stores.items():
            number = self._number[index]
            for cohort in store.cohorts:
                seen[number, cohort.rows, :5] = spans(cohort.geometry)
                if cohort.exact_fixed is not self.key:
                    for at, page in self._moved(self._exact_ids[number], cohort, cohort.exact):
                        for side, name in enumerate(("keys", "values")):
                            places.append(number * self._size + 2 * at + side)
                            addresses.append(store.exact_pool.addresses(name, page))
                    cohort.exact_fixed = self.key
                if store.packed_pool is not None and cohort.packed_fixed is not self.key:
                    name = store.packed_pool.layout.fields[0].name
                    for at, page in self._moved(self._packed_ids[number], cohort, cohort.packed):
                        places.append(number * self._size + self._packed_at + at)
                        addresses.append(store.packed_pool.addresses(name, page))
                    cohort.packed_fixed = self.key
        pages = kernels().pages_of(seen, self._page)
        if self._pages is None or not np.array_equal(pages, self._pages):
            self._pages = pages
            self._starts = kernels().starts_of(pages, self._programs)
        numbers[:, self._width :] = self._starts.reshape(len(self.stores), -1)
        self._spans.copy_(host, non_blocking=True)
        if event is not None:
            event.record()
        if places:
            new = torch.from_numpy(np.stack([np.concatenate(places), np.concatenate(addresses) >> 4]))
            new = new.to(self.device)
            self._tables.index_copy_(0, new[0], new[1])

    @staticmethod
    def _moved(known: np.ndarray, cohort: Cohort, table: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places in a layer's table, page ids) where a cohort's table has other pages than is known."""
        count = table.shape[1]
        columns = np.flatnonzero((known[cohort.rows, :count] != table).any(0))
        if len(columns):
            known[cohort.rows[:, None], columns] = table[:, columns]
            at = cohort.rows[:, None] * known.shape[1] + columns
            yield at.reshape(-1), table[:, columns].reshape(-1)

    def attend(
        self, index: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Store the newest token of each row of a layer, and attend over everything: the shape of `queries`.

        queries: `[rows, query_heads per kv head, head_dim]`; keys, values: `[rows, head_dim]`.
        """
        kernel = kernels()
        seen, starts, packed, exact = self._parts[index]
        kernel.append(keys.contiguous(), values.contiguous(), seen, exact)
        queries = queries.contiguous()
        return kernel.decode(queries, scaling, seen, packed, exact, starts=starts, programs=self._programs)[0]


def _ample(columns: int, least: int) -> int:
    """Room for half as much again."""
    return columns + max(least, columns // 2)


def _pools(store: LayerCache) -> list[PagePool]:
    return [pool for pool in (store.exact_pool, store.packed_pool) if pool is not None]
