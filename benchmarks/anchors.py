"""What a step that reads picked tokens costs in quality and takes in time: `anchors()`, its parts, and `tidal()`.

    python benchmarks/anchors.py --context 7000 --json benchmarks/results/anchors_cpu.json
    python benchmarks/anchors.py --steps 8000 --steps 16000 --json benchmarks/results/anchors_steps_cpu.json

A real document with three planted facts is read once, by transformers' own attention, into a cache of `full()`, which
stores what all of these store. For each row, a fork of that cache with its own reading is fed the document's next 64
tokens one by one, and asked for each fact. KL (nats) and top-1 agreement are against the exact cache. The oracle is a
simulation: each layer but the first two picks for itself, and so has read everything already. With `--keep FILE` the
document's keys and values are kept for later runs, and with `--only` a run measures the rows that have the text in
their name; rows that the file of `--json` has already stay there.

With `--steps` the time of a step alone: of one thread, in seconds of the processor, so that other work beside it counts
as little as can be; the median over rounds in which each recipe takes one step. The cache is filled with random keys
and values, not by reading, so it may be longer than the model's positions.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import DynamicCache

import fivefold
from fivefold.attention import attend_picked, attend_step, pick
from fivefold.engine import layer as engine_layer
from fivefold.engine.picks import Reads
from fivefold.evaluate.demo import _answer, make_task
from fivefold.models import embedded
from fivefold.recipe import Recipe
from fivefold.tables import Table

TOP = 512


def variants(specs: list[Any]) -> list[tuple[str, Reads, bool]]:
    """(name, what is read, whether it is a simulation)."""

    def of(recipe: str, **changes: Any) -> Reads:
        return replace(Reads.of(Recipe.parse(recipe).get("reads"), specs), **changes)

    layers = len(specs)
    even = [0, *(1 + round(i * (layers - 1) / 8) for i in range(8))]
    spaced = f"anchors(anchors={even})"
    bare: dict[str, Any] = {"sink": 0, "recent": 0}
    others = (
        "anchors(anchors=5)",
        "anchors(top=256)",
        "tidal()",
        "tidal(top=512)",
        "tidal(top=512, sink=4, recent=32)",
    )
    everyone = {spec.layer: "select" if i > 1 else "full" for i, spec in enumerate(specs)}
    return [
        ("full()", Reads(), False),
        (f"oracle, each layer's own {TOP}", Reads(everyone, TOP), True),
        ("anchors()", of("anchors()"), False),
        ("anchors(), sink=0, recent=0: the paper's", of("anchors()", **bare), False),
        ("the same anchors, no head map", of("anchors()", nearest={}), False),
        ("the same anchors, no head map, sink=0, recent=0", of("anchors()", nearest={}, **bare), False),
        ("evenly spaced", of(spaced), False),
        ("evenly spaced, no head map", of(spaced, nearest={}), False),
        ("evenly spaced, no head map, sink=0, recent=0", of(spaced, nearest={}, **bare), False),
        *((recipe, of(recipe), False) for recipe in others),
    ]


@contextmanager
def oracle() -> Iterator[None]:
    """Within it, a layer that picks reads what it has picked itself."""
    kept = engine_layer._step

    def step(session, store, group, queries, scaling, decoding, sinks, stored):  # type: ignore[no-untyped-def]
        if session.reads.roles.get(store.spec.layer) != "select":
            return kept(session, store, group, queries, scaling, decoding, sinks, stored)
        _, weights = attend_step(group, queries, scaling, True, sinks)
        return attend_picked(group, queries, scaling, pick(group, weights, TOP), False, sinks)[0]

    engine_layer._step = step
    try:
        yield
    finally:
        engine_layer._step = kept


def measure(
    model: Any, tokenizer: Any, context: int, seed: int, only: str, kept: Path | None, progress: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """What has been measured so far, after every row."""
    task = make_task(tokenizer, context, seed)
    base = filled(model, read(model, task.prefix, kept))
    specs = [store.spec for store in base.session.stores.values()]

    def fork(reads: Reads) -> Any:
        cache = base.fork()
        cache.session.reads = reads
        return cache

    exact, rows = None, []
    for name, reads, simulated in variants(specs):
        if only and only not in name and name != "full()":
            continue
        whole = [i for i, role in reads.roles.items() if role != "sparse"]
        with oracle() if simulated else contextmanager(lambda: iter([None]))():
            cache, logs = fork(reads), []
            for token in task.continuation.split(1, 1):
                logits = model(token, past_key_values=cache).logits
                logs.append(logits[0, -1].log_softmax(-1))
            answers = [_answer(model, tokenizer, question, fork(reads)) for question in task.questions]
        given = torch.stack(logs)
        exact = given if exact is None else exact
        rows.append({
            "reads": name, "simulated": simulated, "whole_layers": whole if reads.roles else None,
            "kl": max(0.0, float((exact.exp() * (exact - given)).sum(-1).mean())),
            "agreement": float((exact.argmax(-1) == given.argmax(-1)).float().mean()),
            "facts": sum(fact.answer in answer for fact, answer in zip(task.facts, answers)),
        })  # fmt: skip
        progress(f"{name}: {rows[-1]['kl']:.4f}")
        yield {"context": context, "seed": seed, "tokens": task.continuation.shape[1], "rows": rows}


def read(model: Any, prefix: torch.Tensor, kept: Path | None) -> list[torch.Tensor]:
    """Keys and values of each layer, `[2, kv_head, token, head_dim]`."""
    if kept is not None and kept.is_file():
        found = torch.load(kept)
        assert torch.equal(found["prefix"], prefix), f"{kept} is of another document"
        return list(found["layers"])
    cache = DynamicCache(config=model.config)
    for piece in prefix.split(2048, 1):
        model(piece, past_key_values=cache, logits_to_keep=1)
    layers = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    if kept is not None:
        torch.save({"prefix": prefix, "layers": layers}, kept)
    return list(layers)


def filled(model: Any, layers: Sequence[torch.Tensor]) -> Any:
    """A cache of `full()` with these keys and values."""
    cache = fivefold.compress(model, "full()")
    session, names = cache.session, ("kv_heads", "query_heads", "head_dim", "cap", "dtype", "device")
    with session.atomic():
        session.admit(1, layers[0].shape[2], None, None)
        for index, pair in enumerate(layers):
            store = session.deliver(index, {name: getattr(session.stores[index].spec, name) for name in names})
            for group in store.groups:
                store.append(group, *pair)
    return cache


def steps(model: Any, tokens: int, rounds: int = 30) -> dict[str, Any]:
    """Time of a step behind so many tokens."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    shape = 2, config.num_key_value_heads, tokens, config.head_dim
    base = filled(model, [torch.randn(shape, generator=generator) for _ in range(config.num_hidden_layers)])
    specs = [store.spec for store in base.session.stores.values()]
    recipes, caches, times = ("full()", "anchors()", "anchors(anchors=7)", "tidal(top=512)"), {}, {}
    for recipe in recipes:
        caches[recipe], times[recipe] = base.fork(), []
        caches[recipe].session.reads = Reads.of(Recipe.parse(recipe).get("reads"), specs)
    for _ in range(rounds):
        for recipe, cache in caches.items():
            begin = time.process_time()
            model(torch.tensor([[7]]), past_key_values=cache)
            times[recipe].append(time.process_time() - begin)
    full = statistics.median(times["full()"][2:])
    rows = [{"reads": recipe, "cpu_ms": statistics.median(some[2:]) * 1e3} for recipe, some in times.items()]
    return {"tokens": tokens, "rows": [{**row, "x_full": row["cpu_ms"] / full / 1e3} for row in rows]}


