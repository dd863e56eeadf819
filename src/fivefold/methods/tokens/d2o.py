"""D2O: layers share the budget by how their attention spreads, and what goes is merged into its like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fivefold.methods import RecentPolicy, floor_param, keep_param, param, register
from fivefold.store import Held

_PIECE = 512  # tokens that are compared with all that stay at a time


@register(
    slot="tokens",
    name="d2o",
    paper="Wan et al., D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large Language "
    "Models, ICLR 2025 (arXiv:2406.13035)",
)
@dataclass(frozen=True)
class D2O(RecentPolicy):
    """Every KV head holds `keep` of the prompt's tokens on average over the layers: the first `sink`, the `recent`
    share of them the newest ones, the rest those that received most attention.

    Layers (section 3.2): the variance of the attention that each token received, min-max scaled over the heads of a
    layer and averaged, is m; a layer's share of the budget is softmax(-m) over the layers, so that layers whose
    attention is dense hold more. So tokens go once all layers have seen the prompt. Of a text that comes token by token
    every layer has an even share.

    Tokens (section 3.3): each token that goes has a nearest token that stays, by the cosine similarity u of their keys.
    With u at least tau it is merged into it, else lost: the key and value that stay become the mean of themselves and
    of u times those that go, as in the official code. tau is the mean of u at first, then `alpha * tau + beta *
    mean(u)`.

    Differences from the official code, which shares one decision between unrelated tokens of different heads: every KV
    head decides for itself, with its own tau. All layers are compressed (there, the first two and the last are not,
    beyond the budget), and the query heads of a KV head add up.

    Bytes per head: max(floor, sink + 1, round(keep * share * prompt)) tokens in pages, and 8 bytes for each of them
    (position, score).
    """

    default_keep = 0.2
    keep: float | None = keep_param(default_keep, "fraction of the prompt's tokens that a head holds on average")
    floor: int | None = floor_param()
    recent: float = param(0.5, "fraction of those that are the most recent tokens", low=0, high=1)
    sink: int = param(4, "first tokens that never go", low=0)
    alpha: float = param(0.3, "weight of the threshold so far", low=0, high=1)
    beta: float = param(0.7, "weight of the similarities of those that go now", low=0, high=1)
    layers: bool = param(True, "whether layers share the budget by their variance; else evenly")

    merging: bool = param(True, "whether what goes is merged into its like; else it is lost")

    @property
    def merges(self) -> bool:  # type: ignore[override]
        return self.merging

    @property
    def merges_steps(self) -> bool:  # type: ignore[override]
        return self.merging

    @property
    def absorbs(self) -> tuple[float, float] | None:
        return (self.alpha, self.beta) if self.merging else None

    @property
    def waits(self) -> bool:  # type: ignore[override]
        return self.layers

    def statistic(self, held: Held) -> torch.Tensor:
        spread = held.scores.var(1) if held.slots > 1 else held.scores.new_zeros(held.rows)
        # Over the heads of one sequence's layer.
        same = held.sequences[:, None] == held.sequences
        low = torch.where(same, spread, float("inf")).amin(1)
        high = torch.where(same, spread, float("-inf")).amax(1)
        return (spread - low) / (high - low + 1e-6)

    def shares(self, statistics: torch.Tensor) -> torch.Tensor:
        return (-statistics).softmax(0) * len(statistics)

    def _threshold(self, held: Held, mean: torch.Tensor) -> torch.Tensor:
        before = held.extra.get("threshold")
        return mean if before is None else self.alpha * before + self.beta * mean

    def merge(
        self, held: Held, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        rows, slots, dim = keys.shape
        goes = torch.ones((rows, slots), dtype=torch.bool, device=keys.device).scatter_(1, kept, False)
        gone = goes.sort(dim=1, descending=True, stable=True).indices[:, : slots - kept.shape[1]]
        old_keys, old_values = _take(keys, gone), _take(values, gone)
        new_keys, new_values = _take(keys, kept), _take(values, kept)
        similarity, nearest = most_similar(old_keys, new_keys)
        threshold = self._threshold(held, similarity.mean(1))
        weights = similarity * (similarity >= threshold[:, None])
        count = torch.ones(rows, kept.shape[1], device=keys.device)
        count.scatter_add_(1, nearest, (similarity >= threshold[:, None]).to(count.dtype))
        index = nearest[:, :, None].expand(-1, -1, dim)
        for new, old in ((new_keys, old_keys), (new_values, old_values)):
            new.scatter_add_(1, index, old * weights[:, :, None]).div_(count[:, :, None])
        return new_keys, new_values, {**held.extra, "threshold": threshold}

    def merge_step(
        self, held: Held, keys: Sequence[torch.Tensor], goes: torch.Tensor, gone: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        # Sums of products: a matrix times one column is slower on a CPU.
        unit = torch.nn.functional.normalize(gone.float(), dim=-1)[:, None]
        like = [(x.float() * unit).sum(-1) / x.float().norm(dim=-1).clamp_(min=1e-12) for x in keys]
        similarities = torch.cat(like, 1).scatter_(1, goes[:, None], float("-inf"))
        into = similarities.argmax(1)  # much faster than max with its indices
        similarity = similarities.gather(1, into[:, None])[:, 0]
        threshold = self._threshold(held, similarity)
        merged = similarity >= threshold
        weights = torch.stack([torch.ones_like(similarity), similarity * merged], 1) / (1.0 + merged)[:, None]
        return into, weights, {**held.extra, "threshold": threshold}


def _take(x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return x.gather(1, slots[:, :, None].expand(-1, -1, x.shape[2]))


def most_similar(gone: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each of `gone [rows, a, head_dim]` the highest cosine similarity with `kept [rows, b, head_dim]`; which."""
    unit = torch.nn.functional.normalize(kept, dim=-1).transpose(1, 2)
    best = [(torch.nn.functional.normalize(part, dim=-1) @ unit).max(-1) for part in gone.split(_PIECE, 1)]
    return torch.cat([b.values for b in best], 1), torch.cat([b.indices for b in best], 1)
