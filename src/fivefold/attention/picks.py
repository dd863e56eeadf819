"""What layers of a step pick for those behind them to read, in tables that a captured step needs where they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fivefold.kernels.packed_decode import schedule
from fivefold.store.interfaces import Layer


class Picked:
    """What layers of one step pick for those behind them: int32 `[rows, top + 1]`, the newest token last."""

    def __init__(self, reads: Any) -> None:
        self.reads = reads
        self._picks: torch.Tensor | None = None
        self._layer = -1

    def role(self, layer: Layer) -> str:
        """What a layer does in a step: "full", "select", or "sparse"."""
        if any(extent.recent is not None for extent in layer.extents):
            return "full"  # all of its heads have windows, which they read
        return str(self.reads.roles.get(layer.spec.layer, "full"))

    def there(self, layer: Layer) -> bool:
        """Whether what this layer is to read has been picked."""
        near = self.reads.nearest.get(layer.spec.layer)
        return self._picks is not None and (near is None or near[0] == self._layer)

    def put(self, layer: Layer, received: torch.Tensor, spans: torch.Tensor) -> None:
        """A layer picks. received: as `rank` gives it."""
        top, self._layer = self.reads.top, layer.spec.layer
        values, indices = received.topk(min(top, received.shape[1]), 1, sorted=False)
        from fivefold.kernels.watched import triton

        self._picks = triton.picks(values, indices, spans, top)

    @property
    def now(self) -> tuple[torch.Tensor | None, int]:
        """What has been picked last, and by which layer."""
        return self._picks, self._layer

    @now.setter
    def now(self, state: tuple[torch.Tensor | None, int]) -> None:
        self._picks, self._layer = state

    def of(self, near: torch.Tensor | None) -> torch.Tensor:
        """What a layer reads whose rows take over from these, int64 `[rows]`; None is each from its own."""
        assert self._picks is not None
        return self._picks if near is None else self._picks.index_select(0, near)


class Shares:
    """Of `rows` rows that read what was picked: spans, work lists, and whose picks each reads. programs: of a GPU, for
    `tile` picks at a time. A captured graph needs these tensors as long as there is one."""

    def __init__(self, rows: int, device: torch.device, tile: int, programs: int) -> None:
        self.rows, self.device, self.tile, self.programs = rows, device, tile, programs
        self._spread: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._near: dict[bytes, torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        near = sum(x.nbytes for x in self._near.values())
        return near + sum(spans.nbytes + starts.nbytes for spans, starts, _ in self._spread.values())

    def spread(self, count: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Spans int32 `[rows, SPAN]` of rows that read `count` picks each, their work list int32 `[rows + 1]`, and how
        many programs there are."""
        if count not in self._spread:
            spans = np.zeros((self.rows, schedule.SPAN), dtype=np.int32)
            spans[:, 4] = count
            pages = np.full((2, self.rows), -(-count // self.tile))
            starts = schedule.starts_of(pages, (self.programs, self.programs))[0]
            with torch.inference_mode(False):
                there = torch.from_numpy(spans).to(self.device), torch.from_numpy(starts).to(self.device)
            self._spread[count] = (*there, int(starts[-1]))
        return self._spread[count]

    def near(self, picked: Picked, layer: Layer) -> torch.Tensor | None:
        """Whose picks each row of a layer reads, int64 `[rows]`; None is its own."""
        near = picked.reads.nearest.get(layer.spec.layer)
        if near is None:
            return None
        heads = np.asarray(near[1])[:, 0]
        key = heads.tobytes()
        if key not in self._near:
            rows = np.arange(self.rows).reshape(-1, len(heads))[:, heads].reshape(-1)
            with torch.inference_mode(False):
                self._near[key] = torch.from_numpy(rows).to(self.device)
        return self._near[key]
