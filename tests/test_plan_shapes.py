"""What the planner reads of a model, against transformers, against Fivefold's own caches, and against plain numbers."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import families
import fivefold
from fivefold.errors import InputError, UnsupportedModelError
from fivefold.models.embedded import is_fetched, model_dir
from fivefold.models.selection import decoder_config
from fivefold.plan.config import _HASHED
from fivefold.plan.read import known_names, read_model
from fivefold.plan.shape import ModelShape
from fivefold.signature import config_hash, signature

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIGS = Path(__file__).parent / "configs"


def written(config: Any, folder: Path, diff: bool) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config.to_json_string(use_diff=diff), encoding="utf-8")
    return str(folder)


def without_defaults(config: Any, folder: Path) -> str:
    """A file that leaves out all that its class would fill in."""
    plain = json.loads(type(config)().to_json_string(use_diff=False))
    given = json.loads(config.to_json_string(use_diff=False))
    kept = {name: x for name, x in given.items() if x != plain.get(name) or name == "model_type"}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(kept), encoding="utf-8")
    return str(folder)


def own_model(family: str) -> Any:
    if family in families.MULTIMODAL:
        return families.MULTIMODAL[family]()
    return families.build(family)


@pytest.mark.parametrize("family", [*families.TAKEN, *families.MULTIMODAL])
def test_layers_are_those_of_the_caches(family: str, tmp_path: Path) -> None:
    model = own_model(family)
    config, stock = decoder_config(model), DynamicCache(config=model.config).layers
    cache = fivefold.compress(model, "full()")
    with torch.no_grad():
        model(torch.arange(3, 43)[None], past_key_values=cache)
    stores, found = cache.session.stores, []
    for folder, diff in (("all", False), ("diff", True)):
        found.append(read_model(written(model.config, tmp_path / folder, diff)))
    if family not in families.MULTIMODAL:
        found.append(read_model(without_defaults(model.config, tmp_path / "little")))
    for shape in found:
        assert shape.why_not is None
        assert len(shape.layers) == config.num_hidden_layers
        for index, layer in enumerate(shape.layers):
            if index in stores:
                spec = stores[index].spec
                assert layer.kind == "full"
                assert (layer.kv_heads, layer.query_heads, layer.head_dim) == (
                    spec.kv_heads, spec.query_heads, spec.head_dim,
                )  # fmt: skip
            elif layer.kind == "shared":
                assert type(stock[index]).__name__ == "DummyLayer"
                assert config.layer_types[layer.source] == config.layer_types[index]
            elif layer.kind == "sliding":
                assert layer.window == stock[index].sliding_window
                assert layer.numbers == 2 * layer.kv_heads * layer.head_dim
                held = cache.session.companions.layers[index].keys
                assert held.shape[1:] == (layer.kv_heads, layer.tokens(40), layer.head_dim)
            else:
                states = cache.session.companions.layers[index]
                held = [*states.conv_states.values(), *states.recurrent_states.values()]
                assert layer.state == sum(x.numel() for x in held if isinstance(x, torch.Tensor))
        assert shape.signature == signature(config)
        assert shape.config in ("", config_hash(model.config))
        if family not in families.MULTIMODAL:
            assert shape.counted
            assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    assert all(replace(shape, name=found[0].name) == found[0] for shape in found)


_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 48,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
}  # fmt: skip
_MOE = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {**_BIASES, "tie_word_embeddings": True}), ("llama", {"num_key_value_heads": None, "head_dim": None}),
    ("apertus", _BIASES), ("arcee", _BIASES), ("helium", _BIASES), ("internlm3", _BIASES), ("nemotron", _BIASES),
    ("gemma3_text", _BIASES), ("glm4", {"attention_bias": False}), ("granitemoe", _BIASES), ("olmo2", _BIASES),
    ("hunyuan_v1_dense", _BIASES), ("olmoe", _BIASES), ("smollm3", _BIASES), ("solar_open", _BIASES),
    ("cohere", {"use_qk_norm": True, "tie_word_embeddings": True}), ("ernie4_5", {"use_bias": True}),
    ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}),
    ("phi", {"qk_layernorm": True}), ("persimmon", {"qk_layernorm": False}), ("starcoder2", {"use_bias": False}),
    ("phimoe", {"lm_head_bias": True, "attention_bias": True}), ("phi3", {"tie_word_embeddings": True}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("glm4_moe", {"use_qk_norm": True, "first_k_dense_replace": 2, "n_shared_experts": 2}),
    ("gemma4_text", {"num_kv_shared_layers": 2, "use_double_wide_mlp": True}),
    ("gemma4_text", {"num_kv_shared_layers": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}),
    ("gemma4_text", {
        "num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 32, "hidden_size_per_layer_input": 0,
    }),
    ("gemma3n_text", {"intermediate_size": [96, 64, 96, 64], "altup_num_inputs": 4, "tie_word_embeddings": True}),
    ("llama4_text", {"interleave_moe_layer_step": 2}), ("llama4_text", {"moe_layers": [1], "attention_bias": True}),
    ("qwen3_moe", {"mlp_only_layers": [0], "decoder_sparse_step": 2}), ("minimax_m2", {}), ("ministral3", {}),
    ("qwen2_moe", {"decoder_sparse_step": 2, "qkv_bias": False}), ("mixtral", {"tie_word_embeddings": True}),
    ("qwen3_next", {"full_attention_interval": 2, "mlp_only_layers": [1], "attention_bias": True}),
    ("qwen3_5_moe_text", {**_MOE, **families._LINEAR, "shared_expert_intermediate_size": 48}),
    ("lfm2", {"conv_bias": True, "block_auto_adjust_ff_dim": False}),
    ("lfm2", {"block_ffn_dim_multiplier": 1.3, "block_multiple_of": 16}),
    ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}), ("opt", {"enable_bias": False}),
    ("gpt2", {"n_inner": 100, "tie_word_embeddings": True}), ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"attention_bias": False}), ("gpt_oss", {"attention_bias": False}), ("glm4_moe_lite", _MLA),
    ("deepseek_v3", {**_MLA, "first_k_dense_replace": 2}), ("deepseek_v2", {**_MLA, "first_k_dense_replace": 1}),
    ("deepseek_v3", {**_MLA, "q_lora_rank": None, "attention_bias": True}), ("falcon", {}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"parallel_attn": False, "multi_query": False, "bias": True, "num_kv_heads": 4}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), _SETTINGS)
def test_every_setting_is_counted(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {**families._COMMON, **families.TAKEN.get(family, {}), **changes}
    if family == "falcon":
        settings.pop("head_dim")
    config = AutoConfig.for_model(family, **settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape = read_model(written(config, tmp_path / "model", diff=True))
    assert shape.counted
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    routed = sum(x.numel() for name, x in model.named_parameters() if ".experts." in name)
    assert shape.routed == routed
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    beside = [
        x for name, x in model.named_parameters() if "wpe" in name or "positions" in name or "_per_layer.w" in name
    ]
    assert shape.embedding == sum(x.numel() for x in beside) + (0 if embedding is output else embedding.numel())


def test_which_families_no_formula_fits(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", hidden_size=64, n_head=4, n_layer=2, vocab_size=131)
    shape = read_model(written(config, tmp_path / "bloom", diff=True))
    assert not shape.counted and "AttentionInterface" in (shape.why_not or "")


@pytest.mark.parametrize("family", [name for name in families.REFUSED if name != "mamba"])
def test_what_fivefold_refuses(family: str, tmp_path: Path) -> None:
    shape = read_model(written(families.build(family).config, tmp_path / family, diff=True))
    assert shape.why_not is not None


_ROPES: list[dict[str, Any]] = [
    {}, {"rope_theta": 5e5}, {"attention_bias": True}, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }},
]  # fmt: skip


@pytest.mark.parametrize("family", sorted(_HASHED))
def test_profiles_are_found(family: str, tmp_path: Path) -> None:
    for changes in _ROPES:
        settings = {**families._COMMON, **families.TAKEN[family], **changes, "model_type": family}
        (tmp_path / "config.json").write_text(json.dumps(settings), encoding="utf-8")
        config = AutoConfig.from_pretrained(str(tmp_path))
        for source in (str(tmp_path), *(written(config, tmp_path / str(diff), diff) for diff in (True, False))):
            shape = read_model(source)
            assert (shape.signature, shape.config) == (signature(config), config_hash(config))


@pytest.mark.skipif(not is_fetched(), reason="the embedded model is not on this machine")
def test_the_embedded_model() -> None:
    shape = read_model(str(model_dir()))
    config = AutoConfig.from_pretrained(str(model_dir()))
    assert shape.measured and shape.counted
    assert (shape.parameters, shape.embedding) == (134_515_008, 0)
    assert shape.weight_bytes in (2 * 134_515_008, 4 * 134_515_008)
    assert (shape.signature, shape.config) == (signature(config), config_hash(config))
    for folder in sorted((Path(fivefold.__file__).parent / "profiles").iterdir()):
        profile = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
        assert profile["model"] == shape.signature == read_model("smollm2-135m").signature
        assert profile["config"] in ("", shape.config)


# --- published models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bytes_a_token", "parameters"),
    [
        ("llama-2-7b", 524_288, 6.738e9),
        ("llama-3-8b", 131_072, 8.030e9),
        ("falcon-7b", 8_192, 6.92e9),
        ("gemma-3-12b", 393_216, 11.77e9),  # without what sees pictures
        ("gpt-oss-20b", 49_152, 20.91e9),
        ("gemma-3n-e4b", 40_960, None),
        ("deepseek-v3", 70_272, 671.0e9),
        ("qwen3-next-80b-a3b", 24_576, 80.0e9),
    ],
)
def test_published_models(name: str, bytes_a_token: int, parameters: float | None) -> None:
    for source in (str(CONFIGS / f"{name}.json"), name, name.upper()):
        shape = read_model(source)
        assert sum(layer.numbers for layer in shape.layers) * 2 == bytes_a_token
        assert parameters is None or shape.parameters == pytest.approx(parameters, rel=0.01)
    assert (CONFIGS / f"{name}.json").is_file()


def test_published_layers() -> None:
    gemma = read_model(str(CONFIGS / "gemma-3-12b.json"))
    assert gemma.kinds == {"sliding": 40, "full": 8}
    assert not gemma.counted, "what sees pictures is left out"
    held = sum(2 * layer.numbers * layer.tokens(32_768) for layer in gemma.layers)
    assert held == 8 * 8_192 * 32_768 + 40 * 8_192 * 1_023
    oss = read_model(str(CONFIGS / "gpt-oss-20b.json"))
    assert oss.kinds == {"sliding": 12, "full": 12} and (oss.experts, oss.chosen) == (32, 4)
    assert oss.multiplied == pytest.approx(3.61e9, rel=0.01)
    assert oss.weight_bytes == pytest.approx(13.76e9, rel=0.01)
    shared = read_model(str(CONFIGS / "gemma-3n-e4b.json"))
    assert shared.kinds == {"sliding": 16, "full": 4, "shared": 15}
    assert [layer.source for layer in shared.layers[20:25]] == [18, 18, 18, 18, 19]
    latent = read_model(str(CONFIGS / "deepseek-v3.json"))
    assert latent.kinds == {"latent": 61} and "MLA" in (latent.why_not or "")
    assert latent.multiplied == pytest.approx(37e9, rel=0.02)
    hybrid = read_model(str(CONFIGS / "qwen3-next-80b-a3b.json"))
    assert hybrid.kinds == {"linear": 36, "full": 12} and hybrid.layers[3].kind == "full"
    assert hybrid.layers[0].state == 8_192 * 4 + 32 * 128 * 128


def test_every_built_in_shape_is_read() -> None:
    for name in known_names():
        shape = read_model(name)
        assert shape.counted and not shape.measured and shape.context and shape.config == ""
        size = re.search(r"(?<![a-z])(\d+(?:\.\d+)?)(b|m)(?:-|$)", name)
        if size and "8x" not in name and "3n" not in name:
            assert shape.parameters == pytest.approx(float(size[1]) * (1e9 if size[2] == "b" else 1e6), rel=0.35), name


# --- files --------------------------------------------------------------------------------------------------


def test_files_are_counted(tmp_path: Path) -> None:
    model = families.build("mixtral")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    expected = read_model(written(model.config, tmp_path / "none", diff=True))
    for folder in ("one", "many"):
        shape = read_model(str(tmp_path / folder))
        assert shape.measured and shape.dtype == "bfloat16"
        for name in ("parameters", "embedding", "routed", "experts", "chosen", "layers"):
            assert getattr(shape, name) == getattr(expected, name)
        assert shape.weight_bytes == 2 * shape.parameters
    next((tmp_path / "many").glob("*.safetensors")).unlink()
    assert not read_model(str(tmp_path / "many")).measured, "not all files are there"


def headers(folder: Path, tensors: dict[str, tuple[str, list[int], int]], **config: Any) -> ModelShape:
    """The shape of a model whose file has these tensors: dtype, shape, bytes."""
    entries, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    data = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(data)) + data)
    settings = {
        "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 100,
        "intermediate_size": 96,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps({**settings, **config}), encoding="utf-8")
    return read_model(str(folder))


def test_packed_weights_are_unpacked(tmp_path: Path) -> None:
    words = {"model.embed_tokens.weight": ("F16", [100, 64], 12_800), "lm_head.weight": ("F16", [100, 64], 12_800)}
    name = "model.layers.0.mlp.up_proj"
    packed = {
        f"{name}.qweight": ("I32", [8, 96], 3_072), f"{name}.qzeros": ("I32", [1, 12], 48),
        f"{name}.scales": ("F16", [1, 96], 192), f"{name}.g_idx": ("I32", [64], 256),
    }  # fmt: skip
    shape = headers(tmp_path / "gptq", {**words, **packed}, quantization_config={"quant_method": "gptq", "bits": 4})
    assert (shape.parameters, shape.embedding) == (2 * 6_400 + 64 * 96, 6_400)
    assert shape.weight_bytes == 25_600 + 3_072 + 48 + 192 + 256
    assert shape.dtype == "float16"
    packed = {f"{name}.weight": ("F8_E4M3", [96, 64], 6_144), f"{name}.weight_scale_inv": ("F32", [1, 1], 4)}
    shape = headers(tmp_path / "fp8", {**words, **packed}, quantization_config={"quant_method": "fp8"})
    assert (shape.parameters, shape.weight_bytes) == (2 * 6_400 + 64 * 96, 25_600 + 6_148)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    packed = {
        f"{experts}_blocks": ("U8", [4, 192, 2, 16], 24_576), f"{experts}_scales": ("U8", [4, 192, 2], 1_536),
        f"{experts}_bias": ("BF16", [4, 192], 1_536),
    }  # fmt: skip
    told = {"model_type": "mixtral", "num_local_experts": 4, "quantization_config": {"quant_method": "mxfp4"}}
    shape = headers(tmp_path / "mxfp4", {**words, **packed}, **told)
    assert shape.routed == 4 * 192 * 64 + 4 * 192


def test_a_tied_layer_and_guessing_heads_are_not_counted_twice(tmp_path: Path) -> None:
    words = {"model.embed_tokens.weight": ("BF16", [100, 64], 12_800), "lm_head.weight": ("BF16", [100, 64], 12_800)}
    beyond = {"model.layers.1.mlp.up_proj.weight": ("BF16", [96, 64], 12_288), "mtp.fc.weight": ("BF16", [64], 128)}
    shape = headers(tmp_path / "tied", {**words, **beyond}, tie_word_embeddings=True)
    assert (shape.parameters, shape.embedding, shape.weight_bytes) == (6_400, 0, 12_800)
    shape = headers(tmp_path / "not", {**words, **beyond})
    assert (shape.parameters, shape.embedding, shape.weight_bytes) == (12_800, 6_400, 25_600)


@pytest.mark.parametrize(
    ("name", "least", "most"), [("gptq", 0.26, 0.32), ("fp8", 0.5, 0.57), ("bitsandbytes", 0.26, 0.32)]
)
def test_packed_weights_without_files(name: str, least: float, most: float, tmp_path: Path) -> None:
    given = json.loads((CONFIGS / "llama-2-7b.json").read_text(encoding="utf-8"))
    told = {"bits": 4} if name == "gptq" else {"load_in_4bit": True} if name == "bitsandbytes" else {}
    given["quantization_config"] = {"quant_method": name, **told}
    (tmp_path / "config.json").write_text(json.dumps(given), encoding="utf-8")
    shape = read_model(str(tmp_path))
    assert least < shape.weight_bytes / (2 * shape.parameters) < most


def test_nothing_heavy_is_imported(tmp_path: Path) -> None:
    families.build("gpt_oss").save_pretrained(tmp_path)
    code = (
        "import sys; from fivefold.plan.read import read_model; assert read_model(sys.argv[1]).measured; "
        "read_model('gemma-3-12b'); sys.exit(1 if {'torch', 'transformers', 'numpy'} & sys.modules.keys() else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


# --- errors -------------------------------------------------------------------------------------------------


def refused(source: str, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_model(source)
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text
    for word in words:
        assert word in text, text


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused("lama-3.1-8b", "'lama-3.1-8b'", "llama-3.1-8b")
    refused("", "built-in")
    refused(str(tmp_path), "no config.json")
    refused(str(tmp_path / "gone"), "there is no model")
    for text, word in (
        ("{", "cannot be read"), ("[]", "model_type"), ("{}", "model_type"), ('{"model_type": "llam"}', "hidden_size"),
        ('{"model_type": "llama", "hidden_size": "big"}', "fits none"),
        ('{"model_type": "llama", "num_attention_heads": -1}', "fits none"),
        ('{"model_type": "llama", "num_hidden_layers": 1e9}', "fits none"),
        ('{"model_type": "llama", "layer_types": 3}', "fits none"),
        ('{"model_type": "afmoe_of_tomorrow", "hidden_size": 64}', "num_hidden_layers"),
        ('{"model_type": "recurrent_gemma"}', "AutoConfig"),
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        refused(str(tmp_path), word)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"no header at all")
    refused(str(tmp_path), "model.safetensors is no safetensors file")

    def unreachable(*_: Any, **__: Any) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr("fivefold.plan.read._reach_hub", unreachable)
    refused("nobody/llama-3.1-8b-of-mine", "no route to host", "llama-3.1-8b")


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (CONFIGS / "llama-3-8b.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    monkeypatch.setattr("fivefold.plan.read._reach_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    shape = read_model("somebody/a-llama")
    assert (shape.name, shape.parameters) == ("somebody/a-llama", 8_030_261_248)


def test_windows_alone_can_be_compressed() -> None:
    shape = read_model("mistral-7b-v0.1")
    assert shape.why_not is None and shape.kinds == {"sliding": 32}
    with pytest.raises(UnsupportedModelError, match="sliding=True"):
        fivefold.compress(families.build("mistral", sliding_window=24), "full()")
