"""Models of every family: what comes out with our cache is what comes out with transformers' own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import families
import fivefold
from fivefold.errors import FivefoldError, UnsupportedModelError
from recipes import RECIPES, written

pytestmark = pytest.mark.usefixtures("one_thread")
NEW = 6


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    yield {}


@pytest.fixture
def model(models: dict[str, Any], family: str) -> Any:
    if family not in models:
        made = families.MULTIMODAL[family]() if family in families.MULTIMODAL else families.build(family)
        models.clear()  # tests go family by family
        models[family] = made
    return models[family]


def text(length: int = 61, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, cache: Any = None, **given: Any) -> torch.Tensor:
    cache = DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        return model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False, **given)


@pytest.mark.parametrize("family", [*families.TAKEN, *families.MULTIMODAL])
def test_tokens_are_those_of_the_dynamic_cache(family: str, model: Any) -> None:
    ids, lengths = text(batch=3), (61, 40, 54)
    wanted = greedy(model, ids[:1])
    full = fivefold.compress(model, "full()")
    assert torch.equal(greedy(model, ids[:1], full), wanted)
    close = greedy(model, ids[:1], fivefold.compress(model, "kivi(bits=8, residual=0)"))
    assert torch.equal(close[:, :62], wanted[:, :62]), "what a prompt is answered with is exact"
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, -length:] = 1
    padded = [greedy(model, ids, cache, attention_mask=mask) for cache in (None, fivefold.compress(model, "full()"))]
    assert torch.equal(*padded)
    pieces = [
        greedy(model, ids[:1], cache, prefill_chunk_size=25) for cache in (None, fivefold.compress(model, "full()"))
    ]
    assert torch.equal(*pieces)
    with torch.no_grad():  # a second turn with what is there
        caches = full.new(), DynamicCache(config=model.config)
        for cache in caches:
            model(ids[:1, :30], past_key_values=cache)
        first, second = (model(ids[:1, 30:], past_key_values=cache).logits for cache in caches)
    torch.testing.assert_close(first, second, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("family", ["gemma3_text", "gemma4_text", "glm4", "gpt_oss", "llama", "qwen3_moe"])
def test_beams_and_prompt_lookup(family: str, model: Any) -> None:
    ids = text(20).repeat(1, 3)
    for given in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 4}):
        ours, theirs = (greedy(model, ids, cache, **given) for cache in (fivefold.compress(model, "full()"), None))
        assert torch.equal(ours, theirs), given


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_text", "lfm2"])
def test_beams_beside_layers_with_a_state(family: str, model: Any) -> None:
    ours, theirs = (greedy(model, text(), cache, num_beams=3) for cache in (fivefold.compress(model, "full()"), None))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text", "gpt_oss", "qwen3_next", "gemma2"])
def test_sequences_come_go_and_rest(family: str, model: Any, tmp_path: Any) -> None:
    """Layers that stay transformers' own go with those that do not: joined, forked, taken, saved, broken off."""
    ids, alone = text(batch=2), []
    with torch.no_grad():
        root = fivefold.compress(model, "kivi(bits=8, residual=32)")
        for row in ids:
            cache = root.new()
            model(row[None], past_key_values=cache)
            alone.append(cache)
        expected = [model(text(4, seed=3), past_key_values=cache.fork()).logits for cache in alone]
        batch = alone[0].fork()
        batch.join(alone[1].fork())
        together = model(text(4, seed=3).repeat(2, 1), past_key_values=batch.fork()).logits
        torch.testing.assert_close(together, torch.cat(expected), atol=2e-4, rtol=1e-3)
        batch.save(tmp_path / "saved")
        back = fivefold.load_cache(model, tmp_path / "saved")
        again = model(text(4, seed=3).repeat(2, 1), past_key_values=back).logits
        torch.testing.assert_close(again, together, atol=1e-5, rtol=1e-5)  # pages lie elsewhere, sums go otherwise
        batch.offload()
        batch.restore()
        with pytest.raises(KeyboardInterrupt):
            hook = model.get_output_embeddings().register_forward_pre_hook(_interrupt)
            try:
                model(text(4, batch=2, seed=5), past_key_values=batch)
            finally:
                hook.remove()
        assert torch.equal(model(text(4, seed=3).repeat(2, 1), past_key_values=batch.fork()).logits, together)
        second = batch.take([1])
        torch.testing.assert_close(
            model(text(4, seed=3), past_key_values=second).logits, expected[1], atol=2e-4, rtol=1e-3
        )


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gpt_oss", "olmo3"])
def test_layers_with_a_window_may_be_compressed_too(family: str, model: Any, tmp_path: Any) -> None:
    ids, mask = text(batch=3), torch.ones(3, 61, dtype=torch.long)
    mask[0, :21] = 0
    wanted = greedy(model, ids, attention_mask=mask)
    cache = fivefold.compress(model, "full()", sliding=True)
    assert torch.equal(greedy(model, ids, cache, attention_mask=mask), wanted)
    stores = cache.session.stores.values()
    assert {store.spec.window for store in stores} == {None, 24}
    cache.save(tmp_path / "saved")
    back = fivefold.load_cache(model, tmp_path / "saved")
    small, left = fivefold.compress(model, "kivi(bits=4, residual=0)", sliding=True), fivefold.compress(model, "full()")
    with torch.no_grad():
        again = [model(text(3, 3, seed=8), past_key_values=one).logits for one in (cache, back)]
        torch.testing.assert_close(*again, atol=1e-5, rtol=1e-5)
        for one in (small, left):
            model(text(400), past_key_values=one)
    assert small.report().total < 0.5 * left.report().total
    for store in small.session.stores.values():
        held = store.groups[0].bounds
        tokens = int(held.exact_tokens + held.packed_tokens)
        assert tokens == 400 if store.spec.window is None else 23 <= tokens < 400, "a window holds what it sees"


