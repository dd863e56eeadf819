"""What `fivefold plan` predicts, measured on a GPU: constants, decoding steps, prompts, changes of sessions, memory.

    python benchmarks/plan_gpu.py benchmarks/results/plan_h100.json --only measure --only short --minutes 9
    python benchmarks/plan_gpu.py benchmarks/results/plan_h100.json --only steps-8b --minutes 9
    python benchmarks/plan_gpu.py benchmarks/results/plan_h100.json --fit src/fivefold/plan/machines.json
    python benchmarks/plan_gpu.py benchmarks/results/plan_h100.json --compare

Each row is written as soon as it is measured, and what the file holds already is not measured again: what is broken off
is gone on with by the same command. A row that says `earlier` was timed before the kernels were as they are; it counts
for memory alone. Constants are fitted on steps (with 32 and with 8 layers), prompts and changes of
sessions of Llama-3-8B's shape, and checked on Llama-3.2-1B's. `--fit` and `--compare` need no GPU; what `--compare`
prints, it leaves in the file too. `--only prompts-kernels` measures a prompt's attention anew, `--only weights` what
products read, `--only launches` and `own-launches` what the host takes for a chunk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fivefold.benchmark import capacity, decode, machine
from fivefold.plan import fit, measure, reading
from fivefold.plan import time as plan_time
from fivefold.plan.machine import Machine, find_machine

RECIPES = ("full()", "kivi(bits=4)", "kivi(bits=2)", "duo(keep=0.5) + kivi(bits=2)")
CONTEXTS = (4096, 32768, 131072, 524288)
BATCHED = (4096, 32768)
EIGHT, ONE = "llama-3-8b", "llama-3.2-1b"
SHAPES = {"steps-8b": (EIGHT, None), "steps-1b": (ONE, None), "short": (EIGHT, 8)}
PROMPTS = ((1024, None), (4096, None), (32768, None), (32768, 8192), (131072, 8192), (32768, 2048))
OWN = ((32768, 8192), (32768, 2048))  # by the model's own code
SWITCHED = (4096, 16384, 32768, 131072)  # of full() of the 8B shape: 0.5, 2, 4 and 17 GB
PIECES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "prompts-kernels": ("prompts", reading.prompts), "weights": ("weights", measure.weights),
    "attention": ("attention", measure.attention), "host-steps": ("host steps", measure.host_steps),
    "launches": ("launches", reading.launches), "own-launches": ("own launches", partial(reading.launches, own=True)),
}  # fmt: skip
PARTS = ("measure", *PIECES, "short", "steps-8b", "steps-1b", "prefill-8b", "prefill-1b", "switch")
STEPS = 40
SETS = 3
"""How often short rows are timed, some minutes apart."""
SHORT = 8e-3
"""Seconds: the host has a large part in shorter steps."""
SHORT_PROMPT = 0.2
"""The same of prompts."""
CHUNK = 8192
"""The smallest chunks of a prompt from which a GPU, and not the host, sets the pace."""
Key = tuple[Any, ...]


class Results:
    """The file of results, and what is in it."""

    def __init__(self, path: Path, minutes: float | None = None) -> None:
        self.path = path
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": []}
        self.done = {self.key(row) for row in self.found["rows"]}
        self.like: dict[Key, int] = {}
        """The largest batches that are tried first."""

    @staticmethod
    def key(row: dict[str, Any]) -> Key:
        return tuple(row.get(name) for name in ("what", "model", "layers", "recipe", "context", "size", "chunk", "own"))

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")

    def end_in_time(self) -> None:
        """End the program where the time is over."""
        if self.end is not None and time.monotonic() > self.end:
            self.save()
            print("time is over: go on with the same command", flush=True)
            sys.exit(0)

    def wants(self, row: dict[str, Any]) -> bool:
        """Whether there is no such row yet."""
        self.end_in_time()
        return self.key(row) not in self.done

    def add(self, row: dict[str, Any], call: Callable[[], dict[str, Any]]) -> None:
        """Measure a row, and write it; running out of memory is a result too."""
        start = time.perf_counter()
        try:
            row = {**row, **call()}
        except torch.OutOfMemoryError:
            row = {**row, "error": "out of memory"}
        row["took"] = time.perf_counter() - start
        machine.tidy(machine.device())
        self.found["rows"].append(row)
        self.done.add(self.key(row))
        self.found.update(machine.stamp())
        self.save()
        said = {k: round(x, 4) if isinstance(x, float) else x for k, x in row.items() if not isinstance(x, dict | list)}
        print(said, flush=True)


def build(name: str, layers: int | None) -> tuple[Any, dict[str, Any], dict[str, int]]:
    """A model, its shape, and the device's memory then."""
    shape = dict(decode.SHAPES[name])
    if layers is not None:
        shape["num_hidden_layers"] = layers
    before = measure.memory()
    model = decode.build(shape, machine.device())
    after = measure.memory()
    print(f"{name}: {after['allocated'] - before['allocated']:,} bytes of weights", flush=True)
    return model, shape, after


