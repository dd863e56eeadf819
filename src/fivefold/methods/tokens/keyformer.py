"""Keyformer: key tokens by attention with Gumbel noise and a rising temperature, and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fivefold.kernels.shared import shared
from fivefold.kernels.watched import PRIME, Noise
from fivefold.methods import RecentPolicy, floor_param, keep_param, param, register
from fivefold.store import Held

# Noise is read from a table of this many draws, from a place that depends on the query: a prime.
_DRAWS = 131071
# Weights that are looked at a time: they stay in the processor's cache.
_BLOCK = 1 << 19


@register(
    slot="tokens",
    name="keyformer",
    paper="Adnan et al., Keyformer: KV Cache Reduction through Key Tokens Selection for Efficient Generative "
    "Inference, MLSys 2024 (arXiv:2403.09054)",
)
@dataclass(frozen=True)
class Keyformer(RecentPolicy):
    """Every KV head holds `keep` of the prompt's tokens: the `recent` share of them is the newest ones, the rest those
    with the highest score, the sum over queries of `softmax((x + g) / tau)` over the keys that are held: x the
    attention logits, g Gumbel noise drawn anew for every query and key (section 3.2, Algorithm 1).

    tau is `tau_init` for the prompt and rises to `tau_end` over `steps` generated tokens. The query heads of a KV head
    add up. The paper chooses among all but the recent tokens at every step, and so does this; in the official code a
    token that leaves the recent window is lost before it is ever compared, so that its choice never changes after
    the prompt. The noise of a query and a key is the same in every run with a `seed`, whatever the chunks.

    Bytes per head: max(floor, round(keep * prompt)) tokens in pages, and 8 bytes for each of them (position, score).
    """

    default_keep = 0.6
    keep: float | None = keep_param(default_keep)
    floor: int | None = floor_param()
    recent: float = param(0.3, "fraction of those that are the most recent tokens", low=0, high=1)
    tau_init: float = param(1.0, "temperature of the prompt's scores", low=0.01)
    tau_end: float = param(2.0, "temperature after `steps` tokens", low=0.01)
    steps: int = param(512, "generated tokens over which the temperature rises", low=1)
    seed: int = param(0, "of the noise", low=0)

    def observe(self, weights: torch.Tensor, held: Held, first: int) -> torch.Tensor:
        _, group, queries, slots = weights.shape
        tau = self.temperature(first + 1 - held.basis if slots == held.slots else 0)
        head = held.places % held.kv_heads
        where = torch.arange(first, first + queries, device=weights.device)
        for part in (torch.arange(group, device=weights.device)[:, None], head[:, None, None]):
            where = where * PRIME + part
        start = ((where * PRIME + held.layer) * PRIME + self.seed) % _DRAWS
        weights, start = weights.flatten(1, 2), start.flatten(1)
        added = weights.new_zeros((held.rows, slots))
        step = weights.shape[1] if weights.is_cuda else max(1, _BLOCK // (held.rows * slots))
        for part, at in zip(weights.split(step, 1), start.split(step, 1)):
            added += self.added(part.mul_(self._noise(held, at, slots)), tau)
        return added

    def noise(self, device: torch.device) -> Noise:
        return Noise(_draws(self.seed, device), self.seed, self.tau_init, self.tau_end, self.steps)

    def _noise(self, held: Held, start: torch.Tensor, slots: int) -> torch.Tensor:
        """exp(g) `[rows, queries, slots]` of queries whose noise begins at `start [rows, queries]` of the draws."""
        table = _repeated(self.seed, 1 + -(-(held.seen + slots) // _DRAWS), start.device)
        if not held.slots:  # key positions count from 0, so that a query's noise is a piece of the table
            return table.as_strided((_DRAWS, slots), (1, 1)).index_select(0, start.flatten()).view(*start.shape, slots)
        # The rows of a decoding step hold its token already; those of a chunk stand behind them.
        behind = torch.arange(held.seen, held.seen + slots - held.slots, device=start.device)
        positions = torch.cat([held.positions, behind.expand(held.rows, -1)], 1)
        return table[start[..., None] + positions[:, None]]

    def temperature(self, generated: int) -> float:
        """After so many generated tokens."""
        return self.tau_init + (self.tau_end - self.tau_init) * min(1.0, max(0, generated) / self.steps)

    @staticmethod
    def added(weights: torch.Tensor, tau: float) -> torch.Tensor:
        """The sum over queries of `softmax((x + g) / tau)`, `[rows, slots]`, from `exp(x + g) [rows, queries, slots]`.

        A factor that a query has in common does not matter; the weights may be overwritten.
        """
        if tau != 1:
            weights.pow_(1 / tau)
        return (weights.sum(-1, keepdim=True).reciprocal_().transpose(1, 2) @ weights)[:, 0]


@shared(4)
def _draws(seed: int, device: torch.device) -> torch.Tensor:
    """exp(g) of Gumbel draws: one over an exponential draw."""
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(_DRAWS).exponential_(generator=generator).clamp_(min=1e-6).reciprocal_().to(device)


@shared(4)
def _repeated(seed: int, times: int, device: torch.device) -> torch.Tensor:
    return _draws(seed, device).repeat(times)
