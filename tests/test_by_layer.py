"""Parameters with a value for each layer: what they say, what is refused, and what each layer then holds."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conftest import VOCAB
from fivefold.errors import CacheStateError, RecipeError
from fivefold.methods import find, registered
from fivefold.plan.read import read_model
from fivefold.plan.room import Place, cache_bytes, cache_report
from fivefold.recipe import Recipe, describe
from fivefold.store import LayerSpec
from learned import learn

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = 3
CONTEXT = 300
# A codec: what is the same in all layers, what a layer's may be, and the list's name for an exact layer.
CODECS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "kivi": ("", [{"bits": 2, "residual": 0}, {"bits": 4, "residual": 32}, {"bits": 8, "residual": 64}]),
    "kivi sides": ("", [{"key_bits": 4, "group": 32}, {"key_bits": None, "group": 64}, {"key_bits": 8, "group": 32}]),
    "gear": ("", [{"bits": 2, "rank": 4}, {"bits": 4, "rank": 0}, {"bits": 4, "rank": 2}]),
    "mikv": ("floor=0", [{"low": 2, "high": 16}, {"low": 4, "high": 8}, {"low": 3, "high": 16}]),
    "rotatekv": ('profile="{}"', [{"bits": 2, "sinks": 4}, {"bits": 3, "sinks": 0}, {"bits": 4, "sinks": 2}]),
    "cskv": ('profile="{}"', [{"keep": 0.2, "bits": 16}, {"keep": 0.4, "bits": 4}, {"keep": 0.3, "bits": 8}]),
}  # fmt: skip


@pytest.fixture
def model(tiny: Any) -> Any:
    return tiny("llama", num_hidden_layers=LAYERS)


def recipe_of(name: str, given: list[dict[str, Any]], model: Any, folder: Path) -> str:
    """A recipe whose parameters are lists, or numbers where there is one set of them."""
    method, fixed = name.split()[0], CODECS[name][0]
    if "{}" in fixed:
        learn(model, f"{method}(keep=0.4)" if method == "cskv" else f"{method}()", folder, chunks=2)
        fixed = fixed.format(folder)
    each = {key: given[0][key] if len(given) == 1 else [one[key] for one in given] for key in given[0]}
    written = ", ".join(f"{key}={value}" for key, value in each.items())
    return f"{method}({written}{', ' * bool(fixed)}{fixed})"


def ids(tokens: int = CONTEXT, batch: int = 2) -> torch.Tensor:
    return torch.randint(1, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.inference_mode()
def run(model: Any, recipe: str, steps: int = 5) -> tuple[Any, torch.Tensor]:
    """A cache that has read and decoded, and the logits on the way."""
    cache = fivefold.compress(model, recipe)
    text = ids(CONTEXT + steps)
    out = [model(text[:, :CONTEXT], past_key_values=cache).logits[:, -1]]
    out += [model(text[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in range(CONTEXT, CONTEXT + steps)]
    return cache, torch.stack(out)


def held(cache: Any, layer: int) -> list[torch.Tensor]:
    """All that a layer holds: the fields of its packed pages, and what is exact."""
    out = []
    for group in cache.session.stores[layer].groups:
        if group.packed.shape[1]:
            out += [x.clone() for x in group.packed_fields(0, group.packed.shape[1]).values()]
        out += [x.clone() for name in ("keys", "values") for x in group.exact_parts(name)]
    return out


@pytest.mark.parametrize("name", CODECS)
def test_a_list_of_equal_values_is_that_value_to_the_bit(model: Any, name: str, tmp_path: Path) -> None:
    one = CODECS[name][1][:1]
    (first, wanted), (second, got) = (run(model, recipe_of(name, one * n, model, tmp_path)) for n in (1, LAYERS))
    assert torch.equal(got, wanted)
    told = [{**cache.report().as_dict(), "recipe": "", "process": 0} for cache in (first, second)]
    assert told[0] == told[1]
    assert len(first.session.banks) == len(second.session.banks) == 1


@pytest.mark.parametrize("name", CODECS)
@torch.inference_mode()
def test_each_layer_holds_what_its_own_recipe_would(model: Any, name: str, tmp_path: Path) -> None:
    """A prompt in one chunk attends to exact keys: then each layer is given the same ones whatever others hold."""
    given = CODECS[name][1]
    mixed = fivefold.compress(model, recipe_of(name, given, model, tmp_path))
    model(ids(), past_key_values=mixed)
    formats = set()
    for layer, one in enumerate(given):
        alone = fivefold.compress(model, recipe_of(name, [one], model, tmp_path))
        model(ids(), past_key_values=alone)
        got, wanted = held(mixed, layer), held(alone, layer)
        assert len(got) == len(wanted) >= 4 and all(torch.equal(*pair) for pair in zip(got, wanted))
        formats.add(mixed.session.stores[layer].format)
    assert len(formats) == len(mixed.session.banks) == LAYERS


@torch.inference_mode()
def test_positions_reach_layers_that_want_them_behind_an_exact_one(model: Any, tmp_path: Path) -> None:
    profile = learn(model, "rotatekv()", tmp_path, chunks=2)
    mixed, alone = (
        fivefold.compress(model, f'rotatekv(bits={bits}, profile="{profile}")') for bits in ("[16, 3, 4]", "3")
    )
    places = torch.arange(7, 7 + CONTEXT + 1).expand(2, -1)
    for cache in (mixed, alone):
        model(ids(), past_key_values=cache, position_ids=places[:, :CONTEXT])
    assert len(held(mixed, 1)) > 4
    assert all(torch.equal(*pair) for pair in zip(held(mixed, 1), held(alone, 1), strict=True))
    for cache in (mixed, alone):
        model(ids(1), past_key_values=cache, position_ids=places[:, CONTEXT:])
        assert cache.session.stores[1].offsets.tolist() == [7] * 4
        with pytest.raises(CacheStateError, match="is next"):
            model(ids(1), past_key_values=cache, position_ids=places[:, :1])


@pytest.mark.parametrize(
    "recipe", ["kivi(bits=[16, 2, 16])", "mikv(low=[16, 4, 2], floor=0)", "gear(bits=[16, 4, 16])"]
)
def test_sixteen_bits_leave_a_layer_exact(model: Any, recipe: str) -> None:
    cache, _ = run(model, recipe)
    full, _ = run(model, "full()")
    store, exact = cache.session.stores[0], full.session.stores[0]
    assert store.codec is None and store.policy is None and store.format[1:] == exact.format[1:]
    # The first layer's keys do not depend on any cache.
    assert all(torch.equal(*pair) for pair in zip(held(cache, 0), held(full, 0)))
    assert cache.session.stores[1].codec is not None


def test_layers_that_are_all_exact_are_the_exact_cache(model: Any) -> None:
    assert torch.equal(run(model, "kivi(bits=[16, 16, 16])")[1], run(model, "full()")[1])


@pytest.mark.parametrize("method", ["snapkv", "h2o", "keyformer", "d2o", "elastic", "random"])
def test_tokens_by_layer(model: Any, method: str) -> None:
    recipe = Recipe.parse(f"{method}(keep=[0.2, 0.6, 1.0])")
    assert recipe.chooser is not None
    cache, _ = run(model, str(recipe), 1)
    counts = [max(int(group.bounds.stored_tokens) for group in store.groups) for store in cache.session.stores.values()]
    assert counts[0] < counts[1] <= 0.9 * CONTEXT and counts[2] == CONTEXT + 1


def test_windows_by_layer(model: Any) -> None:
    cache, _ = run(model, "duo(retrieval=[[0, 1]], sink=[4, 0, 8], recent=[40, 64, 100])")
    held = [[(one.sink, one.recent) for one in store.extents] for store in cache.session.stores.values()]
    assert held == [[(4, 40), (0, None)], [(0, 64), (0, 64)], [(8, 100), (8, 100)]]


@pytest.mark.parametrize("recipe", ["kivi(bits=[4, 2, 4], residual=[0, 32, 0])", "kivi(bits=[16, 4, 3], residual=0)"])
def test_kernels_step_through_layers_of_several_kinds(model: Any, recipe: str, monkeypatch: Any) -> None:
    cache, got = run(model, recipe, 40)
    assert set(cache.session.why_not_fused().values()) == {None} and len(cache.session.banks) > 1
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    # A number that lies between two codes may get the other one, as with the same bits in all layers.
    wanted = run(model, recipe, 40)[1]
    assert (got - wanted).norm() < 0.02 * wanted.norm() and (got - wanted).abs().median() < 1e-3


def test_saved_and_loaded(model: Any, tmp_path: Path) -> None:
    recipe = "duo(retrieval=[[0, 1]], sink=4, recent=[40, 64, 100]) + kivi(bits=[4, 16, 2], residual=[0, 128, 32])"
    cache, _ = run(model, recipe)
    cache.save(tmp_path / "saved")
    found = fivefold.load_cache(model, tmp_path / "saved")
    assert found.recipe == cache.recipe and str(found.recipe) == recipe
    token = torch.tensor([[5], [7]])
    with torch.inference_mode():
        assert torch.equal(*(model(token, past_key_values=one).logits for one in (cache, found)))


@pytest.mark.parametrize("recipe", ["kivi(bits=[4, 16, 2])", "duo(retrieval=[], recent=[32, 64, 64]) + kivi()"])
def test_a_plan_knows_that_layers_differ(model: Any, recipe: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))
    place = Place(read_model(str(tmp_path)), None)  # type: ignore[arg-type]
    for users in (1, 3):
        whole = cache_report(Recipe.parse(recipe), place, 2_000, users).total
        assert cache_bytes(Recipe.parse(recipe), place, 2_000, users) == pytest.approx(whole, rel=0.002)


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (
            "kivi(bits=[4, 5, 4])",
            r"kivi\(bits=5\) in layer 1 is not possible: use one of 2, 3, 4, 8, or 16 for a layer",
        ),
        ("kivi(bits=16)", "use one of 2, 3, 4, 8."),
        ("kivi(bits=[])", "is empty: give one value for each layer"),
        ("kivi(bits=[2, 2], residual=[0, 0, 0])", "2 values of bits and 3 values of residual"),
        ("kivi(residual=[0, -1])", r"kivi\(residual=-1\) in layer 1 is out of range: use at least 0"),
        ("rotatekv(bits=[2, 2.5])", "in layer 1 is not possible: bits must be a whole number"),
        ("kivi(bits=[[2]])", "in layer 0 is not possible"),
        ("kivi(unbias=[True, False])", "unbias must be True or False"),
        ("cskv(keep=[0.2, 2])", r"cskv\(keep=2.0\) in layer 1 is out of range: use 0.01 to 1"),
    ],
)
def test_what_is_refused(recipe: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.parse(recipe)


def test_as_many_values_as_the_model_has_layers(model: Any) -> None:
    with pytest.raises(
        RecipeError, match=r"kivi\(bits=...\) has 2 values and the model 3 layers: give one value for each"
    ):
        fivefold.compress(model, "kivi(bits=[4, 2])")


def test_printed_and_read_again() -> None:
    for text in (
        "kivi(bits=[4, 2, 16])", "mikv(important=[0.1, 0.2], low=[4, 16])", "kivi(key_bits=[None, 4, 8])",
        "duo(retrieval=[[0, 1]], sink=[4, 8], recent=[32, 64]) + rotatekv(bits=[2, 16], clip=[None, 0.9])",
    ):  # fmt: skip
        recipe = Recipe.parse(text)
        assert str(recipe) == text and Recipe.parse(str(recipe)) == recipe and hash(recipe) == hash(Recipe.parse(text))
    assert Recipe.parse("kivi(bits=[2, 2])") != Recipe.parse("kivi(bits=2)")


def test_methods_are_asked_in_a_layer_with_numbers() -> None:
    spec = LayerSpec(1, 3, 2, 4, 64, torch.float32, torch.device("cpu"))
    one = Recipe.parse("kivi(bits=[2, 4, 16], residual=[0, 32, 64])")
    assert one.of_layer(spec) == Recipe.parse("kivi(bits=4, residual=32)")
    assert one.of_layer(replace(spec, layer=2)) == Recipe()
    plain = Recipe.parse("kivi() + streaming()")
    assert plain.of_layer(spec) is plain


def test_the_list_of_recipes_says_which() -> None:
    rows = {(row["name"], part["name"]): part for row in describe() for part in row["parameters"]}
    assert rows["kivi", "bits"]["by_layer"] and rows["kivi", "bits"]["exact"] == 16
    assert not rows["kivi", "unbias"]["by_layer"]
    for name in registered():
        for part in fields(find(name)):  # type: ignore[arg-type]
            assert rows[name, part.name]["by_layer"] == bool(part.metadata["by_layer"])
