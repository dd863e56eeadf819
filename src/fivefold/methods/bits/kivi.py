"""KIVI: keys quantised per channel, values per token, the recent tokens exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from fivefold.kernels.choice import runs_cpp
from fivefold.kernels.pack import pack_keys, pack_pages, pack_values
from fivefold.kernels.packed_decode import Form, Reader, decode_keys, decode_values
from fivefold.kernels.planar import PLANES, dequantise, planar_output, planar_scores, planes_of, sheets_of, unbias_
from fivefold.kernels.planar_decode import Planar
from fivefold.methods import Codec, Method, channels_of, check_finite, param, register
from fivefold.store import LayerSpec, PageLayout
from fivefold.store.codec import planar_fields, planar_parts


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

    Keys and values may have bits of their own. A page then holds as many tokens as suit both: words hold 8, 5, 4
    or 2 planes of 32 tokens at 2, 3, 4 or 8 bits, and a page has whole groups, as few bytes a token as can be, and
    then as few tokens (`planes_of`): 256, 160, 128, 64 tokens for equal bits, 256 for 4 and 2, 480 for 3 and 2.

    `unbias` is ours, as in `mikv`: in decoding steps half the variance that rounding gives a score, the sum of q^2
    scale^2 / 12 over the channels, is taken off it.

    Bytes per packed token of one head, of `head_dim` d: `2 * d * sheets / planes` codes for keys and as many for
    values, where P planes take ceil(P/8), ceil(P/5), ceil(P/4), ceil(P/2) sheets at 2, 3, 4, 8 bits (that is
    `bits * d / 8` where the sheets are full, and 3.2 for 3), and `4 * d / group + 4 * d / c` scales and zero points.
    Here c, the channels of a token that share a scale, is `min(group, d)`, or the greatest common divisor of both if
    that does not divide d.
    """

    before_rope = False
    bits: int = param(2, "bits a number", choices=(2, 3, 4, 8), by_layer=True, exact=16)
    key_bits: int | None = param(None, "bits of keys, if not `bits`", choices=(None, 2, 3, 4, 8), by_layer=True)
    value_bits: int | None = param(None, "bits of values, if not `bits`", choices=(None, 2, 3, 4, 8), by_layer=True)
    group: int = param(
        32, "tokens (keys) or channels (values) that share a scale", choices=(32, 64, 128), by_layer=True
    )
    residual: int = param(128, "recent tokens that stay exact", low=0, by_layer=True)
    unbias: bool = param(False, "whether what noise adds to the attention of packed tokens is taken off (ours)")

    @property
    def by_step(self) -> bool:
        return self.unbias

    @property
    def exact_tokens(self) -> int:
        return self.residual

    def codec(self, spec: LayerSpec) -> KiviCodec:
        channels = channels_of(self, self.group, spec.head_dim)
        bits = self.key_bits or self.bits, self.value_bits or self.bits
        return KiviCodec(bits[0], self.group, channels, spec.head_dim, bits[1], self.unbias)


class KiviCodec(Codec):
    """Planar pages of codes (see `kernels/planar`), with their scales and zero points.

    Fields, d = head_dim, P = planes, s = sheets of a side: key_words, value_words int16 [s*32, d]; key_scale, key_zero
    float16 [P*32/group, d]; value_scale, value_zero float16 [P, d/channels, 32].
    """

    def __init__(
        self, bits: int, group: int, channels: int, head_dim: int, value_bits: int | None = None, unbias: bool = False
    ) -> None:
        self.bits, self.value_bits = bits, value_bits or bits
        self.group, self.channels, self.unbias = group, channels, unbias
        self.planes = planes = planes_of(self.bits, self.value_bits, group)
        # KIVI's own kernels read pages of one sheet, and correct nothing.
        if not unbias and self.bits == self.value_bits and planes == PLANES[bits]:
            self.form = Form(bits, group, channels, head_dim)
        key_groups, value_groups = planes * 32 // group, head_dim // channels
        sheets = sheets_of(self.bits, planes), sheets_of(self.value_bits, planes)
        self.layout = PageLayout(
            f"kivi{bits}" if bits == self.value_bits else f"kivi{bits}.{self.value_bits}",
            planes * 32,
            (
                *planar_fields("key", (sheets[0] * 32, head_dim), (key_groups, head_dim)),
                *planar_fields("value", (sheets[1] * 32, head_dim), (planes, value_groups, 32)),
            ),
            record=True,
        )

    @cached_property
    def reader(self) -> Reader:
        groups = self.group, self.channels, self.layout.fields[0].shape[1]
        return self.form or Planar(self.bits, self.value_bits, self.planes, *groups, unbias=self.unbias)

    def compiled(self, device: torch.device) -> bool:
        return runs_cpp(device)

    def check(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        check_finite(keys, values)

    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        self.check(keys, values)
        names = [part.name for part in self.layout.fields]
        old = None if opened is None else tuple(opened[name] for name in names)
        if self.form is not None:
            return dict(zip(names, pack_pages(self.form, keys, values, slot, old)))
        sides = (None, None) if old is None else (old[:3], old[3:])
        made = (
            *pack_keys(keys, self.bits, self.group, self.planes, slot // 32, sides[0]),
            *pack_values(values, self.value_bits, self.channels, self.planes, slot // 32, sides[1]),
        )
        return dict(zip(names, made))

    def decode(self, fields: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        keys = decode_keys(*planar_parts("key", fields), self.bits, self.planes)
        return keys, decode_values(*planar_parts("value", fields), self.value_bits)

    def take(
        self, fields: dict[str, torch.Tensor], pages: torch.Tensor, slots: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        plane, row = slots // 32, slots % 32
        codes = _codes(fields["key_words"], self.bits, pages, plane, row)
        group = slots // self.group
        keys = dequantise(codes, fields["key_scale"][pages, group], fields["key_zero"][pages, group])
        codes = _codes(fields["value_words"], self.value_bits, pages, plane, row).unflatten(1, (-1, self.channels))
        scale, zero = (fields[name][pages, plane, :, row][:, :, None] for name in ("value_scale", "value_zero"))
        return keys, dequantise(codes, scale, zero).flatten(1)

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        out = planar_scores(queries.float(), *planar_parts("key", fields), self.bits, self.planes)
        if self.unbias:
            unbias_(out, queries.float().square(), fields["key_scale"].flatten(1, 2).transpose(1, 2))
        return out

    def output(self, weights: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        return planar_output(weights, *planar_parts("value", fields), self.value_bits)


def _codes(words: torch.Tensor, bits: int, pages: torch.Tensor, plane: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Codes of single tokens, int16 `[tokens, head_dim]`."""
    sheet, field = plane // PLANES[bits], plane % PLANES[bits]
    shift = (bits * field).to(torch.int16)[:, None]
    return (words[pages, sheet * 32 + row] >> shift).bitwise_and_(2**bits - 1)
