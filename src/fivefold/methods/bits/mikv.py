"""MiKV: important tokens stay precise, the others are packed instead of given up."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch

from fivefold.kernels.choice import runs_cpp
from fivefold.kernels.pack import pack_values
from fivefold.kernels.packed_decode import decode_values
from fivefold.kernels.planar import PLANES, by_token, planar_output, planar_token_scores, unbias_
from fivefold.kernels.planar_decode import Planar
from fivefold.methods import Codec, DemotingPolicy, Method, TokenPolicy, channels_of, check_finite, param, register
from fivefold.store import Context, Extent, Held, LayerSpec, PageLayout
from fivefold.store.codec import planar_fields, planar_parts
from fivefold.store.rounded import rounded_layout
from fivefold.store.rows import PAGE


@register(
    slot="bits",
    name="mikv",
    paper="Yang et al., No Token Left Behind: Reliable KV Cache Compression via Importance-Aware Mixed Precision "
    "Quantization, 2024 (arXiv:2402.18096)",
)
@dataclass(frozen=True)
class MiKV(DemotingPolicy):
    """Every KV head holds all tokens: the `important` share of them precisely (`high` bits), the others in `low` bits
    (section 3). Important are the newest ones, the `recent` share of these, and those that received most attention,
    summed over all queries so far, as in H2O. Tokens go from the high tier to the low one, never back: what rounding
    took is gone.

    Low bits: asymmetric min-max quantisation of each token's key and value in groups of `group` channels. With
    `balance`, keys are multiplied by b and queries divided by it (section 3.3), channel by channel, b =
    sqrt(max|q| / max|k|) over the first chunk that a sequence has read: channels in which keys are large and queries
    small lose their outliers. The largest magnitudes of a group's query heads count.

    high=16 keeps important tokens as the model made them; high=8 rounds each one's key and value to 8 bits, the newest
    token's too. A head with a window holds the newest `important` share of it precisely.

    `unbias` is ours, not the paper's. Rounding adds noise to a token's score before the softmax, and the mean of an
    exponential grows with the variance of its exponent: many coarse tokens together then draw attention that none of
    them has earned. In decoding steps half the variance that rounding to `low` bits has, |q|^2 scale^2 / 12 summed over
    the groups of channels, is taken off each coarse token's score.

    With `important` left out a head holds at least `floor` tokens precisely, so that a short prompt is exact; a head
    with a window has no floor.

    There is no official code: this follows the paper's text as known to us, and holds as many tokens precisely of the
    whole text, while generating too. Tokens move 32 at a time, so that up to 31 more than that are in the high tier.

    Bytes per head of head_dim d: in the low tier 2 * d * 16 / (8 * planes) + 8 * d / group for a token, with planes =
    8, 5, 4 for 2, 3, 4 bits; in the high tier 2 * d * (the model's bytes), or 2 * d + 8 with high=8; and 8 bytes for
    each token (position, score).
    """

    important: float | None = param(
        None,
        "fraction of the tokens that stay precise; left out: 0.2, but no less than the floor",
        low=0.001,
        high=1,
        by_layer=True,
    )
    floor: int | None = param(None, "tokens below which none is packed; left out: 128, or 0 beside an important", low=0)
    before_rope = False
    high: int = param(16, "bits of these: 16 is as the model made them", choices=(8, 16), by_layer=True)
    low: int = param(2, "bits of the others", choices=(2, 3, 4), by_layer=True, exact=16)
    balance: bool = param(True, "whether outliers of the keys' channels are moved into the queries")
    unbias: bool = param(True, "whether what noise adds to the attention of coarse tokens is taken off (ours)")
    recent: float = param(0.5, "fraction of the precise tokens that are the newest", low=0, high=1)
    group: int = param(32, "channels that share a scale", choices=(32, 64, 128), by_layer=True)

    joins = True

    @property
    def fraction(self) -> float:
        return 0.2 if self.important is None else self.important

    @property
    def least(self) -> int:
        if self.floor is not None:
            return self.floor
        return 128 if self.important is None else 0

    def budget(self, held: Held) -> int:
        return max(1, self.least, round(self.fraction * held.seen))

    def residual(self, extent: Extent) -> int:
        return max(1, round(self.fraction * (extent.recent or 0)))

    def exact_layout(self, spec: LayerSpec) -> PageLayout:
        if self.high == 16:
            return super().exact_layout(spec)
        return rounded_layout(PAGE, spec.head_dim, spec.dtype)

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        return held.scores.masked_fill(held.newest(int(self.recent * budget)), float("inf"))

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, TokenPolicy):
            return f"both choose tokens by their attention; use kivi beside {other.name}, or mikv alone."
        return None

    def codec(self, spec: LayerSpec) -> TokenCodec:
        kind = BalancedCodec if self.balance else TokenCodec
        return kind(self.low, channels_of(self, self.group, spec.head_dim), spec.head_dim, self.unbias)


class TokenCodec(Codec):
    """Planar pages whose keys and values are both quantised token by token, in groups of channels.

    Fields, d = head_dim, P = planes: key_words, value_words int16 [32, d]; key_scale, key_zero, value_scale, value_zero
    float16 [P, d/channels, 32].
    """

    group = PAGE
    balanced = False

    def __init__(self, bits: int, channels: int, head_dim: int, unbias: bool = False) -> None:
        self.bits, self.channels, self.planes, self.unbias = bits, channels, PLANES[bits], unbias
        shapes = (PAGE, head_dim), (self.planes, head_dim // channels, PAGE)
        fields = (*planar_fields("key", *shapes), *planar_fields("value", *shapes))
        self.layout = PageLayout(f"token{bits}", self.planes * PAGE, fields)

    @cached_property
    def reader(self) -> Planar:
        groups = 0, self.channels, self.layout.fields[0].shape[1]
        settings = {"unbias": self.unbias, "balanced": self.balanced, "record": False}
        return Planar(self.bits, self.bits, self.planes, *groups, **settings)

    def compiled(self, device: torch.device) -> bool:
        return runs_cpp(device)

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        check_finite(keys, values)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        self.check(keys, values)
        out: dict[str, torch.Tensor] = {}
        for name, x in (("key", self._balanced(keys.float().contiguous(), False)), ("value", values)):
            old = None if opened is None else planar_parts(name, opened)
            made = pack_values(x, self.bits, self.channels, self.planes, slot // PAGE, old)
            out |= zip((f"{name}_words", f"{name}_scale", f"{name}_zero"), made)
        return out

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (decode_values(*planar_parts(name, fields), self.bits) for name in ("key", "value"))
        return self._balanced(keys, True), values

    def _balanced(self, keys: torch.Tensor, back: bool) -> torch.Tensor:
        """Keys of pages `[rows * pages, token, head_dim]` as they are quantised, or back."""
        return keys

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        queries = queries.float()
        out = planar_token_scores(queries, *planar_parts("key", fields), self.bits)
        if self.unbias:
            squares = queries.unflatten(2, (-1, self.channels)).square().sum(-1)
            unbias_(out, squares, by_token(fields["key_scale"]))
        return out

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return planar_output(weights, *planar_parts("value", fields), self.bits)


class BalancedCodec(TokenCodec):
    """The same of keys times the balance of their rows, float32 `[rows, head_dim]`."""

    balanced = True
    balance: torch.Tensor | None = None
    """None before `of` has said whose rows they are: keys are then taken as they are given."""

    def learn(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        ratio = queries.abs().amax((1, 2)).float() / keys.abs().amax(1).float()
        # A channel that is never used, on either side, needs no balance.
        return {"balance": torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).sqrt()}

    def of(self, context: Context) -> Codec:
        bound = copy.copy(self)
        bound.balance = context.learned["balance"]
        return bound

    def _balanced(self, keys: torch.Tensor, back: bool) -> torch.Tensor:
        if self.balance is None:
            return keys
        rows, dim = self.balance.shape
        balance = self.balance if not back else 1 / self.balance
        return (keys.view(rows, -1, dim) * balance[:, None]).view(keys.shape)

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        balance = 1.0 if self.balance is None else self.balance[:, None]
        return super().scores(queries.float() / balance, fields)
