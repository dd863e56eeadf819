"""A model compiled by `torch.compile`: the tokens of the model as it is, from two graphs, however long a text gets."""

from __future__ import annotations

import copy
import shutil
import threading
import warnings
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

import families
import fivefold
from conftest import KERNELS, build, quick
from faults import Fault, Faults
from fivefold.errors import FivefoldError
from recipes import KIVI, RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")
VOCAB = families.VOCABULARY


@pytest.fixture(autouse=True)
def fresh(request):
    """Nothing is compiled yet, but for the tests that share a compiled model."""
    if "pair" not in request.fixturenames:
        torch._dynamo.reset()
    counters.clear()


def ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def text(model: Any, cache: Any, prompt: torch.Tensor, steps: int, **given: Any) -> list[Any]:
    """Greedy tokens after a prompt."""
    out = []
    with torch.inference_mode():
        logits = model(prompt, past_key_values=cache, **given).logits
        for _ in range(steps):
            token = logits[:, -1:].argmax(-1)
            out.append(token.flatten().tolist())
            logits = model(token, past_key_values=cache).logits
    return out


@pytest.mark.parametrize("way", quick(["torch.compile(model)", "model.compile", "model.forward", "before"], 1))
def test_two_graphs_for_all_texts(tiny, way: str) -> None:
    """Prompts of any length, more steps than any limit, a second turn, and packed groups on the way."""
    model, counter = copy.deepcopy(tiny(**SHAPE)), CompileCounter()
    wanted = [text(model, fivefold.compress(model, KIVI), ids(n), 45) for n in (70, 33)]
    if way == "before":
        fivefold.restore(model)
    called = model
    if way == "model.compile":
        model.compile(backend=counter)
    elif way == "torch.compile(model)":
        called = torch.compile(model, backend=counter)
    else:
        model.forward = torch.compile(model.forward, backend=counter)
    caches = [fivefold.compress(model, KIVI) for _ in range(2)]
    assert [text(called, cache, ids(n), 45) for cache, n in zip(caches, (70, 33))] == wanted
    assert counter.frame_count == 2
    assert not counters["graph_break"] or way == "before"
    with torch.inference_mode():
        out = called(ids(9), past_key_values=caches[0])
    assert out.past_key_values is caches[0] and caches[0].get_seq_length() == 70 + 45 + 9
    assert counter.frame_count == 2


@pytest.fixture(scope="module")
def pair():
    """A model, and itself compiled, for all recipes."""
    torch._dynamo.reset()
    model, counter = build(**SHAPE), CompileCounter()
    yield model, torch.compile(model, backend=counter), counter
    fivefold.restore(model)
    torch._dynamo.reset()


# What a graph can depend on: packed pages, inputs and positions of layers, policies, picks.
FIRST = ("kivi2", "tidal")


@pytest.mark.parametrize("name", quick([*FIRST, *(name for name in RECIPES if name not in FIRST)], len(FIRST)))
def test_every_recipe(pair, name: str) -> None:
    model, compiled, counter = pair
    recipe, before = written(name, model), counter.frame_count
    wanted = text(model, fivefold.compress(model, recipe), ids(70), 36)
    assert text(compiled, fivefold.compress(model, recipe), ids(70), 36) == wanted
    assert counter.frame_count <= before + 2


@pytest.mark.slow
@pytest.mark.parametrize("family", (["gpt_oss", "gemma2", "opt", "gemma3n_text", "lfm2", "mixtral"]))
@pytest.mark.parametrize("sliding", [True, False])
def test_families(family: str, sliding: bool) -> None:
    """Softcaps, sinks, windows of ours and of transformers', keys that layers share, experts."""
    model, counter = families.build(family), CompileCounter()
    wanted = text(model, fivefold.compress(model, KIVI, sliding=sliding), ids(40), 12)
    compiled = torch.compile(model, backend=counter)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert text(compiled, fivefold.compress(model, KIVI, sliding=sliding), ids(40), 12) == wanted
    said = [str(one.message) for one in found if "torch.compile" in str(one.message)]
    if family in ("gemma3n_text", "lfm2"):  # layers that stay transformers' own, and are not plainly windows
        assert counter.frame_count == 0 and len(said) == 1
    else:
        assert not said
        assert counter.frame_count == 2 and not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("padded", [True, False])
