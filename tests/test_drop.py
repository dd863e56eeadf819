"""LLM-Drop: what is left out does not run, and nothing else changes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache

import families
import fivefold
from fivefold.calibrate.profile import Profile, save_profile, signature
from fivefold.errors import CacheStateError, FivefoldError, RecipeError, SavedCacheError, UnsupportedModelError
from fivefold.models.capture import capturing
from fivefold.models.huggingface import make_cache
from fivefold.models.specs import attention_modules, decoder_layers
from fivefold.plan import memory, room
from fivefold.plan.machine import find_machine
from fivefold.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = Path(__file__).parent / "golden" / "llm_drop.safetensors"
PARALLEL = ("cohere", "cohere2", "gpt_neox", "phi")
"""Families in which attention and MLP stand side by side, each given the layer's input."""


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    yield {}


@pytest.fixture
def model(models: dict[str, Any], family: str) -> Any:
    """A model of a family whose biases are not zero."""
    if family not in models:
        models.clear()  # tests go family by family
        models[family] = biased(families.build(family))
    yield models[family]
    fivefold.restore(models[family])


def biased(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_(0, 0.5, generator=generator)
    return model


def text(length: int = 40, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def compressible(model: Any) -> list[int]:
    return sorted(make_cache(model, Recipe()).session.stores)


def zeroed(model: Any, layers: Any) -> Any:
    """A copy whose attention modules give zeros in these layers. They still run, so that a DynamicCache counts."""
    twin = copy.deepcopy(model)
    for index, module in attention_modules(twin).items():
        if index in layers:

            def nothing(*args: Any, plain: Any = module.forward, **kwargs: Any) -> Any:
                out, weights = plain(*args, **kwargs)
                return torch.zeros_like(out), weights

            module.forward = nothing
    return twin


def llama(**changes: Any) -> Any:
    return families.build("llama", **changes)


@contextmanager
def broken(*modules: torch.nn.Module) -> Iterator[None]:
    """Whatever runs one of these fails."""

    def fail(*args: Any) -> None:
        raise AssertionError("it was called")

    hooks = [part.register_forward_pre_hook(fail) for module in modules for part in module.children()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# -- what is compared -------------------------------------------------------------------------------------


def test_similarity_is_that_of_the_official_code() -> None:
    golden = load_file(GOLDEN)
    method: Any = Recipe.parse("drop()").methods[0]
    model = families.build("llama", seed=3)
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    sums, whole = method.learner(specs), method.learner(specs)
    for sample in range(2):
        for layer in range(4):
            sums.see(layer, {name: golden[name][layer, sample : sample + 1] for name in ("residual", "added")})
    with torch.inference_mode(), capturing(model, method.captures, whole.see):
        for ids in golden["ids"]:
            model(ids[None], use_cache=False)
    for learner in (sums, whole):
        _, found = learner.finish(lambda *args: None)
        torch.testing.assert_close(found["similarity"], golden["similarity"], atol=1e-6, rtol=1e-6)
        assert found["similarity"].argsort(descending=True)[:3].tolist() == golden["dropped"].tolist()
    assert (golden["similarity"] - golden["without_norm"]).abs().min() > 0.1, "drop_norm=False compares other things"


@pytest.mark.parametrize("family", list(families.TAKEN))
def test_what_is_captured_is_what_is_added(family: str, model: Any) -> None:
    """Whatever stands between the attention module and the sum: norms, factors, an MLP beside it."""
    ids, seen = text(20), {}
    inner, outer = {}, {}
    modules, layers = attention_modules(model), decoder_layers(model)
    # What is computed from the sum: the input of the first module that runs after attention and any norm of its output.
    after = {
        "gemma2": "pre_feedforward_layernorm", "gemma3_text": "pre_feedforward_layernorm", "exaone4": "mlp",
        "gemma4_text": "pre_feedforward_layernorm", "olmo2": "mlp", "olmo3": "mlp", "gpt2": "ln_2",
        "gpt_bigcode": "ln_2", "apertus": "feedforward_layernorm", "lfm2": "ffn_norm", "opt": "final_layer_norm",
    }.get(family, "post_attention_layernorm")  # fmt: skip
    with torch.inference_mode():
        with capturing(model, ("residual", "added"), lambda layer, found: seen.update({layer: found})):
            model(ids, use_cache=False)
        if family in PARALLEL:
            twins = [zeroed(model, [index]) for index in modules]
            for index, twin in zip(modules, twins):
                hook = layers[index].register_forward_hook(lambda m, a, o, i=index: outer.update({i: o}))
                model(ids, use_cache=False)
                hook.remove()
                hook = decoder_layers(twin)[index].register_forward_hook(lambda m, a, o, i=index: inner.update({i: o}))
                twin(ids, use_cache=False)
                hook.remove()
                first = (lambda x: x[0] if isinstance(x, tuple) else x)(outer[index])
                second = (lambda x: x[0] if isinstance(x, tuple) else x)(inner[index])
                torch.testing.assert_close(seen[index]["added"], first - second, atol=1e-5, rtol=1e-4)
            return
        if family == "gemma3n_text":  # four streams, and a mean with another branch: see the shapes alone
            assert all(one["added"].shape == one["residual"].shape == (1, 20, 64) for one in seen.values())
            return
        hooks = [
            getattr(layers[index], after).register_forward_pre_hook(lambda m, a, i=index: inner.update({i: a[0]}))
            for index in seen
        ]
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert sorted(seen) == sorted(modules)
    for index, found in seen.items():
        assert found["added"].abs().max() > 0
        torch.testing.assert_close(found["residual"] + found["added"], inner[index].view(1, 20, -1))


# -- the model without its modules ------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(families.TAKEN))
def test_outputs_are_those_of_modules_that_give_zeros(family: str, model: Any) -> None:
    """Prefill in pieces and steps, in a batch with padding, with biases in all projections."""
    layers = compressible(model)
    if len(layers) == 1:
        with pytest.raises(RecipeError, match="keep at least one"):
            fivefold.compress(model, f"drop(layers={layers})")
        return
    gone = layers[:1] if len(layers) == 2 else [layers[0], layers[-1]]
    twin = zeroed(model, gone)
    ours, theirs = fivefold.compress(model, f"drop(layers={gone})"), DynamicCache(config=twin.config)
    ids, mask = text(33, 2), torch.ones(2, 33, dtype=torch.long)
    mask[0, :7] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        for first, stop in ((0, 20), (20, 29), *((i, i + 1) for i in range(29, 33))):
            given = {"attention_mask": mask[:, :stop], "position_ids": places[:, first:stop]}
            got, want = (
                one(ids[:, first:stop], past_key_values=cache, **given).logits
                for one, cache in ((model, ours), (twin, theirs))
            )
            there = mask[:, first:stop].bool()
            torch.testing.assert_close(got[there], want[there], atol=2e-5, rtol=1e-4)
    assert sorted(ours.session.stores) == [i for i in layers if i not in gone]


def test_nothing_of_a_module_runs_and_nothing_is_held() -> None:
    model = biased(llama(attention_bias=True))
    gone, kept = [0, 2], [1, 3]
    cache = fivefold.compress(model, f"drop(layers={gone})")
    modules = attention_modules(model)
    with torch.inference_mode(), broken(*(modules[i] for i in gone)):
        model(text(70), past_key_values=cache)
        for token in text(3)[0]:
            model(token.view(1, 1), past_key_values=cache)
        with pytest.raises(AssertionError, match="it was called"):
            model(text(3))
        out = model.generate(text(5), past_key_values=cache.new(), max_new_tokens=5, do_sample=False)
    assert out.shape == (1, 10)
    report, exact = cache.report(), fivefold.compress(model, "full()")
    with torch.inference_mode():
        model(text(70), past_key_values=exact)
        for token in text(3)[0]:
            model(token.view(1, 1), past_key_values=exact)
    whole = exact.report()
    assert list(cache.session.stores) == kept
    assert 2 * report.exact == whole.exact and 2 * report.slack == whole.slack and 2 * report.tables == whole.tables
    assert report.exact_equivalent == whole.exact_equivalent and report.kept_tokens == 0.5
    assert sum(pool.allocated_bytes for pool in cache.session.pools) == report.exact + report.slack + report.free
    fivefold.restore(model)
    assert not any("forward" in vars(module) for module in modules.values())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model).values())


NORMS = {
    "llama": "input_layernorm", "gemma2": "input_layernorm", "gpt_neox": "input_layernorm", "gpt2": "ln_1",
    "opt": "self_attn_layer_norm", "lfm2": "operator_norm", "granite": "input_layernorm", "mixtral": "input_layernorm",
}  # fmt: skip
"""Families whose norm before attention is for attention alone."""


@pytest.mark.parametrize("family", [*NORMS, *PARALLEL[:2], "phi", "olmo2"])
def test_a_norm_for_attention_alone_does_not_run(family: str, model: Any) -> None:
    """After the first forward; where the MLP is given what it makes, it goes on."""
    layer, ids = compressible(model)[-1], text(20)
    whole = decoder_layers(model)[layer]
    twin = zeroed(model, [layer])
    cache, counts = fivefold.compress(model, f"drop(layers=[{layer}])"), []
    norm = getattr(whole, NORMS.get(family, "input_layernorm"), None)
    if norm is not None:  # what it makes, which its hooks see also where it is idle
        norm.register_forward_hook(lambda m, args, out: counts.append(out is args[0]))
    with torch.inference_mode():
        for _ in range(2):
            got = model(ids, past_key_values=cache.new()).logits
            torch.testing.assert_close(got, twin(ids).logits, atol=2e-5, rtol=1e-4)
        assert counts[:2] == ([False, True] if family in NORMS else [] if family == "olmo2" else [False, False])
        counts.clear()
        model(ids)
        assert not any(counts)
        copied = copy.deepcopy(model)
        own = fivefold.compress(copied, f"drop(layers=[{layer}])")
        torch.testing.assert_close(copied(ids, past_key_values=own).logits, got)
    for one in (model, copied):
        fivefold.restore(one)
        assert not any("forward" in vars(module) for module in one.modules())
    if norm is not None:
        norm._forward_hooks.clear()


def test_with_any_other_cache_nothing_changes() -> None:
    model = llama()
    ids = text(30)
    with torch.inference_mode():
        want, plain = model(ids).logits, DynamicCache(config=model.config)
        drop, full = fivefold.compress(model, "drop(layers=[1])"), fivefold.compress(model, "full()")
        less = model(ids, past_key_values=drop).logits
        assert (less - want).abs().max() > 0.01
        for given in ({}, {"past_key_values": plain}, {"past_key_values": full}):
            torch.testing.assert_close(model(ids, **given).logits, want, atol=1e-5, rtol=1e-5)
        other = fivefold.compress(model, "drop(layers=[0, 1])")
        got = model(ids, past_key_values=other).logits
        torch.testing.assert_close(got, zeroed(model, [0, 1])(ids).logits, atol=1e-5, rtol=1e-5)
        again = fivefold.compress(model, "drop(layers=[1])")
        assert torch.equal(model(ids, past_key_values=again).logits, less)
        fivefold.restore(model)
        assert torch.equal(model(ids).logits, want)
        with pytest.raises(CacheStateError, match="not prepared"):
            model(ids[:, :1], past_key_values=drop)


def test_threads_with_different_caches() -> None:
    model, ids = llama(), text(30)
    caches: list[Any] = [fivefold.compress(model, r) for r in ("drop(layers=[1])", "full()", "drop(layers=[0, 3])")]
    wanted, found = [], {}
    with torch.inference_mode():
        for gone in ([1], [], [0, 3]):
            wanted.append(zeroed(llama(), gone)(ids).logits)

    def run(number: int) -> None:
        with torch.inference_mode():
            found[number] = [model(ids, past_key_values=caches[number].new()).logits for _ in range(15)]

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, want in enumerate(wanted):
        for got in found[number]:
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [0, []])
def test_none_is_full(layers: Any) -> None:
    model, ids = llama(), text(50)
    with torch.inference_mode():
        outs = []
        for recipe in ("full()", f"drop(layers={layers})"):
            cache = fivefold.compress(model, recipe)
            outs.append([model(part, past_key_values=cache).logits for part in ids.split([40, 1, 9], 1)])
            assert not any("forward" in vars(module) for module in attention_modules(model).values())
    assert all(torch.equal(*pair) for pair in zip(*outs))


