"""GEAR: a quantised base, its largest errors one by one, and the rest of the error as a low-rank product."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fivefold.errors import RecipeError
from fivefold.kernels.gear import Extras, add_scores, extra_output
from fivefold.kernels.planar import PLANES
from fivefold.kernels.planar_decode import Planar
from fivefold.kernels.shared import shared
from fivefold.methods import FLOAT16_MAX, Codec, Method, channels_of, check_finite, param, register
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store import Field, LayerSpec, PageLayout

_LOOPS = 3
# The orthonormal factor is stored times this and the other one divided by it, so that float16 holds both whatever
# the keys are: the square root of the largest page's tokens.
_BALANCE = 16.0


@register(
    slot="bits",
    name="gear",
    paper="Kang et al., GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM, "
    "2024 (arXiv:2403.05527)",
)
@dataclass(frozen=True)
class Gear(Method):
    """`X ~ quantised + outliers + low rank` (section 3): the `sparsity` largest and smallest numbers of each channel of
    keys and of each token of values, half each, are taken out and replaced by the mean; the rest is quantised as
    `base` does; the error that is left is a product of rank `rank`, head by head, by power iteration.

    All three parts belong to a page, which is compressed at once when it is full: 256 tokens at 2 bits, 128 at 4.
    So an outlier's place takes a byte, what a long generation adds is a page's bytes and no more, and the newest
    tokens wait exact in a buffer of a page (the paper: 20 tokens, with factors of rank 2 for each buffer; here they
    would take more than those of rank 4 for a page). `residual` tokens more may stay exact. The official code counts
    outliers of keys by the channels of a token, not the tokens of a channel; here as in the paper, rounded to whole
    numbers of a channel or token: n_k = round(T * sparsity / 2), n_v = round(d * sparsity / 2), twice each. An outlier
    is kept as its distance from the decoded number. `kcvt` is the paper's coarse base: one group for a page's channel
    and one for a token.

    Attention is factored: queries times the factors, never the low-rank product itself.

    Bytes per packed token of one head, head_dim d, T = page tokens: `bits * d / 4` codes, `4 * d / group + 4 * d /
    min(group, d)` scales and zero points (kcvt: `4 * d / T + 4`), `4 * rank * (1 + d / T)` factors, `6 * (n_k * d / T
    + n_v)` outliers with their places. At d = 64, 2 bits: 32 + 8 + 20 + 10.5 = 70.5 of 256 in bfloat16.
    """

    before_rope = False
    bits: int = param(2, "bits a number", choices=(2, 4), by_layer=True, exact=16)
    rank: int = param(4, "columns of the low-rank factors; 0 is none", low=0, high=32, by_layer=True)
    sparsity: float = param(0.02, "fraction of numbers that are outliers; 0 is none", low=0, high=0.5, by_layer=True)
    base: str = param("kivi", "how the rest is quantised", choices=("kivi", "kcvt"))
    group: int = param(
        64, "tokens (keys) or channels (values) that share a scale (kivi)", choices=(32, 64, 128), by_layer=True
    )
    residual: int = param(0, "recent tokens that stay exact besides those that wait", low=0, by_layer=True)

    @property
    def exact_tokens(self) -> int:
        return self.residual

    def codec(self, spec: LayerSpec) -> GearCodec:
        dim, tokens = spec.head_dim, PLANES[self.bits] * 32
        group, channels = (tokens, dim) if self.base == "kcvt" else (self.group, channels_of(self, self.group, dim))
        if self.rank > dim:
            raise RecipeError(f"gear(rank={self.rank}) is more than the model's head_dim of {dim}: use a smaller rank.")
        if dim > 256:
            raise RecipeError(f"gear cannot be used with a head_dim of {dim} (a place takes a byte): use kivi.")
        outliers = round(tokens * self.sparsity / 2), round(dim * self.sparsity / 2)
        return GearCodec(KiviCodec(self.bits, group, channels, dim), self.rank, *outliers)


class GearCodec(Codec):
    """Pages of a base codec with factors and outliers.

    Fields besides the base's, T = tokens, d = head_dim, r = rank, for keys (n outliers of each side of a channel):
    key_left float16 [T, r], key_right float16 [r, d], key_outliers float16 [d, 2n], key_places uint8 [d, 2n] (tokens);
    for values (of a token) value_outliers, value_places [T, 2n] (channels), and the same factors.
    """

    def __init__(self, base: KiviCodec, rank: int, key_outliers: int, value_outliers: int) -> None:
        self.base, self.rank = base, rank
        self.key_outliers, self.value_outliers = key_outliers, value_outliers
        tokens = self.group = base.layout.tokens
        dim = base.layout.fields[0].shape[1]
        fields, places = list(base.layout.fields), []
        half = torch.float16
        for side, count, shape in (("key", key_outliers, (dim,)), ("value", value_outliers, (tokens,))):
            if rank:
                fields += [Field(f"{side}_left", (tokens, rank), half, "low rank")]
                fields += [Field(f"{side}_right", (rank, dim), half, "low rank")]
            if count:
                fields += [Field(f"{side}_outliers", (*shape, 2 * count), half, "outliers")]
                places += [Field(f"{side}_places", (*shape, 2 * count), torch.uint8, "outliers")]
        self.layout = PageLayout(f"gear.{base.layout.name}", tokens, (*fields, *places), record=True)

    @cached_property
    def reader(self) -> Planar:
        base, dim = self.base, self.layout.fields[0].shape[1]
        groups = base.group, base.channels, dim
        outliers = 2 * self.key_outliers, 2 * self.value_outliers
        return Planar(base.bits, base.bits, base.planes, *groups, self.rank, *outliers)

    def compiled(self, device: torch.device) -> bool:
        return self.base.compiled(device)

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        # An outlier's distance from the rest may be twice the largest number.
        check_finite(keys, values, FLOAT16_MAX / 2)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        assert slot == 0 and keys.shape[1] == self.layout.tokens
        self.check(keys, values)
        # Outliers lie along the last axis: tokens of a channel, channels of a token.
        sides = {"key": keys.float().transpose(1, 2).contiguous(), "value": values.float().contiguous()}
        places = {
            side: _extremes(sides[side], count)
            for side, count in (("key", self.key_outliers), ("value", self.value_outliers))
        }
        calm = {side: x.scatter(2, places[side], x.mean(2, keepdim=True).expand_as(x)) for side, x in sides.items()}
        fields = self.base.encode(calm["key"].transpose(1, 2).contiguous(), calm["value"], 0, None)
        decoded = self.base.decode(fields)
        for side, made in (("key", decoded[0].transpose(1, 2)), ("value", decoded[1])):
            error = sides[side] - made
            if places[side].shape[2]:
                fields[f"{side}_outliers"] = error.gather(2, places[side]).half()
                fields[f"{side}_places"] = places[side].to(torch.uint8)
                error = error.scatter(2, places[side], 0.0)
            if self.rank:
                error = error.transpose(1, 2) if side == "key" else error
                left, right = low_rank(error, start(error.shape[2], self.rank).to(error.device))
                fields[f"{side}_left"] = (left * _BALANCE).half()
                fields[f"{side}_right"] = (right / _BALANCE).transpose(1, 2).half()
        return fields

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.base.decode(fields)
        if self.rank:
            keys.baddbmm_(fields["key_left"].float(), fields["key_right"].float())
            values.baddbmm_(fields["value_left"].float(), fields["value_right"].float())
        if self.key_outliers:
            keys.transpose(1, 2).scatter_add_(2, fields["key_places"].long(), fields["key_outliers"].float())
        if self.value_outliers:
            values.scatter_add_(2, fields["value_places"].long(), fields["value_outliers"].float())
        return keys, values

    def take(
        self, fields: dict[str, torch.Tensor], pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.base.take(fields, pages, slots)
        if self.rank:
            for x, side in ((keys, "key"), (values, "value")):
                left = fields[f"{side}_left"][pages, slots].float()
                x += (left[:, None] @ fields[f"{side}_right"][pages].float())[:, 0]
        if self.key_outliers:
            mine = fields["key_places"][pages] == slots[:, None, None]
            keys += torch.where(mine, fields["key_outliers"][pages].float(), 0.0).sum(2)
        if self.value_outliers:
            places = fields["value_places"][pages, slots].long()
            values.scatter_add_(1, places, fields["value_outliers"][pages, slots].float())
        return keys, values

    def _extras(self, side: str, fields: dict[str, torch.Tensor]) -> Extras:
        return Extras(*(fields.get(f"{side}_{part}") for part in ("left", "right", "outliers", "places")))

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        queries = queries.float()
        out = self.base.scores(queries, fields)
        if self.rank or self.key_outliers:
            add_scores(out, queries, self._extras("key", fields))
        return out

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        out = self.base.output(weights, fields)
        if self.rank or self.value_outliers:
            out += extra_output(weights, self._extras("value", fields), out.shape[2])
        return out


def _extremes(x: torch.Tensor, count: int) -> torch.Tensor:
    """Where the `count` smallest and the `count` largest of the last axis are, each place once: int64
    `[..., 2 * count]`."""
    low = x.topk(count, -1, largest=False).indices
    return torch.cat([low, x.scatter(-1, low, float("-inf")).topk(count, -1).indices], -1)


@shared(16)
def start(dim: int, rank: int) -> torch.Tensor:
    """What the power iteration begins with, the same for every page: float32 `[dim, rank]`."""
    with torch.inference_mode(False):
        return torch.rand((dim, rank), generator=torch.Generator().manual_seed(0))


def low_rank(x: torch.Tensor, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Power iteration (algorithm 1): orthonormal `[pages, tokens, rank]` and `[pages, dim, rank]`, whose product is
    near the best approximation of x `[pages, tokens, dim]`. begin: `[dim, rank]`."""
    right = begin.expand(len(x), -1, -1)
    for loop in range(_LOOPS):
        last = loop == _LOOPS - 1
        right = torch.linalg.qr(right).Q if last else right
        left = torch.bmm(x, right)
        left = torch.linalg.qr(left).Q if last else left
        right = torch.bmm(x.transpose(1, 2), left)
    return left, right
