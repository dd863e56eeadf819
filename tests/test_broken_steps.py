"""Decoding steps as graphs (in Triton's interpreter) that are broken off at any tensor operation, of every method: what
is retried gives, bit for bit, what a cache gives that never failed. `FailsAt` knows nothing of the engine."""

from __future__ import annotations

import pytest
import torch

import fivefold
from conftest import KERNELS
from recipes import RECIPES, SHAPE, written
from test_transactions import FailsAt, Fault
from test_watched import ids

pytest.importorskip("triton", reason="needs Triton")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]
# A first step is captured; others are launched before they are begun, where all that they need is known.
AT_FIRST, SPREAD = 14, 8
PROMPT = 158
"""The third step begins a page."""


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_step_that_fails_at_any_operation(tiny, monkeypatch, name: str) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    model = tiny(**SHAPE)
    good, bad = (fivefold.compress(model, written(name, model), cuda_graph=True) for _ in range(2))
    faults = 0
    with torch.inference_mode():
        for cache in (good, bad):
            model(ids(2, PROMPT, model, 99), past_key_values=cache)
        for turn in range(4):
            token, counted = ids(2, 1, model, turn), FailsAt()
            with counted:
                wanted = model(token, past_key_values=good).logits
            spread = (counted.count * part // SPREAD + turn for part in range(1, SPREAD + 1))
            for point in sorted({*range(1, AT_FIRST), *spread} if turn < 2 else {turn, 3 * turn, *spread}):
                fails = FailsAt(point)
                try:
                    with fails:
                        found = model(token, past_key_values=bad).logits
                except Fault:
                    faults += 1
                    assert bad.get_seq_length() == PROMPT + turn, fails
                else:  # it has fewer operations: some were done before it failed
                    break
            else:
                found = model(token, past_key_values=bad).logits
            assert torch.equal(found, wanted), (turn, bad.step.failed)
            assert bad.get_seq_length() == good.get_seq_length() == PROMPT + turn + 1
    assert faults > 20
    fivefold.restore(model)