def test_layers_called_by_hand_and_a_copied_model() -> None:
    """The first layer whose attention runs begins the forward, the last one ends it."""
    model, ids = llama(), text(12)
    recipe = "drop(layers=[0, 3])"
    with torch.inference_mode():
        cache, by_hand = fivefold.compress(model, recipe), fivefold.compress(model, recipe)
        want = model.model(ids, past_key_values=cache).last_hidden_state
        for part, first in ((ids[:, :9], 0), (ids[:, 9:], 9)):
            hidden, places = model.model.embed_tokens(part), torch.arange(first, first + part.shape[1])[None]
            turns = model.model.rotary_emb(hidden, places)
            for layer in model.model.layers:
                hidden = layer(hidden, position_embeddings=turns, position_ids=places, past_key_values=by_hand)
        got = model.model.norm(hidden)
        torch.testing.assert_close(got, want[:, 9:], atol=1e-5, rtol=1e-5)
        assert by_hand.get_seq_length() == 12
        twin = copy.deepcopy(model)
        with broken(twin.model.layers[0].self_attn):
            own = fivefold.compress(twin, recipe)
            torch.testing.assert_close(twin.model(ids, past_key_values=own).last_hidden_state, want)
        fivefold.restore(twin)
        assert not twin.model.layers[0]._forward_hooks and not twin.model.layers[0]._forward_pre_hooks
        assert "forward" not in vars(twin.model.layers[0].self_attn)
        assert torch.equal(model.model(ids, past_key_values=cache.new()).last_hidden_state, want)


