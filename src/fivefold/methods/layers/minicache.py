"""MiniCache: two adjacent layers share the directions of their keys and values, each keeps its norms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.errors import ProfileError, RecipeError
from fivefold.kernels import directions as kernel
from fivefold.kernels.pack import fill_rows
from fivefold.methods import Codec, Method, PairMethod, TokenPolicy, check_finite, param, register
from fivefold.store import Field, LayerSpec, PageLayout
from fivefold.store.codec import Pair, PairCodec, whole

ALIKE = 0.5
"""Mean cosine of two layers below which a profile warns: there the directions are 60 degrees apart, and a layer that
gets one 0.6 of the way to the other's has an error of 0.6 of its norm."""
_TOKENS_A_PLACE = 64
"""Of so many tokens of a page one key and one value may stay unmerged: 1.6%, and the paper's rule asks for less."""
_OPPOSITE = 1 - 1e-3
"""Distance from which on two directions are opposite, and none lies between them."""
_PARALLEL = 1e-3
"""Sine of an angle below which the great circle is a straight line, to 1e-7."""
SIDES = ("key", "value")


@register(
    slot="layers",
    name="minicache",
    paper="Liu et al., MiniCache: KV Cache Compression in Depth Dimension for Large Language Models, NeurIPS 2024 "
    "(arXiv:2405.14366)",
)
@dataclass(frozen=True)
class MiniCache(PairMethod):
    """From the middle layer on, the keys and values of two adjacent layers become one direction for each token, and a
    norm for each layer (equations 2 and 3).

    For a token of one KV head, x and y its keys in layers l - 1 and l, both `[head_dim]` (values likewise):

        Omega = arccos(x . y / (|x| |y|)),    d = Omega / pi
        e = sin((1 - t) Omega) / sin(Omega) * x / |x|  +  sin(t Omega) / sin(Omega) * y / |y|
        x' = |x| e,    y' = |y| e

    Tokens with `d > d_max - gamma * (d_max - d_min)` are retained: kept in both layers as they are
    ("unmergeable tokens"). That is a share of the range of distances, not of the tokens.

    Keys are those behind RoPE. Both layers turn a token's keys by the same angle, and the arc between two vectors is
    turned with them, so it makes no difference for rotations of whole heads.

    Pairs are (s, s + 1), (s + 2, s + 3), ... with s = `start * layers`; a last layer without a partner stays as it
    is. A prompt's attention is exact, as in the paper; its tokens are merged behind it, all but the last `residual`.
    While generating, tokens wait in the exact tier until 32 of both layers can be merged.

    What is decided here, where the paper leaves it open or has no code (its repository is empty):
    - d_min and d_max are those of one KV head of one sequence, over all that has been packed so far, in this chunk or
      before. For a prompt that is read at once that is the paper's; in chunks, only what has come is known.
    - A page has places for one retained key and one retained value in 64 tokens. Where more are to be retained, the
      farthest of those that are packed together are; the others are merged.
    - Omega near 0: e is on the line between both. Omega near pi, where every arc is as short: retained if there is a
      place, else y's direction (for t > 0.5; x's below it). A vector of zeros takes the other one's direction.
    - Omega is `2 atan2(|u - v|, |u + v|)` of the unit vectors, which is exact where arccos loses half of its digits.

    Beside a method that packs (`kivi`, `gear`), that one packs the directions, times a power of two near
    sqrt(head_dim), so that their numbers are about 1; all other layers it packs as usual. The paper's "4 bits" is
    `minicache() + kivi(bits=4)`. The recent tokens that stay exact are then the larger of both residuals.

    Bytes per packed token, KV head and layer of a pair, with head_dim d, w bytes a number of the model, n bytes a norm
    (4 in float32, else 2), P tokens and R = ceil(P / 64) places a page, c bytes of a token's key and value as the codec
    packs them (`2 * d * w` without one): `c / 2 + 2 * n + 2 * R * d * w / P + 4 * R / P / 2`: half of the directions,
    two norms, retained keys and values, half of their slots (int16). At d = 128 in 16 bits 268 of 512; with
    `kivi(bits=4)`, whose c is 160, 92, or 5.6 times less. A row remembers four distances, 16 bytes.

    `profile` holds mean cosines of adjacent layers; where they are below 0.5, a warning says what merging costs.
    """

    captures: ClassVar[tuple[Capture, ...]] = ("keys", "values")

    start: float = param(0.5, "first layer that is merged: a fraction of the layers, or from 1 on its number", low=0)
    t: float = param(0.6, "where on the arc the direction lies: 0 is the first layer's, 1 the second's", low=0, high=1)
    gamma: float = param(0.05, "share of the range of distances whose farthest tokens stay unmerged", low=0, high=1)
    pairs: tuple | None = param(None, "instead of start: pairs of adjacent layers [[layer, layer + 1], ...]")
    residual: int = param(32, "recent tokens that stay exact", low=0)
    profile: str | None = param(None, "folder of a profile, if not the one that ships for the model")

    def check(self) -> None:
        seen: set[int] = set()
        for pair in self.pairs or ():
            number = isinstance(pair, tuple) and len(pair) == 2 and all(type(i) is int and i >= 0 for i in pair)
            if not number or pair[1] != pair[0] + 1:
                raise RecipeError(f"minicache(pairs=...) holds {pair!r}: write pairs [layer, layer + 1], from 0 on.")
            if seen & set(pair):
                raise RecipeError(
                    f"minicache(pairs=...) names a layer of {list(pair)} twice: each can have one partner."
                )
            seen |= set(pair)

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, TokenPolicy):
            return (
                f"{other.name} chooses tokens in each layer alone, and two layers can share directions of the same "
                "tokens only; use streaming(), which holds the same in all layers."
            )
        packs = type(other).codec is not Method.codec
        if other.slot == "channels" or (packs and other.before_rope and other.captures):
            return (
                f"{other.name} packs keys before RoPE by what it learned of each layer alone, and directions are of "
                "two layers behind it; use kivi or gear to pack them."
            )
        if getattr(other, "unbias", False):
            return (
                "unbias corrects scores for the noise of whole keys, and what is packed are directions; leave it out."
            )
        return None

    def layer_pairs(self, specs: Sequence[LayerSpec]) -> list[tuple[int, int]]:
        there = {spec.layer: spec for spec in specs}
        layers = specs[0].layers if specs else 0
        if self.pairs is not None:
            wanted = [(int(a), int(b)) for a, b in self.pairs]
            for pair in wanted:
                if not set(pair) <= set(there):
                    raise RecipeError(
                        f"minicache(pairs=...) names the layers {list(pair)}, and of this model the cache compresses "
                        f"{sorted(there)}."
                    )
        else:
            first = int(self.start * layers) if self.start < 1 else int(self.start)
            wanted = [(i, i + 1) for i in range(first, layers - 1, 2) if i in there and i + 1 in there]
        out = []
        for one, two in wanted:
            shapes = [(x.kv_heads, x.query_heads, x.head_dim, x.window, x.cap) for x in (there[one], there[two])]
            if shapes[0] == shapes[1]:
                out.append((one, two))
            elif self.pairs is not None:
                raise RecipeError(
                    f"minicache cannot merge layers {one} and {two}, whose heads differ in shape or window."
                )
        if not out:
            raise RecipeError(
                f"{self} finds no two adjacent layers to merge among the {layers} of this model: use a smaller start, "
                "or leave minicache out."
            )
        self._warn(specs[0], out)
        return out

    def _warn(self, spec: LayerSpec, pairs: Sequence[tuple[int, int]]) -> None:
        """A warning where a profile says that these layers are not alike."""
        if spec.device.type == "meta":
            return
        try:
            found = self.profile_for(spec, self.profile, "", dict)
        except ProfileError:
            if self.profile:
                raise
            return
        rows = {tuple(pair): number for number, pair in enumerate(found.settings["pairs"])}
        measured = [pair for pair in pairs if pair in rows]
        if not measured:
            return
        keys, values = (found.tensors[f"{side}_cosine"][[rows[pair] for pair in measured]] for side in SIDES)
        lowest = torch.minimum(keys, values)
        if float(lowest.mean()) < ALIKE:
            worst = measured[int(lowest.argmin())]
            warnings.warn(
                f"the layers that minicache merges are not alike in this model: keys have a mean cosine of "
                f"{keys.mean():.2f} and values of {values.mean():.2f} over {len(measured)} pairs (least alike: layers "
                f"{worst[0]} and {worst[1]}), where merging wants 1; expect much worse text, or use "
                "streaming() or kivi() instead.",
                stacklevel=2,
            )

    def pair_codec(self, spec: LayerSpec, layers: tuple[int, int], inner: Codec | None) -> PairCodec:
        if inner is not None and inner.contextual:
            raise RecipeError("minicache cannot be combined with a codec that works on each layer's rows: use kivi.")
        return MiniCacheCodec(spec, layers, inner or Directions(spec.head_dim, spec.dtype), self.t, self.gamma)

    @property
    def exact_tokens(self) -> int:
        return self.residual

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        return CosineLearner()


