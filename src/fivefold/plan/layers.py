"""The layers of a decoder, as transformers' cache has them, from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fivefold.plan.shape import LayerShape

Config = Mapping[str, Any]

_OLD = {
    "mamba": "linear_attention", "attention": "full_attention",
    "deepseek_sparse_attention": "indexed_attention", "qwen_sparse_attention": "indexed_attention",
}  # fmt: skip
_EVERY = {
    "cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3_text": 6, "gemma3n_text": 5, "gemma4_text": 6, "gpt_oss": 2,
    "olmo3": 4,
}  # fmt: skip
"""Families in which one layer of so many sees all tokens, and the others those in a window."""
_LINEAR_EVERY = {"olmo_hybrid": 4, "qwen3_5_moe_text": 4, "qwen3_5_text": 4, "qwen3_next": 4}
"""Families in which one layer of so many has attention, and the others have linear attention."""


_EVERY_HEAD = {"bloom", "codegen", "gpt2", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "persimmon"}
"""Families in which each query head has keys of its own, whatever their configuration says beside."""


class UnknownLayersError(ValueError):
    """A configuration that does not say which layers are of which type, of a family whose rule is not known here."""


def layer_types(config: Config) -> list[str]:
    """The type of each layer in transformers' words. Raises `UnknownLayersError`."""
    count = config["num_hidden_layers"]
    given = config.get("layer_types") or _by_family(config["model_type"], count, config)
    if given is not None:
        return [_OLD.get(kind, kind) for kind in given[:count]]
    if config.get("names_layer_types"):
        raise UnknownLayersError
    return [_by_window(of_layer(config, index)) for index in range(count)]


def _by_window(own: Config) -> str:
    if window_of(own) is not None:
        return "sliding_attention"
    return "full_attention" if own.get("attention_chunk_size") is None else "chunked_attention"


def _by_family(family: str, count: int, config: Config) -> list[str] | None:
    """What a family's configuration class makes of its other settings."""
    window, places = window_of(config), range(count)

    def where(full: list[bool], other: str = "sliding_attention") -> list[str]:
        return ["full_attention" if one else other for one in full]

    if family in _EVERY:
        every = config.get("sliding_window_pattern") or _EVERY[family]
        return where([window is None or (i + 1) % every == 0 for i in places])
    if family in _LINEAR_EVERY:
        every = config.get("full_attention_interval") or _LINEAR_EVERY[family]
        return where([(i + 1) % every == 0 for i in places], "linear_attention")
    if family in ("llama4_text", "smollm3"):
        every = config.get("no_rope_layer_interval") or 4
        turned = config.get("no_rope_layers") or [(i + 1) % every != 0 for i in places]
        if family == "llama4_text":
            return where([not turned[i] for i in places], "chunked_attention")
        return where([window is None or bool(turned[i]) for i in places])
    if family == "qwen2_moe":
        first = config.get("max_window_layers") or 0
        return where([window is None or i % 2 == 1 or i >= first for i in places])
    if "max_window_layers" in config:  # Qwen
        return where([window is None or i < (config["max_window_layers"] or 0) for i in places])
    if family == "ministral":
        return where([window is None] * count)
    if family == "lfm2":
        whole = config.get("full_attn_idxs")
        return where([whole is None or i in whole for i in places], "conv")
    if family == "bamba":
        return where([i in (config.get("attn_layer_indices") or ()) for i in places], "linear_attention")
    if family == "nemotron_h" and config.get("hybrid_override_pattern"):
        names = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
        return [names[letter] for letter in config["hybrid_override_pattern"]]
    if family == "falcon_h1":
        return ["hybrid"] * count
    if family == "jamba":
        period, offset = config["attn_layer_period"], config["attn_layer_offset"]
        return where([i % period == offset for i in places], "linear_attention")
    return None


