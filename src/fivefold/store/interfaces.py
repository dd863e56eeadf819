"""What modules of the store know of a layer (`LayerCache`) and of a `Bank`, which are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from fivefold.store.codec import Codec
from fivefold.store.held import Held
from fivefold.store.pages import PagePool
from fivefold.store.rows import Bounds, Extent, Packing
from fivefold.store.spec import LayerSpec
from fivefold.store.tier import Tier
from fivefold.store.transaction import Transaction


class Layer(Protocol):
    """A layer's rows. group: a `RowGroup`."""

    spec: LayerSpec
    codec: Codec | None
    packing: Packing | None
    policy: Any
    extents: tuple[Extent, ...]
    sets: tuple[tuple[int, ...], ...]
    head_chosen: list[bool]
    exact_pool: PagePool
    packed_pools: list[PagePool]
    bank: Any
    index: int
    encoder: int
    held: list[Held]
    known: list[Held]
    learned: dict[str, torch.Tensor]
    waiting: list[Any]

    @property
    def format(self) -> tuple[object, ...]: ...

    @property
    def batch(self) -> int: ...

    @property
    def rows(self) -> int: ...

    @property
    def base(self) -> int: ...

    @property
    def exact_tier(self) -> Tier: ...

    @property
    def packed_tier(self) -> Tier | None: ...

    @property
    def offsets(self) -> np.ndarray: ...

    def packing_of(self, held: Held) -> Packing | None: ...

    def regroup(self) -> None: ...

    def start_held(self) -> None: ...

    def selected(self, rows: np.ndarray) -> tuple[list[Held], dict[str, torch.Tensor]]: ...

    def twin(self) -> Any: ...

    def set(self, group: Any, bounds: Bounds) -> None: ...

    def take_in(
        self,
        group: Any,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        advance: bool,
        revocable: int,
        held: Held | None = None,
    ) -> None: ...

    def empty(self, group: Any, evicted: int) -> None: ...

    def empty_exact(self, group: Any) -> None: ...

    def drop_oldest_exact(self, group: Any, tokens: int) -> None: ...


class Tables(Protocol):
    """The common tables of layers' rows. parts: `Part`s of a chunk."""

    device: torch.device
    packing: Packing | None
    change: Transaction | None
    exact: Tier
    packed: Tier | None
    residual: np.ndarray

    def lengthen(self, rows: np.ndarray, length: int) -> None: ...

    def move(self, rows: np.ndarray, old: Bounds, new: Bounds, parts: Sequence[Any] = ()) -> None: ...

    @property
    def rows(self) -> int: ...

    @property
    def layers(self) -> Sequence[Layer]: ...
