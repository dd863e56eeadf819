"""Keys and values that are not numbers: every method refuses them in one sentence, and nothing has happened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import fivefold
from conversations import text
from fivefold.engine.layer import _check_later
from fivefold.errors import NonFiniteError
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store.transaction import Transaction
from recipes import RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def overflowing(model: Any, name: str, value: float) -> Iterator[None]:
    """One number of the newest token's keys ("k_proj") or values ("v_proj") in layer 1 is `value`."""

    def put(module: Any, given: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, -1, 5] = value
        return out

    hook = getattr(model.model.layers[1].self_attn, name).register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def stored(cache: Any) -> list[Any]:
    """What a report says of tokens, without what is worked out from page tables or a profile and kept for a while."""
    parts = ("tokens", "exact", "codes", "scales", "other", "slack", "statistics", "kept_tokens", "bits")
    return [getattr(cache.report(), part) for part in parts]


@pytest.mark.parametrize("name", RECIPES)
@torch.inference_mode()
def test_every_method_refuses_what_is_no_number(tiny: Any, name: str) -> None:
    """In a first prompt, a further turn, and a step after a prompt and of a text that comes token by token."""
    model, recipe = tiny(**SHAPE), written(name, tiny(**SHAPE))
    for before, size in (((), 90), ((100, 1), 90), ((100,), 1), ((1, 1), 1)):
        cache = fivefold.compress(model, recipe)
        for number, tokens in enumerate(before):
            model(text(tokens, seed=number), past_key_values=cache)
        other = cache.fork()
        report = stored(cache)
        for part, value in (("k_proj", math.nan), ("k_proj", -math.inf), ("v_proj", math.inf), ("v_proj", math.nan)):
            with overflowing(model, part, value), pytest.raises(NonFiniteError, match="look for the layer") as error:
                model(text(size), past_key_values=cache)
            assert "keys" in str(error.value) if part == "k_proj" else "values" in str(error.value)
            assert cache.get_seq_length() == sum(before)
        assert stored(cache) == report
        for tokens in (1, 60, 1):
            got, want = (model(text(tokens), past_key_values=one).logits for one in (cache, other))
            assert torch.equal(got, want), (before, size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1e5, 7.5])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("path", ["auto", "triton"])
def test_what_is_checked_later_is_what_is_checked_at_once(
    path: str, which: int, value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU says at the end of a forward what a CPU says of each layer."""
    if path == "triton":
        pytest.importorskip("triton", reason="needs Triton")
        monkeypatch.setenv("FIVEFOLD_KERNELS", path)
    pair = torch.linspace(-2, 3, 2 * 4 * 32 * 64).view(2, 4, 32, 64).to(dtype).to(DEVICE)
    pair[which, 3, 7, 11] = value
    said = []
    for later in (False, True):
        change = Transaction()
        try:
            if later:
                _check_later(change, *pair)
                change.verify()
            else:
                KiviCodec(4, 32, 32, 64).check(*pair)
        except NonFiniteError as error:
            said.append(str(error))
    assert len(said) == (0 if abs(value) < 100 else 2) and len(set(said)) <= 1


def test_what_a_change_asks_last_comes_to_those_who_asked() -> None:
    """All numbers of a dtype come to the host together, and each action is given its own."""
    change, found = Transaction(), list[tuple[int, list[float]]]()
    for number, values in enumerate(([1.0, 2.0], [3.0], [], [4.0, 5.0, 6.0])):
        dtype = torch.float64 if number == 1 else torch.float32
        change.check(torch.tensor(values, dtype=dtype), lambda given, n=number: found.append((n, given)), last=True)
    change.verify()
    assert sorted(found) == [(0, [1.0, 2.0]), (1, [3.0]), (2, []), (3, [4.0, 5.0, 6.0])]