def steps(results: Results, part: str, cpu: bool) -> None:
    """Decoding steps: alone at all contexts, then the largest batch that fits, and one in between."""
    name, layers = SHAPES[part]
    contexts, batched = (CONTEXTS, BATCHED) if not cpu else ((256,), (256,))
    if part == "short":
        contexts, batched = contexts[:2], contexts[:1]
    wanted = [(context, "alone", False) for context in contexts]
    wanted += [(batched[-1], "eight", False), (contexts[0], "alone", True), (batched[-1], "eight", True)]
    wanted += [(contexts[0], "middle", False), *((context, "largest", False) for context in batched)]
    built = cache(lambda: build(name, layers))
    for context, size, own in wanted:
        for recipe in RECIPES if not own else RECIPES[:2]:
            row = {"what": "step", "model": name, "layers": layers, "recipe": recipe, "context": context, "size": size}
            row |= {"own": True} if own else {}
            if results.wants(row):
                model, shape, before = built()
                results.add({**row, "before": before}, lambda: one_step(results, row, model, shape, cpu))  # noqa: B023
    again(
        results,
        lambda row: (row["what"], row["model"], row.get("layers")) == ("step", name, layers) and row["batch"] <= 8,
        lambda row: measure.timed_step(
            *built()[:2], row["recipe"], row["context"], row["batch"], STEPS, bool(row.get("own"))
        ),
        SHORT,
    )
    model = None
    built.cache_clear()
    machine.tidy(machine.device())


@torch.inference_mode()
def again(
    results: Results,
    which: Callable[[dict[str, Any]], bool],
    call: Callable[[dict[str, Any]], dict[str, Any]],
    short: float,
) -> None:
    """Time rows of less than `short` seconds `SETS` times in all, the least of which counts: a machine's host is shared
    with others, and some seconds long it may be much slower."""
    rows = [row for row in results.found["rows"] if "error" not in row and which(row) and row["seconds"] < short]
    for sets in range(2, SETS + 1):
        for row in rows:
            if row.get("sets", 1) >= sets:
                continue
            results.end_in_time()
            more = call(row)
            times = row.setdefault("turns", [row["seconds"]])
            times.extend(more.get("turns", [more["seconds"]]))
            row["sets"] = sets
            if more["seconds"] < row["seconds"]:
                row |= {key: more[key] for key in ("seconds", "ms", "mean_ms", "tokens_s") if key in more}
            machine.tidy(machine.device())
        results.save()