class CosineLearner(Learner):
    """Mean cosines of keys and of values of adjacent layers, over all tokens and heads.

    The profile holds, of every pair of adjacent layers, which `settings["pairs"]` lists, key_cosine and value_cosine,
    float32 `[pairs]`. Before RoPE as behind it: both layers turn a token alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last: tuple[int, dict[Capture, torch.Tensor]] | None = None

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        last, self._last = self._last, (layer, captured)
        if last is None or last[0] + 1 != layer or last[1]["keys"].shape != captured["keys"].shape:
            return
        both: tuple[Capture, ...] = ("keys", "values")
        cosines = [torch.cosine_similarity(last[1][side].double(), captured[side].double(), dim=-1) for side in both]
        self.add(f"{layer - 1}", torch.stack([*(x.sum() for x in cosines), cosines[0].new_tensor(cosines[0].numel())]))

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        layers = sorted(map(int, self.sums))
        if not layers:
            raise ProfileError("this model has no two adjacent layers of the same shape: minicache cannot merge any.")
        sums = torch.stack([self.sums[str(layer)] for layer in layers])
        means = (sums[:, :2] / sums[:, 2:]).float()
        settings = {"pairs": [[layer, layer + 1] for layer in layers]}
        return settings, {f"{side}_cosine": means[:, i].contiguous() for i, side in enumerate(SIDES)}


Angles = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def angles(x: torch.Tensor, y: torch.Tensor) -> Angles:
    """Unit vectors of x and y `[..., head_dim]`, their norms, and the angle between them, `[..., 1]` each; float32. A
    vector of zeros has the other one's direction."""
    x, y = x.float(), y.float()
    norms = [torch.linalg.vector_norm(a, dim=-1, keepdim=True) for a in (x, y)]
    u, v = (a / norm.clamp(min=1e-38) for a, norm in zip((x, y), norms))
    u, v = torch.where(norms[0] > 0, u, v), torch.where(norms[1] > 0, v, u)
    apart, along = (torch.linalg.vector_norm(a, dim=-1, keepdim=True) for a in (u - v, u + v))
    return u, v, norms[0], norms[1], 2 * torch.atan2(apart, along)


