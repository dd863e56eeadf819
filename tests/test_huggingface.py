"""Our caches inside transformers: the same tokens as its own caches, and an error wherever that cannot be."""

from __future__ import annotations

import copy
import gc
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, BloomConfig, DynamicCache, StaticCache

import fivefold
from conftest import FAMILIES, VOCAB, build
from fivefold.engine import recording
from fivefold.engine.session import REVOCABLE
from fivefold.errors import (
    CacheFullError,
    CacheStateError,
    FivefoldError,
    NonFiniteError,
    UnsupportedModelError,
)
from fivefold.models import huggingface

Model = Any
LOSSLESS = 1e-4
STREAMING = "streaming(sink=3, recent=40)"
DUO = "duo(retrieval=[[0, 1], [2, 0]], sink=5, recent=33)"
KIVI8 = "kivi(bits=8, residual=32)"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompt(length: int, batch: int = 1, seed: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)  # 0 is padding


def left_padded(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask of prompts of these lengths."""
    ids = prompt(max(lengths), len(lengths), seed=3)
    mask = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def generate(model: Model, ids: torch.Tensor, new: int = 24, cache: Any = None, **settings: Any) -> torch.Tensor:
    """The new tokens only."""
    settings = {"do_sample": False, "pad_token_id": 0, **settings}
    out = model.generate(ids, max_new_tokens=new, past_key_values=cache, **settings)
    return out[:, ids.shape[1] :]


@torch.no_grad()
def feed(
    model: Model, ids: torch.Tensor, cache: Any, chunks: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits of all tokens `[batch, tokens, vocab]`, given to the model in chunks; the last size repeats."""
    outs, start = [], cache.get_seq_length()
    begin, sizes = 0, list(chunks)
    while begin < ids.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        stop = min(begin + size, ids.shape[1])
        extra = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            extra = {
                "attention_mask": mask[:, : start + stop],
                "position_ids": positions[:, start + begin : start + stop],
            }
        outs.append(model(ids[:, begin:stop], past_key_values=cache, **extra).logits)
        begin = stop
    return torch.cat(outs, 1)


def alike(logits: torch.Tensor, expected: torch.Tensor, recipe: str) -> None:
    """Equal; but where packing in 8 bits came earlier or later, as near as rounding allows."""
    if "kivi" in recipe:
        assert (logits - expected).abs().mean() < 0.03 * expected.std()
    else:
        torch.testing.assert_close(logits, expected, atol=LOSSLESS, rtol=0)


@torch.no_grad()
def by_hand(model: Model, ids: torch.Tensor, sees: Callable[[int, int, int], tuple[int, int | None]]) -> torch.Tensor:
    """Logits of one sequence without any cache: eager attention under an explicit mask per layer and head.

    `sees(layer, kv_head, kv_heads)` is the (sink, recent) of a head; recent None is everything.
    """
    config, length = model.config, ids.shape[1]
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    q, k = torch.arange(length)[:, None], torch.arange(length)[None]

    def replace(module: Any, args: Any, kwargs: Any) -> Any:
        seen = []
        for head in range(heads):
            sink, recent = sees(module.layer_idx, head // (heads // kv_heads), kv_heads)
            far = torch.zeros(()) if recent is None else (k >= sink) & (k <= q - recent)
            seen.append((k <= q) & ~far.bool())
        mask = torch.where(torch.stack(seen), 0.0, -math.inf)[None]
        return args, {**kwargs, "attention_mask": mask}

    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    hooks = [
        m.register_forward_pre_hook(replace, with_kwargs=True) for m in huggingface.attention_modules(model).values()
    ]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation(before)


def sees_of(recipe: str) -> Callable[[int, int, int], tuple[int, int | None]]:
    """What `by_hand` needs for a recipe, worked out apart from the code under test."""
    if "streaming" in recipe:
        sink, recent = (int(part.split("=")[1]) for part in recipe.split(")")[0].split("(")[1].split(","))
        return lambda layer, head, heads: (sink, recent)
    assert recipe == DUO
    return lambda layer, head, heads: (0, None) if (layer, head) in {(0, 1), (2, 0)} else (5, 33)


def broken_once(model: Model, layer: int, error: type[BaseException] = RuntimeError) -> None:
    """Let the next forward fail when it comes to a layer."""

    def fail(*_: Any) -> None:
        hook.remove()
        raise error("on purpose")

    hook = model.base_model.layers[layer].register_forward_pre_hook(fail)


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return text.endswith((".", "?", "less.")) and "\n" not in text and text.count(". ") == 0


# -- the same tokens as transformers' own cache -------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_gives_the_tokens_of_the_dynamic_cache(tiny: Any, family: str) -> None:
    model, ids = tiny(family), prompt(50)
    settings = {
        "max_new_tokens": 128,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
    assert model.config._attn_implementation == "sdpa"
    cache = fivefold.compress(model, "full()")
    out = model.generate(ids, past_key_values=cache, **settings)
    new = expected.sequences[0, 50:]
    assert len(new) == 128 and len(new.unique()) > 10, "the reference says nothing"
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert out.past_key_values is cache and cache.get_seq_length() == 50 + 127
    # Both round in an order of their own, so both are held against double precision, which says how much that is.
    exact = copy.deepcopy(model).double()
    exact.set_attn_implementation("sdpa")
    with torch.no_grad():
        logits = exact(expected.sequences[:, :-1]).logits[0, 49:]
    theirs, ours = ((torch.stack(x.logits)[:, 0] - logits).abs().max() for x in (expected, out))
    assert ours < max(LOSSLESS, 2 * theirs)


def test_the_tiny_models_cover_the_shapes() -> None:
    shapes = set()
    for family in FAMILIES:
        config = build(family).config
        heads = config.num_attention_heads
        kv = getattr(config, "num_key_value_heads", None) or heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        shapes |= {dim, "mha" if kv == heads else "mqa" if kv == 1 else "gqa"}
    assert shapes >= {64, 96, 128, 256, "mha", "gqa", "mqa"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", ["full()", STREAMING, KIVI8])
def test_half_precision(tiny: Any, dtype: torch.dtype, recipe: str) -> None:
    model, ids = tiny("llama", dtype=dtype, initializer_range=0.1), prompt(90)
    # What the model would say without rounding, and how far rounding alone takes it from there.
    exact = copy.deepcopy(model).float()
    sees = sees_of(recipe) if "streaming" in recipe else lambda *_: (0, None)
    true = by_hand(exact, ids, sees)
    rounding = (by_hand(model, ids, sees).float() - true).abs().max()
    cache = fivefold.compress(model, recipe)
    logits = feed(model, ids, cache, [40, 30, 1])
    assert logits.dtype == dtype
    error = (logits.float() - true).abs().max()
    assert error < max(2 * rounding, 0.06 * true.std()), (error, rounding, true.std())


def test_mixed_sliding_layers_stay_stock(tiny: Any) -> None:
    model = tiny("gemma3_text")
    cache = fivefold.compress(model, "full()")
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "FivefoldLayer"] * 2
    generate(model, prompt(50), 40, cache)
    assert cache.report().sliding > 0
    assert cache.layers[0].keys.shape[2] == model.config.sliding_window - 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
@pytest.mark.parametrize("recipe", ["full()", STREAMING, "kivi(bits=8, residual=8)"])
def test_left_padding(tiny: Any, family: str, recipe: str) -> None:
    model = tiny(family)
    ids, mask = left_padded([5, 70, 37])
    expected = generate(model, ids, 35, attention_mask=mask)
    out = generate(model, ids, 35, fivefold.compress(model, recipe), attention_mask=mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = generate(model, ids[row : row + 1, -length:], 35, fivefold.compress(model, recipe))
        assert out[row].tolist() == alone[0].tolist(), f"row {row}"
    if recipe == "full()":
        assert out.tolist() == expected.tolist()


def test_padding_costs_nothing(tiny: Any) -> None:
    model = tiny()
    ids, mask = left_padded([1, 90])
    cache = fivefold.compress(model, "full()")
    feed(model, ids, cache, [90], mask)
    report = cache.report()
    assert report.exact == (1 + 90) * 3 * 2 * 2 * 64 * 4
    assert report.tokens == 180 and cache.get_seq_length() == 90


def test_sampling(tiny: Any) -> None:
    model, ids = tiny(), prompt(30, 2)
    tokens = []
    for cache in (None, fivefold.compress(model, "full()")):
        torch.manual_seed(5)
        tokens.append(generate(model, ids, 40, cache, do_sample=True, temperature=1.5, top_k=30).tolist())
    assert tokens[0] == tokens[1] and tokens[0][0] != tokens[0][1]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("padded", [False, True])
def test_beams(tiny: Any, family: str, padded: bool) -> None:
    model = tiny(family)
    ids, mask = left_padded([12, 41]) if padded else (prompt(33), None)
    settings = {"num_beams": 3, "attention_mask": mask, "num_return_sequences": 2, "length_penalty": 0.0}
    expected = generate(model, ids, 45, **settings)
    out = generate(model, ids, 45, fivefold.compress(model, "full()"), **settings)
    assert out.tolist() == expected.tolist()
    greedy = generate(model, ids, 45, attention_mask=mask)
    assert out[0].tolist() != greedy[0].tolist(), "beams that say nothing new test nothing"


@pytest.mark.parametrize("recipe", [STREAMING, DUO, KIVI8])
def test_beams_of_lossy_recipes(tiny: Any, recipe: str) -> None:
    """Beams share pages; each must see its own tokens. The same search with one cache per beam, moved by hand."""
    model, ids, mask = tiny(), *left_padded([50, 20, 64])
    cache = fivefold.compress(model, recipe)
    alone = [fivefold.compress(model, recipe) for _ in range(3)]
    feed(model, ids, cache, [64], mask)
    for row, one in enumerate(alone):
        feed(model, ids[row : row + 1], one, [64], mask[row : row + 1])
    generator = torch.Generator().manual_seed(1)
    for step in range(45):
        order = torch.randint(0, 3, (3,), generator=generator)
        if step % 3 == 0:
            cache.reorder_cache(order)
            alone = [alone[i].fork() for i in order.tolist()]
            mask = mask[order]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
        new = torch.randint(0, VOCAB, (3, 1), generator=generator)
        logits = feed(model, new, cache, [1], mask)
        for row, one in enumerate(alone):
            expected = feed(model, new[row : row + 1], one, [1], mask[row : row + 1])
            torch.testing.assert_close(logits[row], expected[0], atol=LOSSLESS, rtol=0)


SPECULATIVE = ["full()", STREAMING, "duo(retrieval=[[0, 1]], sink=5, recent=33)", KIVI8]


@pytest.mark.parametrize("recipe", SPECULATIVE)
@pytest.mark.parametrize("how", ["assistant", "lookup"])
def test_speculative_decoding(tiny: Any, recipe: str, how: str) -> None:
    model = tiny(vocab_size=VOCAB)
    ids = prompt(20).repeat(1, 4)  # repetition, so that looking up finds something
    if how == "assistant":
        # The same weights in half precision: agrees often and not always.
        helper = tiny(dtype=torch.bfloat16, num_hidden_layers=3)
        extra: dict[str, Any] = {"assistant_model": helper}
    else:
        extra = {"prompt_lookup_num_tokens": 6}
    greedy = generate(model, ids, 60, fivefold.compress(model, recipe))
    cache = fivefold.compress(model, recipe)
    taken_back: list[int] = []
    crop = recording.crop
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "crop", lambda session, n: (taken_back.append(n), crop(session, n))[1])
        out = generate(model, ids, 60, cache, **extra)
    assert any(taken_back), "nothing was taken back"
    if how == "assistant" and recipe in ("full()", KIVI8):  # the assistant itself sees all tokens
        assert len(taken_back) < 50, "nothing was accepted"
    if "kivi" in recipe:
        assert out.shape == greedy.shape  # a chunk may pack earlier than single steps do
    else:
        assert out.tolist() == greedy.tolist()
    if recipe == "full()":
        fivefold.restore(model)
        assert out.tolist() == generate(model, ids, 60).tolist()


def test_lookup_with_sliding_layers(tiny: Any) -> None:
    model, ids = tiny("gemma3_text"), prompt(20).repeat(1, 4)
    expected = generate(model, ids, 50)
    out = generate(model, ids, 50, fivefold.compress(model, "full()"), prompt_lookup_num_tokens=6)
    assert out.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_several_turns(tiny: Any, family: str) -> None:
    model = tiny(family)
    caches = [DynamicCache(config=model.config), fivefold.compress(model, "full()")]
    turns: list[list[list[int]]] = [[], []]
    for cache, said in zip(caches, turns):
        text = prompt(25)
        for turn in range(3):
            new = generate(model, text, 20, cache)
            said.append(new.tolist())
            text = torch.cat([text, new, prompt(9, seed=turn)], 1)
        assert cache.get_seq_length() == text.shape[1] - 9 - 1
    assert turns[0] == turns[1]


@pytest.mark.parametrize("recipe", ["full()", STREAMING, DUO])
def test_prefill_in_chunks(tiny: Any, recipe: str) -> None:
    model, ids = tiny(), prompt(150)
    fivefold.compress(model)
    whole = feed(model, ids, fivefold.compress(model, recipe), [150])
    for sizes in ([64], [37], [1, 100, 1], [149, 1]):
        logits = feed(model, ids, fivefold.compress(model, recipe), sizes)
        torch.testing.assert_close(logits, whole, atol=LOSSLESS, rtol=0)
    expected = generate(model, ids, 20, fivefold.compress(model, recipe))
    for size in (16, 37, 150):
        cache = fivefold.compress(model, recipe)
        assert generate(model, ids, 20, cache, prefill_chunk_size=size).tolist() == expected.tolist()


def test_padded_prefill_in_chunks(tiny: Any) -> None:
    """Chunks in which a row is padding only, and chunks that end its padding."""
    model, (ids, mask) = tiny(), left_padded([10, 70, 33, 1])
    whole = feed(model, ids, fivefold.compress(model, STREAMING), [70], mask)
    for sizes in ([32], [7], [1]):
        logits = feed(model, ids, fivefold.compress(model, STREAMING), sizes, mask)
        real = mask.bool()
        torch.testing.assert_close(logits[real], whole[real], atol=LOSSLESS, rtol=0)
        assert logits.isfinite().all()


@pytest.mark.parametrize("recipe", ["full()", STREAMING, KIVI8])
def test_inference_mode_and_no_grad_alternate(tiny: Any, recipe: str) -> None:
    model, ids = tiny(), prompt(120)
    expected = feed(model, ids, fivefold.compress(model, recipe), [40, 1])
    cache, outs = fivefold.compress(model, recipe), []
    for begin in range(0, 120, 40):
        for mode, part in (
            (torch.inference_mode, slice(begin, begin + 25)),
            (torch.no_grad, slice(begin + 25, begin + 40)),
        ):
            with mode():
                outs.append(model(ids[:, part][:, :1], past_key_values=cache).logits)
                outs.append(model(ids[:, part][:, 1:], past_key_values=cache).logits)
    alike(torch.cat(outs, 1), expected, recipe)


# -- windows, against a mask written out --------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [[150], [70, 17, 40], [1], [33, 1]], ids=str)
@pytest.mark.parametrize(
    "recipe",
    [
        STREAMING,
        DUO,
        "streaming(sink=0, recent=1)",
        "streaming(sink=0, recent=32)",
        "streaming(sink=45, recent=64)",
        "streaming(sink=70, recent=20)",
    ],
)
def test_windows(tiny: Any, recipe: str, chunks: list[int]) -> None:
    model, ids = tiny(), prompt(150)
    expected = by_hand(model, ids, sees_of(recipe))
    plain = by_hand(model, ids, lambda *_: (0, None))
    assert (expected - plain).abs().max() > 0.1, "the window hides nothing"
    logits = feed(model, ids, fivefold.compress(model, recipe), chunks)
    torch.testing.assert_close(logits, expected, atol=LOSSLESS, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "phi3", "gpt_neox"])
def test_windows_of_other_families(tiny: Any, family: str) -> None:
    model, ids = tiny(family), prompt(120)
    for recipe in (STREAMING, "duo(retrieval=[[1, 0]], sink=4, recent=30)"):
        sees = (
            sees_of(recipe) if "streaming" in recipe
            else lambda layer, head, heads: (0, None) if (layer, head) == (1, 0) else (4, 30)
        )  # fmt: skip
        logits = feed(model, ids, fivefold.compress(model, recipe), [50, 40, 1])
        torch.testing.assert_close(logits, by_hand(model, ids, sees), atol=2 * LOSSLESS, rtol=0)


@pytest.mark.parametrize("recipe", [STREAMING, DUO])
def test_windows_of_padded_batches(tiny: Any, recipe: str) -> None:
    model, (ids, mask) = tiny(), left_padded([60, 110, 4])
    logits = feed(model, ids, fivefold.compress(model, recipe), [45, 40, 1], mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = by_hand(model, ids[row : row + 1, -length:], sees_of(recipe))
        torch.testing.assert_close(logits[row, -length:], expected[0], atol=LOSSLESS, rtol=0)


@pytest.mark.parametrize("chunks", [[400], [150, 100, 1], [33]], ids=str)
def test_a_window_over_packed_tokens(tiny: Any, chunks: list[int]) -> None:
    """8 bits are close enough to tell a wrong window from rounding."""
    model, ids = tiny(), prompt(400)
    recipe = "streaming(sink=5, recent=170)"
    expected = by_hand(model, ids, sees_of(recipe))
    off_by_one = by_hand(model, ids, lambda *_: (5, 172))
    cache = fivefold.compress(model, f"{recipe} + {KIVI8}")
    error = (feed(model, ids, cache, chunks) - expected).abs().mean()
    assert cache.report().codes > 0
    assert error < 0.5 * (off_by_one - expected).abs().mean()


# -- traps --------------------------------------------------------------------------------------------------


def refused(error: type[FivefoldError], word: str, call: Callable[[], Any]) -> None:
    with pytest.raises(error, match=word) as caught:
        call()
    assert one_sentence(caught.value), str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_our_cache_on_an_unprepared_model(tiny: Any, family: str) -> None:
    model, ids = tiny(family), prompt(30)
    twin = build(family)
    cache = fivefold.compress(model, "full()")
    expected = generate(model, ids, 10, fivefold.compress(model))
    generate(model, ids[:, :20], 1, cache)
    refused(CacheStateError, "not prepared", lambda: feed(twin, ids[:, 20:], cache, [10]))
    fivefold.restore(model)
    refused(CacheStateError, "not prepared", lambda: feed(model, ids[:, 20:], cache, [10]))
    fivefold.compress(model)
    assert generate(model, ids, 10, cache).tolist() == expected.tolist()


def test_hooks_removed_by_hand(tiny: Any) -> None:
    model, ids = tiny(), prompt(30)
    cache = fivefold.compress(model, "full()")
    generate(model, ids, 3, cache)
    for module in huggingface.attention_modules(model).values():
        for hook in module._fivefold_hooks:
            hook.remove()
    refused(CacheStateError, "not prepared", lambda: generate(model, prompt(40), 3, cache))


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 4}, {"num_hidden_layers": 2}, {"num_key_value_heads": 4}, {"head_dim": 32}],
    ids=str,
)
def test_our_cache_on_a_model_of_another_shape(tiny: Any, changes: dict[str, int]) -> None:
    model, other = tiny(), tiny(**changes)
    cache = fivefold.compress(model, "full()")
    fivefold.compress(other)
    before = cache.report()
    refused(CacheStateError, "this model", lambda: feed(other, prompt(5), cache, [5]))
    assert cache.report() == before


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_stock_caches_on_a_prepared_model(tiny: Any, family: str) -> None:
    model = tiny(family)
    ids, mask = left_padded([20, 45])

    def run() -> list[torch.Tensor]:
        out = []
        for padding in (None, mask):
            dynamic = DynamicCache(config=model.config)
            static = StaticCache(config=model.config, max_cache_len=64)
            for cache in (dynamic, static):
                out.append(feed(model, ids, cache, [25, 13, 6, 1], padding))
            with torch.no_grad():
                out.append(model(ids, attention_mask=padding, use_cache=False).logits)
                out.append(model(ids, attention_mask=padding).logits)
            out.append(generate(model, ids, 12, attention_mask=padding).float())
        out.append(generate(model, ids, 12, cache_implementation="static", attention_mask=mask).float())
        real = mask.bool()
        return [x[:, -45:][real] if x.shape[1] == 45 else x for x in out]

    expected = run()
    fivefold.compress(model)
    assert model.config._attn_implementation == "sdpa"
    for number, (one, other) in enumerate(zip(run(), expected)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5, msg=lambda m, n=number: f"{n}: {m}")


