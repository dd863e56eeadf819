"""Context against prior: the text says something else than what the model has learned."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import passage, shuffled

_CAPITALS = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Austria": "Vienna",
    "Greece": "Athens", "Portugal": "Lisbon", "Norway": "Oslo", "Poland": "Warsaw", "Ireland": "Dublin",
    "Japan": "Tokyo", "Egypt": "Cairo", "Russia": "Moscow", "England": "London",
}  # fmt: skip


@task(
    "context_prior",
    kind="choices",
    line="a long text moves capitals to other countries; the model must follow the text, not what it has learned",
    source="Minder et al., Controllable Context Sensitivity and the Knob Behind It, 2025",
)
@dataclass(frozen=True)
class ContextPrior(Task):
    """The capitals of `countries` countries are handed round, so that none keeps its own. The choices are all of them:
    the text's answer, the learned one, and the others. A model that has lost the text answers from memory and scores
    less than chance."""

    countries: int = 4

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 2 <= self.countries <= len(_CAPITALS):
            raise InputError(f"countries={self.countries} cannot be used: use 2 to {len(_CAPITALS)}.")
        countries = rng.sample(sorted(_CAPITALS), self.countries)
        capitals = [_CAPITALS[country] for country in countries[1:] + countries[:1]]
        planted = [
            (rng.random(), f"\n\nIn this story the capital of {country} is {capital}.\n\n")
            for country, capital in zip(countries, capitals)
        ]
        questions = tuple(
            Question(f"\n\nIn this story the capital of {country} is", f" {capital}", shuffled(rng, capitals))
            for country, capital in zip(countries, capitals)
        )
        return Sample(fill(tokenizer, context, planted, passage(rng)), questions)
