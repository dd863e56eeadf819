"""Runs recipes through suites, one stored row per finished piece of work.

A piece is (recipe, suite, context, sample). Finished rows are appended to a JSON-lines file under a key that changes
with everything that changes a result, so that a run that was broken off, even by SIGKILL, goes on where it stopped,
and an edited method is measured anew. The exact cache (transformers' `DynamicCache`) is measured as a recipe too.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fivefold.api import compress, restore
from fivefold.calibrate.profile import signature
from fivefold.errors import InputError
from fivefold.evaluate import fidelity
from fivefold.evaluate.demo import make_task
from fivefold.evaluate.intervals import bootstrap, wilson
from fivefold.evaluate.score import answer, twin
from fivefold.evaluate.tasks import settings, tasks
from fivefold.recipe import Recipe

EXACT = "DynamicCache"
FIDELITY = "fidelity"
CONTINUATION, FREE = 256, 32
DEFAULT_RECIPES = ("full()", "kivi(bits=4)", "kivi(bits=2)", "streaming()", "duo(keep=0.34)")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be measured. suites: names of tasks, or "fidelity"."""

    recipes: tuple[str, ...] = DEFAULT_RECIPES
    suites: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (2048,)
    samples: int = 2
    seed: int = 0

    def check(self, model: Any) -> None:
        """Raise `RecipeError` or `InputError` if a part of it cannot be run on the model."""
        for recipe in self.recipes:
            Recipe.parse(recipe)
        known = suite_lines()
        for suite in self.suites:
            if suite not in known:
                raise InputError(f"there is no suite {suite!r}: use {', '.join(known)}.")
        longest = getattr(model.config, "max_position_embeddings", None)
        for context in self.contexts:
            if context < 1:
                raise InputError(f"a context of {context} tokens is none: use at least 256.")
            if longest is not None and context + 2 * CONTINUATION > longest:
                raise InputError(
                    f"a context of {context} tokens is too long here: use at most {longest - 2 * CONTINUATION}."
                )
        if self.samples < 1:
            raise InputError(f"{self.samples} samples measure nothing: use at least 1.")


def suite_lines() -> dict[str, str]:
    """Every suite with what it measures, in a line."""
    lines = {FIDELITY: "real text: KL, top-1 and top-5 agreement, perplexity, first greedy token that differs"}
    return lines | {name: cls.line for name, cls in tasks().items()}


class Results:
    """Finished rows by key, in a JSON-lines file that is only ever appended to. A torn last line is ignored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                for line in path.read_text(errors="replace").splitlines():
                    try:
                        entry = json.loads(line)
                        self.rows[entry["key"]] = entry["row"]
                    except (ValueError, KeyError, TypeError):
                        continue
            with path.open("a") as file:
                # A line that a kill tore must not swallow the next one.
                if file.tell() and not path.read_bytes().endswith(b"\n"):
                    file.write("\n")
        except OSError as error:
            raise InputError(f"cannot keep results in {path}: {error.strerror or error}.") from None

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        with self.path.open("a") as file:
            file.write(json.dumps({"key": key, "row": row}) + "\n")
            file.flush()
            os.fsync(file.fileno())


@cache
def code_hash() -> str:
    """Of the package's own sources: an edited method is measured anew."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def environment(model: Any) -> dict[str, str]:
    """What results depend on beside the plan."""
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "signature": signature(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "code": code_hash(),
    }


