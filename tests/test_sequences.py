"""Sequences come and go: whatever joins, leaves and comes back gets the logits that it would get alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import fivefold
from conversations import text
from fivefold.errors import CacheFullError, CacheStateError
from fivefold.models.cache import FivefoldCache
from recipes import PACKING, RECIPES, SHAPE, written
from test_transactions import FailsAt, FailsToAllocate, Fault

pytestmark = [pytest.mark.usefixtures("one_thread")]

PROMPTS = (50, 170, 260)
# A number on the edge between two codes may fall on either side in a batch: a step is far more than a rounding error.
CLOSE, A_CODE = {"atol": 2e-5, "rtol": 1e-4}, {"atol": 3e-3, "rtol": 1e-2}


class Conversations:
    """Sequences in one batch, or in several batches alike, and each of them alone in a cache of its own.

    own_pools: of each batch, whether what joins it comes from pools of its own. live: which sequence each row is.
    """

    def __init__(self, model: Any, recipe: str, own_pools: tuple[bool, ...] = (False,)) -> None:
        self.model, self.recipe, self.own_pools = model, recipe, own_pools
        self.batches = [fivefold.compress(model, recipe) for _ in own_pools]
        self.batch = self.batches[0]
        self.alone = [fivefold.compress(model, recipe) for _ in PROMPTS]
        self.prompts = [text(tokens, seed=tokens) for tokens in PROMPTS]
        self.next = text(400, len(PROMPTS), seed=3)
        self.seen = [0] * len(PROMPTS)
        self.live: list[int] = []
        self.close = CLOSE if recipe in (RECIPES[name] for name in set(RECIPES) - set(PACKING)) else A_CODE

    @torch.inference_mode()
    def arrive(self, which: int) -> list[FivefoldCache]:
        """For each batch a cache that has read a prompt."""
        caches = [
            fivefold.compress(self.model, self.recipe) if own else batch.new()
            for batch, own in zip(self.batches, self.own_pools)
        ]
        for one in (*caches, self.alone[which]):
            self.model(self.prompts[which], past_key_values=one)
        return caches

    def join(self, which: int, caches: list[FivefoldCache]) -> None:
        self.live.append(which)
        for batch, cache in zip(self.batches, caches, strict=True):
            batch.join(cache)
            assert cache.batch == 0 and cache.get_seq_length() == 0 and batch.batch == len(self.live)

    @torch.inference_mode()
    def step(self, count: int) -> None:
        for _ in range(count):
            tokens = torch.stack([self.next[i, self.seen[i] : self.seen[i] + 1] for i in self.live])
            found = [self.model(tokens, past_key_values=batch).logits for batch in self.batches]
            for row, i in enumerate(self.live):
                alone = self.model(tokens[row : row + 1], past_key_values=self.alone[i]).logits
                for logits in found:
                    torch.testing.assert_close(logits[row], alone[0], **self.close)
                self.seen[i] += 1
        for batch in self.batches:
            assert batch.lengths().tolist() == [PROMPTS[i] + self.seen[i] for i in self.live]

    def take(self, *rows: int) -> list[FivefoldCache]:
        self.live = [i for row, i in enumerate(self.live) if row not in rows]
        return [batch.take(rows) for batch in self.batches]

    def drop(self, row: int) -> None:
        del self.live[row]
        for batch in self.batches:
            batch.drop([row])

    def finish(self) -> None:
        for batch in self.batches:
            batch.free()
            budget = batch.session.pools.budget
            assert budget.used == 0 and not budget.charged


@pytest.mark.parametrize("name", RECIPES)
def test_sequences_come_and_go(tiny: Any, name: str) -> None:
    """From the batch's own pools, and from others."""
    model = tiny(**SHAPE)
    talk = Conversations(model, written(name, model), (False, True))
    for which in (0, 2, 1):
        talk.join(which, talk.arrive(which))
        talk.step(7)
    taken = talk.take(1)
    talk.step(33)
    assert all(one.batch == 1 and one.lengths().tolist() == [PROMPTS[2] + 14] for one in taken)
    talk.join(2, taken)
    talk.step(5)
    talk.drop(0)
    talk.step(3)
    talk.finish()


@pytest.mark.parametrize("name", ["full", "kivi-residual", "streaming+kivi", "snapkv"])
def test_layers_with_a_sliding_window_move_too(tiny: Any, name: str) -> None:
    model = tiny("gemma3_text", sliding_window=64)
    talk = Conversations(model, RECIPES[name])
    for which in (1, 0, 2):
        talk.join(which, talk.arrive(which))
        talk.step(9)
    (one,) = talk.take(0, 2)
    talk.step(20)
    assert one.batch == 2
    talk.batch.join(one)
    talk.live += [1, 2]
    talk.step(9)
    talk.finish()


