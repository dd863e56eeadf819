"""Prompts that begin alike share pages, and no token depends on it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

import fivefold
from conftest import build
from conversations import text
from fivefold import PrefixStore, Recipe, Request, generate_many
from fivefold.errors import InputError
from fivefold.generation import Result, Scheduler
from fivefold.store.pages import PagePool
from recipes import CHOOSING, RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK = 64
SHARING = tuple(name for name in RECIPES if name not in CHOOSING and not name.startswith("mikv"))


@pytest.fixture(autouse=True)
def pools(monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet[PagePool]]:
    """All pools that a test makes. Whatever it does, their pages have been given back."""
    found: weakref.WeakSet[PagePool] = weakref.WeakSet()
    make = PagePool.__init__

    def noted(self: PagePool, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        found.add(self)

    monkeypatch.setattr(PagePool, "__init__", noted)
    yield found
    if any(one.total_pages for one in list(found)):
        gc.collect()  # what goes in a cycle is looked for where there is something
    assert sum(one.total_pages for one in found) == 0


def held(pools: weakref.WeakSet[PagePool]) -> int:
    """Bytes of pages that are in use."""
    gc.collect()
    return sum(pool.pages_in_use * pool.layout.nbytes for pool in pools)


def prompt(*parts: tuple[int, int]) -> tuple[int, ...]:
    """Parts of several texts: (tokens, seed) of each."""
    return tuple(token for tokens, seed in parts for token in text(tokens, seed=seed)[0].tolist())


PROMPTS = (
    prompt((200, 1), (50, 2)),
    prompt((200, 1), (77, 3)),  # 192 tokens of it are known
    prompt((130, 1), (140, 4)),  # 128 are
    prompt((200, 1), (50, 2)),  # the same again: all whole blocks but none of the rest
    prompt((40, 1)),  # less than a block
    prompt((256, 5)),  # whole blocks, and nothing of them known
    prompt((256, 5)),  # all of it is known, but one token at least is read
    prompt((270, 6), (3, 1)),
)
SHARED = (0, 192, 128, 192, 0, 0, 192, 0)
"""Tokens that each of them finds in the store, if they are read in this order."""


def requests(prompts: Sequence[tuple[int, ...]] = PROMPTS, new: int = 12) -> list[Request]:
    return [Request(ids, new + number % 3) for number, ids in enumerate(prompts)]


def tokens(results: Sequence[Result]) -> list[tuple[int, ...]]:
    assert all(result.error is None for result in results), [result.error for result in results]
    return [result.tokens for result in results]


def unshared(model: Any, recipe: str, asked: Sequence[Request], block: int = BLOCK) -> list[tuple[int, ...]]:
    """What each request gets with a store of its own, in which it finds nothing."""
    return [
        one.tokens for request in asked for one in generate_many(model, recipe, [request], prefix=PrefixStore(block))
    ]


# -- what is shared ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHARING)
def test_no_token_depends_on_what_is_found(tiny: Any, name: str) -> None:
    model, store = tiny(**SHAPE), PrefixStore(BLOCK)
    recipe, asked = written(name, model), requests()
    results = generate_many(model, recipe, asked, max_batch=3, prefix=store)
    again = generate_many(model, recipe, asked[:4], prefix=store)
    shared = [[result.shared for result in found] for found in (results, again)]
    if name == "gear":  # packs 128 tokens at a time
        assert shared == [[0, 128, 128, 128, 0, 0, 128, 0], [128, 256, 256, 128]]
    else:
        assert shared == [list(SHARED), [192, 256, 256, 192]]
    assert tokens(results) == unshared(model, recipe, asked) and tokens(again) == tokens(results[:4])
    store.clear()


def test_exact_tokens_are_those_of_generate(tiny: Any) -> None:
    model, asked = tiny(**SHAPE), requests()
    results = generate_many(model, "full()", asked, prefix=PrefixStore(BLOCK))
    for result, request in zip(results, asked):
        out = model.generate(
            torch.tensor([request.prompt]), past_key_values=fivefold.compress(model, "full()"), do_sample=False,
            max_new_tokens=request.max_new_tokens, pad_token_id=0,
        )  # fmt: skip
        assert result.tokens == tuple(out[0, len(request.prompt) :].tolist())


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_neox"])
def test_families(tiny: Any, family: str) -> None:
    """Layers with a sliding window among them, which are copied."""
    model, asked = tiny(family), requests()
    results = generate_many(model, "kivi(bits=4, residual=32)", asked, prefix=PrefixStore(BLOCK))
    assert [result.shared for result in results] == list(SHARED)
    assert tokens(results) == unshared(model, "kivi(bits=4, residual=32)", asked)


def test_only_what_is_not_known_is_read(tiny: Any) -> None:
    """At most a chunk of it between two steps, and by whole blocks."""
    model, sizes, store = tiny(**SHAPE), [], PrefixStore(BLOCK)
    hook = model.register_forward_pre_hook(lambda module, args, given: sizes.append(args[0].shape[1]), with_kwargs=True)
    try:
        generate_many(model, "full()", requests(new=1)[:1], prefix=store)
        assert sizes == [64, 64, 64, 58]
        sizes.clear()
        generate_many(model, "full()", requests(new=1), prefix=store)
    finally:
        hook.remove()
    read = [len(ids) - shared for ids, shared in zip(PROMPTS[1:], SHARED[1:])]
    assert sum(size for size in sizes if size > 1) == 250 - 192 + sum(read)
    found = store.statistics
    assert (found.hits, found.misses) == (5, 4)
    assert found.tokens_shared == 192 + sum(SHARED)
    assert found.tokens_read == 250 + sum(map(len, PROMPTS)) - found.tokens_shared
    steps = generate_many(
        model, "full()", [Request(PROMPTS[-1], 1)], prefix=PrefixStore(BLOCK), chunk=2 * BLOCK, reads=1
    )
    assert steps[0].last_step - (steps[0].first_step or 0) == 2  # 273 tokens: 128, 128 and 17


def test_blocks_are_whole_groups_of_the_codec(tiny: Any) -> None:
    model = tiny(**SHAPE)
    for recipe, block in (("full()", 50), ("kivi(bits=4)", 64), ("kivi(bits=2, group=64)", 64)):
        store = PrefixStore(50)
        generate_many(model, recipe, requests(PROMPTS[:1]), prefix=store)
        again = generate_many(model, recipe, requests(PROMPTS[:1]), prefix=store)
        assert again[0].shared == 249 // block * block


def test_several_recipes_and_models_in_one_store(tiny: Any) -> None:
    """They share nothing, models of the same shape included; a model that is gone takes its prefixes along."""
    model, twin, store = tiny(**SHAPE), build(**SHAPE, seed=1), PrefixStore(BLOCK)
    asked = requests()
    for one, recipe in ((model, "full()"), (twin, "full()"), (model, "kivi(bits=4)")):
        results = generate_many(one, recipe, asked, prefix=store)
        assert [result.shared for result in results] == list(SHARED)
        assert tokens(results) == unshared(one, recipe, asked)
    entries = store.statistics.entries
    del twin, one
    gc.collect()
    generate_many(model, "full()", asked, prefix=store)
    assert store.statistics.entries == entries * 2 // 3
    bfloat16 = build(**SHAPE)
    generate_many(bfloat16, "full()", asked[:1], prefix=store)
    results = generate_many(bfloat16.bfloat16(), "full()", asked[:1], prefix=store)
    assert results[0].shared == 0


@pytest.mark.parametrize("name", ["h2o", "snapkv+kivi", "mikv"])
def test_recipes_that_choose_by_the_whole_prompt(tiny: Any, name: str) -> None:
    """They say that they share nothing, and go on without."""
    model, store, recipe = tiny(**SHAPE), PrefixStore(BLOCK), RECIPES[name]
    why = store.why_not(Recipe.parse(recipe))
    assert why is not None and name.split("+")[0] in why and why.endswith(".")
    with pytest.warns(UserWarning, match="whole prompt") as warned:
        results = generate_many(model, recipe, requests(), prefix=store)
    assert len(warned) == 1
    assert tokens(results) == tokens(generate_many(model, recipe, requests()))
    assert store.statistics.entries == store.statistics.misses == 0
    assert store.why_not(Recipe.parse("duo(keep=0.5) + kivi(bits=2)")) is None


# -- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "kivi4", "kivi-residual", "streaming+kivi", "cskv"])
def test_what_it_holds_is_counted(tiny: Any, name: str, pools: weakref.WeakSet[PagePool]) -> None:
    """And given back by `clear()`. The count is of pages that no other entry has, and of what is known besides."""
    model, store = tiny(**SHAPE), PrefixStore(BLOCK)
    generate_many(model, written(name, model), requests(), prefix=store)
    beside = sum(entry.cache.session.table_bytes + entry.cache.session.statistics_bytes
                 for entry in store._entries.values())  # fmt: skip
    assert store.statistics.nbytes == held(pools) + beside and held(pools) > 0
    blocks = {ids[:stop] for ids in PROMPTS for stop in range(BLOCK, len(ids) + 1, BLOCK)}
    assert store.statistics.entries == len(blocks)
    store.clear()
    assert store.statistics.nbytes == store.statistics.entries == held(pools) == 0
    assert store.statistics.hits == 4


def test_the_least_recently_used_goes_first(tiny: Any) -> None:
    """Ends of prompts before their beginnings."""
    model, store = tiny(**SHAPE), PrefixStore(BLOCK, max_entries=4)
    one, two, three = (prompt((130, seed)) for seed in (1, 2, 3))

    def shared(ids: tuple[int, ...]) -> int:
        return generate_many(model, "full()", [Request(ids, 1)], prefix=store)[0].shared

    assert [shared(ids) for ids in (one, two, one, three)] == [0, 0, 128, 0]
    assert [shared(ids) for ids in (one, three)] == [128, 128]  # `two` had to go
    assert shared(prompt((100, 4))) == 0  # a block more: the end of `one` goes
    assert shared(one[:100]) == 64 and store.statistics.entries == 4
    assert shared(three) == 128


def test_a_cap_of_its_own(tiny: Any, pools: weakref.WeakSet[PagePool]) -> None:
    model = tiny(**SHAPE)
    free = PrefixStore(BLOCK)
    want = tokens(generate_many(model, "full()", requests(), prefix=free))
    cap = free.statistics.nbytes // 2
    free.clear()
    store = PrefixStore(BLOCK, max_bytes=cap)
    assert tokens(generate_many(model, "full()", requests(), prefix=store)) == want
    assert 0 < store.statistics.nbytes <= cap and held(pools) <= cap
    assert sum(result.shared for result in generate_many(model, "full()", requests(), prefix=store)) > 0
    tiny_store = PrefixStore(BLOCK, max_bytes=1)
    assert tokens(generate_many(model, "full()", requests(), prefix=tiny_store)) == want
    assert tiny_store.statistics.entries == 0


@pytest.mark.parametrize("name", ["full", "kivi-residual"])
def test_the_store_gives_way_to_requests(tiny: Any, name: str, pools: weakref.WeakSet[PagePool]) -> None:
    """Under the cap of the caches it gives up what nobody uses before any request has to wait."""
    model, recipe = tiny(**SHAPE), RECIPES[name]
    asked = [Request(prompt((260, seed)), 12) for seed in range(8)]
    free = PrefixStore(BLOCK)
    want = tokens(generate_many(model, recipe, asked, max_batch=2, prefix=free))
    all_held = held(pools)
    free.clear()
    store, cap = PrefixStore(BLOCK), int(all_held * 0.6)
    results = generate_many(model, recipe, asked, max_batch=2, prefix=store, max_bytes=cap)
    assert tokens(results) == want and sum(result.preemptions for result in results) == 0
    assert 0 < held(pools) <= cap and 0 < store.statistics.entries < 8 * 4
    again = generate_many(model, recipe, asked[-1:], prefix=store, max_bytes=cap)
    assert again[0].shared == 256 and tokens(again) == want[-1:]


def test_preemption_with_shared_prefixes(tiny: Any) -> None:
    """A cap under which the store can keep nothing, and requests wait for each other too."""
    model, recipe = tiny(**SHAPE), "full()"
    asked = [Request(prompt((130, 1), (20 + 5 * seed, seed)), 100) for seed in range(2, 6)]
    want = unshared(model, recipe, asked)
    with Scheduler(model, recipe, max_bytes=1 << 30) as scheduler:
        scheduler.submit(asked[-1])
        budget, most = scheduler.root.session.pools.budget, 0
        while not scheduler.idle:
            scheduler.step()
            most = max(most, budget.used + sum(budget.charged.values()))
    store = PrefixStore(BLOCK)
    results = generate_many(model, recipe, asked, prefix=store, max_bytes=int(1.7 * most))
    assert tokens(results) == want and sum(result.preemptions for result in results) > 0


def test_another_cap_is_refused(tiny: Any) -> None:
    model, store = tiny(**SHAPE), PrefixStore(BLOCK)
    generate_many(model, "full()", requests()[:1], prefix=store)
    with pytest.raises(InputError, match="max_bytes=1000000"):
        generate_many(model, "full()", requests()[:1], prefix=store, max_bytes=1_000_000)
    generate_many(model, "kivi(bits=4)", requests()[:1], prefix=store, max_bytes=1_000_000)


@pytest.mark.parametrize("settings", [{"block": 0}, {"block": 1.5}, {"max_bytes": 0}, {"max_entries": -1}], ids=str)
def test_bad_numbers(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        PrefixStore(**settings)


def test_a_store_outlives_an_interrupt(tiny: Any, pools: weakref.WeakSet[PagePool]) -> None:
    """What it holds then is right, and nothing else is held."""
    model, store, calls = tiny(**SHAPE), PrefixStore(BLOCK), []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generate_many(model, "full()", requests(), prefix=store)
    hook.remove()
    beside = sum(entry.cache.session.table_bytes for entry in store._entries.values())
    assert held(pools) == store.statistics.nbytes - beside > 0
    results = generate_many(model, "full()", requests(), prefix=store)
    assert sum(result.shared for result in results) > sum(SHARED)
    assert tokens(results) == unshared(model, "full()", requests())


def test_threads_share_a_store(tiny: Any) -> None:
    model, store, found = tiny(**SHAPE), PrefixStore(BLOCK, max_entries=6), {}
    recipe, asked = "kivi(bits=4, residual=32)", requests()
    want = unshared(model, recipe, asked)

    def work(thread: int) -> None:
        mine = asked[thread % 2 :: 2]
        found[thread] = tokens(generate_many(model, recipe, mine, max_batch=2, prefix=store))

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {thread: want[thread % 2 :: 2] for thread in range(4)} == found
    assert store.statistics.hits and store.statistics.entries <= 6
