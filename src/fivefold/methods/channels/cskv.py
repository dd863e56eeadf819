"""CSKV: a few numbers for all heads of a token, from which keys and values are made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fivefold.calibrate.learner import Capture, Learner
from fivefold.methods import param, register
from fivefold.methods.low_rank import FactorLearner, LowRankCodec, LowRankMethod, factor, profile_of
from fivefold.store import LayerSpec, Rope
from fivefold.store.context import running

HELD = 0.4
"""A profile holds what is needed for this part of the channels, or for `keep` if that is more."""
VALUES = 2.0
"""How much values count beside their weighted sums: with less, facts that are seldom attended to are lost."""


@register(
    slot="channels",
    name="cskv",
    paper="Wang et al., CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios, ENLSP at "
    "NeurIPS 2024 (arXiv:2409.10593)",
)
@dataclass(frozen=True)
class Cskv(LowRankMethod):
    """Low-rank keys and values of all kv heads of a layer together, the recent tokens exact (sections 2.2 and 2.3).

    A token's keys before RoPE, of all n = kv_heads * head_dim channels, become features `c = k A`, and are made again
    as `c B`, then turned by RoPE; values likewise. The two branches of the paper are the tiers: the last `window`
    tokens (to window + 31, since 32 are packed at a time) are exact, older ones features.

    A and B minimise a reconstruction loss over the calibration text. The paper descends on it from an activation-aware
    SVD (ASVD); its minimum has a closed form, the leading eigenvectors of the second moments, which is taken here
    (`benchmarks/cskv_fit.py` compares them). The loss is the paper's, the mean square, but of what attention makes of
    keys and values. Of keys, channels are weighted by the mean square of the queries in the same pair of channels that
    RoPE turns, since an error matters by its product with queries. Of values, it is that of their weighted sums over
    the tokens that the text's queries attend to (for all heads' values with each query head's weights), since sums of
    what is made again are what is made again of sums; values themselves count twice as much,
    for what is seldom attended to.

    Heads that hold other tokens than the rest of their layer (`duo`, `streaming`) get a basis of their own, worked out
    from the same moments; where a policy chooses for each head alone, every head does.

    Bytes per packed token of one head, with r = round(keep * head_dim) features each for keys and values (of values
    `value_keep`): `4 r` in 16 bits; in b bits `2 r (2 / planes + 4 / 32)`, planes = 4 or 2 for 4 or 8 bits: codes, and
    a float16 scale and zero point for 32 tokens of a feature, of keys as in the official code, and of values too (there
    per token; but features are sorted by their size, so one large one would cost all others their precision).
    """

    captures: ClassVar[tuple[Capture, ...]] = ("keys", "queries", "values")

    keep: float = param(0.2, "fraction of channels that is stored", low=0.01, high=1, by_layer=True)
    window: int = param(32, "recent tokens that stay exact", low=0, by_layer=True)
    bits: int = param(16, "bits a stored number", choices=(4, 8, 16), by_layer=True)
    value_keep: float | None = param(
        None, "the same fraction for values, if not `keep`", low=0.01, high=1, by_layer=True
    )
    profile: str | None = param(None, "folder of a profile, if not the one that ships for the model")

    def ranks(self, head_dim: int) -> tuple[int, int]:
        """Features per head of keys and of values."""
        keeps = self.keep, self.keep if self.value_keep is None else self.value_keep
        first, second = (max(1, round(keep * head_dim)) for keep in keeps)
        return first, second

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        wanted = (keep or 0 for keeps in (self.keep, self.value_keep) for keep in _each(keeps))
        return CskvLearner(specs, max(HELD, *wanted))

    def codec(self, spec: LayerSpec) -> LowRankCodec:
        profile = profile_of(self, spec, self.profile, max(self.ranks(spec.head_dim)), weighted=True)
        bits = None if self.bits == 16 else self.bits
        return LowRankCodec(f"cskv{self.bits}", spec, profile, self.ranks(spec.head_dim), bits)


def _each(value: Any) -> tuple[Any, ...]:
    """The values of a parameter, which may be a list by layer."""
    return value if isinstance(value, tuple) else (value,)


class CskvLearner(FactorLearner):
    """Also sums the second moments of what attention makes of values, and of queries, float64.

    The profile's factors are of the moments to be kept, of keys times `key_weight`, float32 [layer, n].
    """

    def __init__(self, specs: Sequence[LayerSpec], keep: float) -> None:
        super().__init__(specs, keep)
        self.ropes = {spec.layer: spec.rope for spec in specs}

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        super().see(layer, captured)
        queries = captured["queries"]
        grouped = queries.unflatten(1, (captured["keys"].shape[1], -1))
        self.add(f"queries.{layer}", grouped.double().square().mean((0, 2, 3)))
        for one in zip(queries, captured["keys"], captured["values"]):
            self.add(f"attended.{layer}", attended(*one, self.ropes[layer]))

    def fitted(self, layer: int) -> dict[str, torch.Tensor]:
        rope = self.ropes[layer]
        weight = pair_weight(self.sums[f"queries.{layer}"], 0 if rope is None else rope.pairs)
        parts = (self.sums[f"{name}.{layer}"] for name in ("attended", "values"))
        sums, values = (x / x.diagonal().mean().clamp(min=1e-30) for x in parts)
        return {
            "key_factor": factor(self.sums[f"keys.{layer}"] * weight[:, None] * weight, self.rank),
            "value_factor": factor(sums + VALUES * values, self.rank),
            "key_weight": weight.float(),
        }


def attended(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Second moments, float64 `[n, n]`, of all heads' values `[kv_head, token, head_dim]` as each query head of every
    8th token weighs them; queries `[query_head, token, head_dim]` and keys before RoPE."""
    heads, tokens, dim = keys.shape
    picked = torch.arange(min(7, tokens - 1), tokens, 8, device=keys.device)
    if rope is not None:
        phases = rope.phases(running(0, tokens, keys.device))
        keys, queries = (rope.rotate(rope.pair(x), phases) for x in (keys, queries))
    later = torch.arange(tokens, device=keys.device) > picked[:, None]
    flat = values.transpose(0, 1).flatten(1)
    out = torch.zeros(heads * dim, heads * dim, dtype=torch.float64, device=keys.device)
    for number, query in enumerate(queries):
        scores = query[picked] @ keys[number * heads // len(queries)].T * dim**-0.5
        sums = (scores.masked_fill_(later, float("-inf")).softmax(-1) @ flat).double()
        out += sums.T @ sums
    return out


def pair_weight(squares: torch.Tensor, pairs: int) -> torch.Tensor:
    """Roots of the mean squares of queries, `[kv_head, head_dim]`, the same for both channels that RoPE turns together;
    flat, and 1 on average (of squares)."""
    turned, rest = squares[:, : 2 * pairs], squares[:, 2 * pairs :]
    both = turned.unflatten(1, (2, pairs)).mean(1, keepdim=True).expand(-1, 2, -1).flatten(1) if pairs else turned
    weight = torch.cat([both, rest], 1).flatten()
    return (weight / weight.mean()).clamp(min=1e-6).sqrt()
