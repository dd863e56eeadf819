"""Token policies and sparse reads inside transformers: budgets, combinations, forks, caps, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fivefold
from fivefold.errors import CacheFullError, CacheStateError, RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")
CHOOSING = ("h2o", "snapkv", "keyformer", "d2o", "elastic", "random")
GENERATING = ("h2o", "keyformer", "d2o", "elastic", "random")
PROMPT, NEW = 200, 80


def prompt(length: int = PROMPT, batch: int = 1, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, 131, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, cache: Any, new: int = NEW, **settings: Any) -> torch.Tensor:
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **settings)


def held(cache: Any) -> list[int]:
    """Tokens of each row of each layer."""
    stores = cache.session.stores.values()
    return [c.bounds.length for store in stores for c in store.groups for _ in c.rows]


def positions(cache: Any) -> list[Any]:
    out = []
    for store in cache.session.stores.values():
        for group in store.groups:
            out += [
                (store.spec.layer, int(row), sorted(p.tolist())) for row, p in zip(group.rows, group.held.positions)
            ]
    return sorted(out)


@pytest.mark.parametrize("name", CHOOSING)
def test_keeping_everything_is_exact(name: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt()
    exact = generate(model, ids, fivefold.compress(model, "full()"))
    assert torch.equal(generate(model, ids, fivefold.compress(model, f"{name}(keep=1.0)")), exact)


@pytest.mark.parametrize("name", GENERATING)
def test_budgets_hold_while_generating(name: str, tiny: Callable[..., Any]) -> None:
    model = tiny()
    cache = fivefold.compress(model, f"{name}(keep=0.3)")
    generate(model, prompt(), cache)
    seen = PROMPT + NEW - 1  # the last token is never fed
    budget = 0.3 * (seen if name == "elastic" else PROMPT)
    mean = sum(held(cache)) / len(held(cache))
    assert abs(mean - budget) <= 1
    assert cache.get_seq_length() == seen
    # Pages are really given back: within one page a head of the budget, at one position and one score a token.
    report = cache.report()
    spec = cache.session.stores[0].spec
    token = 2 * spec.head_dim * 4
    rows = len(held(cache))
    assert report.exact == sum(held(cache)) * token
    assert report.exact + report.slack <= sum(held(cache)) * token + rows * 33 * token
    assert report.statistics <= sum(held(cache)) * 8 + rows * 32


def test_snapkv_holds_what_is_generated(tiny: Callable[..., Any]) -> None:
    model = tiny()
    cache = fivefold.compress(model, "snapkv(keep=0.3)")
    generate(model, prompt(), cache)
    assert set(held(cache)) == {60 + NEW - 1}


@pytest.mark.parametrize("name", CHOOSING)
def test_sequences_of_a_batch_choose_as_if_alone(name: str, tiny: Callable[..., Any]) -> None:
    model, lengths = tiny(), (150, PROMPT)
    ids = prompt(batch=2)
    mask = torch.ones_like(ids)
    mask[0, : PROMPT - 150] = 0
    together = fivefold.compress(model, f"{name}(keep=0.3)")
    out = generate(model, ids * mask, together, 20, attention_mask=mask)
    for at, length in enumerate(lengths):
        alone = fivefold.compress(model, f"{name}(keep=0.3)")
        own = generate(model, ids[at : at + 1, PROMPT - length :], alone, 20)
        assert torch.equal(own[0, length:], out[at, PROMPT:])
        kv_heads = alone.session.stores[0].spec.kv_heads
        mine = [(layer, row % kv_heads, p) for layer, row, p in positions(together) if row // kv_heads == at]
        assert mine == positions(alone)


@pytest.mark.parametrize("name", GENERATING)
def test_a_codec_packs_what_is_chosen(name: str, tiny: Callable[..., Any]) -> None:
    """Packed places are taken over by newer tokens: the budget holds within two groups, and hardly more is lost."""
    model, ids = tiny(), prompt(400)
    recipe = f"{name}(keep=0.5)"
    cache = fivefold.compress(model, f"{recipe} + kivi(bits=8, residual=32)")
    generate(model, ids, cache, 120)
    exact = fivefold.compress(model, recipe)
    generate(model, ids, exact, 120)
    share = 0.5 * (400 + 119 if name == "elastic" else 400)
    assert abs(sum(held(cache)) / len(held(cache)) - share) <= 64
    assert cache.report().codes > 0
    assert cache.report().total < 0.62 * exact.report().total  # 8 bits, but for the residual and open pages
    for store in cache.session.stores.values():
        for group in store.groups:
            assert group.held is not None and group.held.slots == group.bounds.length
            assert all(len(set(p.tolist())) == len(p) for p in group.held.positions)


def test_packed_tokens_that_are_replaced_are_the_right_ones(tiny: Callable[..., Any]) -> None:
    """Every stored key and value is, up to 8 bits, that of its position in the exact cache of the same text."""
    model, ids = tiny(num_hidden_layers=1), prompt(500)
    cache, full = fivefold.compress(model, "random(keep=0.5) + kivi(bits=8, residual=32)"), fivefold.compress(model)
    with torch.inference_mode():
        for piece in (ids[:, :400], *ids[:, 400:].split(1, 1)):
            model(piece, past_key_values=cache)
            model(piece, past_key_values=full)
    (want,) = full.session.stores[0].groups
    keys, values = want.dense()
    (group,) = cache.session.stores[0].groups
    assert group.bounds.packed_stop > 0
    index = group.held.positions.long()[:, :, None].expand(-1, -1, keys.shape[2])
    for got, exact in zip(group.dense(), (keys, values)):
        wanted = exact.gather(1, index)
        assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()


@pytest.mark.parametrize(
    "recipe", ["h2o(keep=0.3)", "d2o(keep=0.4)", "keyformer(keep=0.4) + kivi(bits=8, residual=32)"]
)
def test_forks_go_their_own_ways(recipe: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt(300)
    tails = prompt(60, seed=1), prompt(60, seed=2)
    with torch.inference_mode():
        first = fivefold.compress(model, recipe)
        model(ids, past_key_values=first)
        second = first.fork()
        outs: list[list[torch.Tensor]] = [[], []]
        for step in range(60):
            for at, cache in enumerate((first, second)):
                outs[at].append(model(tails[at][:, step : step + 1], past_key_values=cache).logits)
        for at, cache in enumerate((first, second)):
            alone = fivefold.compress(model, recipe)
            model(ids, past_key_values=alone)
            for step in range(60):
                logits = model(tails[at][:, step : step + 1], past_key_values=alone).logits
                assert torch.allclose(logits, outs[at][step], atol=1e-4)
            assert positions(alone) == positions(cache)


@pytest.mark.parametrize("name", CHOOSING)
def test_beams_have_the_scores_of_their_sequences(name: str, tiny: Callable[..., Any]) -> None:
    """However beams were reordered: each one's score is that of its sequence fed to a cache of its own."""
    model, ids, new = tiny(), prompt(120), 12
    cache = fivefold.compress(model, f"{name}(keep=0.5)")
    found = generate(
        model, ids, cache, new, num_beams=3, num_return_sequences=3, return_dict_in_generate=True, output_scores=True
    )
    with torch.inference_mode():
        for beam, score in zip(found.sequences, found.sequences_scores):
            alone = fivefold.compress(model, f"{name}(keep=0.5)")
            logits = model(ids, past_key_values=alone).logits[0, -1]
            total = float(logits.log_softmax(-1)[beam[120]])
            for at in range(120, 120 + new - 1):
                logits = model(beam[None, at : at + 1], past_key_values=alone).logits[0, -1]
                total += float(logits.log_softmax(-1)[beam[at + 1]])
            assert float(score) == pytest.approx(total / new, abs=1e-3)


