"""A chunk of new tokens over the stored tiers and over itself.

No [query, key] matrix larger than a block is ever built: the fused call works in blocks of its own, and where
a window needs a mask, queries are taken `QUERY_BLOCK` at a time against the keys they can see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from fivefold.attention.compensate import left_of
from fivefold.attention.fused import gather_fused, gathers, unpack_fused
from fivefold.attention.merge import MASKED, attend, attend_window, is_large, merge, takes_windows
from fivefold.blocks import CHUNK_STEP, CUDNN_OPERATIONS, KEY_NUMBERS, blocks, by_itself, halved
from fivefold.interrupts import uninterrupted
from fivefold.kernels.device import sent
from fivefold.kernels.merge import Part
from fivefold.store.group import KV, RowGroup
from fivefold.store.rows import PAGE, Bounds, Extent

QUERY_BLOCK = 512
KEY_BLOCK = 2048
"""Tokens of the packed tier that are decoded at a time where that is not on a GPU (see `KEY_NUMBERS`)."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values `[rows, tokens, head_dim]`."""
Block = tuple[int, int, int, int]
Piece = tuple[int, torch.Tensor, torch.Tensor]
"""Tokens of some rows that stand alike: the first one's position (in the exact tier, its slot), keys and values `[rows,
tokens, head_dim]`."""


