"""Decoding steps from fixed tables: the same as without, whatever happens to the cache between them.

On a GPU they are replayed as a graph; on a CPU the same step runs in Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import inspect
import random
import signal

import numpy as np
import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS
from fivefold import interrupts
from fivefold.attention import sending
from fivefold.attention.tables import DeviceTables, tables_of
from fivefold.errors import CacheFullError, CacheStateError
from fivefold.kernels.device import Beside
from fivefold.kernels.packed_decode import schedule
from fivefold.methods.bits.kivi import Kivi
from fivefold.models.forward import Forward
from fivefold.models.graph import Step
from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import PAGE, Extent
from fivefold.store.spec import LayerSpec, Pools

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


def same_tokens(one, other, padded: bool = False) -> None:
    """What the first layer holds depends on no attention: the same, but for the order of sums in fused kernels, and for
    products of other shapes (padded)."""
    one, other = one.session.stores[0], other.session.stores[0]
    for mine, theirs in zip(one.groups, other.groups, strict=True):
        assert mine.bounds == theirs.bounds
        for which in (0, 1):
            found, wanted = mine.dense_part(which), theirs.dense_part(which)
            assert torch.allclose(found, wanted, *((1e-3, 2e-2) if padded else (1e-4, 1e-4)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
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
    apart = {"tables": 0, "graph": 0, "decoding": ""}
    assert dataclasses.replace(one, **apart) == dataclasses.replace(other, **apart)
    assert other.graph > one.graph == 0
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
    (before,) = caches[1].step.tables
    alike(*steps(model, caches, ids(2, 1, model.device, 6)))
    assert caches[1].step.tables == [before] and caches[1].step.failed is None
    before.exact_columns = 0  # as if they were full
    before.bank.exact.track()
    alike(*steps(model, caches, ids(2, 2, model.device, 7)))
    same_tokens(*caches)
    (after,) = caches[1].step.tables
    assert after is not before and after.fit()


@pytest.mark.slow
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


@pytest.mark.skipif(not GPU, reason="nothing is captured on a CPU")
def test_garbage_ends_no_capture(model) -> None:
    """Graphs that are nobody's any more, in cycles, when the next one is captured: collected behind it."""
    limits = gc.get_threshold()
    try:
        gc.set_threshold(10**9)
        for seed in range(3):
            cache = fivefold.compress(model, "full()", cuda_graph=True)
            with torch.inference_mode():
                model(ids(2, 20, model.device, seed), past_key_values=cache)
                gc.set_threshold(1)  # from here on at nearly every object
                for _ in range(3):
                    model(ids(2, 1, model.device, seed), past_key_values=cache)
                gc.set_threshold(10**9)
            assert cache.step.replays == 3 and cache.step.failed is None
            cache.itself = cache
            del cache
    finally:
        gc.set_threshold(*limits)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_sequences_come_and_go_under_graphs(model, recipe: str) -> None:
    """Padded to a power of two: each size has one graph, whoever the sequences are."""
    if not GPU and recipe != RECIPES[2]:
        pytest.skip("the interpreter takes its time")
    caches = [fivefold.compress(model, recipe), fivefold.compress(model, recipe, cuda_graph=True)]
    for cache in caches:
        if cache.step is not None:
            cache.reserve(400)

    def arrive(seed: int, tokens: int) -> None:
        for cache in caches:
            new = cache.new()
            with torch.inference_mode():
                model(ids(1, tokens, model.device, seed), past_key_values=new)
            cache.join(new)

    def go(count: int) -> None:
        alike(*steps(model, caches, ids(caches[0].batch, count, model.device, caches[0].batch)))
        same_tokens(*caches, padded=True)

    step, used = caches[1].step, {}
    for seed, tokens in enumerate((90, 33, 150, 5, 64)):
        arrive(seed, tokens)
        go(3 if GPU else 1)
        used[caches[1].batch] = list(step.captured)
    assert used == {1: [1], 2: [1, 2], 3: [1, 2, 4], 4: [1, 2, 4], 5: [1, 2, 4, 8]}
    before = {size: captured.tables for size, captured in step.captured.items()}
    taken = [cache.take([3, 1]) for cache in caches]
    go(2)
    for cache, one in zip(caches, taken):
        cache.join(one)
        cache.drop([0])
    go(2)
    assert {size: captured.tables for size, captured in step.captured.items()} == before
    assert step.failed is None and (not GPU or step.captures == 4)
    forks = [cache.fork() for cache in caches]
    go(1)
    alike(*steps(model, forks, ids(4, 1, model.device, 9)))
    same_tokens(*forks, padded=True)
    report = caches[1].report()
    assert report.graph > 0 and report.total > caches[0].report().total


