"""Passkey: one number in a long text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import passage


@task(
    "passkey",
    kind="generate",
    line="one five-digit number stands somewhere in a long text; the model is asked for it",
    source="Mohtashami and Jaggi, Landmark Attention, 2023",
)
@dataclass(frozen=True)
class Passkey(Task):
    """The number stands at a random depth between `shallow` and `deep` of the text."""

    shallow: float = 0.05
    deep: float = 0.9

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        number = str(rng.randrange(10000, 100000))
        planted = (
            f"\n\nThe vault opens with the number {number}. Remember that the number {number} opens the vault.\n\n"
        )
        prefix = fill(tokenizer, context, [(rng.uniform(self.shallow, self.deep), planted)], passage(rng))
        question = "\n\nWhich number opens the vault?\nThe vault opens with the number"
        return Sample(prefix, (Question(question, number),))
