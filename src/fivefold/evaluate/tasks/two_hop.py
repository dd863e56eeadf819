"""Two hops: the answer needs two facts of the context, one after the other."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, PEOPLE, passage


@task(
    "two_hop",
    kind="choices",
    line="A's friend is B, B lives in C, in two places of a long text; the model is asked for A's friend and home",
    source="Biran et al., Hopping Too Late, 2024",
)
@dataclass(frozen=True)
class TwoHop(Task):
    """`chains` chains of two facts, the first facts in one list and the second in another, each
    at a random depth up to `deep`; every chain is asked for. The choices pair every friend
    with every home, so that both hops must be right. The first hop is said aloud in the choice: asked for the home
    alone, SmolLM2-135M is at chance (3 of 12 questions at 768 tokens, 4 by chance)."""

    chains: int = 3
    deep: float = 0.6

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 2 <= self.chains <= 5:
            raise InputError(f"chains={self.chains} cannot be planted: use 2 to 5.")
        people = rng.sample(PEOPLE, 2 * self.chains)
        friends = people[self.chains :]
        cities = rng.sample(CITIES, self.chains)
        friendships = [f"The best friend of {one} is {other}." for one, other in zip(people, friends)]
        homes = [f"{other} lives in the city of {city}." for other, city in zip(friends, cities)]
        planted = [
            (rng.uniform(0, self.deep), "\n\n{}\n\n".format("\n".join(rng.sample(facts, self.chains))))
            for facts in (friendships, homes)
        ]
        pairs = [_said(friend, city) for friend, city in itertools.product(friends, cities)]
        questions = tuple(
            Question(f"\n\nThe best friend of {one} is", _said(other, city), tuple(rng.sample(pairs, len(pairs))))
            for one, other, city in zip(people, friends, cities)
        )
        return Sample(fill(tokenizer, context, planted, passage(rng)), questions)


def _said(friend: str, city: str) -> str:
    return f" {friend}.\n{friend} lives in the city of {city}"
