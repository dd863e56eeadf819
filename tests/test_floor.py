"""Short prompts, chats of several turns and text that comes token by token: how many tokens a head then holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conftest import quick
from conversations import Conversation, text
from fivefold.errors import CacheStateError, RecipeError
from fivefold.methods import find
from fivefold.recipe import Recipe
from recipes import SHAPE
from test_policies_in_models import CHOOSING, generate, held, positions

pytestmark = pytest.mark.usefixtures("one_thread")
FLOORS = {name: 2048 if name == "snapkv" else 512 for name in CHOOSING}
KEEPS = {"keyformer": 0.6, "elastic": 0.5}  # others 0.2


@torch.inference_mode()
def feed(model: Any, cache: Any, ids: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Chunks of these sizes one after another, then the rest token by token: the logits of all of them."""
    rest = ids.shape[1] - sum(sizes)
    return torch.cat([model(x, past_key_values=cache).logits for x in ids.split([*sizes, *[1] * rest], 1)], 1)


def budget(name: str, keep: float, seen: int) -> int:
    """Of a text of so many tokens that came one by one, as the methods' docstrings have it."""
    if name == "elastic":
        return max(5, math.ceil(keep * seen))
    if name == "snapkv":  # up to a window more
        seen, rest = seen // 32 * 32, seen % 32
        return min(seen, max(32, round(keep * seen))) + rest
    return max({"d2o": 5, "random": 5}.get(name, 1), round(keep * seen))


# -- what a recipe says -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSING)
def test_a_keep_that_is_written_has_no_floor(name: str) -> None:
    method: Any = find(name)
    assert (method().fraction, method().least) == (KEEPS.get(name, 0.2), FLOORS[name])
    assert (method(keep=0.1).fraction, method(keep=0.1).least) == (0.1, 0)
    assert (method(floor=7).fraction, method(floor=7).least) == (method().fraction, 7)
    assert (method(keep=0.1, floor=7).least, method(floor=0).least) == (7, 0)


def test_a_recipe_says_whether_its_keep_was_written() -> None:
    for values in ({}, {"keep": 0.2}, {"floor": 64}, {"keep": 0.1, "floor": 64}, {"floor": 0}):
        made = Recipe((find("snapkv")(**values),))
        assert str(made) == f"snapkv({', '.join(f'{name}={value}' for name, value in values.items())})"
        assert Recipe.parse(str(made)) == made and str(Recipe.parse(str(made))) == str(made)
    assert Recipe.parse("h2o()") != Recipe.parse("h2o(keep=0.2)")


@pytest.mark.parametrize("name", [*CHOOSING, "mikv"])
def test_bad_floors_are_one_sentence(name: str) -> None:
    for value, words in (("-1", "use at least 0"), ("1.5", "a whole number or nothing"), ("True", "a whole number")):
        with pytest.raises(RecipeError, match=words) as error:
            Recipe.parse(f"{name}(floor={value})")
        assert str(error.value).count("\n") == 0 and value in str(error.value)


# -- prompts in one piece ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CHOOSING, "streaming"])
def test_a_short_prompt_is_whole_at_the_defaults(name: str, tiny: Callable[..., Any]) -> None:
    """In every way that it may come, and while there is an answer to it, and in further turns."""
    model, ids = tiny(**SHAPE), text(110)
    exact = feed(model, fivefold.compress(model), ids, 80)
    for sizes in ((80,), (30, 1, 1, 1, 40, 1, 30), (1, 1, 70), ()):
        cache = fivefold.compress(model, f"{name}()")
        assert torch.allclose(feed(model, cache, ids, *sizes), exact, atol=1e-3)
        assert set(held(cache)) == {110}


@pytest.mark.parametrize("name", CHOOSING)
def test_the_floor_is_reached_while_generating_and_in_a_second_turn(name: str, tiny: Callable[..., Any]) -> None:
    model, ids, exact = tiny(**SHAPE), text(180), fivefold.compress(tiny(**SHAPE))
    cache = fivefold.compress(model, f"{name}(floor=64)")
    want = feed(model, exact, ids[:, :64], 40)
    assert torch.allclose(feed(model, cache, ids[:, :64], 40), want, atol=1e-3) and set(held(cache)) == {64}
    feed(model, cache, ids[:, 64:90])
    assert set(held(cache)) == {90 if name == "snapkv" else 64}
    feed(model, cache, ids[:, 90:], 90)  # a second turn: 180 tokens, of which the share may be above the floor
    share = find(name)().fraction  # type: ignore[attr-defined]
    assert set(held(cache)) == {max(64, round(180 * share))}