def test_what_others_put_in_the_place_of_forward_stays() -> None:
    """As accelerate does, before us or after us."""
    model, ids = llama(), text(10)
    module, calls = model.model.layers[1].self_attn, []
    plain = module.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    module.forward = theirs
    with torch.inference_mode():
        cache = fivefold.compress(model, "drop(layers=[1])")
        model(ids, past_key_values=cache)
        assert not calls
        model(ids)
        assert len(calls) == 1
    fivefold.restore(model)
    assert module.forward is theirs


def test_what_accelerate_wraps_later() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="needs accelerate")
    model, ids = llama(), text(10)
    layer = model.model.layers[1]
    with torch.inference_mode():
        first = fivefold.compress(model, "drop(layers=[1])")
        want = model(ids, past_key_values=first).logits
        for module in (layer.self_attn, layer.input_layernorm):
            hooks.add_hook_to_module(module, hooks.ModelHook())
        with broken(layer.self_attn):
            assert torch.equal(model(ids, past_key_values=first.new()).logits, want)
        plain = model(ids).logits
        fivefold.restore(model)
        assert torch.equal(model(ids).logits, plain)
        for module in (layer.self_attn, layer.input_layernorm):
            hooks.remove_hook_from_module(module)
            assert "fivefold" not in type(module.forward).__module__
        assert torch.equal(model(ids).logits, plain) and not torch.equal(plain, want)
        again = fivefold.compress(model, "drop(layers=[1])")
        assert torch.equal(model(ids, past_key_values=again).logits, want)


