"""Calls of `generate` one after another with one cache: what each begins with, and what the one before left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import families
import fivefold
from conftest import VOCAB, quick
from fivefold.errors import CacheStateError
from recipes import RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")
LOOKUP = {"prompt_lookup_num_tokens": 3}


def text(length: int, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB - 3, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, cache: Any, new: int = 6, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, pad_token_id=0, **given)


@pytest.mark.parametrize("name", RECIPES)
def test_assisted_decoding_ends(tiny: Any, name: str, tmp_path: Path) -> None:
    """Once it is over everything is packed and given up as ever, and the cache can be saved, joined and left."""
    model = tiny(**SHAPE)
    assisted, plain = (fivefold.compress(model, written(name, model)) for _ in range(2))
    said = generate(model, text(150), plain, new=1)
    try:
        assert torch.equal(generate(model, text(150), assisted, new=1, **LOOKUP), said)
    except CacheStateError as error:
        assert "cannot take tokens back" in str(error) or "cannot be taken back" in str(error)
        assert assisted.get_seq_length() == 0
        return
    later = torch.cat([said, text(70, seed=2)], 1)
    for cache in (assisted, plain):
        generate(model, later, cache, new=40)
    left, wanted = assisted.report(), plain.report()
    for held in ("tokens", "exact", "codes", "scales"):
        assert getattr(left, held) == getattr(wanted, held), held
    generate(model, torch.cat([later, text(90, seed=3)], 1), assisted, new=1, **LOOKUP)
    assisted.save(tmp_path)
    other = fivefold.compress(model, written(name, model))
    generate(model, text(20), other, new=1)
    assisted.join(other)
    assert fivefold.load_cache(model, tmp_path).get_seq_length() == 311
    assert assisted.take([1]).lengths().tolist() == [20]


@pytest.mark.parametrize("family", quick(["llama", "gemma2", "lfm2", "opt", "gemma3n_text"], 3))
@pytest.mark.parametrize("held", [1, 30])
def test_a_second_turn_with_an_assistant(family: str, held: int) -> None:
    """transformers gives it the whole text once more, and DynamicCache then holds all of that twice."""
    model = families.build(family)
    ids = text(held + 9)
    wanted = generate(model, ids, None, new=12)
    cache = fivefold.compress(model, "full()")
    generate(model, ids[:, :held], cache, new=1, **LOOKUP)
    assert torch.equal(generate(model, ids, cache, new=12, **LOOKUP), wanted)
    assert cache.get_seq_length() == wanted.shape[1] - 1


@pytest.mark.parametrize("given", [{}, LOOKUP], ids=["plain", "assisted"])
def test_texts_that_are_too_short_are_refused(tiny: Any, given: dict[str, int]) -> None:
    model, ids = tiny(), text(30)
    cache = fivefold.compress(model, "kivi(bits=4, residual=0)")
    said = generate(model, ids, cache, **given)
    before = cache.report().tokens
    for short, match in (
        (ids, "whole text so far"),
        (said[:, :-1], "whole text so far"),
        (text(5), "whole text|no tok"),
    ):
        with pytest.raises(CacheStateError, match=match):
            generate(model, short, cache, **given)
    calls: list[dict[str, Any]] = [
        {"input_ids": ids[:, :0]},
        {"input_ids": ids[:0]},
        {"input_ids": ids, "attention_mask": torch.ones(2, 65)},
        {"input_ids": ids, "attention_mask": torch.ones(1, 30)},
    ]
    for call in calls:
        with pytest.raises(CacheStateError, match="give"), torch.no_grad():
            model(**call, past_key_values=cache)
    assert cache.report().tokens == before
    longer = torch.cat([said, text(5)], 1)
    fresh = fivefold.compress(model, "kivi(bits=4, residual=0)")
    generate(model, ids, fresh, **given)
    assert torch.equal(generate(model, longer, cache), generate(model, longer, fresh))


@pytest.mark.parametrize("family", ["gemma2", "lfm2", "qwen3_next"])
def test_what_other_layers_cannot_take_back(family: str) -> None:
    """Layers with a window or a state of their own say so in a sentence, whatever was recorded."""
    model, ids = families.build(family), text(60)
    cache = fivefold.compress(model, "full()")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(CacheStateError, match="fork"):
            cache.crop(-30)
        wanted = model(ids, past_key_values=cache.fork()).logits
        cache.activate_past_recording()
        model(ids[:, :4], past_key_values=cache)
        with pytest.raises(CacheStateError, match="fork"):
            cache.crop(-20)  # more than it has recorded
        if family != "qwen3_next":
            cache.crop(-4)
            torch.testing.assert_close(model(ids, past_key_values=cache).logits, wanted, atol=1e-4, rtol=1e-4)
        cache.crop(-cache.get_seq_length())
        again = DynamicCache(config=model.config)
        out = [model(ids, past_key_values=one).logits for one in (cache, again)]
    torch.testing.assert_close(*out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_bigcode", "gpt2"])
def test_saved_heads_are_those_that_attention_brings(family: str, tmp_path: Path) -> None:
    """Also where the configuration has no number, or another one, of KV heads."""
    model, ids = families.build(family), text(40)
    cache = fivefold.compress(model, "kivi(bits=4, residual=0)")
    generate(model, ids, cache, new=1)
    cache.save(tmp_path)
    loaded = fivefold.load_cache(model, tmp_path)
    with torch.no_grad():
        out = [model(ids, past_key_values=one).logits for one in (loaded, cache)]
    assert torch.equal(*out)
