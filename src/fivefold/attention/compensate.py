"""Attention over the compensation token of each row (`store/compensation.py`), as one more part of the union.

N tokens that have left, with mean key k and mean value v, count as N tokens with this key and value: their part of the
softmax is `N * exp(q k) * v`, so the part's output is v and its log-sum-exp `q k + log N`. That is exact where the keys
and values that have left are all the same.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fivefold.attention.merge import MASKED, capped, merge
from fivefold.kernels.merge import Part
from fivefold.store.bank import Bank
from fivefold.store.compensation import MEANS
from fivefold.store.group import RowGroup
from fivefold.store.interfaces import Layer
from fivefold.store.layer_cache import LayerCache


def left_of(group: RowGroup, queries: torch.Tensor, scaling: float) -> Part | None:
    """(output, log-sum-exp) over the compensation tokens of a group; None where nothing has left.

    queries: `[rows, query_heads per kv head, head_dim]`, or `[..., token, head_dim]` of a chunk. The output is float32
    and can be broadcast to the shape of queries, the log-sum-exp has that shape without head_dim.
    """
    layer = group.layer
    count = int(group.bounds.compensated)
    if not count:
        return None
    means = [layer.learned[name] for name in MEANS]
    if len(group.rows) < layer.rows:
        means = [x[group.rows_on(x.device)] for x in means]
    return _part(layer, means[0], means[1], math.log(count), queries, scaling)


def left_of_all(layer: LayerCache, queries: torch.Tensor, scaling: float) -> Part | None:
    """The same for a decoding step of all rows of a layer, however they stand."""
    bank = layer.bank
    if MEANS[0] not in layer.learned:
        return None
    counts = bank.bounds.compensated

    def make() -> torch.Tensor:
        return torch.from_numpy(_logs(counts)).to(layer.spec.device)

    logs = bank.memo.get(("left", counts.tobytes()), make)[layer.base : layer.base + layer.rows]
    keys, values = (layer.learned[name] for name in MEANS)
    return _part(layer, keys, values, logs[:, None], queries, scaling)


class Left:
    """The compensation tokens of all rows of device tables, at fixed places that a captured graph reads.

    keys, values float32 `[layers, rows, head_dim]`; logs float32 `[layers, rows]`, of how many tokens they are the
    mean, `MASKED` of none.
    """

    def __init__(self, tables: Any, bank: Bank) -> None:
        spec, shape = bank.layers[0].spec, (tables.layers, tables.rows)
        with torch.inference_mode(False):
            self.keys, self.values = (torch.zeros((*shape, spec.head_dim), device=tables.device) for _ in range(2))
            self.logs = torch.full(shape, MASKED, device=tables.device)
        self.forget()

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes + self.logs.nbytes

    def forget(self) -> None:
        """What is here may be of other rows."""
        self._seen: list[torch.Tensor | None] = [None] * len(self.keys)
        self._counts: np.ndarray | None = None

    def sync(self, bank: Bank) -> None:
        """Make it what the layers know."""
        for index, layer in enumerate(bank.layers):
            means = [layer.learned.get(name) for name in MEANS]
            if means[0] is not self._seen[index] and means[0] is not None and means[1] is not None:
                self.keys[index, : bank.rows], self.values[index, : bank.rows] = means[0], means[1]
                self._seen[index] = means[0]
        counts = bank.bounds.compensated
        if self._counts is None or not np.array_equal(counts, self._counts):
            self._counts = counts
            logs = torch.full(tuple(self.logs.shape), MASKED)
            logs[:, : bank.rows] = torch.from_numpy(_logs(counts)).view(len(logs), -1)
            self.logs.copy_(logs)

    def merge(
        self, layer: LayerCache, queries: torch.Tensor, scaling: float, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        """Into a layer's output and log-sum-exp, by a kernel."""
        from fivefold.kernels.watched import triton

        assert lse is not None
        at = layer.index
        triton.beside(queries, scaling, self.keys[at], self.values[at], self.logs[at], out, lse)


def _logs(counts: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.maximum(np.log(counts), MASKED).astype(np.float32)


def _part(
    layer: Layer,
    keys: torch.Tensor,
    values: torch.Tensor,
    logs: torch.Tensor | float,
    queries: torch.Tensor,
    scaling: float,
) -> Part:
    """keys, values: float32 `[rows, head_dim]`; logs: of how many tokens they are the mean."""
    flat = queries.flatten(1, -2).float() * scaling
    scores = capped(torch.bmm(flat, keys[:, :, None])[:, :, 0], layer.spec.cap) + logs
    shape = (len(values), *[1] * (queries.ndim - 2), values.shape[1])
    return values.view(shape), scores.view(queries.shape[:-1])


def beside(out: torch.Tensor, lse: torch.Tensor | None, left: Part | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An output of kernels, `[..., head_dim]`, and its log-sum-exp, merged with `left` if there is something."""
    if left is None:
        return out, lse
    assert lse is not None
    return merge([(out, lse), left], out.dtype)


def compensates(layer: Layer) -> bool:
    """Whether some of its rows keep a compensation token."""
    return any(extent.compensate for extent in layer.extents)
