"""What RULER's kinds have in common: a prompt of a given size, as many tokens as fit, and where the question begins.

The process is that of NVIDIA/RULER at commit c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a (Hsieh et al., RULER: What's the
Real Context Size of Your Long-Context Language Models?, arXiv:2404.06654): from the same random numbers and the same
number of sentences, words or documents come the same prompt and the same answers (`tests/golden/ruler.json`).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fivefold.errors import InputError
from fivefold.evaluate.ruler.data import Data
from fivefold.evaluate.tasks.base import Kind, Question, Sample, Task

Count = Callable[[str], int]
"""How many tokens a text has."""
SLACK = 500
"""A prompt may be shorter than asked for by one part in so many, where finding the last words is not worth it."""


class Draw:
    """The random numbers of one sample, Python's and NumPy's, and an order for lists that is the same every time."""

    def __init__(self, seed: int) -> None:
        """seed: from 0 to 2**32 - 1."""
        self.random = random.Random(seed)
        self.numpy = np.random.RandomState(seed)
        self._seed = seed

    def again(self) -> Draw:
        """The same numbers from their beginning on."""
        return Draw(self._seed)

    def shuffled(self, items: list[str]) -> list[str]:
        """A copy in an order that only the seed and the number of items decide."""
        copy = list(items)
        random.Random(self._seed).shuffle(copy)
        return copy


@dataclass(frozen=True)
class Prompt:
    """text: up to where the question begins. question: the rest of what the user says. begun: how the answer begins,
    put in the model's mouth. references: what must be in the answer."""

    text: str
    question: str
    begun: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class RulerTask(Task):
    """One of the thirteen kinds.

    variant: as RULER's configuration calls it. data: the texts that it is made from. number: which of a suite's samples
    this is; only questions of RULER's own files are taken in order. `generate` tokens are written at most.
    """

    kind: ClassVar[Kind] = "match_all"
    generate: ClassVar[int]

    variant: str
    data: Data = field(default_factory=Data)
    number: int = 0

    def compose(self, draw: Draw, size: int, context: int, count: Count) -> Prompt:
        """The prompt with `size` sentences, words or documents; `context` is what it may have in tokens."""
        raise NotImplementedError

    def smallest(self) -> int:
        """The smallest size that a prompt can have."""
        return 1

    def sources(self) -> dict[str, str]:
        """The digests of the texts that are used; reads them. Raises `InputError` for one that cannot be had."""
        raise NotImplementedError

    def about(self) -> str:
        """What is asked, in a line."""
        raise NotImplementedError

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        """A sample whose prompt and answer together have at most `context` tokens, and nearly as many.

        Everything counts: the model's chat template, the question and the `generate` tokens of the answer. The prefix
        ends where the question begins, so that the cache is compressed before the question is known. Raises
        `InputError` for a context too short.
        """
        seed = rng.getrandbits(32)

        def prompt(size: int, room: int = context) -> Prompt:
            return self.compose(Draw(seed), size, room, lambda text: len(_plain(tokenizer, text)))

        def length(size: int, room: int = context) -> int:
            return len(encode(tokenizer, prompt(size, room))[0]) + self.generate

        size, least = self.smallest(), context
        while (needed := length(size, least)) > least:  # what a prompt holds may depend on the context
            least = needed
        if least > context:
            raise InputError(
                f"a context of {context} tokens is too short for RULER's {self.variant}: it needs at least {least}."
            )
        best = prompt(largest(length, size, context))
        ids, at = encode(tokenizer, best)
        asked = Question(
            best.question + best.begun,
            ", ".join(best.references),
            ids=tuple(ids[at:]),
            references=best.references,
            limit=self.generate,
        )
        return Sample(ids[:at], (asked,))


def largest(length: Callable[[int], int], least: int, limit: int) -> int:
    """The largest size whose `length` is at most `limit`, or one that is shorter by at most `limit / SLACK`; `least` if
    not even that fits. A length is measured a few times only: it is nearly a line.
    """
    low, short = least, length(least)
    if short > limit:
        return low
    high, long = 0, 0  # the smallest size known not to fit; 0 is none
    slope = 0.0
    for step in range(64):
        if high - low == 1 or (step and limit - short <= limit // SLACK):
            break
        if not high:
            ahead = (limit - short) / slope * 1.05 + 1 if slope else 8
            size = low + max(1, round(min(ahead, 16.0 * (low + 8))))
        elif step % 3 == 2:  # a line that bends would be crept along
            size = (low + high) // 2
        else:
            size = low + round((limit - short) * (high - low) / max(1, long - short))
            size = min(high - 1, max(low + 1, size))
        got = length(size)
        slope = max((got - short) / (size - low), 1e-3)
        if got <= limit:
            low, short = size, got
        else:
            high, long = size, got
    return low


def encode(tokenizer: Any, prompt: Prompt) -> tuple[list[int], int]:
    """(the ids of the whole prompt, how many of them stand before the question).

    In the tokenizer's chat template if it has one, else as plain text with what the tokenizer begins a text with. The
    whole is encoded as one text; a token that reaches over into the question belongs to the question.
    """
    text = prompt.text + prompt.question
    ids = _begun
    if getattr(tokenizer, "chat_template", None) is not None:
        ids = _plain
        # Where a template can let a model think first, it is told not to: the answer has begun.
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    before = text[: text.rindex(prompt.question)]
    whole, part = ids(tokenizer, text + prompt.begun), ids(tokenizer, before)
    same = 0
    for one, two in zip(whole, part):
        if one != two:
            break
        same += 1
    return whole, same


def _plain(tokenizer: Any, text: str) -> list[int]:
    # While a size is looked for, a text may be longer than the model takes: no reason to warn.
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _begun(tokenizer: Any, text: str) -> list[int]:
    ids = list(tokenizer(text, verbose=False).input_ids)
    # A tokenizer that ends a text would end the prompt.
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