def run(model: Any, tokenizer: Any, plan: Plan, store: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what is not yet in `store`, and sum it all up.

    Returns `{environment, plan, cells: [...]}`; each cell is one (recipe, suite, context) with its score, its interval
    and its rows. `progress(done, total, what)` is called before each piece.
    """
    plan.check(model)
    results = Results(store)
    base = environment(model)
    pieces = list(_pieces(plan))
    todo = []
    for recipe, suite, context, sample in pieces:
        key = _key(base, plan.seed, recipe, suite, context, sample)
        if key not in results.rows:
            todo.append((recipe, suite, context, sample, key))
    reference: tuple[tuple[int, int], fidelity.Reference] | None = None
    with torch.inference_mode():
        for number, (recipe, suite, context, sample, key) in enumerate(todo):
            if progress is not None:
                progress(number, len(todo), f"{suite} {context}: {recipe}")
            rng = random.Random(f"{plan.seed}/{suite}/{context}/{sample}")
            start = time.perf_counter()
            if suite == FIDELITY:
                task = make_task(tokenizer, context, rng.randrange(1 << 30), continuation=CONTINUATION)
                if recipe != EXACT and (reference is None or reference[0] != (context, sample)):
                    reference = ((context, sample), _fidelity(model, task, EXACT)[0])
                said, size = _fidelity(model, task, recipe)
                if recipe == EXACT:
                    reference = ((context, sample), said)
                assert reference is not None
                row = fidelity.compare(reference[1], said.logs, said.free, task.continuation)
            else:
                instance = tasks()[suite]()
                made = instance.make(tokenizer, context, rng)
                cache_ = _prefilled(model, recipe, torch.tensor([made.prefix], device=model.device))
                size = _bytes(cache_)
                row = {"questions": []}
                for question in made.questions:
                    given = answer(model, tokenizer, cache_, question, instance.kind)
                    row["questions"].append(
                        {
                            "question": question.text.strip(),
                            "answer": question.answer,
                            "said": given.said,
                            "score": given.score,
                            "chance": instance.chance(question),
                        }
                    )
                del cache_
            row |= {"bytes": size[0], "ratio": size[0] / size[1], "seconds": time.perf_counter() - start}
            results.add(key, row)
        if progress is not None:
            progress(len(todo), len(todo), "")
    restore(model)
    rows = {piece: results.rows[_key(base, plan.seed, *piece)] for piece in pieces}
    return {
        "environment": base,
        "plan": {
            "recipes": list(plan.recipes), "suites": list(plan.suites), "contexts": list(plan.contexts),
            "samples": plan.samples, "seed": plan.seed,
        },
        "cells": summarise(rows, plan),
    }  # fmt: skip


def _pieces(plan: Plan) -> Iterator[tuple[str, str, int, int]]:
    """In an order that lets recipes share the exact reference, and shows every recipe early."""
    for context in plan.contexts:
        for sample in range(plan.samples):
            for suite in plan.suites:
                for recipe in (EXACT, *plan.recipes):
                    yield recipe, suite, context, sample


def _key(base: dict[str, str], seed: int, recipe: str, suite: str, context: int, sample: int) -> str:
    canonical = recipe if recipe == EXACT else str(Recipe.parse(recipe))
    sizes = None if suite == FIDELITY else settings(tasks()[suite]())
    parts = [base, seed, canonical, suite, sizes, context, sample]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _prefilled(model: Any, recipe: str, prefix: torch.Tensor) -> Any:
    restore(model)
    if recipe == EXACT:
        from transformers import DynamicCache

        cache_: Any = DynamicCache(config=model.config)
    else:
        cache_ = compress(model, recipe)
    model(prefix, past_key_values=cache_, logits_to_keep=1)
    return cache_


def _bytes(cache_: Any) -> tuple[int, int]:
    """(bytes held, bytes of the exact cache)."""
    if hasattr(cache_, "report"):
        report = cache_.report()
        return report.total, report.exact_equivalent
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_.layers)
    return size, size


def _fidelity(model: Any, task: Any, recipe: str) -> tuple[fidelity.Reference, tuple[int, int]]:
    cache_ = _prefilled(model, recipe, task.prefix.to(model.device))
    size = _bytes(cache_)
    continuation = task.continuation.to(model.device)
    free = fidelity.run_free(model, twin(cache_), continuation[:, :1], FREE)
    return fidelity.Reference(fidelity.continued(model, cache_, continuation), free), size


def summarise(rows: dict[tuple[str, str, int, int], dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """One cell per (recipe, suite, context): score with a 95% interval, chance, bytes, and the rows themselves.

    Tasks scored right or wrong with one question a sample get a Wilson interval, the others a bootstrap over samples.
    `exact_fails` marks tasks that the exact model does no better at than chance: they say nothing about compression.
    """
    cells = []
    for context in plan.contexts:
        for suite in plan.suites:
            exact_fails = None
            for recipe in (EXACT, *plan.recipes):
                mine = [rows[recipe, suite, context, sample] for sample in range(plan.samples)]
                cell: dict[str, Any] = {
                    "recipe": recipe,
                    "suite": suite,
                    "context": context,
                    "ratio": sum(row["ratio"] for row in mine) / len(mine),
                    "seconds": sum(row["seconds"] for row in mine) / len(mine),
                }
                if suite == FIDELITY:
                    for name in ("kl", "top1", "top5", "perplexity", "exact_perplexity", "diverges"):
                        cell[name] = sum(row[name] for row in mine) / len(mine)
                    cell["score"] = cell["top1"]
                    cell["low"], cell["high"] = bootstrap([[row["top1"]] for row in mine])
                    cell["chance"] = 0.0
                else:
                    scores = [[q["score"] for q in row["questions"]] for row in mine]
                    flat = [score for group in scores for score in group]
                    cell["score"] = sum(flat) / len(flat)
                    cell["questions"] = len(flat)
                    cell["chance"] = _mean([q["chance"] for row in mine for q in row["questions"]])
                    if tasks()[suite].kind != "bits" and all(len(group) == 1 for group in scores):
                        cell["low"], cell["high"] = wilson(round(sum(flat)), len(flat))
                    else:
                        cell["low"], cell["high"] = bootstrap(scores)
                    if recipe == EXACT:
                        exact_fails = cell["low"] <= cell["chance"]
                    cell["exact_fails"] = exact_fails
                cell["rows"] = mine
                cells.append(cell)
    return cells


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
