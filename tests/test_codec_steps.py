"""Steps of codecs whose pages are not KIVI's, from fixed tables as a graph would be: those of the reference."""

from __future__ import annotations

import copy

import pytest
import torch

import fivefold
from conftest import DEVICES, KERNELS, quick
from faults import Fault
from fivefold.engine.session import Session
from fivefold.models.graph import Step
from recipes import written
from test_graph import alike, ids, steps

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")
GPU = torch.cuda.is_available()
RECIPES = [
    "rotatekv", "gear", "mikv", "mikv-high8", "mikv-high8+duo", "rotatekv+duo", "cskv+duo", "kv_heads-group+duo",
    "gear+streaming", "kivi(bits=2, unbias=True)",
    "kivi(key_bits=4, value_bits=2, residual=0)",
]  # fmt: skip


@pytest.fixture(params=DEVICES)
def model(request, tiny, monkeypatch):
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    model = copy.deepcopy(tiny("llama", num_hidden_layers=2)).to(request.param)
    yield model
    fivefold.restore(model)


def recipe_of(name: str, model) -> str:
    if "(" in name:
        return name
    codec, _, other = name.partition("+")
    beside = {"": "", "duo": " + duo(retrieval=[[0, 1], [1, 0]], recent=40)", "streaming": " + streaming(4, 150)"}
    return written(codec, copy.deepcopy(model).cpu()) + beside[other].replace(
        "streaming(4, 150)", "streaming(sink=4, recent=150)"
    )


@pytest.mark.parametrize("name", quick(RECIPES, 1))
def test_steps_are_those_without(model, name: str) -> None:
    """On a GPU sequences of different lengths, groups that are packed between steps, a fork and a crop; the interpreter
    takes its time."""
    recipe = recipe_of(name, model)
    caches = [fivefold.compress(model, recipe), fivefold.compress(model, recipe, cuda_graph=True)]
    batch, tokens, count = (3, 190, 40) if GPU else (1, 142, 2)
    prompt, mask = ids(batch, tokens, model.device), torch.ones(batch, tokens, dtype=torch.long, device=model.device)
    mask[1:, :41] = 0
    with torch.inference_mode():
        for cache in caches:
            model(prompt, attention_mask=mask, past_key_values=cache)
    alike(*steps(model, caches, ids(batch, count, model.device, 1)))
    assert caches[1].step.replays == count and caches[1].step.failed is None and caches[0].step is None
    if GPU or name.startswith(
        ("rotatekv", "gear", "mikv", "cskv", "kv_heads")
    ):  # of others so few tokens are all exact
        assert caches[1].session.banks[0].bounds.packed_tokens.any()
    if not GPU:
        return
    forks = [cache.fork() for cache in caches]
    alike(*steps(model, forks, ids(batch, 3, model.device, 3)))
    if "mikv" not in name:
        for cache in caches:
            cache.crop(-1)
    alike(*steps(model, caches, ids(batch, 3, model.device, 4)))


@pytest.mark.parametrize("name", quick(["rotatekv", "mikv", "gear"], 0))
def test_a_step_that_fails_leaves_the_cache_as_it_was(model, name: str, monkeypatch) -> None:
    """Whether before, in, or after the model's work."""
    recipe = recipe_of(name, model)
    cache = fivefold.compress(model, recipe, cuda_graph=True)
    with torch.inference_mode():
        model(ids(1, 142, model.device), past_key_values=cache)
        token = ids(1, 1, model.device, 1)
        fork = cache.fork()
        wanted = model(token, past_key_values=fork).logits
        for owner, failing in ((Step, "_run"), (Session, "advance")):

            def fail(*args, **kwargs):
                raise Fault

            with monkeypatch.context() as patch:
                patch.setattr(owner, failing, fail)
                with pytest.raises(Fault):
                    model(token, past_key_values=cache)
            assert cache.get_seq_length() == 142
        assert torch.allclose(model(token, past_key_values=cache).logits, wanted, 1e-4, 1e-4)
    # What it broke off was the very first step: the next one is in fused kernels, and captured, all the same.
    (captured,) = cache.step.captured.values()
    assert captured.whole is not None and (captured.graph is not None) == GPU
