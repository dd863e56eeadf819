"""What the host does in a step that is replayed as a CUDA graph, on a GPU.

    python benchmarks/step_host_gpu.py out.json --context 32768 --recipe "full()"

A model of Llama-3-8B's shape with random weights. Of each recipe: `before_ms` and `after_ms`, the host's median time of
a call until the graph is launched and from then on until it returns; `ms`, a synchronised step with its argmax;
`loop_ms`, a step of a loop that takes the argmax and never waits; `graph_ms`, a replay among many. With `--profile`, a
profile of the host's functions of each.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from fivefold.benchmark import decode, machine
from fivefold.methods.bits import gear
from fivefold.models import graph
from steps_gpu import first_columns

RECIPES = (
    "full()", "kivi(bits=2)", "mikv()", "minicache()", "h2o() + kivi(bits=4)",
    "anchors(anchors=[0, 2, 4, 8, 12, 16, 20, 24, 28])", "keyformer()", "gear()",
)  # fmt: skip
STEPS = 32
GROUP = 32  # a step in so many packs


def replay_ms(cache: Any, repeats: int = 20) -> float:
    """Of one replay among many, so that no launch is waited for: every one takes the same step again."""
    (captured,) = cache.step.captured.values()
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    captured.graph.replay()
    before.record()
    for _ in range(repeats):
        captured.graph.replay()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / repeats


class Clock:
    """When the graph of a step is launched, on the host."""

    def __init__(self) -> None:
        self.at = self.done = 0.0
        inner = graph.Step._replay
        clock = self

        def replay(step: Any, *args: Any) -> Any:
            clock.at = time.perf_counter()
            out = inner(step, *args)
            clock.done = time.perf_counter()
            return out

        graph.Step._replay = replay  # type: ignore[method-assign]


def case(model: Any, recipe: str, context: int, clock: Clock, profile: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": recipe, "context": context}
    with torch.inference_mode():
        cache = decode.filled(model, recipe, context, 1, True)
        with cache.session.atomic():
            cache.session.choose_together()
        cache.reserve(context + 6 * STEPS + 64)
        token = torch.ones(1, 1, dtype=torch.long, device=model.device)

        def step() -> None:
            nonlocal token
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)

        for _ in range(4):
            step()
        times: dict[str, list[float]] = {"before_ms": [], "replay_call_ms": [], "after_ms": [], "ms": []}
        for _ in range(STEPS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = model(token, past_key_values=cache)
            end = time.perf_counter()
            token = out.logits[:, -1:].argmax(-1)
            torch.cuda.synchronize()
            last = time.perf_counter()
            spans = clock.at - start, clock.done - clock.at, end - clock.done, last - start
            for name, span in zip(times, spans):
                times[name].append(span * 1000)
        row |= {name: statistics.median(found) for name, found in times.items()}
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(2 * GROUP):
            step()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        row |= {"loop_ms": (time.perf_counter() - start) * 1000 / 2 / GROUP, "loop_host_ms": host * 1000 / 2 / GROUP}
        row["graph_ms"] = replay_ms(cache)
        if profile:
            profiler = cProfile.Profile()
            for _ in range(STEPS):
                torch.cuda.synchronize()
                profiler.enable()
                step()
                profiler.disable()
            said = io.StringIO()
            pstats.Stats(profiler, stream=said).sort_stats("tottime").print_stats(40)
            row["profile"] = said.getvalue()
        row["path"] = cache.decoding
    cache.free()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    gear.low_rank = first_columns
    warnings.simplefilter("ignore")
    model, clock = decode.build("llama-3-8b", torch.device("cuda")), Clock()
    rows: list[dict[str, Any]] = []
    for recipe in given.recipe or RECIPES:
        begin = time.perf_counter()
        try:
            row = case(model, recipe, given.context, clock, given.profile)
        except Exception as error:  # the others go on
            row = {"recipe": recipe, "context": given.context, "error": f"{type(error).__name__}: {error}"[:200]}
        rows.append(row)
        said = " ".join(f"{name[:-3]} {x:.3f}" for name, x in row.items() if name.endswith("_ms") or name == "ms")
        print(f"{recipe[:24]:24} {said} {row.get('error', '')} ({time.perf_counter() - begin:.0f} s)", flush=True)
        out = {**machine.stamp(), "shape": "llama-3-8b", "rows": rows}
        given.out.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
