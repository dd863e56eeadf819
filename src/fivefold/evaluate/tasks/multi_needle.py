"""Multi-needle with distractors: every fact asked for has others of the same form beside it."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, COLOURS, GOODS, PEOPLE, passage, shuffled

_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The captain of the {0} ship is called", PEOPLE),
    ("The meeting of the {0} club takes place in", CITIES),
    ("The merchant with the {0} hat sells", GOODS),
)


@task(
    "multi_needle",
    kind="choices",
    line="facts of three kinds, each with distractors that differ in one word, are spread over a long text",
    source="Kamradt, Needle In A Haystack, 2023; Hsieh et al., RULER, 2024 (multi-key needles)",
)
@dataclass(frozen=True)
class MultiNeedle(Task):
    """Of each kind, `rivals` + 1 facts stand at random depths; one of them is asked for, and the choices are the
    answers of all of its kind, so that knowing that a word was in the text does not help."""

    rivals: int = 3

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 1 <= self.rivals < len(COLOURS):
            raise InputError(f"rivals={self.rivals} cannot be planted: use 1 to {len(COLOURS) - 1}.")
        planted, questions = [], []
        for form, words in _KINDS:
            colours = rng.sample(COLOURS, self.rivals + 1)
            answers = rng.sample(words, self.rivals + 1)
            planted += [
                (rng.random(), f"\n\n{form.format(colour)} {word}.\n\n") for colour, word in zip(colours, answers)
            ]
            asked = rng.randrange(len(colours))
            questions.append(
                Question(f"\n\n{form.format(colours[asked])}", f" {answers[asked]}", shuffled(rng, answers))
            )
        return Sample(fill(tokenizer, context, planted, passage(rng)), tuple(questions))
