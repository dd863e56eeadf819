"""What people do on the first day: wrappers, quantised and offloaded weights, models that others use too."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import families
import fivefold
from conftest import quick
from fivefold.errors import CacheStateError, FivefoldError, InputError
from recipes import RECIPES, written

pytestmark = pytest.mark.usefixtures("one_thread")


def text(length: int = 60, batch: int = 1, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 120, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: Any, ids: torch.Tensor, cache: Any = None, new: int = 10, **given: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **given)


# -- a prepared model is as it was for everybody else -----------------------------------------------------


@pytest.mark.parametrize(
    "chosen", ["eager", "sdpa", pytest.param("flex_attention", marks=[pytest.mark.slow, pytest.mark.release])]
)
def test_without_our_cache_the_user_has_what_was_chosen(chosen: str) -> None:
    model, plain = families.build("llama"), families.build("llama")
    for one in (model, plain):
        one.set_attn_implementation(chosen)
    cache = fivefold.compress(model, "full()")
    ids = greedy(model, text(), cache)
    assert torch.equal(ids, greedy(plain, text()))
    assert model.config._attn_implementation == chosen
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :9] = 0
    calls: list[dict[str, Any]] = [{"use_cache": False}, {"attention_mask": mask}]
    calls += [{"output_attentions": True}] if chosen == "eager" else []
    for given in calls:
        with torch.no_grad():
            ours, theirs = (one(text(batch=2), **given) for one in (model, plain))
        assert torch.equal(ours.logits, theirs.logits), given
        if "output_attentions" in given:
            assert len(ours.attentions) == 4
            assert all(torch.equal(a, b) for a, b in zip(ours.attentions, theirs.attentions))
    if chosen == "flex_attention":
        return  # it has no gradients on a CPU
    loss = model(text(batch=2), labels=text(batch=2)).loss
    loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_the_choice_may_change_while_a_cache_lives() -> None:
    model = families.build("llama")
    cache, reference = fivefold.compress(model, "full()"), DynamicCache(config=model.config)
    for number, chosen in enumerate(("sdpa", "eager", "sdpa")):
        model.set_attn_implementation(chosen)
        with torch.no_grad():
            out = [model(text(20, seed=number), past_key_values=one).logits for one in (cache, reference)]
        torch.testing.assert_close(*out, atol=1e-4, rtol=1e-4)


def test_models_that_share_a_configuration() -> None:
    first = families.build("llama")
    other = type(first)(first.config)
    families.widen(other, seed=3)
    other.set_attn_implementation("eager")
    wanted = greedy(other, text())
    got = greedy(first, text(), fivefold.compress(first, "full()"))
    assert torch.equal(got, greedy(first, text()))
    assert torch.equal(greedy(other, text()), wanted)
    with torch.no_grad():
        assert other(text(), output_attentions=True).attentions[0] is not None
    with pytest.raises(CacheStateError, match="not prepared"), torch.no_grad():
        other(text(), past_key_values=fivefold.compress(first, "full()"))


def test_threads_with_and_without_our_cache() -> None:
    """One model in two threads: each call has its own attention, whoever is in the middle of another."""
    model = families.build("gpt_oss")  # sinks: SDPA would be wrong
    fivefold.compress(model, "full()")
    wanted, wrong = greedy(model, text(), new=6), []

    def run(make: Callable[[], Any]) -> None:
        for _ in range(8):
            if not torch.equal(greedy(model, text(), make(), new=6), wanted):
                wrong.append(make)

    makers = (lambda: fivefold.compress(model, "full()"), lambda: DynamicCache(config=model.config), lambda: None)
    threads = [threading.Thread(target=run, args=(make,)) for make in makers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model.config._attn_implementation == "eager"


def test_continuous_batching_of_transformers_goes_on() -> None:
    model = families.build("llama")
    fivefold.compress(model, "full()")
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no generate_batch")
    assert model.config._attn_implementation == "sdpa"
    wanted = greedy(model, text(20), new=5)[0, 20:].tolist()
    from transformers import ContinuousBatchingConfig, GenerationConfig

    settings = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)  # or it takes all memory there is

    def run(model: Any) -> Any:
        given = {"generation_config": settings, "continuous_batching_config": small, "warmup": False}
        return model.generate_batch(inputs=[text(20)[0].tolist()], **given)

    try:
        out = run(model)
    except Exception as error:  # not everywhere without a GPU
        with pytest.raises(type(error)):
            run(families.build("llama"))
        return
    assert next(iter(out.values())).generated_tokens == wanted


class Wrapper(torch.nn.Module):
    """As DataParallel and others do it: the model as an attribute."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module


def test_hooks_are_put_on_once_and_go_from_inside_and_outside() -> None:
    model = families.build("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}

    def counted() -> int:
        return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())

    fivefold.compress(model, "full()")
    once = counted()
    fivefold.compress(model, "kivi()")
    assert counted() == once > 0
    fivefold.restore(Wrapper(Wrapper(model)))
    assert counted() == 0
    for name, module in model.named_modules():
        assert {key for key in vars(module) if "fivefold" in key or key == "forward"} <= set(before[name])
    fivefold.compress(model, "full()")
    twin = copy.deepcopy(model)
    fivefold.restore(model.model)
    fivefold.restore(model)
    assert counted() == 0
    assert torch.equal(greedy(twin, text(), fivefold.compress(twin, "full()")), greedy(model, text()))


