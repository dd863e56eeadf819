"""A chunk that is broken off while it writes: whatever it has written by then, committed tokens say what they said.

It fails at operations that write to what they are given, the last ones first. After each failure a fork of the cache
gives, bit for bit, what a fork gives of a cache that never failed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fivefold
from conversations import Conversation
from recipes import CHOOSING, PACKING, SHAPE, written
from test_transactions import STEPS, FailsAt, Fault, spread

pytestmark = pytest.mark.usefixtures("one_thread")
POINTS = 40


class FailsToWrite(FailsAt):
    """`FailsAt` that counts only operations that write to what they are given."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def shown(talk: Conversation, number: int, model: Any, cache: Any) -> torch.Tensor:
    """What a fork says next."""
    fork = cache.fork()
    try:
        return talk.give(number, model, fork)
    finally:
        fork.free()


def telling(model: Any, recipe: str, talk: Conversation) -> list[int]:
    """Chunks that write over something: the first steps in which tokens leave the exact tier (where none do, that which
    writes most), and the long one behind them."""
    cache, exact, writes = fivefold.compress(model, recipe), [], []
    for number in range(STEPS + 1):
        talk.give(number, model, cache, mode := FailsToWrite())
        exact.append(cache.report().exact)
        writes.append(mode.count)
    steps = range(1, STEPS + 1)
    leave = [step for step in steps if exact[step] < exact[step - 1]]
    return [*(leave[:2] or [max(steps, key=lambda step: writes[step])]), STEPS + 1]


@pytest.mark.parametrize("name", dict.fromkeys((*PACKING, *CHOOSING)))
def test_a_chunk_that_fails_as_it_writes(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    recipe, talk = written(name, model), Conversation.of(158, *[1] * STEPS, 33, 1, lengths=(158, 158))
    chunks = telling(model, recipe, talk)
    good, bad = (fivefold.compress(model, recipe) for _ in range(2))
    for number in range(len(talk)):
        if number not in chunks:
            assert torch.equal(*(talk.give(number, model, cache) for cache in (good, bad))), number
            continue
        said, wrong = shown(talk, number, model, good), []
        assert torch.equal(shown(talk, number, model, bad), said)
        want = talk.give(number, model, good, counting := FailsToWrite())
        for point in reversed(spread(counting.count, POINTS, name)):
            with pytest.raises(Fault):
                talk.give(number, model, bad, fails := FailsToWrite(point))
            found = shown(talk, number, model, bad)
            if not torch.equal(found, said):
                wrong.append(f"{fails} of {counting.count}: by up to {float((found - said).abs().max()):.2g}")
        assert not wrong, f"chunk {number}:\n" + "\n".join(wrong)
        assert torch.equal(talk.give(number, model, bad), want)
