"""Pools hold what a text takes: no more while a prompt is stored, a little ahead of steps, and what goes comes back."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fivefold.plan import memory
from fivefold.plan.read import read_model
from fivefold.recipe import Recipe
from fivefold.store.pages import PagePool
from fivefold.store.rows import PAGE
from recipes import SHAPE

LAYERS = 4


@pytest.fixture
def grown(monkeypatch: Any) -> Counter[PagePool]:
    """How often pools have grown."""
    real, counts = PagePool._grow, Counter[PagePool]()

    def grow(pool: PagePool, pages: int) -> int:
        counts[pool] += 1
        return real(pool, pages)

    monkeypatch.setattr(PagePool, "_grow", grow)
    return counts


@pytest.fixture
def shape(tiny: Any, tmp_path: Path) -> Any:
    config = tiny(**{**SHAPE, "num_hidden_layers": LAYERS}).config
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return read_model(str(tmp_path))


@pytest.mark.parametrize("recipe", ["h2o(keep=0.25)", "h2o(keep=0.25) + kivi(bits=4)", "minicache()", "d2o(keep=0.3)"])
def test_many_layers_that_store_a_chunk_one_by_one_leave_no_free_pages(recipe: str) -> None:
    report = memory.report_of(Recipe.parse(recipe), read_model("smollm2-135m"), 2048, dtype=torch.float32)
    assert report.free * 128 <= report.total


# Of windows that slide on pages are free in pieces; less than an eighth of a pool may be.
PIECES = "duo(retrieval=[[0, 1], [1, 0]], sink=4, recent=40)", "streaming(sink=4, recent=100)"


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=4)", "h2o(keep=0.5)", "minicache(start=0)", "gear()", *PIECES])
@pytest.mark.parametrize("chunk", [64, 100, 512])
def test_a_text_in_chunks_ends_with_few_free_pages(recipe: str, chunk: int, shape: Any, grown: Any) -> None:
    cache = memory.rehearse(Recipe.parse(recipe), shape, 4100, chunk=chunk, dtype=torch.float32)
    times = -(-4100 // chunk)
    # Layers that store their chunks alone, in pools of what they share and what they do not, grow once each.
    assert max(grown.values()) <= LAYERS * times
    cache.report()
    for pool in cache.session.pools:
        assert pool.free_pages * (8 if recipe in PIECES else 128) <= pool.total_pages


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=4)", "minicache(start=0)", *PIECES])
def test_steps_grow_pools_seldom(recipe: str, shape: Any, grown: Any) -> None:
    """Not more often than the rows' pages are full, and what windows leave is used again."""
    cache = memory.Rehearsal(Recipe.parse(recipe), memory.specs_of(shape, torch.float32), shape.hidden)
    batch, steps = 10, 1024
    cache.read(700, batch, 256)
    grown.clear()
    for _ in range(steps):
        cache.feed(batch, 1)
    assert max(grown.values()) <= steps // PAGE
    for pool in cache.session.pools:
        assert pool.free_pages <= max(pool.total_pages // 8, LAYERS * 2 * batch)


def test_sinks_do_not_hold_the_slab_of_a_window_that_has_slid_on(shape: Any) -> None:
    recipe = Recipe.parse("streaming(sink=4, recent=256)")
    once, chunks = (memory.report_of(recipe, shape, 2048, chunk=chunk, dtype=torch.float32) for chunk in (None, 512))
    assert chunks.free == once.free == 0 and chunks.exact == once.exact
