"""One decoding step over pages of shared directions and exact pages, in plain PyTorch: what kernels are held against.

A page holds the directions of keys and values of two layers, as they are or packed, and of each layer the norms; a few
tokens are kept as they are besides (`methods/layers/minicache.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fivefold.kernels.packed_decode.reader import Reader
from fivefold.kernels.packed_decode.reference import Form, attention_reference, decode_page

SIDES = ("key", "value")


@dataclass(frozen=True)
class Directions(Reader):
    """What a page of directions looks like, of P tokens.

    inner: KIVI's page of the directions times `scale`; None for keys and values `dtype` `[128, head_dim]`. For keys and
    for values besides: slots int16 `[places]` of the tokens that are kept, -1 for none; norms `[P]`, float32 where
    dtype is, else float16; and what is kept, `dtype` `[places, head_dim]`.
    """

    inner: Form | None
    head_dim: int
    dtype: torch.dtype
    places: int
    scale: float

    unit = 2
    hurries = True

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        own = tuple(f"{side}_{part}" for side in SIDES for part in ("slots", "norms", "kept"))
        if self.inner is None:
            return ("keys", "values", *own)
        return (*(f"{side}_{part}" for side in SIDES for part in ("words", "scale", "zero")), *own)

    @property
    def tokens(self) -> int:
        return 128 if self.inner is None else self.inner.tokens

    @property
    def limit(self) -> float:  # type: ignore[override]
        return 30000.0 if self.inner is None else self.inner.limit

    def lacks(self, heads: int) -> str | None:
        if self.inner is not None:
            from fivefold.kernels.packed_decode.schedule import supports

            return supports(self.inner, heads, self.head_dim)
        return None

    @property
    def kernel(self) -> Callable[..., None]:
        from fivefold.kernels.directions import triton

        return triton.attend


def decode_directions(
    form: Directions, fields: tuple[torch.Tensor, ...], dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[rows, columns * tokens, head_dim]` of pages; fields: `[rows, columns, *shape]`, in the order of
    `Directions.fields`."""
    rows, out = len(fields[0]), []
    flat = tuple(x.flatten(0, 1) for x in fields)
    sides = flat[:2] if form.inner is None else decode_page(form.inner, flat[:6], dtype)
    own = flat[-6:]
    for x, (slots, norms, kept) in zip(sides, (own[:3], own[3:])):
        made = x.to(dtype) * (norms.to(dtype) / form.scale)[..., None]
        for place in range(form.places):
            mine = torch.arange(form.tokens, device=x.device) == slots[:, place, None]
            made = torch.where(mine[..., None], kept[:, place, None].to(dtype), made)
        out.append(made.view(rows, -1, form.head_dim))
    return out[0], out[1]


def decode_reference(
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    form: Directions,
    fields: tuple[torch.Tensor, ...],
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `packed_decode.decode_reference`, for packed pages of directions."""
    packed = decode_directions(form, fields, dtype)
    return attention_reference(queries, scaling, spans, packed, keys, values, dtype)