@pytest.mark.parametrize(
    "rest",
    [
        "full()", "kivi(bits=4, residual=32)", "h2o(keep=0.5)", "d2o(keep=0.5)", "duo(retrieval=[[1, 0]], recent=40)",
        "tidal(top=32, full_layers=0, select_layers=[0])",
    ],
)  # fmt: skip
def test_forks_beams_and_other_slots(rest: str) -> None:
    """As the model whose modules give zeros, with the same recipe for the layers that are left."""
    model, ids = llama(), text(90)
    gone, others = [0], "" if rest == "full()" else f" + {rest}"
    cache = fivefold.compress(model, f"drop(layers={gone}){others}")
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        fork = cache.fork()
        one, two = (model(text(1, seed=3), past_key_values=c).logits for c in (cache, fork))
        assert torch.equal(one, two) and fork.absent == cache.absent == {0}
        beams = model.generate(
            ids, past_key_values=cache.new(), max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0
        )
        assert beams.shape == (1, 96)
        if rest == "full()":
            want = zeroed(model, gone).generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, pad_token_id=0)
            assert torch.equal(beams, want)


def test_assisted_decoding_and_generate_many() -> None:
    model, ids = llama(), text(30)
    recipe = "drop(layers=[0, 2])"
    with torch.inference_mode():
        given = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        want = zeroed(model, [0, 2]).generate(ids, **given)
        for more in ({}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": llama(seed=7)}):
            cache = fivefold.compress(model, recipe)
            assert torch.equal(model.generate(ids, past_key_values=cache, **given, **more), want), more
        requests = [fivefold.Request(ids[0].tolist(), max_new_tokens=12)] * 2
        for done in fivefold.generate_many(model, recipe, requests):
            assert list(done.tokens) == want[0, 30:].tolist()


@pytest.mark.slow
def test_steps_from_fixed_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph where there is a GPU, else Triton's interpreter; the first call of the cache is a step."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setenv("FIVEFOLD_KERNELS", "auto" if torch.cuda.is_available() else "triton")
    model = llama(num_hidden_layers=3, head_dim=64).to("cuda" if torch.cuda.is_available() else "cpu")
    want = zeroed(model, [1])
    cache = fivefold.compress(model, "drop(layers=[1])", cuda_graph=True)
    plain, ids = DynamicCache(config=model.config), text(26).to(model.device)
    with torch.inference_mode():
        for part in ids.split([20, 1, 1, 1, 1, 1, 1], 1):
            got = model(part, past_key_values=cache).logits
            torch.testing.assert_close(got, want(part, past_key_values=plain).logits, atol=2e-3, rtol=2e-3)
    assert cache.step.replays == 6 and cache.step.failed is None


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("drop(layers=4)", "leave out at most 3"),
        ("drop(layers=[0, 1, 2, 3])", "keep at least one"),
        ("drop(layers=[0, 4])", "names layer 4"),
        ("drop(layers=[1, 1])", "names a layer twice"),
        ("drop(layers=[-1])", "counted from 0"),
        ("drop(layers=2)", "fivefold calibrate"),
        ("drop(layers=-1)", "out of range"),
    ],
)
def test_bad_layers(recipe: str, said: str) -> None:
    with pytest.raises(FivefoldError, match=said):
        fivefold.compress(llama(), recipe)