def merged(x: torch.Tensor, y: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """SLERP of the directions of x and y `[..., head_dim]`: the direction, same shape; both norms and the distance d,
    `[...]`; all float32. See `MiniCache` for angles at both ends."""
    u, v, first, second, omega = angles(x, y)
    sine = omega.sin()
    straight = sine < _PARALLEL
    sine = sine.masked_fill(straight, 1.0)
    weights = [torch.where(straight, part, (part * omega).sin() / sine) for part in (1 - t, t)]
    out = weights[0] * u + weights[1] * v
    length = torch.linalg.vector_norm(out, dim=-1, keepdim=True)
    out = torch.where(length > 1e-3, out / length.clamp(min=1e-3), v)
    return out, first[..., 0], second[..., 0], omega[..., 0] / math.pi


class Directions(Codec):
    """Numbers as they are, in pages of 128 tokens: keys, values `[128, head_dim]` in the model's dtype."""

    group = 32

    def __init__(self, head_dim: int, dtype: torch.dtype) -> None:
        fields = tuple(Field(f"{side}s", (128, head_dim), dtype, "codes") for side in SIDES)
        self.layout = PageLayout("directions", 128, fields)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        dtype = self.layout.fields[0].dtype
        return {
            name: fill_rows(x.to(dtype), slot, 128, None if opened is None else opened[name])
            for name, x in (("keys", keys), ("values", values))
        }

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return fields["keys"].float(), fields["values"].float()

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.bmm(queries.float(), fields["keys"].flatten(1, 2).float().transpose(1, 2))

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.bmm(weights, fields["values"].flatten(1, 2).float())


class MiniCacheCodec(PairCodec):
    """Pages of another codec that hold directions, with each layer's norms, and tokens that stay unmerged.

    Fields besides the inner codec's, of P tokens, R places, head_dim d, for keys and for values: common to both layers
    key_slots int16 [R], the slots of retained tokens, -1 for none; each layer's own key_norms [P], in float32 or
    float16, and key_kept [R, d] in the model's dtype.
    """

    known = 4

    def __init__(self, spec: LayerSpec, layers: tuple[int, int], inner: Codec, t: float, gamma: float) -> None:
        self.layers, self.inner, self.t, self.gamma = layers, inner, t, gamma
        self.group, self.dtype = inner.group, spec.dtype
        tokens = inner.layout.tokens
        self.places = -(-tokens // _TOKENS_A_PLACE)
        self.scale = 1.0 if isinstance(inner, Directions) else 2.0 ** round(math.log2(spec.head_dim) / 2)
        self.norms = torch.float32 if spec.dtype is torch.float32 else torch.float16
        self.limit = torch.finfo(self.norms).max
        self.names = [part.name for part in inner.layout.fields]
        fields = list(inner.layout.fields)
        for side in SIDES:
            fields += [
                Field(f"{side}_slots", (self.places,), torch.int16, "retained"),
                Field(f"{side}_norms", (tokens,), self.norms, "norms", own=True),
                Field(f"{side}_kept", (self.places, spec.head_dim), spec.dtype, "retained", own=True),
            ]
        self.layout = PageLayout(f"minicache.{inner.layout.name}", tokens, tuple(fields))
        self._reader = None
        if isinstance(inner, Directions) or inner.form is not None:
            self._reader = kernel.Directions(inner.form, spec.head_dim, spec.dtype, self.places, self.scale)

    @property
    def reader(self) -> kernel.Directions | None:
        return self._reader

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    @property
    def nbytes(self) -> int:
        return self.inner.nbytes

    def forget(self) -> None:
        self.inner.forget()

    def compiled(self, device: torch.device) -> bool:
        return self.inner.compiled(device)

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        norms = [x.float().norm(dim=-1) for x in (keys, values)]
        check_finite(norms[0], norms[1], self.limit)

    # -- packing ------------------------------------------------------------------------------------------

    def measure(self, first: Pair, second: Pair) -> torch.Tensor:
        """`[rows, 4]`: 1 - d_min and d_max of keys, and of values."""
        *_, one, two, omega = angles(*(torch.cat(pair) for pair in (first, second)))  # of keys, then of values
        keys, values = torch.stack([one, two]).chunk(2, 1)
        check_finite(keys, values, self.limit)
        distance = omega[..., 0] / math.pi
        ends = torch.stack([1 - distance.amin(1), distance.amax(1)], 1)
        return torch.cat(ends.chunk(2), 1)

    def encode_pair(
        self, first: Pair, second: Pair, slot: int, opened: list[dict[str, torch.Tensor]] | None, known: torch.Tensor
    ) -> list[dict[str, torch.Tensor]]:
        # Keys and values are worked on together: [2 * pages, tokens, head_dim].
        both = [torch.cat(pair) for pair in (first, second)]
        direction, *norms, distance = merged(both[0], both[1], self.t)
        near, far = torch.cat(known.chunk(2, 1))[:, :, None].unbind(1)
        apart = distance > torch.clamp(far - self.gamma * (far - (1 - near)), max=_OPPOSITE)

        def before(layer: int, part: str) -> torch.Tensor | None:
            return None if opened is None else torch.cat([opened[layer][f"{side}_{part}"] for side in SIDES])

        slots, index = self._retained(distance.where(apart, -1.0), slot, before(0, "slots"))
        out: list[dict[str, torch.Tensor]] = [{}, {}]
        for layer, (mine, x, norm) in enumerate(zip(out, both, norms)):
            old = before(layer, "kept")
            candidates = x if old is None else torch.cat([old, x], 1)
            kept = candidates.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))
            parts = {
                "slots": slots,
                "norms": fill_rows(norm.to(self.norms), slot, self.layout.tokens, before(layer, "norms")),
                "kept": kept.where((slots >= 0)[:, :, None], torch.zeros_like(kept)).to(self.dtype),
            }
            for part, made in parts.items():
                mine |= zip((f"{side}_{part}" for side in SIDES), made.chunk(2))
        inner = None if opened is None else {name: opened[0][name] for name in self.names}
        keys, values = (direction * self.scale).chunk(2)
        out[0] |= whole(self.inner, self.inner.encode(keys, values, slot, inner))
        return out

    def _retained(
        self, order: torch.Tensor, slot: int, opened: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Slots of retained tokens, int16 `[pages, places]`, and where they stand in what is retained so far and the
        new tokens behind it.

        order: distances of the tokens that are to be retained, `[pages, tokens]`, below 0 of the others.
        """
        there = order.new_zeros((len(order), 0)) if opened is None else (opened >= 0) & (opened < slot)
        # What is retained stays so; the farthest of the new tokens get the places that are left.
        rank = torch.cat([there * 3.0 - 1.0, order], 1)
        best, index = rank.topk(min(self.places, rank.shape[1]), 1)
        slots = torch.arange(slot, slot + order.shape[1], dtype=torch.int16, device=order.device).expand(len(order), -1)
        slots = slots if opened is None else torch.cat([opened, slots], 1)
        slots = slots.gather(1, index).masked_fill(best < 0, -1)
        missing = self.places - slots.shape[1]
        return torch.nn.functional.pad(slots, (0, missing), value=-1), torch.nn.functional.pad(index, (0, missing))

    # -- reading ------------------------------------------------------------------------------------------

    def _inner(self, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: fields[name] for name in self.names}

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        out = []
        for side, x in zip(SIDES, self.inner.decode(self._inner(fields))):
            x = x * (fields[f"{side}_norms"].float() / self.scale)[:, :, None]
            slots = fields[f"{side}_slots"].long()
            for place in range(self.places):  # one by one: slots that say nothing would collide
                at = slots[:, place].clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
                kept = fields[f"{side}_kept"][:, place, None].float()
                x.scatter_(1, at, kept.where((slots[:, place] >= 0)[:, None, None], x.gather(1, at)))
            out.append(x)
        return out[0], out[1]

    def _places(self, slots: torch.Tensor, query: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each place of pages: the column of its token in `[rows, query, pages * tokens]`, int64 `[rows, query,
        pages]`, and whether there is one, `[rows, 1, pages]`. slots: `[rows, pages, places]`."""
        first = torch.arange(slots.shape[1], device=slots.device) * self.layout.tokens
        at = first[:, None] + slots.long().clamp(min=0)
        each = range(self.places)
        return [(at[:, None, :, place].expand(-1, query, -1), slots[:, None, :, place] >= 0) for place in each]

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        queries = queries.float()
        out = self.inner.scores(queries, self._inner(fields))
        out *= (fields["key_norms"].flatten(1).float() / self.scale)[:, None]
        kept = torch.einsum("rqd,rpkd->krqp", queries, fields["key_kept"].float())
        for (at, there), score in zip(self._places(fields["key_slots"], queries.shape[1]), kept):
            out.scatter_(2, at, score.where(there, out.gather(2, at)))
        return out

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        scaled = weights * (fields["value_norms"].flatten(1).float() / self.scale)[:, None]
        parts = []
        for at, there in self._places(fields["value_slots"], weights.shape[1]):
            parts.append(weights.gather(2, at) * there)
            scaled.scatter_(2, at, scaled.gather(2, at) * ~there)
        kept = torch.einsum("krqp,rpkd->rqd", torch.stack(parts), fields["value_kept"].float())
        return self.inner.output(scaled, self._inner(fields)) + kept
