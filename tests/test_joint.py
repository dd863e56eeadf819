"""What is due after a step moves in all layers at once, and comes out as layer by layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fivefold
from conftest import VOCAB
from fivefold.engine.session import Session
from fivefold.store import joint, plan
from fivefold.store.group import KV
from test_transactions import FailsAt, Fault

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning"),
]
LAYERS = 4
# A prompt behind whose last steps something is packed, at least twice.
RECIPES = {
    "mikv": ("mikv(floor=0)", 237, 44),
    "mikv-low4": ("mikv(floor=0, low=4, balance=False)", 237, 44),
    "mikv-high8": ("mikv(high=8, floor=0)", 237, 44),
    "h2o+kivi": ("h2o(keep=0.5) + kivi(bits=4, residual=32)", 140, 66),
}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def contents(cache: Any) -> list[torch.Tensor]:
    """All that its layers hold, and know of it."""
    out = []
    for store in cache.session.stores.values():
        for group in store.groups:
            exact = [group.exact_parts(name) for name in KV]
            out += [*group.dense(), *(torch.cat(parts, 1) for parts in exact if parts)]
            if group.packed.shape[1]:
                out += group.packed_fields(0, group.packed.shape[1]).values()
        for held in store.held:
            out += [held.places, held.positions, held.scores, torch.tensor([held.prompt, held.seen, held.final])]
    return out


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("at_once", [LAYERS, 2])
def test_it_is_what_each_layer_does(name: str, at_once: int, tiny: Any, monkeypatch: Any) -> None:
    """Bit by bit; and also where not all layers go at once."""
    model, (recipe, prompt, steps) = tiny("llama", num_hidden_layers=LAYERS), RECIPES[name]
    cache = fivefold.compress(model, recipe)
    moved: list[int] = []
    together = joint.advance

    def advance(bank: Any, revocable: int) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(joint, "NUMBERS", at_once * bank.rows * bank.layers[0].known[0].slots)
            if at_once < LAYERS:
                patch.setattr(plan, "NUMBERS", 3 * bank.packing.page * 64)  # pages that are written anew at a time
            done = together(bank, revocable)
        moved.append(len(done))
        return done

    with torch.inference_mode():
        model(ids(2, prompt), past_key_values=cache)
        other = cache.fork()
        for one, how in ((cache, advance), (other, lambda bank, revocable: [])):
            monkeypatch.setattr(joint, "advance", how)
            for step in range(steps):
                model(ids(2, 1, step + 1), past_key_values=one)
    assert set(moved) == {0, LAYERS}
    found, wanted = contents(cache), contents(other)
    assert len(found) == len(wanted)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted))
    for part in ("exact", "codes", "scales", "other", "statistics"):
        assert getattr(cache.report(), part) == getattr(other.report(), part)


def test_it_takes_fewer_operations(tiny: Any, monkeypatch: Any) -> None:
    """What is planned, quantised and checked is so once; each layer's pages lie in slabs of their own."""
    model, (recipe, prompt, _) = tiny("llama", num_hidden_layers=2 * LAYERS), RECIPES["mikv"]
    counts, real, together = [], Session.advance, joint.advance
    for how in (together, lambda bank, revocable: []):
        cache, found = fivefold.compress(model, recipe), []

        def advance(session: Any, revocable: int, found: Any = found) -> None:
            with Operations() as counted:
                real(session, revocable)
            found.append(sum(counted.names.values()))

        with torch.inference_mode(), monkeypatch.context() as patch:
            model(ids(1, prompt), past_key_values=cache)
            patch.setattr(joint, "advance", how)
            patch.setattr(Session, "advance", advance)
            for step in range(4):
                model(ids(1, 1, step + 1), past_key_values=cache)
        counts.append(max(found))
    assert 2 * counts[0] < counts[1], counts


@pytest.mark.parametrize("name", ["mikv", "h2o+kivi"])
def test_a_step_that_fails_in_it_leaves_nothing(name: str, tiny: Any, monkeypatch: Any) -> None:
    """At any operation, with a fork that shares the pages; and the step after that is as if there had been none."""
    model, (recipe, prompt, _) = tiny("llama", num_hidden_layers=LAYERS), RECIPES[name]
    cache, together, faults = fivefold.compress(model, recipe), joint.advance, 0
    with torch.inference_mode():
        model(ids(2, prompt), past_key_values=cache)
        for step in range(60):
            before, given = cache.fork(), ids(2, 1, step + 1)
            counted = FailsAt()
            moved: list[int] = []

            def counting(bank: Any, revocable: int, counted: Any = counted, moved: Any = moved) -> Any:
                with counted:
                    done = together(bank, revocable)
                moved.append(len(done))
                return done

            monkeypatch.setattr(joint, "advance", counting)
            model(given, past_key_values=cache)
            if not sum(moved):
                before.free()
                continue
            known = contents(before)
            for point in range(1, counted.count, max(1, counted.count // 11)):

                def failing(bank: Any, revocable: int, point: int = point) -> Any:
                    with FailsAt(point):
                        return together(bank, revocable)

                one = before.fork()
                monkeypatch.setattr(joint, "advance", failing)
                with pytest.raises(Fault):
                    model(given, past_key_values=one)
                faults += 1
                assert one.get_seq_length() == before.get_seq_length()
                for same in (before, one):
                    assert all(torch.equal(x, y) for x, y in zip(contents(same), known))
                monkeypatch.setattr(joint, "advance", together)
                model(given, past_key_values=one)
                assert all(torch.equal(x, y) for x, y in zip(contents(one), contents(cache)))
                one.free()
            break
    assert faults > 10