def test_layers_that_others_share_and_windows() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    for family in ("gemma3n_text", "gemma4_text"):
        more = {"activation_sparsity_pattern": [0.0] * 6} if family == "gemma3n_text" else {}
        model = biased(families.build(family, num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=2, **more))
        with pytest.raises(RecipeError, match="layer 3, whose keys and values layer 5"):
            fivefold.compress(model, "drop(layers=[3])")
        with pytest.raises(RecipeError, match="names layer 0"):
            fivefold.compress(model, "drop(layers=[0])")  # a window, which stays transformers' own
        twin, ids = zeroed(model, [1]), text(30)
        with torch.inference_mode():
            cache = fivefold.compress(model, "drop(layers=[1])")
            got = model(ids, past_key_values=cache).logits
            torch.testing.assert_close(got, twin(ids).logits, atol=1e-4, rtol=1e-4)
        sliding = fivefold.compress(model, "drop(layers=[0, 1])", sliding=True)
        with torch.inference_mode():
            got = model(ids, past_key_values=sliding).logits
            torch.testing.assert_close(got, zeroed(model, [0, 1])(ids).logits, atol=1e-4, rtol=1e-4)
        assert sliding.absent == {0, 1}


def test_a_norm_with_a_bias_behind_attention_is_refused() -> None:
    """Zeros would not stay zeros there; nothing is left of the forward that showed it."""
    model = families.build("gemma2")
    layer = model.model.layers[1]
    layer.post_attention_layernorm = torch.nn.LayerNorm(64)
    cache, ids = fivefold.compress(model, "drop(layers=[1])"), text(10)
    with torch.inference_mode():
        model(ids, past_key_values=cache)  # its bias is zero
        fivefold.restore(model)
        layer.post_attention_layernorm.bias.data.fill_(0.1)
        cache = fivefold.compress(model, "drop(layers=[1])")
        with pytest.raises(UnsupportedModelError, match="layer 1 cannot be left out"):
            model(ids, past_key_values=cache)
        assert cache.get_seq_length() == 0
        assert model(ids).logits.isfinite().all()


