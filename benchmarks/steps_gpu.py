"""Whole decoding steps as CUDA graphs beside what their bytes allow, on a GPU: every method's.

    python benchmarks/steps_gpu.py benchmarks/results/steps_h100.json
    python benchmarks/steps_gpu.py out.json --recipe "h2o()" --context 131072

A model of Llama-3-8B's shape with random weights in bfloat16, caches of random tokens that go through the packer as
ever (GEAR's factors are what its power iteration begins with: as large, and as fast to read). `ms` is the median of
steps on the host clock around a synchronised call, `graph_ms` that of replays alone by events. `floor_ms` is what
reading every weight and every page once takes at the rate of a copy that is measured here. `path` says which code runs.
Last, of the recipe and the context of `LARGEST`, the largest batch that fits.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from codecs_gpu import first_columns
from fivefold.benchmark import capacity, decode, machine
from fivefold.methods.bits import gear
from fivefold.recipe import Recipe

CONTEXTS = 131072, 32768, 4096
HALF = list(range(16, 32))  # the upper half, where such modules lie
RECIPES = (
    "full()", "kivi(bits=2)", "kivi(bits=4)", "kivi(bits=8)", "rotatekv()", "rotatekv(bits=4)", "cskv()",
    "cskv(bits=4)", "kv_heads(group=2)", "kv_heads()", "minicache()", "minicache() + kivi(bits=4)", "gear()", "mikv()",
    "tidal()", "anchors(anchors=[0, 2, 4, 8, 12, 16, 20, 24, 28])", "tidal() + kivi(bits=4)", "h2o()",
    "h2o() + kivi(bits=4)", "d2o()", "keyformer()", "elastic()", "snapkv()", "random()", "streaming()",
    "duo(keep=0.25)", "duo(keep=0.25) + kivi(bits=2)", f"drop(layers={HALF})",
)  # fmt: skip
LARGEST = ("kivi(bits=2)", 32768)
"""(recipe, tokens) of as many sequences as fit."""
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
        with cache.session.atomic():
            cache.session.choose_together()
        cache.reserve(context + STEPS + 64)
        token = torch.ones(1, 1, dtype=torch.long, device=model.device)
        for _ in range(2):
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        if cache.step.captured:
            row["graph_ms"] = replays_ms(cache)
        report = cache.report()
        held = report.exact + report.codes + report.scales + report.other
        row.update({k: x for k, x in decode.timed(model, cache, 1, STEPS).items() if k != "peak_bytes"})
    row |= {"page_bytes": held, "path": cache.decoding}
    cache.free()
    return row


def beside_floor(row: dict[str, Any], weights: int, rate: float) -> dict[str, Any]:
    floor = (weights + row["batch"] * row["page_bytes"]) / rate * 1000
    return {**row, "floor_ms": floor, "of_floor": row["ms"] / floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", action="append", help="may be repeated; every method if not given")
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--no-largest", action="store_true", help="leave the largest batch out")
    given = parser.parse_args()
    gear.low_rank = first_columns
    warnings.simplefilter("ignore")
    device = torch.device("cuda")
    model = decode.build("llama-3-8b", device)
    weights, rate = weight_bytes(model), machine.copy_rate(device)
    rows: list[dict[str, Any]] = []
    out = {**machine.stamp(), "shape": "llama-3-8b", "copy_bytes_s": rate, "weight_bytes": weights, "rows": rows}
    full: dict[int, float] = {}

    def add(row: dict[str, Any], begin: float) -> None:
        if "ms" in row:
            row = beside_floor(row, weights, rate)
            if row["recipe"] == "full()":
                full[row["context"]] = row["ms"]
            if row["batch"] == 1 and row["context"] in full:
                row["faster"] = full[row["context"]] / row["ms"]
        rows.append(row)
        numbers = " ".join(f"{row[n]:.3f}" if n in row else "-" for n in ("ms", "graph_ms", "faster", "of_floor"))
        text = (row.get("error") or row.get("path", ""))[:110]
        name = f"{row['recipe'][:34]:34} {row['context']:>7} x{row['batch']}"
        print(f"{name} {numbers} {text} ({time.perf_counter() - begin:.0f} s)", flush=True)
        given.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")

    for context in given.context or CONTEXTS:
        for recipe in given.recipe or RECIPES:
            begin = time.perf_counter()
            try:
                row = case(model, recipe, context)
            except Exception as error:  # the others go on
                text = f"{type(error).__name__}: {error}"[:200]
                row = {"recipe": recipe, "context": context, "batch": 1, "error": text}
            add(row, begin)
    if not given.no_largest:
        begin, name = time.perf_counter(), LARGEST[0]
        with torch.inference_mode():
            cache = decode.filled(model, name, LARGEST[1], 1, False)
        report = cache.report()
        cache.free()
        held = report.exact + report.codes + report.scales + report.other
        most = capacity.largest_batch(model, Recipe.parse(name), LARGEST[1], STEPS)
        add({"recipe": name, "context": LARGEST[1], "page_bytes": held, **most}, begin)


if __name__ == "__main__":
    main()
