"""Time and peak memory of reading a long prompt, each recipe in a process of its own, against full().

    python benchmarks/prefill_cpu.py --context 8000 --out benchmarks/results/prefill_cpu.json

Peak memory is the largest anonymous resident size, looked at every few milliseconds, less what it was when the model
was loaded (pages of the model's file come and go as the system likes). It is taken in a second process, in which memory
that is freed goes back at once, since what an allocator keeps differs from run to run. full() is measured first and
last: how far these two are apart says how much the machine's speed drifted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fivefold.tables import Table

RECIPES = ("full()", "snapkv(keep=0.2)", "h2o()", "keyformer()", "d2o()", "elastic()", "full()")

_CHILD = """
import ctypes, json, re, sys, threading, time
import torch
import fivefold
from fivefold.evaluate.demo import make_task
from fivefold.models import embedded

def resident():
    with open("/proc/self/status") as file:
        return int(re.search(r"RssAnon:\\s+(\\d+) kB", file.read())[1]) * 1024

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, resident())

peak, done = 0, threading.Event()
recipe, context = sys.argv[1], int(sys.argv[2])
model, tokenizer = embedded.load()
task = make_task(tokenizer, context)
with torch.inference_mode():
    model(task.prefix[:, :512])
    cache = fivefold.compress(model, recipe)
    ctypes.CDLL(None).malloc_trim(0)  # what loading left behind would hide what comes
    before = resident()
    threading.Thread(target=watch, daemon=True).start()
    start = time.perf_counter()
    model(task.prefix, past_key_values=cache, logits_to_keep=1)
    seconds = time.perf_counter() - start
done.set()
print(json.dumps({"recipe": recipe, "prefill_s": seconds, "peak_bytes": peak - before,
                  "cache_bytes": cache.report().total}))
"""


def main(
    context: int = 8000, recipe: Annotated[list[str] | None, typer.Option()] = None, out: Path | None = None
) -> None:
    rows = []
    for name in recipe or RECIPES:
        print(name, file=sys.stderr)
        command = [sys.executable, "-c", _CHILD, name, str(context)]
        timed, watched = (
            json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **extra}).stdout
            )
            for extra in ({}, {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)})
        )
        rows.append({**timed, "peak_bytes": watched["peak_bytes"]})
    base = rows[0]
    table = Table(
        "recipe",
        ">time x",
        ">peak memory x",
        ">seconds",
        ">peak MiB",
        ">cache MiB",
        title=f"SmolLM2-135M, float32, a prompt of {context} tokens; x: of full()",
    )
    for row in rows:
        table.add_row(
            row["recipe"], f"{row['prefill_s'] / base['prefill_s']:.2f}",
            f"{row['peak_bytes'] / base['peak_bytes']:.2f}", f"{row['prefill_s']:.1f}",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{row['cache_bytes'] / 2**20:.0f}",
        )  # fmt: skip
    Console().print(table, crop=False)
    if out is not None:
        out.write_text(json.dumps({"context": context, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