def main(
    context: Annotated[list[int] | None, typer.Option()] = None,
    seed: int = 0,
    only: str = "",
    kept: Annotated[Path | None, typer.Option("--keep")] = None,
    step: Annotated[list[int] | None, typer.Option("--steps")] = None,
    out: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    model, tokenizer = embedded.load()
    console, runs = Console(), []

    before = json.loads(out.read_text())["runs"] if only and out is not None and out.is_file() else []

    def keep(run: dict[str, Any]) -> None:
        """With what an earlier run has measured."""
        new, others = {row["reads"] for row in run["rows"]}, []
        for one in before:
            if all(one.get(name) == run.get(name) for name in ("context", "seed", "steps")):
                run = {**run, "rows": [row for row in one["rows"] if row["reads"] not in new] + run["rows"]}
            else:
                others.append(one)
        if out is not None:
            made = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "runs": [*others, *runs, run]}
            out.write_text(json.dumps(made, indent=2) + "\n")

    if step:
        torch.set_num_threads(1)
    for length in step or context or [7_000]:
        with torch.inference_mode():
            if step:
                run = steps(model, length)
                table = Table(
                    "what is read", ">CPU ms", ">x full()", title=f"a step behind {length} tokens, one thread"
                )
                for row in run["rows"]:
                    table.add_row(row["reads"], f"{row['cpu_ms']:.0f}", f"{row['x_full']:.2f}")
            else:
                for run in measure(model, tokenizer, length, seed, only, kept, Console(stderr=True).print):
                    keep(run)
                table = Table(
                    "what is read", ">KL", ">top-1", ">facts", title=f"SmolLM2-135M, float32, {length} tokens"
                )
                for row in run["rows"]:
                    facts = f"{row['facts']} of 3"
                    table.add_row(row["reads"], f"{row['kl']:.4f}", f"{row['agreement']:.2f}", facts)
        keep(run)
        runs.append(run)
        console.print(table, crop=False)


if __name__ == "__main__":
    typer.run(main)
