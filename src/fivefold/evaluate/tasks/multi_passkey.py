"""Multi-passkey: several numbers, each with a name, in a long text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, passage


@task(
    "multi_passkey",
    kind="generate",
    line="several cities each have a five-digit number somewhere in a long text; the model is asked for each",
    source="Xiao et al., DuoAttention, 2024 (the task its head gates are trained on)",
)
@dataclass(frozen=True)
class MultiPasskey(Task):
    """`keys` numbers at random depths. Every one of them is asked for: the wrong ones are the distractors."""

    keys: int = 4

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 1 <= self.keys <= len(CITIES):
            raise InputError(f"keys={self.keys} cannot be planted: use 1 to {len(CITIES)}.")
        cities = rng.sample(CITIES, self.keys)
        numbers = [str(number) for number in rng.sample(range(10000, 100000), self.keys)]
        planted = [
            (
                rng.random(),
                f"\n\nThe vault of {city} opens with the number {number}. Remember that the number {number} opens the "
                f"vault of {city}.\n\n",
            )
            for city, number in zip(cities, numbers)
        ]
        prefix = fill(tokenizer, context, planted, passage(rng))
        return Sample(
            prefix,
            tuple(
                Question(
                    f"\n\nWhich number opens the vault of {city}?\nThe vault of {city} opens with the number", number
                )
                for city, number in zip(cities, numbers)
            ),
        )
