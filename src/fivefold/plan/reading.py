"""What `fivefold plan --measure` measures of prompts: their attention, the host's part in a chunk, and whole ones."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fivefold.attention.merge import attend
from fivefold.benchmark import decode, kernels, prefill
from fivefold.benchmark.machine import clocked, random, tidy
from fivefold.plan.sizes import DIMS, EXTENTS, Sizes, sizes_for

READ = ("full()", "kivi(bits=4)", "duo(keep=0.5) + kivi(bits=4)")
CHUNKS = 4
"""Of a prompt, in the measurement of what the host takes for a chunk."""
TURNS, LEAST = 9, 0.5
"""A prompt is read at most so often, or until so many seconds are over. The least of them counts, as of all that the
host has a part in: machines share theirs with others, which makes some turns twice as long as others."""
ROUNDS = 6


@torch.inference_mode()
def prompts(device: torch.device, sizes: Sizes | None = None) -> dict[str, Any]:
    """Operations a second of a prompt's attention over itself, and of a chunk's over what is stored, by head_dim: each
    the mean of some sizes, since a prompt has them all."""
    sizes = sizes or sizes_for(device)
    rows: list[dict[str, Any]] = []
    found: dict[str, list[float]] = {}

    def add(kind: str, call: Callable[[], Any], chunk: int, tokens: int, operations: float) -> None:
        seconds = _settled(device, call)
        rows.append({"kind": kind, "chunk": chunk, "tokens": tokens, "seconds": seconds, "rate": operations / seconds})
        found.setdefault(kind, []).append(operations / seconds)

    for dim in DIMS:
        for extent, lengths in zip(EXTENTS, sizes.prompt):
            for tokens in lengths:
                queries = random(device, kernels.KV_HEADS, kernels.GROUP, tokens, dim)
                pair = (random(device, kernels.KV_HEADS, 1, tokens, dim) for _ in range(2))
                keys, values = (x.expand(-1, kernels.GROUP, -1, -1) for x in pair)
                call = partial(attend, queries, keys, values, dim**-0.5, causal=True)
                add(f"causal {extent} {dim}", call, tokens, tokens, 4 * queries.numel() * tokens / 2)
        for extent, pairs in zip(EXTENTS, sizes.past):
            for chunk, tokens in pairs:
                queries = random(device, kernels.KV_HEADS, 1, kernels.GROUP * chunk, dim)
                keys, values = (random(device, kernels.KV_HEADS, 1, tokens, dim) for _ in range(2))
                call = partial(attend, queries, keys, values, dim**-0.5)
                add(f"past {extent} {dim}", call, chunk, tokens, 4 * queries.numel() * tokens)
        tidy(device)
    return {"rates": {kind: statistics.harmonic_mean(rates) for kind, rates in found.items()}, "rows": rows}


def _settled(device: torch.device, call: Callable[[], Any], least: float = 0.3) -> float:
    """Seconds of a call among many of its kind, as in a prompt: the host is ahead, and the clock is where power leaves
    it."""
    call()  # cuDNN plans
    once = clocked(device, call)
    count = min(500, max(1, round((least if device.type == "cuda" else 0.0) / once)))

    def many() -> None:
        for _ in range(count):
            call()

    return min(clocked(device, many) for _ in range(2)) / count


def launches(device: torch.device, sizes: Sizes | None = None, own: bool = False) -> dict[str, Any]:
    """Seconds of prompts of a model so narrow that the device waits for the host, by kind: rows of layers, chunks, and
    the times of some turns, each of which has all of them. own: by the model's own code."""
    sizes = sizes or sizes_for(device)
    counts = sizes.layers[1], 3 * sizes.layers[1]
    models = {layers: decode.build({**sizes.narrow, "num_hidden_layers": layers}, device) for layers in counts}
    found: dict[str, list[dict[str, Any]]] = {
        kind: [{"layers": layers, "chunks": chunks, "seconds": []} for layers in counts for chunks in (1, CHUNKS)]
        for kind in ("exact", "packed", "split")
    }
    for _ in range(ROUNDS):
        for rows, recipe in zip(found.values(), READ):
            for row in rows:
                ids = torch.randint(1024, (1, sizes.narrow_chunk * row["chunks"]), device=device)
                one = prefill.read(models[row["layers"]], recipe, ids, sizes.narrow_chunk, own)
                row["seconds"].append(one["seconds"])
    return found


def host_chunk(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[list[float]]]:
    """`Machine.host_chunk` of the rows of `launches`."""
    out: dict[str, list[list[float]]] = {}
    for kind, rows in found.items():
        times = {(row["layers"], row["chunks"]): min(row["seconds"]) for row in rows}
        counts = sorted({layers for layers, _ in times})
        first = [times[layers, 1] for layers in counts]
        later = [(times[layers, CHUNKS] - one) / (CHUNKS - 1) for layers, one in zip(counts, first)]
        for few, many in (first, later):
            each = max(0.0, many - few) / (counts[1] - counts[0])
            out.setdefault(kind, []).append([max(0.0, few - counts[0] * each), each])
    return out


def reading(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Prompts of a model of two numbers of layers, at once and in chunks."""
    rows = []
    for layers in sizes.layers:
        shape = {**sizes.step, "num_hidden_layers": layers}
        model = decode.build(shape, device)
        for context, chunk in sizes.read:
            for recipe, own in [*((recipe, False) for recipe in READ), ("full()", True)]:
                rows.append(timed_prompt(model, shape, recipe, context, chunk, 2, own))
                tidy(device)
        del model
        tidy(device)
    return {"rows": rows}


def timed_prompt(
    model: Any, shape: Mapping[str, Any], recipe: str, context: int, chunk: int | None, turns: int, own: bool = False
) -> dict[str, Any]:
    """A prompt that is read `turns` times, a short one more often, and once before: the first time plans what there is
    to plan for its shapes. own: by the model's own code."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, context), generator=generator).to(model.device)
    read = partial(prefill.read, model, recipe, ids, chunk, own)
    first, found = read(), [read() for _ in range(turns)]
    while len(found) < TURNS and sum(one["seconds"] for one in found) < LEAST:
        found.append(read())
    times = [one["seconds"] for one in found]
    row = {"shape": dict(shape), "recipe": recipe, "context": context, "chunk": chunk, "own_code": own, **found[-1]}
    return {**row, "first_seconds": first["seconds"], "turns": times, "seconds": min(times)}