@pytest.mark.parametrize("name", GENERATING)
def test_what_cannot_be_taken_back_is_refused(name: str, tiny: Callable[..., Any]) -> None:
    model = tiny()
    cache = fivefold.compress(model, f"{name}(keep=0.3)")
    generate(model, prompt(), cache, 5)
    before = positions(cache)
    with pytest.raises(CacheStateError, match="cannot take back 2 tokens"):
        cache.crop(-2)
    assert positions(cache) == before
    with pytest.raises(CacheStateError, match="cannot take tokens back"):
        generate(model, prompt(), fivefold.compress(model, f"{name}(keep=0.3)"), 5, prompt_lookup_num_tokens=3)


def test_snapkv_takes_back_what_it_did_not_choose_by(tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt()
    plain = generate(model, ids, fivefold.compress(model, "snapkv(keep=0.9)"), 20)
    looked = generate(model, ids, fivefold.compress(model, "snapkv(keep=0.9)"), 20, prompt_lookup_num_tokens=3)
    assert looked.shape == plain.shape
    cache = fivefold.compress(model, "snapkv(keep=0.3)")
    generate(model, ids, cache, 10)
    cache.crop(-4)
    assert set(held(cache)) == {60 + 5}


@pytest.mark.parametrize("recipe", ["h2o(keep=0.3)", "h2o(keep=0.3) + kivi(residual=32)", "d2o(keep=0.3)"])
def test_a_cap_that_is_reached_changes_nothing(recipe: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt(600)
    needed = fivefold.compress(model, recipe)
    with torch.inference_mode():
        model(ids[:, :200], past_key_values=needed)
        allocated = sum(pool.allocated_bytes for pool in needed.session.pools)
        cache = fivefold.compress(
            model, recipe, max_bytes=int(allocated * 1.2) if "d2o" not in recipe else allocated * 4
        )
        model(ids[:, :200], past_key_values=cache)
        before = positions(cache)
        with pytest.raises(CacheFullError):
            model(ids[:, 200:], past_key_values=cache)
        assert positions(cache) == before
        model(ids[:, 200:201], past_key_values=cache)  # still usable


def test_a_step_that_is_broken_off_is_undone(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny(), prompt()
    with torch.inference_mode():
        cache, other = fivefold.compress(model, "h2o(keep=0.3)"), fivefold.compress(model, "h2o(keep=0.3)")
        for c in (cache, other):
            model(ids, past_key_values=c)

        def broken(x: torch.Tensor) -> torch.Tensor:
            raise KeyboardInterrupt

        monkeypatch.setattr(model.model.layers[1].mlp, "forward", broken)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], past_key_values=cache)
        monkeypatch.undo()
        got, want = (model(ids[:, 1:2], past_key_values=c).logits for c in (cache, other))
        assert torch.allclose(got, want, atol=1e-5)
        assert positions(cache) == positions(other)


COMBINED = [
    "duo(retrieval=[[0, 1], [1, 0], [2, 1]], sink=4, recent=40) + h2o(keep=0.4)",
    "duo(retrieval=[[0, 1], [1, 0], [2, 1]], sink=4, recent=40) + d2o(keep=0.4) + kivi(bits=4, residual=32)",
    "snapkv(keep=0.6) + kivi(residual=32) + tidal(top=32, full_layers=0, select_layers=[0])",
    "duo(retrieval=[[0, 1], [1, 0], [2, 1]]) + keyformer(keep=0.7) + kivi(bits=8) + tidal(top=32, full_layers=1)",
    "streaming(sink=4, recent=60) + tidal(top=16)",
    "elastic(keep=0.5) + tidal(top=32, full_layers=0, select_layers=[0])",
    "duo(retrieval=[[0, 1], [1, 0], [2, 1]]) + snapkv(keep=0.7) + kivi(bits=8) + anchors(top=40, anchors=[0])",
    "d2o(keep=0.6) + anchors(top=32, anchors=[0, 1], recent=8)",
]


@pytest.mark.parametrize("recipe", COMBINED)
def test_combinations(recipe: str, tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt(300, batch=2)
    cache = fivefold.compress(model, recipe)
    out = generate(model, ids, cache, 40)
    assert out.shape == (2, 340)
    assert cache.report().ratio < 1
    again = fivefold.compress(model, recipe)
    assert torch.equal(generate(model, ids, again, 40), out)


def test_reading_everything_that_was_picked_is_exact(tiny: Callable[..., Any]) -> None:
    model, ids = tiny(), prompt()
    exact = generate(model, ids, fivefold.compress(model, "full()"))
    assert torch.equal(generate(model, ids, fivefold.compress(model, "tidal(top=4096)")), exact)


@pytest.mark.parametrize("extra", ["", " + kivi(bits=8, residual=32)", " + h2o(keep=0.99)"])
def test_sparse_layers_read_what_was_picked(extra: str, tiny: Callable[..., Any]) -> None:
    """With nearly everything picked, nearly the exact logits; with little, others."""
    model, ids = tiny(), prompt(300)
    logits = {}
    for top in (299, 8):
        cache = fivefold.compress(model, f"tidal(top={top}, full_layers=0, select_layers=[0]){extra}")
        plain = fivefold.compress(model, extra.removeprefix(" + ") or "full()")
        with torch.inference_mode():
            for c in (cache, plain):
                model(ids, past_key_values=c)
            logits[top] = (
                (model(ids[:, :1], past_key_values=cache).logits - model(ids[:, :1], past_key_values=plain).logits)
                .abs()
                .max()
            )
    assert logits[299] < 0.05 * logits[8]


def test_bad_parameters() -> None:
    for recipe, words in (
        ("snapkv(kernel=4)", "no middle"),
        ("tidal(select_layers=3)", "must be a list or a text"),
        ("tidal(select_layers=[])", "name layers"),
        ("h2o(keep=0)", "out of range"),
        ("h2o() + snapkv()", "both fill the slot"),
    ):
        with pytest.raises(RecipeError, match=words):
            fivefold.Recipe.parse(recipe)
