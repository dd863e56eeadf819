"""A budget shared out: the arithmetic against brute force, what is measured, bytes to the byte, and resumed runs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fivefold
from conftest import VOCAB, build
from fivefold.calibrate import learner, shares
from fivefold.calibrate.budget import CHUNK, FOLLOWING, TAIL, Sharing, lost
from fivefold.calibrate.profile import Profile, load_profile
from fivefold.calibrate.run import Stopped, calibrate
from fivefold.calibrate.shares import share_out
from fivefold.errors import ProfileError, RecipeError
from fivefold.models.huggingface import make_cache
from fivefold.plan import memory
from fivefold.plan.read import read_model
from fivefold.recipe import Recipe
from learned import learn

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE: dict[str, Any] = {"family": "llama", "num_hidden_layers": 2}
CONTEXT = 192
SHARES = (0.7, 0.22)
ASKED = f"budget(bytes={list(SHARES)}, context={CONTEXT}, length={CONTEXT}, recent=40, texts=2, tries=5)"


class Words:
    """A tokenizer of bytes below the vocabulary of the tiny models."""

    bos_token_id = eos_token_id = None

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoding", (), {"input_ids": [byte % VOCAB for byte in text.encode()]})


def text() -> str:
    pick = random.Random(3)
    words = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
    return " ".join(pick.choice(words) for _ in range(600))


def run(model: Any, out: Path, stop: Callable[[], bool] = lambda: False, asked: str = ASKED, seed: int = 0) -> Profile:
    return calibrate(model, Words(), asked, out, [text()], seed=seed, stop=stop)


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any) -> tuple[Any, Path, Profile]:
    """A tiny model, and what was shared out on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, out = build(**SHAPE), tmp_path_factory.mktemp("budget")
    profile = run(model, out)
    torch.set_num_threads(threads)
    return model, out, profile


# -- the arithmetic ---------------------------------------------------------------------------------------


def test_the_least_sum_within_a_budget() -> None:
    pick = random.Random(0)
    fits = 0
    for _ in range(300):
        items = [
            [(pick.randrange(30), pick.choice([pick.random(), 0.0, 0.5])) for _ in range(pick.randint(1, 4))]
            for _ in range(pick.randint(1, 5))
        ]
        budget = pick.randrange(0, 90)
        sums = [
            (sum(cost for _, cost in picks), sum(takes for takes, _ in picks)) for picks in itertools.product(*items)
        ]
        within = [cost for cost, takes in sums if takes <= budget]
        got = share_out(items, budget)
        assert (got is None) == (not within)
        if got is not None:
            chosen = [options[index] for options, index in zip(items, got, strict=True)]
            assert sum(takes for takes, _ in chosen) <= budget
            assert sum(cost for _, cost in chosen) == pytest.approx(min(within))
            fits += 1
    assert 100 < fits < 300


def test_a_large_budget_is_counted_in_units_and_never_passed(monkeypatch: Any) -> None:
    monkeypatch.setattr(shares, "UNITS", 50)
    pick = random.Random(1)
    for _ in range(200):
        items = [[(pick.randrange(10**6), pick.random()) for _ in range(4)] for _ in range(5)]
        got = share_out(items, 2 * 10**6)
        if got is not None:
            assert sum(options[index][0] for options, index in zip(items, got, strict=True)) <= 2 * 10**6
    assert share_out([[(3, 1.0)]], 2) is None and share_out([[(3, 1.0)]], -1) is None
    assert share_out([], 0) == []


# -- what is measured -------------------------------------------------------------------------------------


@torch.inference_mode()
def said(model: Any, recipe: str, ids: torch.Tensor, tail: torch.Tensor, chunk: int = CHUNK) -> torch.Tensor:
    cache = fivefold.compress(model, recipe)
    model(ids, past_key_values=cache)
    parts = [model(part, past_key_values=cache).logits[0] for part in tail.split(chunk, 1)]
    return torch.cat(parts).float().log_softmax(-1)


def sharing(model: Any, asked: str = ASKED) -> Sharing:
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    method: Any = Recipe.parse(asked).methods[0]
    return Sharing(method, learner.Subject(model, Words(), specs, [text()], 1, 0))


def test_costs_are_what_a_cache_loses(made: Any) -> None:
    """Bits: a prompt in one chunk is read exactly, so a cache that reads it itself loses the same."""
    model, _, profile = made
    work = sharing(model)
    assert work.items[: len(work.levels)] == [(0, 0), (0, 1), (0, 2)] and work.codec == "kivi"
    for layer, level, recipe in (
        (0, 0, "kivi(bits=[2, 16], residual=0)"),
        (1, 1, "kivi(bits=[16, 4], group=64, residual=0)"),
    ):
        short = [(ids, torch.cat([tail[:, :TAIL], tail[:, -TAIL:]], 1), 2 * TAIL) for ids, tail in work.texts]
        losses = [lost(said(model, "full()", *one), said(model, recipe, *one)) for one in short]
        got = profile.tensors["bits"][layer, level]
        assert float(got) == pytest.approx(sum(losses) / len(losses), rel=1e-3) and got > 1e-6
    assert bool((profile.tensors["windows"] > 1e-6).all()) and profile.tensors["windows"].shape == (2, 2)
    assert bool((profile.tensors["bits"].diff(dim=1) < 0).all())  # more bits cost less


