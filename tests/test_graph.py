"""Decoding steps from fixed tables: the same as without, whatever happens to the cache between them.

On a GPU they are replayed as a graph; on a CPU the same step runs in Triton's interpreter.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect

import pytest
import torch

import fivefold
from fivefold.models.graph import Forward

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
GPU = torch.cuda.is_available()
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the kernels are compiled for the GPU here")),
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]),
]
VOCAB = 131
RECIPES = ["full()", "kivi(bits=4, residual=32)", "duo(retrieval=[[0, 1], [1, 0]], recent=40) + kivi(bits=8)"]


@pytest.fixture(params=DEVICES)
def model(request, tiny, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
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
