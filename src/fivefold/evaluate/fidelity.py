"""Fidelity on real text: how far a compressed cache's next-token distributions are from the exact cache's."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from fivefold.evaluate.divergence import kl
from fivefold.evaluate.layers import Trace

BINS = 4
"""Equal parts of the continuation that figures are also given for: does the damage grow with distance?"""
CHUNK = 32
"""Tokens of the continuation that are fed at a time: what was fed before is compressed by then, as in decoding. Methods
that do something else in a step than in a chunk (they choose tokens, read some only, or correct the scores) are fed one
by one."""


@dataclass(frozen=True)
class Reference:
    """What a cache said: log-probabilities float32 `[tokens, vocabulary]`, its own greedy tokens, its layers."""

    logs: torch.Tensor
    free: list[int]
    layers: Trace


def continued(model: Any, cache: Any, continuation: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Log-probabilities of each next token of a continuation `[1, tokens]`, the cache holding what came before, fed
    `chunk` tokens at a time."""
    parts = [
        model(part, past_key_values=cache).logits[0].float().log_softmax(-1).cpu()
        for part in continuation.split(chunk, dim=1)
    ]
    return torch.cat(parts)


def run_free(model: Any, cache: Any, first: torch.Tensor, tokens: int) -> tuple[list[int], float]:
    """Greedy tokens after `first: [1, 1]`, and the median seconds of a step."""
    out, steps, token = [], [], first
    for _ in range(tokens):
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        out.append(int(token))  # waits for the device
        steps.append(time.perf_counter() - start)
    return out, sorted(steps)[len(steps) // 2]


def compare(reference: Reference, logs: torch.Tensor, free: list[int], continuation: torch.Tensor) -> dict[str, Any]:
    """Figures of one sample.

    kl: mean KL divergence from the exact distribution, nats. top1: share of positions with the same most likely token;
    top5: mean share of the exact five most likely tokens that are among the five. perplexity and exact_perplexity:
    of the continuation's own tokens. diverges: the first greedy token that differs when both run freely (their number
    if none does). bins: the same over equal parts of the continuation.
    """
    exact = reference.logs
    five, exact_five = logs.topk(5).indices, exact.topk(5).indices
    targets = continuation[0, 1:, None].cpu()
    figures = {
        "kl": kl(exact, logs),
        "top1": (exact.argmax(-1) == logs.argmax(-1)).float(),
        "top5": (five[:, :, None] == exact_five[:, None]).any(1).float().mean(-1),
        "perplexity": -logs[:-1].gather(1, targets)[:, 0],
        "exact_perplexity": -exact[:-1].gather(1, targets)[:, 0],
    }
    differs = (at for at, (one, two) in enumerate(zip(reference.free, free)) if one != two)
    return {
        **_means(figures),
        "diverges": next(differs, len(reference.free)),
        "bins": [
            _means(dict(zip(figures, parts))) for parts in zip(*(figure.chunk(BINS) for figure in figures.values()))
        ],
    }


def _means(figures: dict[str, torch.Tensor]) -> dict[str, float]:
    means = {name: float(figure.mean()) for name, figure in figures.items()}
    return {name: math.exp(mean) if "perplexity" in name else mean for name, mean in means.items()}