def test_the_second_pass_keeps_the_best_recipe_by_what_it_loses_as_a_whole(made: Any) -> None:
    model, _, profile = made
    work = sharing(model)
    for share in SHARES:
        found = profile.settings["recipes"][repr(share)]
        losses = [lost(said(model, "full()", *one), said(model, found["recipe"], *one)) for one in work.texts]
        assert found["kl"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert profile.settings["recipes"]["0.7"]["kl"] <= profile.settings["recipes"]["0.22"]["kl"]


def test_the_tail_goes_on_and_quotes(made: Any) -> None:
    work = sharing(made[0])
    ids = [byte % VOCAB for byte in text().encode()]
    for prompt, tail in work.texts:
        whole = prompt[0].tolist()
        assert len(whole) == CONTEXT and tail.shape == (1, FOLLOWING + TAIL)
        starts = [i for i in range(len(ids)) if ids[i : i + CONTEXT] == whole]
        assert any(ids[i + CONTEXT : i + CONTEXT + FOLLOWING] == tail[0, :FOLLOWING].tolist() for i in starts)
        quoted = tail[0, FOLLOWING:].tolist()
        assert any(whole[i : i + TAIL] == quoted for i in range(CONTEXT // 2))


# -- what comes of it -------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
@torch.inference_mode()
def test_the_bytes_are_within_the_budget_and_as_reported(made: Any, share: float) -> None:
    model, out, profile = made
    found = profile.settings["recipes"][repr(share)]
    ids = sharing(model).texts[0][0]
    reports = []
    for recipe in (found["recipe"], f'budget(bytes={share}, profile="{out}")'):
        cache = fivefold.compress(model, recipe)
        model(ids, past_key_values=cache)
        reports.append(cache.report())
    assert reports[0].total == reports[1].total == found["bytes"] <= share * reports[0].exact_equivalent
    assert reports[0].exact_equivalent == profile.settings["exact_bytes"]
    assert found["bytes"] > 0.8 * share * profile.settings["exact_bytes"]  # and it is used


def test_it_is_an_ordinary_recipe(made: Any) -> None:
    model, out, profile = made
    spec = next(iter(make_cache(model, Recipe()).session.stores.values())).spec
    for share in SHARES:
        found = profile.settings["recipes"][repr(share)]
        recipe = Recipe.parse(found["recipe"])
        assert str(recipe) == found["recipe"] and {method.name for method in recipe.methods} <= {"duo", "kivi"}
        short = Recipe.parse(f'budget(bytes={share}, profile="{out}")')
        assert short.of_layer(spec) == recipe.of_layer(spec) and Recipe.parse(str(short)) == short


@pytest.mark.parametrize("share", [0.1])
def test_what_ships_keeps_to_its_budget(share: float) -> None:
    shape = read_model("smollm2-135m")
    for recipe in (Recipe.parse(f"budget(bytes={share})"), Recipe.parse(shipped(share)["recipe"])):
        report = memory.report_of(recipe, shape, 2048, dtype=torch.float32)
        # Tables, and what kernels read besides pages, differ with the kernels.
        assert report.total == pytest.approx(shipped(share)["bytes"], rel=5e-3) and 0.97 * share < report.ratio <= share


def shipped(share: float) -> Any:
    name = read_model("smollm2-135m").signature
    return load_profile(f"budget-{name}", "budget", name).settings["recipes"][repr(share)]


def test_a_run_that_is_broken_off_ends_with_the_same_bytes(made: Any, tmp_path: Path) -> None:
    model, out, _ = made
    for after in (3, 17, 3):  # in either pass
        asked = iter(range(1000))
        with pytest.raises(Stopped):
            run(model, tmp_path, lambda asked=asked, after=after: next(asked) >= after)
    run(model, tmp_path)
    for name in ("profile.json", "profile.safetensors"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()
    assert model.config._attn_implementation == "sdpa"  # the model is as it was


def test_with_rotations(tmp_path: Path, tiny: Any) -> None:
    model = tiny(**SHAPE)
    rotation = learn(model, "rotatekv(bits=4)", tmp_path / "rotation", chunks=2)
    asked = (
        f'budget(bytes=0.5, context={CONTEXT}, length={CONTEXT}, texts=1, tries=1, recent=40, rotation="{rotation}")'
    )
    profile = run(model, tmp_path / "out", asked=asked)
    found = profile.settings["recipes"]["0.5"]
    assert profile.settings["codec"] == "rotatekv" and f'profile="{rotation}"' in found["recipe"]
    assert found["bytes"] <= 0.5 * profile.settings["exact_bytes"]


# -- what is refused --------------------------------------------------------------------------------------


def test_a_model_that_nothing_was_measured_on(tiny: Any) -> None:
    with pytest.raises(ProfileError, match=r"run fivefold calibrate --recipe 'budget\(bytes=0.2\)'"):
        fivefold.compress(tiny(**SHAPE), "budget(bytes=0.2)")


def test_bytes_that_were_not_asked_for(made: Any) -> None:
    model, out, _ = made
    with pytest.raises(ProfileError, match=r"was made for bytes=0.7 and 0.22, not for 0.2"):
        fivefold.compress(model, f'budget(bytes=0.2, profile="{out}")')
    with pytest.raises(RecipeError, match="is for fivefold calibrate: use one of them here"):
        fivefold.compress(model, f'budget(bytes=[0.6], profile="{out}")')


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("budget(bytes=0)", "use 0.01 to 1"),
        ("budget(bytes=[0.1, 2])", r"budget\(bytes=2\) is out of range"),
        ("budget(bytes=[])", "is empty"),
        ("budget() + duo()", "shares heads and bits out itself"),
        ("budget() + kivi()", "both fill the slot"),
    ],
)
def test_recipes_that_are_refused(recipe: str, told: str) -> None:
    with pytest.raises(RecipeError, match=told):
        Recipe.parse(recipe)


def test_a_budget_that_nothing_fits(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(RecipeError, match=r"the least that layers take is about [\d,]+: use a share of at least 0\.\d"):
        run(tiny(**SHAPE), tmp_path, asked=f"budget(bytes=0.02, context={CONTEXT}, length={CONTEXT}, texts=1, tries=1)")