# -- profiles, files, plans -------------------------------------------------------------------------------


def profile(model: Any, folder: Path, similarity: list[float]) -> str:
    tensors = {"layers": torch.arange(len(similarity)), "similarity": torch.tensor(similarity)}
    save_profile(folder, Profile("drop", signature(model.config), {}, tensors))
    return str(folder)


def test_the_most_similar_go_and_saved_caches_know(tmp_path: Path) -> None:
    model, ids = llama(), text(40)
    where = profile(model, tmp_path / "profile", [0.2, 0.9, 0.5, 0.8])
    recipe = f'drop(layers=2, profile="{where}")'
    cache = fivefold.compress(model, recipe)
    assert cache.absent == {1, 3} and Recipe.parse(str(cache.recipe)) == cache.recipe
    with torch.inference_mode():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "saved")
        back = fivefold.load_cache(model, tmp_path / "saved")
        one, two = (model(text(3, seed=2), past_key_values=c).logits for c in (cache, back))
    assert torch.equal(one, two) and back.absent == {1, 3}
    profile(model, tmp_path / "profile", [0.9, 0.2, 0.5, 0.8])
    with pytest.raises(SavedCacheError, match="same recipe, profile"):
        fivefold.load_cache(model, tmp_path / "saved")


def test_a_plan_reads_fewer_weights() -> None:
    from fivefold.plan import advise
    from fivefold.plan.fit import llama as shape_of

    wide = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    place = room.Place(shape_of(wide), find_machine("h100"))
    full, half = (Recipe.parse(text) for text in ("full()", "drop(layers=16)"))
    runs = memory.running(half, place.shape, place.dtype)
    modules = 16 * 4096 * 128 * 2 * (32 + 8)
    assert place.shape.parameters - runs.parameters == modules
    assert place.shape.weight_bytes - runs.weight_bytes == 2 * modules
    assert memory.running(full, place.shape, place.dtype) is place.shape
    one, two = (room.cache_bytes(recipe, place, 4096, 1) for recipe in (full, half))
    assert one == 2 * two
    slow, fast = (advise.step_of(recipe, place, 131072, 1)[0] for recipe in (full, half))
    assert slow is not None and fast is not None and 1.2 < slow.seconds / fast.seconds < 2
    assert "fivefold calibrate" in memory.assumptions(half, place.shape)[0] and not memory.assumptions(
        full, place.shape
    )
    whole, part = (advise.first_of(recipe, place, 32768) for recipe in (full, half))
    assert whole is not None and part is not None and part.seconds < 0.85 * whole.seconds


@pytest.mark.model
@pytest.mark.slow
def test_on_the_embedded_model() -> None:
    """The modules that the paper's measure names cost little, and a passkey is found without four of them."""
    import random

    from fivefold.evaluate.demo import document
    from fivefold.evaluate.score import generate
    from fivefold.evaluate.tasks import holds, tasks
    from fivefold.models import embedded

    model, tokenizer = embedded.load()
    method: Any = Recipe.parse("drop()").methods[0]
    order = method.order([store.spec for store in make_cache(model, Recipe()).session.stores.values()])
    assert order[:2] == [25, 26] and order[-1] == 0 and 1 in order[-3:]
    ids = torch.tensor([tokenizer(document(), add_special_tokens=False).input_ids[:640]])
    sample = tasks()["passkey"]().make(tokenizer, 384, random.Random("drop"))
    with torch.inference_mode():
        exact = model(ids).logits[0, -128:].log_softmax(-1)
        # Of one text; the mean of several is in docs/methods.md (0.036 and 0.256).
        for count, most in ((1, 0.08), (4, 0.45)):
            cache = fivefold.compress(model, f"drop(layers={count})")
            logs = model(ids, past_key_values=cache).logits[0, -128:].log_softmax(-1)
            assert 0.001 < float((exact.exp() * (exact - logs)).sum(-1).mean()) <= most
            cache = cache.new()
            model(torch.tensor([sample.prefix]), past_key_values=cache, logits_to_keep=1)
            (question,) = sample.questions
            assert holds(generate(model, tokenizer, cache, question.text), question.answer)