def test_generate(tiny, padded: bool) -> None:
    model, counter = copy.deepcopy(tiny(**SHAPE)), CompileCounter()
    given = {"max_new_tokens": 40, "do_sample": False, "input_ids": ids(50, 2)}
    mask = torch.ones(2, 50, dtype=torch.long)
    if padded:
        mask[0, :13] = 0
    given["attention_mask"] = mask
    wanted = model.generate(**given, past_key_values=fivefold.compress(model, KIVI), pad_token_id=0)
    model.forward = torch.compile(model.forward, backend=counter)
    found = model.generate(**given, past_key_values=fivefold.compress(model, KIVI), pad_token_id=0)
    assert torch.equal(found, wanted) and counter.frame_count == 2


@pytest.mark.slow
def test_padding_without_positions(tiny) -> None:
    model, counter = tiny(**SHAPE), CompileCounter()
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :7] = 0

    def tokens(called: Any) -> list[Any]:
        cache, out = fivefold.compress(model, KIVI), []
        with torch.inference_mode():
            logits = called(ids(20, 2), past_key_values=cache, attention_mask=mask).logits
            for step in range(1, 30):
                token = logits[:, -1:].argmax(-1)
                out.append(token.flatten().tolist())
                seen = torch.cat([mask, torch.ones(2, step, dtype=torch.long)], 1)
                logits = called(token, past_key_values=cache, attention_mask=seen).logits
        return out

    wanted = tokens(model)
    assert tokens(torch.compile(model, backend=counter)) == wanted and counter.frame_count == 2


@pytest.mark.slow
def test_steps_from_fixed_tables(tiny, monkeypatch) -> None:
    """What `cuda_graph=True` runs is the compiled model, where it is not fused kernels; on a CPU in Triton's
    interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    model, counter = tiny(**SHAPE), CompileCounter()
    wanted = text(model, fivefold.compress(model, "full()", cuda_graph=True), ids(6), 2)
    cache = fivefold.compress(model, "full()", cuda_graph=True)
    cache.step.fuses = False
    assert text(torch.compile(model, backend=counter), cache, ids(6), 2) == wanted
    assert cache.step.replays == 2 and cache.step.failed is None and counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_leaves_the_cache_as_it_was(tiny, at: int) -> None:
    """In the store, within the operation that is in the graph."""
    model, raised = tiny(**SHAPE), 0
    compiled = torch.compile(model, backend="eager")
    caches = [fivefold.compress(model, KIVI) for _ in range(2)]
    for cache in caches:
        text(compiled, cache, ids(60), 2)
    for step in range(90):
        given = ids(1 if step % 9 else 5, seed=step)
        with torch.inference_mode():
            try:
                with Faults(at):
                    logits = compiled(given, past_key_values=caches[0]).logits
            except Fault:
                raised += 1
                logits = compiled(given, past_key_values=caches[0]).logits
            assert torch.equal(logits, compiled(given, past_key_values=caches[1]).logits)
    assert raised > 3


@pytest.mark.slow
def test_a_failure_behind_the_last_layer(tiny) -> None:
    model = copy.deepcopy(tiny(**SHAPE))
    caches = [fivefold.compress(model, KIVI) for _ in range(2)]
    text(model, caches[1], ids(60), 2)
    fails = [False]

    @torch.compiler.disable
    def fail(*_: Any) -> None:
        if fails[0]:
            raise Fault("here")

    model.lm_head.register_forward_hook(fail)
    compiled = torch.compile(model, backend="eager")
    text(compiled, caches[0], ids(60), 2)
    with torch.inference_mode():
        for step in range(3):
            fails[0] = True
            with pytest.raises(Fault):
                compiled(ids(1, seed=step), past_key_values=caches[0])
            fails[0] = False
            found, wanted = (f(ids(1, seed=step), past_key_values=c).logits for f, c in zip((compiled, model), caches))
            assert torch.allclose(found, wanted, atol=1e-5)


def test_what_is_refused_is_refused_alike(tiny) -> None:
    model = copy.deepcopy(tiny(**SHAPE))
    cache, compiled = fivefold.compress(model, KIVI), torch.compile(model, backend="eager")
    said = []
    for called in (model, compiled):
        for given in ({}, {"attention_mask": torch.ones(1, 1, 9, 9)}, {"attention_mask": torch.ones(1, 4)}):
            with torch.set_grad_enabled(not given), pytest.raises(FivefoldError) as found:
                called(ids(9), past_key_values=cache, **given)
            said.append(str(found.value))
    assert said[:3] == said[3:] and cache.get_seq_length() == 0


@pytest.mark.slow
def test_other_caches_of_a_model_that_was_prepared(tiny) -> None:
    """The compiled model with transformers' cache, before and after; one graph of all, without a break."""
    model, counter = copy.deepcopy(tiny(**SHAPE)), CompileCounter()
    with torch.inference_mode():
        wanted = model(ids(30), use_cache=False).logits
        cache = fivefold.compress(model, KIVI)
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        assert torch.allclose(compiled(ids(30), use_cache=False).logits, wanted, atol=1e-5)
        compiled(ids(9), past_key_values=cache)
        assert torch.allclose(compiled(ids(30), use_cache=False).logits, wanted, atol=1e-5)
    assert counter.frame_count == 2 and cache.get_seq_length() == 9


