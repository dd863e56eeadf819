"""One list of recipes that every shared test runs over: every method, and every pair with `kivi` that is legal.

    @pytest.mark.parametrize("name", RECIPES)
    def test_something(name, tiny):
        model = tiny(**SHAPE)
        cache = fivefold.compress(model, written(name, model))

`SHAPE` is the model that they are written for: two layers of two KV heads with 64 channels.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from fivefold.calibrate.profile import config_hash, signature
from learned import learn

SHAPE: dict[str, Any] = {"family": "llama", "num_hidden_layers": 2}
KIVI = "kivi(bits=4, residual=32)"
# What methods that learn from a model ask for stands in braces: `written` puts the folder of a profile there.
_ALONE = {
    "full": "full()",
    "kivi2": "kivi(bits=2)",
    "kivi3": "kivi(bits=3)",
    "kivi4": "kivi(bits=4)",
    "kivi8": "kivi(bits=8)",
    "kivi-residual": KIVI,
    "kivi-layers": "kivi(bits=[4, 2], residual=[32, 0], group=[32, 64])",
    "gear": "gear(bits=4)",
    "mikv": "mikv(floor=0)",
    "mikv-layers": "mikv(low=[16, 2], floor=0)",
    "mikv-high8": "mikv(high=8, floor=0)",
    "rotatekv": 'rotatekv(bits=4, profile="{rotatekv}")',
    "rotatekv-layers": 'rotatekv(bits=[3, 16], profile="{rotatekv}")',
    "cskv": 'cskv(keep=0.3, profile="{cskv}")',
    "kv_heads": 'kv_heads(keep=0.5, profile="{kv_heads}")',
    "kv_heads-group": 'kv_heads(keep=0.3, group=1, bits=8, profile="{kv_heads}")',
    "duo": "duo(retrieval=[[0, 1], [1, 0]], sink=4, recent=40)",
    "razor": 'razor(least=40, share=0.2, profile="{razor}")',
    "streaming": "streaming(sink=4, recent=100)",
    "h2o": "h2o(keep=0.5)",
    "snapkv": "snapkv(keep=0.5)",
    "keyformer": "keyformer(keep=0.5)",
    "d2o": "d2o(keep=0.5)",
    "elastic": "elastic(keep=0.5)",
    "random": "random(keep=0.5)",
    "tidal": "tidal(top=32, full_layers=0, select_layers=[0])",
    "anchors": 'anchors(top=32, anchors=1, recent=8, profile="{anchors}")',
    "drop": "drop(layers=[0])",
    "minicache": "minicache(start=0)",
}
# Methods of the slots layers, heads, tokens and reads: those that `kivi` may stand beside.
BESIDE = (
    "duo", "razor", "streaming", "h2o", "snapkv", "keyformer", "d2o", "elastic", "random", "tidal", "anchors", "drop",
    "minicache",
)  # fmt: skip
RECIPES: dict[str, str] = {**_ALONE, **{f"{name}+kivi": f"{_ALONE[name]} + {KIVI}" for name in BESIDE}}
"""The recipes by name, which is the id of a test."""

_QUICK = ("duo+kivi", "h2o+kivi", "anchors+kivi")
VARIANTS = frozenset(
    name for name in RECIPES if ("+" in name or "-" in name) and name not in (*_QUICK, "kivi-residual")
)
"""Pairs, and methods that are there with other parameters too: `conftest.py` leaves them to CI."""
PACKING = tuple(
    name
    for name, recipe in RECIPES.items()
    if any(codec in recipe for codec in ("kivi", "gear", "mikv", "rotate", "cskv", "kv_heads", "minicache"))
)
"""Those that pack tokens."""
CHOOSING = tuple(name for name in RECIPES if name.split("+")[0] in BESIDE[3:9])
"""Those that choose tokens one by one."""

_LEARNED = {
    "rotatekv": "rotatekv(bits=4)",
    "cskv": "cskv(keep=0.3)",
    "kv_heads": "kv_heads(keep=0.5)",
    "razor": "razor()",
    "anchors": "anchors(top=32, anchors=1, recent=8)",
}


def written(name: str, model: Any) -> str:
    """A recipe of the list as text for `model`, whose profile is made first where the recipe needs one."""
    return folders(RECIPES[name], model)


def folders(recipe: str, model: Any) -> str:
    """The same of a recipe that is written as those of the list."""
    for method in _LEARNED:
        place = f"{{{method}}}"
        if place in recipe:
            recipe = recipe.replace(place, _profile(method, model))
    return recipe


def _profile(method: str, model: Any) -> str:
    folder = Path(_folder().name) / f"{method}-{signature(model.config)}-{config_hash(model.config)[:16]}"
    if not (folder / "profile.json").is_file():
        learn(model, _LEARNED[method], folder, chunks=2)
    return str(folder)


@cache
def _folder() -> Any:
    """Where profiles are kept, until this process ends."""
    return tempfile.TemporaryDirectory(prefix="fivefold-profiles-")
