"""What the host does in a forward beside the tensors' work, against DynamicCache: a model whose tensors are tiny.

    python benchmarks/host_cpu.py --out benchmarks/results/host_cpu.json

A Llama of random weights, `--layers` layers of 4 kv heads of 64, hidden size 64, reads chunks of one sequence. Of each
layer and chunk: milliseconds of this thread's processor time (the least of `--repeats` runs of each chunk, the median
over the chunks but the first; all caches are taken in turn), calls of functions, Python's and those in C, and
operations of PyTorch. Calls and operations do not depend on the machine's speed.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fivefold
from fivefold.evaluate.demo import BASELINE
from fivefold.tables import Table

HEADS = 4
SIZES = {1: 24, 64: 16, 512: 5}
"""Tokens of a chunk, and how many chunks of that many."""


def recipes(layers: int) -> dict[str, str]:
    """By the name in the table. A third of all heads hold everything, wherever they are."""
    heads = [[layer, head] for layer in range(layers) for head in range(HEADS)]
    duo = f"duo(retrieval={sorted(random.Random(1).sample(heads, len(heads) // 3))}, sink=32, recent=128)"
    names = {"full()": "full()", "kivi(bits=4)": "kivi(bits=4)", "streaming(recent=128)": "streaming(recent=128)"}
    return {**names, "duo": duo, "duo + kivi(bits=4)": f"{duo} + kivi(bits=4)", "h2o()": "h2o()"}


def cache_of(model: LlamaForCausalLM, recipe: str | None) -> Any:
    fivefold.restore(model)
    return DynamicCache() if recipe is None else fivefold.compress(model, recipe)


class Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def read(model: LlamaForCausalLM, recipe: str | None, size: int) -> list[float]:
    """Seconds of each chunk."""
    cache, out = cache_of(model, recipe), []
    with torch.inference_mode():
        for ids in torch.randint(0, 256, (SIZES[size], 1, size)):
            start = time.thread_time()
            model(ids, past_key_values=cache, logits_to_keep=1)
            out.append(time.thread_time() - start)
    return out


def counted(model: LlamaForCausalLM, recipe: str | None, size: int) -> tuple[float, float]:
    """Calls and operations of a chunk, the mean of all but the first two."""
    cache, calls = cache_of(model, recipe), 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    with torch.inference_mode():
        parts = list(torch.randint(0, 256, (SIZES[size], 1, size)))
        for ids in parts[:2]:
            model(ids, past_key_values=cache, logits_to_keep=1)
        half = 2 + (len(parts) - 2) // 2
        sys.setprofile(count)
        for ids in parts[2:half]:
            model(ids, past_key_values=cache, logits_to_keep=1)
        sys.setprofile(None)
        with Operations() as operations:
            for ids in parts[half:]:
                model(ids, past_key_values=cache, logits_to_keep=1)
    return calls / (half - 2), operations.count / (len(parts) - half)


def main(layers: int = 16, repeats: int = 4, before: Path | None = None, out: Path | None = None) -> None:
    """before: what an earlier version printed into a file, to be kept beside this one's."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=64, max_position_embeddings=1 << 16,
    )  # fmt: skip
    model, rows = LlamaForCausalLM(config).eval(), []
    names: dict[str, str | None] = {BASELINE: None, **recipes(layers)}
    table = Table("tokens", "recipe", ">ms", ">x", ">calls", ">x", ">operations", title="of a layer and chunk")
    for size in SIZES:
        found: dict[str, list[list[float]]] = {name: [] for name in names}
        for _ in range(repeats):
            for name, recipe in names.items():
                found[name].append(read(model, recipe, size))
        first: dict[str, Any] = {}
        for name, recipe in names.items():
            least = [min(times) for times in zip(*found[name])][1:]
            calls, operations = (x / layers for x in counted(model, recipe, size))
            row = {"tokens": size, "recipe": name, "ms": statistics.median(least) / layers * 1e3}
            row |= {"calls": calls, "operations": operations}
            first = first or row
            row |= {f"{what}_times": row[what] / first[what] for what in ("ms", "calls")}
            rows.append(row)
            table.add_row(
                str(size), name, f"{row['ms']:.3f}", f"{row['ms_times']:.2f}", f"{calls:.0f}",
                f"{row['calls_times']:.2f}", f"{operations:.0f}",
            )  # fmt: skip
    Console().print(table, crop=False)
    if out is not None:
        earlier = {"before": json.loads(before.read_text())["rows"]} if before is not None else {}
        out.write_text(json.dumps({"layers": layers, "rows": rows, **earlier}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
