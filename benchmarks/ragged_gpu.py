"""Whole decoding steps of sequences of different lengths against equal ones of the same sum, on a GPU.

    python benchmarks/ragged_gpu.py benchmarks/results/ragged_h100.json

A model of Llama-3-8B's shape with random weights in bfloat16, 32 sequences of 1k to 32k random tokens that go through
the packer as ever, steps as a CUDA graph. Both caches take a padding mask. Each is filled and timed twice, in turn; a
step is timed on the host clock around a synchronised call, so that work on the host counts.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fivefold
from fivefold.benchmark import decode, machine
from fivefold.store.layer_cache import LayerCache

SEQUENCES, SHORTEST, LONGEST = 32, 1024, 32768
STEPS, WARM_UP = 48, 8
PIECE = 2048


def lengths() -> list[int]:
    """From the shortest to the longest, each a constant factor longer than the one before, in mixed order."""
    factor = LONGEST / SHORTEST
    grown = [round(SHORTEST * factor ** (i / (SEQUENCES - 1))) for i in range(SEQUENCES)]
    order = torch.randperm(SEQUENCES, generator=torch.Generator().manual_seed(0)).tolist()
    return [grown[i] for i in order]


def fill(store: LayerCache, counts: np.ndarray) -> None:
    done = np.zeros_like(counts)
    while (done < counts).any():
        now = np.minimum(counts - done, PIECE)
        for group, count in store.split_by(now):
            if count:
                shape = (2, len(group.rows), count, store.spec.head_dim)
                store.append(group, *torch.randn(shape, device=store.spec.device, dtype=store.spec.dtype))
        done += now


def run(model: Any, recipe: str, counts: list[int]) -> tuple[float, float]:
    """Median and mean milliseconds of a step."""
    cache, top, device = fivefold.compress(model, recipe, cuda_graph=True), max(counts), model.device
    cache.session.put(len(counts), top, partial(fill, counts=np.array(counts)))
    mask = torch.zeros(len(counts), top + STEPS + WARM_UP, dtype=torch.long, device=device)
    for row, count in enumerate(counts):
        mask[row, top - count :] = 1
    positions = torch.tensor(counts, device=device)[:, None]
    token, times = torch.ones(len(counts), 1, dtype=torch.long, device=device), []
    with torch.inference_mode():
        for step in range(STEPS + WARM_UP):
            torch.cuda.synchronize()
            start = time.perf_counter()
            given = {"attention_mask": mask[:, : top + step + 1], "position_ids": positions}
            token = model(token, past_key_values=cache, **given).logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1e3)
            positions = positions + 1
    cache.free()
    gc.collect()
    torch.cuda.empty_cache()
    return statistics.median(times[WARM_UP:]), statistics.fmean(times[WARM_UP:])


def main() -> None:
    model = decode.build("llama-3-8b", torch.device("cuda"))
    config, ragged = model.config, lengths()
    equal = [round(sum(ragged) / SEQUENCES)] * SEQUENCES
    half = [
        [layer, head] for layer in range(config.num_hidden_layers) for head in range(config.num_key_value_heads // 2)
    ]
    recipes = {
        "kivi(bits=4)": "kivi(bits=4)", "duo half + kivi(bits=4)": f"duo(retrieval={half}) + kivi(bits=4)",
        "full()": "full()",
    }  # fmt: skip
    rows = []
    for name, recipe in recipes.items():
        found = [[run(model, recipe, counts) for counts in (ragged, equal)] for _ in range(2)]
        (one, one_mean), (other, other_mean) = (
            [statistics.fmean(pair[side][i] for pair in found) for i in (0, 1)] for side in (0, 1)
        )
        row = {"recipe": name, "graph": True, "ragged_ms": one, "equal_ms": other, "ratio": one / other}
        row |= {"ragged_mean": one_mean, "equal_mean": other_mean, "ratio_mean": one_mean / other_mean}
        rows.append(row)
        print({key: round(x, 3) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
    Path(sys.argv[1]).write_text(json.dumps({**machine.stamp(), "lengths": ragged, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
