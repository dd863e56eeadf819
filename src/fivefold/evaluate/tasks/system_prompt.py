"""System-prompt survival: an instruction at the very top must still hold after thousands of tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import COLOURS, GOODS, passage


@task(
    "system_prompt",
    kind="choices",
    line="rules at the very top say what to answer to which word; a long text later the words are said",
    source="Yang et al., No Token Left Behind (MiKV), 2024 (its observed failures)",
)
@dataclass(frozen=True)
class SystemPrompt(Task):
    """`rules` rules stand before everything else; each is tried, in its own words. The choices are the answers of all
    rules. Asked in other words ('The user says "milk", the assistant answers "'), SmolLM2-135M is at chance (3 of 12
    questions at 2,048 tokens, 6 of 16 at 1,024)."""

    rules: int = 4

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if not 2 <= self.rules <= len(COLOURS):
            raise InputError(f"rules={self.rules} cannot be given: use 2 to {len(COLOURS)}.")
        said = rng.sample(GOODS, self.rules)
        answers = rng.sample(COLOURS, self.rules)
        rules = "\n".join(f'When the user says "{word}", answer "{colour}".' for word, colour in zip(said, answers))
        top = f"System: You are an assistant who always follows these rules.\n{rules}\n\n"
        questions = tuple(
            Question(f'\n\nWhen the user says "{word}", answer "', colour, tuple(rng.sample(answers, self.rules)))
            for word, colour in zip(said, answers)
        )
        return Sample(fill(tokenizer, context, [(0.0, top)], passage(rng)), questions)
