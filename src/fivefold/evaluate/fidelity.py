"""Fidelity on real text: how far a compressed cache's next-token distributions are from the exact cache's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

BINS = 4
"""Equal parts of the continuation that figures are also given for: does the damage grow with distance?"""


@dataclass(frozen=True)
class Reference:
    """What the exact cache said: log-probabilities float32 `[tokens, vocabulary]` and its own greedy tokens."""

    logs: torch.Tensor
    free: list[int]


def continued(model: Any, cache: Any, continuation: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of each next token of a continuation `[1, tokens]`, the cache holding what came before."""
    logits = model(continuation, past_key_values=cache).logits[0]
    return logits.float().log_softmax(-1).cpu()


def run_free(model: Any, cache: Any, first: torch.Tensor, tokens: int) -> list[int]:
    """Greedy tokens after `first: [1, 1]`."""
    out, token = [], first
    for _ in range(tokens):
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(token))
    return out


def compare(reference: Reference, logs: torch.Tensor, free: list[int], continuation: torch.Tensor) -> dict[str, Any]:
    """Figures of one sample.

    kl: mean KL divergence from the exact distribution, nats. top1: share of positions with the same most likely token;
    top5: mean share of the exact five most likely tokens that are among the five. perplexity and exact_perplexity:
    of the continuation's own tokens. diverges: the first greedy token that differs when both run freely (their number
    if none does). bins: kl and top1 over equal parts of the continuation.
    """
    exact = reference.logs
    kl = (exact.exp() * (exact - logs)).sum(-1).clamp_min(0)
    same = (exact.argmax(-1) == logs.argmax(-1)).float()
    five, exact_five = logs.topk(5).indices, exact.topk(5).indices
    top5 = (five[:, :, None] == exact_five[:, None]).any(1).float().mean(-1)
    targets = continuation[0, 1:, None].cpu()
    differs = (i for i, (a, b) in enumerate(zip(reference.free, free)) if a != b)
    return {
        "kl": float(kl.mean()),
        "top1": float(same.mean()),
        "top5": float(top5.mean()),
        "perplexity": math.exp(-float(logs[:-1].gather(1, targets).mean())),
        "exact_perplexity": math.exp(-float(exact[:-1].gather(1, targets).mean())),
        "diverges": next(differs, len(reference.free)),
        "bins": [{"kl": float(k.mean()), "top1": float(s.mean())} for k, s in zip(kl.chunk(BINS), same.chunk(BINS))],
    }
