"""Exact pages, but for eight bits: what a token is read as is what was written, rounded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fivefold.kernels.planar import dequantise, quantise
from fivefold.store.layout import Field, PageLayout
from fivefold.store.pages import Location, PagePool
from fivefold.store.scattered import joined

BITS = 8


def rounded_layout(tokens: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
    """Pages of the exact tier in eight bits, with a scale and a zero point for each token's key and value.

    Bytes per token: 2 * head_dim + 8.
    """
    fields = []
    for name in ("keys", "values"):
        fields += [
            Field(f"{name}.codes", (tokens, head_dim), torch.uint8, "codes"),
            Field(f"{name}.scale", (tokens, 1), torch.float16, "scales"),
            Field(f"{name}.zero", (tokens, 1), torch.float16, "scales"),
        ]
    return PageLayout("rounded", tokens, tuple(fields), holds=dtype)


class RoundedPool(PagePool):
    """Its fields `keys` and `values` are made of three each: codes, scales and zero points."""

    def _joined(self, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return dequantise(codes, scale, zero).to(self.layout.holds)

    def _parts(self, name: str, values: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        codes, scale, zero = quantise(values.float(), BITS)
        return [(f"{name}.codes", codes.to(torch.uint8)), (f"{name}.scale", scale), (f"{name}.zero", zero)]

    def put(self, tail: list[torch.Tensor], slot: int, *tokens: torch.Tensor) -> None:
        codes, scale, zero = quantise(torch.stack(tokens).float(), BITS)
        parts = [x[side] for side in range(len(tokens)) for x in (codes, scale, zero)]
        super().put(tail, slot, *parts)

    def fetch(self, name: str, location: Location) -> torch.Tensor:
        if "." in name:
            return super().fetch(name, location)
        return self._joined(*(super(RoundedPool, self).fetch(f"{name}.{x}", location) for x in _PARTS))

    def read_tokens(self, name: str, pages: np.ndarray, slots: np.ndarray) -> torch.Tensor:
        return self._joined(*(super(RoundedPool, self).read_tokens(f"{name}.{x}", pages, slots) for x in _PARTS))

    def write_fields(
        self, pages: np.ndarray, fields: Mapping[str, Sequence[torch.Tensor]], at: slice | None = None
    ) -> None:
        parts = [[(name, joined(x))] if "." in name else self._parts(name, joined(x)) for name, x in fields.items()]
        super().write_fields(pages, {name: [x] for some in parts for name, x in some}, at)

    def write_tokens(self, name: str, pages: np.ndarray, slots: np.ndarray, values: torch.Tensor) -> None:
        for part, x in self._parts(name, values):
            super().write_tokens(part, pages, slots, x)


_PARTS = ("codes", "scale", "zero")
SIDES = ("keys.codes", "values.codes", "keys.scale", "keys.zero", "values.scale", "values.zero")
"""Fields of a page, in the order in which kernels want to know where they are."""
