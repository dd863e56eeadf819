"""Recipes: parsed safely, printed back, validated."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fivefold.errors import RecipeError
from fivefold.methods import SLOTS, find, registered
from fivefold.recipe import Recipe, build, describe
from fivefold.store import Extent, LayerSpec


@pytest.mark.parametrize(
    "text",
    [
        "full()",
        "kivi(bits=2)",
        "duo(keep=0.5) + kivi(bits=2)",
        "streaming(sink=4, recent=1020)",
        'duo(retrieval="a \\"quoted\\" folder", sink=8) + streaming() + kivi(bits=4, group=64)',
        "duo(retrieval=[[0, 1], [3, 2]]) + kivi(bits=3)",
    ],
)
def test_prints_back_to_the_same_text(text):
    recipe = Recipe.parse(text)
    assert str(recipe) == text
    assert Recipe.parse(str(recipe)) == recipe


def test_spelling_does_not_matter_to_equality():
    assert Recipe.parse("kivi(bits=2)+duo()") == Recipe.parse("duo( keep = 0.5 ) + kivi")
    assert Recipe.parse("full()") == Recipe()
    assert hash(Recipe.parse("kivi()")) == hash(Recipe.parse("kivi(bits=2)"))


def test_frozen_with_one_method_per_slot():
    recipe = Recipe.parse("kivi(bits=2) + duo(retrieval=[[0, 0]])")
    assert [method.slot for method in recipe.methods] == ["heads", "bits"]
    assert recipe.get("bits") == find("kivi")(bits=2)
    assert recipe.get("layers") is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.methods = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.get("bits").bits = 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("kivy(bits=2)", "did you mean 'kivi'"),
        ("KIVI(bits=2)", "did you mean 'kivi'"),
        ("nothing_like_it()", "known are full"),
        ("kivi(residual=2147483648)", "at most 2147483647"),
        ("kivi(bits={2, 4})", "fivefold sweep"),
        ("kivi(bits=5)", "2, 3, 4, 8"),
        ("kivi(bits=True)", "whole number"),
        ("kivi(bits=2.0)", "whole number"),
        ("kivi(bits='2')", "whole number"),
        ("kivi(residual=-1)", "at least 0"),
        ("kivi(bitz=2)", "has no parameter 'bitz'"),
        ("kivi(2)", "write key=value"),
        ("kivi(**{})", "write key=value"),
        ("streaming(recent=0)", "at least 1"),
        ("duo(keep=1.5)", "0 to 1"),
        ("duo(keep=1e999)", "must be a number"),
        ("duo(retrieval=[[0]])", "pairs"),
        ("duo(retrieval=[[0, -1]])", "pairs"),
        ("full(x=1)", "no parameters"),
        ("kivi() + kivi()", "slot 'bits'"),
        ("kivi(bits=2", "cannot read"),
        ("kivi() - duo()", "cannot read"),
        ("kivi()()", "cannot read"),
        ("__import__('os').system('true')", "cannot read"),
        ("kivi(bits=__import__('os'))", "no plain value"),
        ("kivi(bits=(1).__class__)", "no plain value"),
        ("kivi(bits=[x for x in (1,)])", "no plain value"),
        ("(" * 300 + ")" * 300, "cannot read"),
        ("kivi() + " * 5000 + "kivi()", "at most"),
        ("kivi(bits=2)\nimport os", "cannot read"),
        ("kivi(bits=\x002)", "cannot read"),
    ],
)
def test_bad_recipes_get_one_sentence(text, says):
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    assert says in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert len(str(caught.value).replace(text, "").splitlines()) <= 1


def test_what_is_no_text_is_told_so():
    for given_, says in ((4, "of type int"), (None, "of type NoneType"), (Recipe, "of type type")):
        with pytest.raises(RecipeError, match=says):
            Recipe.parse(given_)
    with pytest.raises(RecipeError, match=r"write Recipe\.parse\('kivi\(\)'\)"):
        Recipe("kivi()")


@given(st.text(max_size=60) | st.text(alphabet="kivduo(bits=2,)+ [].'\"_", max_size=40))
def test_any_text_is_a_recipe_or_a_recipe_error(text):
    try:
        recipe = Recipe.parse(text)
    except RecipeError:
        return
    assert Recipe.parse(str(recipe)) == recipe


def test_describe_lists_every_method_with_what_it_refuses():
    rows = {row["name"]: row for row in describe()}
    assert set(rows) == {"full", *registered()}
    for name, cls in registered().items():
        row = rows[name]
        assert row["slot"] == cls.slot and row["slot"] in SLOTS
        assert row["paper"] and row["summary"]
        assert {p["name"] for p in row["parameters"]} == {f.name for f in dataclasses.fields(cls)}
        assert all(p["help"] for p in row["parameters"])
        same_slot = {other for other, c in registered().items() if c.slot == cls.slot and other != name}
        assert same_slot <= {entry["method"] for entry in row["excludes"]}


def test_heads_and_tokens_meet():
    import torch

    spec = LayerSpec(1, 4, 3, 9, 64, torch.float32, torch.device("cpu"))
    recipe = Recipe.parse("duo(retrieval=[[1, 2]], sink=64, recent=256) + streaming(sink=4, recent=1020)")
    both = Extent(4, 256, 64, 1020)  # sinks that one of them gives up stay as long as the other one sees them
    assert recipe.extents(spec) == [both, both, Extent(4, 1020)]
    assert Recipe().extents(spec) == [Extent()] * 3
    with pytest.raises(RecipeError, match="names layer 9"):
        Recipe((build("duo", {"retrieval": [[9, 0]]}),)).extents(spec)
