"""`scripts/memcheck.py`: what it runs on a GPU is what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold

pytest.importorskip("triton", reason="needs Triton")
from fivefold.kernels.low_rank import Features
from fivefold.kernels.low_rank import cuda as features
from fivefold.kernels.packed_decode import cuda as packed
from fivefold.kernels.rotated_decode import Rotated
from fivefold.kernels.rotated_decode import cuda as rotated

pytestmark = pytest.mark.usefixtures("one_thread")
SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "memcheck.py"


@pytest.fixture(scope="module")
def script() -> Any:
    found = importlib.util.spec_from_file_location("memcheck", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_every_kernel_in_cuda_reads_some_recipe(script: Any, monkeypatch: Any) -> None:
    """All three sources, in the shape that they are for, with scores alone and without; and the recipes are right."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    kinds: dict[str, list[Any]] = {"rotated.cu": [], "features.cu": [], "packed.cu": []}
    names = [name for name in script.RECIPES if not name.startswith("duo")]
    model, recipes = script.of_shape("4x128", "bfloat16", 3, names)
    for recipe in recipes.values():
        cache = fivefold.compress(model, recipe)
        with torch.inference_mode():
            model(torch.ones(1, 40, dtype=torch.long), past_key_values=cache)
        codec = cache.session.stores[0].codec
        form = None if codec is None else codec.reader
        if isinstance(form, Rotated) and rotated.supports(form, 2, torch.bfloat16):
            kinds["rotated.cu"].append(form.bits)
        elif isinstance(form, Features) and features.fits(form):
            kinds["features.cu"].append((form.bits, features.scores_alone(form)))
        elif form is not None and packed.supports(form, 2):
            kinds["packed.cu"].append(type(form).__name__)
        cache.free()
        fivefold.restore(model)
    assert set(kinds["rotated.cu"]) == {2, 4}
    assert set(kinds["features.cu"]) == {(None, False), (4, False), (None, True)}
    assert set(kinds["packed.cu"]) == {"Form", "Planar"}
