"""One decoding step: the query of the newest token over every tier, that token included."""

from __future__ import annotations

from functools import lru_cache

import torch

from fivefold.attention.fused import attend_fused
from fivefold.attention.merge import MASKED, attend, merge
from fivefold.store.layer_cache import Cohort, LayerCache
from fivefold.store.tiers import PAGE, Geometry

# Numbers (keys times channels) of pages that are attended at a time: bounds the memory of a step, and keeps
# it in the processor's cache.
PACKED_BLOCK = 1 << 20


def attend_step(layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of the newest token of each row of a cohort.

    queries: `[rows, query_heads per kv head, head_dim]`: the heads of a group are the rows of one product.
    Returns the same shape. By kernels where they run, else in plain PyTorch.
    """
    fused = attend_fused(layer, cohort, queries, scaling)
    if fused is not None:
        return fused
    if not cohort.packed.shape[1]:
        return attend_exact(layer, cohort, queries, scaling, alone=True)[0].to(queries.dtype)
    parts = [attend_exact(layer, cohort, queries, scaling), attend_packed(layer, cohort, queries, scaling)]
    return merge(parts)[0].to(queries.dtype)


def attend_exact(
    layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float, alone: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) over the exact tier; the latter is empty if the tier is `alone`, nothing to merge with."""
    geometry = cohort.geometry
    tokens = exact_tokens(geometry)
    bias = exact_bias(geometry, queries.device)
    blocks = layer.exact_blocks(cohort)
    if queries.dtype is not torch.float32:
        # The fused call accumulates in float32 whatever it is given; a plain product would round the scores.
        parts = []
        for first, last, location in blocks:
            window = slice(first * PAGE, min(last * PAGE, tokens))
            keys, values = (layer.exact(name, location)[:, : window.stop - window.start] for name in KV)
            seen = None if bias is None else bias[window].expand(queries.shape[1], -1)
            part = attend(queries[:, None], keys[:, None], values[:, None], scaling, seen)
            parts.append((part[0][:, 0], part[1][:, 0]))
        return merge(parts)
    scaled = queries * scaling
    scores = [
        torch.bmm(scaled, layer.exact("keys", location)[:, : tokens - first * PAGE].transpose(1, 2))
        for first, _, location in blocks
    ]
    whole = scores[0] if len(scores) == 1 else torch.cat(scores, 2)
    if bias is not None:
        whole += bias
    if alone:
        whole, lse = whole.softmax(-1), whole.new_empty(0)
    else:
        lse = softmax_(whole)
    out = None
    for first, _, location in blocks:
        values = layer.exact("values", location)[:, : tokens - first * PAGE]
        weights = whole[:, :, first * PAGE : first * PAGE + values.shape[1]]
        out = torch.bmm(weights, values) if out is None else out.baddbmm_(weights, values)
    assert out is not None
    return out, lse


KV = ("keys", "values")


def softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis in place; returns the log-sum-exp."""
    top = scores.amax(-1, keepdim=True)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    scores.div_(total)
    return total.log_().add_(top)[..., 0]


def attend_packed(
    layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) over the packed tier, page block by page block."""
    assert layer.codec is not None and layer.packing is not None
    geometry, page = cohort.geometry, layer.packing.page
    bias = packed_bias(geometry, queries.device)
    scaled = queries.float() * scaling
    merged = None
    for first, last, location, own in layer.packed_blocks(cohort, PACKED_BLOCK):
        fields = layer.packed(location, own)
        scores = layer.codec.scores(scaled, fields)
        if bias is not None:
            scores += bias[first * page : last * page]
        filled = geometry.packed_stop - geometry.packed_base - first * page
        if filled < scores.shape[2]:
            scores[:, :, filled:] = MASKED
        lse = softmax_(scores)
        part = (layer.codec.output(scores, fields), lse)
        merged = part if merged is None else merge([merged, part])
    assert merged is not None
    return merged


def exact_tokens(geometry: Geometry) -> int:
    """Filled slots of the exact tier; they are the first ones of its columns."""
    window = max(0, geometry.length - geometry.exact_base)
    return min(geometry.length, geometry.extent.pinned * PAGE) + window


@lru_cache(maxsize=16)
def exact_bias(geometry: Geometry, device: torch.device) -> torch.Tensor | None:
    """0 where the newest token sees a slot of the exact tier, else `MASKED`: `[tokens]`; None is all 0."""
    recent = geometry.extent.recent
    if recent is None or geometry.length <= recent:
        return None
    pinned = min(geometry.length, geometry.extent.pinned * PAGE)
    # While the pinned pages are not yet full, the window begins behind the newest token.
    window = torch.arange(geometry.exact_base, max(geometry.exact_base, geometry.length))
    positions = torch.cat([torch.arange(pinned), window])
    return _bias(positions, geometry).to(device)


@lru_cache(maxsize=16)
def packed_bias(geometry: Geometry, device: torch.device) -> torch.Tensor | None:
    """The same for the slots of the packed tier, those behind `packed_stop` included (they count as seen)."""
    recent = geometry.extent.recent
    if recent is None or geometry.length - recent <= geometry.packed_base:
        return None
    return _bias(torch.arange(geometry.packed_base, geometry.length + PAGE * 32), geometry).to(device)


def _bias(positions: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    assert geometry.extent.recent is not None
    seen = (positions < geometry.extent.sink) | (positions >= geometry.length - geometry.extent.recent)
    return torch.where(seen, 0.0, MASKED)
