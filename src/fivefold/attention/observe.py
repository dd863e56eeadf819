"""The attention that tokens receive from a chunk, block by block: what policies choose by.

The chunk has been attended already, so each query's log-sum-exp is known and its weights are `exp(score - lse)`.
They are made for a few queries at a time and handed to the policy: no [query, key] tensor of a prompt ever exists.
"""

from __future__ import annotations

import torch

from fivefold.store.layer_cache import Cohort, LayerCache

# Weights that are made at a time: they stay in the processor's cache while the policy reads them.
BLOCK = 1 << 20


def observe_chunk(
    layer: LayerCache,
    cohort: Cohort,
    queries: torch.Tensor,
    keys: torch.Tensor,
    lse: torch.Tensor,
    scaling: float,
) -> torch.Tensor | None:
    """What a chunk that is not yet stored adds to the policy's scores.

    queries: `[rows, query_heads per kv head, tokens, head_dim]`; keys: `[rows, tokens, head_dim]`; lse: float32
    `[rows, query_heads per kv head, tokens]`. Returns float32 `[rows, slots]`, the chunk's own slots last; None if the
    policy wants to know nothing.
    """
    policy, held = layer.policy, cohort.held
    assert policy is not None and held is not None
    rows, group, chunk, dim = queries.shape
    first = 0 if policy.observes is None else max(0, chunk - policy.observes)
    if first == chunk or not policy.evicts:
        return None
    stored = held.slots
    total = stored + chunk
    # One more channel takes the log-sum-exp off within the product.
    wide = keys.new_ones((rows, total, dim + 1), dtype=torch.float32)
    wide[:, stored:, :dim] = keys
    if stored:
        wide[:, :stored, :dim] = layer.dense_part(cohort, 0)
    out = keys.new_zeros((rows, total), dtype=torch.float32)
    step = max(8, BLOCK // (group * total))
    for row in range(rows):
        mine = held.pick(torch.tensor([row], device=keys.device), held.places[row : row + 1])
        for begin in range(first, chunk, step):
            end = min(begin + step, chunk)
            seen = stored + end
            block = torch.cat([queries[row, :, begin:end].float() * scaling, -lse[row, :, begin:end, None].float()], -1)
            scores = block.flatten(0, 1) @ wide[row, :seen].T
            scores = scores.view(1, group, end - begin, seen)
            later = torch.full((end - begin, end - begin), float("-inf"), device=keys.device).triu_(1)
            scores[..., stored + begin :] += later
            out[row, :seen] += policy.observe(scores.exp_(), mine, held.seen + begin)[0]
    return out
