"""One decoding step over pages of low-rank features and exact pages, in plain PyTorch: what kernels are held against.

A token's keys before RoPE and its values, of `heads` rows (kv heads) together, are products of few features and a fixed
matrix. Each row's page holds an equal share of the features; keys are turned by RoPE once they are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from fivefold.kernels.packed_decode.reader import Reader
from fivefold.kernels.packed_decode.reference import attention_reference
from fivefold.kernels.planar import PLANES, dequantise, unpack_planes

CHUNK = 64
"""Features that are multiplied at a time, at most."""
TILE = 256
"""Tokens that are worked on at a time, at most."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Features(Reader):
    """What a page of features looks like, and what keys and values are made of them with.

    A record holds, for keys and then for values with their rank: numbers `dtype` `[128, rank]`; or with `bits`, planar
    words int16 `[32, rank]`, scale and zero float16 `[planes, rank]`. Made with:

    - ups: what gives, when it is asked for, key_up and value_up `[blocks, team * rank, team * head_dim]`: what features
      of keys (channels in the paired order of `store.Rope`: those that are turned together side by side) and of values
      are multiplied with. A sequence's rows are `blocks` times `team`, of `queries` query heads each.
    - inv_freq float64 `[pairs]`: by what angle a pair of channels is turned from one position to the next. Channels i
      and i + pairs, or with `neighbours` 2i and 2i + 1, are a pair; those from 2 * pairs on are not turned.
    """

    ranks: tuple[int, int]
    bits: int | None
    head_dim: int
    dtype: torch.dtype
    team: int
    blocks: int
    queries: int
    inv_freq: torch.Tensor
    neighbours: bool
    ups: Callable[[], tuple[torch.Tensor, torch.Tensor]]

    positional: ClassVar[bool] = True
    whole: ClassVar[bool] = True
    hurries: ClassVar[bool] = True

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("keys" if self.bits is None else "key_words",)

    @property
    def resident(self) -> int:  # type: ignore[override]
        return 1 if max(self.ranks) * self.team > 128 else 2

    @property
    def tokens(self) -> int:
        return 128 if self.bits is None else PLANES[self.bits] * 32

    @property
    def pairs(self) -> int:
        """Of channels of a head that are turned."""
        return len(self.inv_freq)

    @property
    def work(self) -> torch.dtype:
        """In what is multiplied."""
        return self.dtype if self.bits is None else torch.float16

    def side(self, rank: int) -> int:
        """Bytes of the keys or of the values of a page."""
        if self.bits is None:
            return self.tokens * rank * self.dtype.itemsize
        return 64 * rank + PLANES[self.bits] * rank * 4

    @property
    def nbytes(self) -> int:
        """Bytes of a page."""
        return sum(self.side(rank) for rank in self.ranks)

    @property
    def order(self) -> torch.Tensor:
        """Which channel of a head each of the paired order is: int64 `[head_dim]`."""
        turned = torch.arange(2 * self.pairs)
        if not self.neighbours:
            turned = turned.view(2, -1).T.reshape(-1)
        return torch.cat([turned, torch.arange(2 * self.pairs, self.head_dim)])

    @cached_property
    def prepared(self) -> Prepared:
        """What the kernels read, made when it is first asked for."""
        with torch.inference_mode(False):
            return prepare(self)

    @property
    def ready(self) -> bool:
        """Whether `prepared` has been asked for."""
        return "prepared" in vars(self)

    @property
    def constants(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return self.prepared.tensors

    def lacks(self, heads: int) -> str | None:
        if heads * self.team > 128:
            return f"{heads * self.team} query heads have features together, more than 128"
        if self.nbytes % self.unit:
            return f"pages of {self.nbytes} bytes do not begin at multiples of {self.unit}"
        return None

    @property
    def kernel(self) -> Callable[..., None]:
        from fivefold.kernels.low_rank import triton

        return triton.attend


@dataclass(frozen=True)
class Prepared:
    """What kernels read: in `Features.work`, the number of features a multiple of 16 (those behind are zero).

    keys, values `[blocks, team, features, head_dim]`, channels of keys in the paired order; angles float64 `[head_dim /
    2]`, 0 for what is not turned; waves `[TILE, head_dim]`, their cosines and sines side by side for a tile's slots.
    blocked: keys and waves are as the kernel in CUDA C++ wants them (see `blocked_keys`), which it then is that reads
    them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    angles: torch.Tensor
    waves: torch.Tensor
    blocked: bool

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.angles, self.waves


def padded(features: int) -> int:
    """Features as kernels multiply them: a multiple of 16."""
    return -(-features // 16) * 16


def prepare(form: Features) -> Prepared:
    """See `Prepared`."""
    from fivefold.kernels.low_rank.cuda import supports

    ups, dim = form.ups(), form.head_dim
    device = ups[0].device
    keys, values = (
        torch.nn.functional.pad(x, (0, 0, 0, padded(x.shape[1]) - x.shape[1])).unflatten(2, (form.team, dim))
        for x in ups
    )
    angles = torch.nn.functional.pad(form.inv_freq.double().to(device), (0, dim // 2 - form.pairs))
    turned = torch.arange(max(TILE, form.tokens), device=device)[:, None] * angles
    made = (keys.transpose(1, 2), values.transpose(1, 2), torch.stack([turned.cos(), turned.sin()], 2).flatten(1))
    keys, values, waves = (x.to(form.work).contiguous() for x in made)
    blocked = supports(form, device)
    if blocked:
        keys, waves = blocked_keys(keys), blocked_waves(waves)
    return Prepared(keys, values, angles, waves, blocked)


def blocked_keys(keys: torch.Tensor) -> torch.Tensor:
    """`Prepared.keys`, 16 features of a channel side by side, `[blocks, team, features / 16, head_dim, 16]`, of which
    the first eight are behind the last in the latter four of every eight channels: what tensor cores read without two
    of them in one bank of shared memory."""
    found = keys.unflatten(2, (-1, 2, 8)).permute(0, 1, 2, 5, 3, 4).unflatten(3, (-1, 2, 4)).clone()
    found[:, :, :, :, 1] = found[:, :, :, :, 1].flip(-2)
    return found.flatten(6).flatten(3, 5).contiguous()


def blocked_waves(waves: torch.Tensor) -> torch.Tensor:
    """`Prepared.waves` whose first 64 slots are as threads of `features.cu` load them: by pairs / 16, token % 2,
    token / 32, token / 2 % 2, token / 4 % 8, pairs % 4, and four of pairs / 4."""
    out, shape = waves.clone(), (2, 8, 2, 2, -1, 4, 4, 2)  # token: half, g, warp's, r; pairs: chunk, four, t; both
    first = waves[:64].view(shape).permute(4, 3, 0, 2, 1, 6, 5, 7)
    out[:64] = first.reshape(64, -1)
    return out


def features_of(form: Features, fields: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Features of keys and values `[pages, tokens, rank]` of pages; their fields, `[pages, *shape]`, in the record's
    order."""
    if form.bits is None:
        return tuple(x.to(dtype) for x in fields)
    out = []
    for words, scale, zero in (fields[:3], fields[3:]):
        codes = unpack_planes(words, form.bits)
        out.append(dequantise(codes, scale[..., None, :], zero[..., None, :]).flatten(-3, -2).to(dtype))
    return tuple(out)


def decode_features(
    form: Features, fields: tuple[torch.Tensor, ...], positions: torch.Tensor, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (after RoPE) and values `[rows, columns * tokens, head_dim]` of pages; fields: `[rows, columns, *shape]`;
    positions: `[rows]`, those of the first tokens."""
    rows, columns = fields[0].shape[:2]
    out = []
    parts = features_of(form, tuple(x.flatten(0, 1) for x in fields), dtype)
    for x, up in zip(parts, form.ups()):
        # [sequences, blocks, heads, columns * tokens, rank]: the features of a block's rows stand side by side.
        x = x.reshape(-1, form.blocks, form.team, columns * form.tokens, x.shape[-1]).transpose(2, 3).flatten(3)
        made = x @ up.to(dtype)
        out.append(made.unflatten(3, (form.team, -1)).transpose(2, 3).reshape(rows, -1, form.head_dim))
    pairs = form.pairs
    at = positions.to(x.device).double()[:, None] + torch.arange(columns * form.tokens, device=x.device)
    angles = at[..., None] * form.inv_freq.to(x.device).double()
    first, second = out[0][..., 0 : 2 * pairs : 2], out[0][..., 1 : 2 * pairs : 2]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    keys = torch.cat([turned, out[0][..., 2 * pairs :]], -1)[..., form.order.argsort().to(x.device)]
    return keys, out[1]


def decode_reference(
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    form: Features,
    fields: tuple[torch.Tensor, ...],
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query per row and head over packed and exact tokens together.

    As `packed_decode.decode_reference`, for packed pages of features. spans: int `[rows, 8]`, whose last column is the
    position of the first packed token.
    """
    first = spans[:, 7].to(queries.device)
    packed = decode_features(form, fields, first, dtype)
    return attention_reference(queries, scaling, spans, packed, keys, values, dtype)
