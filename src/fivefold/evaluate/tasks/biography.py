"""Biographies: how many bits of what was read about people can be recalled."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, PEOPLE, passage, shuffled

_SUBJECTS = (
    "astronomy", "biology", "botany", "chemistry", "economics", "geography", "geology", "law", "medicine", "music",
    "philosophy", "physics", "sociology",
)  # fmt: skip
_EMPLOYERS = (
    "Amazon", "Boeing", "Disney", "Ford", "Google", "Intel", "Microsoft", "Nike", "Pfizer", "Samsung", "Shell",
    "Toyota",
)  # fmt: skip
_FACTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("{0} was born in the city of", CITIES),
    ("{0} studied", _SUBJECTS),
    ("{0} works for", _EMPLOYERS),
)


@task(
    "biography",
    kind="bits",
    line="invented people with three facts each in a long text; how many bits of each fact does the model recall?",
    source="Allen-Zhu and Li, Physics of Language Models 3.3: Knowledge Capacity, 2024",
)
@dataclass(frozen=True)
class Biography(Task):
    """Short lives of `people` people at random depths, `asked` facts asked for. The choices are the facts of the same
    kind of all people, so a fact is worth log2(people) bits, and knowing what was in the text is worth none.
    A model that is sure of the wrong fact scores below 0. SmolLM2-135M recalls little: 0.19 to 0.45 bits of two in
    three small runs. Four people were preferred to three after all runs were seen, so the highest of these is
    flattered."""

    people: int = 4
    asked: int = 6

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        most = min(len(words) for _, words in _FACTS)
        if not 2 <= self.people <= most or not 1 <= self.asked <= self.people * len(_FACTS):
            raise InputError(
                f"people={self.people} with asked={self.asked} cannot be used: use 2 to {most} people "
                f"and at most {len(_FACTS)} questions each."
            )
        names = rng.sample(PEOPLE, self.people)
        values = [rng.sample(words, self.people) for _, words in _FACTS]
        planted = []
        for at, name in enumerate(names):
            life = " ".join(f"{form.format(name)} {of[at]}." for (form, _), of in zip(_FACTS, values))
            planted.append((rng.random(), f"\n\n{life}\n\n"))
        every = [(at, fact) for at in range(self.people) for fact in range(len(_FACTS))]
        questions = tuple(
            Question(f"\n\n{_FACTS[fact][0].format(names[at])}", f" {values[fact][at]}", shuffled(rng, values[fact]))
            for at, fact in rng.sample(every, self.asked)
        )
        return Sample(fill(tokenizer, context, planted, passage(rng)), questions)
