"""What GEAR adds to its quantised base in plain PyTorch: what the kernel is held against."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Extras(NamedTuple):
    """Fields of pages of keys or of values, `[rows, pages, *shape]`, None where there are none; T = tokens of a page,
    d = head_dim, r = rank.

    left float16 [T, r], right float16 [r, d]; outliers float16 and places uint8 [d, n] (tokens of a channel of keys)
    or [T, n] (channels of a token of values).
    """

    left: torch.Tensor | None
    right: torch.Tensor | None
    outliers: torch.Tensor | None
    places: torch.Tensor | None

    @property
    def pages(self) -> int:
        return next(x.shape[1] for x in self if x is not None)


def add_scores(out: torch.Tensor, queries: torch.Tensor, extras: Extras) -> None:
    """Add to scores `out`, float32 `[rows, query, pages * T]`, those of queries float32 `[rows, query, d]`."""
    rows, query, _ = queries.shape
    pages, tokens = extras.pages, out.shape[2] // extras.pages
    by_page = out.view(rows, query, pages, tokens)
    if extras.left is not None and extras.right is not None:
        right = extras.right.float().flatten(1, 2)  # [rows, pages * rank, head_dim]
        turned = torch.bmm(queries, right.transpose(1, 2)).view(rows, query, pages, -1).transpose(1, 2)
        by_page += torch.matmul(turned, extras.left.float().transpose(2, 3)).transpose(1, 2)
    if extras.outliers is not None and extras.places is not None:
        # Every outlier adds to the score of its token.
        at = torch.arange(rows * pages, device=out.device).view(rows, pages, 1, 1) * tokens + extras.places
        spread = queries.transpose(0, 1)[:, :, None, :, None]  # [query, rows, 1, head_dim, 1]
        found = _sums(extras.outliers.float() * spread, at, rows * pages * tokens)
        by_page += found.view(query, rows, pages, tokens).transpose(0, 1)


def extra_output(weights: torch.Tensor, extras: Extras, dim: int) -> torch.Tensor:
    """What to add to outputs: float32 `[rows, query, dim]`; weights: float32 `[rows, query, pages * T]`."""
    rows, query, _ = weights.shape
    pages = extras.pages
    out = weights.new_zeros((rows, query, dim))
    by_page = weights.view(rows, query, pages, -1).transpose(1, 2)
    if extras.left is not None and extras.right is not None:
        left = torch.matmul(by_page, extras.left.float())  # [rows, pages, query, rank]
        left = left.transpose(1, 2).reshape(rows, query, -1)
        out += torch.bmm(left, extras.right.float().flatten(1, 2))
    if extras.outliers is not None and extras.places is not None:
        # Every outlier adds to its channel, as its token is weighted.
        at = torch.arange(rows, device=out.device).view(rows, 1, 1, 1) * dim + extras.places
        spread = by_page.permute(2, 0, 1, 3)[..., None]  # [query, rows, pages, tokens, 1]
        found = _sums(extras.outliers.float() * spread, at, rows * dim)
        out += found.view(query, rows, dim).transpose(0, 1)
    return out


def _sums(parts: torch.Tensor, at: torch.Tensor, size: int) -> torch.Tensor:
    """float32 `[query, size]`: the sums of `parts [query, ...]` that go to each place `at [...]`."""
    parts = parts.flatten(1)
    return parts.new_zeros((len(parts), size)).scatter_add_(1, at.reshape(1, -1).expand_as(parts), parts)
