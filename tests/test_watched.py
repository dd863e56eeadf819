"""Decoding steps that watch, choose and pick on the device: the kernels against their reference, and whole steps
against those in plain PyTorch, whatever happens to the cache between them. In Triton's interpreter, or `-m gpu`."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS, quick
from fivefold.kernels.choice import choose
from fivefold.kernels.packed_decode import Form, decode_page
from fivefold.kernels.watched import Noise, reference
from fivefold.plan import memory
from fivefold.recipe import Recipe
from recipes import SHAPE, written
from test_packed_decode import exact_tier, packed_tier
from test_plan_memory import held, shape_of, told
from test_transactions import FailsAt, Fault

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
attention = importlib.import_module("fivefold.kernels.packed_decode.triton")
kernel = importlib.import_module("fivefold.kernels.watched.triton")
VOCAB = 131
ROWS, HEADS, DIM = 4, 3, 64
FORM = Form(4, 32, 32, DIM)
SPANS = ((0, 96, 0, 0, 70), (0, 0, 0, 0, 1), (0, 128, 0, 0, 33), (0, 64, 0, 0, 96))


@pytest.fixture
def pages(request, monkeypatch) -> dict[str, Any]:
    """Random pages of both tiers, queries, spans, and what the kernels make of the exact slots."""
    device = request.param
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    torch.manual_seed(0)
    np.random.seed(0)
    packed, exact = packed_tier(ROWS, 1, FORM, device), exact_tier(ROWS, 3, DIM, torch.float32, device)
    spans = torch.zeros(ROWS, attention.SPAN, dtype=torch.int32, device=device)
    spans[:, :5] = torch.tensor(SPANS, dtype=torch.int32)
    table = attention.Exact(torch.stack([exact.addresses("keys"), exact.addresses("values")], 2), torch.float32)
    queries = torch.randn(ROWS, HEADS, DIM, device=device)
    scores = torch.full((ROWS, HEADS, 96), torch.nan, device=device)
    where = attention.Packed(packed.addresses("key_words"), FORM)
    _, lse = attention.decode(queries, 0.125, spans, where, table, with_lse=True, scores=scores)
    fields = tuple(packed.rows(part.name)[:, 0] for part in packed.pool.layout.fields)
    return {
        "queries": queries, "spans": spans, "exact": table, "packed": where, "scores": scores, "lse": lse,
        "keys": exact.rows("keys").flatten(1, 2), "values": exact.rows("values").flatten(1, 2),
        "packed_keys": decode_page(FORM, fields)[0], "pool": exact,
    }  # fmt: skip


@pytest.mark.parametrize("pages", DEVICES, indirect=True)
def test_what_tokens_receive_and_what_is_picked(pages: dict[str, Any]) -> None:
    queries, spans, lse, scores = (pages[name] for name in ("queries", "spans", "lse", "scores"))
    exact = queries * 0.125 @ pages["keys"].transpose(1, 2)
    for row, (_, high, _, _, stop) in enumerate(SPANS):
        assert torch.allclose(scores[row, :, :stop], exact[row, :, :stop], 1e-3, 1e-3)
        whole = torch.cat([queries[row] * 0.125 @ pages["packed_keys"][row, :high].T, exact[row, :, :stop]], 1)
        assert torch.allclose(whole.logsumexp(1), lse[row], 1e-2, 1e-2)
    width = 128 + 96
    given = kernel.packed_received(queries, 0.125, lse, spans, pages["packed"], width)
    for row, (_, high, _, _, _) in enumerate(SPANS):
        wanted = (queries[row] * 0.125 @ pages["packed_keys"][row, :high].T - lse[row, :, None]).exp().sum(0)
        assert torch.allclose(given[row, :high], wanted, 2e-2, 1e-3)
    for sink, recent in ((0, 0), (2, 5)):
        found = kernel.rank(scores, lse, given, spans, width, sink, recent)
        mine = (x.cpu() for x in (scores, lse, given, spans))
        assert torch.allclose(found.cpu(), reference.rank(*mine, width, sink, recent), 1e-4, 1e-5)
        best = found.topk(20, 1, sorted=False)
        picked = kernel.picks(*best, spans, 24)
        assert torch.equal(picked.cpu(), reference.picks(*(x.cpu() for x in best), spans.cpu(), 24))
    spans[:, 1] = 0  # nothing is packed
    found = kernel.rank(scores, lse, None, spans, width)
    assert torch.allclose(found.cpu(), reference.rank(scores.cpu(), lse.cpu(), None, spans.cpu(), width), 1e-4, 1e-5)


CHOICES = ("least", "oldest", "draws", "noise", "packed", "scored", "nothing")


@pytest.mark.parametrize("pages", DEVICES, indirect=True)
@pytest.mark.parametrize("by", CHOICES)
def test_which_token_goes(pages: dict[str, Any], by: str) -> None:
    device, slots = pages["spans"].device, 600
    torch.manual_seed(CHOICES.index(by))
    spans = pages["spans"].clone()
    if by not in ("packed", "scored"):
        spans[:, 1] = 0
    old, given = torch.rand(ROWS, slots, device=device), torch.rand(ROWS, 224, device=device)
    if by == "scored":
        given = torch.randn(ROWS, pages["scores"].shape[1], 224, device=device)
    old[:, 60:] = old[:, :1]  # ties go to the first
    positions = torch.stack([torch.randperm(slots, device=device) for _ in range(ROWS)]).int()
    low = torch.tensor([-1, 5, 400, -1], dtype=torch.int32, device=device)
    counts = torch.tensor([[2, 700, 100, 7], [2, 600, 0, 0], [1, 800, 0, 300], [0, 0, 0, 0]], device=device).int()
    scores = None if by == "nothing" else pages["scores"]
    draws = torch.rand(97, device=device) + 0.1
    outs = []
    for made in (kernel, reference):
        at = device if made is kernel else torch.device("cpu")
        noise = Noise(draws.to(at), 5, 0.8, 2.0, 100) if by == "noise" else None
        order = {"oldest": "oldest", "draws": 3}.get(by, "least")
        some = (scores, pages["lse"], given if by in ("packed", "scored") else None)
        some = [x if x is None else x.to(at, copy=True) for x in some]  # scores are written over
        known = [x.to(at) for x in (old, positions, low, counts, spans)]
        new = torch.zeros(ROWS, slots, device=at)
        goes, stash = torch.zeros(ROWS, dtype=torch.int32, device=at), torch.zeros(ROWS, 2, DIM, device=at)
        exact = pages["exact"] if made is kernel else (pages["keys"].cpu(), pages["values"].cpu())
        made.tally(*some, noise, order, 3, 2, *known, new, goes, stash, exact)
        outs.append((new.cpu(), goes.cpu(), stash.cpu()))
    (new, goes, stash), (wanted, wanted_goes, wanted_stash) = outs
    assert torch.allclose(new, wanted, 1e-4, 1e-5) and torch.equal(stash, wanted_stash)
    assert torch.equal(goes, wanted_goes) and int(goes[3]) == -1


@pytest.mark.parametrize("pages", DEVICES, indirect=True)
def test_what_goes_is_merged_and_becomes_so(pages: dict[str, Any]) -> None:
    device, keys, values = pages["spans"].device, pages["keys"].clone(), pages["values"].clone()
    spans = pages["spans"].clone()
    spans[:, 1] = 0
    counts = torch.tensor([[2, 700, 0, 0], [0, 0, 0, 0], [2, 800, 0, 0], [2, 900, 0, 0]], device=device).int()
    # The newest token is the one that the third row's goes into; the fourth row's newest goes itself.
    keys[2, 32] = keys[2, 7] * 2
    for name, x in (("keys", keys), ("values", values)):
        pages["pool"].pool.write(name, pages["pool"].table.reshape(-1), x.view(-1, 32, DIM))
    goes = torch.tensor([3, -1, 7, 95], dtype=torch.int32, device=device)
    threshold = torch.tensor([torch.nan, 0.5, 0.1, 2.0], device=device)
    outs = []
    for where in ("kernel", "reference"):
        cpu = where == "reference"
        given = [x.cpu() if cpu else x for x in (goes, counts, spans)]
        exact = (keys.cpu(), values.cpu()) if cpu else pages["exact"]
        old, after = (x.cpu() if cpu else x.clone() for x in (threshold, threshold))
        at = old.device
        stash = torch.stack([x[range(ROWS), spans[:, 4].long() - 1] for x in (keys, values)], 1).to(at).clone()
        into, merged = torch.zeros(ROWS, dtype=torch.int32, device=at), torch.zeros(ROWS, 2, DIM, device=at)
        merge = (kernel if where == "kernel" else reference).absorb
        merge(*given, exact, old, 0.3, 0.7, after, stash, into, merged)
        outs.append((after, stash, into, merged))
    for mine, theirs in zip(*outs):
        assert torch.allclose(mine.cpu().float(), theirs.float(), 1e-4, 1e-4, equal_nan=True)
    after, stash, into, merged = outs[0]
    assert into.tolist()[1:] == [-1, -1, -1] and into[0] >= 0
    slots = 300
    positions, scores = (
        torch.zeros(1, ROWS, slots, dtype=torch.int32, device=device),
        torch.zeros(1, ROWS, slots, device=device),
    )
    new = torch.rand(1, ROWS, slots, device=device)
    merges = (into[None], merged[None], threshold[None].clone(), after[None])
    for _ in range(2):  # twice does no harm
        kernel.overwrite(
            goes[None], stash[None], new, merges, counts[None], spans[None], positions, scores, pages["exact"]
        )
    found = [
        pages["pool"].pool.read(name, pages["pool"].table.reshape(-1)).view(ROWS, 96, DIM)
        for name in ("keys", "values")
    ]
    for side, (x, before) in enumerate(zip(found, (keys, values))):
        wanted = before.clone()
        wanted[0, int(into[0])], wanted[0, 3], wanted[2, 7] = merged[0, side], stash[0, side], stash[2, side]
        assert torch.equal(x, wanted)
    assert positions[0, range(ROWS), [3, 0, 7, 95]].tolist() == [700, 0, 800, 900]
    assert (
        scores[0, 0, 3] == new[0, 0, 69] and torch.equal(scores[0, 3, :96], new[0, 3, :96]) and not scores[0, 1].any()
    )
    assert torch.equal(merges[2][0, [0, 2, 3]], after[[0, 2, 3]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stop", [2, 65, 700, 960])
def test_of_keys_that_are_equal_the_first_takes_what_goes(device, stop: int, monkeypatch) -> None:
    """Wherever it stands, in whichever tile of whichever program, of which there are few enough to have several."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    monkeypatch.setattr(kernel, "processors", lambda device: 1)
    torch.manual_seed(stop)
    rows, gone = 6, stop // 3
    exact = exact_tier(rows, 30, DIM, torch.float32, device)
    keys, values = (exact.rows(name).flatten(1, 2).clone() for name in ("keys", "values"))
    alike = [sorted({slot % stop for slot in some} - {gone} or {stop - 1}) for some in
             ([0], [1, 2], [stop - 1, stop - 2], [63, 64, 128], [127, stop // 2], [5, 69, 133])]  # fmt: skip
    for row, some in enumerate(alike):
        keys[row, some] = keys[row, gone] * 3
    exact.pool.write("keys", exact.table.reshape(-1), keys.view(-1, 32, DIM))
    spans = torch.zeros(rows, attention.SPAN, dtype=torch.int32, device=device)
    spans[:, 4] = stop
    table = attention.Exact(torch.stack([exact.addresses("keys"), exact.addresses("values")], 2), torch.float32)
    counts = torch.tensor([[2, 5000, 0, 0]] * rows, device=device).int()
    goes, into = (torch.full((rows,), x, dtype=torch.int32, device=device) for x in (gone, 0))
    old, after = torch.full((rows,), -1.0, device=device), torch.zeros(rows, device=device)
    stash, merged = torch.zeros(2, rows, 2, DIM, device=device)
    kernel.absorb(goes, counts, spans, table, old, 0.5, 0.5, after, stash, into, merged)
    for row, some in enumerate(alike):
        first = some[0]
        assert int(into[row]) == (-1 if first == stop - 1 else first)  # the newest takes the place itself
        for side, x in enumerate((keys, values)):
            assert torch.allclose(merged[row, side], (x[row, first] + x[row, gone]) / 2, 1e-5, 1e-5)
        assert torch.equal(stash[row], merged[row]) == (first == stop - 1)
    assert torch.allclose(after, torch.zeros(rows, device=device), atol=1e-6)  # between -1 and a likeness of 1


@pytest.mark.parametrize("pages", DEVICES, indirect=True)
def test_one_more_part(pages: dict[str, Any]) -> None:
    device = pages["spans"].device
    keys, values = torch.randn(2, ROWS, DIM, device=device)
    logs = torch.tensor([2.0, -1e30, 0.0, 5.0], device=device)
    out, lse = torch.randn(ROWS, HEADS, DIM, device=device), torch.randn(ROWS, HEADS, device=device)
    wanted, wanted_lse = out.cpu().clone(), lse.cpu().clone()
    reference.beside(pages["queries"].cpu(), 0.125, keys.cpu(), values.cpu(), logs.cpu(), wanted, wanted_lse)
    kernel.beside(pages["queries"], 0.125, keys, values, logs, out, lse)
    assert torch.allclose(out.cpu(), wanted, 1e-4, 1e-5) and torch.allclose(lse.cpu(), wanted_lse, 1e-4, 1e-5)


# -- whole steps ------------------------------------------------------------------------------------------


@pytest.fixture(params=DEVICES)
def model(request, tiny, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    model = tiny(**SHAPE).to(request.param)
    yield model
    fivefold.restore(model)
    model.to("cpu")


def ids(rows: int, tokens: int, model: Any, seed: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed)).to(model.device)


class Both:
    """A cache whose steps are in plain PyTorch, and one whose steps are a graph's."""

    def __init__(self, model: Any, recipe: str | None, caches: list[Any] | None = None, bound: float = 2e-4) -> None:
        self.model, self.bound, self.number = model, bound, 0
        self.caches = caches or [fivefold.compress(model, recipe, cuda_graph=graph) for graph in (False, True)]

    def give(self, tokens: int, which: slice = slice(None), **more: Any) -> None:
        """A chunk for both; what comes out, and what is held then, are alike."""
        self.number += 1
        outs, batch = [], max(1, self.caches[0].batch)
        for cache in self.caches:
            with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
                if cache.step is None:
                    patch.setenv("FIVEFOLD_KERNELS", "reference")
                outs.append(self.model(ids(batch, tokens, self.model, self.number), past_key_values=cache).logits)
        one, other = outs
        assert (one - other).norm() <= self.bound * one.norm(), float((one - other).norm() / one.norm())

    def prompt(self, rows: int, tokens: int) -> None:
        prompt = ids(rows, tokens, self.model, 99)
        with torch.inference_mode():
            for cache in self.caches:
                self.model(prompt, past_key_values=cache)

    def alike(self) -> None:
        """What is held: the same tokens, and what is known of them."""
        for one, other in zip(*(cache.session.stores.values() for cache in self.caches)):
            assert len(one.held) == len(other.held)
            for mine, theirs in zip(one.groups, other.groups, strict=True):
                assert mine.bounds == theirs.bounds
                if mine.held is None or theirs.held is None:
                    continue
                assert torch.equal(mine.held.positions, theirs.held.positions)
                for name in ("prompt", "seen", "share", "final"):
                    assert getattr(mine.held, name) == getattr(theirs.held, name), name
                assert torch.allclose(mine.held.scores, theirs.held.scores, 1e-3, 1e-4)
                assert mine.held.extra.keys() == theirs.held.extra.keys()
                for name, x in mine.held.extra.items():
                    assert torch.allclose(x, theirs.held.extra[name], 1e-3, 1e-4)
                for which in (0, 1):
                    assert torch.allclose(mine.dense_part(which), theirs.dense_part(which), 1e-2, 1e-3)


STEPS = quick([
    "h2o", "tidal", "d2o", "keyformer", "elastic", "random", "snapkv", "anchors", "razor", "h2o+kivi", "snapkv+kivi",
    "d2o+kivi", "tidal+kivi", "anchors+kivi", "razor+kivi", "elastic+kivi",
], 0)  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_steps_are_those_without(model, name: str) -> None:
    """Over a page's end: 64 tokens are held of a prompt of 128. Where some are packed, products in float16 may let
    another token be picked or go in time, as near as two of them are; then only the counts are the same."""
    packs = "kivi" in name
    both = Both(model, written(name, model), bound=0.05 if packs else 2e-4)
    both.prompt(2, 128)
    for number in range(40 if model.device.type == "cuda" else 3):
        both.bound = torch.inf if packs and number > 2 else both.bound
        both.give(1)
    step = both.caches[1].step
    assert step.failed is None and step.replays >= 3
    if packs:
        one, other = (np.stack(cache.session.banks[0].bounds) for cache in both.caches)
        assert np.array_equal(one, other)
    else:
        both.alike()


def test_layers_that_stand_alike_are_asked_once(model) -> None:
    """And yet each gets what it would if it were asked alone, whatever budget or policy it has."""
    cache = fivefold.compress(model, written("h2o", model), cuda_graph=True)
    with torch.inference_mode():
        for tokens in (128, 1):
            model(ids(2, tokens, model, tokens), past_key_values=cache)
    (bank,) = cache.session.banks
    watch, bounds, layers = bank.live.watch, bank.standing.of_layers(), len(bank.layers)
    assert len(bounds.length) == 1 < layers
    wide = type(bounds)(*(np.repeat(x, layers, 0) for x in bounds))
    before = bank.live.known
    for other, keep in (({}, None), ({"share": 0.5}, None), ({"prompt": 90}, None), ({}, 0.25)):
        for layer in bank.layers[1:] if keep else ():
            layer.policy = replace(layer.policy, keep=keep)
        known = [tuple((replace(held, **(other if index else {})), rows) for held, rows in some)
                 for index, some in enumerate(before)]  # fmt: skip
        bank.live = replace(bank.live, known=tuple(known), kinds=watch._kinds(bank, known))
        (once, asks), (each, ask) = watch._planned(bank, bounds), watch._planned(bank, wide)
        differ = bool(other or keep)
        assert np.array_equal(once, each) and asks == ask == differ and once[:, : bank.rows, 0].all()
        assert (once[0] == once[1]).all() == (not differ)


@pytest.mark.parametrize("name", ["h2o", pytest.param("d2o", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_whatever_happens_between_steps(model, name: str, tmp_path) -> None:
    """Forks on both sides, a chunk, sequences that go and come, host memory, a file."""
    both = Both(model, written(name, model))
    both.prompt(2, 64)
    both.give(1)
    forks = Both(model, None, [cache.fork() for cache in both.caches])
    for side in (both, forks, both):
        side.number += 10
        side.give(1)
        side.give(1)
        side.alike()
    for cache in forks.caches:
        cache.free()
    both.give(1)
    both.give(20)
    both.give(1)
    both.alike()
    taken = Both(model, None, [cache.take([1]) for cache in both.caches])
    both.give(1)
    both.alike()
    for cache, other in zip(both.caches, taken.caches):
        cache.join(other)
    both.give(1)
    for number, cache in enumerate(both.caches):
        cache.offload()
        cache.restore()
        cache.save(tmp_path / str(number))
    both.give(1)
    both.alike()
    assert both.caches[1].step.failed is None
    back = [cache.new(cuda_graph=cache.step is not None) for cache in both.caches]
    for number, cache in enumerate(back):
        cache.load(tmp_path / str(number))
    read = Both(model, None, back)
    read.give(1)
    read.alike()


class Broken(Exception):
    """On purpose."""


@pytest.mark.parametrize(
    "name", ["h2o", pytest.param("tidal", marks=pytest.mark.slow), pytest.param("d2o", marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_step_that_fails_leaves_nothing(model, name: str, monkeypatch) -> None:
    """Behind the graph, and while it is committed: the next step is as if there had been none."""
    both = Both(model, written(name, model))
    both.prompt(1, 64)
    both.give(1)
    cache = both.caches[1]
    before, total = cache.get_seq_length(), cache.report().total

    def breaks(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            real(*args, **kwargs)
            raise Broken

        return call

    step = type(cache.step)
    places = ((step, "_replay"), (type(cache.session), "advance"), (type(cache.session.banks[0]), "advance"))
    for owner, method in (*places, (type(cache.session.banks[0]), "give")):
        if owner is type(cache.session.banks[0]) and name == "tidal" and method == "give":
            continue
        if method == "advance" and owner is not type(cache.session) and name != "tidal":
            continue
        with monkeypatch.context() as patch, pytest.raises(Broken), torch.inference_mode():
            patch.setattr(owner, method, breaks(getattr(owner, method)))
            model(ids(1, 1, model, 77), past_key_values=cache)
        assert cache.get_seq_length() == before
        both.give(1)
        both.alike()
        before = cache.get_seq_length()
    assert cache.report().total >= total


@pytest.mark.parametrize("name", ["h2o", "d2o", "razor"])
@pytest.mark.slow
def test_a_step_that_fails_at_any_operation(model, name: str) -> None:
    """Also at the last ones, with which what the step before chose becomes so. A fork shares the pages, so that some
    must be copied before a token is overwritten."""
    both, failed = Both(model, written(name, model)), 0
    both.prompt(1, 64)
    both.give(1)
    forks = [cache.fork() for cache in both.caches]
    both.give(1)
    cache = both.caches[1]
    for point in (2, 5, 9, 14, 20, 33, 60, 90, 150, *range(240, 4000, 25)):
        before, token, fails = cache.get_seq_length(), ids(1, 1, model, point), FailsAt(point)
        try:
            with fails, torch.inference_mode():
                model(token, past_key_values=cache)
        except Fault:
            failed += 1
            assert cache.get_seq_length() == before, (point, fails.raised)
            if failed % 8 == 0:
                both.give(1)
                both.alike()
        else:
            break
    assert failed > 2
    for side in forks:
        side.free()


@pytest.mark.slow
def test_tokens_are_watched_from_the_first_on(model) -> None:
    """A text that comes token by token, below the floor and above it."""
    both = Both(model, "h2o(keep=0.5, floor=4)")
    for _ in range(8):
        both.give(1)
    both.alike()
    assert both.caches[1].step.replays >= 6


@pytest.mark.parametrize("name", ["h2o", "d2o", "tidal", "anchors"])
@pytest.mark.slow
def test_beams_and_padding(model, name: str) -> None:
    """Beams share pages, and sequences stand at different lengths."""
    prompt, mask = ids(2, 50, model, 5), torch.ones(2, 50, dtype=torch.long, device=model.device)
    mask[0, :17] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    recipe = written(name, model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FIVEFOLD_KERNELS", "reference")
        wanted = model.generate(prompt, past_key_values=fivefold.compress(model, recipe), **settings)
    cache = fivefold.compress(model, recipe, cuda_graph=True)
    assert torch.equal(model.generate(prompt, past_key_values=cache, **settings), wanted)
    assert cache.step.replays >= 3 and cache.step.failed is None


PICKS = "tidal(top=16, full_layers=0, select_layers=[0])"


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (f"{PICKS} + h2o(keep=0.5)", "tokens that are chosen"),
        (f"{PICKS} + duo(retrieval=[[0, 1], [1, 0]], sink=2, recent=20)", "heads with a window"),
        (f"{PICKS} + streaming(sink=2, recent=20)", None),
    ],
)
def test_what_cannot_be_replayed_says_why_and_runs(model, recipe: str, why: str | None) -> None:
    if why is None:
        both = Both(model, recipe)
        both.prompt(1, 64)
        both.give(1)
        assert both.caches[1].step.replays == 1
        return
    with pytest.warns(fivefold.SlowPathWarning, match=f"decoding without a CUDA graph: .*{why}"):
        both = Both(model, recipe)
    both.prompt(1, 64)
    both.give(1)
    both.give(1)
    both.alike()
    assert both.caches[1].step.replays == 0


PLANNED = quick(["h2o", "d2o", "tidal", "razor", "elastic+kivi"], 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is planned for a GPU is in benchmarks/plan_gpu.py")
@pytest.mark.parametrize("name", PLANNED)
def test_what_is_planned_is_what_it_takes(tiny, name: str, monkeypatch, tmp_path) -> None:
    """The tables of watched steps too, to the byte."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
    model = tiny(**SHAPE)
    recipe = written(name, model).replace("d2o(", "d2o(layers=False, ")
    cache = held(model, recipe, 75, 2, None, 3)
    assert name in ("tidal", "razor") or cache.session.banks[0].live is not None
    path = choose(torch.device("cpu"))
    settings = {"generated": 3, "dtype": torch.float32, "path": path}
    plan = memory.report_of(Recipe.parse(recipe), shape_of(model, tmp_path), 75, 2, **settings)
    assert told(plan) == told(cache.report())