def window_of(config: Config) -> int | None:
    """The sliding window; None where there is none, or it is switched off."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return window or None


def of_layer(config: Config, index: int) -> Config:
    """The configuration of one layer, where layers have their own."""
    own = (config.get("per_layer_config") or {}).get(index)
    return {**config, **own} if own else config


def heads_of(own: Config, index: int) -> tuple[int, int, int]:
    """Query heads, heads of keys and values, and channels of each, from the configuration of a layer."""
    heads = _number(own["num_attention_heads"], index)
    if own["model_type"] in _EVERY_HEAD:
        return heads, heads, own["hidden_size"] // heads
    if own["model_type"] == "gpt_bigcode":
        return heads, 1 if own["multi_query"] else heads, own["hidden_size"] // heads
    kv_heads = _number(own.get("num_key_value_heads"), index) or heads
    return heads, kv_heads, own.get("head_dim") or own["hidden_size"] // heads


def _number(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list | tuple) else value


def layer_shapes(config: Config, types: list[str]) -> tuple[LayerShape, ...]:
    """Every layer of a decoder. types: `layer_types`."""
    return tuple(_shape(of_layer(config, index), index, types) for index in range(len(types)))


def _shape(own: Config, index: int, types: list[str]) -> LayerShape:
    kind, first_shared = types[index], len(types) - (own.get("num_kv_shared_layers") or 0)
    if kind in ("linear_attention", "conv", "moe", "mlp"):
        return LayerShape("linear", state=_state(kind, own) or 0)
    heads, kv_heads, dim = heads_of(own, index)
    if index >= first_shared:
        same = [i for i in range(first_shared) if types[i] == kind]
        window = window_of(own) if kind == "sliding_attention" else None
        return LayerShape("shared", heads, kv_heads, dim, window, same[-1] if same else None)
    if own.get("kv_lora_rank"):
        return LayerShape("latent", heads, latent=own["kv_lora_rank"] + (own.get("qk_rope_head_dim") or 0))
    state = (_state("linear_attention", own) or 0) if kind.startswith("hybrid") else 0
    if kind == "chunked_attention":
        return LayerShape("sliding", heads, kv_heads, dim, own["attention_chunk_size"], chunked=True)
    if kind in ("sliding_attention", "hybrid_sliding"):
        cap = own.get("attn_logit_softcapping")
        return LayerShape("sliding", heads, kv_heads, dim, window_of(own), state=state, cap=cap)
    return LayerShape("full", heads, kv_heads, dim, state=state, cap=own.get("attn_logit_softcapping"))


def state_is_known(config: Config, types: list[str]) -> bool:
    """Whether it is known how much all layers with a state keep."""
    stateful = {kind for kind in types if kind in ("linear_attention", "conv") or kind.startswith("hybrid")}
    return all(_state("conv" if kind == "conv" else "linear_attention", config) is not None for kind in stateful)


def _state(kind: str, own: Config) -> int | None:
    """Numbers that a layer without keys keeps of a sequence; None if that is not known."""
    if kind in ("moe", "mlp"):
        return 0
    if kind == "conv":
        return own["hidden_size"] * own["conv_L_cache"] if "conv_L_cache" in own else None
    if "linear_num_value_heads" in own:  # gated delta rule
        keys, values = (own[f"linear_num_{name}_heads"] for name in ("key", "value"))
        key, value = (own[f"linear_{name}_head_dim"] for name in ("key", "value"))
        return (2 * keys * key + values * value) * own["linear_conv_kernel_dim"] + values * key * value
    if "mamba_n_heads" in own:  # Mamba 2
        inner = own.get("mamba_d_ssm") or own["mamba_expand"] * own["hidden_size"]
        groups = 2 * own["mamba_n_groups"] * own["mamba_d_state"]
        return (inner + groups) * own["mamba_d_conv"] + inner * own["mamba_d_state"]
    if "mamba_num_heads" in own and "ssm_state_size" in own:  # Mamba 2 in Nemotron-H
        inner, size = own["mamba_num_heads"] * own["mamba_head_dim"], own["ssm_state_size"]
        return (inner + 2 * own["n_groups"] * size) * own["conv_kernel"] + inner * size
    if "mamba_d_state" in own:  # Mamba
        return own["mamba_expand"] * own["hidden_size"] * (own["mamba_d_conv"] + own["mamba_d_state"])
    return None
