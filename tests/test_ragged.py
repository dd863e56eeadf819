"""Sequences of different lengths in one batch: each is as if it were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fivefold
from conversations import Conversation, text
from recipes import PACKING, RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = (133, 222, 167)
STEPS = 34


def check(model: Any, recipe: str, talk: Conversation) -> None:
    """Every sequence of a batch has the logits that it has alone, in every chunk."""
    cache, off = fivefold.compress(model, recipe), Off(recipe)
    found = [talk.rows(number, talk.give(number, model, cache)) for number in range(len(talk))]
    for row in range(len(talk.ids)):
        one, cache = talk.alone(row), fivefold.compress(model, recipe)
        for number, size in enumerate(one.sizes):
            if size:
                off.add(f"sequence {row}", f"chunk {number}", found[number][row], one.give(number, model, cache))
    off.check()


class Off:
    """By how much logits are off, by sequence: less than 1e-4. Where tokens are packed, a number of one sequence may
    have been rounded the other way, because sums were added up in another order; then it is off by a little more. Where
    exact pages are rounded to eight bits as well, that happens to two of three now and then."""

    def __init__(self, recipe: str) -> None:
        self.packs = any(codec in recipe for codec in ("kivi", "gear", "mikv", "rotate", "cskv", "kv_heads"))
        self.few = 3 if "high=8" in recipe else 2
        self.worst: dict[str, tuple[float, str]] = {}

    def add(self, sequence: str, where: str, got: torch.Tensor, want: torch.Tensor) -> None:
        found = float((got - want).abs().max()), where
        self.worst[sequence] = max(self.worst.get(sequence, (0.0, "")), found)

    def check(self) -> None:
        sizes = sorted(size for size, _ in self.worst.values())
        said = ", ".join(f"{sequence} is off by {size:.2g} in {at}" for sequence, (size, at) in self.worst.items())
        assert sizes[-1] < 1e-4 or (self.packs and sizes[-1] < 0.05 and sizes[-self.few] < 1e-4), said


@pytest.mark.parametrize("name", RECIPES)
def test_each_sequence_is_as_if_alone(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    check(model, written(name, model), Conversation.of(max(LENGTHS), *[1] * STEPS, lengths=LENGTHS))


@pytest.mark.parametrize("name", RECIPES)
def test_a_prompt_in_chunks(tiny: Any, name: str) -> None:
    """The first chunks are padding only for some, and end within the padding of others."""
    model = tiny(**SHAPE)
    talk = Conversation.of(222, *[1] * 8, lengths=(60, 222, 167))
    recipe, sizes = written(name, model), (100, 61, 61, *[1] * 8)
    check(model, recipe, Conversation(talk.ids, sizes, talk.mask))


@pytest.mark.parametrize("name", RECIPES)
def test_reordered_rows_go_on_as_what_they_were(tiny: Any, name: str) -> None:
    """Sequences of other lengths take each other's places, twice, one of them is given up and one is there twice."""
    model = tiny(**SHAPE)
    recipe = written(name, model)
    talk = Conversation.of(max(LENGTHS), *[1] * 12, lengths=LENGTHS)
    assert talk.mask is not None
    cache, off = fivefold.compress(model, recipe), Off(recipe)
    talk.give(0, model, cache)
    rows = torch.arange(3)
    for number, order in ((1, [2, 0, 2]), (5, [1, 0, 0])):
        rows = rows[order]
        cache.reorder_cache(torch.tensor(order))
        # Each row goes on with another text from here.
        ids = talk.ids[order].clone()
        ids[:, sum(talk.sizes[:number]) :] = text(12 - number + 1, 3, seed=number)
        talk = Conversation(ids, talk.sizes, talk.mask[order])
        later = range(number, 5 if number == 1 else len(talk))
        found = [talk.rows(step, talk.give(step, model, cache)) for step in later]
        for row in range(3):
            one, alone = talk.alone(row), fivefold.compress(model, recipe)
            for step in range(later.stop):
                logits = one.give(step, model, alone)
                if step in later:
                    off.add(f"sequence {rows[row]} in row {row}", f"step {step}", found[step - number][row], logits)
    off.check()


@pytest.mark.parametrize("name", RECIPES)
def test_beams_have_the_scores_of_their_sequences(tiny: Any, name: str) -> None:
    """However beams of a ragged batch were reordered: each one's score is that of its sequence fed to a cache alone."""
    model, new = tiny(**SHAPE), 8
    recipe, talk = written(name, model), Conversation.of(max(LENGTHS), lengths=LENGTHS)
    found = model.generate(
        talk.ids, attention_mask=talk.mask, past_key_values=fivefold.compress(model, recipe), max_new_tokens=new,
        num_beams=3, num_return_sequences=2, do_sample=False, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True,
    )  # fmt: skip
    for number, (sequence, score) in enumerate(zip(found.sequences, found.sequences_scores)):
        ids = sequence[None, max(LENGTHS) - LENGTHS[number // 2] :]
        one, cache, total = Conversation(ids, (LENGTHS[number // 2], *[1] * new)), fivefold.compress(model, recipe), 0.0
        for step in range(new):
            logits = one.give(step, model, cache)[-1]
            total += float(logits.log_softmax(-1)[ids[0, LENGTHS[number // 2] + step]])
        near = pytest.approx(total / new, abs=1e-3 if name in PACKING else 1e-4)
        assert float(score) == near, f"beam {number % 2} of sequence {number // 2}"
