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
from fivefold.blocks import CHUNK_STEP, CUDNN_OPERATIONS, KEY_NUMBERS, blocks, halved
from fivefold.kernels.device import sent
from fivefold.kernels.merge import Part
from fivefold.store.group import KV, RowGroup
from fivefold.store.rows import PAGE, Bounds, Extent

QUERY_BLOCK = 512
KEY_BLOCK = 2048
"""Tokens of the packed tier that are decoded at a time where that is not on a GPU (see `KEY_NUMBERS`)."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""Keys and values `[rows, tokens, head_dim]`."""
Piece = tuple[int, torch.Tensor, torch.Tensor]
"""Tokens of some rows that stand alike: the first one's position (in the exact tier, its slot), keys and values `[rows,
tokens, head_dim]`."""


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
    extent, chunk, cap = group.bounds.extent, keys.shape[1], group.layer.spec.cap
    start = int(group.bounds.length)
    # Nothing has left what any query sees.
    whole = _sees_all(extent) or start + chunk <= extent.recent  # type: ignore[operator]
    if cap is None and not extent.late_sink and extent.share is None and takes_windows(queries):
        if not whole:
            return _parts_under_window(group, queries, keys, values, scaling)
        if start:
            return _parts_joined(group, queries, keys, values, scaling)
    if whole:
        own = attend(queries, _spread(keys, queries), _spread(values, queries), scaling, causal=True, cap=cap)
    else:
        own = windowed(extent, start, queries, keys, values, np.arange(start, start + chunk), scaling, cap)
    parts = [own]
    if start:
        for part in _stored(group, queries, scaling):
            parts = [merge([*parts, part])]  # at once: there may be many
    left = left_of(group, queries, scaling)
    return parts if left is None else [*parts, left]


