"""Runs recipes through suites, one stored row per finished piece of work.

A piece is (recipe, suite, context, sample). Finished rows are appended to a JSON-lines file under a key that changes
with everything that changes a result, so that a run that was broken off, even by SIGKILL, goes on where it stopped,
and an edited method is measured anew. The exact cache (transformers' `DynamicCache`) is measured as a recipe too, and
first: a task that it does no better than chance says nothing about compression, and the recipes are spared it.

On a GPU the pieces of a recipe are measured together, and so are their questions and choices (`together.py`); each
gives what it gives alone. On a CPU they go one by one: two cores read two texts of 2,048 tokens in 7 s either way.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fivefold.api import compress, restore
from fivefold.errors import InputError
from fivefold.evaluate import demo, fidelity, jsonl, keys, layers, ruler
from fivefold.evaluate.score import Asked, answers
from fivefold.evaluate.summary import EXACT, FIDELITY, OWN, exact_fails, summarise
from fivefold.evaluate.tasks import Question, Sample, Task, settings, tasks
from fivefold.evaluate.tasks.base import Kind
from fivefold.evaluate.together import Room, eager, graphs_if_possible, grouped, twin
from fivefold.recipe import Recipe

CONTINUATION, FREE = 256, 32
DEFAULT_RECIPES = ("full()", "kivi(bits=4)", "kivi(bits=2)", "streaming()", "duo(keep=0.34)")

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """What is to be measured.

    suites: names of tasks, "fidelity", "jsonl:FILE", "ruler:KIND", or "ruler" for all of RULER's kinds, which stand in
    `suites` afterwards. contexts: tokens before the question; a file's texts are as long as they are, and all of it is
    used whatever `samples` says; of RULER, question and answer count too. lens: fidelity also looks at each layer
    through the logit lens. everything: recipes also run on tasks that the exact cache does no better than chance; on
    RULER they always run, since its figure is a mean over all kinds. ruler_data: a folder of RULER's own files, see
    `fivefold.evaluate.ruler.data`.
    """

    recipes: tuple[str, ...] = DEFAULT_RECIPES
    suites: tuple[str, ...] = ()
    contexts: tuple[int, ...] = (2048,)
    samples: int = 3
    seed: int = 0
    lens: bool = False
    everything: bool = False
    ruler_data: str | None = None
    files: dict[str, tuple[jsonl.Record, ...]] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        """Raises `RecipeError` or `InputError` if a part of it cannot be run on any model."""
        for recipe in self.recipes:
            Recipe.parse(recipe)
        known = suite_lines()
        object.__setattr__(self, "suites", ruler.expand(self.suites))
        if not self.recipes or not self.suites or not self.contexts:
            raise InputError("nothing is to be measured: give at least one recipe, one suite and one context.")
        for suite in self.suites:
            if suite.startswith(jsonl.PREFIX):
                self.files[suite] = jsonl.load(suite.removeprefix(jsonl.PREFIX))
            elif suite.startswith(ruler.PREFIX):
                ruler.settings(ruler.kind(suite, ruler.Data.of(self.ruler_data)))
            elif suite not in known:
                raise InputError(f"there is no suite {suite!r}: use {', '.join(known)}, {ruler.ALL}.")
        for context in self.contexts:
            if context < 1:
                raise InputError(f"a context of {context} tokens is none: use at least 256.")
        if self.samples < 1:
            raise InputError(f"{self.samples} samples measure nothing: use at least 1.")

    def check(self, model: Any, tokenizer: Any) -> None:
        """Raise `InputError` if a part of it cannot be run on the model."""
        longest = getattr(model.config, "max_position_embeddings", None)
        if longest is None:
            return
        made = [suite for suite in self.suites if suite not in self.files]
        # RULER's contexts leave room for the answer themselves.
        most = longest if all(suite.startswith(ruler.PREFIX) for suite in made) else longest - 2 * CONTINUATION
        for context in self.contexts:
            if context > most:
                raise InputError(f"a context of {context} tokens is too long here: use at most {most}.")
        for suite, records in self.files.items():
            for record in records:
                tokens = len(_ids(tokenizer, record.context)) + CONTINUATION
                if tokens > longest:
                    raise InputError(
                        f"line {record.line} of {suite.removeprefix(jsonl.PREFIX)!r}: its context and a question need "
                        f"about {tokens} tokens, and the model takes {longest}: shorten it."
                    )

    def places(self) -> list[tuple[int, str]]:
        """(context, suite) in order; the context of a file is `OWN`."""
        made = [suite for suite in self.suites if suite not in self.files]
        return [(context, suite) for context in self.contexts for suite in made] + [
            (OWN, suite) for suite in self.files
        ]

    def task(self, suite: str, sample: int = 0) -> Task:
        """What makes the texts of a suite that is no file and not fidelity."""
        if suite.startswith(ruler.PREFIX):
            return ruler.kind(suite, ruler.Data.of(self.ruler_data), sample)
        return tasks()[suite]()

    def about(self, suite: str) -> dict[str, str]:
        """What a suite measures: `{line, kind, source}`."""
        if suite == FIDELITY:
            return {"line": suite_lines()[FIDELITY], "kind": FIDELITY, "source": ""}
        if suite in self.files:
            return {"line": jsonl.LINE, "kind": "own", "source": ""}
        task = self.task(suite)
        if isinstance(task, ruler.RulerTask):
            return {"line": task.about(), "kind": task.kind, "source": ruler.SOURCE}
        return {"line": task.line, "kind": task.kind, "source": task.source}

    def count(self, suite: str) -> int:
        """How many texts of a suite are used."""
        return len(self.files[suite]) if suite in self.files else self.samples


def suite_lines() -> dict[str, str]:
    """Every suite with what it measures, in a line."""
    lines = {FIDELITY: "real text: KL, top-1 and top-5 agreement, perplexity, first greedy token that differs, layers"}
    return lines | {name: cls.line for name, cls in tasks().items()}


class Results:
    """Finished rows by key, in a JSON-lines file that is only ever appended to. A torn last line is ignored."""

    rows: dict[str, dict[str, Any]]

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = {}
        other = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                for line in path.read_text(errors="replace").splitlines():
                    try:
                        entry = json.loads(line)
                        self.rows[entry["key"]] = entry["row"]
                    except (ValueError, KeyError, TypeError):
                        other = other or not '{"key": '.startswith(line[:8])  # no row that a kill tore
                if other and not self.rows:
                    raise InputError(f"{str(path)!r} holds something else than results: give another --store.")
            with path.open("a") as file:
                # A line that a kill tore must not swallow the next one.
                if file.tell() and not path.read_bytes().endswith(b"\n"):
                    file.write("\n")
        except OSError as error:
            raise InputError(
                f"cannot keep results in {str(path)!r} ({error.strerror or error}): give a --store that can be written."
            ) from None

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        with self.path.open("ab", buffering=0) as file:
            # In one go, so that several processes may keep their rows in one file.
            file.write(json.dumps({"key": key, "row": row}).encode() + b"\n")
            os.fsync(file.fileno())


def _chunk(recipe: str) -> int:
    """How many tokens of a continuation may be fed to a recipe's cache at a time without changing what it does."""
    methods = () if recipe == EXACT else Recipe.parse(recipe).methods
    return 1 if any(method.by_step for method in methods) else fidelity.CHUNK


