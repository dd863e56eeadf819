"""Which way decoding steps go: what a cache says of it, when it warns, and what may wait for a device."""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import fivefold
from conftest import VOCAB
from fivefold.attention import decode
from fivefold.errors import CacheStateError, RecipeError
from fivefold.kernels import choice, compiled
from fivefold.kernels.packed_decode import cpu
from fivefold.store.transaction import Transaction
from recipes import BESIDE, RECIPES, SHAPE, folders, written

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def interpret(monkeypatch: Any) -> None:
    """Triton's kernels, in its interpreter."""
    pytest.importorskip("triton", reason="needs Triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the GPU here")
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")


def filled(model: Any, recipe: str, rows: int = 1, tokens: int = 80) -> Any:
    cache = fivefold.compress(model, recipe)
    with torch.inference_mode():
        model(ids(rows, tokens), past_key_values=cache)
    return cache


def test_large_numbers_stay_known_wherever_their_pages_go(tiny: Any, tmp_path: Path) -> None:
    """Or a kernel that cannot take them would read them: in another cache, from a file, from host memory."""
    model = tiny("llama", num_hidden_layers=2)
    cache = filled(model, "kivi(bits=4, residual=32)", 2)
    (bank,) = cache.session.banks
    assert 0 < bank.peak.max() < 750
    bank.note(np.array([bank.rows + 2]), np.array([2000.0], dtype=np.float32))  # layer 1, sequence 1
    cache.save(tmp_path)
    loaded = fivefold.load_cache(model, tmp_path)
    assert loaded.session.banks[0].peaks()[1] == 2000
    cache.offload()
    cache.restore()
    other = filled(model, "kivi(bits=4, residual=32)")
    other.join(cache)
    assert other.session.banks[0].peaks()[0] < 750 and other.session.banks[0].peaks()[1] == 2000
    gone = other.take([2])
    assert gone.session.banks[0].peaks()[1] == 2000
    assert other.session.banks[0].peaks().max() < 750


class Seen(torch.Tensor):
    """A tensor that stands for one of a device, as all that is made of it: who looks at its numbers would wait."""

    looks: ClassVar[list[str]] = []
    free = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
            # Keys and values have come of positions, too: on a CPU they are looked at, and on a GPU they are not.
            with torch._C.DisableTorchFunctionSubclass():
                cls.looks += [] if cls.free or args[0].is_floating_point() else [name]
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def seen(monkeypatch: Any) -> Iterator[type[Seen]]:
    """`Seen`, whose numbers may be looked at where a transaction is about to be committed."""
    verify = Transaction.verify

    def free(self: Transaction) -> None:
        Seen.free = True
        try:
            verify(self)
        finally:
            Seen.free = False

    monkeypatch.setattr(Transaction, "verify", free)
    Seen.looks = []
    yield Seen


