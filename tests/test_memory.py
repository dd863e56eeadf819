"""No kernel reads or writes what is nobody's, and what a captured step reads stays where it is.

In Triton's interpreter, where places out of range are read in silence, unless somebody looks (`memory.py`). On a GPU
`scripts/memcheck.py` does it with compute-sanitizer.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import fivefold
from conftest import VOCAB, quick
from fivefold.kernels import device
from memory import captured, checked, gone
from recipes import RECIPES, SHAPE, folders, written

pytest.importorskip("triton", reason="needs Triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU here"),
]
PROMPT, SLOW = 150, pytest.mark.slow
DUO = "duo(retrieval=[[0, 0], [0, 1], [1, 0]], sink=4, recent=90)"
# A layer without windows, one with a window beside a head without, and one of windows alone; all in one bank.
MIXED = {
    "rotatekv": f'{DUO} + rotatekv(bits=4, residual=16, profile="{{rotatekv}}")',
    "kivi": f"{DUO} + kivi(bits=4, residual=32)",
    "rotatekv-alone": f'{DUO} + rotatekv(bits=2, residual=16, head_group=1, profile="{{rotatekv}}")',
    "cskv": f'{DUO} + cskv(keep=0.3, profile="{{cskv}}")',
    "kv_heads": f'{DUO} + kv_heads(keep=0.5, profile="{{kv_heads}}")',
    "kv_heads-group": f'{DUO} + kv_heads(keep=0.3, group=1, bits=8, profile="{{kv_heads}}")',
    "gear": f"{DUO} + gear(bits=4)",
    "mikv-high8": f"{DUO} + mikv(high=8, floor=0)",
    "tidal": f"{DUO} + tidal(top=32, full_layers=0, select_layers=[0]) + kivi(bits=4, residual=32)",
}


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def read(model: Any, recipe: str, graph: bool = False) -> tuple[Any, torch.Tensor]:
    """A cache that has read two texts of different lengths, in plain PyTorch, and the mask of a step behind them."""
    cache = fivefold.compress(model, recipe, cuda_graph=graph)
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :37] = 0
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setenv("FIVEFOLD_KERNELS", "reference")
        model(ids(2, PROMPT), attention_mask=mask, past_key_values=cache)
    return cache, torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning")
@pytest.mark.parametrize("name", quick(MIXED, 1))
def test_heads_with_windows_beside_others(name: str, tiny: Any, monkeypatch: Any) -> None:
    """Layers of one bank are a kernel's or not each for itself, whatever the first of them is."""
    model = tiny("llama", num_hidden_layers=3)
    cache, mask = read(model, folders(MIXED[name], model))
    other = cache.fork()
    with torch.inference_mode():
        monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
        with checked(cache) as ran:
            found = model(ids(2, 1, 1), attention_mask=mask, past_key_values=cache).logits
        assert ran
        monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
        wanted = model(ids(2, 1, 1), attention_mask=mask, past_key_values=other).logits
    assert (found - wanted).norm() < 0.04 * wanted.norm()


@pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning")
@pytest.mark.parametrize(
    "name",
    [name if name == "anchors" else pytest.param(name, marks=SLOW) for name in (*RECIPES, "duo+rotatekv", "duo+cskv")],
)
def test_what_kernels_touch_is_there_and_stays(name: str, tiny: Any, monkeypatch: Any) -> None:
    """A graph is replayed long after the step that it was captured from: with all that this one read and did not make.
    What the process shares may be forgotten meanwhile."""
    model = tiny(**SHAPE)
    recipe = written(name, model) if name in RECIPES else f"{DUO} + {written(name[4:], model)}"
    cache, mask = read(model, recipe, graph=True)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
    with torch.inference_mode():
        with checked(cache) as ran, captured(cache.step) as found:
            model(ids(2, 1, 1), attention_mask=mask, past_key_values=cache)
        if cache.step.failed:
            assert not found
            return
        before = dict(cache.step.captured)
        assert ran and found and before
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        model(ids(2, 1, 2), attention_mask=mask, past_key_values=cache)
    assert cache.step.captured == before and cache.step.replays == 2
    assert not gone(found)


def test_an_allocator_that_the_user_set_up_is_left_alone(monkeypatch) -> None:
    """Memory is mapped page by page from the first cache on a GPU on, unless the environment has a say."""
    asked: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", asked.append, raising=False)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "native")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in device.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    gpu, wanted = torch.device("cuda", 0), ["expandable_segments:True"]
    device._let_memory_grow.cache_clear()
    device.let_memory_grow(torch.device("cpu"))
    for name in device.SETTINGS:
        with monkeypatch.context() as patch:
            patch.setenv(name, "garbage_collection_threshold:0.9")
            device.let_memory_grow(gpu)
    assert not asked
    for _ in range(2):
        device.let_memory_grow(gpu)
    assert asked == wanted
    device._let_memory_grow.cache_clear()
