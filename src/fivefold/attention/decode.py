"""One decoding step: the query of the newest token over every tier, that token included."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fivefold.attention.compensate import left_of
from fivefold.attention.fused import attend_fused, attend_picked_fused, attend_scored_fused
from fivefold.attention.merge import MASKED, attend, capped, merge, with_sinks
from fivefold.kernels.choice import takes_cpp
from fivefold.store.codec import Codec
from fivefold.store.group import KV, Block, RowGroup
from fivefold.store.rows import PAGE, Bounds

# Numbers (keys times channels) of pages that are attended at a time: bounds the memory of a step, and keeps
# it in the processor's cache.
PACKED_BLOCK = 1 << 20


Make = Callable[[Bounds, torch.device], torch.Tensor | None]
Weights = list[tuple[torch.Tensor, torch.Tensor]]
"""Weights within a part of the slots, `[rows, query_heads per kv head, slots]`, and the part's log-sum-exp."""


def attend_step(
    group: RowGroup, queries: torch.Tensor, scaling: float, watch: bool = False, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the newest token of each row of a group.

    queries: `[rows, query_heads per kv head, head_dim]`: the heads of a group are the rows of one product. sinks:
    `[rows, query_heads per kv head]`, see `with_sinks`. Returns the shape of queries, and with `watch` the weights,
    float32 `[rows, query_heads per kv head, slots]`. By kernels where they run and nobody watches, else in plain
    PyTorch.
    """
    left = left_of(group, queries, scaling)
    if not watch:
        fused = attend_fused(group, queries, scaling, sinks, left)
        if fused is not None:
            return fused, None
    elif group.held is None and group.bounds.extent.recent is None:
        scored = attend_scored_fused(group, queries, scaling, sinks)
        if scored is not None:
            return scored
    watched: Weights | None = [] if watch else None
    if not group.packed.shape[1]:
        out, lse = attend_exact(group, queries, scaling, sinks is None and left is None, watched)
    else:
        blocks = packed_blocks(group, queries)
        if len(blocks) == 1 and queries.dtype is torch.float32 and sinks is None and left is None:
            return _attend_at_once(group, queries * scaling, blocks[0], watch)
        # In the order of the slots: packed ones first.
        parts = [attend_packed(group, queries, scaling, watched), attend_exact(group, queries, scaling, False, watched)]
        out, lse = merge(parts)
    if left is not None:
        out, lse = merge([(out, lse), left])
    weights = None if watched is None else with_sinks(_whole(watched, lse), lse, sinks)
    return with_sinks(out, lse, sinks).to(queries.dtype), weights


def _attend_at_once(
    group: RowGroup, scaled: torch.Tensor, block: Block, watch: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend_step` for one block of packed pages: with one softmax over both tiers, and nothing to merge."""
    scores, filled, codec, fields = _packed_scores(group, scaled, block)
    stop = scores.shape[2]
    weights = torch.cat([scores, _exact_scores(group, scaled)], 2).softmax(-1)
    out = codec.output(weights[:, :, :stop], fields).add_(_exact_output(group, weights[:, :, stop:]))
    if not watch or filled >= stop:
        return out, weights if watch else None
    return out, torch.cat([weights[:, :, :filled], weights[:, :, stop:]], 2)


def _whole(watched: Weights, lse: torch.Tensor) -> torch.Tensor:
    """The weights over all slots, from those within the parts."""
    if len(watched) == 1:
        return watched[0][0]
    return torch.cat([part * (own - lse).exp()[..., None] for part, own in watched], 2)


def pick(group: RowGroup, weights: torch.Tensor, top: int, sink: int = 0, recent: int = 0) -> torch.Tensor:
    """Positions of the `top` tokens that a step attended to most, the query heads of a kv head together; the first
    `sink` and the last `recent` tokens are always among them.

    weights: `[rows, query_heads per kv head, slots]`. Returns int64 `[rows, top]`, or fewer if there are fewer.
    """
    received, held = weights.sum(1), group.held
    if held is None:  # a token's slot is its position
        received[:, :sink] = torch.inf
        received[:, max(0, received.shape[1] - recent) :] = torch.inf
    elif sink or recent:
        received.masked_fill_((held.positions < sink) | held.newest(recent), torch.inf)
    slots = received.topk(min(top, received.shape[1]), 1, sorted=False).indices
    return slots if held is None else held.positions.gather(1, slots).long()


def attend_picked(
    group: RowGroup,
    queries: torch.Tensor,
    scaling: float,
    positions: torch.Tensor,
    watch: bool = False,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `attend_step`, over tokens that another layer picked, `positions [rows, top]`, and the newest one.

    With a codec, the exact tier is read whole, and of the packed tier what was picked.
    """
    newest = int(group.bounds.length) - 1
    stop = int(group.bounds.packed_stop)
    if not (watch or stop) and group.held is None:  # positions are slots
        picked = torch.nn.functional.pad(positions.masked_fill(positions == newest, -1), (0, 1), value=newest)
        fused = attend_picked_fused(group, queries, scaling, picked, sinks)
        if fused is not None:
            return fused, None
    slots = group.slots_of(positions)
    there = (slots >= 0) & (slots < stop if stop else slots != newest)
    if not watch:
        picked = slots.masked_fill(~there, -1)
        if not stop:
            picked = torch.nn.functional.pad(picked, (0, 1), value=newest)
        fused = attend_picked_fused(group, queries, scaling, picked, sinks)
        if fused is not None:
            return fused, None
    if stop:
        most = int(there.sum(1).max())
        # Those that count first, so that the others can be cut off.
        order = torch.sort(there.byte(), dim=1, descending=True, stable=True).indices[:, :most]
        slots, there = slots.gather(1, order).clamp_(0, stop - 1), there.gather(1, order)
    else:
        slots = torch.cat([slots.clamp_(min=0), slots.new_full((len(slots), 1), newest)], 1)
        there = torch.nn.functional.pad(there, (0, 1), value=True)
    keys, values = group.tokens(slots)
    scores = capped(torch.bmm(queries.float() * scaling, keys.float().transpose(1, 2)), group.layer.spec.cap)
    scores += torch.where(there, 0.0, MASKED)[:, None]
    lse = softmax_(scores)
    parts = [(torch.bmm(scores, values.float()), lse)]
    watched: Weights | None = [] if watch else None
    if stop:
        parts.append(attend_exact(group, queries, scaling, False, watched))
    out, total = merge(parts)
    out = with_sinks(out, total, sinks)
    if watched is None:
        return out.to(queries.dtype), None
    weights = scores.new_zeros((*scores.shape[:2], int(group.bounds.length)))
    # Slots that do not count are there twice at most, and then with a weight of 0.
    weights.scatter_add_(2, slots[:, None].expand_as(scores), scores * (lse - total).exp()[..., None])
    if watched:
        weights[:, :, stop:] = _whole([*watched, (scores[:, :, :0], lse)], total)
    return out.to(queries.dtype), with_sinks(weights, total, sinks)


def attend_exact(
    group: RowGroup, queries: torch.Tensor, scaling: float, alone: bool = False, watched: Weights | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) over the exact tier; the latter is empty if the tier is `alone`, nothing to merge with.

    The weights go to `watched`, in the order of the slots.
    """
    layer = group.layer
    bounds = group.bounds
    tokens = int(bounds.exact_tokens)
    bias = _bias_of(group, exact_bias, queries.device)
    blocks = group.exact_blocks()
    if queries.dtype is not torch.float32:
        # The fused call accumulates in float32 whatever it is given; a plain product would round the scores.
        parts = []
        for first, last, location in blocks:
            window = slice(first * PAGE, min(last * PAGE, tokens))
            if window.stop <= window.start:
                continue  # a page that waits for its first token
            keys, values = (group.read_exact(name, location)[:, : window.stop - window.start] for name in KV)
            seen = None if bias is None else bias[window].expand(queries.shape[1], -1)
            part = attend(queries[:, None], keys[:, None], values[:, None], scaling, seen, cap=layer.spec.cap)
            parts.append((part[0][:, 0], part[1][:, 0]))
            if watched is not None:
                logits = capped(torch.bmm(queries.float() * scaling, keys.float().transpose(1, 2)), layer.spec.cap)
                watched.append(((logits - parts[-1][1][..., None]).exp_(), parts[-1][1]))
        return merge(parts)
    whole = _exact_scores(group, queries * scaling)
    if alone:
        whole, lse = whole.softmax(-1), whole.new_empty(0)
    else:
        lse = softmax_(whole)
    if watched is not None:
        watched.append((whole, lse))
    return _exact_output(group, whole), lse


def _exact_scores(group: RowGroup, scaled: torch.Tensor) -> torch.Tensor:
    """Inner products of float32 queries with the exact tier's keys: `[rows, query_heads per kv head, tokens]`."""
    tokens, bias = int(group.bounds.exact_tokens), _bias_of(group, exact_bias, scaled.device)
    scores = [
        torch.bmm(scaled, group.read_exact("keys", location)[:, : tokens - first * PAGE].transpose(1, 2))
        for first, _, location in group.exact_blocks()
    ]
    whole = capped(scores[0] if len(scores) == 1 else torch.cat(scores, 2), group.layer.spec.cap)
    if bias is not None:
        whole += bias
    return whole


def _exact_output(group: RowGroup, weights: torch.Tensor) -> torch.Tensor:
    """The exact tier's values, weighted."""
    tokens, out = int(group.bounds.exact_tokens), None
    for first, _, location in group.exact_blocks():
        values = group.read_exact("values", location)[:, : tokens - first * PAGE]
        part = weights[:, :, first * PAGE : first * PAGE + values.shape[1]]
        out = torch.bmm(part, values) if out is None else out.baddbmm_(part, values)
    assert out is not None
    return out


def softmax_(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the last axis in place; returns the log-sum-exp."""
    top = scores.amax(-1, keepdim=True)
    total = scores.sub_(top).exp_().sum(-1, keepdim=True)
    scores.div_(total)
    return total.log_().add_(top)[..., 0]


def attend_packed(
    group: RowGroup, queries: torch.Tensor, scaling: float, watched: Weights | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(output, log-sum-exp) over the packed tier, page block by page block; the weights go to `watched`."""
    scaled = queries.float() * scaling
    merged = None
    for block in packed_blocks(group, queries):
        scores, filled, codec, fields = _packed_scores(group, scaled, block)
        lse = softmax_(scores)
        part = (codec.output(scores, fields), lse)
        if watched is not None:
            watched.append((scores[:, :, :filled], lse))
        merged = part if merged is None else merge([merged, part])
    assert merged is not None
    return merged


def packed_blocks(group: RowGroup, queries: torch.Tensor) -> list[Block]:
    """The packed tier in pieces; longer ones where compiled kernels make nothing of the size of keys."""
    assert group.layer.codec is not None
    at_once = 64 if group.layer.codec.compiled(queries.device) and takes_cpp(queries) else 1
    return group.packed_blocks(PACKED_BLOCK * at_once)


def _packed_scores(
    group: RowGroup, scaled: torch.Tensor, block: Block
) -> tuple[torch.Tensor, int, Codec, dict[str, torch.Tensor]]:
    """Inner products of float32 queries with a block's keys, `MASKED` where there are none, how many slots are filled,
    and by what codec and from what fields."""
    layer = group.layer
    assert layer.packing is not None
    bounds, page = group.bounds, layer.packing.page
    first, last, where = block
    fields, codec = group.read_packed(where), group.codec(first, last)
    scores = capped(codec.scores(scaled, fields), layer.spec.cap)
    bias = _bias_of(group, packed_bias, scaled.device)
    if bias is not None:
        scores += bias[first * page : last * page]
    filled = int(bounds.packed_tokens) - first * page
    if filled < scores.shape[2]:
        scores[:, :, filled:] = MASKED
    return scores, filled, codec, fields


def _bias_of(group: RowGroup, make: Make, device: torch.device) -> torch.Tensor | None:
    """The same for all layers of a step."""
    bounds = group.bounds
    if bounds.first_seen <= 0:
        return None
    made: torch.Tensor | None = group.layer.bank.memo.get((make, bounds), lambda: make(bounds, device))
    return made


def exact_bias(bounds: Bounds, device: torch.device) -> torch.Tensor | None:
    """0 where the newest token sees a slot of the exact tier, else `MASKED`: `[tokens]`; None is all 0."""
    if bounds.first_seen <= 0:
        return None
    positions = bounds.exact_positions(int(bounds.exact_pages))[: int(bounds.exact_tokens)]
    return _bias(torch.from_numpy(positions), bounds).to(device)


def packed_bias(bounds: Bounds, device: torch.device) -> torch.Tensor | None:
    """The same for the slots of the packed tier, those behind `packed_stop` included (they count as seen)."""
    if bounds.first_seen <= bounds.packed_base:
        return None
    return _bias(torch.arange(int(bounds.packed_base), int(bounds.length) + PAGE * 32), bounds).to(device)


def _bias(positions: torch.Tensor, bounds: Bounds) -> torch.Tensor:
    seen = (positions < bounds.sink) | (positions >= bounds.first_seen)
    seen |= (positions < bounds.late_sink) & (positions >= bounds.length - bounds.late_recent)
    return torch.where(seen, 0.0, MASKED)
