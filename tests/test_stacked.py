"""What is due after a step is encoded for all layers in one call, and comes out as layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fivefold
from conversations import Conversation
from fivefold.store import pack, pairs
from fivefold.store.group import Stacked
from recipes import PACKING, RECIPES, SHAPE, written
from test_joint import Operations, contents
from test_transactions import FailsAt, Fault

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning"),
]
LAYERS = 6
STACKED = ("rotatekv", "cskv", "kv_heads", "kv_heads-group", "minicache")
SIZES = (250, *[1] * 36)
LENGTHS = (250, 219, 250, 131)


def heads(name: str, monkeypatch: Any) -> str:
    """The name of a recipe that is `name` beside heads of two kinds, not the same ones in all layers."""
    kinds = [[1, 0], [0, 1], [1, 0], [1, 1], [0, 1], [1, 0]]
    monkeypatch.setitem(RECIPES, "beside", f"duo(retrieval={kinds}, sink=4, recent=40) + {RECIPES[name]}")
    return "beside"


def apart(monkeypatch: Any) -> None:
    for module in (pack, pairs):
        monkeypatch.setattr(module, "layers_at_once", lambda bank, tokens: 1)


def packed_tokens(cache: Any) -> int:
    groups = [group for store in cache.session.stores.values() for group in store.groups]
    return sum(int(group.bounds.packed_stop) * len(group.rows) for group in groups)


def compare(model: Any, recipe: str, talk: Conversation, monkeypatch: Any) -> None:
    """Bit by bit what is packed layer by layer; the two are compared after every step in which something is."""
    cache = fivefold.compress(model, recipe)
    talk.give(0, model, cache)
    other = cache.fork()
    before, times = packed_tokens(cache), 0
    for number in range(1, len(talk)):
        talk.give(number, model, cache)
        with monkeypatch.context() as patch:
            apart(patch)
            talk.give(number, model, other)
        now = packed_tokens(cache)
        if now != before:
            times, before = times + 1, now
            found, wanted = contents(cache), contents(other)
            assert len(found) == len(wanted)
            assert all(torch.equal(x, y) for x, y in zip(found, wanted)), number
    assert times
    for part in ("exact", "codes", "scales", "other", "statistics", "learned"):
        assert getattr(cache.report(), part) == getattr(other.report(), part)


@pytest.mark.parametrize("name", PACKING)
def test_pages_are_those_of_each_layer_alone(name: str, tiny: Any, monkeypatch: Any) -> None:
    model = tiny(**SHAPE)
    compare(model, written(name, model), Conversation.of(*SIZES), monkeypatch)


@pytest.mark.parametrize("beside", [False, True], ids=["", "duo"])
@pytest.mark.parametrize("name", STACKED)
def test_rows_of_different_lengths(name: str, beside: bool, tiny: Any, monkeypatch: Any) -> None:
    """Of many layers, not all with the same heads beside `duo`."""
    if beside and name == "minicache":
        pytest.skip("two layers share pages of the same heads only")
    model = tiny("llama", num_hidden_layers=LAYERS)
    recipe = heads(name, monkeypatch) if beside else name
    compare(model, written(recipe, model), Conversation.of(*SIZES, lengths=LENGTHS), monkeypatch)


@pytest.mark.parametrize("name", STACKED)
def test_rows_that_stand_alike(name: str, tiny: Any, monkeypatch: Any) -> None:
    """Several sequences of a layer in one product round as they do in the layer alone."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    compare(model, written(name, model), Conversation.of(*SIZES, lengths=(SIZES[0],) * 3), monkeypatch)


@pytest.mark.parametrize("name", STACKED)
def test_a_step_takes_few_operations(name: str, tiny: Any, monkeypatch: Any) -> None:
    """What is left of each layer are views of the slabs that its pages lie in."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    talk, counts = Conversation.of(*SIZES[:40]), []
    for alone in (False, True):
        with monkeypatch.context() as patch:
            if alone:
                apart(patch)
            cache, found = fivefold.compress(model, written(name, model)), []
            for number in range(len(talk)):
                with Operations() as counted:
                    talk.give(number, model, cache)
                found.append(sum(counted.names.values()))
            steps = sorted(found[1:])
            counts.append(steps[-1] - steps[len(steps) // 2])
    assert 1.7 * counts[0] < counts[1], counts


@pytest.mark.parametrize("name", ["rotatekv", "cskv", "kv_heads"])
def test_nothing_is_held_twice(name: str, tiny: Any, monkeypatch: Any) -> None:
    """What codecs have made for their layers lies in one stack, which all steps find again, and a fork too."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    cache, made = fivefold.compress(model, written(name, model)), []
    talk, real = Conversation.of(*SIZES, *[1] * 32), Stacked.codec_of
    monkeypatch.setattr(Stacked, "codec_of", lambda self, *args: made.append(self.count) or real(self, *args))
    talk.give(0, model, cache)
    codecs = [store.codec for store in cache.session.stores.values()]
    nbytes = [codec.nbytes for codec in codecs]
    for number in range(1, len(talk)):
        talk.give(number, model, cache)
        if len(made) == 1:
            held = {x.untyped_storage().data_ptr() for codec in codecs for some in codec.made.values() for x in some}
    assert len(made) >= 2 and set(made) == {LAYERS}
    assert [codec.nbytes for codec in codecs] == nbytes
    again = {x.untyped_storage().data_ptr(): x for codec in codecs for some in codec.made.values() for x in some}
    assert set(again) == held and len(again) < LAYERS * len(next(iter(codecs[0].made.values())))
    each = sum(x.nbytes for codec in codecs for some in codec.made.values() for x in some)
    assert sum(x.untyped_storage().nbytes() for x in again.values()) == each


@pytest.mark.parametrize("name", ["rotatekv", "cskv", "minicache"])
def test_a_step_that_fails_in_it_leaves_nothing(name: str, tiny: Any) -> None:
    """At any operation, with a fork that shares the pages; and the step after that is as if there had been none."""
    model = tiny("llama", num_hidden_layers=LAYERS)
    cache, talk, faults = fivefold.compress(model, written(name, model)), Conversation.of(*SIZES), 0
    talk.give(0, model, cache)
    usual = 0
    for number in range(1, len(talk)):
        before, counted = cache.fork(), FailsAt()
        talk.give(number, model, cache, within=counted)
        usual = usual or counted.count
        if counted.count < usual + 100:
            before.free()
            continue
        known = contents(before)
        for point in range(usual // 2, counted.count, max(1, counted.count // 15)):
            one = before.fork()
            with pytest.raises(Fault):
                talk.give(number, model, one, within=FailsAt(point))
            faults += 1
            assert one.get_seq_length() == before.get_seq_length()
            assert all(torch.equal(x, y) for same in (before, one) for x, y in zip(contents(same), known))
            talk.give(number, model, one)
            assert all(torch.equal(x, y) for x, y in zip(contents(one), contents(cache)))
            one.free()
        break
    assert faults > 5
