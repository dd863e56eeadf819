"""Evaluation in batches against one by one: the same results, and what it saves.

python benchmarks/eval_batches.py --samples 4 --recipe "kivi(bits=4)" --recipe "h2o(keep=0.2)"
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fivefold.cli.models import load_model
from fivefold.evaluate import engine, keys

RECIPES = ("kivi(bits=4)", "kivi(bits=2)", "duo(keep=0.34)", "h2o(keep=0.2)", "rotatekv(bits=4)")


def differences(one: dict[str, Any], two: dict[str, Any]) -> dict[str, float]:
    """How far two results of the same plan are apart, at most, by what they measure."""
    worst: dict[str, float] = {}

    def note(name: str, distance: float) -> None:
        worst[name] = max(worst.get(name, 0.0), distance)

    for a, b in zip(one["cells"], two["cells"], strict=True):
        for left, right in zip(a["rows"], b["rows"], strict=True):
            note("ratio", abs(left["ratio"] - right["ratio"]) / left["ratio"])
            for name in ("kl", "top1", "perplexity"):
                if name in left:
                    note(name, abs(left[name] - right[name]))
            for p, q in zip(left.get("questions", ()), right.get("questions", ()), strict=True):
                note("answers", float(p["said"] != q["said"]))
                note("scores", abs(p["score"] - q["score"]))
    return worst


def spent(result: dict[str, Any], recipe: str) -> dict[str, float]:
    """Seconds of a recipe by suite."""
    cells = [cell for cell in result["cells"] if cell["recipe"] == recipe]
    return {cell["suite"]: sum(row["seconds"] for row in cell["rows"]) for cell in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--suites", default="fidelity,multi_needle,passkey")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--batch", type=int, help="what is compared with one by one; the default's if not given")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    model, tokenizer = load_model(None, args.dtype, args.device)
    print(f"{keys.machine(model.device)}, {args.dtype}, {args.context} tokens, {args.samples} texts", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipe or RECIPES:
            plan = engine.Plan((recipe,), tuple(args.suites.split(",")), (args.context,), args.samples, everything=True)
            # The exact cache is measured before the clock runs.
            for name, batch in (("alone", 1), ("together", args.batch)):
                base = engine.Plan(("full()",), plan.suites, plan.contexts, plan.samples, everything=True)
                engine.run(model, tokenizer, base, Path(folder) / name, batch=batch)
            found, took = [], []
            for name, batch in (("together", args.batch), ("alone", 1)):
                start = time.perf_counter()
                found.append(engine.run(model, tokenizer, plan, Path(folder) / name, batch=batch))
                if model.device.type == "cuda":
                    torch.cuda.synchronize()
                took.append(time.perf_counter() - start)
            worst = ", ".join(f"{name} {value:.1e}" for name, value in differences(*found).items())
            each = ", ".join(f"{name} {seconds:.2f}" for name, seconds in spent(found[0], recipe).items())
            print(f"{recipe}: one by one {took[1]:.1f} s, together {took[0]:.1f} s ({each}); apart: {worst}")


if __name__ == "__main__":
    main()
