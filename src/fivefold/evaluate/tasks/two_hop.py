"""Two hops: the answer needs two facts of the context, one after the other."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, PEOPLE, passage, shuffled


@task(
    "two_hop",
    kind="choices",
    line="A's friend is B, B lives in C, in two places of a long text; the model is asked where A's friend lives",
    source="Biran et al., Hopping Too Late, 2024",
)
@dataclass(frozen=True)
class TwoHop(Task):
    """`chains` chains of two facts. The choices are the last words of all chains."""

    chains: int = 3
    deep: float = 1.0

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 2 <= self.chains <= len(PEOPLE) // 2:
            raise InputError(f"chains={self.chains} cannot be planted: use 2 to {len(PEOPLE) // 2}.")
        people = rng.sample(PEOPLE, 2 * self.chains)
        cities = rng.sample(CITIES, self.chains)
        planted, questions = [], []
        for one, other, city in zip(people, people[self.chains :], cities):
            planted.append((rng.uniform(0, self.deep), f"\n\nThe best friend of {one} is {other}.\n\n"))
            planted.append((rng.uniform(0, self.deep), f"\n\n{other} lives in the city of {city}.\n\n"))
            text = f"\n\nThe best friend of {one} lives in the city of"
            questions.append(Question(text, f" {city}", shuffled(rng, cities)))
        return Sample(fill(tokenizer, context, planted, passage(rng)), tuple(questions))