def test_packed_sequences_on_a_prepared_model(tiny: Any) -> None:
    model, ids = tiny(), prompt(20)
    positions = torch.cat([torch.arange(8), torch.arange(12)])[None]
    with torch.no_grad():
        expected = model(ids, position_ids=positions, use_cache=False).logits
        fivefold.compress(model)
        out = model(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_training_on_a_prepared_model(tiny: Any) -> None:
    model, ids = tiny(), prompt(20, 2)
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.base_model.layers[0].self_attn.q_proj.weight.grad.clone())
        fivefold.compress(model)
    model.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-4)


def test_masks_that_cannot_be_honoured(tiny: Any) -> None:
    model, ids = tiny(), prompt(12, 2)
    causal = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].expand(2, 1, 12, 12)
    right = torch.ones(2, 12, dtype=torch.long)
    right[0, 9:] = 0
    inside = torch.ones(2, 12, dtype=torch.long)
    inside[1, 4] = 0

    def call(cache: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(ids, attention_mask=mask, past_key_values=cache).logits

    cache = fivefold.compress(model, "full()")
    empty = cache.report()
    refused(CacheStateError, "padding mask", lambda: call(cache, ids, causal))
    refused(CacheStateError, "on the left", lambda: call(cache, ids, right))
    refused(CacheStateError, "on the left", lambda: call(cache, ids, inside))
    assert cache.report() == empty
    one = prompt(12)
    call(cache, one, torch.ones(1, 12))  # and another batch size is fine after all that
    held = cache.report()
    more = torch.ones(1, 17, dtype=torch.long)
    gone, late, short = more.clone(), more.clone(), more[:, :5]
    gone[0, :3] = 0
    late[0, 13:15] = 0
    refused(CacheStateError, "may only grow", lambda: call(cache, prompt(5), gone))
    refused(CacheStateError, "on the left", lambda: call(cache, prompt(5), late))
    refused(CacheStateError, "over all tokens", lambda: call(cache, prompt(5), short))
    refused(CacheStateError, "holds 1 sequences", lambda: call(cache, prompt(5, 2), torch.ones(2, 17)))
    assert cache.report() == held and cache.get_seq_length() == 12
    expected = feed(model, torch.cat([one, prompt(5)], 1), fivefold.compress(model), [17])[:, 12:]
    torch.testing.assert_close(call(cache, prompt(5), more), expected, atol=LOSSLESS, rtol=0)


def test_attentions_and_gradients_are_refused(tiny: Any) -> None:
    model, ids = tiny(), prompt(12)
    cache = fivefold.compress(model, "full()")
    with torch.no_grad():
        refused(
            CacheStateError, "output_attentions",
            lambda: model(ids, past_key_values=cache, output_attentions=True),
        )  # fmt: skip
    refused(CacheStateError, "does not train", lambda: model(ids, past_key_values=cache))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.base_model.layers[2].self_attn.v_proj.weight.requires_grad_(True)  # an adapter on the last values only
    try:
        refused(CacheStateError, "does not train", lambda: model(ids, past_key_values=cache))
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    assert cache.get_seq_length() == 0
    expected = generate(model, ids, 10)
    assert generate(model, ids, 10, cache).tolist() == expected.tolist()


def test_what_attention_cannot_compute_is_refused(tiny: Any) -> None:
    model, ids = tiny(), prompt(5)
    cache = fivefold.compress(model, "full()")

    def ask(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_bias": 30.0}

    hook = model.base_model.layers[0].self_attn.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        refused(UnsupportedModelError, "position bias", lambda: generate(model, ids, 2, cache))
    finally:
        hook.remove()


def test_autocast_and_a_moved_model_are_refused(tiny: Any) -> None:
    model, ids = tiny(), prompt(5)
    cache = fivefold.compress(model, "full()")

    def cast() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            model(ids, past_key_values=cache)

    refused(CacheStateError, "autocast", cast)


def test_an_all_ones_mask_is_none(tiny: Any) -> None:
    model, ids = tiny(), prompt(40)
    outs = [
        generate(model, ids, 30, fivefold.compress(model, STREAMING), attention_mask=mask).tolist()
        for mask in (None, torch.ones_like(ids))
    ]
    assert outs[0] == outs[1]


@pytest.mark.parametrize("recipe", ["full()", STREAMING, KIVI8])
def test_rows_of_padding_only(tiny: Any, recipe: str) -> None:
    model, ids = tiny(), prompt(40, 3)
    mask = torch.ones(3, 40, dtype=torch.long)
    mask[1] = 0
    cache = fivefold.compress(model, recipe)
    logits = feed(model, ids, cache, [25, 5], mask)
    assert logits.isfinite().all()
    more = torch.cat([mask, torch.ones(3, 9, dtype=torch.long)], 1)
    late = feed(model, prompt(9, 3), cache, [4, 1], more)  # the row comes to life
    assert late.isfinite().all()
    alone = feed(model, prompt(9, 3)[1:2], fivefold.compress(model, recipe), [9])
    torch.testing.assert_close(late[1], alone[0], atol=LOSSLESS, rtol=0)
    nothing = fivefold.compress(model, recipe)
    assert feed(model, ids, nothing, [40], torch.zeros_like(mask)).isfinite().all()


def test_threads_share_a_model(tiny: Any) -> None:
    model = tiny()
    recipes = ["full()", STREAMING, DUO, "kivi(bits=2, residual=16)"]
    prompts = [prompt(60 + 9 * i, seed=i) for i in range(4)]
    serial = [generate(model, ids, 40, fivefold.compress(model, r)).tolist() for r, ids in zip(recipes, prompts)]
    fivefold.restore(model)
    results: list[Any] = [None] * 4
    barrier = threading.Barrier(4)

    def work(i: int) -> None:
        barrier.wait()
        results[i] = generate(model, prompts[i], 40, fivefold.compress(model, recipes[i])).tolist()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == serial
    for module in huggingface.attention_modules(model).values():
        assert len(module._fivefold_hooks) == 3  # before and after it, and before the layer around it


@pytest.mark.parametrize("before", ["sdpa", "eager"])
def test_restore(tiny: Any, before: str) -> None:
    model, ids = tiny(), prompt(30)
    model.set_attn_implementation(before)
    expected = generate(model, ids, 20)
    hooks = [list(module._forward_pre_hooks.values()) for module in model.modules()]
    fivefold.compress(model, STREAMING)
    fivefold.compress(model)
    assert hooks != [list(module._forward_pre_hooks.values()) for module in model.modules()]
    assert generate(model, ids, 20).tolist() == expected.tolist()
    fivefold.restore(model)
    assert model.config._attn_implementation == before
    assert hooks == [list(module._forward_pre_hooks.values()) for module in model.modules()]
    assert not [name for name in vars(model) if "fivefold" in name]
    assert generate(model, ids, 20).tolist() == expected.tolist()
    fivefold.restore(model)  # twice is harmless


def test_a_recipe_that_does_not_fit_leaves_the_model_alone(tiny: Any) -> None:
    model = tiny()
    refused(fivefold.FivefoldError, "layer 9", lambda: fivefold.compress(model, "duo(retrieval=[[9, 0]])"))
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "_fivefold_hooks")


@pytest.mark.parametrize("config", [BloomConfig])
def test_unknown_families_are_refused_by_name(config: type) -> None:
    model = AutoModelForCausalLM.from_config(config(n_embd=16, hidden_size=16, n_head=2, n_layer=1, vocab_size=9))
    refused(UnsupportedModelError, model.config.model_type, lambda: fivefold.compress(model))


def test_models_that_cannot_be_compressed(tiny: Any) -> None:
    refused(UnsupportedModelError, "sliding window", lambda: fivefold.compress(tiny("mistral", sliding_window=16)))
    refused(UnsupportedModelError, "float64", lambda: fivefold.compress(tiny(dtype=torch.float64)))


# -- limits, accidents, forks -------------------------------------------------------------------------------


SMALL_DUO = "duo(retrieval=[[0, 1]], sink=5, recent=33)"
# In these windows a page is taken and another given up in one step.
LIMITED = [
    "full()",
    "streaming(sink=3, recent=34)",
    SMALL_DUO,
    KIVI8,
    f"streaming(sink=4, recent=90) + {KIVI8}",
]


def held(cache: Any) -> dict[str, Any]:
    """The report but for spare pages, which a refused call may have given back to the system."""
    report = cache.report().as_dict()
    return {name: report[name] for name in report if name not in ("free", "total", "ratio")}


@pytest.mark.parametrize("recipe", LIMITED)
@pytest.mark.parametrize("chunk", [1, 23])
def test_a_full_cache_is_as_it_was(tiny: Any, recipe: str, chunk: int) -> None:
    """Under every cap, calls go through or change nothing."""
    model, ids = tiny(num_hidden_layers=2), prompt(110)
    free = fivefold.compress(model, recipe)
    expected = feed(model, ids, free, [30, chunk])
    most, page = free.session.pools.budget.used, 32 * 2 * 64 * 4
    refusals = 0
    for cap in (4 * page, most // 2, *range(most - 5 * page, most, page)):
        cache = fivefold.compress(model, recipe, max_bytes=cap)
        done = 0
        while done < 110:
            size, before = chunk if done else 30, held(cache)
            try:
                logits = feed(model, ids[:, done : done + size], cache, [size])
            except CacheFullError as error:
                assert one_sentence(error)
                refusals += 1
                assert held(cache) == before and cache.get_seq_length() == done
                assert cache.get_seq_length() == done
                break
            assert cache.session.pools.budget.used <= cap
            torch.testing.assert_close(logits, expected[:, done : done + size], atol=LOSSLESS, rtol=0)
            done += size
    assert refusals


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_smaller_call_after_a_full_cache(tiny: Any, family: str) -> None:
    model, ids = tiny(family), prompt(300)
    expected = generate(model, ids[:, :60], 20)
    cache = fivefold.compress(model, "full()", max_bytes=1 << 20)
    empty = cache.report()
    refused(CacheFullError, "cache is full", lambda: generate(model, prompt(400, 3), 5, cache))
    assert cache.report() == empty
    feed(model, ids[:, :40], cache, [40])
    held = cache.report()
    refused(CacheFullError, "cache is full", lambda: feed(model, prompt(4000), cache, [4000]))
    assert cache.report().as_dict() == held.as_dict() and cache.get_seq_length() == 40
    assert generate(model, ids[:, :60], 20, cache).tolist() == expected.tolist()


@pytest.mark.parametrize("recipe", ["full()", STREAMING, DUO, KIVI8])
def test_a_step_that_is_broken_off(tiny: Any, recipe: str) -> None:
    """At every step of a long decode: what a page boundary moves must come back too."""
    model, ids = tiny(), prompt(130)
    expected = feed(model, ids, fivefold.compress(model, recipe), [90, 1])
    cache, outs = fivefold.compress(model, recipe), []
    for start, stop in ((0, 90), *((i, i + 1) for i in range(90, 130))):
        error = (RuntimeError, KeyboardInterrupt)[stop % 2]
        broken_once(model, 1 + start % 2, error)
        with pytest.raises(error, match="on purpose"):
            feed(model, ids[:, start:stop], cache, [90])
        assert cache.get_seq_length() == start
        outs.append(feed(model, ids[:, start:stop], cache, [90]))
    torch.testing.assert_close(torch.cat(outs, 1), expected, atol=LOSSLESS, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_chunk_that_is_broken_off(tiny: Any, family: str) -> None:
    model, (ids, mask) = tiny(family), left_padded([90, 47])
    layers = model.config.num_hidden_layers
    expected = feed(model, ids, DynamicCache(config=model.config), [90], mask)[mask.bool()]
    cache, outs = fivefold.compress(model, "full()"), []
    for begin in range(0, 90, 30):
        for layer in range(layers):
            broken_once(model, layer)
            with pytest.raises(RuntimeError, match="on purpose"):
                feed(model, ids[:, begin : begin + 30], cache, [30], mask)
            assert cache.get_seq_length() == begin
        if begin == 30:
            cache = cache.fork()  # takes back what was broken off first
        outs.append(feed(model, ids[:, begin : begin + 30], cache, [30], mask))
    torch.testing.assert_close(torch.cat(outs, 1)[mask.bool()], expected, atol=LOSSLESS, rtol=0)


def test_a_broken_chunk_before_masks_of_ones_own(tiny: Any) -> None:
    """Masks that are given ready-made ask the cache nothing before the first layer is called."""
    model, ids = tiny("gemma3_text"), prompt(20)
    expected = feed(model, ids, fivefold.compress(model), [20])
    cache = fivefold.compress(model)
    broken_once(model, 3)
    with pytest.raises(RuntimeError, match="on purpose"):
        feed(model, ids, cache, [20])
    with torch.no_grad():
        logits = model(ids, past_key_values=cache, attention_mask=dict.fromkeys(model.config.layer_types)).logits
    torch.testing.assert_close(logits, expected, atol=LOSSLESS, rtol=0)


def test_a_broken_chunk_that_pushed_tokens_out(tiny: Any) -> None:
    """They come back."""
    model, ids = tiny(), prompt(300)
    cache = fivefold.compress(model, STREAMING)
    feed(model, ids[:, :100], cache, [100])
    broken_once(model, 2)
    with pytest.raises(RuntimeError, match="on purpose"):
        feed(model, ids[:, 100:], cache, [200])
    expected = feed(model, ids, fivefold.compress(model, STREAMING), [100, 200])
    assert torch.equal(feed(model, ids[:, 100:], cache, [200]), expected[:, 100:])


@pytest.mark.parametrize("size", [1, 70])
def test_keys_that_cannot_be_packed(tiny: Any, size: int) -> None:
    """An overflow in one layer is an error, and the cache can go on from before it."""
    model, ids = tiny(), prompt(200)
    recipe = "kivi(bits=8, residual=0)"
    cache = fivefold.compress(model, recipe)
    feed(model, ids[:, :95], cache, [95])
    saved = cache.fork()

    def overflow(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return out * math.inf

    hook = model.base_model.layers[1].self_attn.v_proj.register_forward_hook(overflow)
    refused(NonFiniteError, "beyond", lambda: feed(model, ids[:, 95 : 95 + size], cache, [size]))
    hook.remove()
    expected = feed(model, ids[:, 95:], saved, [105])
    alike(feed(model, ids[:, 95:], cache, [105]), expected, recipe)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("recipe", ["full()", STREAMING, KIVI8])
def test_forks(tiny: Any, family: str, recipe: str) -> None:
    model, ids = tiny(family), prompt(77)
    ways = [prompt(45, seed=seed) for seed in (1, 2)]
    expected = [
        feed(model, torch.cat([ids, way], 1), fivefold.compress(model, recipe), [77, 20, 1])[:, 77:] for way in ways
    ]
    for copied in (lambda cache: cache.fork(), copy.deepcopy):
        one = fivefold.compress(model, recipe)
        feed(model, ids, one, [77])
        pages = one.session.pools.budget.used
        other = copied(one)
        assert one.session.pools.budget.used == pages, "a fork copies nothing"
        outs: list[list[torch.Tensor]] = [[], []]
        for begin, stop in ((0, 20), *((i, i + 1) for i in range(20, 45))):  # in turns
            for cache, way, out in zip((one, other), ways, outs):
                out.append(feed(model, way[:, begin:stop], cache, [stop - begin]))
        for out, want in zip(outs, expected):
            torch.testing.assert_close(torch.cat(out, 1), want, atol=LOSSLESS, rtol=0)


@pytest.mark.parametrize("recipe", ["full()", STREAMING, KIVI8])
def test_memory_comes_back(tiny: Any, recipe: str) -> None:
    model, ids = tiny(), prompt(150, 2)
    cache = fivefold.compress(model, recipe)
    feed(model, ids, cache, [150])
    pools = list(cache.session.pools)
    alone = [pool.pages_in_use for pool in pools]
    fork = cache.fork()
    feed(model, prompt(40, 2), fork, [20, 1])
    assert sum(pool.pages_in_use for pool in pools) > sum(alone)
    assert cache.report().forks > 0
    del fork
    assert [pool.pages_in_use for pool in pools] == alone
    cache.free()
    assert all(pool.total_pages == 0 for pool in pools) and cache.report().total == 0
    assert cache.get_seq_length() == 0
    expected = generate(model, ids, 20, fivefold.compress(model, recipe))
    assert generate(model, ids, 20, cache).tolist() == expected.tolist()
    assert any(pool.total_pages for pool in pools)
    del cache
    assert all(pool.total_pages == 0 for pool in pools)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_reset(tiny: Any, family: str) -> None:
    model, ids = tiny(family), prompt(50)
    expected = generate(model, ids, 20)
    cache = fivefold.compress(model, "full()")
    generate(model, prompt(60, 2), 10, cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert generate(model, ids, 20, cache).tolist() == expected.tolist()


@pytest.mark.parametrize("recipe", ["full()", STREAMING, DUO, KIVI8])
def test_sequences_are_moved(tiny: Any, recipe: str) -> None:
    model, (ids, mask) = tiny(), left_padded([60, 33, 48])
    more, after = prompt(14, 6, seed=11), torch.ones(6, 14, dtype=torch.long)

    def go_on(cache: Any, rows: list[int]) -> torch.Tensor:
        whole = torch.cat([mask[rows], after[: len(rows)]], 1)
        return feed(model, more[: len(rows)], cache, [9, 1], whole)

    def fresh(rows: list[int]) -> Any:
        cache = fivefold.compress(model, recipe)
        feed(model, ids[rows], cache, [60], mask[rows])
        return cache

    for move, rows in (
        (lambda c: c.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = fresh([0, 1, 2])
        move(cache)
        torch.testing.assert_close(go_on(cache, rows), go_on(fresh(rows), rows), atol=LOSSLESS, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("legacy", [False, True])
def test_crop(tiny: Any, family: str, legacy: bool) -> None:
    model, (ids, mask) = tiny(family), left_padded([20, 12])
    cache = fivefold.compress(model, "full()")
    whole = feed(model, ids, cache, [20], mask)
    cache.crop(15 if legacy else -5)
    assert cache.get_seq_length() == 15
    torch.testing.assert_close(feed(model, ids[:, 15:], cache, [5], mask), whole[:, 15:], atol=LOSSLESS, rtol=0)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    real = mask.bool()
    torch.testing.assert_close(feed(model, ids, cache, [20], mask)[real], whole[real], atol=LOSSLESS, rtol=0)


def test_a_crop_that_cannot_be_changes_nothing(tiny: Any) -> None:
    """Layer 0 could, layer 1 cannot: neither does."""
    model, ids = tiny(), prompt(200)
    recipe = "duo(retrieval=[[0, 0], [0, 1]], sink=4, recent=20)"
    cache = fivefold.compress(model, recipe)
    feed(model, ids[:, :150], cache, [150])
    before = cache.report()
    refused(CacheStateError, "given up", lambda: cache.crop(-100))
    assert cache.report() == before and cache.get_seq_length() == 150
    expected = feed(model, ids, fivefold.compress(model, recipe), [200])[:, 150:]
    torch.testing.assert_close(feed(model, ids[:, 150:], cache, [50]), expected, atol=LOSSLESS, rtol=0)


def test_a_crop_without_room_changes_nothing(tiny: Any) -> None:
    """Tokens of a packed group come back to exact pages: room for one layer is not enough."""
    model, ids = tiny(num_hidden_layers=2), prompt(96)
    cache = fivefold.compress(model, "kivi(bits=8, residual=0)")
    feed(model, ids, cache, [96])
    fork = cache.fork()  # so that nothing is freed
    budget, page = cache.session.pools.budget, 32 * 2 * 64 * 4
    budget.trim()
    budget.limit = budget.used + cache.session.charged + page // 4 + 3 * page
    before = held(cache)
    refused(CacheFullError, "cache is full", lambda: cache.crop(-20))
    assert held(cache) == before and cache.get_seq_length() == 96
    budget.limit += page
    cache.crop(-20)
    budget.limit = None
    logits = feed(model, ids[:, 76:], cache, [1])
    fork.crop(-20)
    torch.testing.assert_close(logits, feed(model, ids[:, 76:], fork, [1]), atol=LOSSLESS, rtol=0)


@pytest.mark.parametrize("recipe", [STREAMING, KIVI8])
def test_recording_defers_what_cannot_be_undone(tiny: Any, recipe: str) -> None:
    model, ids, revocable = tiny(), prompt(260), REVOCABLE
    expected = feed(model, ids, fivefold.compress(model, recipe), [180, 1])
    cache = fivefold.compress(model, recipe)
    cache.activate_past_recording()
    assert all(layer.record_past for layer in cache.layers)
    feed(model, ids[:, :180], cache, [180])
    for _ in range(3):
        logits = feed(model, ids[:, 180 : 180 + revocable], cache, [revocable // 2, 1])
        alike(logits, expected[:, 180 : 180 + revocable], recipe)
        cache.crop(-revocable)
    feed(model, ids[:, 180:200], cache, [20])
    cache.crop(-3)
    settled = fivefold.compress(model, recipe)
    feed(model, ids[:, :197], settled, [180, 1])
    assert cache.report().exact == settled.report().exact, "the crop is when what was deferred is done"
    alike(feed(model, ids[:, 197:], cache, [9]), expected[:, 197:], recipe)


@pytest.mark.parametrize("recipe", [STREAMING, KIVI8])
def test_recording_under_a_cap(tiny: Any, recipe: str) -> None:
    """What could not be packed for lack of room waits; a call that finds none is refused."""
    model, ids = tiny(num_hidden_layers=2), prompt(120)
    expected = feed(model, ids, fivefold.compress(model, recipe), [120])
    page, refusals = 32 * 2 * 64 * 4, 0
    for cap in range(4 * page, 36 * page, 5 * page):
        cache = fivefold.compress(model, recipe, max_bytes=cap)
        cache.activate_past_recording()
        done = 0
        while done < 120:
            size = 7 if done else 50
            try:
                logits = feed(model, ids[:, done : done + size], cache, [size])
            except CacheFullError:
                refusals += 1
                break
            alike(logits, expected[:, done : done + size], recipe)
            cache.crop(-3)
            done += min(size, 120 - done) - 3
            assert cache.get_seq_length() == done
            assert cache.session.pools.budget.used <= cap
            if size < 10 and done + 7 >= 120:
                break
    assert refusals


# -- bytes --------------------------------------------------------------------------------------------------


def torch_bytes() -> dict[int, int]:
    """Bytes of every live torch storage by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or type(thing) is FakeTensor or thing.device.type != "cpu":
            continue
        # What torch.compile traced with, and what a vmap left behind in another test, has no storage of its own.
        if not torch._C._functorch.is_functorch_wrapped_tensor(thing):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    found.pop(0, None)
    return found


def tables_of(*caches: Any) -> dict[int, int]:
    """The tables of rows and pages (numpy arrays) by address."""
    arrays = []
    for bank in (bank for cache in caches for bank in cache.session.banks):
        arrays += [*bank.bounds, bank.offset, bank.chosen, bank.residual, bank.peak, *bank.exact.tables]
        arrays += [] if bank.packed is None else bank.packed.tables
    return {array.ctypes.data: array.nbytes for array in arrays if array.nbytes}


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", "full()"), ("llama", DUO), ("gemma3_text", STREAMING), ("llama", KIVI8), ("gemma3_text", KIVI8),
        ("llama", "h2o(keep=0.9)"), ("llama", f"random(keep=0.9) + {KIVI8}"), ("llama", "d2o(keep=0.9)"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_the_report_counts_what_torch_allocates(
    tiny: Any, request: pytest.FixtureRequest, family: str, recipe: str
) -> None:
    model, (ids, mask) = tiny(family), left_padded([100, 61])
    fivefold.compress(model)

    def allocated(*caches: Any) -> int:
        now, tables = torch_bytes(), tables_of(*caches)
        new = {address: size for address, size in now.items() if address not in before and address not in tables}
        return sum(new.values()) + sum(tables.values())

    def shared_total(*caches: Any) -> int:
        reports = [cache.report() for cache in caches]
        # Forks count all pages of the common pools, each; tables and sliding layers are their own.
        first, *others = reports
        return first.total + sum(other.tables + other.sliding + other.statistics for other in others)

    more, extra = torch.ones(2, 100, dtype=torch.long), prompt(100, 2)
    whole = torch.cat([mask, more], 1)
    longer = torch.cat([whole, more], 1)
    before = torch_bytes()
    gc.freeze()  # what is there already is not looked through again and again
    request.addfinalizer(gc.unfreeze)
    cache = fivefold.compress(model, recipe)
    assert cache.report().total == allocated(cache) < 100
    feed(model, ids, cache, [100], mask)
    assert cache.report().total == allocated(cache)
    feed(model, extra, cache, [1], whole)
    assert cache.report().total == allocated(cache) > 300_000
    fork = cache.fork()
    assert shared_total(cache, fork) == allocated(cache, fork)
    feed(model, extra, fork, [40, 1], longer)
    assert shared_total(cache, fork) == allocated(cache, fork)
    assert shared_total(fork, cache) == allocated(cache, fork)
