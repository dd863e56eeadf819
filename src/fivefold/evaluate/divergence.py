"""How far what a model says is from what it says exactly."""

from __future__ import annotations

import torch


def kl(exact: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """KL divergence `sum_v p(v) (log p(v) - log q(v))` of log-probabilities `logs = log q` from the exact ones,
    `exact = log p`, both `[..., vocabulary]`: nats `[...]`, at least 0."""
    return (exact.exp() * (exact - logs)).sum(-1).clamp_min(0)
