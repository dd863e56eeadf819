"""Random tokens: what any choice must beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fivefold.methods import TokenPolicy, floor_param, keep_param, param, register
from fivefold.store import Held

_PRIME = 2**31 - 1


@register(slot="tokens", name="random", paper="none: a baseline")
@dataclass(frozen=True)
class RandomTokens(TokenPolicy):
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
    loses = "least"
    ordered = True

    @property
    def always(self) -> int:
        return self.sink + 1

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        # A number of its own for every layer, head and position, by two steps of a multiplicative generator.
        draws = self._draws(held.positions, held.places.to(held.positions.device), held.layer, held.kv_heads)
        stays = held.newest(self._newest(budget)) | (held.positions < self.sink)
        return draws.masked_fill(stays, float("inf"))

    def _draws(self, positions: torch.Tensor, places: torch.Tensor, layer: int, kv_heads: int) -> torch.Tensor:
        place = layer * kv_heads + (places % kv_heads)[:, None]
        draws = (positions + 1 + 1_000_003 * place + 15_485_863 * self.seed) % _PRIME
        return ((draws * 48_271 % _PRIME) ** 2 % _PRIME).float()

    def _newest(self, budget: int) -> int:
        return max(0, min(int(self.recent * budget), budget - self.sink))

    def guards(self, held: Held) -> tuple[torch.Tensor | int, int]:
        return self.sink - 1, self._newest(self.budget(held))

    def order_step(
        self,
        positions: torch.Tensor,
        numbers: torch.Tensor,
        spans: torch.Tensor,
        layer: int,
        kv_heads: int,
        places: torch.Tensor,
    ) -> torch.Tensor:
        last = spans[:, 4:5] - 1  # where the newest token stands
        slots = torch.arange(positions.shape[1], device=positions.device)
        return self._draws(torch.where(slots == last, numbers[:, 1:2], positions), places, layer, kv_heads)
