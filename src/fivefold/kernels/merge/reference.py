"""The merge of attention over disjoint token sets, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Part = tuple[torch.Tensor, torch.Tensor]
"""Output `[..., head_dim]` and log-sum-exp, float32 `[...]`."""


def merge_reference(parts: Sequence[Part]) -> Part:
    """The union of two parts or more: `sum(exp(lse_i - lse) out_i)`, float32, with `lse = log(sum(exp(lse_i)))`.

    Outputs may be of several dtypes, and need only be such that they can be broadcast to the shape of the first.
    """
    lses = torch.stack([lse for _, lse in parts])
    total = lses.logsumexp(0)
    weights = (lses - total).exp()
    out = parts[0][0].float() * weights[0][..., None]
    for (part, _), weight in zip(parts[1:], weights[1:]):
        out.addcmul_(part.float(), weight[..., None])
    return out, total
