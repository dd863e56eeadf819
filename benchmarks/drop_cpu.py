"""Decoding steps with attention modules left out, on a CPU: the embedded model at 4,096 tokens.

    python benchmarks/drop_cpu.py benchmarks/results/drop_cpu.json

Steps of all caches are taken in turn, so that a change in the machine's speed meets all of them alike; figures are
medians, and each beside that of full(). "attention" is the part of a full() step that its attention modules take,
projections and norm of the layer's input included, measured by hooks around them in another run of steps: a share of it
as large as that of the modules left out is what a step should lose.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fivefold
from fivefold.benchmark import machine
from fivefold.benchmark.kernels import fill
from fivefold.models import embedded
from fivefold.models.specs import attention_modules
from fivefold.tables import Table

RECIPES = ("full()", "drop(layers=4)", "drop(layers=8)", "drop(layers=15)")


def module_seconds(model: Any, cache: Any, token: torch.Tensor, steps: int) -> float:
    """Seconds of a step that are spent in attention modules, the median."""
    begun, spent, total = [0.0], [0.0], []
    hooks = []
    for module in attention_modules(model).values():
        hooks.append(module.register_forward_pre_hook(lambda *given: begun.__setitem__(0, time.perf_counter())))
        hooks.append(
            module.register_forward_hook(lambda *given: spent.__setitem__(0, spent[0] + time.perf_counter() - begun[0]))
        )
    for _ in range(steps):
        spent[0] = 0.0
        model(token, past_key_values=cache)
        total.append(spent[0])
    for hook in hooks:
        hook.remove()
    return statistics.median(total)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    model, _ = embedded.load()
    layers = model.config.num_hidden_layers
    caches, times = {}, {name: [] for name in RECIPES}
    token = torch.tensor([[42]])
    with torch.inference_mode():
        for name in RECIPES:
            caches[name] = fivefold.compress(model, name)
            caches[name].session.put(1, given.context, partial(fill, context=given.context, piece=1 << 22))
        for step in range(given.steps + 5):
            for name in RECIPES:
                start = time.perf_counter()
                model(token, past_key_values=caches[name])
                if step >= 5:
                    times[name].append(time.perf_counter() - start)
        attention = module_seconds(model, caches["full()"], token, max(3, given.steps // 2))
    whole, rows = statistics.median(times["full()"]), []
    for name in RECIPES:
        ms, gone = statistics.median(times[name]), len(caches[name].absent)
        rows.append(
            {
                "recipe": name, "left_out": gone, "ms": ms * 1e3, "of_full": ms / whole,
                "expected": 1 - gone / layers * attention / whole, "cache_bytes": caches[name].report().total,
            }
        )  # fmt: skip
    title = f"SmolLM2-135M, float32, {given.context:,} tokens; attention is {attention / whole:.0%} of a step of full()"
    table = Table("recipe", ">left out", ">ms a step", ">of full()", ">expected", ">cache bytes", title=title)
    for row in rows:
        table.add_row(
            row["recipe"], f"{row['left_out']}/{layers}", f"{row['ms']:.1f}", f"{row['of_full']:.3f}",
            f"{row['expected']:.3f}", f"{row['cache_bytes']:,}",
        )  # fmt: skip
    Console().print(table, crop=False)
    text = {
        "model": "SmolLM2-135M", "context": given.context, "steps": given.steps, "attention_ms": attention * 1e3,
        **machine.stamp(), "rows": rows,
    }  # fmt: skip
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