def test_windows_and_sinks_stay_whatever_the_budget(tiny: Callable[..., Any]) -> None:
    model, ids = tiny(**SHAPE), text(128)
    for sizes in ((128,), (50, 70), ()):
        for name, stays in (("snapkv", set(range(96, 128))), ("d2o", set(range(4))), ("random", set(range(4)))):
            cache = fivefold.compress(model, f"{name}(keep=0.001)")
            feed(model, cache, ids, *sizes)
            assert all(stays <= set(row) for _, _, row in positions(cache)), (name, sizes)
        cache = fivefold.compress(model, "elastic(keep=0.001)")
        feed(model, cache, ids, *sizes)
        assert all({0, 1, 2, 3, 127} <= set(row) for _, _, row in positions(cache)), sizes


# -- token by token ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", quick([0.25, 0.1, 0.5], 1))
@pytest.mark.parametrize("name", CHOOSING)
def test_what_comes_token_by_token_is_held_to_its_budget(name: str, keep: float, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(**SHAPE), text(300)
    cache = fivefold.compress(model, f"{name}(keep={keep})")
    for seen in range(0, 300, 20):
        feed(model, cache, ids[:, seen : seen + 20])
        assert set(held(cache)) == {budget(name, keep, seen + 20)}
    report, spec, rows = cache.report(), cache.session.stores[0].spec, len(held(cache))
    token = 2 * spec.head_dim * 4
    assert report.exact == rows * budget(name, keep, 300) * token
    assert report.total < (budget(name, keep, 300) + 33) / 300 * 1.2 * 300 * rows * token


@pytest.mark.parametrize("name", CHOOSING)
def test_packed_tokens_that_came_one_by_one(name: str, tiny: Callable[..., Any]) -> None:
    """The budget holds within two groups."""
    model, ids = tiny(**SHAPE), text(300)
    cache = fivefold.compress(model, f"{name}(keep=0.5) + kivi(bits=8, residual=32)")
    feed(model, cache, ids)
    assert abs(sum(held(cache)) / len(held(cache)) - budget(name, 0.5, 300)) <= 64
    assert cache.report().codes > 0
    for row in positions(cache):
        assert len(set(row[2])) == len(row[2])


def test_mikv_that_is_fed_token_by_token(tiny: Callable[..., Any]) -> None:
    """Nothing goes; precise are as many as are asked for, or the floor, and up to a group more."""
    model, ids = tiny(**SHAPE), text(300)
    for recipe, precise in (
        ("mikv(important=0.1)", 30),
        ("mikv(floor=90)", 90),
        ("mikv()", 128),
        ("mikv(floor=0)", 60),
    ):
        for sizes in ((), (300,)):
            cache = fivefold.compress(model, recipe)
            feed(model, cache, ids, *sizes)
            for store in cache.session.stores.values():
                for group in store.groups:
                    assert group.bounds.length == 300
                    assert precise <= 300 - group.bounds.packed_stop < precise + 32, (recipe, sizes)


def test_snapkv_takes_single_tokens_as_chunks_of_its_window(tiny: Callable[..., Any]) -> None:
    """What it chooses then is the same, until a chunk comes: what follows that is generated."""
    model, ids = tiny(**SHAPE), text(266)
    one, many = (fivefold.compress(model, "snapkv(keep=0.3, window=16)") for _ in range(2))
    want = feed(model, many, ids[:, :160], *[16] * 10)
    assert torch.allclose(feed(model, one, ids[:, :160]), want, atol=1e-3)
    assert positions(one) == positions(many) and set(held(one)) == {48}
    for cache in (one, many):
        feed(model, cache, ids[:, 160:260], 80)
    assert positions(one) == positions(many) and set(held(one)) == {round(0.3 * 240) + 20}
    with pytest.raises(CacheStateError, match="cannot take back 1 tokens"):
        fresh = fivefold.compress(model, "snapkv(keep=0.3, window=16)")
        feed(model, fresh, ids[:, :20])
        fresh.crop(-1)
    one.crop(-5)
    assert set(held(one)) == {round(0.3 * 240) + 15}


@pytest.mark.parametrize("name", [*CHOOSING, "mikv"])
def test_forks_of_a_text_that_comes_token_by_token(name: str, tiny: Callable[..., Any], tmp_path: Path) -> None:
    """They go their own ways as if alone, and so does what was saved."""
    keep = "important" if name == "mikv" else "keep"
    model, recipe = tiny(**SHAPE), f"{name}({keep}=0.3, floor=30)"
    start, tails = text(40), (text(30, seed=1), text(30, seed=2))
    first = fivefold.compress(model, recipe)
    feed(model, first, start)
    second = first.fork()
    first.save(tmp_path)
    got = [feed(model, cache, tail) for cache, tail in zip((first, second), tails)]
    assert torch.equal(feed(model, fivefold.load_cache(model, tmp_path), tails[0]), got[0])
    for cache, tail, logits in zip((first, second), tails, got):
        alone = fivefold.compress(model, recipe)
        feed(model, alone, start)
        assert torch.allclose(feed(model, alone, tail), logits, atol=1e-4)
        assert positions(alone) == positions(cache)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_step_that_is_broken_off_at_the_floor(
    name: str, tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, at and after the step at which the first token goes, and where a window is full."""
    model, ids = tiny(**SHAPE), text(70)
    cache, other = (fivefold.compress(model, f"{name}(floor=32)") for _ in range(2))

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    for at in range(70):
        if at in (30, 31, 32, 33, 63, 64):
            monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
            with pytest.raises(KeyboardInterrupt):
                feed(model, cache, ids[:, :1])
            monkeypatch.undo()
        assert torch.equal(*(feed(model, one, ids[:, at : at + 1]) for one in (cache, other))), at
        assert positions(cache) == positions(other)


@pytest.mark.parametrize("name", CHOOSING)
def test_a_single_token_beside_a_longer_prompt(name: str, tiny: Callable[..., Any]) -> None:
    """Its sequence goes on as if it had a cache of its own."""
    model, talk = tiny(**SHAPE), Conversation.of(40, *[1] * 60, lengths=(1, 40))
    cache, alone = (fivefold.compress(model, f"{name}(keep=0.3)") for _ in range(2))
    own = talk.alone(0)
    for number in range(len(talk)):
        got = talk.rows(number, talk.give(number, model, cache))[0]
        assert torch.allclose(got, own.give(number, model, alone), atol=1e-3), number
    kv_heads = cache.session.stores[0].spec.kv_heads
    assert [p for p in positions(cache) if p[1] < kv_heads] == positions(alone)
    assert set(held(alone)) == {budget(name, 0.3, 61)}


def test_a_method_of_one_file_is_held_to_its_budget_too(tiny: Callable[..., Any]) -> None:
    """One that looks at the newest query alone, as in CONTRIBUTING.md, and has no floor."""
    from fivefold.methods import TokenPolicy

    class Newest(TokenPolicy):
        name = "newest"
        keep = 0.25
        observes = 1
        accumulates = watches = trims = False

    from policies import Run

    run = Run(Newest(), 2, 4, 16)
    for _ in range(100):
        run.take(*(torch.randn(1, 1, heads, 1, 16) for heads in (4, 2, 2)))
    assert {len(kept) for kept in run.kept().values()} == {25}


# -- the embedded model -----------------------------------------------------------------------------------

QUESTIONS = (
    "What is the capital of France? Answer in one word.",
    "What is 2 + 3?",
    "Name a colour of the rainbow.",
    "Who wrote Romeo and Juliet?",
    "What do bees make?",
)
AGAIN = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
NEW = 8


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The embedded model, its tokenizer, and its answers with the exact cache."""
    from fivefold.models import embedded

    embedded.fetch()
    model, tokenizer = embedded.load()
    yield model, tokenizer, answers(model, tokenizer, "full()")
    fivefold.restore(model)


def answers(model: Any, tokenizer: Any, recipe: str) -> tuple[list[str], list[str]]:
    """What is said to the questions, each for itself (in one batch) and in one chat."""

    def say(cache: Any, **given: torch.Tensor) -> tuple[torch.Tensor, list[str]]:
        out = generate(model, given.pop("input_ids"), cache, NEW, **given)
        return out, tokenizer.batch_decode(out[:, -NEW:])

    starts = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True, tokenize=False)
        for q in QUESTIONS
    ]
    given = tokenizer(starts, return_tensors="pt", add_special_tokens=False, padding=True, padding_side="left")
    _, single = say(fivefold.compress(model, recipe), **given)
    cache, chat = fivefold.compress(model, recipe), []
    ids = torch.empty(1, 0, dtype=torch.int64)
    for turn in (starts[0], *map(AGAIN.format, QUESTIONS[1:])):
        ids = torch.cat([ids, tokenizer(turn, return_tensors="pt", add_special_tokens=False).input_ids], 1)
        ids, said = say(cache, input_ids=ids, attention_mask=torch.ones_like(ids))
        chat += said
    return single, chat


@pytest.mark.model
@pytest.mark.parametrize("name", quick(("h2o", "mikv", *CHOOSING[1:], "streaming"), 0, 2))
def test_short_questions_are_answered_as_with_the_exact_cache(smollm2: Any, name: str) -> None:
    *model, want = smollm2
    assert "Paris" in want[0][0] and "5" in want[0][1]
    assert answers(*model, f"{name}()") == want