def padded(rows: int, tokens: int, pads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and a mask, of which the first `pads` of the first sequence are padding."""
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, :pads] = 0
    return ids(rows, tokens), mask


@pytest.mark.parametrize(
    ("name", "graph"),
    [pytest.param("full", True, marks=pytest.mark.slow), ("kivi4", False), ("rotatekv", False), ("tidal", False)],
)
def test_nobody_looks_at_the_mask_of_a_step(tiny: Any, monkeypatch: Any, seen: Any, name: str, graph: bool) -> None:
    if graph:
        interpret(monkeypatch)
    model = tiny(**SHAPE)
    cache = fivefold.compress(model, written(name, model), cuda_graph=graph)
    given, mask = padded(2, 40, 7)
    with torch.inference_mode():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(given, attention_mask=mask, position_ids=places, past_key_values=cache)
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            places = mask.sum(1, keepdim=True) - 1
            model(
                ids(2, 1, step), attention_mask=mask.as_subclass(Seen), position_ids=places.as_subclass(Seen),
                past_key_values=cache,
            )  # fmt: skip
    assert seen.looks == []
    assert cache.lengths().tolist() == [36, 43] and (not graph or cache.step.replays == 3)
    chunk = torch.cat([mask, mask.new_ones(2, 5)], 1).as_subclass(Seen)
    places = chunk.cumsum(1)[:, -5:] - 1
    with torch.inference_mode():
        model(ids(2, 5), attention_mask=chunk, position_ids=places, past_key_values=cache)
    assert seen.looks  # of a chunk of several it has to be known: this test can fail


@pytest.mark.parametrize(
    ("name", "graph"),
    [pytest.param("full", True, marks=pytest.mark.slow), ("kivi4", False), ("rotatekv", False), ("h2o", False)],
)
def test_a_step_that_is_padding_for_some(tiny: Any, monkeypatch: Any, name: str, graph: bool) -> None:
    """It is done once more, with a look at its mask: every sequence has the logits that it has alone."""
    model, steps = tiny(**SHAPE), [(1, 1), (0, 1), (1, 0), (1, 1)]
    recipe = written(name, model)
    alone = [fivefold.compress(model, recipe) for _ in range(2)]
    given, mask = padded(2, 40, 7)
    wanted: list[list[torch.Tensor]] = []
    with torch.inference_mode():
        for row, one in enumerate(alone):
            model(given[row : row + 1, (7, 0)[row] :], past_key_values=one)
            turns = [(ids(2, 1, step)[row : row + 1], there[row]) for step, there in enumerate(steps)]
            wanted.append([model(token, past_key_values=one).logits for token, there in turns if there])
        if graph:
            interpret(monkeypatch)
        cache = fivefold.compress(model, recipe, cuda_graph=graph)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        model(given, attention_mask=mask, position_ids=places, past_key_values=cache)
        for step, there in enumerate(steps):
            token = ids(2, 1, step)
            mask = torch.cat([mask, torch.tensor(there)[:, None]], 1)
            places = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
            out = model(token, attention_mask=mask, position_ids=places, past_key_values=cache).logits
            for row in np.flatnonzero(there):
                want = wanted[row].pop(0)[0]
                assert (out[row] - want).norm() < 1e-4 * want.norm(), (step, row)
        before = cache.lengths().tolist()
        assert before == [36, 43] and not any(wanted) and (not graph or cache.step.replays == 3)
        wrong = torch.cat([mask, mask.new_ones(2, 1)], 1)
        wrong[1, 5] = 0
        with pytest.raises(CacheStateError, match="masks may only grow"):
            model(token, attention_mask=wrong, past_key_values=cache)
        assert cache.lengths().tolist() == before
        if name == "rotatekv":
            with pytest.raises(CacheStateError, match="position 99 was given where"):
                mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
                model(token, attention_mask=mask, position_ids=places * 0 + 99, past_key_values=cache)


# -- what is said -----------------------------------------------------------------------------------------


def step(model: Any, cache: Any) -> None:
    with torch.inference_mode():
        model(ids(cache.batch, 1), past_key_values=cache)


@pytest.mark.parametrize("name", ["full", "kivi4", "h2o", "snapkv", "tidal", "streaming", "gear", "mikv", "minicache"])
def test_what_is_said_is_what_is_done(tiny: Any, monkeypatch: Any, name: str) -> None:
    """Kernels are called where a cache says so, and plain PyTorch where it says that."""
    if compiled.lacking() is not None:
        pytest.skip("needs a C++ compiler")
    model = tiny(**SHAPE)
    cache, done = filled(model, written(name, model)), set()

    def note(home: Any, function: str, what: str) -> None:
        before = getattr(home, function)
        monkeypatch.setattr(home, function, lambda *args, **kwargs: done.add(what) or before(*args, **kwargs))

    note(cpu, "decode", "kernels")
    for function in ("attend_exact", "attend_packed", "_attend_at_once"):
        note(decode, function, "plain")
    step(model, cache)
    said = cache.report().decoding
    signs = ("kernels", r"(^|; )C\+\+ kernels"), ("plain", "plain PyTorch")
    assert done == {word for word, sign in signs if re.search(sign, said)}, said
    assert f"decoding: {said}" in str(cache.report()) and cache.report().as_dict()["decoding"] == said


def test_a_machine_without_a_compiler_is_said_once(tiny: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(compiled, "lacking", lambda: "no C++ compiler is here")
    choice._choose.cache_clear()
    try:
        model = tiny(**SHAPE)
        with pytest.warns(fivefold.SlowPathWarning, match="2 of 2 layers decode by plain PyTorch: no C.. comp") as said:
            cache = filled(model, "kivi(bits=4)")
            for one in (cache, cache.fork(), cache.new()):
                one.warn()
            step(model, cache)
        assert len(said) == 1 and said[0].filename == __file__
        assert cache.report().decoding == "plain PyTorch in 2 of 2 layers (no C++ compiler is here)"
        monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")  # it was asked for: it is in the report
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            cache = filled(model, "kivi(bits=4)")
            step(model, cache)
        assert cache.decoding == "plain PyTorch in 2 of 2 layers (FIVEFOLD_KERNELS=reference)"
    finally:
        choice._choose.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("graph", [False, True])
def test_large_numbers_are_said_when_they_come_and_forgotten_when_they_go(
    tiny: Any, monkeypatch: Any, graph: bool
) -> None:
    interpret(monkeypatch)
    model = tiny(**SHAPE)
    fast = "Triton kernels in 2 of 2 layers (FIVEFOLD_KERNELS=triton)" + ", as a CUDA graph" * graph
    cache = fivefold.compress(model, "kivi(bits=4, residual=0)", cuda_graph=graph)
    with torch.inference_mode():
        model(ids(2, 40), past_key_values=cache)
    assert cache.decoding == fast
    (bank,) = cache.session.banks
    bank.note(np.array([bank.rows + 2]), np.array([2000.0], dtype=np.float32))  # layer 1, sequence 1
    match = "keys or values reach 2000, more than the kernels' 750"
    with pytest.warns(fivefold.SlowPathWarning, match=match) as said:
        step(model, cache)
        bank.note(np.array([bank.rows + 2]), np.array([3000.0], dtype=np.float32))
        step(model, cache)
    assert len(said) == 1 + graph
    slow = f"Triton kernels, token by token, in 1 of 2 layers ({match.replace('2000', '3000')})"
    assert slow in cache.decoding
    assert not graph or (cache.step.replays == 0 and cache.step.failed == match.replace("2000", "3000"))
    cache.drop([1])
    assert cache.decoding == fast
    step(model, cache)
    assert not graph or (cache.step.replays == 1 and cache.step.failed is None)


def test_calls_that_no_graph_knows_are_said_once(tiny: Any, monkeypatch: Any) -> None:
    interpret(monkeypatch)
    model = tiny(**SHAPE)
    cache = fivefold.compress(model, "full()", cuda_graph=True)
    with torch.no_grad():
        model(ids(1, 33), past_key_values=cache)
        with pytest.warns(fivefold.SlowPathWarning, match="without a CUDA graph: the call has output_hidden") as said:
            for _ in range(2):
                model(ids(1, 1), past_key_values=cache, output_hidden_states=True)
    assert len(said) == 1 and cache.step.replays == 0
    for weight in model.parameters():
        weight.requires_grad_(False)
    with pytest.warns(fivefold.SlowPathWarning, match="gradients are on"):
        model(ids(1, 1), past_key_values=cache)
    for weight in model.parameters():
        weight.requires_grad_(True)
    step(model, cache)
    assert cache.step.replays == 1 and cache.decoding.endswith("as a CUDA graph")


def test_slower_ways_of_reading_prompts_are_said(tiny: Any, monkeypatch: Any) -> None:
    interpret(monkeypatch)
    with pytest.warns(fivefold.SlowPathWarning, match="prompts are weighed in plain PyTorch in 3 of 3") as said:
        cache = fivefold.compress(tiny("phi3"), "h2o()")
    assert len(said) == 1 and "; prompts are weighed in plain PyTorch in 3 of 3 layers (head_dim 96" in cache.decoding
    assert "prompts" not in fivefold.compress(tiny(**SHAPE), "h2o()").decoding
    cache = fivefold.compress(tiny(**SHAPE), "duo(retrieval=[[0, 1]]) + kivi(bits=4)")
    assert "; prompts are read block by block under windows in 2 of 2 layers (FlashAttention t" in cache.decoding


def test_a_cache_says_its_way_in_every_state(tiny: Any, monkeypatch: Any) -> None:
    model = tiny(**SHAPE)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    said = "plain PyTorch in 2 of 2 layers (FIVEFOLD_KERNELS=reference)"
    empty = fivefold.compress(model, "kivi(bits=4)")
    cache = filled(model, "kivi(bits=4)")
    assert empty.report().decoding == cache.report().decoding == said
    cache.offload()
    assert cache.decoding == said
    cache.free()
    assert cache.report().decoding == said
    caches = [empty, cache, fivefold.compress(model, "kivi(bits=4)", cuda_graph=True)]
    monkeypatch.setenv("FIVEFOLD_KERNELS", "cuda")
    assert all("cannot run: " in one.report().decoding for one in caches)


@pytest.mark.parametrize("asked", ["triton", "cuda", "cpp", "fast"])
@pytest.mark.parametrize("graph", [False, True])
def test_kernels_that_no_device_here_can_run_are_refused_when_a_cache_is_made(
    asked: str, graph: bool, tiny: Any, monkeypatch: Any
) -> None:
    model, find = tiny(**SHAPE), importlib.util.find_spec
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    monkeypatch.setattr(choice.compiled, "lacking", lambda: "there is no compiler of C++")
    monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
    choice._choose.cache_clear()
    why = {"fast": "fast is none of ", "cpp": "there is no compiler of C"}.get(asked, "Triton is not installed")
    try:
        with pytest.raises(CacheStateError, match=f"cannot run: .*{why}.*FIVEFOLD_KERNELS=auto"):
            fivefold.compress(model, "kivi(bits=4)", cuda_graph=graph)
        # What another device of this machine has is not refused: the model may be moved there.
        monkeypatch.setattr(choice, "choose", lambda device: choice.Choice("reference", "", device.type == "cpu"))
        choice.check_asked(torch.device("cuda"))
    finally:
        choice._choose.cache_clear()


def test_layers_that_stay_transformers_own_are_named(tiny: Any) -> None:
    cache = fivefold.compress(tiny("gemma3_text"), "full()")
    assert cache.decoding.endswith("in 2 of 2 layers; 2 more, with a sliding window, are transformers' own")


CODECS = ("gear", "mikv", "mikv-high8", "rotatekv", "cskv", "kv_heads", "kv_heads-group")
CHOOSING = ("h2o", "snapkv", "keyformer", "d2o", "elastic", "random")
WITHOUT_KERNEL = {
    "what keyformer makes of a step's attention is not summed by a kernel":
        ["keyformer+kivi", "keyformer+gear", "keyformer+rotatekv"],
    "packed pages do not say where in the text the tokens that were chosen stand":
        [f"{name}+rotatekv" for name in CHOOSING if name != "keyformer"],
    "no kernel says what this codec's tokens receive":
        [f"{name}+{codec}" for name in CHOOSING for codec in CODECS[4:]],
    "no kernel picks of such pages":
        [f"{name}+{codec}" for name in ("tidal", "anchors") for codec in ("gear", *CODECS[3:])],
    "what is picked are tokens that are chosen":
        [f"{name}+{codec}" for name in ("tidal", "anchors") for codec in CODECS[1:3]],
    "no kernel reads this codec's pages": ["minicache+gear"],
}  # fmt: skip
"""Of all methods, and pairs of one with a codec: whose steps are plain PyTorch on a GPU, and why. May only shrink."""


@pytest.mark.filterwarnings("ignore::fivefold.SlowPathWarning")
def test_what_decodes_without_kernels_on_a_gpu_is_known(tiny: Any, monkeypatch: Any) -> None:
    interpret(monkeypatch)
    model, found = tiny(**SHAPE), dict[str, list[str]]()
    pairs = {f"{name}+{codec}": f"{RECIPES[name]} + {RECIPES[codec]}" for name in BESIDE for codec in CODECS}
    for name, recipe in {**RECIPES, **pairs}.items():
        try:
            cache = fivefold.compress(model, folders(recipe, model))
        except RecipeError:
            continue  # the two do not go together at all
        for why in {why for why in cache.session.why_not_fused().values() if why is not None}:
            found.setdefault(why, []).append(name)
        fivefold.restore(model)
    assert {why: sorted(names) for why, names in found.items()} == {
        why: sorted(names) for why, names in WITHOUT_KERNEL.items()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ["full", "kivi4", "streaming", "duo", "gear", "tidal", "anchors"])
def test_a_step_waits_for_no_gpu(tiny: Any, name: str, graph: bool) -> None:
    """Of a batch that is padded; while groups are packed, too."""
    model = copy.deepcopy(tiny(**SHAPE)).to("cuda", torch.bfloat16)
    recipe = written(name, tiny(**SHAPE))
    try:
        cache = fivefold.compress(model, recipe, cuda_graph=graph)
        given, mask = (x.to("cuda") for x in padded(2, 160, 37))
        masks = [torch.nn.functional.pad(mask, (0, steps), value=1) for steps in range(50)]
        tokens = ids(2, 50).to("cuda").split(1, 1)
        with torch.inference_mode():
            for step, mask in enumerate(masks):
                if step == 10:
                    torch.cuda.synchronize()
                    torch.cuda.set_sync_debug_mode("error")
                places = (mask.cumsum(1) - 1).clamp(min=0)
                last = places[:, -1:] if step else places
                model(tokens[step] if step else given, attention_mask=mask, position_ids=last, past_key_values=cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        fivefold.restore(model)
    assert cache.get_seq_length() == 209
    if graph and name in ("full", "kivi4", "streaming", "duo"):
        assert cache.step.replays == 49 and "as a CUDA graph" in cache.decoding
