"""English words for needles and lists: those of the package wonderwords, as RULER's own generator takes them."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from importlib import resources
from itertools import accumulate
from typing import Any

from fivefold.errors import InputError


@cache
def words_of(part: str) -> tuple[str, ...]:
    """Every "noun", "adjective" or "verb" of wonderwords, in the order of its file.

    Raises `InputError` if the package is not installed.
    """
    try:
        text = (resources.files("wonderwords") / "assets" / f"{part}list.txt").read_text(encoding="utf-8")
    except ModuleNotFoundError:
        raise InputError("RULER's words need the package wonderwords: pip install 'fivefold[ruler]'.") from None
    return tuple(line.rstrip() for line in text.splitlines())


@cache
def vocabulary() -> tuple[str, ...]:
    """All nouns, adjectives and verbs, each once, sorted."""
    return tuple(sorted({*words_of("noun"), *words_of("adjective"), *words_of("verb")}))


@cache
def keys() -> Pairs:
    """What a needle is known by: "adjective-noun"."""
    return Pairs(words_of("adjective"), words_of("noun"))


@cache
def digest() -> str:
    """Changes with the words."""
    text = "\n".join("\n".join(words_of(part)) for part in ("noun", "adjective", "verb"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Pairs(Sequence[str]):
    """`sorted({f"{one}-{two}" for one in first for two in second})`, which would be six million strings.

    Only where a first word goes on another one behind a hyphen ("old", "old-fashioned") do their pairs mix; these few
    are made and sorted, all others are found by their place.
    """

    def __init__(self, first: Sequence[str], second: Sequence[str]) -> None:
        self._second = sorted(set(second))
        groups: list[list[str]] = []
        for begin in sorted(f"{one}-" for one in set(first)):
            if groups and begin.startswith(groups[-1][0]):
                groups[-1].append(begin)
            else:
                groups.append([begin])
        self._groups: list[str | list[str]] = [
            group[0] if len(group) == 1 else sorted({one + two for one in group for two in self._second})
            for group in groups
        ]
        sizes = (len(self._second) if isinstance(group, str) else len(group) for group in self._groups)
        self._starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, at: Any) -> Any:
        if not 0 <= at < len(self):
            raise IndexError(at)
        place = bisect_right(self._starts, at) - 1
        group, rest = self._groups[place], at - self._starts[place]
        return group + self._second[rest] if isinstance(group, str) else group[rest]
