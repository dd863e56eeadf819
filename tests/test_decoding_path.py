"""Which way decoding steps go: what a cache says of it, when it warns, and what may wait for a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import fivefold
from conftest import VOCAB
from fivefold.errors import CacheStateError
from fivefold.store.transaction import Transaction
from recipes import SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def filled(model: Any, recipe: str, rows: int = 1, tokens: int = 80) -> Any:
    cache = fivefold.compress(model, recipe)
    with torch.inference_mode():
        model(ids(rows, tokens), past_key_values=cache)
    return cache


def test_large_numbers_stay_known_wherever_their_pages_go(tiny: Any, tmp_path: Path) -> None:
    """Or a kernel that cannot take them would read them: in another cache, from a file, from host memory."""
    model = tiny("llama", num_hidden_layers=2)
    cache = filled(model, "kivi(bits=4, residual=32)", 2)
    (bank,) = cache.session.banks
    assert 0 < bank.peak.max() < 750
    bank.note(np.array([bank.rows + 2]), np.array([2000.0], dtype=np.float32))  # layer 1, sequence 1
    cache.save(tmp_path)
    loaded = fivefold.load_cache(model, tmp_path)
    assert loaded.session.banks[0].peaks()[1] == 2000
    cache.offload()
    cache.restore()
    other = filled(model, "kivi(bits=4, residual=32)")
    other.join(cache)
    assert other.session.banks[0].peaks()[0] < 750 and other.session.banks[0].peaks()[1] == 2000
    gone = other.take([2])
    assert gone.session.banks[0].peaks()[1] == 2000
    assert other.session.banks[0].peaks().max() < 750


class Seen(torch.Tensor):
    """A tensor that stands for one of a device, as all that is made of it: who looks at its numbers would wait."""

    looks: ClassVar[list[str]] = []
    free = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            # Keys and values have come of positions, too: on a CPU they are looked at, and on a GPU they are not.
            with torch._C.DisableTorchFunctionSubclass():
                cls.looks += [] if cls.free or args[0].is_floating_point() else [name]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def seen(monkeypatch: Any) -> Iterator[type[Seen]]:
    """`Seen`, whose numbers may be looked at where a transaction is about to be committed."""
    verify = Transaction.verify

    def free(self: Transaction) -> None:
        Seen.free = True
        try:
            verify(self)
        finally:
            Seen.free = False

    monkeypatch.setattr(Transaction, "verify", free)
    Seen.looks = []
    yield Seen


def padded(rows: int, tokens: int, pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask, of which the first `pads` of the first sequence are padding."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :pads] = 0
    return ids(rows, tokens), mask


@pytest.mark.parametrize(("name", "graph"), [("full", True), ("kivi4", False), ("rotatekv", False), ("tidal", False)])
def test_nobody_looks_at_the_mask_of_a_step(tiny: Any, monkeypatch: Any, seen: Any, name: str, graph: bool) -> None:
    if graph:
        pytest.importorskip("triton", reason="needs Triton")
        monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
    model = tiny(**SHAPE)
    cache = fivefold.compress(model, written(name, model), cuda_graph=graph)
    given, mask = padded(2, 60, 7)
    with torch.inference_mode():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(given, attention_mask=mask, position_ids=places, past_key_values=cache)
        for step in range(4):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            places = mask.sum(1, keepdim=True) - 1
            model(
                ids(2, 1, step), attention_mask=mask.as_subclass(Seen), position_ids=places.as_subclass(Seen),
                past_key_values=cache,
            )  # fmt: skip
    assert seen.looks == []
    assert cache.lengths().tolist() == [57, 64] and (not graph or cache.step.replays == 4)
    chunk = torch.cat([mask, mask.new_ones(2, 5)], 1).as_subclass(Seen)
    places = chunk.cumsum(1)[:, -5:] - 1
    with torch.inference_mode():
        model(ids(2, 5), attention_mask=chunk, position_ids=places, past_key_values=cache)
    assert seen.looks  # of a chunk of several it has to be known: this test can fail


@pytest.mark.parametrize(("name", "graph"), [("full", True), ("kivi4", False), ("rotatekv", False), ("h2o", False)])
def test_a_step_that_is_padding_for_some(tiny: Any, monkeypatch: Any, name: str, graph: bool) -> None:
    """It is done once more, with a look at its mask: every sequence has the logits that it has alone."""
    if graph:
        pytest.importorskip("triton", reason="needs Triton")
        monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
    model = tiny(**SHAPE)
    recipe = written(name, model)
    cache, alone = fivefold.compress(model, recipe, cuda_graph=graph), [fivefold.compress(model, recipe) for _ in "12"]
    given, mask = padded(2, 60, 7)
    with torch.inference_mode():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(given, attention_mask=mask, position_ids=places, past_key_values=cache)
        for row, one in enumerate(alone):
            model(given[row : row + 1, (7, 0)[row] :], past_key_values=one)
        for step, there in enumerate([(1, 1), (0, 1), (1, 0), (1, 1), (1, 1)]):
            token = ids(2, 1, step)
            mask = torch.cat([mask, torch.tensor(there)[:, None]], 1)
            places = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
            out = model(token, attention_mask=mask, position_ids=places, past_key_values=cache).logits
            for row, one in enumerate(alone):
                if there[row]:
                    want = model(token[row : row + 1], past_key_values=one).logits
                    assert (out[row] - want[0]).norm() < (0.04 if graph else 1e-4) * want.norm(), (step, row)
        before = cache.lengths().tolist()
        assert before == [57, 64]
        wrong = torch.cat([mask, mask.new_ones(2, 1)], 1)
        wrong[1, 5] = 0
        with pytest.raises(CacheStateError, match="masks may only grow"):
            model(token, attention_mask=wrong, past_key_values=cache)
        assert cache.lengths().tolist() == before
        if name == "rotatekv":
            with pytest.raises(CacheStateError, match="position 99 was given where"):
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                model(token, attention_mask=mask, position_ids=places * 0 + 99, past_key_values=cache)
