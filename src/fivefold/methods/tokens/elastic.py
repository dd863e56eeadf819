"""Elastic Cache: important tokens are anchors, the others are averaged into the nearest one by position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fivefold.methods import TokenPolicy, floor_param, keep_param, param, register
from fivefold.store import Held
from fivefold.store.rows import Bounds, Packing


@register(
    slot="tokens",
    name="elastic",
    paper="Liu et al., Efficient Inference of Vision Instruction-Following Models with Elastic Cache, ECCV 2024 "
    "(arXiv:2407.18121)",
)
@dataclass(frozen=True)
class ElasticCache(TokenPolicy):
    """Every KV head holds `keep` of all tokens so far, the same ones in all heads of a layer.

    Prompt (section 3.2): importance is the attention that a token received, summed over queries and averaged over
    heads. The first `sink` tokens, the last one and the most important ones stay; every other one is averaged, key and
    value, into the nearest of the important ones by position (the earlier of two equally near).

    Generation (section 3.3): the budget grows with the text; when it is exceeded, the token that stands `offset` from
    the end of what was held of the prompt goes, so that the first and the most recent ones stay.

    The official code takes the order of importance for the ranks and forgets the sinks in the places of merged tokens;
    this is the paper's method.

    Bytes per head: max(floor, sink + 1, ceil(keep * tokens)) tokens in pages, and 8 bytes for each of them (position,
    score).
    """

    default_keep = 0.5
    keep: float | None = keep_param(default_keep, "fraction of the tokens that a head holds")
    floor: int | None = floor_param()
    sink: int = param(4, "first tokens that always stay", low=0)
    offset: int = param(25, "where tokens go while generating, from the end of the held prompt", low=1)

    merging: bool = param(True, "whether what goes is averaged into what stays; else it is lost")
    watches = False

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.merging

    @property
    def always(self) -> int:
        return self.sink + 1

    def budget(self, held: Held) -> int:
        return self._budget(held.seen)

    def _budget(self, tokens: int) -> int:
        return max(self.always, self.least, math.ceil(self.fraction * tokens))

    loses = "oldest"

    def guards(self, held: Held) -> tuple[torch.Tensor | int, int]:
        cut = min(self._cut(held), held.slots)  # those that stand before always do
        low = held.positions.kthvalue(cut, 1).values if cut else held.positions.new_full((held.rows,), -1)
        return low.clamp(min=self.sink - 1), 0

    def step(self, held: Held, bounds: Bounds, packing: Packing | None) -> bool | None:
        # Without a prompt they grow with the text; with fewer tokens than they are, the newest but one goes.
        known = held.prompt and self._cut(held) < int(bounds.length)
        return super().step(held, bounds, packing) if known else None

    def _cut(self, held: Held) -> int:
        return max(self.sink, min(held.basis, self._budget(held.basis)) - self.offset)

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        stays = held.newest(1) | (held.positions < self.sink)
        return held.over_heads(held.scores).masked_fill(stays, float("inf"))

    def victims(self, held: Held, budget: int, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
        cut = self._cut(held)
        order = held.positions
        if among is not None:
            order = order.masked_fill(~among, torch.iinfo(order.dtype).max)
        cut = min(cut, held.slots - count if among is None else int(among.sum(1).min()) - count)
        return order.argsort(1)[:, cut : cut + count]

    def merge(
        self, held: Held, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        dim = keys.shape[2]
        at = held.positions.gather(1, kept)
        # While a cache is only planned nobody knows where they are, but nearly always all of them are held.
        first = self.sink if at.is_meta else int((at[0] < self.sink).sum())
        index = kept[:, :, None].expand(-1, -1, dim)
        if first + 1 >= kept.shape[1]:
            return keys.gather(1, index), values.gather(1, index), held.extra  # no anchors
        nearest = nearest_anchor(held.positions, at[:, first:-1]) + first
        # What stays is a part of its own mean; sinks and the last token take nothing in.
        stays = torch.zeros_like(held.scores, dtype=torch.bool).scatter_(1, kept, True)
        weights = (~stays).to(keys.dtype)
        count = torch.ones_like(at, dtype=keys.dtype).scatter_add_(1, nearest, weights)
        target = nearest[:, :, None].expand(-1, -1, dim)
        merged = [
            x.gather(1, index).scatter_add_(1, target, x * weights[:, :, None]).div_(count[:, :, None])
            for x in (keys, values)
        ]
        return merged[0], merged[1], held.extra


def nearest_anchor(positions: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Which of the ascending `anchors [rows, a]` is nearest to each of `positions [rows, slots]`: int64."""
    right = torch.searchsorted(anchors.contiguous(), positions.contiguous()).clamp_(max=anchors.shape[1] - 1)
    left = (right - 1).clamp_(min=0)
    nearer = (positions - anchors.gather(1, left)).abs() <= (anchors.gather(1, right) - positions).abs()
    return torch.where(nearer, left, right)
