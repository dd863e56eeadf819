"""What `triton.py` does, in plain PyTorch, with the same arguments. Pages are given as tensors instead of addresses:
keys and values `[rows, slots, head_dim]` of exact slots."""

from __future__ import annotations

import math

import torch

from fivefold.kernels.watched import PRIME, Noise, draws

Pair = tuple[torch.Tensor, torch.Tensor]


def rank(
    scores: torch.Tensor,
    lse: torch.Tensor,
    packed: torch.Tensor | None,
    spans: torch.Tensor,
    width: int,
    sink: int = 0,
    recent: int = 0,
) -> torch.Tensor:
    out = torch.full((len(scores), width), -1.0)
    for row, (high, stop) in enumerate(_ends(spans)):
        got = _received(scores[row], lse[row], stop)
        if packed is not None:
            got = torch.cat([packed[row, :high], got])
        got[:sink] = torch.inf
        got[max(0, len(got) - recent) :] = torch.inf
        out[row, : len(got)] = got
    return out


def picks(values: torch.Tensor, indices: torch.Tensor, spans: torch.Tensor, top: int) -> torch.Tensor:
    newest = (spans[:, 1] + spans[:, 4] - 1).long()[:, None]
    out = torch.full((len(values), top + 1), -1, dtype=torch.int32)
    out[:, : values.shape[1]] = torch.where((values >= 0) & (indices != newest), indices, -1)
    out[:, top] = newest[:, 0]
    return out


def tally(
    scores: torch.Tensor | None,
    lse: torch.Tensor | None,
    given: torch.Tensor | None,
    noise: Noise | None,
    by: str | int,
    layer: int,
    kv_heads: int,
    old: torch.Tensor,
    positions: torch.Tensor,
    low: torch.Tensor,
    numbers: torch.Tensor,
    spans: torch.Tensor,
    new: torch.Tensor,
    goes: torch.Tensor,
    stash: torch.Tensor,
    exact: Pair,
) -> None:
    for row, (high, stop) in enumerate(_ends(spans)):
        kind, newest, recent, made = numbers[row].tolist()
        total = high + stop
        for side, x in enumerate(exact):
            stash[row, side] = x[row, stop - 1]
        if kind == 0:
            goes[row] = -1
            continue
        now = torch.cat([old[row, : total - 1], old.new_zeros(1)])
        where = torch.cat([positions[row, : total - 1], positions.new_tensor([newest])])
        if scores is not None and lse is not None and noise is not None:
            now += _noised(
                scores[row, :, :total] - lse[row, :, None], noise, where, newest, made, row % kv_heads, layer
            )
        elif scores is not None and lse is not None:
            now[high:] += _received(scores[row], lse[row], stop)
            if given is not None and given.ndim == 3:  # scores of packed slots, to the base 2
                weights = (given[row] * math.log(2) - lse[row][:, None]).exp().sum(0)
                first = int(spans[row, 0])
                now[first:high] += weights[first:high]
            elif given is not None:
                now[:high] += given[row, :high]
        new[row, :total] = now
        order = where.float() if by == "oldest" else now
        if isinstance(by, int):
            order = draws(where.long(), layer * kv_heads + row % kv_heads, by)
        stays = (where <= low[row]) | (where > newest - recent)
        goes[row] = order.masked_fill(stays, torch.inf).argmin() if kind == 2 else total - 1


def absorb(
    goes: torch.Tensor,
    numbers: torch.Tensor,
    spans: torch.Tensor,
    exact: Pair,
    threshold: torch.Tensor,
    alpha: float,
    beta: float,
    new_threshold: torch.Tensor,
    stash: torch.Tensor,
    into: torch.Tensor,
    merged: torch.Tensor,
) -> None:
    new_threshold.copy_(threshold)
    into.fill_(-1)
    for row, (_, stop) in enumerate(_ends(spans)):
        if int(numbers[row, 0]) != 2:
            continue
        gone, keys = int(goes[row]), exact[0][row, :stop].float()
        like = torch.nn.functional.cosine_similarity(keys, keys[gone : gone + 1], eps=1e-12)
        like[gone] = -torch.inf
        slot = int(like.argmax())
        u, before = like[slot], threshold[row]
        new_threshold[row] = u if before.isnan() else alpha * before + beta * u
        joins = bool(u >= new_threshold[row])
        for side, x in enumerate(exact):
            stays = x[row, slot].float()
            merged[row, side] = ((stays + u * x[row, gone].float()) / 2 if joins else stays).to(x.dtype)
            if slot == stop - 1:
                stash[row, side] = merged[row, side]
        if joins and slot != stop - 1:
            into[row] = slot


def beside(
    queries: torch.Tensor,
    scaling: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    logs: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    score = (queries.float() * keys[:, None]).sum(-1) * scaling + logs[:, None]
    total = torch.logaddexp(lse, score)
    own, other = (lse - total).exp()[..., None], (score - total).exp()[..., None]
    out.copy_(out.float() * own + values[:, None] * other)
    lse.copy_(total)


def _ends(spans: torch.Tensor) -> list[tuple[int, int]]:
    """How many packed and exact slots each row has."""
    return [(row[1], row[4]) for row in spans.tolist()]


def _received(scores: torch.Tensor, lse: torch.Tensor, stop: int) -> torch.Tensor:
    return (scores[:, :stop] - lse[:, None]).exp().sum(0)


def _noised(
    logs: torch.Tensor, noise: Noise, positions: torch.Tensor, newest: int, generated: int, kv_head: int, layer: int
) -> torch.Tensor:
    """What `[query_heads, slots]` logarithms of weights add to the statistic."""
    heads = torch.arange(len(logs))
    start = (((newest * PRIME + heads) * PRIME + kv_head) * PRIME + layer) * PRIME + noise.seed
    at = (start % len(noise.table))[:, None] + positions
    tau = noise.first + (noise.last - noise.first) * min(1.0, max(0, generated) / noise.steps)
    weights = (logs.exp() * noise.table[at % len(noise.table)]) ** (1 / tau)
    return (weights / weights.sum(1, keepdim=True)).sum(0)
