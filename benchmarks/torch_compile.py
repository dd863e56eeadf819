"""Decoding steps of a model of random weights with a compressed cache: as it is, compiled, and as a CUDA graph.

python benchmarks/torch_compile.py results.json

Medians on the host clock around a synchronised call, after 40 steps that are not timed; how long the first step took,
which compiles or captures; and how many graphs torch.compile made for it. On a GPU the shape is that of Llama-3-8B.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch._dynamo.utils import counters

import fivefold
from fivefold.benchmark import decode, machine

VARIANTS = (
    ("eager", None, False),
    ("torch.compile(model)", "default", False),
    ("cuda_graph=True", None, True),
    ("cuda_graph=True, torch.compile(model)", "default", True),
    ('torch.compile(model, mode="reduce-overhead")', "reduce-overhead", False),
)
"""Name, the mode of torch.compile, and whether steps are a CUDA graph."""


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def compiled(model: Any, mode: str | None) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return model if mode is None else torch.compile(model, mode=mode)


def steps(called: Any, cache: Any, device: torch.device, count: int) -> list[float]:
    """Milliseconds of each step."""
    token, times = torch.ones(1, 1, dtype=torch.long, device=device), []
    for _ in range(count):
        wait(device)
        start = time.perf_counter()
        token = called(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        wait(device)
        times.append((time.perf_counter() - start) * 1000)
    return times


def prompts(called: Any, model: Any, recipe: str, lengths: list[int], device: torch.device) -> list[float]:
    """Milliseconds of each prompt: the first of a length and of all compiles."""
    times = []
    for length in lengths:
        cache = fivefold.compress(model, recipe)
        ids = torch.randint(1, model.config.vocab_size, (1, length), device=device)
        wait(device)
        start = time.perf_counter()
        called(ids, past_key_values=cache, logits_to_keep=1)
        wait(device)
        times.append((time.perf_counter() - start) * 1000)
        cache.free()
    return times


def main(
    file: Annotated[Path, typer.Argument(help="Where results go, as JSON.")],
    context: Annotated[int, typer.Option()] = 4096,
    recipe: Annotated[str, typer.Option()] = "kivi(bits=2)",
    shape: Annotated[str | None, typer.Option()] = None,
    timed: Annotated[int, typer.Option(help="Steps to time.")] = 40,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt; 0 for none.")] = 2048,
) -> None:
    device = machine.device()
    shape = shape or ("llama-3-8b" if device.type == "cuda" else "small")
    head = {**machine.stamp(), "shape": shape, "recipe": recipe, "context": context}
    rows: list[dict[str, Any]] = []
    model = decode.build(shape, device)
    for name, mode, graph in VARIANTS:
        if graph and device.type != "cuda":
            continue
        with torch.inference_mode():
            called = compiled(model, mode)
            cache = decode.filled(model, recipe, context, 1, graph)
            times = steps(called, cache, device, decode.WARM_UP + timed)
            row = {"what": "step", "variant": name, "ms": statistics.median(times[decode.WARM_UP :])}
            row |= {"mean_ms": statistics.fmean(times[decode.WARM_UP :]), "first_s": times[0] / 1000}
            row |= {"graphs": counters["stats"]["unique_graphs"], "no_graph": cache.step and cache.step.failed}
            cache.free()
        rows.append(row)
        print(row, flush=True)
        file.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
        gc.collect()
    for name, mode, _ in VARIANTS[: 2 if prompt else 0]:
        with torch.inference_mode():
            lengths = [prompt, prompt - 9, prompt + 9, prompt, prompt]
            times = prompts(compiled(model, mode), model, recipe, lengths, device)
        row = {"what": "prompt", "variant": name, "lengths": lengths, "all_ms": times, "ms": min(times)}
        rows.append({**row, "graphs": counters["stats"]["unique_graphs"]})
        print(rows[-1], flush=True)
        file.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
