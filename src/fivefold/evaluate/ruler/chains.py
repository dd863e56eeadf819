"""Variable tracking (vt): a chain of assignments in a long text, each from the one before it."""

from __future__ import annotations

import itertools
import string
from dataclasses import dataclass

from fivefold.evaluate.ruler.base import Count, Draw, Prompt, RulerTask, largest
from fivefold.evaluate.ruler.niah import NOISE

_BEGIN = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_BEGUN = (
    " Answer: According to the chain(s) of variable assignment in the text above, {many} variables are assigned the "
    "value {value}, they are: "
)
_EXAMPLE = 500
"""Tokens that the solved example before the text may have."""
_EXAMPLE_VALUE = "12345"


@dataclass(frozen=True)
class Chains(RulerTask):
    """`chains` chains of `hops` + 1 variables each; all variables of the first one are asked for by its value.

    A solved example stands in front. The size is in lines of noise.
    """

    generate = 30

    chains: int = 1
    hops: int = 4

    def about(self) -> str:
        return f"a chain of {self.hops + 1} variables, each assigned from the one before it; which have its value?"

    def smallest(self) -> int:
        return self.hops + 1

    def sources(self) -> dict[str, str]:
        return {}

    def compose(self, draw: Draw, size: int, context: int, count: Count) -> Prompt:
        lines = largest(lambda size: count(self._example(draw.again(), size)[0]), self.smallest(), _EXAMPLE)
        return self.solved(draw, size, *self._example(draw.again(), lines))

    def solved(self, draw: Draw, size: int, example: str, names: tuple[str, ...]) -> Prompt:
        """A text of `size` lines behind an example of `_example`, whose names and value are changed first."""
        made = self._text(draw, size, 5)
        example = f"{example} {' '.join(names)}\n"
        for name in names:
            example = example.replace(name, _name(draw, len(name)))
        example = example.replace(_EXAMPLE_VALUE, _value(draw))
        return Prompt(f"{example}\n{made.text}", made.question, made.begun, made.references)

    def _example(self, draw: Draw, size: int) -> tuple[str, tuple[str, ...]]:
        """A text of `size` lines with its question, and the names that answer it."""
        made = self._text(draw, size, 3, _EXAMPLE_VALUE)
        return made.text + made.question + made.begun, made.references

    def _text(self, draw: Draw, size: int, letters: int, value: str = "") -> Prompt:
        names: list[str] = []
        while len(names) < self.chains * (self.hops + 1):
            name = _name(draw, letters)
            if name not in names:
                names.append(name)
        lines, values = [NOISE] * size, []
        chains = [names[at : at + self.hops + 1] for at in range(0, len(names), self.hops + 1)]
        assigned = []
        for chain in chains:
            values.append(value or _value(draw))
            steps = [f"VAR {two} = VAR {one} " for one, two in itertools.pairwise(chain)]
            assigned.append([f"VAR {chain[0]} = {values[-1]}", *steps])
        for steps in assigned:
            places = sorted(draw.random.sample(range(len(lines)), len(steps)))
            for before, (place, step) in enumerate(zip(places, steps)):
                lines.insert(place + before, step)
        question, begun = (part.format(value=values[0], many=self.hops + 1) for part in (_QUESTION, _BEGUN))
        return Prompt(_BEGIN + "\n".join(lines), question, begun, tuple(chains[0]))


def _name(draw: Draw, letters: int) -> str:
    return "".join(draw.random.choices(string.ascii_uppercase, k=letters))


def _value(draw: Draw) -> str:
    return str(draw.numpy.randint(10_000, 99_999))
