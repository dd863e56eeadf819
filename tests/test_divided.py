"""Heads that are packed together, of layers in which heads hold different tokens: read set by set, by kernels."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS
from fivefold.attention.decode import attend_step
from fivefold.attention.divided import Division, readers_of
from fivefold.attention.fused import attend_fused
from fivefold.attention.tables import tables_of
from fivefold.kernels.packed_decode import schedule
from learned import learn
from test_graph import GPU, alike, ids, same_tokens, steps

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
# Three heads, which do not stand side by side, and one; and a layer whose heads are all alike.
DUO = "duo(retrieval=[[0, 0], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]], sink=4, recent=100)"
CODECS = {
    "rotatekv": "rotatekv(bits=4, residual=32)",
    "rotatekv-alone": "rotatekv(bits=4, residual=32, head_group=1)",
    "rotatekv-2": "rotatekv(bits=2, residual=32, head_group=2)",
    "cskv": "cskv(keep=0.3, bits=4)",
    "kv_heads": "kv_heads(keep=0.5, group=2)",
}


@pytest.fixture(params=DEVICES)
def model(request, tiny, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    shape = {"num_hidden_layers": 2, "num_key_value_heads": 4, "num_attention_heads": 8}
    model = copy.deepcopy(tiny("llama", **shape)).to(request.param)
    yield model
    fivefold.restore(model)


def recipe_of(name: str, model, folder: Path, heads: str = DUO) -> str:
    codec = CODECS[name]
    learn(copy.deepcopy(model).cpu(), codec, folder, chunks=1)
    return f'{heads} + {codec[:-1]}, profile="{folder}")'


def filled(model, recipe: str, *graphs: bool) -> list:
    caches = [fivefold.compress(model, recipe, cuda_graph=graph) for graph in graphs]
    prompt, mask = ids(2, 200, model.device), torch.ones(2, 200, dtype=torch.long, device=model.device)
    mask[0, :41] = 0  # the first one goes later
    with torch.inference_mode():
        for cache in caches:
            model(prompt, attention_mask=mask, past_key_values=cache)
    return caches


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=pytest.mark.release) if x in ("rotatekv-2", "rotatekv-alone") else x for x in CODECS]
)
@pytest.mark.slow
def test_steps_are_those_of_the_reference(model, name: str, tmp_path: Path) -> None:
    """Two sequences of different lengths, groups packed between steps, windows that slide over packed pages, a fork, a
    crop, and sequences that go while the tables stay."""
    caches = filled(model, recipe_of(name, model, tmp_path), False, True)
    count = 40 if GPU else 2
    alike(*steps(model, caches, ids(2, count, model.device, 1)))
    assert caches[1].step.replays == count and caches[1].step.failed is None
    store = caches[1].session.stores[0]
    assert store.sets == ((0, 2, 3), (1,)) and caches[1].session.stores[1].sets == ((0, 1, 2, 3),)
    assert all(group.bounds.packed_tokens for group in store.groups)  # in both sets, or nothing was tried
    assert "plain PyTorch" not in caches[1].decoding
    forks = [cache.fork() for cache in caches]
    alike(*steps(model, forks, ids(2, 1, model.device, 3)))
    for cache in caches:
        cache.crop(-1)
        cache.drop([0])
    alike(*steps(model, caches, ids(1, 40 if GPU else 1, model.device, 4)))
    same_tokens(*caches)


def test_rows_that_stand_alike_are_read_by_their_sets_kernel(model, tmp_path: Path) -> None:
    """Group by group, as where not all rows take a step."""
    (cache,) = filled(model, recipe_of("rotatekv", model, tmp_path), False)
    store = cache.session.stores[0]
    assert len(store.groups) == 4  # two sets of heads, two lengths
    for group in store.groups:
        assert group.bounds.packed_tokens
        queries = torch.randn(len(group.rows), 2, 64, device=model.device)
        found = attend_fused(group, queries, 0.125)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FIVEFOLD_KERNELS", "reference")
            wanted, _ = attend_step(group, queries, 0.125)
        assert found is not None and (found - wanted).norm() < 8e-3 * wanted.norm()


def test_a_set_that_no_kernel_reads_keeps_its_layer_from_them(model, tmp_path: Path, monkeypatch) -> None:
    (cache,) = filled(model, recipe_of("rotatekv", model, tmp_path), True)
    store = cache.session.stores[0]
    assert cache.session.why_not_fused() == {0: None, 1: None}
    real, lone = type(store.codec).reader_of, (1,)

    def lacking(codec, heads):
        found = real(codec, heads)
        if heads == lone:
            monkeypatch.setattr(found.__class__, "lacks", lambda form, _: "no" if form.kv_heads == 1 else None)
        return found

    monkeypatch.setattr(type(store.codec), "reader_of", lacking)
    assert cache.session.why_not_fused() == {0: "no", 1: None}


def test_what_kernels_are_told_of_sets(model, tmp_path: Path) -> None:
    """Every page of every row is some program's, once, and its parts are where the row looks for them."""
    (cache,) = filled(model, recipe_of("rotatekv-2", model, tmp_path), False)
    (bank,) = cache.session.banks
    tables = tables_of(bank)
    tables.update()
    division = tables.division
    assert isinstance(division, Division) and len(division.sets[0]) == 2 and not division.sets[1]
    numbers = tables._numbers[0, tables._divided].cpu()
    spans, bounds = numbers[: division.rows * schedule.SPAN].view(division.rows, -1), bank.layers[0].bounds
    assert (spans[:, 1].numpy() == bounds.packed_tokens[division.order[0]]).all()
    parts = numbers[division._parts].view(-1, 4).numpy()
    lines: list[int] = []
    for row, (first, last, line, apart) in enumerate(parts.tolist()):
        reader = readers_of(bank.layers[0])[row % 4 == 1]
        page = reader.tokens
        low, high = bounds.span().packed_first[row], bounds.packed_tokens[row]
        assert 1 <= last - first <= -(-high // page) - low // page
        assert apart == 2 * reader.team
        lines += [line + program * apart + head for program in range(first, last) for head in range(2)]
    assert len(lines) == len(set(lines))  # no two write to one
    ends = [one.line + one.programs * one.reader.team * 2 for one in division.sets[0]]
    assert ends[0] == division.sets[0][1].line and max(lines) < ends[1]
    assert np.array_equal(np.sort(division.order, 1), np.tile(np.arange(8), (2, 1)))
