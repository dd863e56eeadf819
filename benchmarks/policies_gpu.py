"""Decoding steps of methods that choose or pick tokens, on a GPU: what they give, and how long they take.

    python benchmarks/policies_gpu.py benchmarks/results/policies_checks_h100.json
    python benchmarks/policies_gpu.py policies_small.json --shapes small:300 --steps 6    # on a CPU, to try it

First each recipe's steps as a graph are held against the same steps in plain PyTorch, on a small model of random
weights: how far logits are apart, and whether the same tokens are held. Then whole steps are timed on models of random
weights, the caches filled with random tokens, beside `full()` and transformers' DynamicCache in the same process: by
CUDA events around a call, gaps and host included, after steps that are not timed; medians.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.benchmark import decode, machine

SHAPES: dict[str, Any] = {
    **decode.SHAPES,
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
}  # fmt: skip
RECIPES = (
    "full()",
    "tidal()",
    "anchors(anchors=[0, 2, 4, 8, 12, 16, 20, 24, 28])",
    "h2o()",
    "snapkv()",
    "keyformer()",
    "elastic()",
    "random()",
    "kivi(bits=2)",
    "tidal() + kivi(bits=4)",
    "h2o() + kivi(bits=4)",
    "d2o()",
)
CHECKED = (
    "tidal(top=16, full_layers=0, select_layers=[0, 2])",
    "anchors(top=16, anchors=[0, 2], sink=1, recent=4)",
    "h2o(keep=0.5)",
    "h2o(floor=300)",
    "snapkv(keep=0.5)",
    "keyformer(keep=0.5)",
    "elastic(keep=0.5)",
    "random(keep=0.5)",
    "d2o(keep=0.5)",
    "d2o(keep=0.5, merging=False, layers=False)",
    "tidal(top=16, full_layers=0, select_layers=[0]) + kivi(bits=4, residual=32)",
    "h2o(keep=0.5) + kivi(bits=4, residual=32)",
    "snapkv(keep=0.5) + kivi(bits=2)",
    "duo(retrieval=[[0, 1], [1, 0], [2, 0], [3, 1]], recent=40) + h2o(keep=0.5)",
    "mikv(floor=0)",
)
WARM_UP = 12
CHECKED_STEPS = 40


def calm() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@torch.inference_mode()
def check(model: Any, recipe: str, batch: int, tokens: int = 250) -> dict[str, Any]:
    """The steps of a recipe as a graph beside those in plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch, tokens + CHECKED_STEPS), generator=generator)
    ids, found = ids.to(model.device), []
    for graph in (False, True):
        os.environ["FIVEFOLD_KERNELS"] = "auto" if graph else "reference"
        cache = fivefold.compress(model, recipe, cuda_graph=graph)
        parts = [ids[:, :tokens], *ids[:, tokens:].split(1, 1)]
        logits = torch.stack([model(part, past_key_values=cache).logits[:, -1].float() for part in parts])
        held = [one.positions.sort(1).values for store in cache.session.stores.values() for one in store.held]
        found.append((logits, held, cache.step))
    os.environ["FIVEFOLD_KERNELS"] = "auto"
    (one, mine, _), (other, theirs, step) = found
    same = [float((a == b).float().mean()) for a, b in zip(mine, theirs) if a.shape == b.shape]
    return {
        "recipe": recipe, "batch": batch, "replays": step.replays, "why_not": step.failed,
        "off": float((one - other).norm() / one.norm()), "worst_off": float((one - other).abs().max()),
        "held_alike": min(same, default=None),
    }  # fmt: skip