# -- weights of any kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=8)"])
def test_weights_in_buffers(recipe: str) -> None:
    model = torch.ao.quantization.quantize_dynamic(families.build("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    assert torch.equal(greedy(model, text(), fivefold.compress(model, recipe)), greedy(model, text()))


def test_no_parameters_at_all() -> None:
    """As GPTQ and AWQ have it: everything is a buffer."""
    model = families.build("llama")
    wanted = greedy(model, text())
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if weight is not None:
                del module._parameters[name]
                module.register_buffer(name, weight.data)
    assert not list(model.parameters())
    cache = fivefold.compress(model, "kivi(bits=8)")
    with torch.no_grad():
        logits = model(text(), past_key_values=cache).logits
    assert int(logits[0, -1].argmax()) == int(wanted[0, 60])


def test_a_dtype_that_attention_alone_has(tmp_path: Any) -> None:
    """Keys in bfloat16 from a model whose first weights are float32: the cache is what attention delivers."""
    model = families.build("llama").to(torch.bfloat16)
    wanted = greedy(model, text())
    model.model.embed_tokens.float()
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out.to(torch.bfloat16))
    cache = fivefold.compress(model, "kivi(bits=8)")
    assert torch.equal(greedy(model, text(), cache)[0, :62], wanted[0, :62])
    assert {store.spec.dtype for store in cache.session.stores.values()} == {torch.bfloat16}
    double = families.build("llama").double()
    with pytest.raises(FivefoldError, match="float64"):
        greedy(double, text(), fivefold.compress(double, "full()"))


def test_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = families.build("llama")
    with pytest.raises(FivefoldError, match="no weights"):
        fivefold.compress(model, "full()")


def test_weights_on_the_host_or_the_disk(tmp_path: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    wanted = greedy(families.build("llama"), text())
    for where in ("cpu", "disk"):
        model = families.build("llama")
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device="cpu")
        else:
            accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
        assert torch.equal(greedy(model, text(), fivefold.compress(model, "full()")), wanted)
        fivefold.restore(model)
        assert torch.equal(greedy(model, text()), wanted)
        wrapped = families.build("llama")
        fivefold.compress(wrapped, "full()")  # the other way round
        accelerate.cpu_offload(wrapped, execution_device="cpu")
        assert torch.equal(greedy(wrapped, text(), fivefold.compress(wrapped, "full()")), wanted)
        fivefold.restore(wrapped)
        assert torch.equal(greedy(wrapped, text()), wanted)


def test_lora() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
    model = peft.get_peft_model(families.build("llama"), settings).eval()
    plain = greedy(model, text())
    assert torch.equal(greedy(model, text(), fivefold.compress(model, "full()")), plain)
    with model.disable_adapter():
        bare = greedy(model, text())
        assert torch.equal(greedy(model, text(), fivefold.compress(model, "full()")), bare)
    assert not torch.equal(bare, plain)
    fivefold.restore(model)
    fivefold.compress(model.base_model.model, "full()")
    fivefold.restore(model)
    assert not any("_fivefold_hooks" in vars(module) for module in model.modules())
    merged = model.merge_and_unload()
    assert torch.equal(greedy(merged, text(), fivefold.compress(merged, "full()")), greedy(merged, text()))


def test_torchao_int8() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = families.build("llama")
    try:
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        wanted = greedy(model, text())
    except Exception as error:
        pytest.skip(f"torchao does not run here: {error}")
    assert torch.equal(greedy(model, text(), fivefold.compress(model, "full()")), wanted)


@pytest.mark.parametrize("weights", ["qint8", "qint4"])
def test_quanto(weights: str) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = families.build("llama")
    try:
        quanto.quantize(model, weights=getattr(quanto, weights))
        quanto.freeze(model)
        wanted = greedy(model, text())
    except Exception as error:
        pytest.skip(f"quanto does not run here: {error}")
    assert torch.equal(greedy(model, text(), fivefold.compress(model, "full()")), wanted)


def test_bitsandbytes_int8() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = families.build("llama")
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                made = bnb.nn.Linear8bitLt(child.in_features, child.out_features, bias=False, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
                setattr(module, name, made)
    try:
        model = model.to("cpu")
        wanted = greedy(model, text())
    except Exception as error:
        pytest.skip(f"bitsandbytes does not run here: {error}")
    assert torch.equal(greedy(model, text(), fivefold.compress(model, "full()")), wanted)


# -- what generate() and pipelines do ---------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=8, residual=32)", "streaming(sink=4, recent=200)"])
def test_assistants_may_guess_any_number_of_tokens(recipe: str) -> None:
    """Also more than are left alone by themselves: nothing is packed that may still be taken back."""
    model, ids = families.build("llama"), text(30).repeat(1, 6)
    assistant = families.build("llama", seed=7)
    for given in (
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 150},
        {"assistant_model": assistant, "num_assistant_tokens": 100},
    ):
        plain = greedy(model, ids, fivefold.compress(model, recipe), new=20)
        assert torch.equal(greedy(model, ids, fivefold.compress(model, recipe), new=20, **given), plain), given


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in RECIPES
        if name in ("full", "kivi4", "gear", "mikv", "duo+kivi", "cskv", "rotatekv", "h2o", "snapkv", "tidal+kivi")
    ],
)
def test_later_turns_padded_to_unequal_lengths(name: str) -> None:
    """Each sequence of a batch ends where it ends when it is alone."""
    model = families.build("llama")
    recipe = written(name, model)
    first, second, third = text(64, 2), text(30, 2, seed=5), text(5, 2, seed=6)
    mask = torch.ones(2, 99, dtype=torch.long)
    mask[0, 64:72] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache, out = fivefold.compress(model, recipe), None
    alone = []
    with torch.no_grad():
        for ids, stop in ((first, 64), (second, 94), (third, 99)):
            at = places[:, stop - ids.shape[1] : stop]
            out = model(ids, attention_mask=mask[:, :stop], position_ids=at, past_key_values=cache).logits[:, -1]
        for row, skipped in ((0, 8), (1, 0)):
            own = fivefold.compress(model, recipe)
            for ids, at in ((first, 0), (second, skipped), (third, 0)):
                last = model(ids[row : row + 1, at:], past_key_values=own).logits[:, -1]
            alone.append(last)
    assert cache.lengths().tolist() == [91, 99]
    torch.testing.assert_close(out, torch.cat(alone), atol=2e-3, rtol=1e-2)


