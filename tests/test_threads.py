"""Threads that share what forks share: one pool of pages, one model.

FIVEFOLD_THREAD_SECONDS: how long each of the two parts goes on (5).
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fivefold
from conversations import text
from fivefold.errors import CacheFullError
from fivefold.store.layout import Field, PageLayout
from fivefold.store.pages import Budget, PagePool
from recipes import SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")

SECONDS = float(os.environ.get("FIVEFOLD_THREAD_SECONDS", "5"))
THREADS = 4


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Threads take turns as often as Python lets them, so that races come."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def together(work: Callable[[int, threading.Event], None]) -> None:
    """Run work(thread, stop) in all threads at once until it returns or one fails; `stop` then says so to the others.
    The first error is raised here."""
    errors: list[BaseException] = []
    barrier, stop = threading.Barrier(THREADS), threading.Event()

    def run(thread: int) -> None:
        barrier.wait()
        try:
            work(thread, stop)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=run, args=(thread,), daemon=True) for thread in range(THREADS)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(SECONDS + 120)
        assert not one.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


# -- caches -----------------------------------------------------------------------------------------------

FORKED = ("full", "kivi4", "streaming+kivi", "h2o+kivi", "snapkv", "mikv")
PROMPT, STEPS = 161, 4
CHUNKS = (*[1] * STEPS, 40, 1)  # what each fork is given: over a page's end, and a chunk that packs


@torch.inference_mode()
def go_on(model: Any, cache: Any, thread: int) -> list[torch.Tensor]:
    """Logits of each chunk of a thread's own text."""
    ids = text(sum(CHUNKS), seed=100 + thread)
    return [model(part, past_key_values=cache).logits[0] for part in ids.split(CHUNKS, 1)]


def check(got: list[torch.Tensor], want: list[torch.Tensor], what: str) -> None:
    for number, (mine, other) in enumerate(zip(got, want, strict=True)):
        # In which order numbers are added up may differ, and now and then a rounding with it; another's tokens would
        # make other logits altogether.
        off = (mine - other).abs()
        assert off.max() < 0.3 and off.mean() < 3e-3, f"{what}: chunk {number} is off by {float(off.max()):.2g}"


@pytest.mark.parametrize("name", FORKED)
def test_forks_in_threads(tiny: Any, name: str) -> None:
    """Each thread forks one cache, goes on its own way, and frees its fork; some fork forks, some crop."""
    model = tiny(**SHAPE)
    recipe = written(name, model)
    first = fivefold.compress(model, recipe)
    with torch.inference_mode():
        model(text(PROMPT), past_key_values=first)
    want = [go_on(model, first.fork(), thread) for thread in range(THREADS)]
    gc.collect()
    before, end = first.report().as_dict(), time.monotonic() + SECONDS / len(FORKED)

    def work(thread: int, stop: threading.Event) -> None:
        rounds = 0
        while not stop.is_set() and (time.monotonic() < end or not rounds):
            fork = first.fork()
            twin = fork.fork() if rounds % 3 == 2 else None
            check(go_on(model, fork, thread), want[thread], f"round {rounds} of thread {thread}")
            if twin is not None:
                check(go_on(model, twin, thread), want[thread], f"twin {rounds} of thread {thread}")
            fork.free()
            rounds += 1

    together(work)
    gc.collect()
    after = first.report().as_dict()
    for line in ("exact", "codes", "scales", "statistics", "slack", "forks"):
        assert after[line] == before[line], line  # nothing leaks, and nothing of the first one's went
    check(go_on(model, first, 0), want[0], "the first cache")
    first.free()
    assert first.report().total <= fivefold.compress(model, recipe).report().total


def test_caches_of_their_own_in_threads(tiny: Any) -> None:
    """Threads that share nothing but the model, each with a recipe of its own."""
    model = tiny(**SHAPE)
    recipes = [written(name, model) for name in ("kivi-residual", "streaming", "h2o+kivi", "tidal+kivi")]

    def run(thread: int) -> list[torch.Tensor]:
        cache = fivefold.compress(model, recipes[thread])
        with torch.inference_mode():
            model(text(PROMPT, seed=thread), past_key_values=cache)
        return go_on(model, cache, thread)

    want, end = [run(thread) for thread in range(THREADS)], time.monotonic() + SECONDS / len(FORKED)

    def work(thread: int, stop: threading.Event) -> None:
        rounds = 0
        while not stop.is_set() and (time.monotonic() < end or not rounds):
            check(run(thread), want[thread], recipes[thread])
            rounds += 1

    together(work)


# -- pools ------------------------------------------------------------------------------------------------

LAYOUT = PageLayout("test", 4, (Field("owner", (4,), torch.int64, "exact"),))


@pytest.mark.parametrize("limit", [None, 200 * LAYOUT.nbytes], ids=["unlimited", "capped"])
def test_a_page_has_one_owner(limit: int | None) -> None:
    """Threads that allocate, share and give back pages of one pool: no page is given to two, what is written into it
    stays, and the counts are right in the end."""
    pool = PagePool(LAYOUT, torch.device("cpu"), Budget(limit))
    end = time.monotonic() + SECONDS / 2
    refused = [0] * THREADS

    def work(thread: int, stop: threading.Event) -> None:
        rng = np.random.default_rng(thread)
        mine: list[tuple[np.ndarray, int]] = []  # pages, and the number that was written into them
        number = 0
        while not stop.is_set() and time.monotonic() < end:
            action = rng.integers(5)
            if action < 2:
                number += 1
                try:
                    pages = pool.allocate(int(rng.integers(1, 20)))
                except CacheFullError:
                    refused[thread] += 1
                    if mine:
                        release(mine.pop(0))
                    continue
                assert len(np.unique(pages)) == len(pages), "one page was given out twice at once"
                assert (pool.references(pages) == 1).all(), "a page was given to two"
                stamp = thread * 1_000_000_000 + number
                pool.write("owner", pages, torch.full((len(pages), 4), stamp))
                mine.append((pages, stamp))
            elif mine and action == 2:
                pages, stamp = mine[int(rng.integers(len(mine)))]
                pool.retain(pages)
                assert (pool.references(pages) == 2).all(), "a page that two hold has other counts"
                pool.release(pages)
            elif mine:
                release(mine.pop(int(rng.integers(len(mine)))))
            if action == 4 and rng.integers(8) == 0:
                pool.budget.trim()
        for held in mine:
            release(held)

    def release(held: tuple[np.ndarray, int]) -> None:
        pages, stamp = held
        found = pool.read("owner", pages)
        assert (found == stamp).all(), "somebody else wrote into a page"
        pool.release(pages)

    together(work)
    assert pool.pages_in_use == 0
    assert pool.budget.used == pool.allocated_bytes
    if limit is not None:
        assert sum(refused) and pool.budget.used <= limit
    pool.budget.trim()
    assert pool.total_pages == pool.budget.used == 0
