"""Every method through every suite: what docs/results.md is made of.

python benchmarks/sweep_all.py FOLDER --samples 12 --limit 460
python benchmarks/results_table.py FOLDER/results.json

Several processes share one GPU, since a model as small as the embedded one leaves it idle between launches; with --gpus
they are spread over several. Finished pieces are kept in FOLDER/rows.jsonl: the same command goes on where another one
was stopped, by --limit (seconds) or a kill. FOLDER/results.json sums up the recipes that are complete, and
FOLDER/seconds.json says what took how long. When all is done one process times decoding steps, with the GPU for itself
(FOLDER/steps.json).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing as mp
import os
import queue
import time
import warnings
from pathlib import Path
from typing import Any

GATES = 'retrieval="duo-gates-llama-l30-q9-kv3-d64-v49152"'
# Methods that look at every step come first: they take longest.
RECIPES = (
    "h2o(keep={0.5,0.2})", "keyformer(keep=0.2)", "d2o(keep=0.2)", "elastic(keep=0.2)", "snapkv(keep=0.2)",
    "random(keep=0.2)", "tidal()", "anchors()", "anchors() + kivi(bits=4)",
    "duo(keep=0.34) + tidal() + rotatekv(bits=4)", "duo(keep=0.34) + anchors() + rotatekv(bits=4)", "razor(least=256)",
    "razor(least=256) + kivi(bits=4)", "mikv(high=8, low={4,2})", "gear(bits={4,2})", "rotatekv(bits={4,3,2})",
    "cskv(keep=0.2)", "cskv(keep=0.2, bits=4)", "kv_heads(keep={0.5,0.25})", "minicache()",
    "minicache() + kivi(bits=4)", "budget(bytes=0.1)", "kivi(bits={8,4,2})", "streaming()",
    "streaming() + kivi(bits=4)", "duo(keep={0.34,0.15})",
    "duo(keep={0.34,0.15}, GATES)", "duo(keep=0.34) + kivi(bits={4,2})", "duo(keep=0.34) + rotatekv(bits={4,2})",
    "drop(layers={1,4,8})", "drop(layers=4) + duo(keep=0.34) + kivi(bits=4)",
)  # fmt: skip
BASE = "full()"
FIDELITY = "fidelity"
PER_JOB = 4
"""Recipes that a job measures."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--model", help="a folder, or a name of the hub; the embedded one if not given")
    parser.add_argument("--batch", type=int, help="texts measured together; all of a suite if not given")
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--gpus", type=int, default=1, help="that the processes are spread over")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no more is begun")
    parser.add_argument("--grace", type=float, default=60, help="seconds beyond it in which steps are timed")
    parser.add_argument("--recipe", action="append", help="with braces, may be repeated; all if not given")
    parser.add_argument("--suites", help="names with commas between; all if not given")
    args = parser.parse_args()
    args.start = time.time()
    args.folder.mkdir(parents=True, exist_ok=True)
    args.batch = args.batch or args.samples
    sweep = Sweep(args)  # its processes import and load while this one does
    sweep.prepare(_spelled(args.recipe or RECIPES), args.suites.split(",") if args.suites else _suites())
    sweep.run()


def _spelled(texts: Any) -> list[str]:
    from fivefold.evaluate.sweep import recipes

    return list(recipes([text.replace("GATES", GATES) for text in (BASE, *texts)], braces=True))


def _suites() -> list[str]:
    from fivefold.evaluate.engine import suite_lines

    return list(suite_lines())


def _parts(recipes: list[str], size: int) -> list[list[str]]:
    return [recipes[at : at + size] for at in range(0, len(recipes), size)]


