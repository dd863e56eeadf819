"""Which words are the most frequent: of a numbered list (cwe), and of coded text (fwe)."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

import numpy as np

from fivefold.evaluate.ruler import words
from fivefold.evaluate.ruler.base import Count, Draw, Prompt, RulerTask
from fivefold.evaluate.ruler.data import ENGLISH

_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n",
    "\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. ",
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_LONG = 4096
"""Tokens from which on words are repeated as often as RULER's configuration says; below, less often."""


@dataclass(frozen=True)
class CommonWords(RulerTask):
    """`common` words stand `often` times in a numbered list, all others `seldom` times (6 and 1 below 4,096 tokens).

    A solved example stands in front. The size is in different words.
    """

    generate = 120

    often: int = 30
    seldom: int = 3
    common: int = 10

    def about(self) -> str:
        return f"a numbered list of words; which {self.common} stand in it most often?"

    def smallest(self) -> int:
        return self.common + 1

    def sources(self) -> dict[str, str]:
        return {"words": words.digest(), "more words": self.data.digest(ENGLISH)}

    def compose(self, draw: Draw, size: int, context: int, count: Count) -> Prompt:
        pool = draw.shuffled(list(words.vocabulary()))
        long = context >= _LONG
        begin, question, begun = _COMMON
        shown, answers = self._list(draw, pool, *((40, 10, 3) if long else (20, 3, 1)))
        example = f"{begin}{shown}{question}{begun} {_numbered(answers)}"
        shown, answers = self._list(draw, pool, size, *((self.often, self.seldom) if long else (6, 1)))
        return Prompt(f"{example}\n{begin}{shown}", question, begun, tuple(answers))

    def _list(self, draw: Draw, pool: list[str], many: int, often: int, seldom: int) -> tuple[str, list[str]]:
        """(a numbered list of `many` different words, its common ones)."""
        chosen = draw.random.sample(pool if many <= len(pool) else self.data.many_words(), many)
        common = chosen[: self.common]
        return _numbered(draw.shuffled(common * often + chosen[self.common :] * seldom)), common


def _numbered(listed: list[str]) -> str:
    return " ".join(f"{at}. {word}" for at, word in enumerate(listed, 1))


@dataclass(frozen=True)
class FrequentWords(RulerTask):
    """Coded words of `letters` letters, the one of rank k with a share of k**-2 / zeta(2) of the text (Zipf's law); the
    first rank is dots, the next three are asked for. The size is in words before shares are rounded down."""

    generate = 50

    letters: int = 6

    def about(self) -> str:
        return "coded text whose words are spread by Zipf's law; which three stand in it most often?"

    def smallest(self) -> int:
        return 64  # from here on the ranks asked for differ in number from each other and from the next one

    def sources(self) -> dict[str, str]:
        return {}

    def compose(self, draw: Draw, size: int, context: int, count: Count) -> Prompt:
        kinds = max(5, (context - self.generate) // 50)
        found: dict[str, None] = {}
        while len(found) < kinds:
            found["".join(draw.random.choices(string.ascii_lowercase, k=self.letters))] = None
        coded = draw.shuffled(sorted(found))
        coded[0] = "..."
        text = [word for word, many in zip(coded, frequencies(kinds, size)) for _ in range(many)]
        begin, question, begun = _FREQUENT
        return Prompt(begin + " ".join(draw.shuffled(text)), question, begun, tuple(coded[1:4]))


def frequencies(kinds: int, size: int) -> list[int]:
    """How often each of `kinds` words stands in a text of `size` words, most frequent first: Zipf's law, alpha 2."""
    shares = size * np.arange(1, kinds + 1) ** -2.0 / (math.pi**2 / 6)
    return [int(many) for many in shares]
