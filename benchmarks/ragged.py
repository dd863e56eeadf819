"""Decoding steps of sequences of different lengths against steps of equal ones of the same sum.

Both caches of a recipe are in one process, and their steps are taken in turn, so that a change in the machine's speed
meets both alike; where a device has no room for both, one is filled, timed and freed after the other, in rounds. The
lengths grow by a constant factor. Weights are random, and prompts too, which the model reads left-padded, in chunks.
A step is timed on the host clock around a synchronised call; the figures are medians. What matters is the last column:
at 1.0 raggedness costs nothing.

    python benchmarks/ragged.py --json benchmarks/results/ragged_cpu.json
    python benchmarks/ragged.py --device cuda --json benchmarks/results/ragged_h100.json

On a CPU a small model and 16 sequences of 100 to 2,000 tokens; on a GPU a model of Llama-3-8B's shape in bfloat16 and
32 sequences of 1k to 32k tokens, each recipe launch by launch and as a CUDA graph.
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
from rich.console import Console
from transformers import DynamicCache

import fivefold
from fivefold.benchmark import machine
from fivefold.benchmark.decode import BASELINE, build
from fivefold.tables import Table

WARM_UP = 4  # steps that are not timed
CHUNK = 1024  # tokens of a prompt that are read at a time
SIDES = ("ragged", "equal")
DEFAULTS = {"cpu": ("small", 16, 100, 2000), "cuda": ("llama-3-8b", 32, 1024, 32768)}


def recipes(config: Any) -> list[str]:
    """Half of the heads of each layer of `duo` hold everything: random weights have no profile."""
    half = [
        [layer, head] for layer in range(config.num_hidden_layers) for head in range(config.num_key_value_heads // 2)
    ]
    return ["full()", "kivi(bits=4)", f"duo(retrieval={half}) + kivi(bits=4)"]


def spread(count: int, low: int, high: int) -> list[int]:
    """Lengths from low to high, each a constant factor longer than the one before, in mixed order."""
    lengths = [round(low * (high / low) ** (i / (count - 1))) for i in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [lengths[i] for i in order]


class Batch:
    """A cache, filled by prompts of these lengths, and the steps that it takes."""

    def __init__(self, model: Any, name: str, lengths: list[int], graph: bool) -> None:
        self.model = model
        if name == BASELINE:
            fivefold.restore(model)
            self.cache: Any = DynamicCache(config=model.config)
        else:
            self.cache = fivefold.compress(model, name, cuda_graph=graph)
        longest, device = max(lengths), model.device
        self.mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long().to(device)
        ids = torch.randint(1, model.config.vocab_size, self.mask.shape, device=device) * self.mask
        for first in range(0, longest, CHUNK):
            self._give(ids[:, first : first + CHUNK], self.mask[:, : first + CHUNK])
        self.token = ids[:, -1:]

    def _give(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.model(
            ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
        ).logits

    def step(self) -> float:
        """Take a step: milliseconds."""
        self.mask = torch.cat([self.mask, self.mask[:, -1:]], 1)
        _wait(self.model)
        start = time.perf_counter()
        self.token = self._give(self.token, self.mask).argmax(-1)
        _wait(self.model)
        return (time.perf_counter() - start) * 1000

    @property
    def nbytes(self) -> int:
        if isinstance(self.cache, DynamicCache):
            return sum(x.nbytes for layer in self.cache.layers for x in (layer.keys, layer.values))
        return self.cache.report().total

    def free(self) -> None:
        if hasattr(self.cache, "free"):
            self.cache.free()
        self.cache = None
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def measure(
    model: Any, name: str, lengths: dict[str, list[int]], steps: int, rounds: int, graph: bool
) -> dict[str, Any]:
    """Median milliseconds of a step, and bytes, of both sides."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    row: dict[str, Any] = {"recipe": name, "graph": graph, "in_turn": True}

    def take(batches: dict[str, Batch], count: int) -> None:
        for number in range(WARM_UP + count):
            for side, batch in batches.items():
                ms = batch.step()
                if number >= WARM_UP:
                    times[side].append(ms)
        for side, batch in batches.items():
            row[f"{side}_bytes"] = batch.nbytes
            failed = getattr(getattr(batch.cache, "step", None), "failed", None)
            if failed:
                row["no_graph"] = failed

    batches: dict[str, Batch] = {}
    try:
        for side in SIDES:
            batches[side] = Batch(model, name, lengths[side], graph)
        take(batches, steps)
    except torch.OutOfMemoryError:
        row["in_turn"] = False
        times = {side: [] for side in SIDES}
    for batch in batches.values():
        batch.free()
    batches.clear()
    for _ in range(0 if row["in_turn"] else rounds):
        for side in SIDES:
            gc.collect()
            torch.cuda.empty_cache()
            try:
                batch = Batch(model, name, lengths[side], graph)
                take({side: batch}, -(-steps // rounds))
                batch.free()
            except torch.OutOfMemoryError:
                row[f"{side}_error"] = "out of memory"
            batch = None  # type: ignore[assignment]
    for side in SIDES:
        row[f"{side}_ms"] = statistics.median(times[side]) if times[side] else None
    both = all(row[f"{side}_ms"] for side in SIDES)
    row["factor"] = row["ragged_ms"] / row["equal_ms"] if both else None
    return row


def main(
    device: str = "cpu",
    shape: Annotated[str | None, typer.Option(help="of fivefold.benchmark.decode.SHAPES")] = None,
    batch: int | None = None,
    low: int | None = None,
    high: int | None = None,
    steps: int = 40,
    rounds: Annotated[int, typer.Option(help="where both caches do not fit at once")] = 2,
    threads: Annotated[int | None, typer.Option(help="of the CPU; take 1 on a machine that others use")] = None,
    recipe: Annotated[list[str] | None, typer.Option("--recipe", "-r")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    where = torch.device(device)
    usual = DEFAULTS[where.type]
    shape, batch, low, high = (given or value for given, value in zip((shape, batch, low, high), usual))
    ragged = spread(batch, low, high)
    lengths = {"ragged": ragged, "equal": [round(sum(ragged) / batch)] * batch}
    torch.manual_seed(0)
    model = build(shape, where)
    rows = []
    with torch.inference_mode():
        for name in [BASELINE, *(recipe or recipes(model.config))]:
            for graph in (False, True) if where.type == "cuda" and name != BASELINE else (False,):
                rows.append(measure(model, name, lengths, steps, rounds, graph))
    show(
        rows,
        f"{batch} sequences of {low:,} to {high:,} tokens and of {lengths['equal'][0]:,}, {shape}, {machine.name()}",
    )
    if json_file is not None:
        text = {
            **machine.stamp(), "device": device, "shape": shape, "batch": batch, "lengths": ragged,
            "equal": lengths["equal"][0], "steps": steps, "rows": rows,
        }  # fmt: skip
        json_file.write_text(json.dumps(text, indent=2) + "\n")


def show(rows: list[dict[str, Any]], title: str) -> None:
    table = Table("cache", ">ragged ms", ">equal ms", ">ragged MiB", ">equal MiB", ">ragged / equal", title=title)
    for row in rows:
        name = row["recipe"] if len(row["recipe"]) < 60 else row["recipe"][:24] + " ... " + row["recipe"][-20:]
        cells = [name + (", graph" if row["graph"] else "") + (" (ran without)" if "no_graph" in row else "")]
        cells += [_cell(row.get(f"{side}_ms"), "{:.2f}", row.get(f"{side}_error")) for side in SIDES]
        cells += [_cell(row.get(f"{side}_bytes"), "{:,.0f}", None, 2**20) for side in SIDES]
        table.add_row(*cells, _cell(row["factor"], "{:.2f}x", None))
    Console().print(table, crop=False)


def _cell(value: float | None, form: str, error: str | None, unit: float = 1) -> str:
    return form.format(value / unit) if value is not None else error or ""


if __name__ == "__main__":
    typer.run(main)