def test_pipelines_and_streamers() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

    words = {f"w{number}": number for number in range(families.VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", bos_token="w1", unk_token="w2")
    model = families.build("llama")
    said = " ".join(f"w{number}" for number in text(40)[0].tolist())
    run = pipeline("text-generation", model=model, tokenizer=tokenizer)
    given = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    cache = fivefold.compress(model, "full()")
    assert run(said, past_key_values=cache, **given) == run(said, **given)
    assert cache.get_seq_length() >= 47
    wanted = greedy(model, text(40), new=8)[0, 40:].tolist()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    streamed = {"past_key_values": cache.new(), "max_new_tokens": 8, "do_sample": False, "streamer": streamer}
    thread = threading.Thread(target=model.generate, kwargs={"input_ids": text(40), **streamed})
    thread.start()
    assert "".join(streamer).split() == [f"w{number}" for number in wanted]
    thread.join()


def test_training_is_said_in_a_sentence() -> None:
    model = families.build("llama").train()
    with pytest.raises(CacheStateError, match="does not train"):
        model(text(), past_key_values=fivefold.compress(model, "full()"))
    model.gradient_checkpointing_enable()
    loss = model(text(), labels=text()).loss  # without our cache all is as ever
    loss.backward()
    with torch.no_grad(), pytest.raises(FivefoldError, match="gradient checkpointing"):
        model(text(), past_key_values=fivefold.compress(model, "full()"))


# -- shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", quick([24, 80, 8, 72, 112, 248], 2))
@pytest.mark.parametrize(
    "recipe", ["full()", "kivi(bits=8)", "kivi(bits=2, group=64)", "gear(bits=4, rank=2)", "mikv()"]
)
def test_any_head_dim_that_is_a_multiple_of_eight(recipe: str, dim: int) -> None:
    model = families.build("llama", head_dim=dim, num_hidden_layers=2)
    with torch.no_grad():
        cache = fivefold.compress(model, recipe)
        logits = model(text(300), past_key_values=cache).logits
        for token in text(3, seed=2)[0]:
            step = model(token.view(1, 1), past_key_values=cache).logits
        exact = model(torch.cat([text(300), text(3, seed=2)], 1)).logits
    torch.testing.assert_close(logits, exact[:, :300], atol=1e-3, rtol=1e-3)
    assert cache.report().total < (1.1 if recipe == "full()" else 0.95) * (303 + 16) * 2 * 2 * 2 * dim * 4
    if "bits=8" in recipe or recipe == "full()":
        torch.testing.assert_close(step[:, -1], exact[:, -1], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("size", "number"),
    [(1000, 1000), ("2GB", 2 << 30), ("1.5 GiB", 3 << 29), ("512m", 512 << 20), ("100", 100), (None, None)],
)
def test_sizes(size: Any, number: int | None) -> None:
    cache = fivefold.compress(families.build("llama", num_hidden_layers=1), "full()", max_bytes=size)
    assert cache.session.pools.budget.limit == number


@pytest.mark.parametrize("size", [0, -1, "0", "much", "2 XB", "-3G", float("nan"), float("inf"), True, [1]])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(InputError, match="max_bytes"):
        fivefold.compress(families.build("llama", num_hidden_layers=1), "full()", max_bytes=size)
