"""What pages are made of: named fields, each by itself or all of a page together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch


@dataclass(frozen=True)
class Field:
    """One named part of a page.

    `shape` is per page; `kind` is the line of the report its bytes belong to ("exact", "codes", "scales",
    or any other word); `own` marks a field that every sharer of a page keeps for itself.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str
    own: bool = False

    @cached_property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class PageLayout:
    """What a page of `tokens` tokens is made of.

    A `record` keeps a page's fields together, in the order given: one address finds all of them. Else every field
    lies by itself, so that consecutive pages of a field are one stretch of memory.
    """

    name: str
    tokens: int
    fields: tuple[Field, ...]
    record: bool = False
    holds: torch.dtype | None = None

    @cached_property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.fields)

    def bytes_by_kind(self) -> dict[str, int]:
        """Bytes of a page by line of the report."""
        kinds: dict[str, int] = {}
        for part in self.fields:
            kinds[part.kind] = kinds.get(part.kind, 0) + part.nbytes
        return kinds

    def split(self) -> tuple[PageLayout, PageLayout | None]:
        """The layout of what sharers of a page share, and of what each keeps for itself (None if nothing)."""
        own = tuple(part for part in self.fields if part.own)
        if not own:
            return self, None
        shared = tuple(part for part in self.fields if not part.own)
        return (
            PageLayout(self.name, self.tokens, shared, self.record),
            PageLayout(f"{self.name}.own", self.tokens, own, self.record),
        )


def tensors_of(
    layout: PageLayout, pages: int, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Memory of `pages` pages: their fields, and the records that these are views of, if they are."""
    if not layout.record:
        return {x.name: torch.empty((pages, *x.shape), dtype=x.dtype, device=device) for x in layout.fields}, None
    whole = torch.int64 if layout.nbytes % 8 == 0 else torch.uint8  # of which few are moved
    records = torch.empty((pages, layout.nbytes // whole.itemsize), dtype=whole, device=device)
    return fields_of(layout, records), records


def fields_of(layout: PageLayout, records: torch.Tensor) -> dict[str, torch.Tensor]:
    """Fields of records `[..., numbers]`, contiguous, as views of them: `[..., *shape]` each."""
    tensors, start, records = {}, 0, records.view(torch.uint8)
    for part in layout.fields:
        stretch = records[..., start : start + part.nbytes]
        tensors[part.name] = stretch.view(part.dtype).unflatten(-1, part.shape)
        start += part.nbytes
    return tensors


def records_of(layout: PageLayout, fields: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Records of fields `[pages, numbers]`, in bytes."""
    return torch.cat([fields[x.name].to(x.dtype).contiguous().view(torch.uint8) for x in layout.fields], 1)
