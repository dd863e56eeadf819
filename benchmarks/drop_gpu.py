"""Decoding steps with half of the attention modules left out (`drop`), on a GPU: a model of Llama-3-8B's shape.

    python benchmarks/drop_gpu.py benchmarks/results/drop_h100.json
    python benchmarks/drop_gpu.py drop_small.json --shape small --context 300 --steps 6    # on a CPU, to try it

The weights are random and the caches are filled with random tokens; one sequence, or `--batch`. A step is a call of the
model as a CUDA graph, timed by CUDA events around it (on a CPU by the clock), after steps that are not timed. Rows of
one context are measured after each other in one process, and each is beside the same recipe without `drop`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fivefold
from fivefold.benchmark import decode, machine
from fivefold.tables import Table

RECIPES = ("full()", "kivi(bits=4)")
CONTEXTS = (4096, 32768, 131072)
WARM_UP = 40
"""Steps that are not timed: the capture, and a whole group of tokens that is packed."""


def pairs(layers: int) -> list[tuple[str, str]]:
    """The recipes, each with what it is compared with. The upper half of the layers goes, where such modules lie."""
    drop = f"drop(layers={list(range(layers // 2, layers))})"
    names = [(recipe, f"{drop} + {recipe}" if recipe != "full()" else drop) for recipe in RECIPES]
    return [(one, recipe) for recipe, dropped in names for one in (recipe, dropped)]


@torch.inference_mode()
def row(model: Any, recipe: str, context: int, batch: int, steps: int) -> dict[str, Any]:
    cuda = model.device.type == "cuda"
    cache = decode.filled(model, recipe, context, batch, cuda)
    if cuda:
        cache.reserve(context + WARM_UP + steps + 1)  # so that the step is captured once
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    out: dict[str, torch.Tensor] = {}

    def step() -> None:
        out["token"] = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

    times = []
    for number in range(WARM_UP + steps):
        took = machine.elapsed_ms(step)
        token = out["token"]
        if number >= WARM_UP:
            times.append(took)
    found = {
        "ms": statistics.median(times), "mean_ms": statistics.fmean(times), "cache_bytes": cache.report().total,
        "graph": None if cache.step is None else {"replays": cache.step.replays, "failed": cache.step.failed},
    }  # fmt: skip
    cache.free()
    fivefold.restore(model)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", default="llama-3-8b", choices=list(decode.SHAPES))
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    model = decode.build(given.shape, machine.device())
    rows: list[dict[str, Any]] = []
    table = Table(
        "recipe", ">tokens", ">cache bytes", ">ms a step", ">faster", title=f"{given.shape}, batch {given.batch}"
    )
    for context in given.context or CONTEXTS:
        base: float | None = None
        for recipe, beside in pairs(model.config.num_hidden_layers):
            found: dict[str, Any] = {"recipe": recipe, "context": context, "batch": given.batch, "beside": beside}
            try:
                found.update(row(model, recipe, context, given.batch, given.steps))
            except torch.OutOfMemoryError:
                found["error"] = "out of memory"
                fivefold.restore(model)
                gc.collect()
                torch.cuda.empty_cache()
            base = found.get("ms") if recipe == beside else base
            found["faster"] = base / found["ms"] if base and "ms" in found else None
            rows.append(found)
            print({name: round(x, 4) if isinstance(x, float) else x for name, x in found.items()}, flush=True)
            shown = ["out of memory"]
            if "ms" in found:
                faster = "" if found["faster"] is None else f"{found['faster']:.2f}x"
                shown = [f"{found['cache_bytes']:,}", f"{found['ms']:.3f}", faster]
            table.add_row(recipe, f"{context:,}", *shown)
            text = {"shape": given.shape, "steps": given.steps, **machine.stamp(), "rows": rows}
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(text, indent=1) + "\n")
    Console().print(table, crop=False)


if __name__ == "__main__":
    main()
