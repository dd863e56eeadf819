"""`duo`'s streaming heads: the first `sink` tokens, which stay exact, and the last `recent` ones, of which those that
are older than `kivi`'s residual are packed, as a session has it. It needs no vLLM.

They are a layer of their own beside the retrieval heads: packed blocks of what a window reads packed, exact blocks of
what it reads exactly and of the sinks. Both are as large as the retrieval heads' blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from fivefold.attention.prefill import windowed
from fivefold.kernels.packed_decode.schedule import SPAN
from fivefold.serving.vllm.cpu import CpuPath
from fivefold.serving.vllm.options import PAGE, Pages
from fivefold.serving.vllm.tables import Place, Tables, page_at
from fivefold.store.rows import Extent

__all__ = ["StreamingCpuPath", "StreamingPages", "StreamingTables", "split"]


@dataclass(frozen=True)
class StreamingPages(Pages):
    """How the tokens of a streaming head lie in vLLM's blocks, of `room` bytes a head."""

    sink: int = 0
    recent: int = 1
    room: int = 0

    @property
    def together(self) -> int:
        return self.room // self.form.nbytes

    @property
    def exact_together(self) -> int:
        return self.room // self.exact_bytes

    @property
    def pinned(self) -> int:
        """Tokens that stay exact: sinks, in whole pages."""
        return -(-self.sink // PAGE) * PAGE

    @property
    def packs(self) -> bool:
        """Whether anything is ever read packed."""
        return self.recent > self.residual + 1

    @property
    def columns(self) -> int:
        window = self.residual + PAGE if self.packs else self.recent + PAGE - 1
        return self.pinned // PAGE + -(-window // PAGE)

    @property
    def packed_span(self) -> int:
        """Packed tokens that a step reads, at most."""
        return self.recent - self.residual if self.packs else 0

    def packed_columns(self, tokens: int) -> int:
        return max(1, _touched(self.packed_span, self.form.tokens))

    def completes(self, tokens: int) -> bool:
        return self.packs and (tokens - self.residual) % PAGE == 0

    def packed(self, known: int) -> int:
        """What lies before is read packed, as far as a window reaches that far and sinks do not."""
        return super().packed(known) if self.packs else 0

    def oldest(self, known: int) -> int:
        """The first token, but for sinks, that the one behind `known` tokens sees."""
        return max(0, known + 1 - self.recent)

    def exact_from(self, known: int) -> int:
        """The first token, but for the pinned ones, that is held exactly where `known` have been stored."""
        return max(self.pinned, self.packed(known), self.oldest(known) // PAGE * PAGE)

    def packed_from(self, known: int) -> int:
        """The first token that is held packed."""
        return max(self.pinned, self.oldest(known))

    def packed_blocks(self, tokens: int) -> int:
        """Blocks of packed pages that a request of so many tokens holds, at most."""
        return min(-(-self.packed(tokens) // self.block), _touched(self.packed_span, self.block))

    def exact_blocks(self, tokens: int) -> int:
        """The same of exact ones: those with sinks, and those of a window."""
        size = PAGE * self.exact_together
        window = self.columns - self.pinned // PAGE
        most = -(-self.pinned // size) + _touched(window * PAGE, size)
        return min(-(-tokens // size), most)

    def bytes_of(self, tokens: int) -> int:
        """The byte formula: of so many tokens of a KV head, those that it holds."""
        first = self.exact_from(tokens)
        packed = max(0, self.packed(tokens) - self.packed_from(tokens))
        exact = min(tokens, self.pinned) + max(0, tokens - first)
        return packed * self.form.nbytes // self.form.tokens + exact * self.exact_bytes // PAGE

    def blocks_of(self, tokens: int) -> int:
        return self.packed_blocks(tokens) + self.exact_blocks(tokens)


def _touched(tokens: int, size: int) -> int:
    """How many blocks of `size` tokens so many in succession touch at most, which end with a page of 32."""
    planes, size = -(-tokens // PAGE), size // PAGE
    return (planes + size - 2) // size + 1 if planes else 0


def split(pages: Pages, retrieval: int, streaming: int, sink: int, recent: int) -> tuple[Pages, StreamingPages]:
    """Blocks of a layer that has so many heads of each kind: those of retrieval heads are as small as they can be if
    one page of all streaming heads fits into as many bytes, and have no padding."""
    least = streaming * max(pages.exact_bytes, pages.form.nbytes)
    whole = replace(pages, least=-(-least // retrieval))
    room = whole.block_bytes * retrieval // streaming
    return whole, StreamingPages(pages.form, pages.residual, pages.dtype, 0, sink, recent, room)


class StreamingTables(Tables):
    """`Tables` of streaming heads. Packed columns begin with the first page that a window sees, and spans count from
    there; the first exact columns have the pinned pages."""

    pages: StreamingPages

    def __init__(self, pages: StreamingPages, *args: Any) -> None:
        super().__init__(pages, *args)
        self.lengths = torch.zeros(0, dtype=torch.int64)

    def columns(self, longest: int) -> int:
        return self.packed_columns

    def known(self, requests: int) -> list[int]:
        return (self.lengths[:requests] - 1).tolist()

    def fill(
        self,
        packed: Place,
        exact: Place,
        packed_blocks: torch.Tensor,
        exact_blocks: torch.Tensor,
        lengths: torch.Tensor,
        longest: int,
    ) -> None:
        count, heads, pages, spread = len(lengths), self.kv_heads, self.pages, self.spread
        self.lengths = length = lengths.long()
        rows, size = slice(0, count * heads), pages.form.tokens
        pinned, oldest = pages.pinned, length - pages.recent  # what the newest token sees, but for sinks
        stop = (length - 1 - pages.residual).clamp_min(0) // PAGE * PAGE if pages.packs else 0 * length
        base = torch.maximum(stop, oldest // PAGE * PAGE).clamp_min(pinned)
        out = oldest > 0  # something has left the window

        # Packed pages, from the first that is seen.
        first = torch.minimum(stop, oldest.clamp_min(pinned))
        page = first // size
        which = page[:, None] + torch.arange(self.packed_columns, device=self.device)
        self.packed[rows] = spread(page_at(packed, packed_blocks, which)[0], packed.head)

        # Exact ones: the pinned pages, and those of the window.
        window = torch.arange(self.exact_columns - pinned // PAGE, device=self.device)
        which = torch.cat([
            torch.arange(pinned // PAGE, device=self.device).expand(count, -1), base[:, None] // PAGE + window
        ], 1)  # fmt: skip
        side = pages.exact_bytes // 2 // 16
        self.exact[rows, :, 0] = where = spread(page_at(exact, exact_blocks, which)[0], exact.head)
        self.exact[rows, :, 1] = where + side

        span = torch.zeros((count, SPAN), dtype=torch.int64, device=self.device)
        span[:, 0], span[:, 1] = first - page * size, stop - page * size
        span[:, 2] = torch.where(out, pages.sink, 0)
        left = torch.where(oldest < pinned, oldest, pinned + (oldest - base).clamp_min(0))
        span[:, 3] = torch.where(out, left, 0)
        span[:, 4] = length.clamp_max(pinned) + (length - base).clamp_min(0)
        span[length == 0] = 0
        self.spans[rows] = span.int().repeat_interleave(heads, 0, output_size=count * heads)

        # The group that is as old as the residual now.
        end = length - pages.residual
        done = (end % PAGE == 0) & (end >= pinned + PAGE) if pages.packs else torch.zeros_like(out)
        group = (end - PAGE).clamp_min(0)
        self.due[rows, 0] = spread(page_at(packed, packed_blocks, group[:, None] // size)[0][:, 0], packed.head)
        plane = torch.where(done, group % size // PAGE, -1)
        self.due[rows, 1] = plane.repeat_interleave(heads, 0, output_size=count * heads)
        self.sources[rows, :, 0] = where = spread(page_at(exact, exact_blocks, group[:, None] // PAGE)[0], exact.head)
        self.sources[rows, :, 1] = where + side


class Held(NamedTuple):
    """What a prefill sees: as `Chunk`, and what lies before, `[2, kv_heads, tokens, head_dim]`, at these positions."""

    recent: torch.Tensor
    start: int
    held: int
    before: torch.Tensor
    positions: np.ndarray


class StreamingCpuPath(CpuPath):
    """`CpuPath` of streaming heads. A prefill copies all that it sees before anything is written, since blocks of the
    window before it may become those of the window behind it; no other request reads them."""

    pages: StreamingPages

    def _gather(
        self, new: torch.Tensor, packed: torch.Tensor, exact: torch.Tensor, packed_blocks: torch.Tensor,
        blocks: torch.Tensor, known: int,
    ) -> Any:  # fmt: skip
        pages, size = self.pages, self.pages.form.tokens
        if known <= pages.pinned:
            return Held(torch.cat([self._held(exact, blocks, 0, known), new], 2), 0, known, new[:, :, :0], np.arange(0))
        start = pages.exact_from(known)
        recent = torch.cat([self._held(exact, blocks, start, known), new], 2)
        before, positions = [self._held(exact, blocks, 0, pages.pinned)], [np.arange(pages.pinned)]
        first, stop = pages.packed_from(known), pages.packed(known)
        if first < stop:
            page = first // size * size
            decoded = torch.stack(self._decoded(packed, packed_blocks, page, stop, new.dtype))
            before.append(decoded[:, :, first - page :])
            positions.append(np.arange(first, stop))
        return Held(recent, start, known - start, torch.cat(before, 2), np.concatenate(positions))

    def _pack(self, chunk: Any, known: int, packed: torch.Tensor, blocks: torch.Tensor) -> None:
        """Pack the groups that have become as old as the residual, and that the next step sees."""
        pages, length = self.pages, chunk.start + chunk.recent.shape[2]
        first = max(pages.packed(known), pages.packed_from(length) // PAGE * PAGE)
        self._pack_groups(chunk, first, pages.packed(length), packed, blocks)

    def _attend(
        self, query: torch.Tensor, chunk: Any, packed: torch.Tensor, blocks: torch.Tensor, scale: float
    ) -> torch.Tensor:
        kv_heads, length = chunk.recent.shape[1], chunk.start + chunk.recent.shape[2]
        queries = query.transpose(0, 1).unflatten(0, (kv_heads, query.shape[1] // kv_heads))
        keys, values = torch.cat([chunk.before, chunk.recent], 2)
        positions = np.concatenate([chunk.positions, np.arange(chunk.start, length)])
        extent = Extent(self.pages.sink, self.pages.recent)
        out, _ = windowed(extent, length - len(query), queries, keys, values, positions, scale, None)
        return out.to(query.dtype).flatten(0, 1).transpose(0, 1)

    def _leave(self, chunk: Any, exact: torch.Tensor, blocks: torch.Tensor) -> None:
        pages, length = self.pages, chunk.start + chunk.recent.shape[2]
        if chunk.start < pages.pinned:
            self._write(chunk, 0, min(length, pages.pinned), exact, blocks)
        self._write(chunk, max(chunk.start, pages.exact_from(length)), length, exact, blocks)