class Sweep:
    """The process that hands out jobs (recipes, suite) to those that hold the model."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        context = mp.get_context("spawn")
        self.jobs: Any = context.Queue()
        self.done: Any = context.Queue()
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.workers = [
            context.Process(target=work, args=(number, args, self.jobs, self.done), daemon=True)
            for number in range(args.processes)
        ]
        for worker in self.workers:
            worker.start()
        self.open = 0

    def prepare(self, recipes: list[str], suites: list[str]) -> None:
        """What is to be done."""
        from fivefold.recipe import Recipe

        self.recipes, self.suites = recipes, suites
        rest = [recipe for recipe in recipes if recipe != BASE]
        slow = [recipe for recipe in rest if any(method.by_step for method in Recipe.parse(recipe).methods)]
        # What is measured in steps takes long in fidelity. The exact cache's rows of a suite are what its jobs need.
        self.waiting = {suite: _parts(rest, PER_JOB) for suite in suites}
        if FIDELITY in suites:
            quick = [recipe for recipe in rest if recipe not in slow]
            self.waiting[FIDELITY] = [*_parts(slow, 1), *_parts(quick, PER_JOB)]

    def run(self) -> None:
        args, failed = self.args, []
        ready = [([BASE], suite) for suite in self.suites]
        while self.open or ready:
            # No more jobs in the queue than processes, so that a limit is kept.
            while ready and self.open < args.processes and time.time() - args.start < args.limit:
                self.jobs.put(ready.pop(0))
                self.open += 1
            if not self.open:
                break
            try:
                recipes, suite, seconds, error = self.done.get(timeout=1)
            except queue.Empty:
                dead = [worker for worker in self.workers if not worker.is_alive()]
                if len(dead) == len(self.workers):
                    raise SystemExit("every process has died: see above.") from None
                if dead and time.time() - args.start > args.limit + 60:
                    break
                continue
            self.open -= 1
            print(
                f"{time.time() - args.start:6.1f} s: {suite} of {', '.join(recipes)} in {seconds:.1f} s{error}",
                flush=True,
            )
            if error:
                failed.append((recipes, suite, error))
            if recipes == [BASE] and not error:
                more = [(part, suite) for part in self.waiting.pop(suite)]
                # Fidelity takes longest, so it goes first.
                ready = more + ready if suite == FIDELITY else ready + more
        begun = sum(1 for _ in (args.folder / "rows.jsonl").open())
        print(f"{begun} pieces are kept after {time.time() - args.start:.0f} s; {len(ready)} jobs are left", flush=True)
        self.jobs.put((None, self.recipes, self.suites))
        try:
            print(self.done.get(timeout=args.grace + 120))
        except queue.Empty:
            print("no summary came in time")
        for worker in self.workers:
            worker.terminate()
        if failed:
            raise SystemExit(f"{len(failed)} jobs failed: {failed}")


def work(number: int, args: argparse.Namespace, jobs: Any, done: Any) -> None:
    """A process with the model: jobs (recipes, suite), until the last, of three parts, asks for the summary."""
    if args.gpus > 1:  # before torch is there
        seen = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(args.gpus)))).split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = seen[number % args.gpus]
    import torch

    from fivefold.cli.models import load_model
    from fivefold.evaluate import engine

    torch.set_num_threads(1)
    model, tokenizer = load_model(args.model, args.dtype, args.device)
    print(f"{time.time() - args.start:6.1f} s: process {number} has the model on {model.device}", flush=True)
    while len(job := jobs.get()) == 2:
        recipes, suite = job
        start, error = time.perf_counter(), ""
        try:
            plan = engine.Plan(tuple(recipes), (suite,), (args.context,), args.samples)
            engine.run(model, tokenizer, plan, args.folder / "rows.jsonl", batch=args.batch)
        except Exception as caught:
            error = f" FAILED: {type(caught).__name__}: {caught}"
        if model.device.type == "cuda":
            torch.cuda.empty_cache()  # others are here too
        done.put((recipes, suite, time.perf_counter() - start, error))
    try:
        _, args.recipes, args.suites = job
        done.put(summary(args, engine, model, tokenizer))
    except Exception as caught:
        done.put(f"the summary FAILED: {type(caught).__name__}: {caught}")


class Lacking(Exception):
    """A piece is not there yet."""


def summary(args: argparse.Namespace, engine: Any, model: Any, tokenizer: Any) -> str:
    """Sum up the recipes that are complete; returns what to say of it."""
    results = engine.Results(args.folder / "rows.jsonl")
    tables = args.folder / "results.json"

    def run(recipes: tuple[str, ...]) -> dict[str, Any]:
        def progress(done: int, total: int, what: str) -> None:
            if what:
                raise Lacking

        plan = engine.Plan(recipes, tuple(args.suites), (args.context,), args.samples)
        return engine.run(model, tokenizer, plan, results, progress, batch=args.batch)

    complete = []
    for recipe in args.recipes:
        try:
            run((recipe,))
        except Lacking:
            continue
        complete.append(recipe)
    if not complete:
        return "no recipe is complete yet"
    took: dict[str, dict[str, float]] = {}
    for row in results.rows.values():
        of = took.setdefault(row["recipe"], {})
        of[row["suite"]] = of.get(row["suite"], 0) + row["seconds"]
    alone = "beside other work"
    if steps := quiet_steps(args, engine, model, tokenizer, complete):
        alone = "of one sequence, alone on the device, as a CUDA graph where the recipe has one"
        for row in results.rows.values():
            if "decode_ms" in row and row["recipe"] in steps:
                row["decode_ms"] = steps[row["recipe"]]
    result = run(tuple(complete))
    result["environment"]["decode"] = alone
    for cell in result["cells"]:
        del cell["rows"]  # they are in rows.jsonl
    tables.write_text(json.dumps(result, indent=1, allow_nan=False))
    (args.folder / "seconds.json").write_text(json.dumps(took, indent=1))
    slow = sorted(((sum(of.values()), recipe) for recipe, of in took.items()), reverse=True)[:6]
    named = ", ".join(f"{recipe} {seconds:.1f} s" for seconds, recipe in slow)
    return (
        f"{len(complete)} of {len(args.recipes)} recipes are complete, in {tables}; decoding steps {alone}; slowest: "
        f"{named}"
    )


def quiet_steps(
    args: argparse.Namespace, engine: Any, model: Any, tokenizer: Any, recipes: list[str]
) -> dict[str, float] | None:
    """Milliseconds of a decoding step by recipe, the exact cache's too: taken when nothing else runs here, and kept.
    None if there was no time for all of them."""
    kept = args.folder / "steps.json"
    found: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    with contextlib.suppress(Exception):
        for recipe in (engine.EXACT, *recipes):
            if recipe not in found:
                if time.time() - args.start > args.limit + args.grace:
                    return None
                found[recipe] = step_ms(engine, model, tokenizer, recipe, args.context)
                kept.write_text(json.dumps(found, indent=1))
        return found
    return None


def step_ms(engine: Any, model: Any, tokenizer: Any, recipe: str, context: int, steps: int = 20) -> float:
    """Median milliseconds of a step of one sequence behind `context` tokens."""
    import torch
    from transformers import DynamicCache

    from fivefold.api import compress, restore
    from fivefold.evaluate.demo import make_task

    restore(model)
    warnings.simplefilter("ignore")  # a step that is no graph says so
    cuda = model.device.type == "cuda"
    exact = recipe == engine.EXACT
    cache: Any = DynamicCache(config=model.config) if exact else compress(model, recipe, cuda_graph=cuda)
    times = []
    with torch.inference_mode():
        prefix = make_task(tokenizer, context).prefix.to(model.device)
        token = model(prefix, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        for _ in range(steps + 4):
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            token.item()  # waits for the device
            times.append((time.perf_counter() - start) * 1e3)
    restore(model)
    return sorted(times[4:])[steps // 2]


if __name__ == "__main__":
    main()