@dataclass(frozen=True)
class _Piece:
    """One piece of work, and its key in the store."""

    recipe: str
    suite: str
    context: int
    sample: int
    key: str


class _Run:
    """What is the same for all pieces of a run. room: how many pieces, and what is asked of them, go together."""

    def __init__(self, model: Any, tokenizer: Any, plan: Plan) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.room = Room()
        self.base = keys.environment(model, tokenizer)
        self.place: tuple[int, str] | None = None
        self.made: dict[int, Any] = {}
        """The texts of this place, by sample: recipes are measured on them one after the other."""
        self.exact: dict[int, fidelity.Said] = {}
        """What the exact cache said of them."""

    def pieces(self, place: tuple[int, str], recipes: Sequence[str], samples: Sequence[int]) -> list[_Piece]:
        return [
            _Piece(recipe, place[1], place[0], sample, self._key(recipe, *place, sample))
            for recipe in recipes
            for sample in samples
        ]

    def at(self, place: tuple[int, str], room: Room) -> Iterator[range]:
        """Go to a place: its samples, those of each range together."""
        self.place, self.made, self.exact, self.room = place, {}, {}, room
        count = self.plan.count(place[1])
        for start in range(0, count, room.texts):
            self.exact.clear()
            yield range(start, min(start + room.texts, count))

    def _key(self, recipe: str, context: int, suite: str, sample: int) -> str:
        made = None if recipe == EXACT else Recipe.parse(recipe)
        name, methods = (EXACT, ()) if made is None else (str(made), made.methods)
        return keys.key(self.base, name, methods, self._sample_key(suite, context, sample))

    def _sample_key(self, suite: str, context: int, sample: int) -> list[Any]:
        if suite in self.plan.files:
            record = self.plan.files[suite][sample]
            return [jsonl.PREFIX, record.context, [[q.text, q.answer, *q.choices] for q in record.questions]]
        if suite == FIDELITY:
            sizes: Any = [CONTINUATION, FREE, self.plan.lens]
        else:
            task = self.plan.task(suite)
            sizes = ruler.settings(task) if isinstance(task, ruler.RulerTask) else settings(task)
        return [suite, sizes, context, self.plan.seed, sample]

    def measure(self, pieces: list[_Piece]) -> list[dict[str, Any]]:
        """The rows of pieces of one recipe and place, together. With less memory than thought they are measured in
        halves."""
        try:
            start = time.perf_counter()
            rows = self._fidelity(pieces) if pieces[0].suite == FIDELITY else self._questions(pieces)
            took = (time.perf_counter() - start) / len(pieces)
            return [_named(piece) | row | {"seconds": took} for piece, row in zip(pieces, rows)]
        except torch.OutOfMemoryError:
            if self.room.halved is None:
                raise
            self.room = self.room.halved
        torch.cuda.empty_cache()  # here nothing of what failed is held any more
        parts = range(0, len(pieces), self.room.texts)
        return [row for start in parts for row in self.measure(pieces[start : start + self.room.texts])]

    def _questions(self, pieces: list[_Piece]) -> list[dict[str, Any]]:
        recipe, made = pieces[0].recipe, [self._made(piece) for piece in pieces]
        rows: list[dict[str, Any]] = [{} for _ in pieces]
        for group in grouped([len(sample.prefix) for sample, _ in made], self.room.texts):
            cache, about = self._prefilled(recipe, torch.tensor([made[place][0].prefix for place in group]))
            questions = [
                (row, place, question) for row, place in enumerate(group) for question in made[place][0].questions
            ]
            asked = [Asked(row, question, _kind(question, made[place][1])) for row, place, question in questions]
            given = answers(self.model, self.tokenizer, cache, asked, len(group), self.room.rows)
            for place in group:
                rows[place] = {**about, "questions": []}
                if (task := made[place][1]) is not None and task.kind.startswith("match"):
                    rows[place]["parts"] = True
            for (_, place, question), one in zip(questions, given):
                rows[place]["questions"].append(
                    {
                        "question": question.text.strip(),
                        "answer": question.answer,
                        "said": one.said,
                        "score": one.score,
                        "chance": _chance(question, made[place][1]),
                    }
                )
            del cache
        return rows

    def _made(self, piece: _Piece) -> tuple[Sample, Task | None]:
        """The sample of a piece, and the task that made it; None for a text of one's own."""
        if piece.sample not in self.made:
            if piece.suite in self.plan.files:
                record = self.plan.files[piece.suite][piece.sample]
                self.made[piece.sample] = Sample(_ids(self.tokenizer, record.context), record.questions), None
            else:
                task = self.plan.task(piece.suite, piece.sample)
                pick = self._random(piece.suite, piece.context, piece.sample)
                try:
                    sample = task.make(self.tokenizer, piece.context, pick)
                except InputError as error:
                    raise InputError(f"{piece.suite}: {error}") from None
                self.made[piece.sample] = sample, task
        return self.made[piece.sample]

    def _text(self, context: int, sample: int) -> demo.Task:
        """The text of fidelity."""
        if sample not in self.made:
            seed = self._random(FIDELITY, context, sample).randrange(1 << 30)
            self.made[sample] = demo.make_task(self.tokenizer, context, seed, continuation=CONTINUATION)
        return self.made[sample]

    def _fidelity(self, pieces: list[_Piece]) -> list[dict[str, Any]]:
        recipe, context, samples = pieces[0].recipe, pieces[0].context, [piece.sample for piece in pieces]
        if recipe != EXACT and (lacking := [sample for sample in samples if sample not in self.exact]):
            self._said(EXACT, context, lacking)
        own, about, said = self._said(recipe, context, samples)
        exact = [self.exact[sample] for sample in samples]
        each = layers.errors_of_each(
            layers.Trace.stacked([one.layers for one in exact]), own, layers.Trace.stacked([one.layers for one in said])
        )
        rows = []
        for sample, one, two, errors in zip(samples, exact, said, each):
            figures = fidelity.compare(one, two, self._text(context, sample).continuation[0])
            if self.plan.lens:
                for layer, kl in zip(errors, layers.lens(self.model, one.layers, two.layers)):
                    layer["lens"] = kl
            rows.append({**about, "decode_ms": two.step_ms, **figures, "layers": errors})
        return rows

    def _said(
        self, recipe: str, context: int, samples: list[int]
    ) -> tuple[layers.Trace, dict[str, Any], list[fidelity.Said]]:
        """What a recipe's cache does with the texts where every layer is given what the exact cache's is; about the
        cache; and what it says. What the exact cache says is kept."""
        texts = [self._text(context, sample) for sample in samples]
        cache, about = self._prefilled(recipe, torch.cat([text.prefix for text in texts]))
        continuation = torch.cat([text.continuation for text in texts]).to(self.model.device)
        own, chunk = None, _chunk(recipe)
        if recipe != EXACT:
            entering = layers.Trace.stacked([self.exact[sample].layers for sample in samples]).entering
            head = continuation[:, : fidelity.CHUNK]
            own = layers.trace(self.model, eager(twin(cache)), head, entering, chunk)
        said = fidelity.said(self.model, cache, continuation, chunk, FREE)
        if recipe == EXACT:
            self.exact |= dict(zip(samples, said))
        return own or layers.Trace.stacked([one.layers for one in said]), about, said

    def _random(self, suite: str, context: int, sample: int) -> random.Random:
        return random.Random(f"{self.plan.seed}/{suite}/{context}/{sample}")

    def _prefilled(self, recipe: str, prefixes: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        """A cache of a recipe that has read the prefixes `[texts, tokens]`, and what that took for each."""
        restore(self.model)
        if recipe == EXACT:
            from transformers import DynamicCache

            cache: Any = DynamicCache(config=self.model.config)
        else:
            cache = compress(self.model, recipe, cuda_graph=self.model.device.type == "cuda" and self.room.texts > 1)
        start, texts = time.perf_counter(), len(prefixes)
        logits = self.model(prefixes.to(self.model.device), past_key_values=cache, logits_to_keep=1).logits
        logits[0, 0, 0].item()  # waits for the device
        took = time.perf_counter() - start
        if recipe == EXACT:
            size = equivalent = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / texts
        else:
            graphs_if_possible(cache)
            report = cache.report()
            # What codecs hold besides pages is there once, however many texts there are.
            size = report.learned + (report.total - report.learned) / texts
            equivalent = report.exact_equivalent / texts
        way = None if recipe == EXACT else cache.decoding
        bytes_ = {"bytes": round(size), "ratio": size / equivalent}
        return cache, {**bytes_, "prefill_s": took / texts, "decoding": way}


def run(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    store: Path | Results,
    progress: Progress | None = None,
    batch: int | None = None,
) -> dict[str, Any]:
    """Measure what is not yet in `store`, and sum it all up.

    batch: how many texts are measured together (see `Room.of`). Returns `{environment, plan, suites, cells, ranking,
    ruler}` (see `fivefold.evaluate.summary`). `progress(done, total, what)` is called before each piece or batch of
    pieces, and counts only what has to be measured; what is spared comes off the total.
    """
    plan.check(model, tokenizer)
    results = Results(store) if isinstance(store, Path) else store
    work = _Run(model, tokenizer, plan)
    places = plan.places()
    every = {place: range(plan.count(place[1])) for place in places}
    todo = sum(
        piece.key not in results.rows
        for place in places
        for piece in work.pieces(place, (EXACT, *plan.recipes), every[place])
    )
    done = 0
    found: dict[tuple[int, str], dict[str, list[dict[str, Any]]]] = {}

    def measure(place: tuple[int, str], recipes: Sequence[str], samples: range) -> None:
        nonlocal done
        for recipe in recipes:
            pieces = work.pieces(place, (recipe,), samples)
            lacking = [piece for piece in pieces if piece.key not in results.rows]
            if lacking:
                if progress is not None:
                    progress(done, todo, f"{place[1]} {place[0] or ''}: {recipe}")
                for piece, row in zip(lacking, work.measure(lacking)):
                    results.add(piece.key, row)
                done += len(lacking)
            found[place].setdefault(recipe, []).extend(results.rows[piece.key] for piece in pieces)

    try:
        with torch.inference_mode():
            for place in places:
                context, suite = place
                found[place] = {}
                longest = context or max(len(_ids(tokenizer, one.context)) for one in plan.files[suite])
                room = Room.of(model, longest, batch, CONTINUATION)
                if suite == FIDELITY:  # the recipes need the exact cache's words for the same text
                    for samples in work.at(place, room):
                        measure(place, (EXACT, *plan.recipes), samples)
                    continue
                for samples in work.at(place, room):
                    measure(place, (EXACT,), samples)
                own = suite in plan.files or suite.startswith(ruler.PREFIX)
                if plan.everything or own or not exact_fails(found[place][EXACT]):
                    for samples in work.at(place, room):
                        measure(place, plan.recipes, samples)
                else:
                    todo -= sum(
                        piece.key not in results.rows for piece in work.pieces(place, plan.recipes, every[place])
                    )
    finally:
        restore(model)
    if progress is not None:
        progress(done, todo, "")
    return {
        "environment": work.base,
        "plan": {
            "recipes": list(plan.recipes), "suites": list(plan.suites), "contexts": list(plan.contexts),
            "samples": plan.samples, "seed": plan.seed, "lens": plan.lens, "everything": plan.everything,
        },
        "suites": {suite: plan.about(suite) for suite in plan.suites},
        **summarise(found, plan.recipes),
    }  # fmt: skip


def _named(piece: _Piece) -> dict[str, Any]:
    return {"recipe": piece.recipe, "suite": piece.suite, "context": piece.context, "sample": piece.sample}


def _kind(question: Question, instance: Task | None) -> Kind:
    if instance is not None:
        return instance.kind
    return "choices" if question.choices else "generate"


def _chance(question: Question, instance: Task | None) -> float:
    if instance is not None:
        return instance.chance(question)
    return 1 / len(question.choices) if question.choices else 0.0


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
