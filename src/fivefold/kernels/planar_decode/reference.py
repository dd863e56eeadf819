"""Planar pages of other kinds than KIVI's: what they look like, their attention in plain PyTorch, and its kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from fivefold.kernels.packed_decode.reader import Reader
from fivefold.kernels.packed_decode.reference import decode_keys, decode_values, weighted
from fivefold.kernels.planar import sheets_of

Fields = tuple[torch.Tensor, ...]
_MOST_OUTLIERS = 16


@dataclass(frozen=True)
class Planar(Reader):
    """Planar pages (see `kernels/planar`), d = head_dim, P = planes, T = 32 P tokens, r = rank:

    key_words int16 [s*32, d] with key_scale and key_zero float16 [T / group, d], or, where `group` is 0,
    [P, d / channels, 32]; value_words int16 [s*32, d], value_scale and value_zero float16 [P, d / channels, 32]; with
    a rank key_left float16 [T, r], key_right [r, d]; with outliers key_outliers float16 [d, key_outliers]; the same for
    values, value_outliers [T, value_outliers]; then the places of both, uint8, of their shapes.

    So keys are quantised per channel in groups of tokens, or per token in groups of channels, and values per token;
    a low-rank product and outliers are added to that (`gear`). unbias: half the variance that rounding gives a score is
    taken off it (see `unbias_`). balanced: queries are divided by their rows' balance, `learned[0]` (`mikv`). record: a
    page's fields lie together.
    """

    key_bits: int
    value_bits: int
    planes: int
    group: int
    channels: int
    head_dim: int
    rank: int = 0
    key_outliers: int = 0
    value_outliers: int = 0
    unbias: bool = False
    balanced: bool = False
    record: bool = True

    scores = True
    limit = 3000.0
    """A step of a group's scale, times up to 128, is a float16."""

    @property
    def tokens(self) -> int:
        return 32 * self.planes

    @property
    def learned(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("balance",) if self.balanced else ()

    @cached_property
    def parts(self) -> dict[str, int]:
        """The fields of a page in their order, and the bytes of each."""
        dim, scales = self.head_dim, 64 * self.planes * (self.head_dim // self.channels)
        key_scales = scales if not self.group else 2 * self.tokens // self.group * dim
        out, places = {}, {}
        for side, bits, size in (("key", self.key_bits, key_scales), ("value", self.value_bits, scales)):
            out[f"{side}_words"] = 64 * sheets_of(bits, self.planes) * dim
            out |= {f"{side}_scale": size, f"{side}_zero": size}
        for side, count in (("key", self.key_outliers * dim), ("value", self.value_outliers * self.tokens)):
            if self.rank:
                out |= {f"{side}_left": 2 * self.rank * self.tokens, f"{side}_right": 2 * self.rank * dim}
            if count:
                out[f"{side}_outliers"] = 2 * count
                places[f"{side}_places"] = count
        return out | places

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.parts)[: 1 if self.record else None]

    def offsets(self) -> dict[str, int]:
        """Where the fields of a record begin, in bytes."""
        out, at = {}, 0
        for name, nbytes in self.parts.items():
            out[name] = at
            at += nbytes
        return out

    def lacks(self, heads: int) -> str | None:
        if self.planes > 8:
            return f"pages of {self.tokens} tokens"
        if self.group % 32 or (self.group and self.tokens % self.group) or self.channels & (self.channels - 1):
            return f"groups of {self.group} tokens and {self.channels} channels"
        if max(self.key_outliers, self.value_outliers) > _MOST_OUTLIERS:
            return f"more than {_MOST_OUTLIERS} outliers of a channel or token"
        return None

    @property
    def kernel(self) -> Callable[..., None]:
        from fivefold.kernels.planar_decode import triton

        return triton.attend


def decode_planar(
    form: Planar, fields: Fields, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (as they are packed: balanced) and values of pages, `[pages, tokens, head_dim]`; their fields, `[pages,
    *shape]`, in the order of `Planar.parts`."""
    page = dict(zip(form.parts, fields, strict=True))
    words, scale, zero = (page[f"key_{part}"] for part in ("words", "scale", "zero"))
    if form.group:
        keys = decode_keys(words, scale, zero, form.key_bits, form.planes).to(dtype)
    else:
        keys = decode_values(words, scale, zero, form.key_bits).to(dtype)
    words, scale, zero = (page[f"value_{part}"] for part in ("words", "scale", "zero"))
    values = decode_values(words, scale, zero, form.value_bits).to(dtype)
    if form.rank:
        keys += page["key_left"].to(dtype) @ page["key_right"].to(dtype)
        values += page["value_left"].to(dtype) @ page["value_right"].to(dtype)
    if form.key_outliers:
        keys.transpose(1, 2).scatter_add_(2, page["key_places"].long(), page["key_outliers"].to(dtype))
    if form.value_outliers:
        values.scatter_add_(2, page["value_places"].long(), page["value_outliers"].to(dtype))
    return keys, values


def attend_planar(
    form: Planar,
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    fields: Fields,
    learned: Fields = (),
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed pages in plain PyTorch, what the kernel is held against.

    queries: `[rows, query_heads, head_dim]`; fields: of pages, `[rows, columns, *shape]`; spans, results: as in
    `decode_reference`.
    """
    rows, columns = fields[0].shape[:2]
    flat = tuple(x.flatten(0, 1) for x in fields)
    keys, values = (x.reshape(rows, columns * form.tokens, -1) for x in decode_planar(form, flat, dtype))
    scaled = queries.to(dtype) * scaling
    if form.balanced:
        scaled = scaled / learned[0].to(dtype)[:, None]
    scores = scaled @ keys.transpose(1, 2)
    if form.unbias:
        step = flat[1].to(dtype).square()
        if form.group:  # [pages, groups, d]
            step = step.repeat_interleave(form.group, 1)
        else:  # [pages, planes, groups, 32]
            step = step.transpose(2, 3).flatten(1, 2).repeat_interleave(form.channels, 2)
        scores -= scaled.square() @ step.reshape(rows, columns * form.tokens, -1).transpose(1, 2) / 24
    low, high = spans.to(queries.device).long()[:, :2, None].unbind(1)
    slot = torch.arange(columns * form.tokens, device=queries.device)
    seen = ((slot >= low) & (slot < high))[:, None]
    return weighted(scores, values, seen)
