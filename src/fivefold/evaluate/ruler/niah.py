"""Needles in a haystack: numbers, words or UUIDs that a long text gives to words or UUIDs."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fivefold.evaluate.ruler import words
from fivefold.evaluate.ruler.base import Count, Draw, Prompt, RulerTask
from fivefold.evaluate.ruler.data import ESSAYS, sentences

Sort = Literal["numbers", "words", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [int(depth) for depth in np.round(np.linspace(0, 100, num=40))]
"""Where a needle may stand among an essay's sentences, in percent."""
_NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n",
    "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)


@dataclass(frozen=True)
class Niah(RulerTask):
    """`keys` keys of sort `key` with `values` values of sort `value` each; `queries` of the keys are asked for.

    haystack: "noise" (five short sentences again and again), "essay" (needles stand between its sentences), or
    "needle" (every line is another needle). The size is in noise lines, words of the essay, or lines.
    """

    generate = 128

    haystack: Literal["noise", "essay", "needle"] = "noise"
    key: Sort = "words"
    value: Sort = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def smallest(self) -> int:
        return 1 if self.haystack == "essay" else max(self.keys, self.queries) * self.values

    def about(self) -> str:
        place = {
            "noise": "the same few sentences again and again",
            "essay": "essays" if self.data.has(ESSAYS) else "Python's language reference (in place of essays)",
            "needle": "others of their kind",
        }[self.haystack]
        many = max(self.keys, self.queries)
        keys = f"a {self.key[:-1]} is" if many == 1 else f"{many} {self.key} are"
        values = f"a {self.value[:-1]}" if self.values == 1 else f"{self.values} {self.value}"
        asked = "it" if many * self.values == 1 else "all" if self.queries * self.values > 1 else "one"
        return f"{keys} given {values}{' each' * (many > 1)}, among {place}; asked for {asked}"

    def sources(self) -> dict[str, str]:
        if self.haystack == "essay":
            self.data.essay()
        return {"words": words.digest()} | ({"essays": self.data.digest(ESSAYS)} if self.haystack == "essay" else {})

    def compose(self, draw: Draw, size: int, context: int, count: Count) -> Prompt:
        facts = [
            (_one(draw, self.key), [_one(draw, self.value) for _ in range(self.values)])
            for _ in range(max(self.keys, self.queries))
        ]
        needles = [_NEEDLE.format(kind=self.value, key=key, value=value) for key, values in facts for value in values]
        needles = draw.shuffled(needles)
        hidden = self._essay(draw, needles, size) if self.haystack == "essay" else self._lines(draw, needles, size)
        asked = [facts[at] for at in draw.random.sample(range(len(facts)), self.queries)]
        references = tuple(value for _, values in asked for value in values)
        names = [key for key, _ in asked]
        query = names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
        parts, kind = (_ONE, self.value[:-1]) if len(references) == 1 else (_MANY, self.value)
        begin, question, begun = (part.format(kind=kind, query=query) for part in parts)
        return Prompt(begin + hidden, question, begun, references)

    def _lines(self, draw: Draw, needles: list[str], size: int) -> str:
        if self.haystack == "noise":
            lines = [NOISE] * size
        else:
            lines = [
                _NEEDLE.format(kind=self.value, key=_one(draw, self.key), value=_one(draw, self.value))
                for _ in range(size)
            ]
        for at, needle in zip(sorted(draw.random.sample(range(size), len(needles)), reverse=True), needles):
            lines.insert(at, needle)
        return "\n".join(lines)

    def _essay(self, draw: Draw, needles: list[str], size: int) -> str:
        essay = self.data.essay()
        taken = essay[:size] if size <= len(essay) else (essay * -(-size // len(essay)))[:size]
        cut = sentences(" ".join(taken))
        places = sorted(int(len(cut) * (depth / 100)) for depth in draw.random.sample(DEPTHS, len(needles)))
        parts = []
        for needle, start, stop in zip(needles, [0, *places], places):
            parts += [" ".join(cut[start:stop]), needle]
        return " ".join([*parts, " ".join(cut[places[-1] :])])


def _one(draw: Draw, sort: Sort) -> str:
    if sort == "numbers":
        return str(draw.random.randint(1_000_000, 9_999_999))
    if sort == "words":
        return draw.random.choice(words.keys())
    return str(uuid.UUID(int=draw.random.getrandbits(128), version=4))
