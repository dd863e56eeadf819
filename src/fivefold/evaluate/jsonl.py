"""A user's own questions: a JSON-lines file of {context, question, answer, choices?}."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question

PREFIX = "jsonl:"
LINE = "your own questions, a JSON object a line: context, question, answer, and choices if it is multiple choice"
_KEYS = {"context", "question", "answer", "choices"}


@dataclass(frozen=True)
class Record:
    """A context and what is asked about it. line: where it begins in the file."""

    context: str
    questions: tuple[Question, ...]
    line: int


def load(file: str) -> tuple[Record, ...]:
    """The records of a file; lines in a row with the same context are one record, so that it is read once.

    The model sees `context`, an empty line, "Question: ", the question, and "Answer:" on a line of its own. With
    `choices` (the answer is one of them) the most likely one is its answer; without, the first line that it writes
    must hold the answer. Raises `InputError` with the number of the first bad line.
    """
    try:
        data = Path(file).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{file!r} cannot be read ({reason}).") from None
    lines = []
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if raw.strip():
            try:
                lines.append((number, *_parse(raw)))
            except ValueError as error:
                raise InputError(f"line {number} of {file!r}: {error}.") from None
    if not lines:
        raise InputError(f"{file!r} holds no question: write a JSON object a line.")
    records = []
    for context, group in groupby(lines, key=lambda line: line[1]):
        same = list(group)
        records.append(Record(context, tuple(question for _, _, question in same), same[0][0]))
    return tuple(records)


def _parse(raw: bytes) -> tuple[str, Question]:
    """(context, question) of a line, or a `ValueError` that says what is wrong and what to do."""
    try:
        entry: Any = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8: convert the file") from None
    except RecursionError:
        raise ValueError("it is nested too deeply: write one flat JSON object") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON ({error.msg} at column {error.colno}): write one object a line") from None
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object: write {...} with context, question and answer")
    for key in entry:
        if key not in _KEYS:
            raise ValueError(f"the key {key!r} is unknown: use context, question, answer, choices")
    for key in ("context", "question", "answer"):
        value = entry.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key!r} is {_short(value)}: give a text that is not empty")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(f"{key!r} holds half of a surrogate pair: give a text in Unicode") from None
    text = f"\n\nQuestion: {entry['question'].strip()}\nAnswer:"
    answer, choices = entry["answer"].strip(), entry.get("choices")
    if choices is None:
        return entry["context"], Question(text, answer)
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise ValueError(f"'choices' is {_short(choices)}: give a list of texts")
    stripped = [one.strip() for one in choices]
    if len(set(stripped)) < max(2, len(stripped)) or answer not in stripped:
        raise ValueError(
            f"'choices' is {_short(choices)}: give at least two different texts, the answer {answer!r} among them"
        )
    return entry["context"], Question(text, f" {answer}", tuple(f" {one}" for one in stripped))


def _short(value: Any) -> str:
    if value is None:
        return "missing"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
