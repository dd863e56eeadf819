"""Two hops: the answer needs two facts of the context, one after the other."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, PEOPLE, passage

# Shows how to answer: the first hop is said aloud, so that the second starts from it. Nothing here is in the text.
_EXAMPLES = (
    "The best friend of Ivan is Karl, and Karl lives in the city of Geneva.\n"
    "The best friend of Maria is Otto, and Otto lives in the city of Naples.\n"
)


@task(
    "two_hop",
    kind="generate",
    line="A's friend is B, B lives in C, in two places of a long text; the model says where A's friend lives",
    source="Biran et al., Hopping Too Late, 2024",
)
@dataclass(frozen=True)
class TwoHop(Task):
    """`chains` chains of two facts, all facts at random depths; every chain is asked for. The model may say the first
    hop before the second: without that, models as small as SmolLM2-135M are at chance."""

    chains: int = 3

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 2 <= self.chains <= len(PEOPLE) // 2:
            raise InputError(f"chains={self.chains} cannot be planted: use 2 to {len(PEOPLE) // 2}.")
        people = rng.sample(PEOPLE, 2 * self.chains)
        cities = rng.sample(CITIES, self.chains)
        planted, questions = [], []
        for one, other, city in zip(people, people[self.chains :], cities):
            planted.append((rng.random(), f"\n\nThe best friend of {one} is {other}.\n\n"))
            planted.append((rng.random(), f"\n\n{other} lives in the city of {city}.\n\n"))
            questions.append(Question(f"\n\n{_EXAMPLES}The best friend of {one} is", city))
        return Sample(fill(tokenizer, context, planted, passage(rng)), tuple(questions))
