"""The texts that RULER hides things in: its own files if there is a folder with them, else what is here.

A folder is RULER's `scripts/data/synthetic/json` after its download scripts have run. What it does not hold is
replaced: essays by Python's language reference, SQuAD and HotpotQA by planted facts (`facts.py`), its list of English
words by pairs of words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fivefold.errors import InputError
from fivefold.evaluate.demo import document
from fivefold.evaluate.ruler import facts, words
from fivefold.evaluate.ruler.facts import Asked, Library

ESSAYS, SQUAD, HOTPOTQA, ENGLISH = "PaulGrahamEssays.json", "squad.json", "hotpotqa.json", "english_words.json"
FILES = (ESSAYS, SQUAD, HOTPOTQA, ENGLISH)

T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """The files that are used, by name in `FILES`, and the digest of each: what stored results depend on."""

    files: tuple[tuple[str, str], ...] = ()
    digests: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, folder: str | None) -> Data:
        """What a folder holds. Raises `InputError` for a folder with none of the files."""
        if folder is None:
            return cls()
        found = [(name, str(Path(folder).expanduser() / name)) for name in FILES]
        found = [(name, path) for name, path in found if Path(path).is_file()]
        if not found:
            raise InputError(
                f"{folder!r} holds none of RULER's files ({', '.join(FILES)}): give its scripts/data/synthetic/json "
                "after its download scripts have run."
            )
        return cls(tuple(found), tuple((name, _digest(path)) for name, path in found))

    def has(self, name: str) -> bool:
        return name in dict(self.files)

    def digest(self, name: str) -> str:
        """Of one of `FILES`, or of what stands in for it; the essays' stand-in is known by the engine."""
        return dict(self.digests).get(name, words.digest())

    def essay(self) -> tuple[str, ...]:
        """The words of the essays, without white space."""
        return _essay(dict(self.files).get(ESSAYS))

    def library(self, name: str) -> Library:
        """The documents and questions of `SQUAD` or `HOTPOTQA`."""
        return _library(name, dict(self.files).get(name))

    def many_words(self) -> Sequence[str]:
        """More words than `words.vocabulary` has."""
        path = dict(self.files).get(ENGLISH)
        return words.keys() if path is None else _english(path)


@cache
def _digest(path: str) -> str:
    return hashlib.sha256(_bytes(path)).hexdigest()[:16]


def _bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path!r} cannot be read ({error.strerror}).") from None


def _parsed(path: str, parse: Callable[[Any], T]) -> T:
    """What a JSON file holds. Raises `InputError` for one of another form."""
    try:
        return parse(json.loads(_bytes(path)))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise InputError(f"{path!r} has not the form of what RULER's scripts download: download it anew.") from None


@cache
def _essay(path: str | None) -> tuple[str, ...]:
    text = document() if path is None else _parsed(path, lambda data: str(data["text"]))
    return tuple(re.sub(r"\s+", " ", text).split(" "))


@cache
def _english(path: str) -> tuple[str, ...]:
    return _parsed(path, lambda data: tuple(data.values()))


@cache
def _library(name: str, path: str | None) -> Library:
    if path is None:
        return facts.single() if name == SQUAD else facts.bridges()
    return _parsed(path, _squad if name == SQUAD else _hotpotqa)


def _squad(data: Any) -> Library:
    """Stanford's question answering data set 2.0: a document is a paragraph; those of the same article are near it."""
    articles = [[paragraph["context"] for paragraph in article["paragraphs"]] for article in data["data"]]
    documents = sorted({text for article in articles for text in article})
    place = {text: at for at, text in enumerate(documents)}
    asked = []
    for article, texts in zip(data["data"], articles):
        for paragraph in article["paragraphs"]:
            own = place[paragraph["context"]]
            near = tuple(place[text] for text in texts if place[text] != own)
            asked += [
                Asked(entry["question"], tuple(one["text"] for one in entry["answers"]), (own,), near)
                for entry in paragraph["qas"]
                if not entry["is_impossible"]
            ]
    return Library(tuple(documents), tuple(asked))


def _hotpotqa(data: Any) -> Library:
    """HotpotQA's distractor setting: a document is a title and a paragraph, and ten of them belong to a question."""
    texts = [[f"{title}\n{''.join(sentences)}" for title, sentences in entry["context"]] for entry in data]
    documents = sorted({text for one in texts for text in one})
    place = {text: at for at, text in enumerate(documents)}
    asked = [
        Asked(entry["question"], (entry["answer"],), tuple(place[text] for text in own), ())
        for entry, own in zip(data, texts)
    ]
    return Library(tuple(documents), tuple(asked))


_END = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> list[str]:
    """A text cut behind every full stop, exclamation or question mark that white space follows."""
    return _END.split(text.strip())