def test_a_model_of_windows_alone() -> None:
    model = families.build("mistral", sliding_window=24)
    with pytest.raises(UnsupportedModelError, match="sliding=True"):
        fivefold.compress(model, "full()")
    for given in ({}, {"prefill_chunk_size": 17}):
        ours, theirs = (
            greedy(model, text(), cache, **given)
            for cache in (fivefold.compress(model, "full()", sliding=True), DynamicCache(config=model.config))
        )
        assert torch.equal(ours, theirs)


_TURNED = [name for name in RECIPES if name in ("rotatekv", "cskv", "kv_heads")]


@pytest.mark.parametrize(
    ("family", "recipe"),
    [(family, name) for family in ("gemma2", "gpt_oss", "gemma4_text") for name in RECIPES]
    + [(family, name) for family in ("glm4", "smollm3") for name in _TURNED],
)
@pytest.mark.slow
def test_every_recipe(family: str, model: Any, recipe: str) -> None:
    """Soft caps, sinks, shared keys, neighbours turned together, layers that turn nothing: with every method."""
    try:
        cache = fivefold.compress(model, written(recipe, model))
    except FivefoldError as error:
        pytest.skip(str(error))
    with torch.inference_mode():
        logits = model(text(), past_key_values=cache).logits
        exact = model(text()).logits
        torch.testing.assert_close(logits[:, -1], exact[:, -1], atol=2.0, rtol=0.5)
        for token in text(6, seed=4)[0]:
            assert model(token.view(1, 1), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("family", list(families.REFUSED))
def test_what_is_refused_says_why(family: str) -> None:
    model = families.build(family)
    with pytest.raises(FivefoldError, match=families.REFUSED[family][1]) as caught, torch.no_grad():
        model(text(), past_key_values=fivefold.compress(model, "full()"))
    assert "DynamicCache" in str(caught.value) or "mask" in str(caught.value)
    fivefold.restore(model)
    assert not any("_fivefold_hooks" in vars(module) for module in model.modules())


def test_longrope_goes_up_to_the_switch() -> None:
    """A text within it, and one that begins beyond it, are read; one that crosses it is refused, nothing is lost."""
    rope = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "rope_theta": 1e4}
    model = families.build("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    for prompt, most in ((text(40), 20), (text(80), 20)):
        ours, theirs = (
            model.generate(prompt, past_key_values=cache, max_new_tokens=most, do_sample=False)
            for cache in (fivefold.compress(model, "full()"), DynamicCache(config=model.config))
        )
        assert torch.equal(ours, theirs)
    cache = fivefold.compress(model, "full()")
    with pytest.raises(UnsupportedModelError, match="longrope"), torch.no_grad():
        model.generate(text(60), past_key_values=cache, max_new_tokens=20, do_sample=False)
    length = cache.get_seq_length()
    with pytest.raises(UnsupportedModelError, match="64 tokens"), torch.no_grad():
        model(text(30), past_key_values=cache)
    assert cache.get_seq_length() == length > 60
    fivefold.restore(model)
    assert "prepare_inputs_for_generation" not in vars(model)
