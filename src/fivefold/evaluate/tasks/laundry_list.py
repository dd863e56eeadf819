"""Laundry list: recall the n-th item of a list."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import GOODS, passage, shuffled

_NUMBERS = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen",
)  # fmt: skip


@task(
    "laundry_list",
    kind="choices",
    line="a numbered list stands early in a long text; the model is asked which item has which number",
    source="Merullo, Eickhoff and Pavlick, Talking Heads, 2024",
)
@dataclass(frozen=True)
class LaundryList(Task):
    """A list of `items` goods at a random depth up to `deep`; `asked` of them are asked for by number. The choices are
    the right item and `rivals` others of the list."""

    items: int = 5
    asked: int = 4
    rivals: int = 3
    deep: float = 0.5

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not (self.rivals < self.items <= len(_NUMBERS) and 1 <= self.asked <= self.items and self.rivals >= 1):
            raise InputError(
                f"items={self.items}, asked={self.asked}, rivals={self.rivals} do not fit each other: "
                f"use at most {len(_NUMBERS)} items, and fewer rivals than items."
            )
        items = rng.sample(GOODS, self.items)
        lines = "\n".join(f"Number {name} on the list: {item}" for name, item in zip(_NUMBERS, items))
        prefix = fill(
            tokenizer,
            context,
            [(rng.uniform(0, self.deep), f"\n\nThe list of things to buy:\n{lines}\n\n")],
            passage(rng),
        )
        questions = []
        for at in rng.sample(range(self.items), self.asked):
            others = rng.sample([item for item in items if item != items[at]], self.rivals)
            text = f"\n\nFrom the list of things to buy:\nNumber {_NUMBERS[at]} on the list:"
            questions.append(Question(text, f" {items[at]}", shuffled(rng, [items[at], *others])))
        return Sample(prefix, tuple(questions))