@torch.inference_mode()
def timed(model: Any, recipe: str, context: int, steps: int, profile: bool = False) -> dict[str, Any]:
    """A row: milliseconds of a step."""
    cuda = model.device.type == "cuda"
    cache = decode.filled(model, recipe, context, 1, cuda)
    if recipe != decode.BASELINE:
        with cache.session.atomic():
            cache.session.choose_together()
        cache.reserve(context + WARM_UP + steps + 2)
    token = torch.ones(1, 1, dtype=torch.long, device=model.device)

    def step() -> None:
        token.copy_(model(token, past_key_values=cache).logits[:, -1:].argmax(-1))

    times = [machine.elapsed_ms(step) for _ in range(WARM_UP + steps)][WARM_UP:]
    if profile and cuda:
        _profile(step)
        captured = getattr(getattr(cache, "step", None), "captured", {})
        for one in captured.values():
            alone = statistics.median(machine.elapsed_ms(one.graph.replay) for _ in range(9))
            begin = time.perf_counter()
            for _ in range(5):
                step()
                torch.cuda.synchronize()
            print(f"    replay alone {alone:.2f} ms; by the clock {(time.perf_counter() - begin) * 200:.2f} ms a step")
    row = {"ms": statistics.median(times), "mean_ms": statistics.fmean(times), "cache_bytes": decode.held_bytes(cache)}
    graph = getattr(cache, "step", None)
    if graph is not None:
        row |= {"captures": graph.captures, "why_not": graph.failed}
        cache.free()
    return row


def _profile(step: Callable[[], None]) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    with profiled(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    every = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    shown = ", ".join(f"{e.key[:24]} {e.count}x {e.self_device_time_total / 1e3:.2f}" for e in every[:9])
    whole = sum(e.self_device_time_total for e in every) / 1e3
    print(f"    {sum(e.count for e in every)} kernels {whole:.2f} ms: {shown}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the results, a JSON file")
    parser.add_argument(
        "--shapes", default="smollm2:7000,llama-3-8b:131072,llama-3-8b:32768", help="shape:context, ..."
    )
    parser.add_argument("--recipes", help="separated by ';'; left out: the list of this file")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--profile", action="store_true", help="also print the longest kernels of one step")
    parser.add_argument("--no-check", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out: dict[str, Any] = {"command": " ".join(sys.argv), **machine.stamp(), "checks": [], "rows": []}

    def write() -> None:
        args.out.write_text(json.dumps(out, indent=1) + "\n")

    warnings.simplefilter("ignore")
    if not args.no_check:
        model = decode.build({**decode.SHAPES["small"], "initializer_range": 0.1}, device).float()
        for recipe in CHECKED:
            for batch in (3,):
                try:
                    row = check(model, recipe, batch)
                except Exception as error:
                    row = {"recipe": recipe, "batch": batch, "error": f"{type(error).__name__}: {error}"[:300]}
                out["checks"].append(row)
                numbers = ("off", "worst_off", "held_alike", "replays", "why_not", "error")
                print(
                    f"{recipe[:50]:50} x{batch}",
                    *(f"{name} {row[name]}" for name in numbers if name in row),
                    flush=True,
                )
                write()
        fivefold.restore(model)
        del model
        calm()
    built: tuple[str, Any] = "", None
    for pair in args.shapes.split(","):
        shape, context = pair.split(":")
        if built[0] != shape:
            built = "", None
            calm()
            built = shape, decode.build(SHAPES[shape], device)
        stock = [decode.BASELINE] if shape == "smollm2" else []
        for recipe in (*stock, *(args.recipes.split(";") if args.recipes else RECIPES)):
            begin = time.perf_counter()
            row = {"shape": shape, "context": int(context), "recipe": recipe}
            try:
                row |= timed(built[1], recipe, int(context), args.steps, args.profile)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            calm()
            out["rows"].append(row)
            write()
            took = time.perf_counter() - begin
            numbers = ("ms", "mean_ms", "why_not", "error")
            shown = (f"{row[n]:.2f}" if isinstance(row.get(n), float) else str(row[n]) for n in numbers if row.get(n))
            print(f"{shape} {context} {recipe[:40]:40}", *shown, f"({took:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
