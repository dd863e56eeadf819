"""One decoding step: the query of the newest token over every tier, that token included."""

from __future__ import annotations

from functools import lru_cache

import torch

from fivefold.attention.merge import MASKED, attend, merge
from fivefold.store.layer_cache import Cohort, LayerCache
from fivefold.store.tiers import PAGE, Geometry

# Numbers of keys that are unpacked at a time: bounds the memory of a step, and keeps it in the processor's cache.
PACKED_BLOCK = 1 << 19


def attend_step(layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float) -> torch.Tensor:
    """Attention of the newest token of each row of a cohort.

    queries: `[rows, query_heads per kv head, head_dim]`: the heads of a group are the rows of one product.
    Returns the same shape.
    """
    parts = [attend_exact(layer, cohort, queries, scaling)]
    if cohort.packed.shape[1]:
        parts.append(attend_packed(layer, cohort, queries, scaling))
    return merge(parts)[0].to(queries.dtype)


def attend_exact(
    layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) over the exact tier."""
    geometry = cohort.geometry
    tokens = exact_tokens(geometry)
    bias = exact_bias(geometry, queries.device)
    segments = cohort.exact_segments()
    if queries.dtype is not torch.float32:
        # The fused call accumulates in float32 whatever it is given; a plain product would round the scores.
        parts = []
        for first, last in segments:
            window = slice(first * PAGE, min(last * PAGE, tokens))
            keys, values = (layer.exact(cohort, name, first, last)[:, : window.stop - window.start] for name in KV)
            part = attend(
                queries[:, None],
                keys[:, None],
                values[:, None],
                scaling,
                None if bias is None else bias[window].expand(queries.shape[1], -1),
            )
            parts.append((part[0][:, 0], part[1][:, 0]))
        return merge(parts)
    scaled = queries * scaling
    scores = [
        torch.bmm(
            scaled, layer.exact(cohort, "keys", first, last)[:, : tokens - first * PAGE].transpose(1, 2)
        )
        for first, last in segments
    ]
    whole = scores[0] if len(scores) == 1 else torch.cat(scores, 2)
    if bias is not None:
        whole += bias
    lse = whole.logsumexp(2)
    weights = (whole - lse[..., None]).exp_()
    out = None
    for first, last in segments:
        values = layer.exact(cohort, "values", first, last)[:, : tokens - first * PAGE]
        part = weights[:, :, first * PAGE : first * PAGE + values.shape[1]]
        out = torch.bmm(part, values) if out is None else out.baddbmm_(part, values)
    assert out is not None
    return out, lse


KV = ("keys", "values")


def attend_packed(
    layer: LayerCache, cohort: Cohort, queries: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) over the packed tier, page block by page block."""
    assert layer.codec is not None and layer.packing is not None
    geometry, page = cohort.geometry, layer.packing.page
    bias = packed_bias(geometry, queries.device)
    step = max(1, PACKED_BLOCK // (page * queries.shape[0] * queries.shape[2]))
    scaled = queries.float() * scaling
    parts = []
    for first in range(0, cohort.packed.shape[1], step):
        last = min(first + step, cohort.packed.shape[1])
        fields = layer.packed_fields(cohort, first, last)
        scores = layer.codec.scores(scaled, fields)
        if bias is not None:
            scores += bias[first * page : last * page]
        filled = geometry.packed_stop - geometry.packed_base - first * page
        if filled < scores.shape[2]:
            scores[:, :, filled:] = MASKED
        lse = scores.logsumexp(2)
        weights = scores.sub_(lse[..., None]).exp_()
        parts.append((layer.codec.output(weights, fields), lse))
    return merge(parts)


def exact_tokens(geometry: Geometry) -> int:
    """Filled slots of the exact tier; they are the first ones of its columns."""
    window = max(0, geometry.length - geometry.exact_base)
    return min(geometry.length, geometry.extent.pinned * PAGE) + window


@lru_cache(maxsize=64)
def exact_bias(geometry: Geometry, device: torch.device) -> torch.Tensor | None:
    """0 where the newest token sees a slot of the exact tier, else `MASKED`: `[tokens]`; None if it sees all."""
    recent = geometry.extent.recent
    if recent is None or geometry.length <= recent:
        return None
    pinned = min(geometry.length, geometry.extent.pinned * PAGE)
    positions = torch.cat([torch.arange(pinned), torch.arange(geometry.exact_base, geometry.length)])
    return _bias(positions, geometry).to(device)


@lru_cache(maxsize=64)
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
