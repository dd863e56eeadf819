"""No kernel reads or writes what is nobody's, and what a captured step reads stays where it is.

In Triton's interpreter, where places out of range are read in silence, unless somebody looks (`memory.py`). On a GPU
`scripts/memcheck.sh` does it with compute-sanitizer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fivefold
from conftest import VOCAB, quick
from memory import captured, checked, gone
from recipes import RECIPES, SHAPE, _profile, written

pytest.importorskip("triton", reason="needs Triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU here"),
]
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
    "tidal": f"{DUO} + tidal(top=32, full_layers=0, select_layers=[0]) + kivi(bits=4, residual=32)",
}


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stepped(
    model: Any, recipe: str, steps: int, monkeypatch: Any, graph: bool = True, prompt: int = 150
) -> tuple[torch.Tensor, Any]:
    """Logits of steps of two texts of different lengths, every access looked at, and the cache."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
    cache = fivefold.compress(model, recipe, cuda_graph=graph)
    mask = torch.ones(2, prompt, dtype=torch.long)
    mask[0, :37] = 0
    tokens = ids(2, steps, 1)
    with torch.inference_mode():
        with pytest.MonkeyPatch.context() as patch:  # that is not what is looked at here, and slow
            patch.setenv("FIVEFOLD_KERNELS", "reference")
            model(ids(2, prompt), attention_mask=mask, past_key_values=cache)
        out = []
        for step in range(steps):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            with checked(cache) as ran:
                out.append(model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits)
            assert ran or graph
    return torch.cat(out, 1), cache


@pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning")
@pytest.mark.parametrize("name", quick(MIXED, 2))
def test_heads_with_windows_beside_others(name: str, tiny: Any, monkeypatch: Any) -> None:
    """Layers of one bank are a kernel's or not each for itself, whatever the first of them is."""
    model = tiny("llama", num_hidden_layers=3)
    recipe = MIXED[name]
    for method in ("rotatekv", "cskv", "kv_heads"):
        if f"{{{method}}}" in recipe:
            recipe = recipe.replace(f"{{{method}}}", _profile(method, model))
    found, _ = stepped(model, recipe, 1, monkeypatch, graph=False)
    fivefold.restore(model)
    if "tidal" in recipe:
        return  # there a head that is no kernel's does not know what a kernel has picked, and reads everything
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    cache = fivefold.compress(model, recipe)
    mask = torch.ones(2, 150, dtype=torch.long)
    mask[0, :37] = 0
    wanted = []
    with torch.inference_mode():
        model(ids(2, 150), attention_mask=mask, past_key_values=cache)
        for token in ids(2, 1, 1).split(1, 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            wanted.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    whole = torch.cat(wanted, 1)
    assert (found - whole).norm() < 0.04 * whole.norm()


@pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning")
@pytest.mark.parametrize("name", quick(RECIPES, 0))
def test_no_kernel_touches_what_is_nobodys(name: str, tiny: Any, monkeypatch: Any) -> None:
    model = tiny(**SHAPE)
    stepped(model, written(name, model), 2, monkeypatch)


@pytest.mark.filterwarnings("ignore::fivefold.errors.SlowPathWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("anchors", "keyformer") else pytest.mark.slow) for name in RECIPES]
)
def test_what_a_captured_step_reads_stays(name: str, tiny: Any, monkeypatch: Any) -> None:
    """A graph is replayed long after the step that it was captured from: with all that this one read and did not make.
    What the process shares may be forgotten meanwhile."""
    model = tiny(**SHAPE)
    recipe = written(name, model)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    cache = fivefold.compress(model, recipe, cuda_graph=True)
    with torch.inference_mode():
        model(ids(2, 100), past_key_values=cache)
        monkeypatch.setenv("FIVEFOLD_KERNELS", "triton")
        with captured(cache.step) as found:
            model(ids(2, 1, 1), past_key_values=cache)
        if cache.step.failed:
            pytest.skip(f"no graph: {cache.step.failed}")
        before = dict(cache.step.captured)
        assert found and before
        model(ids(2, 1, 2), past_key_values=cache)
    assert cache.step.captured == before and cache.step.replays == 2
    assert not gone(found)
