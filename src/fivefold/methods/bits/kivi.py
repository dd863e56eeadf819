"""KIVI: keys quantised per channel, values per token, the recent tokens exact."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fivefold.errors import NonFiniteError, RecipeError
from fivefold.kernels.pack import pack_pages
from fivefold.kernels.packed_decode import Form, decode_page
from fivefold.kernels.planar import (
    PLANES,
    dequantise,
    planar_output,
    planar_scores,
)
from fivefold.methods import Codec, Method, param, register
from fivefold.store import Field, LayerSpec, PageLayout

FLOAT16_MAX = torch.finfo(torch.float16).max


@register(
    slot="bits",
    name="kivi",
    paper="Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, ICML 2024 (arXiv:2402.02750)",
)
@dataclass(frozen=True)
class Kivi(Method):
    """Asymmetric min-max quantisation: keys in groups of `group` consecutive tokens of one channel, values in
    groups of `group` channels of one token (section 3.2); the most recent `residual` tokens stay exact
    (section 3.3).

    Prefill attends to exact keys and values, then packs. The official code packs keys `residual` at a time
    and values one by one, so that 0 to residual-1 keys and the last `residual` values are exact; here keys
    and values move together, `group` tokens at a time, so that `residual` to `residual + group - 1` of both
    are exact. Scales and zero points are float16, and codes are taken against the stored ones; a constant
    group decodes exactly up to float16 (the official code divides by zero there).

    Bytes per packed token of one head, of `head_dim` d, keys and values: `2 * d * 16 / (8 * planes)` codes,
    with planes = 8, 5, 4, 2 for 2, 3, 4, 8 bits, and `4 * d / group + 4 * d / min(group, d)` scales and zero
    points.
    """

    bits: int = param(2, "bits a number", choices=(2, 3, 4, 8))
    group: int = param(32, "tokens (keys) or channels (values) that share a scale", choices=(32, 64, 128))
    residual: int = param(128, "recent tokens that stay exact", low=0)

    def check(self) -> None:
        if PLANES[self.bits] * 32 % self.group:
            raise RecipeError(
                f"kivi(bits={self.bits}, group={self.group}) is not possible: a page of {self.bits} bits "
                f"holds {PLANES[self.bits] * 32} tokens, which is no multiple of the group; use group=32."
            )

    @property
    def exact_tokens(self) -> int:
        return self.residual

    def codec(self, spec: LayerSpec) -> KiviCodec:
        channels = min(self.group, spec.head_dim)
        if spec.head_dim % channels:
            raise RecipeError(
                f"kivi(group={self.group}) does not divide the model's head_dim of {spec.head_dim}: use another group."
            )
        return KiviCodec(self.bits, self.group, channels, spec.head_dim)


def check_finite(keys: torch.Tensor, values: torch.Tensor) -> float:
    """The largest magnitude. Raises `NonFiniteError` if float16 scales cannot hold it."""
    largest = 0.0
    for name, x in (("keys", keys), ("values", values)):
        peak = float(x.detach().abs().amax())
        if not peak <= FLOAT16_MAX:  # also when it is NaN
            raise NonFiniteError(
                f"{name} to be packed reach {peak}, beyond what float16 scales can hold: use full() for this model, or "
                "look for the layer that overflows."
            )
        largest = max(largest, peak)
    return largest


class KiviCodec(Codec):
    """Planar pages of `bits`-bit codes (see `kernels/planar`), with their scales and zero points.

    Fields, d = head_dim, P = planes: key_words, value_words int16 [32, d]; key_scale, key_zero float16
    [P*32/group, d]; value_scale, value_zero float16 [P, d/channels, 32].
    """

    form: Form

    def __init__(self, bits: int, group: int, channels: int, head_dim: int) -> None:
        planes = PLANES[bits]
        self.form = Form(bits, group, channels, head_dim)
        self.bits, self.group, self.channels, self.planes = bits, group, channels, planes
        key_groups, value_groups = planes * 32 // group, head_dim // channels
        half = torch.float16
        self.layout = PageLayout(
            f"kivi{bits}",
            planes * 32,
            (
                Field("key_words", (32, head_dim), torch.int16, "codes"),
                Field("key_scale", (key_groups, head_dim), half, "scales"),
                Field("key_zero", (key_groups, head_dim), half, "scales"),
                Field("value_words", (32, head_dim), torch.int16, "codes"),
                Field("value_scale", (planes, value_groups, 32), half, "scales"),
                Field("value_zero", (planes, value_groups, 32), half, "scales"),
            ),
            record=True,
        )

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.peak = max(self.peak, check_finite(keys, values))

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        self.check(keys, values)
        names = [part.name for part in self.layout.fields]
        old = None if opened is None else tuple(opened[name] for name in names)
        return dict(zip(names, pack_pages(self.form, keys, values, slot, old)))

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return decode_page(self.form, tuple(fields[part.name] for part in self.layout.fields))

    def take(
        self, fields: dict[str, torch.Tensor], pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plane, row = slots // 32, slots % 32
        shift, mask = (self.bits * plane).to(torch.int16)[:, None], 2**self.bits - 1
        codes = (fields["key_words"][pages, row] >> shift).bitwise_and_(mask)
        group = slots // self.group
        keys = dequantise(codes, fields["key_scale"][pages, group], fields["key_zero"][pages, group])
        codes = (fields["value_words"][pages, row] >> shift).bitwise_and_(mask).unflatten(1, (-1, self.channels))
        scale, zero = (fields[name][pages, plane, :, row][:, :, None] for name in ("value_scale", "value_zero"))
        return keys, dequantise(codes, scale, zero).flatten(1)

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return planar_scores(queries.float(), fields["key_words"], fields["key_scale"], fields["key_zero"], self.bits)

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return planar_output(weights, fields["value_words"], fields["value_scale"], fields["value_zero"], self.bits)
