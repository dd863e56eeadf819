"""SnapKV: of the prompt, what its last tokens attend to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fivefold.errors import RecipeError
from fivefold.methods import TokenPolicy, floor_param, keep_param, param, register
from fivefold.store import Held


@register(
    slot="tokens",
    name="snapkv",
    paper="Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, NeurIPS 2024 (arXiv:2404.14469)",
)
@dataclass(frozen=True)
class SnapKV(TokenPolicy):
    """Every KV head holds `keep` of the prompt's tokens: the last `window` ones, and those that the window's queries
    attend to most, after pooling over `kernel` neighbours (section 4). What is generated is held. A prompt that comes
    token by token is taken in chunks of `window` tokens, so that up to as many more are held.

    The floor is the official code's `max_capacity_prompt`, below which it leaves a prompt alone.

    The official code gives every query head tokens of its own, on keys repeated for it; here, as in other
    implementations for grouped queries, the query heads of a KV head are averaged and its cache stays one. Pooling
    comes after that, which is the same for the mean and not for the maximum.

    Bytes per head: max(floor, window, round(keep * prompt)) tokens and all generated ones in pages, and 8 bytes for
    each of them (position, score).
    """

    default_keep, default_floor = 0.2, 2048
    keep: float | None = keep_param(default_keep)
    floor: int | None = floor_param(default_floor)
    window: int = param(32, "last tokens of the prompt, whose attention counts", low=1)
    kernel: int = param(7, "neighbours that are pooled, an odd number", low=1)
    pooling: str = param("mean", "how they are pooled", choices=("mean", "max"))
    accumulates = watches = trims = False

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise RecipeError(f"snapkv(kernel={self.kernel}) has no middle: use an odd number.")

    @property
    def observes(self) -> int:  # type: ignore[override]
        return self.window

    @property
    def always(self) -> int:
        return self.window

    def observe(self, weights: torch.Tensor, held: Held, first: int) -> torch.Tensor:
        return weights.mean(1).sum(1)

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        window = min(self.window, budget, held.slots)
        out = torch.full_like(held.scores, float("inf"))
        before = held.scores[:, None, : held.slots - window]
        if before.shape[2]:
            pool = F.avg_pool1d if self.pooling == "mean" else F.max_pool1d
            out[:, : held.slots - window] = pool(before, self.kernel, 1, self.kernel // 2)[:, 0]
        return out
