"""vLLM's block tables as what Fivefold's kernels take: page addresses, spans, work lists. It needs no vLLM.

A row is a request's KV head: row `request * kv_heads + head`. Everything is computed by torch where the tables lie, in
buffers that stay where they are, so nothing waits for the host and a captured graph finds the next step's numbers.

Addresses are in units of 16 bytes and relative: `Place.base` of the layer is to be added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fivefold.kernels.packed_decode.schedule import SPAN
from fivefold.kernels.paged_pack import NULL, UNIT, Place
from fivefold.serving.vllm.options import PAGE, Pages

__all__ = ["NULL", "UNIT", "Place", "Prefill", "Step", "Tables"]


class Tables:
    """The tables of a decoding step, a token for each request.

    spans: int32 `[rows, SPAN]`, as `kernels.packed_decode.decode` takes them: packed tokens `[0, span 1)` and exact
    slots `[span 3, span 4)` are seen, the newest token being slot `span 4 - 1`.
    packed: int64 `[rows, packed_columns]`, exact: int64 `[rows, exact_columns, 2]` (keys, values): relative addresses.
    due: int64 `[rows, 2]`: relative address of the packed page, and its plane, that the newest token completes a group
    of; the plane is -1 where it completes none. sources: int64 `[rows, group / 32, 2]`: of the exact pages of that
    group, relative.
    """

    def __init__(self, pages: Pages, kv_heads: int, requests: int, tokens: int, device: torch.device) -> None:
        self.pages, self.kv_heads, self.requests, self.device = pages, kv_heads, requests, device
        self.packed_columns = pages.packed_columns(tokens)
        self.exact_columns = pages.columns
        rows, long = requests * kv_heads, torch.int64
        self.spans = torch.zeros((rows, SPAN), dtype=torch.int32, device=device)
        self.packed = torch.zeros((rows, self.packed_columns), dtype=long, device=device)
        self.exact = torch.zeros((rows, self.exact_columns, 2), dtype=long, device=device)
        self.due = torch.full((rows, 2), -1, dtype=long, device=device)
        self.sources = torch.zeros((rows, pages.form.group // PAGE, 2), dtype=long, device=device)

    def spread(self, x: torch.Tensor, by_head: int) -> torch.Tensor:
        """Addresses `[requests, ...]` for every head: `[rows, ...]`."""
        head = torch.arange(self.kv_heads, device=self.device) * by_head
        return (x[:, None] + head.view(1, -1, *[1] * (x.dim() - 1))).flatten(0, 1)

    def columns(self, longest: int) -> int:
        """Columns of `packed` that a step looks at, where no request has more tokens."""
        return max(1, -(-longest // self.pages.form.tokens))

    def known(self, requests: int) -> list[int]:
        """Of the first requests, how many tokens there were before the newest: waits for the device."""
        spans = self.spans[: requests * self.kv_heads : self.kv_heads, [1, 3, 4]].tolist()
        return [packed - left_out + stop - 1 for packed, left_out, stop in spans]

    def fill(
        self,
        packed: Place,
        exact: Place,
        packed_blocks: torch.Tensor,
        exact_blocks: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
    ) -> None:
        """Fill the first rows for requests of `lengths [requests]` tokens, the newest included; 0: none, which sees
        and completes nothing. packed_blocks, exact_blocks: `[requests, some]`, vLLM's tables, of block ids; longest: no
        request has more tokens, and columns behind it stay as they were."""
        count, heads, pages = len(lengths), self.kv_heads, self.pages
        length = lengths.long()
        rows = slice(0, count * heads)
        group, tokens, spread = pages.form.group, pages.form.tokens, self.spread

        # Packed pages, all that there may be.
        columns = min(self.packed_columns // packed.pages, -(-longest // self.pages.block), packed_blocks.shape[1])
        ids = packed_blocks[:, :columns].long() * packed.block
        at = ids[:, :, None] + torch.arange(packed.pages, device=self.device) * packed.page
        self.packed[rows, : at.shape[1] * packed.pages] = spread(at.flatten(1), packed.head)

        # Exact pages from the first that may be read; those that a prefix hit left out are read packed.
        start = ((length - 1 - pages.residual).clamp_min(0) // group) * group
        where = start[:, None] // PAGE + torch.arange(self.exact_columns, device=self.device)
        exact_at, found = page_at(exact, exact_blocks, where)
        there = where * PAGE < length[:, None]
        left_out = ((found == NULL) & there).sum(1) * PAGE
        left_out = torch.minimum(left_out, (length - start).clamp_min(0))
        size = pages.exact_bytes // 2 // UNIT
        exact_rows = spread(exact_at, exact.head)
        self.exact[rows, :, 0] = exact_rows
        self.exact[rows, :, 1] = exact_rows + size

        span = torch.zeros((count, SPAN), dtype=torch.int32, device=self.device)
        span[:, 1] = start + left_out
        span[:, 3] = left_out
        span[:, 4] = length - start
        self.spans[rows] = span.repeat_interleave(heads, 0, output_size=count * heads)

        # The group that the newest token completes.
        done = (length % group == 0) & (length > 0)
        first = (length - group).clamp_min(0)
        page, plane = first // tokens, first % tokens // PAGE
        block = packed_blocks.gather(1, (page // packed.pages)[:, None])[:, 0].long()
        self.due[rows, 0] = spread(block * packed.block + page % packed.pages * packed.page, packed.head)
        plane = torch.where(done, plane, -1)
        self.due[rows, 1] = plane.repeat_interleave(heads, 0, output_size=count * heads)
        where = first[:, None] // PAGE + torch.arange(group // PAGE, device=self.device)
        sources = spread(page_at(exact, exact_blocks, where)[0], exact.head)
        self.sources[rows, :, 0] = sources
        self.sources[rows, :, 1] = sources + size


@dataclass
class Prefill:
    """A request with several new tokens, or with one behind others with several.

    number: its row in the block tables; first, last: its tokens of the batch; known: tokens that there were before.
    """

    number: int
    first: int
    last: int
    known: int


@dataclass
class Step:
    """What all layers know of a step: filled by the builder of whichever group comes last.

    decodes: how many requests, the first ones, have one new token each and are in `tables`; longest: tokens of the
    longest of them, the newest included (an upper bound); completes: whether one of them may complete a group.
    packed_blocks, exact_blocks: vLLM's block tables `[requests, some]`; exact_slots: `[tokens]`, where the exact tier
    has the batch's tokens (`block * tokens of a block + token`). lengths: tokens of each request, where vLLM has them;
    plan: a path's own.
    """

    tables: Tables
    tokens: int
    decodes: int
    longest: int
    completes: bool
    prefills: list[Prefill]
    packed_blocks: torch.Tensor
    exact_blocks: torch.Tensor
    exact_slots: torch.Tensor
    lengths: torch.Tensor | None = None
    plan: Any = None


def page_at(place: Place, blocks: torch.Tensor, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Relative addresses of pages `[requests, n]`, by their numbers in the text, and their blocks' ids."""
    found = blocks.gather(1, (pages // place.pages).clamp_max(blocks.shape[1] - 1)).long()
    return found * place.block + pages % place.pages * place.page, found
