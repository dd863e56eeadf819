"""Decoding steps from fixed tables: the same as without, whatever happens to the cache between them.

On a GPU they are replayed as a graph; on a CPU the same step runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import random

import numpy as np
import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS
from fivefold.attention.fixed import FixedTables
from fivefold.attention.fused import kernels, spans
from fivefold.errors import CacheStateError
from fivefold.methods.bits.kivi import Kivi
from fivefold.models.graph import Forward
from fivefold.store.layer_cache import LayerCache, LayerSpec, Pools
from fivefold.store.tiers import PAGE, Extent

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
GPU = torch.cuda.is_available()
VOCAB = 131
RECIPES = ["full()", "kivi(bits=4, residual=32)", "duo(retrieval=[[0, 1], [1, 0]], recent=40) + kivi(bits=8)"]


@pytest.fixture(params=DEVICES)
def model(request, tiny, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    model = copy.deepcopy(tiny("llama", num_hidden_layers=2)).to(request.param)
    yield model
    fivefold.restore(model)


def ids(rows: int, tokens: int, device, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(device)


def steps(model, caches, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The logits of every cache, with tokens given one by one; those without a graph by the reference."""
    outs = []
    for cache in caches:
        with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
            if cache.step is None:
                patch.setenv("FIVEFOLD_KERNELS", "reference")
            parts = [model(part, past_key_values=cache).logits for part in tokens.split(1, 1)]
        outs.append(torch.cat(parts, 1))
    return outs


def alike(one: torch.Tensor, other: torch.Tensor, bound: float = 0.04) -> None:
    """The kernels multiply packed numbers in float16; then a code of a later layer can fall to the other side."""
    assert (one - other).norm() < bound * one.norm()


def same_tokens(one, other) -> None:
    """What the first layer holds hangs on no attention: bit for bit the same."""
    one, other = one.state.stores[0], other.state.stores[0]
    for mine, theirs in zip(one.cohorts, other.cohorts, strict=True):
        assert mine.geometry == theirs.geometry
        for which in (0, 1):
            assert torch.equal(one.dense_part(mine, which), other.dense_part(theirs, which))


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_are_those_without(model, recipe: str) -> None:
    """Over page boundaries, packed groups, forks, crops, another chunk, and tables that are full."""
    caches = [fivefold.compress(model, recipe), fivefold.compress(model, recipe, cuda_graph=True)]
    prompt = ids(2, 90, model.device)
    with torch.inference_mode():
        for cache in caches:
            model(prompt, past_key_values=cache)
    count = 40 if GPU else 8
    alike(*steps(model, caches, ids(2, count, model.device, 1)))
    assert caches[1].step.replays == count and caches[0].step is None
    one, other = (cache.report() for cache in caches)
    assert dataclasses.replace(one, tables=0) == dataclasses.replace(other, tables=0) and other.tables > one.tables
    same_tokens(*caches)
    forks = [cache.fork() for cache in caches]
    alike(*steps(model, caches, ids(2, 2, model.device, 2)))
    alike(*steps(model, forks, ids(2, 2, model.device, 3)))
    same_tokens(*caches)
    same_tokens(*forks)
    for cache in caches:
        cache.crop(-1)
    alike(*steps(model, caches, ids(2, 1, model.device, 4)))
    chunk = ids(2, 40, model.device, 5)
    with torch.inference_mode():
        alike(*(model(chunk, past_key_values=cache).logits for cache in caches))
    before = caches[1].step.tables
    alike(*steps(model, caches, ids(2, 1, model.device, 6)))
    assert caches[1].step.tables is before and caches[1].step.failed is None
    before.exact_columns = 0  # as if they were full
    alike(*steps(model, caches, ids(2, 2, model.device, 7)))
    same_tokens(*caches)
    assert caches[1].step.tables is not before and caches[1].step.tables.fit()


def test_sequences_of_different_lengths_and_generate(model) -> None:
    prompt, mask = ids(2, 50, model.device), torch.ones(2, 50, dtype=torch.long, device=model.device)
    mask[0, :17] = 0
    for more in ({}, {"num_beams": 2}):
        settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **more}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FIVEFOLD_KERNELS", "reference")
            wanted = model.generate(prompt, past_key_values=fivefold.compress(model, "full()"), **settings)
        cache = fivefold.compress(model, "full()", cuda_graph=True)
        found = model.generate(prompt, past_key_values=cache, **settings)
        assert torch.equal(wanted, found)
        assert cache.step.replays >= 6 and cache.step.failed is None


def test_a_step_that_breaks_off_leaves_nothing(model, monkeypatch) -> None:
    caches = [fivefold.compress(model, "kivi(bits=4, residual=32)", cuda_graph=graph) for graph in (False, True)]
    with torch.inference_mode():
        for cache in caches:
            model(ids(1, 64, model.device), past_key_values=cache)
    tokens = ids(1, 6, model.device, 2)
    alike(*steps(model, caches, tokens[:, :2]))

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(caches[1].step), "_replay", interrupted)
        steps(model, caches[1:], tokens[:, 2:3])
    assert caches[1].get_seq_length() == 66
    alike(*steps(model, caches, tokens[:, 2:]))
    same_tokens(*caches)


@pytest.mark.parametrize("recipe", ["h2o(keep=0.5)", "tidal(top=16, full_layers=0, select_layers=[0])"])
def test_what_cannot_be_replayed_says_why_and_runs(model, recipe: str) -> None:
    caches = [fivefold.compress(model, recipe), fivefold.compress(model, recipe, cuda_graph=True)]
    with torch.inference_mode():
        for cache in caches:
            model(ids(1, 64, model.device), past_key_values=cache)
    with pytest.warns(UserWarning, match="decoding without a CUDA graph: .* in every step"):
        one, other = steps(model, caches, ids(1, 3, model.device, 3))
    alike(one, other, 1e-4)
    assert caches[1].step.replays == 0