class Cut:
    """How what is stored is cut for a chunk, where rows stand at `bounds`: the same for all layers in which rows stand
    alike. Blocks are (first column, last column, first position, tokens) each, of the exact tier with slots for
    positions."""

    def __init__(self, group: RowGroup, queries: torch.Tensor) -> None:
        self.bounds, self.extent, self.chunk = group.bounds, group.bounds.extent, queries.shape[2]
        self.start, self.numbers = int(self.bounds.length), queries.numel()
        self.whole = _sees_all(self.extent) or self.start + self.chunk <= self.extent.recent  # type: ignore[operator]
        """Nothing has left what any query sees."""
        self.regular = self.chunk % CHUNK_STEP == 0
        self.own = by_itself(4 * self.numbers / self.chunk, self.chunk)
        self.most = KEY_NUMBERS // (queries.shape[0] * queries.shape[3])
        packing, end = group.layer.packing, int(self.bounds.exact_tokens)
        sizes, large = _block_sizes(queries, PAGE), _large(queries)
        self.sizes = [sizes]
        self.exact = _blocks(0, end, PAGE, sizes, large)
        self.runs = _blocks(0, end, PAGE, [max(1, self.most // PAGE) * PAGE], end + 1)
        """The exact tier in as few blocks as can be."""
        self.packed = list[Block]()
        if packing is not None:
            base, stop = int(self.bounds.packed_base), int(self.bounds.packed_stop)
            self.sizes.append(_block_sizes(queries, packing.page))
            self.packed = _blocks(base, stop, packing.page, self.sizes[1], large)

    def apart(self, tokens: int, packed: bool) -> tuple[bool, bool]:
        """Whether a block of so many is attended on by itself, where another kernel takes it than with the chunk; and
        whether such blocks come again."""
        recurs = self.regular and tokens in self.sizes[packed]
        few = 4 * self.chunk if packed else 1 << 40
        return tokens in self.sizes[packed] or tokens > few or is_large(self.numbers, tokens), recurs

    @classmethod
    def of(cls, group: RowGroup, queries: torch.Tensor) -> Cut:
        """The same one for all layers of a bank that ask for the same."""
        key = "cut", group.bounds, queries.shape, takes_windows(queries)
        found: Cut = group.layer.bank.memo.get(key, lambda: cls(group, queries))
        return found


def _blocks(base: int, stop: int, page: int, sizes: list[int], large: int) -> list[Block]:
    """Tokens from one position to another in pages, as `blocks`."""
    held = max(0, stop - base)
    cuts = blocks(-(-held // page), held // page, page, sizes, large)
    return [(first, last, base + first * page, min(held, last * page) - first * page) for first, last in cuts]


def attend_chunk(
    group: RowGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    out: torch.Tensor | None = None,
) -> Part:
    """Attention of a chunk that is not yet stored.

    queries: `[rows, query_heads per kv head, tokens, head_dim]`; keys, values: `[rows, tokens, head_dim]`.
    Returns the output, shape and dtype of the queries, which is `out` if that is given, and its log-sum-exp, float32
    `[rows, heads, tokens]`. Where the window is one of the text, every query sees all of the chunk before it and all
    that has not left by now.
    """
    return merge(_parts(group, queries, keys, values, scaling), queries.dtype, out)


def _parts(
    group: RowGroup, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> list[Part]:
    """What is merged to that."""
    cap, cut = group.layer.spec.cap, Cut.of(group, queries)
    extent, start, chunk = cut.extent, cut.start, cut.chunk
    if cap is None and not extent.late_sink and extent.share is None and takes_windows(queries):
        if not cut.whole:
            return _parts_under_window(group, cut, queries, keys, values, scaling)
        if start:
            return _parts_joined(group, cut, queries, keys, values, scaling)
    if cut.whole:
        k, v = (_spread(x, queries) for x in (keys, values))
        own = attend(queries, k, v, scaling, causal=True, cap=cap, recurs=cut.regular)
    else:
        own = windowed(extent, start, queries, keys, values, np.arange(start, start + chunk), scaling, cap)
    parts = [own]
    if start:
        for part in _stored(group, cut, queries, scaling):
            parts = [merge([*parts, part])]  # at once: there may be many
    left = left_of(group, queries, scaling)
    return parts if left is None else [*parts, left]


def _parts_joined(
    group: RowGroup, cut: Cut, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> list[Part]:
    """Where `takes_windows`, and every query sees all that is stored: the newest exact tokens, and the last packed ones
    where they are few, are copied together, and with the chunk unless that is large. A GPU copies sooner than it
    attends once more and merges what comes out."""
    parts: list[Part] = []
    joined: list[tuple[torch.Tensor, torch.Tensor]] = []
    for packed, pieces in ((False, _exact(group, cut, True)), (True, _packed(group, cut, queries.dtype))):
        for _, k, v in pieces:
            alone, recurs = cut.apart(k.shape[1], packed)
            if alone:
                parts.append(_over_all(queries, k, v, scaling, None, recurs))
            else:
                joined.append((k, v))
    if joined and cut.own:
        parts.append(_over_all(queries, *_cat(joined), scaling, None))
        joined = []
    k, v = (_spread(x, queries) for x in _cat([*joined, (keys, values)]))
    if joined:
        before = k.shape[2] - cut.chunk
        parts.append(attend_window(queries, k, v, scaling, before, before + cut.chunk))
    else:
        parts.append(attend(queries, k, v, scaling, causal=True, recurs=cut.regular))
    return parts


def _parts_under_window(
    group: RowGroup, cut: Cut, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> list[Part]:
    """The same under a window: what the queries see of it is copied together with the chunk, and sinks are attended
    on once more. Tokens between these are seen by no query."""
    extent, start = cut.extent, cut.start
    assert extent.recent is not None
    sink, oldest = extent.sink, max(extent.sink, start - extent.recent + 1)
    sinks: list[Pair] = []
    window: list[tuple[int, Pair]] = []
    for at, k, v in _runs(group, cut, queries.dtype):
        few, first = sink - at, max(0, oldest - at)
        if few > 0:
            sinks.append(_some(k, v, 0, few))
        if first < k.shape[1]:
            window.append((at + first, _some(k, v, first)))
    window.sort(key=lambda piece: piece[0])
    # Queries that are sinks themselves see all that is before them, and there is nothing that they do not.
    early = min(keys.shape[1], max(0, sink - start))
    if early:
        sinks.append((keys[:, :early], values[:, :early]))
    run = _cat([*(pair for _, pair in window), _some(keys, values, early)])
    rest, parts = queries[:, :, early:] if early else queries, list[Part]()
    if rest.shape[2]:
        k, v = (_spread(x, queries) for x in run)
        parts.append(attend_window(rest, k, v, scaling, k.shape[2] - rest.shape[2], extent.recent))
    if sinks:
        k, v = (_spread(x, queries) for x in _cat(sinks))
        if rest.shape[2]:
            parts.append(attend(rest, k, v, scaling))
        if early:
            first_ones = attend_window(queries[:, :, :early], k, v, scaling, k.shape[2] - early, k.shape[2])
            both = [first_ones] if not parts else [first_ones, merge(parts, queries.dtype)]
            parts = [(torch.cat([out for out, _ in both], 2), torch.cat([lse for _, lse in both], 2))]
    return parts


def _sees_all(extent: Extent) -> bool:
    """Whether all queries of a chunk see the same of what is stored, and all of the chunk before them."""
    return extent.recent is None or extent.share is not None


def _spread(x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """`[rows, tokens, head_dim]` seen by every query head of the group, without a copy."""
    return x[:, None].expand(-1, queries.shape[1], -1, -1)


def windowed(
    extent: Extent,
    start: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: np.ndarray,
    scaling: float,
    cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries at positions from `start` on over keys at ascending `positions`, under a window: each block of queries
    against what any of them sees."""
    assert extent.recent is not None
    pinned = int(np.searchsorted(positions, max(extent.sink, extent.late_sink)))
    where = sent(keys.device, positions)[0]
    outs, lses = [], []
    for first in range(0, queries.shape[2], QUERY_BLOCK):
        uninterrupted.passing()
        block = queries[:, :, first : first + QUERY_BLOCK]
        low, high = start + first, start + first + block.shape[2] - 1
        stop = int(np.searchsorted(positions, high, "right"))
        begin = min(stop, max(pinned, int(np.searchsorted(positions, low - extent.recent, "right"))))
        sinks = min(pinned, stop)
        if sinks == 0 and begin == stop:
            outs.append(torch.zeros_like(block))
            lses.append(torch.full(block.shape[:3], MASKED, device=block.device))
            continue
        seen = [
            torch.cat([x[:, :sinks], x[:, begin:stop]], 1) if 0 < sinks < begin else x[:, begin - sinks : stop]
            for x in (keys, values)
        ]
        bias = None
        late = extent.late_sink and high >= extent.late_recent
        if late or positions[stop - 1] > low or (begin < stop and positions[begin] <= high - extent.recent):
            at = torch.cat([where[:sinks], where[begin:stop]])
            bias = _window_bias(extent, torch.arange(low, high + 1, device=at.device), at)
        out, lse = attend(block, _spread(seen[0], block), _spread(seen[1], block), scaling, bias, cap=cap)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _window_bias(extent: Extent, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """0 where a query at a position sees a key at a position, else `MASKED`: float32 `[query, key]`."""
    q, k = queries[:, None], keys[None]
    seen = k <= q
    if extent.recent is not None:
        seen &= (k < extent.sink) | (k > q - extent.recent) | ((k < extent.late_sink) & (k > q - extent.late_recent))
    return torch.where(seen, 0.0, MASKED)


def _exact(group: RowGroup, cut: Cut, joined: bool, halves: bool = True) -> Iterator[Piece]:
    """The exact tier, block by block. Where a kernel `gathers` it, of up to `KEY_NUMBERS` each; halves: as queries that
    see all of it want them.

    joined: blocks are copied together, as many as make `KEY_NUMBERS`. A GPU copies sooner than it attends over many
    blocks and merges what comes out, and every earlier chunk has left a block of its own.
    """
    if gathers(group.layer):
        for column, _, first, count in cut.exact if halves else cut.runs:
            yield (first, *gather_fused(group, column, count))
        return
    tokens, parts, most = int(cut.bounds.exact_tokens), list[Piece](), cut.most if joined else 0
    for column, last, location in group.exact_blocks():
        uninterrupted.passing()
        first, stop = column * PAGE, min(last * PAGE, tokens)
        keys, values = (group.read_exact(name, location)[:, : stop - first] for name in KV)
        if parts and stop - parts[0][0] > most:
            yield _join(parts)
            parts = []
        parts.append((first, keys, values))
    if parts:
        yield _join(parts)


def _runs(group: RowGroup, cut: Cut, dtype: torch.dtype) -> Iterator[Piece]:
    """All that is stored, as runs of positions."""
    bounds, pinned = cut.bounds, int(cut.bounds.pinned_tokens)
    for first, keys, values in _exact(group, cut, False, False):
        count = min(keys.shape[1], max(0, pinned - first))
        if count:
            yield first, *_some(keys, values, 0, count)
        if count < keys.shape[1]:
            yield int(bounds.exact_base) + first + count - pinned, *_some(keys, values, count)
    yield from _packed(group, cut, dtype)


def _some(keys: torch.Tensor, values: torch.Tensor, first: int, stop: int = 1 << 40) -> Pair:
    """Some of the tokens; they themselves where that is all."""
    if first == 0 and stop >= keys.shape[1]:
        return keys, values
    return keys[:, first:stop], values[:, first:stop]


def _join(parts: Sequence[Piece]) -> Piece:
    return parts[0][0], *_cat([(k, v) for _, k, v in parts])


def _cat(pairs: Sequence[Pair]) -> Pair:
    if len(pairs) == 1:
        return pairs[0]
    keys, values = zip(*pairs)
    return torch.cat(keys, 1), torch.cat(values, 1)


def _over_all(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    cap: float | None,
    recurs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where every query sees every key: the group's heads and the chunk are rows of one product."""
    rows, heads, chunk, dim = queries.shape
    flat = queries.reshape(rows, 1, heads * chunk, dim)
    out, lse = attend(flat, keys[:, None], values[:, None], scaling, cap=cap, recurs=recurs)
    return out.view(queries.shape), lse.view(rows, heads, chunk)


def _block_sizes(queries: torch.Tensor, page: int) -> list[int]:
    """Tokens of the blocks of packed pages that are decoded at a time, the largest first: as many as make
    `KEY_NUMBERS`, and halves of that while they are worth a plan of cuDNN. (Chunks of a prompt that is cut up are
    alike, so these shapes come again; what remains of a prompt is of any length.)"""
    rows, _, chunk, dim = queries.shape
    regular = takes_windows(queries) and chunk % CHUNK_STEP == 0
    most = KEY_NUMBERS // (rows * dim) if queries.is_cuda else KEY_BLOCK
    return halved(most, page, lambda tokens: regular and is_large(queries.numel(), tokens, True))


def _large(queries: torch.Tensor) -> int:
    """Tokens that are worth a plan of cuDNN of their own."""
    return -(-CUDNN_OPERATIONS // (4 * queries.numel()))


def _packed(group: RowGroup, cut: Cut, dtype: torch.dtype) -> Iterator[Piece]:
    """The packed tier block by block, decoded."""
    for first, last, begin, count in cut.packed:
        uninterrupted.passing()
        pair = unpack_fused(group, first, count, dtype)
        if pair is None:
            keys, values = (x[:, :count].to(dtype) for x in group.decoded(first, last))
            pair = keys, values
        yield begin, *pair


def _stored(
    group: RowGroup, cut: Cut, queries: torch.Tensor, scaling: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chunk over each tier, block by block: parts to be merged."""
    bounds, extent, cap, all_seen = cut.bounds, cut.extent, group.layer.spec.cap, _sees_all(cut.extent)

    # Under a window sinks and the rest stay apart: what is attended on at once is a run of positions.
    exact = bounds.exact_positions(int(bounds.exact_pages))
    for packed in (False, True):
        pieces = _packed(group, cut, queries.dtype) if packed else _exact(group, cut, queries.is_cuda and all_seen)
        for begin, keys, values in pieces:
            stop = begin + keys.shape[1]
            at = np.arange(begin, stop) if packed else exact[begin:stop]
            for first, last in _seen(bounds, at):
                k, v = keys[:, first:last], values[:, first:last]
                if all_seen:
                    yield _over_all(queries, k, v, scaling, cap)
                else:
                    yield windowed(extent, cut.start, queries, k, v, at[first:last], scaling, cap)


def _seen(bounds: Bounds, positions: np.ndarray) -> list[tuple[int, int]]:
    """Runs of slots at ascending positions, without those that have left; queries' own windows are masked later."""
    count, left = len(positions), int(bounds.left)
    if not left or bounds.share < 0:
        return [(0, count)]
    sinks, first = (int(np.searchsorted(positions, x)) for x in (min(bounds.sink, left), left))
    return [(low, high) for low, high in ((0, sinks), (first, count)) if low < high]
