"""CSKV: a few numbers for all heads of a token, from which keys and values are made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.calibrate.profile import Profile
from fivefold.errors import ProfileError, RecipeError
from fivefold.kernels.pack import fill_rows
from fivefold.kernels.planar import PLANES, dequantise, pack, quantise, unpack_planes
from fivefold.kernels.shared import shared
from fivefold.methods import Codec, Method, check_finite, param, register
from fivefold.methods.before_rope import BeforeRope
from fivefold.store import Context, Field, LayerSpec, PageLayout, Rope
from fivefold.store.context import running

Bases = tuple[torch.Tensor, torch.Tensor]
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
class Cskv(Method):
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

    def excludes(self, other: Method) -> str | None:
        if other.slot == "bits":
            return f"both say what a page holds; use cskv(bits=4), or {other.name} alone."
        return None

    @property
    def exact_tokens(self) -> int:
        return self.window

    def ranks(self, head_dim: int) -> tuple[int, int]:
        """Features per head of keys and of values."""
        keeps = self.keep, self.keep if self.value_keep is None else self.value_keep
        first, second = (max(1, round(keep * head_dim)) for keep in keeps)
        return first, second

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        wanted = (keep or 0 for keeps in (self.keep, self.value_keep) for keep in _each(keeps))
        return CskvLearner(specs, max(HELD, *wanted))

    def codec(self, spec: LayerSpec) -> CskvCodec:
        if spec.rope is None:
            raise RecipeError(f"cskv() stores keys as they are before RoPE, and {spec.no_rope}: use another method.")
        ranks = self.ranks(spec.head_dim)
        missing = (
            f"cskv() has learned nothing of this model ({spec.model}): run fivefold calibrate --recipe 'cskv()', and "
            "give the folder as cskv(profile=...)."
        )

        def blank() -> dict[str, Any]:
            rank, weight = max(ranks) * spec.kv_heads, spec.blank(spec.layers, spec.channels)
            factor = spec.blank(spec.layers, spec.channels, rank)
            tensors = {"key_factor": factor, "value_factor": factor, "key_weight": weight}
            return {"layers": list(range(spec.layers)), "rank": rank, **tensors}

        profile = self.profile_for(spec, self.profile, missing, blank)
        held, needed = profile.settings["rank"], max(ranks) * spec.kv_heads
        if needed > held:
            name = self.profile or f"cskv-{spec.model}"
            raise ProfileError(
                f"the profile {name!r} holds {held} directions and {self} needs {needed}: calibrate with that recipe."
            )
        return CskvCodec(spec, profile, ranks, self.bits)


def _each(value: Any) -> tuple[Any, ...]:
    """The values of a parameter, which may be a list by layer."""
    return value if isinstance(value, tuple) else (value,)


class CskvLearner(Learner):
    """Sums the second moments of keys, values, what attention makes of values, and queries, float64.

    The profile holds, for every layer, n = kv_heads * head_dim, R = `rank`: key_factor, value_factor float16
    [layer, n, R] with `factor factor^T` ~ the moments to be kept (of keys times `key_weight` float32 [layer, n]).
    """

    def __init__(self, specs: Sequence[LayerSpec], keep: float) -> None:
        super().__init__()
        self.layers = [spec.layer for spec in specs]
        self.ropes = {spec.layer: spec.rope for spec in specs}
        self.channels = specs[0].kv_heads * specs[0].head_dim
        self.rank = min(self.channels, max(1, round(keep * specs[0].head_dim)) * specs[0].kv_heads)

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        moments: tuple[Capture, Capture] = ("keys", "values")
        for name in moments:
            x = captured[name].transpose(1, 2).flatten(2).flatten(0, 1).double()
            self.add(f"{name}.{layer}", x.T @ x)
        queries = captured["queries"]
        grouped = queries.unflatten(1, (captured["keys"].shape[1], -1))
        self.add(f"queries.{layer}", grouped.double().square().mean((0, 2, 3)))
        for one in zip(queries, captured["keys"], captured["values"]):
            self.add(f"attended.{layer}", attended(*one, self.ropes[layer]))

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        tensors: dict[str, list[torch.Tensor]] = {"key_factor": [], "value_factor": [], "key_weight": []}
        for number, layer in enumerate(self.layers):
            progress(number, len(self.layers), "Fitting")
            rope = self.ropes[layer]
            weight = pair_weight(self.sums[f"queries.{layer}"], 0 if rope is None else rope.pairs)
            tensors["key_weight"].append(weight.float())
            moments = self.sums[f"keys.{layer}"] * weight[:, None] * weight
            tensors["key_factor"].append(_factor(moments, self.rank))
            parts = (self.sums[f"{name}.{layer}"] for name in ("attended", "values"))
            sums, values = (x / x.diagonal().mean().clamp(min=1e-30) for x in parts)
            tensors["value_factor"].append(_factor(sums + VALUES * values, self.rank))
        settings = {"layers": self.layers, "rank": self.rank}
        return settings, {name: torch.stack(parts) for name, parts in tensors.items()}


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


def _factor(moments: torch.Tensor, rank: int) -> torch.Tensor:
    """float16 F `[n, rank]` with `F F^T` the best approximation of a multiple of `moments` whose mean square is 1."""
    values, vectors = torch.linalg.eigh(moments / moments.diagonal().mean().clamp(min=1e-30))
    return (vectors.flip(1)[:, :rank] * values.flip(0)[:rank].clamp(min=0).sqrt()).half()


@shared(128)
def bases(factor: torch.Tensor, weight: torch.Tensor | None, layer: int, channels: tuple[int, ...], rank: int) -> Bases:
    """A `[channels, rank]` and B `[rank, channels]`, float32, for these channels: factor, weight (None: 1) as in a
    profile, with `layer` the row of a layer there."""
    mine = list(channels)
    vectors = torch.linalg.svd(factor[layer, mine].double(), full_matrices=False)[0][:, :rank]
    root = torch.ones(()).double() if weight is None else weight[layer, mine, None].double()
    return (root * vectors).float(), (vectors / root).T.contiguous().float()


class CskvCodec(Codec):
    """Pages of features, each head's an equal share of those of its group of heads.

    Fields, r and s features a head for keys and values: in 16 bits keys float16 [128, r], values float16 [128, s]; else
    planar words int16 [32, r] with scale and zero float16 [planes, r], and the same for values.
    """

    contextual = positional = True
    group = 32

    def __init__(self, spec: LayerSpec, profile: Profile, ranks: tuple[int, int], bits: int) -> None:
        assert spec.rope is not None
        self.spec, self.profile, self.ranks, self.bits, self.rope = spec, profile, ranks, bits, spec.rope
        half, fields = torch.float16, []
        tokens = 128 if bits == 16 else PLANES[bits] * 32
        for name, rank in zip(("key", "value"), ranks):
            if bits == 16:
                fields.append(Field(f"{name}s", (tokens, rank), half, "codes"))
            else:
                fields += [
                    Field(f"{name}_words", (32, rank), torch.int16, "codes"),
                    Field(f"{name}_scale", (tokens // 32, rank), half, "scales"),
                    Field(f"{name}_zero", (tokens // 32, rank), half, "scales"),
                ]
        self.layout = PageLayout(f"cskv{bits}-{ranks[0]}-{ranks[1]}", tokens, tuple(fields))
        self._bases: dict[tuple[tuple[int, ...], ...], list[torch.Tensor]] = {}

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        check_finite(keys, values)

    def bases(self, context: Context) -> list[torch.Tensor]:
        """A and B of keys (channels in the paired order) and of values: `[groups or 1, n, rank]`, `[.., rank, n]`."""
        groups = tuple(context.groups)
        if groups not in self._bases:
            tensors, layer = self.profile.tensors, self.profile.settings["layers"].index(self.spec.layer)
            plain = torch.arange(self.spec.head_dim)
            parts: list[Bases] = []
            for name, weight, order, rank in (
                ("key_factor", tensors["key_weight"], self.rope.order, self.ranks[0]),
                ("value_factor", None, plain, self.ranks[1]),
            ):
                each = []
                for heads in groups:
                    channels = (torch.tensor(heads)[:, None] * self.spec.head_dim + order).flatten()
                    made = tuple(channels.tolist()), rank * len(heads)
                    each.append(bases(tensors[name], weight, layer, *made))
                parts.append((torch.stack([down for down, _ in each]), torch.stack([up for _, up in each])))
            self._bases[groups] = [x.to(self.spec.device) for pair in parts for x in pair]
        return self._bases[groups]

    @property
    def fingerprint(self) -> str:
        return self.profile.sha256

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for made in self._bases.values() for x in made)

    def forget(self) -> None:
        self._bases.clear()

    def of(self, context: Context) -> _Bound:
        return _Bound(self, context)


class _Bound(BeforeRope):
    """The codec on the pages of some rows."""

    codec: CskvCodec
    planes = 1

    def __init__(self, codec: CskvCodec, context: Context) -> None:
        super().__init__(codec, context)
        self.key_down, self.key_up, self.value_down, self.value_up = codec.bases(context)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        self.codec.check(keys, values)
        context, tokens = self.context, keys.shape[1]
        out: dict[str, torch.Tensor] = {}
        for name, x, down, rank in (
            ("key", self.unturned(keys), self.key_down, self.codec.ranks[0]),
            ("value", context.join(values.float()), self.value_down, self.codec.ranks[1]),
        ):
            features = (x.flatten(2) @ down).unflatten(2, (context.together, rank))
            out |= self._put(name, context.part(features, tokens), slot, opened)
        return out

    def _put(
        self, name: str, features: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """The fields of pages whose slots from `slot` on hold features `[pages, tokens, rank]`."""
        bits, tokens = self.codec.bits, self.layout.tokens
        if bits == 16:
            parts = {f"{name}s": (features.half(), slot, tokens)}
            out = {}
        else:
            grouped = features.unflatten(1, (-1, 32)).transpose(2, 3)  # [pages, planes, rank, 32]
            codes, scale, zero = quantise(grouped, bits)
            words = None if opened is None else opened[f"{name}_words"]
            out = {f"{name}_words": pack(codes.transpose(2, 3).flatten(1, 2), bits, slot // 32, words)}
            parts = {
                f"{name}_scale": (scale.squeeze(-1), slot // 32, tokens // 32),
                f"{name}_zero": (zero.squeeze(-1), slot // 32, tokens // 32),
            }
        for field, (new, at, count) in parts.items():
            out[field] = fill_rows(new, at, count, None if opened is None else opened[field])
        return out

    def _features(self, name: str, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """The features of pages `[rows * pages, *shape]` or `[rows, pages, *shape]`: float32 `[groups, tokens, n]`."""
        if self.codec.bits == 16:
            x = fields[f"{name}s"].float()
        else:
            codes = unpack_planes(fields[f"{name}_words"], self.codec.bits)
            scale, zero = (fields[f"{name}_{part}"][..., None, :] for part in ("scale", "zero"))
            x = dequantise(codes, scale, zero).flatten(-3, -2)
        return self.context.join(x).flatten(2)

    def arranged(self, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        features = self._features("key", fields)
        return {"features": features.unflatten(1, (1, -1, self.layout.tokens))}

    def before(self, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        features = parts["features"]
        columns = torch.matmul(self.key_up.transpose(1, 2), features.flatten(1, 3).transpose(1, 2))
        return columns.unflatten(2, features.shape[1:4]), None

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.matmul(self._features("value", fields), self.value_up).unflatten(2, (self.context.together, -1))
        return self.keys(fields), self.context.part(values, self.layout.tokens)

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        # The features are weighted, and only the sum is made into a value.
        features, together = self._features("value", fields), self.context.together
        rows, query, tokens = weights.shape
        summed = torch.bmm(weights.reshape(-1, together * query, tokens), features).unflatten(1, (together, query))
        up = self.value_up.unflatten(2, (together, -1)).transpose(1, 2)  # [groups or 1, together, rank, head_dim]
        return torch.matmul(summed, up).reshape(rows, query, -1)
