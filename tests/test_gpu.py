"""The same engine on a CUDA device; run by hand with `pytest -m gpu`."""

import gc
import json
import os

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import fivefold
from fivefold.kernels.device import SETTINGS
from learned import learn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=16384, initializer_range=0.08,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("recipe", "bound"),
    [("full()", 0.0), ("kivi(bits=8)", 0.1), ("kivi(bits=4) + duo(retrieval=[[0, 0]], recent=4096)", 0.8)],
)
def test_logits_are_those_of_dynamic_cache(model, dtype, recipe, bound):
    model = model.to(dtype)
    fivefold.restore(model)
    ids = torch.randint(0, 512, (2, 1500), device="cuda", generator=torch.Generator("cuda").manual_seed(1))

    def logits(cache):
        with torch.inference_mode():
            outs = [model(ids[:, :900], past_key_values=cache).logits]
            outs.append(model(ids[:, 900:1400], past_key_values=cache).logits)
            outs += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(1400, 1500)]
        return torch.cat(outs, 1).float()

    exact = logits(DynamicCache(config=model.config))
    ours = logits(fivefold.compress(model, recipe))
    noise = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.02}[dtype]
    assert (exact - ours).abs().max() < (noise + bound) * exact.abs().max()
    assert (exact - ours).abs().mean() < (noise + bound) * 0.1 * exact.abs().max()


def test_generate_with_padding_and_beams(model):
    model = model.to(torch.float32)
    ids = torch.randint(1, 512, (2, 100), device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :37] = 0
    for extra in ({}, {"num_beams": 3}):
        settings = {
            "attention_mask": mask,
            "max_new_tokens": 64,
            "do_sample": False,
            "pad_token_id": 0,
            **extra,
        }
        fivefold.restore(model)
        before = model.generate(ids, past_key_values=DynamicCache(config=model.config), **settings)
        after = model.generate(ids, past_key_values=fivefold.compress(model, "full()"), **settings)
        assert torch.equal(before, after)


@pytest.mark.parametrize("recipe", ["full()", "kivi(bits=2)", "duo(retrieval=[[1, 1]]) + kivi(bits=4)"])
def test_report_is_what_the_device_allocated(model, recipe):
    model = model.to(torch.bfloat16)
    ids = torch.randint(0, 512, (4, 4096), device="cuda")
    with torch.inference_mode():
        model(ids[:, :64])  # workspaces of the libraries
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = fivefold.compress(model, recipe)
        for chunk in ids.split(1024, 1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        for i in range(70):
            model(ids[:, i : i + 1], past_key_values=cache)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        report = cache.report()
        # The allocator rounds every tensor up to 512 bytes; index tensors made from the tables are not in the report.
        assert abs(held - (report.total - report.tables)) < 0.02 * report.total + 400_000
        cache.free()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before < 400_000


@pytest.mark.parametrize(
    "recipe",
    [
        "h2o(keep=0.3)",
        "keyformer(keep=0.4)",
        "d2o(keep=0.3)",
        "elastic(keep=0.5)",
        "snapkv(keep=0.3) + kivi(bits=8)",
        "h2o(keep=0.6) + kivi(bits=8)",
        "tidal(top=64, full_layers=0, select_layers=[0])",
        "anchors(top=64, anchors=[0], recent=8)",
        "anchors(top=64, anchors=[0], recent=8) + kivi(bits=4)",
        "tidal(top=64, full_layers=0, select_layers=[0]) + kivi(bits=4)",
        "mikv(low=4)",
        "mikv(high=8, low=3)",
        "gear(bits=4)",
        "h2o(keep=0.5) + gear(bits=4)",
        "kivi(key_bits=4, value_bits=3)",
        "rotatekv(profile={}, bits=4)",
        "cskv(profile={}, keep=0.4, bits=8)",
        "snapkv(keep=0.5) + cskv(profile={}, keep=0.4)",
    ],
)
def test_methods_do_as_on_a_cpu(model, recipe, tmp_path):
    if "profile" in recipe:
        name = "cskv" if "cskv" in recipe else "rotatekv"
        model = model.to(torch.float32).to("cpu")
        recipe = recipe.format(json.dumps(learn(model, f"{name}()", tmp_path)))
    ids = torch.randint(1, 512, (2, 1000), generator=torch.Generator().manual_seed(3))
    found = {}
    for device in ("cpu", "cuda"):
        model = model.to(torch.float32).to(device)
        cache = fivefold.compress(model, recipe)
        with torch.inference_mode():
            outs = [model(ids[:, :900].to(device), past_key_values=cache, logits_to_keep=1).logits]
            outs += [model(ids[:, i : i + 1].to(device), past_key_values=cache).logits for i in range(900, 960)]
        found[device] = torch.cat(outs, 1).cpu(), cache.report()
        fivefold.restore(model)
    (cpu, cpu_report), (cuda, cuda_report) = found["cpu"], found["cuda"]
    assert cpu_report.kept_tokens == cuda_report.kept_tokens
    # A token at the edge of a choice can differ by rounding; what is held, and nearly all that is said, does not.
    assert ((cpu - cuda).abs().mean((0, 2)) / cpu.abs().mean((0, 2))).median() < 0.01
    if not ("anchors" in recipe and "kivi" in recipe):  # whose picks are by packed keys, and differ in more steps
        assert (cpu - cuda).abs().mean() < 0.01 * cpu.abs().mean()
    assert (cpu.argmax(-1) == cuda.argmax(-1)).float().mean() > 0.95


def test_memory_grows_page_by_page(model, monkeypatch):
    """Slabs lie in segments that grow, without gaps that nothing fits into, unless the user has a say of their own."""
    if any(name in os.environ for name in SETTINGS):
        pytest.skip("torch's allocator is set up by the environment")
    gc.collect()
    torch.cuda.empty_cache()  # or slabs lie in segments that earlier tests have left
    cache = fivefold.compress(model, "kivi(bits=4)")
    with torch.inference_mode():
        model(torch.ones(64, 700, dtype=torch.long, device="cuda"), past_key_values=cache)
    slabs = [x for pool in cache.session.pools for _, slab in pool._live() for x in slab.tensors.values()]
    large = {x.untyped_storage().data_ptr() for x in slabs if x.untyped_storage().nbytes() > 1 << 20}
    found = torch.cuda.memory_snapshot()
    grow = {part["address"]: one["is_expandable"] for one in found for part in one["blocks"]}
    assert large and all(grow[address] for address in large)
