"""Fidelity on real text: how far a compressed cache's next-token distributions are from the exact cache's."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from fivefold.evaluate.divergence import kl
from fivefold.evaluate.layers import Trace, watched
from fivefold.evaluate.together import eager, rows_of, twin

TIMED = 8
"""Steps of one sequence that are timed, where many are measured together."""
BINS = 4
"""Equal parts of the continuation that figures are also given for: does the damage grow with distance?"""
CHUNK = 32
"""Tokens of the continuation that are fed at a time: what was fed before is compressed by then, as in decoding. Methods
that do something else in a step than in a chunk (they choose tokens, read some only, or correct the scores) are fed one
by one."""


@dataclass(frozen=True)
class Said:
    """What a cache said of a text: log-probabilities float32 `[tokens, vocabulary]`, its own greedy tokens, its layers
    at the first `CHUNK` of the tokens, and the milliseconds of a step of one sequence."""

    logs: torch.Tensor
    free: list[int]
    layers: Trace
    step_ms: float


def said(model: Any, cache: Any, continuation: torch.Tensor, chunk: int, free: int) -> list[Said]:
    """Feed a continuation `[sequences, tokens]`, `chunk` tokens at a time, and, from its first token, let each sequence
    go on by itself for `free` tokens. Uses the cache up."""
    batch, first = continuation.shape[0], continuation[:, :1]
    alone = None if batch == 1 else eager(rows_of(cache, [0], batch))
    written, step = run_free(model, twin(cache), first, free)
    if alone is not None:
        step = run_free(model, alone, first[:1], TIMED)[1]
    logs, seen = _read(model, cache, continuation, chunk)
    return [Said(logs[row], written[row], seen.of(row), step * 1e3) for row in range(batch)]


def _read(model: Any, cache: Any, continuation: torch.Tensor, chunk: int) -> tuple[torch.Tensor, Trace]:
    """Log-probabilities of each next token, float32 `[sequences, tokens, vocabulary]`, and what the layers do with the
    first `CHUNK` tokens. A graph calls no hooks, so that it waits until these are done."""
    batch, tokens = continuation.shape
    step, logs, traces = getattr(cache, "step", None), None, []
    eager(cache)
    for start in range(0, tokens, chunk):
        part = continuation[:, start : start + chunk]
        if start < CHUNK:
            with watched(model) as seen:
                logits = model(part, past_key_values=cache).logits
            traces.append(seen)
        else:
            if step is not None:
                cache.step, step = step, None
            logits = model(part, past_key_values=cache).logits
        if logs is None:
            logs = logits.new_empty(batch, tokens, logits.shape[-1], dtype=torch.float32)
        logs[:, start : start + chunk] = logits.float().log_softmax(-1)
    assert logs is not None
    return logs, Trace.joined(traces)


def continued(model: Any, cache: Any, continuation: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    """Log-probabilities `[tokens, vocabulary]` of each next token of a continuation `[1, tokens]`, the cache holding
    what came before, fed `chunk` tokens at a time. On the CPU."""
    parts = [
        model(part, past_key_values=cache).logits[0].float().log_softmax(-1).cpu()
        for part in continuation.split(chunk, dim=1)
    ]
    return torch.cat(parts)


def run_free(model: Any, cache: Any, first: torch.Tensor, tokens: int) -> tuple[list[list[int]], float]:
    """Greedy tokens of each sequence after `first: [sequences, 1]`, and the median seconds of a step."""
    out, steps, token = [], [], first
    for _ in range(tokens):
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        out.append(token[:, 0].tolist())  # waits for the device
        steps.append(time.perf_counter() - start)
    return [list(one) for one in zip(*out)], sorted(steps)[len(steps) // 2]


def compare(reference: Said, given: Said, continuation: torch.Tensor) -> dict[str, Any]:
    """Figures of one sample, whose continuation is `[tokens]`.

    kl: mean KL divergence from the exact distribution, nats. top1: share of positions with the same most likely token;
    top5: mean share of the exact five most likely tokens that are among the five. perplexity and exact_perplexity:
    of the continuation's own tokens. diverges: the first greedy token that differs when both run freely (their number
    if none does). bins: the same over equal parts of the continuation.
    """
    exact, logs, free = reference.logs, given.logs, given.free
    five, exact_five = logs.topk(5).indices, exact.topk(5).indices
    targets = continuation[1:, None].to(logs.device)
    figures = {
        "kl": kl(exact, logs),
        "top1": (exact.argmax(-1) == logs.argmax(-1)).float(),
        "top5": (five[:, :, None] == exact_five[:, None]).any(1).float().mean(-1),
        "perplexity": -logs[:-1].gather(1, targets)[:, 0],
        "exact_perplexity": -exact[:-1].gather(1, targets)[:, 0],
    }
    figures = {name: figure.cpu() for name, figure in figures.items()}
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
