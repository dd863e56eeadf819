"""Decoding steps of every codec on a GPU, as a CUDA graph, beside the exact cache; and that they are right.

    python benchmarks/codecs_gpu.py benchmarks/results/codecs_h100.json
    python benchmarks/codecs_gpu.py small.json --shape small --context 300 --steps 2    # on a CPU, to try it

The weights are random and the caches are filled with random tokens; one sequence. Of SmolLM2's shape at 7,000 tokens,
where the time is that of launches, the measure is transformers' DynamicCache; of Llama-3-8B's at 32,768 and 131,072
`full()` as a graph. `error`: how far the logits of one step are from those of plain PyTorch over the same pages, as a
part of their norm (where `--check` asks for it: the reference decodes whole pages). GEAR's factors are what the power
iteration begins with, unless `--iterate`: pages are as large, and as fast to read, but filled in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fivefold
from fivefold.benchmark import decode, machine
from fivefold.methods.bits import gear
from fivefold.tables import Table

SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES: dict[str, Any] = {"smollm2": SMOLLM2, **{name: name for name in decode.SHAPES}}
CONTEXTS = {"smollm2": (7000,), "llama-3-8b": (131072, 32768)}
RECIPES = ("full()", "kivi(bits=2)", "rotatekv()", "gear()", "mikv()", "rotatekv(bits=4)", "gear(bits=4)")


def first_columns(x: torch.Tensor, begin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In the place of `gear.low_rank`: a left factor with columns of length 1, and what belongs to it."""
    left = torch.nn.functional.normalize(x[:, :, : begin.shape[1]], dim=1)
    return left, torch.bmm(x.transpose(1, 2), left)


@torch.inference_mode()
def error(model: Any, recipe: str, context: int) -> float:
    """The distance of a step's logits from the reference's."""
    cache = decode.filled(model, recipe, context, 1, True)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)
    other, before = cache.fork(), os.environ.get("FIVEFOLD_KERNELS")
    found = model(token, past_key_values=cache).logits.float()
    os.environ["FIVEFOLD_KERNELS"] = "reference"
    try:
        wanted = model(token, past_key_values=other).logits.float()
    finally:
        del os.environ["FIVEFOLD_KERNELS"]
        if before is not None:
            os.environ["FIVEFOLD_KERNELS"] = before
    for one in (cache, other):
        one.free()
    fivefold.restore(model)
    return float((found - wanted).norm() / wanted.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--context", type=int, action="append")
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--check", type=int, metavar="TOKENS", help="compare a step at so many tokens")
    parser.add_argument("--iterate", action="store_true")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so many")
    given = parser.parse_args()
    if not given.iterate:
        gear.low_rank = first_columns
    begin, device, rows = time.perf_counter(), machine.device(), []
    table = Table("model", "recipe", ">tokens", ">cache bytes", ">ms a step", ">mean", ">faster", ">error")
    for shape in given.shape or CONTEXTS:
        model = decode.build(SHAPES[shape], device)
        for context in given.context or CONTEXTS[shape]:
            base = None
            first = [decode.BASELINE] if shape == "smollm2" else []
            for recipe in [*first, *(given.recipe or RECIPES)]:
                if time.perf_counter() - begin > given.seconds:
                    continue
                row: dict[str, Any] = {"shape": shape, "context": context, "recipe": recipe}
                row["graph"] = recipe != decode.BASELINE
                try:
                    row |= decode._steps(model, recipe, context, 1, given.steps, row["graph"])
                except torch.OutOfMemoryError:
                    row["no_graph"] = "out of memory"
                base = base or row.get("ms")
                if "ms" in row and base:
                    row["faster"] = base / row["ms"]
                if given.check and row["graph"]:
                    row["error"] = error(model, recipe, given.check)
                rows.append(row)
                print({name: round(x, 4) if isinstance(x, float) else x for name, x in row.items()}, flush=True)
                numbers = [f"{row[name]:.2f}" if name in row else "" for name in ("ms", "mean_ms", "faster")]
                size = f"{row['cache_bytes']:,}" if "cache_bytes" in row else row.get("no_graph", "")
                table.add_row(shape, recipe, f"{context:,}", size, *numbers, f"{row.get('error', 0):.4f}")
                text = {"steps": given.steps, **machine.stamp(), "rows": rows}
                given.out.parent.mkdir(parents=True, exist_ok=True)
                given.out.write_text(json.dumps(text, indent=1) + "\n")
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    Console().print(table, crop=False)


if __name__ == "__main__":
    main()
