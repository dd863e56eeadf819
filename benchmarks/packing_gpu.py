"""Decoding steps in which tokens are packed, as CUDA graphs, on a GPU: every 32nd step packs a group for all layers.

    python benchmarks/packing_gpu.py benchmarks/results/packing_h100.json

A model of Llama-3-8B's shape with random weights in bfloat16, one sequence of 8,192 random tokens. Of 140 steps on the
host clock, each waited for: the median, the mean of the last 96 (three packings), and all steps beyond 1.3 medians.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from fivefold.benchmark import decode, machine
from fivefold.methods.bits import gear
from steps_gpu import first_columns

RECIPES = (
    "kivi(bits=2)", "rotatekv()", "rotatekv(bits=4)", "cskv()", "cskv(bits=4)", "kv_heads(group=2)", "minicache()",
    "minicache() + kivi(bits=4)", "mikv()", "h2o() + kivi(bits=4)", "gear()",
)  # fmt: skip
CONTEXT, STEPS, LAST = 8192, 140, 96


@torch.inference_mode()
def case(model: Any, recipe: str) -> dict[str, Any]:
    cache = decode.filled(model, recipe, CONTEXT, 1, True)
    with cache.session.atomic():
        cache.session.choose_together()
    cache.reserve(CONTEXT + 2 * STEPS)
    token, times = torch.ones(1, 1, dtype=torch.long, device="cuda"), []
    for _ in range(STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    median = statistics.median(times[8:])
    long = [[at, round(ms, 1)] for at, ms in enumerate(times) if at >= 4 and ms > 1.3 * median]
    row = {"recipe": recipe, "ms": median, "mean_ms": statistics.fmean(times[-LAST:]), "long": long}
    cache.free()
    return row


def main() -> None:
    gear.low_rank = first_columns
    warnings.simplefilter("ignore")
    model = decode.build("llama-3-8b", torch.device("cuda"))
    rows = []
    for recipe in RECIPES:
        rows.append(case(model, recipe))
        print(rows[-1], flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    Path(sys.argv[1]).write_text(json.dumps({**machine.stamp(), "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