@pytest.mark.slow
def test_the_base_model_alone(tiny) -> None:
    """Compiled within a model that is not: it runs in the transaction that was begun outside."""
    model, counter = copy.deepcopy(tiny(**SHAPE)), CompileCounter()
    wanted = text(model, fivefold.compress(model, KIVI), ids(40), 10)
    model.model.compile(backend=counter)
    assert text(model, fivefold.compress(model, KIVI), ids(40), 10) == wanted
    assert counter.frame_count == 2


@pytest.mark.slow
def test_two_threads(tiny) -> None:
    """Each with a cache of its own, and a model of its own code."""
    model = tiny(**SHAPE)
    wanted = [text(model, fivefold.compress(model, KIVI), ids(n), 20) for n in (40, 50)]
    compiled, found = torch.compile(model, backend="eager"), [None, None]
    text(compiled, fivefold.compress(model, KIVI), ids(9), 2)

    def run(number: int) -> None:
        found[number] = text(compiled, fivefold.compress(model, KIVI), ids((40, 50)[number]), 20)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_inductor(tiny) -> None:
    model = copy.deepcopy(tiny(**SHAPE))
    wanted = [text(model, fivefold.compress(model, KIVI), ids(n), 40) for n in (70, 33)]
    compiled = torch.compile(model)
    assert [text(compiled, fivefold.compress(model, KIVI), ids(n), 40) for n in (70, 33)] == wanted
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_graphs_of_the_compiler(tiny) -> None:
    """One graph of a whole step cannot hold those that the compiler makes of its parts: one warning says so."""
    model = copy.deepcopy(tiny(**SHAPE))
    wanted = text(model, fivefold.compress(model, KIVI), ids(40), 5)
    compiled, cache = torch.compile(model, mode="reduce-overhead"), fivefold.compress(model, KIVI, cuda_graph=True)
    with pytest.warns(UserWarning, match="makes graphs of its own") as found:
        assert text(compiled, cache, ids(40), 5) == wanted
    assert sum("makes graphs of its own" in str(one.message) for one in found) == 1
