"""One decoding step over planar KIVI pages and exact pages, in plain PyTorch: what the kernel is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fivefold.kernels.packed_decode.reader import Reader
from fivefold.kernels.planar import PLANES, dequantise, unpack


@dataclass(frozen=True)
class Form(Reader):
    """What a packed page looks like: a record of

    key words int16 [32, d], key scale and zero float16 [planes * 32 / group, d],
    value words int16 [32, d], value scale and zero float16 [planes, d / channels, 32],

    with d = head_dim: keys are quantised per channel in groups of `group` tokens, values per token in groups of
    `channels` channels (see `kernels/planar`).
    """

    bits: int
    group: int
    channels: int
    head_dim: int

    fields: ClassVar[tuple[str, ...]] = ("key_words",)
    limit: ClassVar[float] = 750.0  # type: ignore[misc]
    share: ClassVar[int] = 32  # type: ignore[misc]
    """The fastest of 1 to 64 on an H200, for 2 and 4 bits: a step of 8 sequences of 32,768 tokens takes up to 16% less
    than with 1."""

    @property
    def tokens(self) -> int:
        """Tokens of a page."""
        return PLANES[self.bits] * 32

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        words, groups = 4 * self.head_dim, self.tokens // self.group
        return 32 * words + groups * words + 4 * self.tokens * (self.head_dim // self.channels)


def decode_page(
    form: Form, fields: tuple[torch.Tensor, ...], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[pages, tokens, head_dim]` of pages; their fields, `[pages, *shape]`, in the record's order."""
    key_words, key_scale, key_zero, value_words, value_scale, value_zero = fields
    keys = decode_keys(key_words, key_scale, key_zero, form.bits, PLANES[form.bits])
    return keys.to(dtype), decode_values(value_words, value_scale, value_zero, form.bits).to(dtype)


def decode_keys(words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, planes: int) -> torch.Tensor:
    """float32 `[pages, planes * 32, head_dim]`; scale, zero: `[pages, groups, head_dim]`."""
    group = [j * scale.shape[1] // planes for j in range(planes)]
    parts = [dequantise(unpack(words, bits, j), scale[:, g, None], zero[:, g, None]) for j, g in enumerate(group)]
    return torch.cat(parts, 1)


def decode_values(words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 `[pages, planes * 32, head_dim]`; scale, zero: `[pages, planes, groups, 32]`."""
    parts = []
    for j in range(scale.shape[1]):
        codes = unpack(words, bits, j).unflatten(2, (scale.shape[2], -1))
        by_token = [x[:, j].transpose(1, 2)[..., None] for x in (scale, zero)]
        parts.append(dequantise(codes, by_token[0], by_token[1]).flatten(2))
    return torch.cat(parts, 1)


def decode_reference(
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    form: Form | None = None,
    fields: tuple[torch.Tensor, ...] | None = None,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per row and head over packed and exact tokens together.

    queries: `[rows, query_heads, head_dim]`; fields: of packed pages, `[rows, columns, *shape]` each; keys, values:
    exact tokens `[rows, slots, head_dim]`. spans: int `[rows, >= 5]`: packed tokens `[0, 1)` are seen, and exact slots
    that are below `2`, in `[5, 6)` (sinks that fade out, if there are so many columns) or at least `3`, and below `4`.
    Computed in `dtype`; a row that sees nothing has output 0 and log-sum-exp -inf. Returns output
    `[rows, query_heads, head_dim]` and natural log-sum-exp `[rows, query_heads]`.
    """
    packed = None
    if fields is not None:
        assert form is not None
        pages = decode_page(form, tuple(field.flatten(0, 1) for field in fields), dtype)
        found = [x.reshape(len(queries), -1, form.head_dim) for x in pages]
        packed = found[0], found[1]
    return attention_reference(queries, scaling, spans, packed, keys, values, dtype)


def attention_reference(
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    packed: tuple[torch.Tensor, torch.Tensor] | None = None,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode_reference` of packed tokens as they are decoded, keys and values `[rows, slots, head_dim]`."""
    parts, seen, device = [], [], queries.device
    low, high, sink, start, stop = spans.to(device).long()[:, :5, None].unbind(1)
    if packed is not None:
        parts.append(packed)
        slot = torch.arange(packed[0].shape[1], device=device)
        seen.append((slot >= low) & (slot < high))
    if keys is not None:
        assert values is not None
        parts.append((keys.to(dtype), values.to(dtype)))
        slot = torch.arange(keys.shape[1], device=device)
        shown = (slot < sink) | (slot >= start)
        if spans.shape[1] > 6:
            fading, faded = spans.to(device).long()[:, 5:7, None].unbind(1)
            shown |= (slot >= fading) & (slot < faded)
        seen.append(shown & (slot < stop))
    key, value = (torch.cat(x, 1) for x in zip(*parts))
    return weighted(queries.to(dtype) * scaling @ key.transpose(1, 2), value, torch.cat(seen, 1)[:, None])


def weighted(scores: torch.Tensor, values: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `[rows, slots, head_dim]` by the softmax of scores `[rows, query_heads, slots]` over what is `visible
    [rows, 1, slots]`, and its log-sum-exp `[rows, query_heads]`. What no query sees may be anything, also not a
    number."""
    scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().masked_fill(~visible, 0)
    return weights @ values.masked_fill(~visible.transpose(1, 2), 0), lse