@torch.inference_mode()
def one_step(results: Results, row: dict[str, Any], model: Any, shape: dict[str, Any], cpu: bool) -> dict[str, Any]:
    recipe, context, batch = row["recipe"], row["context"], 1
    room = capacity.room(machine.device(), None)
    # What a cache takes is known from the row of a sequence alone.
    alone = {**row, "size": "alone"}
    known = next((one for one in results.found["rows"] if Results.key(one) == Results.key(alone)), None)
    if row["size"] == "alone":
        width = shape["num_key_value_heads"] * (shape["hidden_size"] // shape["num_attention_heads"])
        per_token = 2 * 2 * width * shape["num_hidden_layers"]
        if recipe == "full()" and context * per_token > 1.02 * room and not cpu:
            raise torch.OutOfMemoryError
    elif row["size"] == "eight":
        batch = 8
    elif known is not None and "report" in known:
        report = known["report"]
        one = sum(report.get(kind, 0) for kind in ("exact", "codes", "scales", "slack", "tables"))
        batch = min(room // one, 1024) if not cpu else 3
        if row["size"] == "middle":
            batch = max(2, batch // 3)
        elif not cpu:
            like = results.like.get(Results.key(row))
            batch = like or capacity.likely_batch(model, recipe, context, batch)
    else:
        return {"error": "no row of a sequence alone"}
    while True:
        try:
            steps, own = STEPS if not cpu else 3, bool(row.get("own"))
            found = measure.timed_step(model, shape, recipe, context, batch, steps, own)
            break
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            machine.tidy(machine.device())
            batch -= max(1, batch // 25)
    return found


def prompts(results: Results, part: str, cpu: bool) -> None:
    name = EIGHT if part == "prefill-8b" else ONE
    built = cache(lambda: build(name, None))
    wanted = [(*one, False) for one in (PROMPTS if not cpu else ((256, None), (256, 128)))]
    for context, chunk, own in [*wanted, *((*one, True) for one in (OWN if not cpu else ()))]:
        for recipe in RECIPES if not own and context < 65536 else RECIPES[:2]:
            row = {"what": "prompt", "model": name, "recipe": recipe, "context": context, "chunk": chunk}
            row |= {"own": True} if own else {}
            if results.wants(row):
                turns = 3 if context < 65536 else 1
                given = *built()[:2], recipe, context, chunk, turns, own
                results.add(row, lambda: reading.timed_prompt(*given))  # noqa: B023
    again(
        results,
        lambda row: (row["what"], row["model"]) == ("prompt", name),
        lambda row: reading.timed_prompt(
            *built()[:2], row["recipe"], row["context"], row["chunk"], 3, bool(row.get("own"))
        ),
        SHORT_PROMPT,
    )
    given = None
    built.cache_clear()
    machine.tidy(machine.device())


@torch.inference_mode()
def switches(results: Results, cpu: bool) -> None:
    model = None
    for recipe in ("full()", "kivi(bits=4)"):
        for context in SWITCHED if not cpu else (256,):
            row = {"what": "switch", "model": EIGHT, "recipe": recipe, "context": context}
            if not results.wants(row):
                continue
            if model is None:
                model, *_ = build(EIGHT, None)
            results.add(row, lambda: measure.switched(model, row["recipe"], row["context"]))  # noqa: B023
    model = None
    machine.tidy(machine.device())


def fit_file(results: Results, out: Path) -> None:
    """Write the machine of the results into a file of machines, with what whole steps, prompts and changes of sessions
    of the 8B shape alone say."""
    before = results.found["constants"]
    base = measure.constants(results.found["measured"], before["name"], before["date"])
    results.found["constants"] = base.as_dict()
    rows = [row for row in results.found["rows"] if row["model"] == EIGHT and "error" not in row]
    rows = [row for row in rows if not row.get("earlier")]
    steps = [fit.Row.from_dict(row) for row in rows if row["what"] == "step"]
    if len({len(row.model.layers) for row in steps if not row.own}) == 1:
        # Another number of layers tells what a layer takes from what a step does.
        more = [row for row in results.found["rows"] if row["model"] == ONE and row["what"] == "step"]
        steps += [row for row in map(fit.Row.from_dict, more) if not row.own]
    # Smaller chunks wait for the host, whose speed is not the GPU's.
    prompts = [fit.Prompt.from_dict(row) for row in rows if row["what"] == "prompt"]
    large = [row for row in prompts if min(row.chunk or row.tokens, row.tokens) >= CHUNK]
    fitted = fit.fit_prompts(large, fit.fit_steps(steps, base))
    fitted = fit.fit_switch([row for row in rows if row["what"] == "switch"], fitted)
    fitted = replace(fitted, source="benchmarks/plan_gpu.py, fitted on Llama-3-8B's shape", measured=True)
    known = json.loads(out.read_text())
    name = find_machine(fitted.name).name
    index = next(i for i, one in enumerate(known["machines"]) if one["name"] == name)
    own = {"name": name, "aliases": known["machines"][index].get("aliases", [])}
    known["machines"][index] = {**fitted.as_dict(), **own}
    out.write_text(json.dumps(known, indent=1) + "\n")
    print(json.dumps(known["machines"][index], indent=1))
    compare(results, fitted)


def predictions(rows: Iterable[dict[str, Any]], using: Machine) -> Iterator[tuple[str, dict[str, Any], float, float]]:
    """Kind, row, and predicted and measured seconds."""
    for row in rows:
        if "error" in row or row.get("earlier"):
            continue
        if row["what"] == "step":
            timed = fit.Row.from_dict(row)
            one = plan_time.step(timed.model, using, timed.batch, timed.reads, own=timed.own)
            assert one is not None
            kind = "steps alone" if row["batch"] == 1 else "steps in batches"
            yield kind + ", the model's own code" * timed.own, row, one.seconds, row["seconds"]
        elif row["what"] == "prompt":
            chunk = row["chunk"]
            kind = "at once" if chunk is None else f"in chunks of {chunk:,}"
            kind += ", the model's own code" if row.get("own") else ""
            yield f"prompts {kind}", row, fit.Prompt.from_dict(row).predicted(using), row["seconds"]
        elif row["what"] == "switch":
            packed = row["recipe"] != "full()"
            there = plan_time.switch(using, row["bytes"], packed=packed, back=False).seconds
            both = plan_time.switch(using, row["bytes"], packed=packed).seconds
            yield "to the host", row, there, row["offload_s"]
            yield "from the host", row, both - there, row["restore_s"]


def compared(rows: Iterable[dict[str, Any]], using: Machine) -> dict[str, Any]:
    """Each row's prediction, and by kind and model how many there are and the worst and the median error."""
    out: list[dict[str, Any]] = []
    for kind, row, predicted, measured in predictions(rows, using):
        own = {name: row[name] for name in ("model", "layers", "recipe", "context", "batch", "chunk") if row.get(name)}
        out.append(
            {"kind": kind, **own, "predicted": predicted, "measured": measured, "error": predicted / measured - 1}
        )
    errors: dict[str, dict[str, Any]] = {}
    for kind, model in dict.fromkeys((row["kind"], row["model"]) for row in out):
        found = sorted((row["error"] for row in out if (row["kind"], row["model"]) == (kind, model)), key=abs)
        middle = statistics.median(map(abs, found))
        errors.setdefault(kind, {})[model] = {"rows": len(found), "worst": found[-1], "median": middle}
    return {"machine": using.source, "errors": errors, "rows": out}


def compare(results: Results, using: Machine) -> None:
    """Print each row's error, and the worst of each kind, and leave them in the file."""
    found = results.found["compared"] = compared(results.found["rows"], using)
    for row in found["rows"]:
        said = f"{row['model']} {row['recipe']} {row['context']:,}"
        said += f" x {row['batch']}" if "batch" in row else ""
        said += f", {row['layers']} layers" if "layers" in row else ""
        times = f"{row['predicted'] * 1000:10.2f} ms, measured {row['measured'] * 1000:10.2f}: {row['error']:+.1%}"
        print(f"{row['kind']:24} {said:60} {times}")
    for kind, models in found["errors"].items():
        for model, one in models.items():
            print(f"{kind}, {model}: {one['rows']} rows, worst {one['worst']:+.1%}, median {one['median']:.1%}")
    results.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--have", type=Path, help="begin with the rows of this file")
    parser.add_argument("--like", type=Path, help="the largest batches are those of this file, where they fit")
    parser.add_argument("--only", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--minutes", type=float, help="begin no row after so many")
    parser.add_argument("--compare", action="store_true", help="predicted against measured")
    parser.add_argument("--machine", help="by the constants of this one; default: the shipped ones of the file's GPU")
    parser.add_argument("--fit", type=Path, metavar="MACHINES", help="write the constants into this file")
    given = parser.parse_args()
    results = Results(given.file, given.minutes)
    if given.like is not None:
        rows = json.loads(given.like.read_text())["rows"]
        results.like = {Results.key(row): row["batch"] for row in rows if "batch" in row}
    if given.have is not None and not given.file.is_file():
        results.found = json.loads(given.have.read_text())
        results.done = {Results.key(row) for row in results.found["rows"]}
    if given.fit is not None:
        fit_file(results, given.fit)
        return
    if given.compare:
        compare(results, find_machine(given.machine or results.found["constants"]["name"]))
        return
    cpu = machine.device().type == "cpu"
    if cpu:  # to try the script
        decode.SHAPES[EIGHT] = decode.SHAPES[ONE] = {**decode.SHAPES["small"], "vocab_size": 64}
        SHAPES["short"] = (EIGHT, 2)
        measure.memory = lambda: {"allocated": 0}  # type: ignore[assignment]
        capacity.room = lambda *_: 1 << 22  # type: ignore[assignment]
    for part in given.only or PARTS:
        if part == "measure":
            if "constants" not in results.found:
                found, raw = measure.measure(progress=lambda name: print(name, time.strftime("%X"), flush=True))
                results.found.update(machine.stamp(), constants=found.as_dict(), measured=raw)
                results.save()
        elif part in PIECES:
            if given.only and "measured" in results.found:  # `measure` has measured it too
                name, call = PIECES[part]
                found = results.found["measured"][name] = call(machine.device())
                results.save()
                print(json.dumps(found), flush=True)
        elif part in SHAPES:
            steps(results, part, cpu)
        elif part == "switch":
            switches(results, cpu)
        else:
            prompts(results, part, cpu)


if __name__ == "__main__":
    main()
