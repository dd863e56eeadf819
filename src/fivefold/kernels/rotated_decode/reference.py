"""Pages of rotated keys and values: what they look like, their attention in plain PyTorch, and its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from math import pi

import torch

from fivefold.kernels.hadamard import hadamard
from fivefold.kernels.packed_decode import Reader, decode_values
from fivefold.kernels.packed_decode.reference import attention_reference
from fivefold.kernels.planar import PLANES
from fivefold.kernels.shared import shared

Fields = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False)
class Rotated(Reader):
    """Pages of keys before RoPE and values, rotated by Hadamard matrices (`rotatekv`), d = head_dim, P = planes:

    key_words int16 [d, 32], key_scale and key_zero float16 [P, d / channels, 32], the same for values but value_words
    [32, d], and sinks int16 [sinks], the slots of tokens that are `learned`, exact, -1 for none.

    Keys of `team` heads at a time are rotated together, in the paired order of channels (see `Rope`); then the channels
    of all `kv_heads` heads are sorted, which `places` says, int32 `[kv_heads * d]`: where every rotated channel is. A
    head's words are its share of the sorted channels. Values are rotated head by head.

    inv_freq: float64 `[d / 2]`, on any device; neighbours: see `Rope`.
    """

    bits: int
    channels: int
    head_dim: int
    kv_heads: int
    team: int = field()  # no default
    sinks: int
    places: torch.Tensor
    inv_freq: torch.Tensor
    neighbours: bool = False

    unit = 2
    scores = True
    positional = True
    hurries = True
    limit = 1000.0

    @property
    def resident(self) -> float:  # type: ignore[override]
        # Values are taken head by head, and the scores of a share are divided further.
        return values_at_once(self.bits) / self.team if self.split else 2

    @property
    def planes(self) -> int:
        return PLANES[self.bits]

    @property
    def tokens(self) -> int:
        return 32 * self.planes

    @property
    def together(self) -> int:  # their channels were sorted together, also where they were not rotated together
        return self.kv_heads

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        names = [f"{side}_{part}" for side in ("key", "value") for part in ("words", "scale", "zero")]
        return (*names, *(("sinks",) if self.sinks else ()))

    @property
    def learned(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("sink_keys", "sink_values") if self.sinks else ()

    @property
    def constants(self) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return (self.places,)

    @cached_property
    def tables(self) -> tuple[torch.Tensor, ...]:
        """What layers have in common: see `tables_of`."""
        return tables_of(tuple(self.inv_freq.tolist()), self.head_dim, self.team, self.places.device)

    @cached_property
    def split(self) -> bool:
        """Whether the matrix of `team` heads is a product of one over heads and one over channels."""
        return splits(self.team, self.head_dim)

    def lacks(self, heads: int) -> str | None:
        if 2 * len(self.inv_freq) != self.head_dim:
            return "RoPE turns a part of the channels only"
        if self.head_dim > 128:
            return f"heads of {self.head_dim} channels are rotated"
        if self.team > 4:
            return f"{self.team} heads are rotated together, more than 4"
        if self.channels & (self.channels - 1):
            return f"groups of {self.channels} channels"
        return None

    @property
    def kernel(self) -> Callable[..., None]:
        from fivefold.kernels.rotated_decode import triton

        return triton.attend


def values_at_once(bits: int) -> int:
    """Programs for values that are to be on a processor at a time: more where pages are short."""
    return 2 if bits == 2 else 3


def splits(team: int, head_dim: int) -> bool:
    if team & (team - 1):
        return False
    return torch.allclose(hadamard(team * head_dim), torch.kron(hadamard(team), hadamard(head_dim)))


@shared(8)
def tables_of(
    inv_freq: tuple[float, ...], head_dim: int, team: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tables of the kernels:

    revolutions a token of each pair of channels, in parts of 2**64, int64 `[d / 2]`; cosine and sine of the first 64
    positions, float32 `[2, 64, d / 2]`; what undoes the rotation of keys, the even and the odd channels of the paired
    order, entries +-1, float16 `[team, team, 2, d, d / 2]` (of the rotated channels of one head for the channels of
    another; `[1, 1, ...]` where the matrix splits, see `splits`); and of values, `[d, d]`.
    """
    with torch.inference_mode(False):
        parts = [round(x / (2 * pi) % 1 * 2**64) % 2**64 for x in inv_freq]
        turns = torch.tensor([x - 2**64 if x >= 2**63 else x for x in parts])
        angles = torch.arange(64, dtype=torch.float64)[:, None] * torch.tensor(inv_freq, dtype=torch.float64)
        heads = 1 if splits(team, head_dim) else team
        matrix = hadamard(heads * head_dim) * (heads * head_dim) ** 0.5
        # [channel's head, pair, even or odd, rotated channel's head, rotated channel]
        undo = matrix.view(heads, -1, 2, heads, head_dim).permute(0, 3, 2, 4, 1)
        values = hadamard(head_dim) * head_dim**0.5
        small = torch.stack([angles.cos(), angles.sin()]).float()
        found = turns, small, undo.contiguous().half().round_(), values.half().round_()
        return tuple(x.to(device) for x in found)  # type: ignore[return-value]


def attend_rotated(
    form: Rotated,
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    fields: Fields,
    learned: Fields = (),
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over packed pages in plain PyTorch, what the kernels are held against.

    queries: `[rows, query_heads, head_dim]`; fields: of pages, `[rows, columns, *shape]`; learned: `[rows, sinks,
    head_dim]` each; spans: as in `decode_reference`, and column 7 the position of slot 0. Results as there.
    """
    device, (rows, columns), dim = queries.device, fields[0].shape[:2], form.head_dim
    together, n = form.kv_heads, form.team * dim
    page = dict(zip(form.fields, fields, strict=True))
    words = page["key_words"].flatten(0, 1).transpose(1, 2)
    keys = decode_values(words, page["key_scale"].flatten(0, 1), page["key_zero"].flatten(0, 1), form.bits).to(dtype)
    tokens = columns * form.tokens
    keys = keys.reshape(rows // together, together, tokens, dim).transpose(1, 2).flatten(2)
    keys = keys[:, :, form.places.long()].unflatten(2, (-1, n)) @ hadamard(n).to(device, dtype).T
    keys = keys.reshape(rows // together, tokens, together, dim).transpose(1, 2).reshape(rows, tokens, dim)
    slot = torch.arange(tokens, device=device)
    angles = (spans[:, 7, None] + slot).to(dtype)[..., None] * form.inv_freq.to(device, dtype)
    even, odd = keys[..., ::2], keys[..., 1::2]
    even, odd = even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin()
    keys = torch.stack([even, odd], -1).flatten(2) if form.neighbours else torch.cat([even, odd], 2)
    words, scale, zero = (page[f"value_{part}"].flatten(0, 1) for part in ("words", "scale", "zero"))
    values = decode_values(words, scale, zero, form.bits).to(dtype) @ hadamard(dim).to(device, dtype).T
    values = values.reshape(rows, tokens, dim)
    if form.sinks:
        row, column, sink = (page["sinks"] >= 0).nonzero().unbind(1)
        at = column * form.tokens + page["sinks"][row, column, sink]
        keys[row, at], values[row, at] = (x[row, sink].to(dtype) for x in learned)
    return attention_reference(queries, scaling, spans, (keys, values), dtype=dtype)