@pytest.mark.slow
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


def test_ctrl_c_behind_a_step_stops_the_next_one(model, monkeypatch, ctrl_c) -> None:
    """What comes once a token is stored must not look as if it were not."""
    cache = fivefold.compress(model, "full()", cuda_graph=True)
    wanted = fivefold.compress(model, "full()", cuda_graph=True)

    def interrupted(*args) -> None:
        signal.raise_signal(signal.SIGINT)

    with torch.inference_mode():
        for one in (cache, wanted):
            model(ids(1, 40, model.device), past_key_values=one)
        for number in range(2):
            token = ids(1, 1, model.device, number)
            with monkeypatch.context() as patch:
                patch.setattr(type(cache.step), "_look_ahead", interrupted)
                first = model(token, past_key_values=cache).logits
            with pytest.raises(KeyboardInterrupt):
                model(token, past_key_values=cache)
            assert cache.get_seq_length() == 41 + number
            assert torch.equal(first, model(token, past_key_values=wanted).logits)
        with monkeypatch.context() as patch:
            patch.setattr(type(cache.step), "_look_ahead", interrupted)
            model(token, past_key_values=cache)
            patch.setattr(interrupts, "_STOPS", 0.0)  # long ago
            model(token, past_key_values=cache)
    assert cache.get_seq_length() == 44


def test_calls_that_ask_for_more_go_through_the_model(model) -> None:
    cache = fivefold.compress(model, "full()", cuda_graph=True)
    with torch.inference_mode():
        model(ids(1, 40, model.device), past_key_values=cache)
        seen = model(ids(1, 1, model.device), past_key_values=cache, output_hidden_states=True)
        assert len(seen.hidden_states) == 3 and cache.step.replays == 0
        one = model(ids(1, 1, model.device), past_key_values=cache, logits_to_keep=1)
        assert cache.step.replays == 1 and one.logits.shape == (1, 1, VOCAB)
        model.config.output_hidden_states = True
        seen = model(ids(1, 1, model.device), past_key_values=cache)
        assert len(seen.hidden_states) == 3 and cache.step.replays == 1
        assert "configuration asks for hidden states" in cache.step.failed
        model.config.output_hidden_states = False
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


