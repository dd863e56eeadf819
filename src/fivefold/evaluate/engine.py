"""Runs recipes through suites, one stored row per finished piece of work.

A piece is (recipe, suite, context, sample). Finished rows are appended to a JSON-lines file under a key that changes
with everything that changes a result, so that a run that was broken off, even by SIGKILL, goes on where it stopped,
and an edited method is measured anew. The exact cache (transformers' `DynamicCache`) is measured as a recipe too, and
first: a task that it does no better than chance says nothing about compression, and the recipes are spared it.

Pieces are not batched: on two cores SmolLM2 reads two texts of 2,048 tokens in 7 seconds either way, and scores nine
choices as a batch in 3.0 s instead of 1.1 s one by one, since the exact cache is then copied nine times.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.api import compress, restore
from fivefold.calibrate.profile import signature
from fivefold.errors import InputError
from fivefold.evaluate import fidelity, jsonl, layers, ruler
from fivefold.evaluate.demo import document, make_task
from fivefold.evaluate.score import answer, twin
from fivefold.evaluate.summary import EXACT, FIDELITY, OWN, exact_fails, summarise
from fivefold.evaluate.tasks import Question, Sample, Task, settings, tasks
from fivefold.evaluate.tasks.base import Kind
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


_ONLY_SHOWS = (
    "cli/", "serve/", "page/", "evaluate/charts.py", "evaluate/html.py", "evaluate/lm_eval.py", "evaluate/tables.py",
    "plan/charts.py", "plan/html.py",
)  # fmt: skip


@cache
def code_hash() -> str:
    """Of the package's own sources, but for what only shows results: an edited method is measured anew."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if not name.startswith(_ONLY_SHOWS):
            digest.update(name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _foreign_code(method: Any) -> str:
    """A hash of the file that a method of another package is in; `code_hash` knows our own."""
    module = sys.modules[type(method).__module__]
    file = getattr(module, "__file__", None)
    if module.__name__.startswith("fivefold.") or file is None:
        return ""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


def _chunk(recipe: str) -> int:
    """How many tokens of a continuation may be fed to a recipe's cache at a time without changing what it does."""
    methods = () if recipe == EXACT else Recipe.parse(recipe).methods
    return 1 if any(method.by_step for method in methods) else fidelity.CHUNK


def environment(model: Any, tokenizer: Any) -> dict[str, str]:
    """What results, or their times, depend on beside the plan."""
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "signature": signature(model.config),
        "weights": _fingerprint(model, tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "machine": machine(model.device),
        "text": f"Python {platform.python_version()}'s language reference and library",
        "text_hash": hashlib.sha256(document().encode()).hexdigest()[:16],
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "fivefold": fivefold.__version__,
        "code": code_hash(),
    }


def machine(device: torch.device) -> str:
    """What the times were taken on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def _fingerprint(model: Any, tokenizer: Any) -> str:
    """Changes with the weights (a part of each tensor is looked at) and with how text is cut into tokens."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        digest.update(flat[:: max(1, flat.numel() // 64)].float().cpu().numpy().tobytes())
    digest.update(json.dumps(_ids(tokenizer, document()[:20_000])).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Piece:
    """One piece of work, and its key in the store."""

    recipe: str
    suite: str
    context: int
    sample: int
    key: str


class _Run:
    """What is the same for all pieces of a run."""

    def __init__(self, model: Any, tokenizer: Any, plan: Plan) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.plan = plan
        self.base = environment(model, tokenizer)
        self.reference: tuple[tuple[int, int], fidelity.Reference] | None = None
        self.made: tuple[tuple[str, int, int], Sample] | None = None

    def pieces(self, context: int, suite: str, recipes: tuple[str, ...]) -> list[_Piece]:
        return [
            _Piece(recipe, suite, context, sample, self._key(recipe, suite, context, sample))
            for sample in range(self.plan.count(suite))
            for recipe in recipes
        ]

    def _key(self, recipe: str, suite: str, context: int, sample: int) -> str:
        made = None if recipe == EXACT else Recipe.parse(recipe)
        method = [EXACT] if made is None else [str(made), *map(_foreign_code, made.methods)]
        parts = [self.base, method, *self._sample_key(suite, context, sample)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

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

    def measure(self, piece: _Piece) -> dict[str, Any]:
        start = time.perf_counter()
        row = self._fidelity(piece) if piece.suite == FIDELITY else self._questions(piece)
        return row | {"seconds": time.perf_counter() - start}

    def _questions(self, piece: _Piece) -> dict[str, Any]:
        instance: Task | None = None
        if piece.suite in self.plan.files:
            record = self.plan.files[piece.suite][piece.sample]
            made = Sample(_ids(self.tokenizer, record.context), record.questions)
        else:
            instance = self.plan.task(piece.suite, piece.sample)
            made = self._made(instance, piece)
        cache_, row = self._prefilled(piece.recipe, torch.tensor([made.prefix]))
        row["questions"] = []
        if instance is not None and instance.kind.startswith("match"):
            row["parts"] = True
        for question in made.questions:
            given = answer(self.model, self.tokenizer, cache_, question, _kind(question, instance))
            row["questions"].append(
                {
                    "question": question.text.strip(),
                    "answer": question.answer,
                    "said": given.said,
                    "score": given.score,
                    "chance": _chance(question, instance),
                }
            )
        return row

    def _made(self, task: Task, piece: _Piece) -> Sample:
        """The sample of a piece; the last one is kept, since recipes are measured on it one after the other."""
        place = (piece.suite, piece.context, piece.sample)
        if self.made is None or self.made[0] != place:
            self.made = place, task.make(self.tokenizer, piece.context, self._random(piece))
        return self.made[1]

    def _fidelity(self, piece: _Piece) -> dict[str, Any]:
        rng = self._random(piece)
        task = make_task(self.tokenizer, piece.context, rng.randrange(1 << 30), continuation=CONTINUATION)
        place = (piece.context, piece.sample)
        if piece.recipe != EXACT and (self.reference is None or self.reference[0] != place):
            cache_, _ = self._prefilled(EXACT, task.prefix)
            self.reference = place, self._said(cache_, task, fidelity.CHUNK)[0]
        cache_, row = self._prefilled(piece.recipe, task.prefix)
        exact = None if piece.recipe == EXACT or self.reference is None else self.reference[1]
        own = None
        if exact is not None:
            head = task.continuation[:, : fidelity.CHUNK].to(self.model.device)
            own = layers.trace(self.model, twin(cache_), head, exact.layers.entering, _chunk(piece.recipe))
        said, row["decode_ms"] = self._said(cache_, task, _chunk(piece.recipe))
        if exact is None or own is None:
            self.reference = place, said
            exact, own = said, said.layers
        row |= fidelity.compare(exact, said.logs, said.free, task.continuation)
        row["layers"] = layers.errors(exact.layers, own, said.layers)
        if self.plan.lens:
            for layer, kl in zip(row["layers"], layers.lens(self.model, exact.layers, said.layers)):
                layer["lens"] = kl
        return row

    def _said(self, cache_: Any, task: Any, chunk: int) -> tuple[fidelity.Reference, float]:
        """What the model says behind a prefix, and the milliseconds of a decoding step. Uses the cache up."""
        continuation = task.continuation.to(self.model.device)
        seen = layers.trace(self.model, twin(cache_), continuation[:, : fidelity.CHUNK], chunk=chunk)
        free, step = fidelity.run_free(self.model, twin(cache_), continuation[:, :1], FREE)
        return fidelity.Reference(fidelity.continued(self.model, cache_, continuation, chunk), free, seen), step * 1e3

    def _random(self, piece: _Piece) -> random.Random:
        return random.Random(f"{self.plan.seed}/{piece.suite}/{piece.context}/{piece.sample}")

    def _prefilled(self, recipe: str, prefix: torch.Tensor) -> tuple[Any, dict[str, Any]]:
        """A cache of a recipe that has read the prefix `[1, tokens]`, and what that took."""
        restore(self.model)
        if recipe == EXACT:
            from transformers import DynamicCache

            cache_: Any = DynamicCache(config=self.model.config)
        else:
            cache_ = compress(self.model, recipe)
        start = time.perf_counter()
        logits = self.model(prefix.to(self.model.device), past_key_values=cache_, logits_to_keep=1).logits
        logits[0, 0, 0].item()  # waits for the device
        took = time.perf_counter() - start
        if recipe == EXACT:
            size = equivalent = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache_.layers)
        else:
            report = cache_.report()
            size, equivalent = report.total, report.exact_equivalent
        way = None if recipe == EXACT else cache_.decoding
        return cache_, {"bytes": size, "ratio": size / equivalent, "prefill_s": took, "decoding": way}


def run(model: Any, tokenizer: Any, plan: Plan, store: Path, progress: Progress | None = None) -> dict[str, Any]:
    """Measure what is not yet in `store`, and sum it all up.

    Returns `{environment, plan, suites, cells, ranking, ruler}` (see `fivefold.evaluate.summary`).
    `progress(done, total, what)` is called before each piece, and counts only what has to be measured; what is spared
    comes off the total.
    """
    plan.check(model, tokenizer)
    results = Results(store)
    work = _Run(model, tokenizer, plan)
    places = plan.places()
    todo = sum(
        piece.key not in results.rows
        for context, suite in places
        for piece in work.pieces(context, suite, (EXACT, *plan.recipes))
    )
    done = 0
    found: dict[tuple[int, str], dict[str, list[dict[str, Any]]]] = {}

    def measure(pieces: list[_Piece]) -> None:
        nonlocal done
        for piece in pieces:
            if piece.key not in results.rows:
                if progress is not None:
                    progress(done, todo, f"{piece.suite} {piece.context or ''}: {piece.recipe}")
                results.add(piece.key, work.measure(piece))
                done += 1
            found[piece.context, piece.suite].setdefault(piece.recipe, []).append(results.rows[piece.key])

    try:
        with torch.inference_mode():
            for context, suite in places:
                found[context, suite] = {}
                if suite == FIDELITY:  # the recipes need the exact cache's words for the same text
                    measure(work.pieces(context, suite, (EXACT, *plan.recipes)))
                    continue
                measure(work.pieces(context, suite, (EXACT,)))
                others = work.pieces(context, suite, plan.recipes)
                own = suite in plan.files or suite.startswith(ruler.PREFIX)
                if plan.everything or own or not exact_fails(found[context, suite][EXACT]):
                    measure(others)
                else:
                    todo -= sum(piece.key not in results.rows for piece in others)
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
