"""Conversations that wait in pages, in host memory and on the disk: their answers are those of each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conversations import text
from fivefold.errors import CacheFullError, CacheStateError, InputError, SavedCacheError
from fivefold.generation import Conversations, Request, Scheduler
from recipes import SHAPE, written

pytestmark = [pytest.mark.usefixtures("one_thread")]

ANSWER = 6


def turns(count: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [text(rng.randint(20, 120), seed=seed * 100 + turn)[0].tolist() for turn in range(count)]


@torch.inference_mode()
def alone(model: Any, recipe: str, said: list[list[int]]) -> list[tuple[int, ...]]:
    """The answers of a conversation in a cache of its own."""
    cache, answers, unread = fivefold.compress(model, recipe), [], []
    for prompt in said:
        given, answer = torch.tensor([unread + prompt]), []
        for _ in range(ANSWER):
            answer.append(int(model(given, past_key_values=cache).logits[0, -1].argmax()))
            given = torch.tensor([answer[-1:]])
        answers.append(tuple(answer))
        unread = answer[-1:]
    return answers


def run(scheduler: Scheduler, requests: list[Request]) -> list[Any]:
    handles = [scheduler.submit(request) for request in requests]
    for _ in range(2000):
        if scheduler.idle:
            break
        scheduler.step()
    return [handle.result for handle in handles]


@pytest.mark.parametrize("name", ["full", "kivi-residual", "duo+kivi", "snapkv", "h2o+kivi", "rotatekv", "mikv"])
@pytest.mark.slow
def test_answers_are_those_of_each_alone(tiny: Any, tmp_path: Path, name: str) -> None:
    """Nine conversations under a cap that holds about four, with little host memory."""
    model = tiny(**SHAPE)
    recipe, talks = written(name, model), {str(n): turns(3, n) for n in range(9)}
    expected = {who: alone(model, recipe, said) for who, said in talks.items()}
    cache = fivefold.compress(model, recipe)
    with torch.inference_mode():
        model(text(3 * 400), past_key_values=cache)
    cap = cache.session.pools.budget.used * (2 if "kivi" in name else 1)
    waiting = Conversations(tmp_path, host_bytes=cap // 5)
    with Scheduler(model, recipe, 3, cap, conversations=waiting) as scheduler:
        for turn in range(3):
            order = sorted(talks, reverse=turn % 2 == 1)  # the last ones are still in pages then
            requests = [Request(talks[who][turn], ANSWER, [], conversation=who) for who in order]
            results = run(scheduler, requests)
            assert [result.error for result in results] == [None] * len(talks)
            assert {one.request.conversation: one.tokens for one in results} == {
                who: answers[turn] for who, answers in expected.items()
            }
            budget = scheduler.root.session.pools.budget
            assert budget.used + sum(budget.charged.values()) <= cap
        counts = waiting.counts()
    assert counts["resident"] + counts["offloaded"] + counts["saved"] == len(talks) == len(waiting)
    assert counts["host_bytes"] <= cap // 5
    if name == "full":
        assert min(len(times) for times in waiting.resumed.values()) > 0, {
            where: len(times) for where, times in waiting.resumed.items()
        }
    waiting.clear()
    assert scheduler.root.session.pools.budget.used == 0


def test_another_process_finds_what_was_saved(tiny: Any, tmp_path: Path) -> None:
    model, recipe, said = tiny(**SHAPE), "kivi(bits=4)", turns(3, 5)
    expected = alone(model, recipe, said)
    for turn, prompt in enumerate(said):
        waiting = Conversations(tmp_path)
        assert len(waiting) == (turn > 0)
        with Scheduler(model, recipe, conversations=waiting) as scheduler:
            (result,) = run(scheduler, [Request(prompt, ANSWER, [], conversation="a/../b ü")])
        assert result.tokens == expected[turn]
        waiting.save()
        waiting.clear()
    other = Conversations(tmp_path)
    with Scheduler(model, "full()", conversations=other) as scheduler:
        (result,) = run(scheduler, [Request([1, 2], conversation="a/../b ü")])
        assert "kivi" in result.error and "full()" in result.error and len(other) == 1
    other.drop("a/../b ü")
    assert not list(tmp_path.iterdir()) and len(Conversations(tmp_path)) == 0


def test_a_scheduler_of_its_own_pools_takes_over(tiny: Any) -> None:
    model, said, waiting = tiny(**SHAPE), turns(3, 7), Conversations()
    expected = alone(model, "full()", said)
    for prompt, answer in zip(said, expected, strict=True):
        with Scheduler(model, "full()", conversations=waiting) as scheduler:
            (result,) = run(scheduler, [Request(prompt, ANSWER, [], conversation="a")])
        assert result.tokens == answer


def test_a_turn_that_fails_leaves_the_conversation_as_it_was(tiny: Any) -> None:
    model, said, waiting = tiny(**SHAPE), turns(3, 9), Conversations()
    expected = alone(model, "full()", said)
    longest = model.config.max_position_embeddings
    with Scheduler(model, "full()", conversations=waiting) as scheduler:
        for turn, prompt in enumerate(said):
            failing = [
                Request(prompt, longest - 100, [], conversation="a"), Request([9999], 5, [], conversation="a")
            ]  # fmt: skip
            if turn:
                assert all(result.finish_reason == "error" for result in run(scheduler, failing))
                handle = scheduler.submit(Request(prompt, 50, [], conversation="a"))
                scheduler.cancel(handle)
                scheduler.step()
                assert handle.result.finish_reason == "cancelled"
            (result,) = run(scheduler, [Request(prompt, ANSWER, [], conversation="a")])
            assert result.tokens == expected[turn]
    waiting.clear()


def test_a_turn_waits_for_the_one_before_it(tiny: Any) -> None:
    model, said, waiting = tiny(**SHAPE), turns(3, 11), Conversations()
    with Scheduler(model, "full()", conversations=waiting) as scheduler:
        results = run(scheduler, [Request(prompt, ANSWER, [], conversation="a") for prompt in said])
    assert [result.tokens for result in results] == alone(model, "full()", said)


def test_closing_loses_no_conversation(tiny: Any) -> None:
    model, said, waiting = tiny(**SHAPE), turns(2, 13), Conversations()
    with Scheduler(model, "full()", conversations=waiting) as scheduler:
        run(scheduler, [Request(said[0], ANSWER, [], conversation="a")])
        scheduler.submit(Request(said[1], 50, [], conversation="a"))
        for _ in range(5):
            scheduler.step()
    with Scheduler(model, "full()", conversations=waiting) as scheduler:
        (result,) = run(scheduler, [Request(said[1], ANSWER, [], conversation="a")])
    assert result.tokens == alone(model, "full()", said)[1]


def test_what_is_refused(tiny: Any, tmp_path: Path) -> None:
    model = tiny(**SHAPE)
    with pytest.raises(InputError, match="without a folder"):
        Conversations(host_bytes=5)
    with pytest.raises(InputError, match="is no name"):
        Request([1], conversation="")
    with Scheduler(model, "full()") as scheduler, pytest.raises(InputError, match="nowhere to wait"):
        scheduler.submit(Request([1], conversation="a"))
    with pytest.raises(CacheStateError, match="no folder"):
        Conversations().save()
    cache = fivefold.compress(model, "full()")
    with torch.inference_mode():
        model(text(40), past_key_values=cache)
    cache.save(tmp_path / "x")
    with pytest.raises(SavedCacheError, match="no conversation"):
        Conversations(tmp_path)
    waiting = Conversations()
    waiting.put("a", cache, ())
    with pytest.raises(CacheStateError, match="waits already"):
        waiting.put("a", cache.new(), ())
    tight = fivefold.compress(model, "full()", max_bytes=10_000)
    with pytest.raises(CacheFullError):
        waiting.take("a", tight.new())
    assert "a" in waiting and tight.session.pools.budget.used == 0
    assert waiting.take("a", cache.new())[0].lengths().tolist() == [40]
