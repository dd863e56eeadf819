"""The attention that tokens receive from a chunk, block by block: what policies choose by.

A policy that wants to know it from every query gets it from the attention itself: a few queries at a time are
attended, and their weights handed to it before they are overwritten. One that only wants sums gets them from a kernel
where there is one, after the fused attention. No [query, key] tensor of a prompt ever exists.
"""

from __future__ import annotations

import torch

from fivefold.attention.merge import capped, with_sinks
from fivefold.attention.prefill import attend_chunk
from fivefold.kernels.received import HEAD_DIMS, has_kernel, received
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import ALL

# Weights that are made at a time: enough rows for an efficient product, few enough to stay near the processor.
BLOCK = 3 << 19


def why_weighed(layer: LayerCache) -> str | None:
    """Why the attention that a prompt's tokens get is plain PyTorch where kernels run, in a few words; None if it is
    not, or nobody wants to know it of all queries."""
    policy = layer.policy
    if policy is None or policy.first_counted(ALL) > 0 or not any(layer.head_chosen):
        return None
    if layer.spec.cap is not None:
        return "scores are capped"
    if layer.spec.head_dim not in HEAD_DIMS:
        return f"head_dim {layer.spec.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    return None if policy.sums else f"{policy.name} wants more of it than sums"


def attend_observed(
    group: RowGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attend_chunk` for rows whose tokens a policy chooses: the output, and what the chunk adds to the scores.

    The latter is float32 `[rows, slots]`, the chunk's own slots last; None if the policy wants to know nothing. sinks:
    float32 `[rows, query_heads per kv head, 1]`, see `with_sinks`.
    """
    layer = group.layer
    policy, chunk = layer.policy, keys.shape[1]
    assert policy is not None and group.held is not None
    first = policy.first_counted(chunk)
    if first == 0 and not (policy.sums and has_kernel(keys) and layer.spec.cap is None):
        out = torch.empty_like(queries)
        return out, _weigh(group, queries, keys, values, scaling, sinks, 0, out)
    part, lse = attend_chunk(group, queries, keys, values, scaling)
    out = with_sinks(part, lse, sinks)
    if first == chunk:
        return out, None
    if first == 0:
        total = lse if sinks is None else torch.logaddexp(lse, sinks)
        return out, received(queries, _all(group, 0, keys), total, scaling)
    return out, _weigh(group, queries, keys, values, scaling, sinks, first, None)


def _all(group: RowGroup, which: int, new: torch.Tensor) -> torch.Tensor:
    """The keys (0) or values (1) that are stored, and the chunk's: `[rows, slots, head_dim]`."""
    return torch.cat([group.dense_part(which), new], 1) if group.bounds.length else new


def _weigh(
    group: RowGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    sinks: torch.Tensor | None,
    first: int,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """What the policy makes of the attention of the queries from `first` on; their outputs go to `out`."""
    layer = group.layer
    policy, held = layer.policy, group.held
    assert policy is not None and held is not None
    rows, heads, chunk, dim = queries.shape
    stored = held.slots
    keys = _all(group, 0, keys)
    values = values if out is None else _all(group, 1, values)
    total = stored + chunk
    observed = keys.new_zeros((rows, total), dtype=torch.float32)
    step = min(chunk - first, max(8, BLOCK // (heads * total)))
    buffers = torch.empty((2, heads * step * total), device=keys.device)
    later = torch.full((step, step), float("-inf"), device=keys.device).triu_(1)
    for row in range(rows):
        mine = held.rows_at(torch.tensor([row], device=keys.device), held.places[row : row + 1])
        row_keys, row_values = keys[row].float(), None if out is None else values[row].float()
        for begin in range(first, chunk, step):
            end = min(begin + step, chunk)
            size, seen = end - begin, stored + end
            shape = (heads * size, seen)
            scores, weights = (b[: heads * size * seen].view(shape) for b in buffers)
            block = queries[row, :, begin:end].float() * scaling
            capped(torch.mm(block.reshape(-1, dim), row_keys[:seen].T, out=scores), layer.spec.cap)
            scores.view(heads, size, seen)[..., stored + begin :].add_(later[:size, :size])
            torch.softmax(scores, -1, out=weights)
            if sinks is not None:
                weights.copy_(with_sinks(weights, scores.logsumexp(-1), sinks[row].expand(-1, size).reshape(-1)))
            if out is not None and row_values is not None:
                out[row, :, begin:end] = torch.mm(weights, row_values[:seen]).view(heads, size, dim)
            observed[row, :seen] += policy.observe(weights.view(1, heads, size, seen), mine, held.seen + begin)[0]
    return observed
