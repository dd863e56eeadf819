"""Column sums of a causal attention matrix from its log-sum-exps, in plain PyTorch."""

from __future__ import annotations

import torch


def received_reference(queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scaling: float) -> torch.Tensor:
    """How much attention each key receives: the sum over queries of `exp(q k scaling - lse)`, float32 `[rows, keys]`.

    queries: `[rows, heads, chunk, head_dim]`; keys: `[rows, stored + chunk, head_dim]`, of which a query sees those up
    to its own; lse: float32 `[rows, heads, chunk]`, of the scores that each query sees.
    """
    chunk, total = queries.shape[2], keys.shape[1]
    scores = (queries.float() * scaling) @ keys.float()[:, None].transpose(-1, -2)
    unseen = torch.ones((chunk, total), dtype=torch.bool, device=keys.device).triu_(total - chunk + 1)
    return (scores - lse[..., None]).exp().masked_fill(unseen, 0).sum((1, 2))
