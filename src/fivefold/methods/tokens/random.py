"""Random tokens: what any choice must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fivefold.kernels.watched import draws
from fivefold.methods import RecentPolicy, floor_param, keep_param, param, register
from fivefold.store import Held


@register(slot="tokens", name="random", paper="none: a baseline")
@dataclass(frozen=True)
class RandomTokens(RecentPolicy):
    """Every KV head holds `keep` of the prompt's tokens: the first `sink`, the `recent` share of them the newest ones,
    and the rest at random, the same ones in every run. A baseline for the methods that choose.

    Bytes per head: max(floor, sink + 1, round(keep * prompt)) tokens in pages, and 8 bytes for each of them (position,
    score).
    """

    default_keep = 0.2
    keep: float | None = keep_param(default_keep)
    floor: int | None = floor_param()
    recent: float = param(0.5, "fraction of those that are the most recent tokens", low=0, high=1)
    sink: int = param(4, "first tokens that never go", low=0)
    seed: int = param(0, "of the choice", low=0)
    observes = 0
    watches = False

    def worth(self, held: Held) -> torch.Tensor:
        place = held.layer * held.kv_heads + (held.places % held.kv_heads)[:, None].to(held.positions.device)
        return draws(held.positions, place, self.seed)

    @property
    def loses(self) -> int:  # type: ignore[override]
        return self.seed
