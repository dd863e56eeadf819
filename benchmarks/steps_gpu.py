"""Whole decoding steps as CUDA graphs beside what their bytes allow, on a GPU: every method's.

    python benchmarks/steps_gpu.py benchmarks/results/steps_h100.json
    python benchmarks/steps_gpu.py out.json --recipe "h2o()" --context 131072

Models of Llama-3-8B's and of SmolLM2-135M's shape with random weights in bfloat16, caches of random tokens that go
through the packer as ever (GEAR's factors are what its power iteration begins with: as large, and as fast to read).
`ms` is the median of steps on the host clock around a synchronised call, `graph_ms` that of replays alone by events.
`floor_ms` is what reading every weight and every page once takes at the rate of a copy that is measured here. `faster`:
than `full()` at the same length. `path` says which code runs. Beside the small shape transformers' DynamicCache, launch
by launch. Last, of the recipe and the context of `LARGEST`, the largest batch that fits.
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

from fivefold.benchmark import capacity, decode, machine
from fivefold.methods.bits import gear
from fivefold.recipe import Recipe

CONTEXTS = {"llama-3-8b": (131072, 32768, 4096), "smollm2": (7000,)}
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
RECIPES = (
    "full()", "kivi(bits=2)", "kivi(bits=4)", "kivi(bits=8)", "rotatekv()", "rotatekv(bits=4)", "cskv()",
    "cskv(bits=4)", "kv_heads()", "kv_heads(group=8)", "minicache()", "minicache() + kivi(bits=4)", "gear()", "mikv()",
    "tidal()", "anchors(anchors=[0, 2, 4, 8, 12, 16, 20, 24, 28])", "tidal() + kivi(bits=4)", "h2o()",
    "h2o() + kivi(bits=4)", "d2o()", "keyformer()", "elastic()", "snapkv()", "random()", "streaming()",
    "duo(keep=0.25)", "duo(keep=0.25) + kivi(bits=2)", "duo(keep=0.25) + rotatekv()",
    "duo(keep=0.5) + rotatekv(bits=4)", "duo(keep=0.25) + cskv(bits=4)", "mikv(high=8)", "drop(layers=HALF)",
)  # fmt: skip
LARGEST = ("kivi(bits=2)", 32768)
"""(recipe, tokens) of as many sequences as fit."""
STEPS = 40


def first_columns(x: torch.Tensor, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of `gear.low_rank`: a left factor with columns of length 1, and what belongs to it."""
    left = torch.nn.functional.normalize(x[:, :, : begin.shape[1]], dim=1)
    return left, torch.bmm(x.transpose(1, 2), left)


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
    layers = model.config.num_hidden_layers
    name = recipe.replace("HALF", str(list(range(layers // 2, layers))))  # the upper half, where such modules lie
    with torch.inference_mode():
        cache = decode.filled(model, name, context, 1, True)
        if recipe == decode.BASELINE:
            row |= decode.timed(model, cache, 1, STEPS)
            return row | {"page_bytes": decode.held_bytes(cache)}
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


class Table:
    """The rows of one model, written down one by one."""

    def __init__(self, shape: str, out: dict[str, Any], path: Path) -> None:
        self.shape, self.out, self.path = shape, out, path
        self.model = decode.build(SMOLLM2 if shape == "smollm2" else shape, torch.device("cuda"))
        self.weights, self.full = weight_bytes(self.model), dict[int, float]()
        out["weight_bytes"][shape] = self.weights

    def add(self, row: dict[str, Any], begin: float) -> None:
        row = {"shape": self.shape, **row}
        if "ms" in row:
            row = beside_floor(row, self.weights, self.out["copy_bytes_s"])
            if row["recipe"] == "full()":
                self.full[row["context"]] = row["ms"]
            if row["batch"] == 1 and row["context"] in self.full:
                row["faster"] = self.full[row["context"]] / row["ms"]
        self.out["rows"].append(row)
        numbers = " ".join(f"{row[n]:.3f}" if n in row else "-" for n in ("ms", "graph_ms", "faster", "of_floor"))
        text = (row.get("error") or row.get("path", ""))[:90]
        name = f"{self.shape[:7]} {row['recipe'][:34]:34} {row['context']:>7} x{row['batch']}"
        print(f"{name} {numbers} {text} ({time.perf_counter() - begin:.0f} s)", flush=True)
        self.path.write_text(json.dumps(self.out, indent=1) + "\n", encoding="utf-8")

    def measure(self, recipe: str, context: int) -> None:
        begin = time.perf_counter()
        try:
            row = case(self.model, recipe, context)
        except Exception as error:  # the others go on
            row = {"recipe": recipe, "context": context, "batch": 1}
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        self.add(row, begin)

    def largest(self, recipe: str, context: int) -> None:
        begin = time.perf_counter()
        with torch.inference_mode():
            cache = decode.filled(self.model, recipe, context, 1, False)
        report = cache.report()
        cache.free()
        held = report.exact + report.codes + report.scales + report.other
        most = capacity.largest_batch(self.model, Recipe.parse(recipe), context, STEPS)
        self.add({"recipe": recipe, "page_bytes": held, **most}, begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", action="append", choices=list(CONTEXTS))
    parser.add_argument("--recipe", action="append", help="may be repeated; every method if not given")
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--no-largest", action="store_true", help="leave the largest batch out")
    given = parser.parse_args()
    gear.low_rank = first_columns
    warnings.simplefilter("ignore")
    rate = machine.copy_rate(torch.device("cuda"))
    out = {**machine.stamp(), "copy_bytes_s": rate, "weight_bytes": {}, "rows": []}
    for shape in given.shape or ("llama-3-8b", "smollm2"):
        table = Table(shape, out, given.out)
        for context in given.context or CONTEXTS[shape]:
            for recipe in ([decode.BASELINE] if shape == "smollm2" else []) + list(given.recipe or RECIPES):
                table.measure(recipe, context)
        if shape == "llama-3-8b" and not given.no_largest:
            table.largest(*LARGEST)
        del table
        gc.collect()


if __name__ == "__main__":
    main()