def test_calls_that_ask_for_more_go_through_the_model(model) -> None:
    cache = fivefold.compress(model, "full()", cuda_graph=True)
    with torch.inference_mode():
        model(ids(1, 40, model.device), past_key_values=cache)
        seen = model(ids(1, 1, model.device), past_key_values=cache, output_hidden_states=True)
        assert len(seen.hidden_states) == 3 and cache.step.replays == 0
        one = model(ids(1, 1, model.device), past_key_values=cache, logits_to_keep=1)
        assert cache.step.replays == 1 and one.logits.shape == (1, 1, VOCAB)
    assert "position_ids" in inspect.signature(model.forward).parameters
    twin = copy.deepcopy(model)
    assert isinstance(twin.forward, Forward) and twin.forward.model is twin
    fivefold.restore(model)
    assert "forward" not in vars(model)


def test_a_forward_that_was_there_before_stays(model) -> None:
    calls = []

    def forward(*args, **kwargs):
        calls.append(1)
        return type(model).forward(model, *args, **kwargs)

    model.forward = forward
    cache = fivefold.compress(model, "full()", cuda_graph=True)
    with torch.inference_mode():
        model(ids(1, 40, model.device), past_key_values=cache)
        model(ids(1, 1, model.device), past_key_values=cache)
    assert cache.step.replays == 1 and len(calls) >= 2
    fivefold.restore(model)
    assert model.forward is forward
    del model.forward


@pytest.mark.parametrize("seed", range(6))
def test_tables_follow_whatever_happens_to_the_pages(seed: int, monkeypatch) -> None:
    """Addresses and spans on the device are those of the page tables after any steps, chunks, forks, crops, trims and
    changes of place."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    random.seed(seed)
    torch.manual_seed(seed)
    codec = random.choice([None, Kivi(bits=2, residual=32), Kivi(bits=4, group=64, residual=0)])
    extents = [Extent(), random.choice([Extent(), Extent(random.randint(0, 40), random.randint(1, 90))])]
    spec = LayerSpec(0, 2, 2, 4, 64, torch.float32, torch.device("cpu"))
    pools = Pools()
    stores = {
        index: LayerCache(spec, pools, extents, codec and codec.codec(spec), codec.residual if codec else 0)
        for index in range(2)
    }
    others: list[dict[int, LayerCache]] = []
    elsewhere: list[torch.Tensor] = []
    tables: FixedTables | None = None

    def append(tokens: int, sequences: np.ndarray | None = None) -> None:
        for store in stores.values():
            counts = np.full(3, tokens) if sequences is None else sequences
            for cohort, count in store.split_by(counts):
                if count:
                    store.append(cohort, *torch.randn(2, len(cohort.rows), count, 64))

    def step() -> None:
        for store in stores.values():
            for cohort in store.cohorts:
                store.make_room(cohort)
                slots = np.full(len(cohort.rows), cohort.geometry.length % PAGE)
                for name in ("keys", "values"):
                    store.exact_pool.write_tokens(name, cohort.exact[:, -1], slots, torch.randn(len(slots), 64))
                cohort.geometry = cohort.geometry.appended(1)

    for store in stores.values():
        store.start(3)
    append(0, np.array([70, 70, 45]) if seed % 2 else np.array([50, 50, 50]))
    made = 0
    for _ in range(120):
        kind = random.choice(["step"] * 8 + ["chunk", "fork", "forget", "crop", "select", "trim"])
        if kind == "chunk":
            append(random.randint(2, 70))
        elif kind == "fork":
            others.append({index: store.fork() for index, store in stores.items()})
        elif kind == "forget" and others:
            for store in others.pop().values():
                store.free()
        elif kind == "crop":
            with contextlib.suppress(CacheStateError):
                for store in stores.values():
                    store.crop(random.Random(made).randint(1, 5))
        elif kind == "select":
            order = np.array([random.randrange(3) for _ in range(3)])
            for store in stores.values():
                store.select(order)
        elif kind == "trim":  # page ids come again for memory elsewhere
            append(count := random.randint(70, 300))
            tables = None if tables is None else tables if tables.fit() else FixedTables(stores)
            if tables is not None:
                tables.update()
            with contextlib.suppress(CacheStateError):
                for store in stores.values():
                    store.crop(count)
            pools.budget.trim()
            elsewhere += [torch.empty(size) for size in (1 << 16, 1 << 18, 1 << 20)]
            append(count)
        step()
        if tables is None or not tables.fit():
            tables, made = FixedTables(stores), made + 1
        tables.update()
        for index, store in stores.items():
            span, starts, packed, exact = tables._parts[index]
            shares = kernels().starts_of(kernels().pages_of(span.numpy(), tables._page), tables._programs)
            assert torch.equal(starts, torch.from_numpy(shares))
            for cohort in store.cohorts:
                wanted = torch.tensor(spans(cohort.geometry)).expand(len(cohort.rows), -1)
                assert torch.equal(span[cohort.rows, :5].long(), wanted)
                for side, name in enumerate(("keys", "values")):
                    at = store.exact_pool.addresses(name, cohort.exact) >> 4
                    assert np.array_equal(exact.table[cohort.rows, : at.shape[1], side].numpy(), at)
                # The newest token's slot is nobody else's.
                assert (store.exact_pool.references(cohort.exact[:, -1]) == 1).all()
                if packed is not None and store.packed_pool is not None:
                    at = store.packed_pool.addresses("key_words", cohort.packed) >> 4
                    assert np.array_equal(packed.table[cohort.rows, : at.shape[1]].numpy(), at)
                store.append(cohort, None, None)
    assert made >= 1