@pytest.mark.parametrize("name", ["full", "kivi-residual", "rotatekv"])
def test_a_mask_says_the_same_as_none(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    talk = Conversations(model, written(name, model))
    for which in (0, 1):
        talk.join(which, talk.arrive(which))
    other, tokens, length = talk.batch.fork(), text(1, 2), talk.batch.get_seq_length()
    mask = (torch.arange(length + 1) >= length - torch.tensor(talk.batch.lengths())[:, None]).long()
    with torch.inference_mode():
        expected = model(tokens, past_key_values=talk.batch).logits
        for given in (mask, torch.cat([mask.new_zeros(2, 5), mask], 1)):
            cache = other.fork()
            assert torch.equal(model(tokens, past_key_values=cache, attention_mask=given).logits, expected)


def test_chunks_of_joined_sequences(tiny: Any) -> None:
    """Several tokens of each at once."""
    model = tiny(**SHAPE)
    talk = Conversations(model, RECIPES["kivi-residual"])
    for which in (0, 1):
        talk.join(which, talk.arrive(which))
    tokens = text(40, 2)
    with torch.inference_mode():
        out = model(tokens, past_key_values=talk.batch).logits
        for row in (0, 1):
            alone = model(tokens[row : row + 1], past_key_values=talk.alone[row]).logits
            torch.testing.assert_close(out[row], alone[0], **talk.close)


def test_another_kind_of_cache_cannot_join(tiny: Any) -> None:
    cache = fivefold.compress(tiny(**SHAPE), "full()")
    assert repr(cache) == "<FivefoldCache full(), 0 tokens>"
    with pytest.raises(CacheStateError, match="a DynamicCache cannot join"):
        cache.join(DynamicCache())  # type: ignore[arg-type]


@pytest.mark.parametrize("change", ["join", "own pools", "take"])
@pytest.mark.parametrize("name", ["full", "kivi-residual", "snapkv+kivi", "cskv", "kv_heads"])
def test_a_failure_leaves_both_sides_as_they_were(tiny: Any, name: str, change: str) -> None:
    model = tiny(**SHAPE)
    talk = Conversations(model, written(name, model), (change == "own pools",))
    talk.join(1, talk.arrive(1))
    talk.join(0, talk.arrive(0))
    failed, at = 0, 1
    cache = talk.batch.new() if change == "take" else talk.arrive(2)[0]
    while True:
        before = [talk.batch.lengths().tolist(), cache.lengths().tolist()]
        try:
            with FailsAt(at) as mode:
                taken = talk.batch.take([1]) if change == "take" else talk.batch.join(cache)
        except Fault:
            failed += 1
            assert [talk.batch.lengths().tolist(), cache.lengths().tolist()] == before
        else:
            assert mode.raised == ""
            break
        at += 1 if at < 4 else 5
    if change == "take":
        talk.live = [1]
        talk.step(2)
        talk.join(0, [taken])
    else:
        talk.live.append(2)
    assert failed or name == "full"
    talk.step(2)
    talk.finish()


def test_no_memory_for_a_page_leaves_both_sides_as_they_were(tiny: Any) -> None:
    model = tiny(**SHAPE)
    talk = Conversations(model, "full()")
    talk.join(0, talk.arrive(0))
    cache = talk.arrive(1)
    talk.join(1, cache)
    with FailsToAllocate(1), pytest.raises(torch.OutOfMemoryError):
        talk.step(40)
    talk.batch.free()


def test_the_cap_holds_for_what_comes_from_other_pools(tiny: Any) -> None:
    model = tiny(**SHAPE)
    cache, other = fivefold.compress(model, "full()", 600_000), fivefold.compress(model, "full()")
    with torch.inference_mode():
        model(text(200), past_key_values=cache)
        model(text(400), past_key_values=other)
        used = [one.session.pools.budget.used for one in (cache, other)]
        with pytest.raises(CacheFullError, match="raise max_bytes"):
            cache.join(other)
        assert [one.session.pools.budget.used for one in (cache, other)] == used
        assert (cache.batch, other.batch) == (1, 1)
        fork = other.fork()
        assert torch.equal(*(model(text(3), past_key_values=one).logits for one in (other, fork)))


def test_what_cannot_be_is_refused_in_a_sentence(tiny: Any) -> None:
    model = tiny(**SHAPE)
    cache, other, quantised = (fivefold.compress(model, recipe) for recipe in ("full()", "full()", "kivi()"))
    with torch.inference_mode():
        for one in (cache, other, quantised):
            model(text(40), past_key_values=one)
    fork = other.fork()
    for match, call in {
        "cannot join itself": lambda: cache.join(cache),
        "same recipe": lambda: cache.join(quantised),
        "shared with forks": lambda: cache.join(other),
        "no sequence 1": lambda: cache.take([1]),
        "name each one once": lambda: cache.take([0, 0]),
        "are not numbers of sequences": lambda: cache.drop([0.5]),
    }.items():
        with pytest.raises(CacheStateError, match=match):
            call()
        assert cache.batch == other.batch == quantised.batch == 1
    fork.free()
    cache.join(other)
    assert cache.batch == 2
    cache.drop(torch.tensor([-1]))
    assert cache.lengths().tolist() == [40]
    empty = cache.take(np.array([], dtype=np.int64))
    assert (cache.batch, empty.batch) == (1, 0)
    cache.join(empty)
    assert cache.batch == 1
    cache.drop([0])
    assert (cache.batch, cache.get_seq_length()) == (0, 0)
    assert all(pool.pages_in_use == 0 for pool in cache.session.pools)