def _parts_joined(
    group: RowGroup, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> list[Part]:
    """Where `takes_windows`, and every query sees all that is stored: the newest exact tokens, and the last packed ones
    where they are few, are copied together with the chunk. A GPU copies sooner than it attends once more and merges
    what comes out."""
    layer, chunk = group.layer, keys.shape[1]
    parts: list[Part] = []
    joined: list[tuple[torch.Tensor, torch.Tensor]] = []
    tiers = [(_exact(group, True, queries), PAGE, 1 << 40)]
    if layer.packing is not None:
        tiers.append((_packed(group, queries), layer.packing.page, 4 * chunk))
    for pieces, page, most in tiers:
        sizes = _block_sizes(queries, page)
        for _, k, v in pieces:
            held = k.shape[1]
            # What is large is better off alone, where another kernel takes it.
            if held in sizes or held > most or is_large(queries, held):
                recurs = chunk % CHUNK_STEP == 0 and held in sizes
                parts.append(_over_all(queries, k, v, scaling, None, recurs))
            else:
                joined.append((k, v))
    k, v = (_spread(x, queries) for x in _cat([*joined, (keys, values)]))
    if joined:
        before = k.shape[2] - chunk
        parts.append(attend_window(queries, k, v, scaling, before, before + chunk))
    else:
        parts.append(attend(queries, k, v, scaling, causal=True))
    return parts


def _parts_under_window(
    group: RowGroup, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> list[Part]:
    """The same under a window: what the queries see of it is copied together with the chunk, and sinks are attended
    on once more. Tokens between these are seen by no query."""
    extent, start = group.bounds.extent, int(group.bounds.length)
    assert extent.recent is not None
    sink, oldest = extent.sink, max(extent.sink, start - extent.recent + 1)
    sinks: list[Pair] = []
    window: list[tuple[int, Pair]] = []
    for at, k, v in _runs(group, queries):
        few, first = sink - at, max(0, oldest - at)
        if few > 0:
            sinks.append((k[:, :few], v[:, :few]))
        if first < k.shape[1]:
            window.append((at + first, (k[:, first:], v[:, first:])))
    window.sort(key=lambda piece: piece[0])
    # Queries that are sinks themselves see all that is before them, and there is nothing that they do not.
    early = min(keys.shape[1], max(0, sink - start))
    if early:
        sinks.append((keys[:, :early], values[:, :early]))
    run = _cat([*(pair for _, pair in window), (keys[:, early:], values[:, early:])])
    rest, parts = queries[:, :, early:], list[Part]()
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


def _exact(group: RowGroup, joined: bool, queries: torch.Tensor | None = None) -> Iterator[Piece]:
    """The exact tier, block by block. Where a kernel `gathers` it, of up to `KEY_NUMBERS` each, or as `queries` that
    see all of it want them.

    joined: blocks are copied together, as many as make `KEY_NUMBERS`. A GPU copies sooner than it attends over many
    blocks and merges what comes out, and every earlier chunk has left a block of its own.
    """
    tokens, parts = int(group.bounds.exact_tokens), list[Piece]()
    most = KEY_NUMBERS // (len(group.rows) * group.layer.spec.head_dim)
    if gathers(group.layer):
        sizes = [max(1, most // PAGE) * PAGE] if queries is None else _block_sizes(queries, PAGE)
        large = tokens + 1 if queries is None else _large(queries)
        for first, last in blocks(-(-tokens // PAGE), tokens // PAGE, PAGE, sizes, large):
            yield (first * PAGE, *gather_fused(group, first, min(last * PAGE, tokens) - first * PAGE))
        return
    most = most if joined else 0
    for column, last, location in group.exact_blocks():
        first, stop = column * PAGE, min(last * PAGE, tokens)
        keys, values = (group.read_exact(name, location)[:, : stop - first] for name in KV)
        if parts and stop - parts[0][0] > most:
            yield _join(parts)
            parts = []
        parts.append((first, keys, values))
    if parts:
        yield _join(parts)


def _runs(group: RowGroup, queries: torch.Tensor) -> Iterator[Piece]:
    """All that is stored, as runs of positions."""
    bounds, pinned = group.bounds, int(group.bounds.pinned_tokens)
    for first, keys, values in _exact(group, False):
        count = min(keys.shape[1], max(0, pinned - first))
        if count:
            yield first, keys[:, :count], values[:, :count]
        if count < keys.shape[1]:
            yield int(bounds.exact_base) + first + count - pinned, keys[:, count:], values[:, count:]
    yield from _packed(group, queries)


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
    return halved(most, page, lambda tokens: regular and is_large(queries, tokens, True))


def _large(queries: torch.Tensor) -> int:
    """Tokens that are worth a plan of cuDNN of their own."""
    return -(-CUDNN_OPERATIONS // (4 * queries.numel()))


def _packed(group: RowGroup, queries: torch.Tensor) -> Iterator[Piece]:
    """The packed tier block by block, decoded."""
    layer = group.layer
    if not group.packed.shape[1]:
        return
    assert layer.codec is not None and layer.packing is not None
    bounds, page = group.bounds, layer.packing.page
    columns, whole = group.packed.shape[1], (int(bounds.packed_stop) - int(bounds.packed_base)) // page
    for first, last in blocks(columns, whole, page, _block_sizes(queries, page), _large(queries)):
        begin = int(bounds.packed_base) + first * page
        stop = min(int(bounds.packed_stop), int(bounds.packed_base) + last * page)
        pair = unpack_fused(group, first, last, queries.dtype)
        if pair is None:
            keys, values = group.decoded(first, last)
            pair = keys.to(queries.dtype), values.to(queries.dtype)
        keys, values = (x[:, : stop - begin] for x in pair)
        yield begin, keys, values


def _stored(group: RowGroup, queries: torch.Tensor, scaling: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chunk over each tier, block by block: parts to be merged."""
    bounds, extent, cap = group.bounds, group.bounds.extent, group.layer.spec.cap

    # Under a window sinks and the rest stay apart: what is attended on at once is a run of positions.
    exact = bounds.exact_positions(int(bounds.exact_pages))
    for packed in (False, True):
        pieces = _packed(group, queries) if packed else _exact(group, queries.is_cuda and _sees_all(extent))
        for begin, keys, values in pieces:
            stop = begin + keys.shape[1]
            at = np.arange(begin, stop) if packed else exact[begin:stop]
            for first, last in _seen(bounds, at):
                k, v = keys[:, first:last], values[:, first:last]
                if _sees_all(extent):
                    yield _over_all(queries, k, v, scaling, cap)
                else:
                    yield windowed(extent, int(bounds.length), queries, k, v, at[first:last], scaling, cap)


def _seen(bounds: Bounds, positions: np.ndarray) -> list[tuple[int, int]]:
    """Runs of slots at ascending positions, without those that have left; queries' own windows are masked later."""
    count, left = len(positions), int(bounds.left)
    if not left or bounds.share < 0:
        return [(0, count)]
    sinks, first = (int(np.searchsorted(positions, x)) for x in (min(bounds.sink, left), left))
    return [(low, high) for low, high in ((0, sinks), (first, count)) if low < high]
