"""The configuration of a decoder from a config.json, with everything that transformers would fill in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from fivefold.plan.layers import Config, heads_of, layer_types, of_layer, window_of
from fivefold.plan.source import Family, family
from fivefold.signature import config_hash, signature

_MOST_LAYERS = 10_000
_PARTS = ("decoder", "generator", "text_config")
_HASHED = {
    "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "granite", "granitemoe", "helium",
    "hunyuan_v1_dense", "lfm2", "llama", "llama4_text", "ministral", "mistral", "mixtral", "olmo", "olmo2", "olmoe",
    "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip
"""Families of which `config_hash` is the same from the file alone."""


@dataclass(frozen=True)
class Decoder:
    """values: settings by transformers' general names. family: None if transformers does not know it. tied: whether the
    output layer is the embedding. alone: whether it is all of the model, and not its text part. dtype: of what it
    computes with. quantized: how its weights are packed, its `quantization_config`."""

    values: Config
    family: Family | None
    tied: bool
    alone: bool
    dtype: str
    quantized: Mapping[str, Any]


def read_decoder(given: Mapping[str, Any]) -> Decoder:
    """given: what a config.json holds. Raises KeyError with the name of a setting that is missing."""
    whole = family(str(given["model_type"]))
    inner = next((given[name] for name in _PARTS if isinstance(given.get(name), Mapping)), None)
    part = whole.text if whole is not None else None
    alone = inner is None and part is None
    text: Mapping[str, Any] = inner if inner is not None else given  # old files of such models are flat
    own = whole
    if not alone:
        own = (family(str(text["model_type"])) if inner is not None and "model_type" in text else None) or part
    values = _filled(text, own)
    defaults = [known.defaults for known in (whole, own) if known is not None]
    ties = [x["tie_word_embeddings"] for x in (given, text, *defaults) if x.get("tie_word_embeddings") is not None]
    dtypes = [x.get(name) for x in (given, text) for name in ("dtype", "torch_dtype")]
    if values["model_type"] == "lfm2":
        ties = [text["tie_embedding"]] if "tie_embedding" in text else ties
    return Decoder(
        values,
        own,
        bool(ties[0]) if ties else False,
        alone,
        next((str(x).removeprefix("torch.") for x in dtypes if x), "bfloat16"),
        given.get("quantization_config") or text.get("quantization_config") or {},
    )


def _filled(text: Mapping[str, Any], known: Family | None) -> dict[str, Any]:
    """Settings by their general names, those that are left out as the family has them."""
    renamed = known.renamed if known is not None else {}
    values: dict[str, Any] = dict(known.defaults) if known is not None else {}
    values = {renamed.get(name, name): x for name, x in values.items()}
    values |= {renamed.get(name, name): x for name, x in text.items()}
    values |= {general: values[special] for general, special in renamed.items() if special in values}
    if known is not None:
        values["model_type"] = known.defaults["model_type"]
        values["names_layer_types"] = bool(known.written & {"layer_types", "layers_block_type"})
    if values.get("layer_types") and not values.get("num_hidden_layers"):
        values["num_hidden_layers"] = len(values["layer_types"])
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if values.get(name) is None:
            raise KeyError(name)
        if not isinstance(values[name], int) or not 0 < values[name] < 1 << 24:
            raise ValueError(f"{name} = {values[name]!r}")
    if values["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers = {values['num_hidden_layers']}")
    _finish(values)
    return values


def _finish(values: dict[str, Any]) -> None:
    """What the classes of some families do beside defaults."""
    kind, heads = values["model_type"], values["num_attention_heads"]
    if kind == "gpt_bigcode":
        values.setdefault("num_key_value_heads", 1 if values["multi_query"] else heads)
    if kind == "falcon":
        grouped = values["new_decoder_architecture"] or not values["multi_query"]
        values["num_key_value_heads"] = (values["num_kv_heads"] or heads) if grouped else 1
    if kind in ("cohere2", "falcon"):
        values["head_dim"] = values["hidden_size"] // heads
    if values.get("kv_lora_rank"):
        values["head_dim"] = values["qk_rope_head_dim"]
    if kind == "lfm2" and "block_ff_dim" in values:
        values["intermediate_size"] = values["block_ff_dim"]
    if values.get("layer_types") and kind == "gemma4_text":
        values["layer_types"] = [*values["layer_types"][:-1], "full_attention"]
    own = values.get("per_layer_config")
    if own:
        values["per_layer_config"] = {int(index): dict(changes) for index, changes in own.items()}
    elif kind == "gemma4_text":
        changes = {"head_dim": values.get("global_head_dim") or 512}
        if values.get("attention_k_eq_v") and values.get("num_global_key_value_heads"):
            changes["num_key_value_heads"] = values["num_global_key_value_heads"]
        full = [i for i, one in enumerate(layer_types(values)) if one == "full_attention"]
        values["per_layer_config"] = dict.fromkeys(full, changes)


def recognised(decoder: Decoder, types: list[str]) -> tuple[str, str]:
    """`signature` and `config_hash` of a decoder, the latter empty if it may not be that of transformers' object."""
    values = dict(decoder.values)
    values["num_key_value_heads"] = values.get("num_key_value_heads") or values["num_attention_heads"]
    if values.get("head_dim") is None and "head_dim" in (decoder.family.defaults if decoder.family else ()):
        values["head_dim"] = heads_of(of_layer(decoder.values, 0), 0)[2]
    first = SimpleNamespace(**values)
    own = values.get("per_layer_config")
    if own:
        layers = [SimpleNamespace(**{**values, **own.get(index, {})}) for index in range(len(types))]
        first.is_heterogeneous, first.per_layer_config = True, layers
    if own or values["model_type"] not in _HASHED or decoder.family is None:
        return signature(first), ""
    if "layer_types" in decoder.family.defaults:
        first.layer_types = types
    if "use_sliding_window" in decoder.family.defaults:
        first.sliding_window = window_of(values)
    first.rope_parameters = _rope(values)
    return signature(first), config_hash(first)


def _rope(values: Config) -> dict[str, Any]:
    """Where keys are turned, as transformers writes it down since its version 5."""
    rope = dict(values.get("rope_scaling") or values.get("rope_parameters") or {})
    rope.setdefault("rope_theta", values.get("rope_theta", values.get("default_theta", 10_000.0)))
    if values.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", values["partial_rotary_factor"])
    rope.setdefault("rope_type", rope.get("type", "default"))
    if rope["rope_type"] in ("llama3", "yarn", "longrope"):
        if values.get("original_max_position_embeddings") is not None:
            rope["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        else:
            rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    return rope
