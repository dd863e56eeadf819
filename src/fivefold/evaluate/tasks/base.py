"""What a stress task is: a seeded text with something in it that a question then asks for.

A task is a frozen dataclass registered with `@task`; its fields are its sizes. `make` builds one sample: a prefix of
exactly `context` tokens, which is prefilled once and compressed, and questions, each asked from a fork of that cache.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from fivefold.errors import InputError

Kind = Literal["generate", "choices", "bits", "match_all", "match_part"]


@dataclass(frozen=True)
class Question:
    """`text` follows the prefix. `answer` is right; with `choices` it is one of them, and the model picks the most
    likely; without, it generates and its first line must hold the answer. A choice follows `text` as it is, nothing is
    put between: where it begins a word, it has its own leading space.

    With `references` the model generates up to `limit` tokens, and what of them is found anywhere in these counts.
    `ids`: the tokens of `text`, if it is not encoded by itself."""

    text: str
    answer: str
    choices: tuple[str, ...] = ()
    ids: tuple[int, ...] = ()
    references: tuple[str, ...] = ()
    limit: int = 0


@dataclass(frozen=True)
class Sample:
    """prefix: token ids, exactly as many as the context asked for (of RULER, so many that the question and the answer
    have room in it). questions: at least one."""

    prefix: list[int]
    questions: tuple[Question, ...]


class Task:
    """Base of all tasks.

    kind "generate": greedy text, scored by `holds`. "choices": log-likelihood, scored 1 if the answer wins, else 0.
    "bits": log-likelihood among the choices, scored by how many bits of the answer the model recovers:
    `log2(len(choices)) + log2 p(answer | choices)`, at most log2(len(choices)), 0 for a uniform guess. "match_all":
    greedy text of several lines, scored by the share of the references in it; "match_part": 1 if one of them is in it.
    """

    name: ClassVar[str]
    kind: ClassVar[Kind] = "generate"
    line: ClassVar[str]
    source: ClassVar[str]

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        """One sample. The same state of `rng` gives the same sample. Raises `InputError` for a context too short."""
        raise NotImplementedError

    def chance(self, question: Question) -> float:
        """The score of a model that knows nothing of the context."""
        if self.kind == "choices":
            return 1 / len(question.choices)
        return 0.0


T = TypeVar("T", bound=type[Task])
_tasks: dict[str, type[Task]] = {}


def task(name: str, *, kind: Kind, line: str, source: str) -> Callable[[T], T]:
    """Class decorator: makes a task known under `name`. `line` explains it, `source` names where the idea is from."""

    def add(cls: T) -> T:
        cls.name, cls.kind, cls.line, cls.source = name, kind, line, source
        _tasks[name] = cls
        return cls

    return add


def tasks() -> dict[str, type[Task]]:
    """Every known task by name."""
    import importlib
    import pkgutil

    package = importlib.import_module("fivefold.evaluate.tasks")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_tasks.items()))


def settings(instance: Task) -> dict[str, Any]:
    """A task's sizes, for keys of stored results."""
    return dataclasses.asdict(instance)  # type: ignore[call-overload]


def holds(text: str, answer: str) -> bool:
    """Whether the first non-empty line of a generated text gives the answer: whole words, any case."""
    line = next((part for part in text.strip().splitlines() if part.strip()), "")
    return re.search(rf"(?<!\w){re.escape(answer.strip())}(?!\w)", line, re.IGNORECASE) is not None


CLEAR = 96
"""Tokens at the end of a prefix that hold nothing planted: more than a short recent window sees."""


def fill(
    tokenizer: Any,
    context: int,
    pieces: list[tuple[float, str]],
    filler: str,
    last: str = "",
    clear: int = CLEAR,
) -> list[int]:
    """A prefix of exactly `context` tokens: `filler` with each piece (depth from 0 to 1, text) set in at its depth.

    Pieces of equal depth keep their order; `last` stands at the very end, behind all filler. At least `clear` tokens
    (filler and `last`) stand behind the last piece: depth 1 is in front of them. Raises `InputError` if the pieces
    leave no room.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    ordered = sorted(enumerate(pieces), key=lambda item: (item[1][0], item[0]))
    encoded = [(depth, ids(text)) for _, (depth, text) in ordered]
    tail = ids(last) if last else []
    planted = sum(len(part) for _, part in encoded)
    behind = max(0, clear - len(tail)) if planted else 0
    room = context - len(tail) - planted
    if room < behind:
        raise InputError(
            f"a context of {context} tokens is too short for this task: it needs at least {context - room + behind}."
        )
    body = ids(filler[: 12 * room + 200])
    while len(body) < room:
        body += body or ids(" ") * room
    out: list[int] = []
    used = 0
    for depth, part in encoded:
        upto = round(depth * (room - behind))
        out += body[used:upto] + part
        used = upto
    return out + body[used:room] + tail
