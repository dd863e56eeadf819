"""Decoding steps of sequences of different lengths against steps of equal ones of the same sum.

    python benchmarks/ragged.py --json benchmarks/results/ragged_cpu.json
    python benchmarks/ragged.py --device cuda --json benchmarks/results/ragged_h100.json

On a CPU a small model and 16 sequences of 100 to 2,000 tokens; on a GPU one of Llama-3-8B's shape in bfloat16 and 32
sequences of 1k to 32k tokens, steps as a CUDA graph. Weights and tokens are random, and go through the packer as ever;
both caches take a padding mask. Each is filled and timed several times, in turn, so that a change in the machine's
speed meets both alike. A step is timed on the host clock around a synchronised call, so that work on the host counts.
At a ratio of 1.0 raggedness costs nothing.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import fivefold
from fivefold.benchmark import decode, machine
from fivefold.store.layer_cache import LayerCache

DEFAULTS = {"cpu": ("small", 16, 100, 2000), "cuda": ("llama-3-8b", 32, 1024, 32768)}
WARM_UP = 8
PIECE = 2048


def spread(count: int, low: int, high: int) -> list[int]:
    """Lengths from low to high, each a constant factor longer than the one before, in mixed order."""
    lengths = [round(low * (high / low) ** (i / (count - 1))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [lengths[i] for i in order]


def fill(store: LayerCache, counts: np.ndarray) -> None:
    """Random tokens, so many for each sequence."""
    done = np.zeros_like(counts)
    while (done < counts).any():
        now = np.minimum(counts - done, PIECE)
        for group, count in store.split_by(now):
            if count:
                shape = (2, len(group.rows), count, store.spec.head_dim)
                store.append(group, *torch.randn(shape, device=store.spec.device, dtype=store.spec.dtype))
        done += now


def run(model: Any, recipe: str, counts: list[int], steps: int) -> dict[str, Any]:
    """Median and mean milliseconds of a step, bytes of the cache, and which way its steps went."""
    device, top = model.device, max(counts)
    cache = fivefold.compress(model, recipe, cuda_graph=device.type == "cuda")
    cache.session.put(len(counts), top, partial(fill, counts=np.array(counts)))
    mask = torch.arange(top + steps + WARM_UP, device=device) >= top - torch.tensor(counts, device=device)[:, None]
    positions = torch.tensor(counts, device=device)[:, None]
    token, times = torch.ones(len(counts), 1, dtype=torch.long, device=device), []
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for step in range(steps + WARM_UP):
        wait()
        start = time.perf_counter()
        given = {"attention_mask": mask[:, : top + step + 1].long(), "position_ids": positions + step}
        token = model(token, past_key_values=cache, **given).logits[:, -1:].argmax(-1)
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    times = times[WARM_UP:]
    found = {"ms": statistics.median(times), "mean": statistics.fmean(times), "bytes": cache.report().total}
    found["decoding"] = cache.decoding
    cache.free()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def compare(model: Any, name: str, recipe: str, sides: list[list[int]], steps: int, rounds: int) -> dict[str, Any]:
    """The mean of the rounds."""
    found = [[run(model, recipe, counts, steps) for counts in sides] for _ in range(rounds)]
    row: dict[str, Any] = {"recipe": name, "graph": "as a CUDA graph" in found[0][0]["decoding"]}
    for kind in ("ms", "mean", "bytes"):
        ragged, equal = (statistics.fmean(pair[side][kind] for pair in found) for side in (0, 1))
        row |= {f"ragged_{kind}": ragged, f"equal_{kind}": equal}
        if kind != "bytes":
            row["ratio" if kind == "ms" else "ratio_mean"] = ragged / equal
    return row | {"decoding": found[0][0]["decoding"]}


def main(
    device: str = "cpu",
    shape: Annotated[str | None, typer.Option(help="of fivefold.benchmark.decode.SHAPES")] = None,
    batch: int | None = None,
    low: int | None = None,
    high: int | None = None,
    steps: int = 48,
    rounds: int = 2,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    where = torch.device(device)
    shape, batch, low, high = (
        given or value for given, value in zip((shape, batch, low, high), DEFAULTS[where.type], strict=True)
    )
    torch.manual_seed(0)
    model, ragged = decode.build(shape, where), spread(batch, low, high)
    sides, config = [ragged, [round(sum(ragged) / batch)] * batch], model.config
    half = [
        [layer, head] for layer in range(config.num_hidden_layers) for head in range(config.num_key_value_heads // 2)
    ]
    duo = f"duo(retrieval={half}) + kivi(bits=4)"
    rows = []
    with torch.inference_mode():
        for name in ("kivi(bits=4)", "duo half + kivi(bits=4)", "full()"):
            rows.append(compare(model, name, duo if "duo" in name else name, sides, steps, rounds))
            print({key: round(x, 3) if isinstance(x, float) else x for key, x in rows[-1].items()}, flush=True)
    if json_file is not None:
        head = {**machine.stamp(), "device": device, "shape": shape, "lengths": ragged, "steps": steps}
        json_file.write_text(json.dumps({**head, "runs": [rows]}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
