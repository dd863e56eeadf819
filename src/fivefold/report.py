"""What a cache holds, in exact bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from fivefold.models.huggingface import FivefoldCache


@dataclass(frozen=True)
class Report:
    """Bytes of a cache by what they hold; `total` is what torch allocated for it, plus the page tables.

    recipe: as text. tokens: logical length (padding included) x sequences.
    exact, codes, scales: filled slots of pages, by kind of field (any further kind a codec declares is in `other`).
    statistics: what a policy knows about the tokens (positions, scores). slack: unfilled slots of pages in use. free:
    pages that are allocated and not in use. forks: pages that only other forks of the cache hold. sliding: layers with
    a sliding window, kept as they are. tables: page tables, and indices made from them.
    exact_equivalent: what `DynamicCache` holds for the same tokens in the same dtype.
    kept_tokens: stored (token, kv head, layer) entries over all that were seen: what layers, heads and tokens saved.
    bits: bits per stored number of filled slots: what channels and bits saved.
    """

    recipe: str
    tokens: int
    exact: int
    codes: int
    scales: int
    other: int
    statistics: int
    slack: int
    free: int
    forks: int
    sliding: int
    tables: int
    exact_equivalent: int
    kept_tokens: float
    bits: float

    @property
    def total(self) -> int:
        return (
            self.exact + self.codes + self.scales + self.other + self.statistics + self.slack + self.free
            + self.forks + self.sliding + self.tables
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """Total over what `DynamicCache` would hold; 1 for an empty cache."""
        return self.total / self.exact_equivalent if self.exact_equivalent else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total, "ratio": self.ratio}

    def __str__(self) -> str:
        lines = [
            f"{self.recipe}: {self.tokens:,} tokens in {self.total / 2**20:.2f} MiB, {self.ratio:.3f}x of the exact "
            f"cache ({self.exact_equivalent / 2**20:.2f} MiB)",
            f"  tokens kept (layers, heads, tokens): {self.kept_tokens:.1%}    "
            f"bits per number (channels, bits): {self.bits:.2f}",
        ]
        for name in ("exact", "codes", "scales", "other", "statistics", "sliding", "slack", "free", "forks", "tables"):
            size = getattr(self, name)
            if size:
                lines.append(f"  {name:<10} {size:>14,} bytes")
        return "\n".join(lines)


def measure(cache: FivefoldCache) -> Report:
    """Count a cache's bytes from its page tables and pools."""
    held: dict[Any, list[tuple[np.ndarray, np.ndarray]]] = {pool: [] for pool in cache.state.pools}
    seen = stored = exact_equivalent = statistics = 0
    tables = 0 if cache.step is None else cache.step.nbytes
    for index, store in cache.state.stores.items():
        spec = store.spec
        logical = cache.state.logical[index] * store.batch
        exact_equivalent += 2 * logical * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
        tables += store.table_bytes
        statistics += store.statistics_bytes
        for cohort in store.cohorts:
            geometry = cohort.geometry
            rows = len(cohort.rows)
            seen += rows * geometry.seen
            stored += rows * geometry.stored_tokens
            pinned = min(geometry.length, geometry.pinned_pages * store.exact_pool.layout.tokens)
            window = max(0, geometry.length - geometry.exact_base)
            filled = [(cohort.exact, pinned + window, store.exact_pool)]
            packed = geometry.packed_stop - geometry.packed_base
            if store.packed_pool is not None:
                filled.append((cohort.packed, packed, store.packed_pool))
            if store.own_pool is not None:
                filled.append((cohort.own, packed, store.own_pool))
            for table, tokens, pool in filled:
                page = pool.layout.tokens
                columns = np.clip(tokens - np.arange(table.shape[1]) * page, 0, page)
                held[pool].append((table.reshape(-1), np.tile(columns, rows)))
    kinds = {"exact": 0, "codes": 0, "scales": 0, "other": 0}
    slack = free = forks = 0
    for pool, parts in held.items():
        nbytes, page = pool.layout.nbytes, pool.layout.tokens
        pages = np.concatenate([ids for ids, _ in parts]) if parts else np.empty(0, dtype=np.int64)
        filled_tokens = np.concatenate([f for _, f in parts]) if parts else np.empty(0, dtype=np.int64)
        unique, place = np.unique(pages, return_inverse=True)
        most = np.zeros(len(unique), dtype=np.int64)
        np.maximum.at(most, place, filled_tokens)
        tokens = int(most.sum())
        used = 0
        for kind, size in pool.layout.bytes_by_kind().items():
            amount = size * tokens // page
            kinds[kind if kind in kinds else "other"] += amount
            used += amount
        slack += len(unique) * nbytes - used
        free += pool.free_pages * nbytes
        forks += (pool.pages_in_use - len(unique)) * nbytes
    first = cache.state.stores[cache.state.first]
    # After a long chunk their tensors are views of more than the window.
    held_by_stock = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for layer in cache.state.stock.values()
        for tensor in vars(layer).values()
        if isinstance(tensor, torch.Tensor)
    }
    sliding = sum(held_by_stock.values())
    exact_equivalent += sliding
    spec = first.spec
    numbers = 2 * stored * spec.head_dim
    return Report(
        recipe=str(cache.recipe),
        tokens=cache.state.logical[cache.state.first] * first.batch,
        exact=kinds["exact"],
        codes=kinds["codes"],
        scales=kinds["scales"],
        other=kinds["other"],
        statistics=statistics,
        slack=slack,
        free=free,
        forks=forks,
        sliding=sliding,
        tables=tables,
        exact_equivalent=exact_equivalent,
        kept_tokens=stored / seen if seen else 1.0,
        bits=8 * sum(kinds.values()) / numbers if numbers else 8.0 * spec.dtype.itemsize,
    )
