"""What a cache holds, in exact bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fivefold.engine.session import Session
from fivefold.kernels import shared
from fivefold.store.pages import PagePool


@dataclass(frozen=True)
class Report:
    """Bytes of a cache by what they hold; `total` is all that goes when the cache goes.

    recipe: as text. tokens: logical length (padding included) x sequences.
    exact, codes, scales: filled slots of pages, by kind of field (any further kind a codec declares is in `other`).
    learned: what codecs hold besides pages (bases, orders). statistics: what policies know about the tokens (positions,
    scores), and codecs about the rows; the means of what has left them. slack: unfilled slots of pages in use. free:
    pages that are allocated and not in use. forks: pages that only other forks of the cache hold. sliding: layers with
    a sliding window, kept as they are. tables: page tables here and on the device. graph: what a captured step holds.
    host: all of a cache that is offloaded, in host memory.
    process: not part of the total: tables that all caches of the process share, bounded.
    exact_equivalent: what `DynamicCache` holds for the same tokens in the same dtype.
    kept_tokens: stored (token, kv head, layer) entries over all that were seen: what layers, heads and tokens saved.
    bits: bits per stored number of filled slots: what channels and bits saved.
    decoding: which way its decoding steps go, and why (see `fivefold.engine.decoding`).
    """

    recipe: str
    tokens: int
    exact: int
    codes: int
    scales: int
    other: int
    learned: int
    statistics: int
    slack: int
    free: int
    forks: int
    sliding: int
    tables: int
    graph: int
    host: int
    process: int
    exact_equivalent: int
    kept_tokens: float
    bits: float
    decoding: str = ""

    @property
    def total(self) -> int:
        return (
            self.exact + self.codes + self.scales + self.other + self.learned + self.statistics + self.slack + self.free
            + self.forks + self.sliding + self.tables + self.graph + self.host
        )  # fmt: skip

    @property
    def ratio(self) -> float:
        """Total over what `DynamicCache` would hold; 1 for an empty cache."""
        return self.total / self.exact_equivalent if self.exact_equivalent else 1.0

    def as_dict(self) -> dict[str, Any]:
        """All numbers by name, for JSON."""
        return {**asdict(self), "total": self.total, "ratio": self.ratio}

    def __str__(self) -> str:
        lines = [
            f"{self.recipe}: {self.tokens:,} tokens in {self.total / 2**20:.2f} MiB, {self.ratio:.3f}x of the exact "
            f"cache ({self.exact_equivalent / 2**20:.2f} MiB)",
            f"  tokens kept (layers, heads, tokens): {self.kept_tokens:.1%}    "
            f"bits per number (channels, bits): {self.bits:.2f}",
        ]
        for name in (
            "exact", "codes", "scales", "other", "learned", "statistics", "sliding", "slack", "free", "forks", "tables",
            "graph", "host", "process",
        ):  # fmt: skip
            size = getattr(self, name)
            if size:
                shared = " (shared by all caches, not counted above)" if name == "process" else ""
                lines.append(f"  {name:<10} {size:>14,} bytes{shared}")
        if self.decoding:
            lines.append(f"  decoding: {self.decoding}")
        return "\n".join(lines)


def measure(session: Session, recipe: str, graph: int = 0, decoding: str = "") -> Report:
    """Count a cache's bytes from its page tables and pools. graph: bytes of a captured step; decoding: as `Report`
    has it."""
    held: dict[PagePool, list[tuple[np.ndarray, np.ndarray]]] = {pool: [] for pool in session.pools}
    seen = stored = numbers = 0
    for bank in session.banks:
        bounds, spec = bank.bounds, bank.layers[0].spec
        seen, stored = seen + int(bounds.seen.sum()), stored + int(bounds.stored_tokens.sum())
        numbers += 2 * int(bounds.stored_tokens.sum()) * spec.head_dim
        for tier, tokens in ((bank.exact, bounds.exact_tokens), (bank.packed, bounds.packed_tokens)):
            for number, pool in enumerate(tier.pools if tier is not None else ()):
                assert tier is not None
                page = pool.layout.tokens
                table = tier.tables[number]
                filled = np.clip(tokens[:, None] - np.arange(table.shape[1]) * page, 0, page)
                held[pool].append((table[filled > 0], filled[filled > 0]))
        if bank.ahead is not None:
            held[bank.ahead.tier.pool].append((bank.ahead.pages, np.zeros_like(bank.ahead.pages)))
    kinds = {"exact": 0, "codes": 0, "scales": 0, "other": 0}
    slack = free = forks = 0
    for pool, parts in held.items():
        nbytes, page = pool.layout.nbytes, pool.layout.tokens
        pages = np.concatenate([ids for ids, _ in parts]) if parts else np.empty(0, dtype=np.int64)
        filled_tokens = np.concatenate([f for _, f in parts]) if parts else np.empty(0, dtype=np.int64)
        unique, place = np.unique(pages, return_inverse=True)
        most = np.zeros(len(unique), dtype=np.int64)
        np.maximum.at(most, place, filled_tokens)
        slots = int(most.sum())
        used = 0
        for kind, size in pool.layout.bytes_by_kind().items():
            amount = size * slots // page
            kinds[kind if kind in kinds else "other"] += amount
            used += amount
        slack += len(unique) * nbytes - used
        free += pool.free_pages * nbytes
        forks += (pool.pages_in_use - len(unique)) * nbytes
    sliding = 0 if session.companions is None else session.companions.nbytes
    sequences, specs = len(session.lengths()), [store.spec for store in session.stores.values()]
    tokens = session.length * sequences
    if seen:
        seen += int(session.lengths().sum()) * sum(spec.kv_heads for spec in session.absent)
    exact_equivalent = sum(
        2 * sequences * min(session.length, (spec.window or session.length + 1) - 1)
        * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
        for spec in (*specs, *(replace(spec, dtype=specs[0].dtype) for spec in session.absent))
    )  # fmt: skip
    return Report(
        recipe=recipe,
        tokens=tokens,
        exact=kinds["exact"],
        codes=kinds["codes"],
        scales=kinds["scales"],
        other=kinds["other"],
        learned=session.learned_bytes,
        statistics=session.statistics_bytes,
        slack=slack,
        free=free,
        forks=forks,
        sliding=sliding,
        tables=session.table_bytes,
        graph=graph,
        host=0 if session.state is None else session.state.nbytes,
        process=shared.nbytes(),
        exact_equivalent=exact_equivalent + sliding,
        kept_tokens=stored / seen if seen else 1.0,
        bits=8 * sum(kinds.values()) / numbers if numbers else 8.0 * specs[0].dtype.itemsize,
        decoding=decoding,
    )
