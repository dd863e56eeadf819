"""Whole decoding steps as CUDA graphs beside what their bytes allow, on a GPU.

    python benchmarks/steps_gpu.py benchmarks/results/steps_h100.json

A model of Llama-3-8B's shape with random weights in bfloat16, caches of random tokens that go through the packer as
ever. `ms` is the median of steps on the host clock around a synchronised call, `graph_ms` that of replays alone by
events. `floor_ms` is what reading every weight and every page once takes at the rate of a copy that is measured here.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from fivefold.benchmark import capacity, decode, machine
from fivefold.recipe import Recipe

CASES = [(name, tokens) for name in ("kivi(bits=2)", "kivi(bits=4)", "full()") for tokens in (4096, 32768, 131072)]
"""(recipe, tokens) of one sequence."""
LARGEST = ("kivi(bits=2)", 32768)
"""The same of as many as fit."""
STEPS = 40


def weight_bytes(model: Any) -> int:
    """What a step reads: all but the embedding, of which it reads a row."""
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    return sum(x.nbytes for x in model.parameters()) - (0 if tied else embedding.nbytes)


def replays_ms(cache: Any, repeats: int = 20) -> float:
    """Median of replays of a cache's graph: every one takes the same step again."""
    (captured,) = cache.step.captured.values()
    times = []
    for _ in range(repeats):
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record()
        captured.graph.replay()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return statistics.median(times)


def case(model: Any, recipe: str, context: int) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    row: dict[str, Any] = {"recipe": recipe, "context": context, "batch": 1}
    with torch.inference_mode():
        cache = decode.filled(model, recipe, context, 1, True)
        token = torch.ones(1, 1, dtype=torch.long, device=model.device)
        for _ in range(2):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        row["graph_ms"] = replays_ms(cache)
        report = cache.report()
        held = report.exact + report.codes + report.scales + report.other
        row.update({k: x for k, x in decode.timed(model, cache, 1, STEPS).items() if k != "peak_bytes"})
    row["page_bytes"] = held
    return row


def beside_floor(row: dict[str, Any], weights: int, rate: float) -> dict[str, Any]:
    floor = (weights + row["batch"] * row["page_bytes"]) / rate * 1000
    return {**row, "floor_ms": floor, "of_floor": row["ms"] / floor}


def main() -> None:
    device = torch.device("cuda")
    model = decode.build("llama-3-8b", device)
    weights, rows = weight_bytes(model), []
    most = capacity.largest_batch(model, Recipe.parse(LARGEST[0]), LARGEST[1], STEPS)
    gc.collect()
    rate = machine.copy_rate(device)
    out = {**machine.stamp(), "shape": "llama-3-8b", "copy_bytes_s": rate, "weight_bytes": weights, "rows": rows}
    for recipe, context in CASES:
        found = [case(model, recipe, context)]
        if (recipe, context) == LARGEST:
            found.append({"recipe": recipe, "page_bytes": found[0]["page_bytes"], **most})
        for row in found:
            rows.append(beside_floor(row, weights, rate))
            print({k: round(x, 3) if isinstance(x, float) else x for k, x in rows[-1].items()}, flush=True)
        Path(sys.argv[1]).write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
