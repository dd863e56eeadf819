"""What a layer is, and what its pages look like."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fivefold.store.context import Rope
from fivefold.store.layout import Field, PageLayout
from fivefold.store.pages import Budget, PagePool
from fivefold.store.rounded import RoundedPool
from fivefold.store.rows import PAGE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What keys and values may be in."""


@dataclass(frozen=True)
class LayerSpec:
    """What a method may know about the layer it works for.

    kv_heads, head_dim, dtype and device are those of the keys that attention delivers. rope: how keys are turned by
    position; None where that is unknown, and then `no_rope` says why. cap: what scores are held within, if they are
    (`cap * tanh(score / cap)`). window: how many tokens each query sees, its own included, where the layer has a
    sliding window.
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
    cap: float | None = None
    window: int | None = None

    @property
    def channels(self) -> int:
        """Of the keys of all heads together."""
        return self.kv_heads * self.head_dim

    def blank(self, *shape: int) -> torch.Tensor:
        """A tensor without contents on the layer's device, for a cache that is only planned."""
        return torch.empty(shape, device=self.device)


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
    """The pools of one cache: one per page layout and device, under one byte cap. Forks of a cache share them."""

    def __init__(self, max_bytes: int | None = None) -> None:
        self.budget = Budget(max_bytes)
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        """The sessions that take pages from here."""
        self._pools: dict[tuple[PageLayout, torch.device], PagePool] = {}

    def of(self, layout: PageLayout, device: torch.device) -> PagePool:
        key = (layout, device)
        with self.budget.lock:
            if key not in self._pools:
                kind = PagePool if layout.holds is None else RoundedPool
                self._pools[key] = kind(layout, device, self.budget)
            return self._pools[key]

    def items(self) -> list[tuple[tuple[PageLayout, torch.device], PagePool]]:
        return list(self._pools.items())

    def __iter__(self) -> Iterator[PagePool]:
        return iter(list(self._pools.values()))
