"""What the products of `cskv` and `kv_heads` take on a CPU, beside a plain product of matrices by torch: a layer of
SmolLM2's shape, float32, one thread, taken in turn.

    OMP_NUM_THREADS=1 python benchmarks/low_rank_cpu.py benchmarks/results/low_rank_cpu.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fivefold.benchmark import machine
from fivefold.kernels.low_rank.cpu import feature_scores, feature_sums

HEADS, QUERIES, DIM, TOKENS = 3, 3, 64, 128
RANKS = {"cskv()": 13, "kv_heads()": 32}
LAYERS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pages = given.context // TOKENS
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    queries, weights = torch.randn(HEADS, QUERIES, DIM), torch.randn(HEADS, QUERIES, given.context)
    waves = tuple(torch.randn(1, 1, DIM // 2, 1, pages, TOKENS) for _ in range(2))
    for name, rank in RANKS.items():
        side, up = (torch.randn(HEADS, pages, TOKENS, rank),), torch.randn(1, HEADS * DIM, HEADS * rank)
        flops = 2 * given.context * HEADS * DIM * (HEADS * rank + QUERIES)
        calls[f"{name}: keys and scores"] = (lambda s=side, u=up: feature_scores(queries, s, 0, u, waves, HEADS), flops)
        flops = 2 * given.context * HEADS * QUERIES * HEADS * rank
        calls[f"{name}: sums of values"] = (lambda s=side: feature_sums(weights, s, 0, HEADS), flops)
        a, b = torch.randn(HEADS * DIM, HEADS * rank), torch.randn(HEADS * rank, given.context)
        calls[f"{name}: keys alone, by torch"] = (lambda a=a, b=b: a @ b, 2 * a.numel() * given.context)
    a, b = torch.randn(2, 1024, 1024)
    calls["1024 x 1024 x 1024, by torch"] = (lambda: a @ b, 2 * 1024**3)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(31):
        for name, (call, _) in calls.items():
            begin = time.perf_counter()
            call()
            if turn:
                times[name].append(time.perf_counter() - begin)
    rows = []
    for name, (_, flops) in calls.items():
        best, usual = min(times[name]), statistics.median(times[name])
        rows.append({"what": name, "ms": usual * 1e3, "best_ms": best * 1e3, "gflop": flops / 1e9,
                     "gflop_s": flops / usual / 1e9, "best_gflop_s": flops / best / 1e9})  # fmt: skip
        print(f"{name:32} {usual * 1e3:7.3f} ms, {flops / usual / 1e9:5.1f} GFLOP/s (best {flops / best / 1e9:5.1f}); "
              f"{LAYERS} layers {usual * LAYERS * 1e3:.0f} ms")  # fmt: skip
    text = {**machine.stamp(), "context": given.context, "threads": 1, "rows": rows}
    given.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