class Broken(Exception):
    """On purpose."""


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.slow
def test_tables_follow_whatever_happens_to_the_pages(seed: int, monkeypatch) -> None:
    """Addresses and spans on the device are those of the page tables after any steps, chunks, forks, crops, trims,
    changes of place, and changes that were broken off."""
    # With work lists, which Triton wants, and without.
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton" if seed in (0, 3) and not GPU else "reference")
    if seed % 2:
        monkeypatch.setattr(sending, "_MANY", 0)  # the device makes copies of one layer
    random.seed(seed)
    torch.manual_seed(seed)
    codec = random.choice([None, Kivi(bits=2, residual=32), Kivi(bits=4, group=64, residual=0)])
    extents = [Extent(), random.choice([Extent(), Extent(random.randint(0, 40), random.randint(1, 90))])]
    extents[1] = extents[1].intersect(random.choice([Extent(), Extent(60, 20)]))
    spec = LayerSpec(0, 2, 2, 4, 64, torch.float32, torch.device("cpu"))
    pools = Pools()
    stores = [
        LayerCache(spec, pools, extents, codec and codec.codec(spec), codec.residual if codec else 0) for _ in range(2)
    ]
    bank = Bank.united(stores, None)
    others: list[Bank] = []
    elsewhere: list[torch.Tensor] = []
    made: list[DeviceTables] = []

    def tables() -> DeviceTables:
        found = tables_of(bank)
        if found not in made:
            made.append(found)
        return found

    def append(tokens: int, sequences: np.ndarray | None = None) -> None:
        for store in stores:
            counts = np.full(3, tokens) if sequences is None else sequences
            for group, count in store.split_by(counts):
                if count:
                    store.append(group, *torch.randn(2, len(group.rows), count, 64))

    def step(rows: np.ndarray) -> None:
        """Room for a token of each row, which is the caller's to write."""
        bank.open(rows)
        bounds = bank.at(rows)
        pages = bank.exact.table[rows, bounds.exact_pages - 1]
        for name in ("keys", "values"):
            bank.exact.pool.write_tokens(name, pages, (bounds.exact_tokens - 1) % PAGE, torch.randn(len(rows), 64))

    def compare() -> None:
        known = tables()
        known.update()
        rows, width = known.rows, known.rows * schedule.SPAN
        for store in stores:
            numbers = known._numbers[store.index]
            span = numbers[:width].view(rows, -1)
            if known.listed:
                assert known.programs is not None
                pages = schedule.pages_of(span.numpy(), known.page, joined=known.joined)
                shares = schedule.starts_of(pages, known.programs)
                assert torch.equal(numbers[width:].view(2, -1), torch.from_numpy(shares))
            for group in store.groups:
                wanted = torch.tensor([int(x) for x in group.bounds.span()]).expand(len(group.rows), -1)
                assert torch.equal(span[group.rows, : wanted.shape[1]].long(), wanted)
                packed, exact = known.pages(group)
                for side, name in enumerate(("keys", "values")):
                    at = store.exact_pool.addresses(name, group.exact) >> 4
                    assert np.array_equal(exact.table[:, : at.shape[1], side].numpy(), at)
                assert (packed is None) == (not group.bounds.packed_tokens)
                if packed is not None:
                    at = store.packed_pools[0].addresses("key_words", group.packed) >> 4
                    assert np.array_equal(packed.table[:, : at.shape[1]].numpy(), at)

    bank.start(3)
    append(0, np.array([70, 70, 45]) if seed % 2 else np.array([50, 50, 50]))
    rows, broken, full = bank.rows_of(), 0, 0
    for number in range(120):
        kind = random.choice(["step"] * 8 + ["chunk", "fork", "forget", "crop", "select", "trim", "broken", "full"])
        if kind == "chunk":
            append(random.randint(2, 70))
        elif kind == "fork":
            others.append(bank.fork())
        elif kind == "forget" and others:
            others.pop().free()
        elif kind == "crop":
            with contextlib.suppress(CacheStateError):
                for store in stores:
                    store.crop(random.Random(number).randint(1, 5))
        elif kind == "select":
            bank.select(np.array([random.randrange(3) for _ in range(3)]))
        elif kind == "trim":  # page ids come again for memory elsewhere
            append(count := random.randint(70, 300))
            compare()
            with contextlib.suppress(CacheStateError):
                for store in stores:
                    store.crop(count)
            pools.budget.trim()
            elsewhere += [torch.empty(size) for size in (1 << 16, 1 << 18, 1 << 20)]
            append(count)
        elif kind == "broken":
            with contextlib.suppress(Broken), bank.atomic():
                for _ in range(random.randint(1, 40)):
                    step(rows)
                    if random.random() < 0.3:
                        tables().update()  # the device has seen it
                    bank.advance(rows)
                append(random.randint(2, 200))
                if random.random() < 0.5:
                    bank.select(np.array([2, 2, 0]))
                tables().update()
                raise Broken
            broken += 1
            compare()
        elif kind == "full":
            pools.budget.trim()
            page = bank.exact.pool.layout.nbytes
            pools.budget.limit = pools.budget.used + random.randrange(10) * page
            try:
                with bank.atomic():
                    append(random.randint(2, 200))
                    tables().sync()
                    append(random.randint(2, 200))
            except CacheFullError:
                full += 1
            pools.budget.limit = None
            compare()
        with bank.atomic():
            step(rows)
            compare()
            # The newest token's slot is nobody else's.
            newest = bank.exact.table[rows, bank.at(rows).exact_pages - 1]
            assert (bank.exact.pool.references(newest) == 1).all()
            bank.advance(None if number % 3 else rows)
            if number % 5:
                tables().prepare()  # what has become wrong of it when the next step comes is made anew
    assert made and broken > 2 and full > 2
    for one in (bank, *others):
        one.free()
    assert all(pool.pages_in_use == 0 for pool in pools)


@pytest.mark.parametrize(
    ("recipe", "prompt", "aside"), [("kivi(bits=4, residual=32)", 62, 1), ("kivi(residual=0)", 30, 0)]
)
def test_what_need_not_wait_for_a_step_runs_beside_it(model, recipe, prompt: int, aside: int, monkeypatch) -> None:
    """The mask is counted once the step is launched. So is packed what the step only reads, but not what it brings."""
    said: list[str] = []
    for owner, name in ((Step, "_replay"), (Beside, "running")):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, real=real, name=name: said.append(name) or real(*args))
    tokens = ids(2, prompt + 2, model.device)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    cache = fivefold.compress(model, recipe, cuda_graph=True)
    with torch.inference_mode():
        model(tokens[:, :prompt], past_key_values=cache, attention_mask=mask[:, :prompt])
        for length, packs in ((prompt + 1, 0), (prompt + 2, aside)):
            said.clear()
            where = mask[:, :length].cumsum(1)[:, -1:] - 1
            given = {"attention_mask": mask[:, :length], "position_ids": where}
            model(tokens[:, length - 1 : length], past_key_values=cache, **given)
            assert said == ["_replay"] + ["running"] * (1 + packs)
    assert [group.bounds.packed_stop for group in cache.session.stores[0].groups] == [0, 32]
