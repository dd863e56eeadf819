"""A chunk of new tokens over the stored tiers and over itself.

No [query, key] matrix larger than a block is ever built: the fused call works in blocks of its own, and where
a window needs a mask, queries are taken `QUERY_BLOCK` at a time against the keys they can see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fivefold.attention.decode import KV, exact_tokens
from fivefold.attention.merge import MASKED, attend, merge
from fivefold.store.layer_cache import Cohort, LayerCache
from fivefold.store.tiers import PAGE, Extent

QUERY_BLOCK = 512
# Tokens of the packed tier that are decoded at a time.
KEY_BLOCK = 2048


def attend_chunk(
    layer: LayerCache,
    cohort: Cohort,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of a chunk that is not yet stored.

    queries: `[rows, query_heads per kv head, tokens, head_dim]`; keys, values: `[rows, tokens, head_dim]`.
    Returns the output, shape and dtype of the queries, and its log-sum-exp, float32 `[rows, heads, tokens]`.
    """
    extent = cohort.geometry.extent
    chunk = keys.shape[1]
    if extent.recent is None or (cohort.geometry.length == 0 and chunk <= extent.recent):
        own = attend(queries, _spread(keys, queries), _spread(values, queries), scaling, causal=True)
    else:
        own = _banded(extent, cohort.geometry.length, queries, keys, values, scaling)
    if cohort.geometry.length:
        for part in _stored(layer, cohort, queries, scaling):
            own = merge([own, part])
    return own[0].to(queries.dtype), own[1]


def _spread(x: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """`[rows, tokens, head_dim]` seen by every query head of the group, without a copy."""
    return x[:, None].expand(-1, queries.shape[1], -1, -1)


def _banded(
    extent: Extent,
    start: int,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk over itself under a window: each block of queries against its sinks and its band of keys."""
    assert extent.recent is not None
    chunk = keys.shape[1]
    sinks = min(max(0, extent.sink - start), chunk)
    outs, lses = [], []
    for first in range(0, chunk, QUERY_BLOCK):
        last = min(first + QUERY_BLOCK, chunk)
        low = max(0, first - extent.recent + 1)
        seen = torch.arange(low, last)
        if sinks and low > 0:
            seen = torch.cat([torch.arange(min(sinks, low)), seen])
        block = [x[:, seen] if low > 0 else x[:, :last] for x in (keys, values)]
        bias = _window_bias(extent, torch.arange(first, last) + start, seen + start).to(queries.device)
        out, lse = attend(
            queries[:, :, first:last], _spread(block[0], queries), _spread(block[1], queries), scaling, bias
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, 2), torch.cat(lses, 2)


def _window_bias(extent: Extent, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """0 where a query at a position sees a key at a position, else `MASKED`: float32 `[query, key]`."""
    q, k = queries[:, None], keys[None]
    seen = k <= q
    if extent.recent is not None:
        seen &= (k < extent.sink) | (k > q - extent.recent)
    return torch.where(seen, 0.0, MASKED)


def _stored(
    layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The chunk over each tier, block by block: parts to be merged."""
    geometry = cohort.geometry
    rows, heads, chunk, dim = queries.shape
    newest = geometry.length + torch.arange(chunk)

    def over(keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if geometry.extent.recent is None:
            # Every query sees every stored key: the group's heads and the chunk are rows of one product.
            flat = queries.reshape(rows, 1, heads * chunk, dim)
            out, lse = attend(flat, keys[:, None], values[:, None], scaling)
            return out.view(queries.shape), lse.view(rows, heads, chunk)
        outs, lses = [], []
        for first in range(0, chunk, QUERY_BLOCK):
            block = queries[:, :, first : first + QUERY_BLOCK]
            bias = _window_bias(geometry.extent, newest[first : first + QUERY_BLOCK], positions)
            out, lse = attend(block, _spread(keys, block), _spread(values, block), scaling, bias.to(queries.device))
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs, 2), torch.cat(lses, 2)

    tokens = exact_tokens(geometry)
    positions = layer.exact_positions(geometry)[:tokens]
    for first, last, location in layer.exact_blocks(cohort):
        window = slice(first * PAGE, min(last * PAGE, tokens))
        keys, values = (layer.exact(name, location)[:, : window.stop - window.start] for name in KV)
        yield over(keys, values, positions[window])
    if cohort.packed.shape[1]:
        assert layer.codec is not None and layer.packing is not None
        page = layer.packing.page
        step = max(1, KEY_BLOCK // page)
        for first in range(0, cohort.packed.shape[1], step):
            last = min(first + step, cohort.packed.shape[1])
            begin = geometry.packed_base + first * page
            stop = min(geometry.packed_stop, geometry.packed_base + last * page)
            fields = {name: x.flatten(0, 1) for name, x in layer.packed_fields(cohort, first, last).items()}
            keys, values = (
                x.to(queries.dtype).reshape(rows, -1, dim)[:, : stop - begin]
                for x in layer.codec_of(cohort, first, last).decode(fields)
            )
            yield over(keys, values, torch.arange(begin, stop))
