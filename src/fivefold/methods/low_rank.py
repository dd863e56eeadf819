"""What methods that keep fewer numbers than channels share: linear features of the heads of a layer together.

A token's keys before RoPE, of n = heads * head_dim channels, become features `c = k A`, and are made again as `c B`,
then turned by RoPE; values likewise. A and B come from the second moments of calibration text; what is weighed, and
which heads go together, is the method's.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress, second_moments
from fivefold.calibrate.profile import Profile
from fivefold.errors import ProfileError, RecipeError
from fivefold.kernels.choice import takes_cpp
from fivefold.kernels.low_rank import Features
from fivefold.kernels.low_rank.cpu import Side, feature_scores, feature_sums
from fivefold.kernels.pack import fill_rows
from fivefold.kernels.planar import PLANES, dequantise, pack, quantise, unpack_planes
from fivefold.kernels.shared import shared
from fivefold.methods.before_rope import BeforeRope, LearnedCodec, stack
from fivefold.methods.method import Method
from fivefold.store import Context, Field, LayerSpec, PageLayout
from fivefold.store.codec import FLOAT16_MAX, check_finite, planar_fields, planar_parts

Bases = tuple[torch.Tensor, torch.Tensor]
_SIDES: tuple[Capture, Capture] = ("keys", "values")


def factor(moments: torch.Tensor, rank: int) -> torch.Tensor:
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


class LowRankMethod(Method):
    """A method whose pages hold features: the last `window` tokens are exact."""

    window: int

    def excludes(self, other: Method) -> str | None:
        if other.slot == "bits":
            return f"both say what a page holds; use {self.name}(bits=4), or {other.name} alone."
        return None

    @property
    def exact_tokens(self) -> int:
        return self.window


def profile_of(method: Method, spec: LayerSpec, given: str | None, rank: int, weighted: bool) -> Profile:
    """The profile for features of a layer, `rank` for each head: key_factor, value_factor `[layer, n, R]`, and with
    `weighted` key_weight `[layer, n]`.

    given: the folder, if the user named one. Raises `RecipeError` where keys before RoPE are not to be had, and
    `ProfileError` where there is no profile, or one with fewer directions.
    """
    name, needed = method.name, rank * spec.kv_heads
    if spec.rope is None:
        raise RecipeError(f"{name}() stores keys as they are before RoPE, and {spec.no_rope}: use another method.")
    missing = (
        f"{name}() has learned nothing of this model ({spec.model}): run fivefold calibrate --recipe '{name}()', and "
        f"give the folder as {name}(profile=...)."
    )

    def blank() -> dict[str, Any]:
        tensors = {f"{kind}_factor": spec.blank(spec.layers, spec.channels, needed) for kind in ("key", "value")}
        if weighted:
            tensors["key_weight"] = spec.blank(spec.layers, spec.channels)
        return {"layers": list(range(spec.layers)), "rank": needed, **tensors}

    profile = method.profile_for(spec, given, missing, blank)
    if needed > profile.settings["rank"]:
        raise ProfileError(
            f"the profile {given or f'{name}-{spec.model}'!r} holds {profile.settings['rank']} directions and {method} "
            f"needs {needed}: calibrate with that recipe."
        )
    return profile


class FactorLearner(Learner):
    """Sums the second moments of keys before RoPE and of values of all heads of a layer, float64.

    The profile holds, for every layer, n = kv_heads * head_dim, R = `rank`: key_factor, value_factor float16
    [layer, n, R] with `factor factor^T` ~ the moments, scaled so that their diagonal is 1 on average.
    """

    def __init__(self, specs: Sequence[LayerSpec], keep: float) -> None:
        super().__init__()
        self.layers, first = [spec.layer for spec in specs], specs[0]
        self.rank = min(first.channels, max(1, round(keep * first.head_dim)) * first.kv_heads)

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        for name in _SIDES:
            self.add(f"{name}.{layer}", second_moments(captured[name]))

    def fitted(self, layer: int) -> dict[str, torch.Tensor]:
        """What the profile holds of a layer."""
        return {f"{side[:-1]}_factor": factor(self.sums[f"{side}.{layer}"], self.rank) for side in _SIDES}

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        found = []
        for number, layer in enumerate(self.layers):
            progress(number, len(self.layers), "Fitting")
            found.append(self.fitted(layer))
        tensors = {name: torch.stack([one[name] for one in found]) for name in found[0]}
        return {"layers": self.layers, "rank": self.rank}, tensors


class LowRankCodec(LearnedCodec):
    """Pages of features, each head's an equal share of those of its group of heads.

    name: of its pages. ranks: r and s features a head for keys and values. bits: None for numbers as they are, in
    `dtype`. share: so many consecutive heads have features together, if not all that hold the same tokens.

    Fields: keys `dtype` [128, r], values `dtype` [128, s]; in bits planar words int16 [32, r] with scale and zero
    float16 [planes, r], and the same for values.
    """

    group = 32

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        profile: Profile,
        ranks: tuple[int, int],
        bits: int | None,
        dtype: torch.dtype = torch.float16,
        share: int | None = None,
    ) -> None:
        assert spec.rope is not None
        self.spec, self.profile, self.ranks, self.bits, self.rope = spec, profile, ranks, bits, spec.rope
        self.dtype, self.share = dtype, share
        tokens, fields = 128 if bits is None else PLANES[bits] * 32, list[Field]()
        for side, rank in zip(("key", "value"), ranks):
            if bits is None:
                fields.append(Field(f"{side}s", (tokens, rank), dtype, "codes"))
            else:
                fields += planar_fields(side, (32, rank), (tokens // 32, rank))
        self.layout = PageLayout(f"{name}-{ranks[0]}-{ranks[1]}", tokens, tuple(fields), record=True)
        self.limit = FLOAT16_MAX
        if bits is None and dtype != torch.float16:
            self.limit = torch.finfo(dtype).max
        self.orthonormal = "key_weight" not in profile.tensors  # B is A turned round then, and not held beside it
        self.made = {}
        self._readers: dict[tuple[int, ...], Features] = {}

    @property
    def reader(self) -> Features:
        return self.reader_of(tuple(range(self.spec.kv_heads)))

    def reader_of(self, heads: tuple[int, ...]) -> Features:
        if heads not in self._readers:
            teams = self._teams(heads)
            self._readers[heads] = Features(
                ranks=self.ranks,
                bits=self.bits,
                head_dim=self.spec.head_dim,
                dtype=self.dtype,
                team=len(teams[0]),
                blocks=len(teams),
                queries=self.spec.query_heads // self.spec.kv_heads,
                inv_freq=self.rope.inv_freq,
                neighbours=self.rope.neighbours,
                ups=partial(self._ups, teams),
            )
        return self._readers[heads]

    def _teams(self, heads: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Of heads that hold the same tokens: those that share features; all of them as one where these are not as
        many everywhere."""
        split, teams = self.share or self.spec.kv_heads, dict[int, tuple[int, ...]]()
        for head in heads:
            teams[head // split] = (*teams.get(head // split, ()), head)
        return list(teams.values()) if len({len(team) for team in teams.values()}) == 1 else [heads]

    def _ups(self, teams: list[tuple[int, ...]]) -> Bases:
        """B of keys and of values of teams of heads: `[blocks, rank, channels]`."""
        keys, values = (torch.stack([self._blocks(*side, team)[1] for team in teams]) for side in self._sides())
        return keys.to(self.spec.device), values.to(self.spec.device)

    @property
    def nbytes(self) -> int:
        read = [x for reader in self._readers.values() if reader.ready for x in reader.constants]
        return super().nbytes + sum(x.nbytes for x in read)

    def forget(self) -> None:
        super().forget()
        self._readers.clear()

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        check_finite(keys, values, self.limit)

    def bases(self, context: Context) -> Sequence[torch.Tensor]:
        """A and B of keys (channels in the paired order) and of values: `[groups or 1, n, rank]`, `[.., rank, n]`."""
        groups = tuple(context.groups)
        if groups not in self.made:
            parts: list[list[torch.Tensor]] = []
            for side in self._sides():
                each = [self._blocks(*side, heads) for heads in groups]
                downs, ups = torch.stack([down for down, _ in each]), torch.stack([up for _, up in each])
                ups = ups.transpose(1, 2).contiguous().transpose(1, 2)  # a channel's features side by side
                parts.append([downs] if self.orthonormal else [downs, ups])
            self.made[groups] = [x.to(self.spec.device) for some in parts for x in some]
        held = self.made[groups]
        return [x for down in held for x in (down, down.transpose(1, 2))] if self.orthonormal else held

    def _sides(self) -> list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, int]]:
        """Factor, weight, order of a head's channels, and rank of keys and of values."""
        tensors, plain = self.profile.tensors, torch.arange(self.spec.head_dim)
        key, value = tensors["key_factor"], tensors["value_factor"]
        return [(key, tensors.get("key_weight"), self.rope.order, self.ranks[0]), (value, None, plain, self.ranks[1])]

    def _blocks(
        self, factor: torch.Tensor, weight: torch.Tensor | None, order: torch.Tensor, rank: int, heads: tuple[int, ...]
    ) -> Bases:
        """A and B of these heads: a block for those that share features."""
        layer, split = self.profile.settings["layers"].index(self.spec.layer), self.share or self.spec.kv_heads
        shares: dict[int, list[int]] = {}
        for head in heads:
            shares.setdefault(head // split, []).append(head)
        blocks = []
        for some in shares.values():
            channels = (torch.tensor(some)[:, None] * self.spec.head_dim + order).flatten()
            blocks.append(bases(factor, weight, layer, tuple(channels.tolist()), rank * len(some)))
        if len(blocks) == 1:
            return blocks[0]
        return torch.block_diag(*(down for down, _ in blocks)), torch.block_diag(*(up for _, up in blocks))

    @property
    def likeness(self) -> Hashable:
        return self.rope, self.share, self.bits, self.orthonormal

    def bound(self, context: Context, layers: Sequence[LowRankCodec]) -> Bound:
        return Bound(self, context, layers)


class Bound(BeforeRope):
    """The codec on the pages of some rows."""

    codec: LowRankCodec
    planes = 1

    def __init__(self, codec: LowRankCodec, context: Context, layers: Sequence[LowRankCodec]) -> None:
        super().__init__(codec, context)
        self.layers, bases = layers, [layer.bases(context) for layer in layers]
        self.key_up, self.value_up = bases[0][1], bases[0][3]

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        self.codec.check(keys, values)
        context, tokens = self.context, keys.shape[1]
        out: dict[str, torch.Tensor] = {}
        groups = tuple(context.groups)
        for number, (name, x) in enumerate((("key", self.unturned(keys)), ("value", context.join(values.float())))):
            down = stack(self.layers, groups, number if self.codec.orthonormal else 2 * number)
            features = _shrunk(x.flatten(2), down).unflatten(2, (context.together, -1))
            out |= self._put(name, context.part(features, tokens), slot, opened)
        return out

    def _put(
        self, name: str, features: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """The fields of pages whose slots from `slot` on hold features `[pages, tokens, rank]`."""
        bits, tokens = self.codec.bits, self.layout.tokens
        if bits is None:
            parts = {f"{name}s": (features.to(self.codec.dtype), slot, tokens)}
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
        if self.codec.bits is None:
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

    def _side(self, name: str, fields: dict[str, torch.Tensor]) -> Side:
        """As the C++ kernels take it."""
        if self.codec.bits is None:
            return (fields[f"{name}s"],)
        return planar_parts(name, fields)

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        if not takes_cpp(queries):
            return super().scores(queries, fields)
        side, paired = self._side("key", fields), self.rope.pair(queries.float())
        cos_sin = self.rope.cos_sin_of(self.context, side[0].shape[1], self.planes)
        up = self.key_up.transpose(1, 2)
        return feature_scores(paired, side, self.codec.bits or 0, up, cos_sin, self.context.together)

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        values = torch.matmul(self._features("value", fields), self.value_up).unflatten(2, (self.context.together, -1))
        return self.keys(fields), self.context.part(values, self.layout.tokens)

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        # The features are weighted, and only the sum is made into a value.
        (rows, query, tokens), together = weights.shape, self.context.together
        if takes_cpp(weights):
            summed = feature_sums(weights, self._side("value", fields), self.codec.bits or 0, together)
        else:
            summed = torch.bmm(weights.reshape(-1, together * query, tokens), self._features("value", fields))
        summed = summed.unflatten(1, (together, query))
        up = self.value_up.unflatten(2, (together, -1)).transpose(1, 2)  # [groups or 1, together, rank, head_dim]
        return torch.matmul(summed, up).reshape(rows, query, -1)


def _shrunk(x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Features `[layers * groups, tokens, rank]` of x `[layers * groups, tokens, n]`; down: `[layers, groups or 1, n,
    rank]`."""
    layers, each = down.shape[:2]
    if layers == 1 or each > 1:
        return x @ down.flatten(0, 1)
    # In one product `down` would be copied for each group, or numbers rounded otherwise than in a layer alone.
    parts = x.unflatten(0, (layers, -1)).unbind(1)
    return torch.stack([torch.bmm(part, down[:, 0]) for part in parts], 1).flatten(0, 1)
