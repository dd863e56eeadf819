"""How many weights a decoder has, worked out from its configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fivefold.plan.layers import heads_of, of_layer
from fivefold.plan.shape import LayerShape

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Built:
    """How a family builds its layers, beside what its configuration says.

    qkv, out, mlp: whether projections have biases: "always", "" for never, or the setting that says it. gated: three
    matrices in an MLP, else two. norms: those of a layer that span the residual stream; centred: they have a bias too.
    qk_norm: norms of queries and keys, over a head or over all of them; qk_when: the setting that switches them on.
    """

    qkv: str = ""
    out: str = ""
    mlp: str = ""
    gated: bool = True
    norms: int = 2
    centred: bool = False
    qk_norm: Literal["", "head", "all"] = ""
    qk_when: str = ""


_PLAIN, _BIASED = Built(), Built("attention_bias", "attention_bias")
_FULLY = Built("attention_bias", "attention_bias", "mlp_bias")
_QWEN3 = Built("attention_bias", "attention_bias", qk_norm="head")
_GPT2 = Built("always", "always", "always", gated=False, centred=True)
_MLA = Built("attention_bias", "attention_bias")
FAMILIES: dict[str, Built] = {
    "apertus": Built("attention_bias", "attention_bias", gated=False, qk_norm="head"),
    "arcee": Built("attention_bias", "attention_bias", "mlp_bias", gated=False),
    "cohere": Built("attention_bias", "attention_bias", norms=1, qk_norm="all", qk_when="use_qk_norm"),
    "cohere2": Built("attention_bias", "attention_bias", norms=1),
    "deepseek_v2": Built("attention_bias", "attention_bias", "mlp_bias"),
    "deepseek_v3": _MLA,
    "ernie4_5": Built("use_bias", "use_bias", "use_bias"),
    "exaone4": Built(qk_norm="head"),
    "falcon": Built("bias", "bias", "bias", gated=False, centred=True),
    "gemma": _BIASED,
    "gemma2": Built("attention_bias", "attention_bias", norms=4),
    "gemma3_text": Built("attention_bias", "attention_bias", norms=4, qk_norm="head"),
    "gemma3n_text": Built("attention_bias", "attention_bias", norms=4, qk_norm="head"),
    "gemma4_text": Built("attention_bias", "attention_bias", norms=4, qk_norm="head"),
    "glm": Built("attention_bias"),
    "glm4": Built("attention_bias", norms=4),
    "glm4_moe": Built("attention_bias", qk_norm="head", qk_when="use_qk_norm"),
    "glm4_moe_lite": _MLA,
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": Built("attention_bias", "attention_bias", "always", gated=False, centred=True),
    "gpt_oss": _BIASED,
    "granite": _FULLY,
    "granitemoe": _BIASED,
    "helium": Built("attention_bias", "", "mlp_bias"),
    "hunyuan_v1_dense": _QWEN3,
    "internlm3": _FULLY,
    "kimi_k2": _MLA,
    "lfm2": Built(qk_norm="head"),
    "llama": _FULLY,
    "llama4_text": _BIASED,
    "minimax_m2": Built(qk_norm="all"),
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "nemotron": Built("attention_bias", "attention_bias", "mlp_bias", gated=False, centred=True),
    "olmo": Built("attention_bias", "attention_bias", norms=0),
    "olmo2": Built("attention_bias", "attention_bias", qk_norm="all"),
    "olmo3": Built("attention_bias", "attention_bias", qk_norm="all"),
    "olmoe": Built("attention_bias", "attention_bias", qk_norm="all"),
    "opt": Built("enable_bias", "enable_bias", "enable_bias", gated=False, centred=True),
    "persimmon": Built("always", "always", "always", False, centred=True, qk_norm="head", qk_when="qk_layernorm"),
    "phi": Built("always", "always", "always", False, norms=1, centred=True, qk_norm="head", qk_when="qk_layernorm"),
    "phi3": _PLAIN,
    "phimoe": Built("attention_bias", "attention_bias", centred=True),
    "qwen2": Built("always"),
    "qwen2_5_vl_text": Built("always"),
    "qwen2_moe": Built("qkv_bias"),
    "qwen2_vl_text": Built("always"),
    "qwen3": _QWEN3,
    "qwen3_5_moe_text": _QWEN3,
    "qwen3_5_text": _QWEN3,
    "qwen3_moe": _QWEN3,
    "qwen3_next": _QWEN3,
    "qwen3_vl_moe_text": _QWEN3,
    "qwen3_vl_text": _QWEN3,
    "seed_oss": Built("attention_bias", "attention_out_bias", "mlp_bias"),
    "smollm3": _FULLY,
    "solar_open": Built("attention_bias"),
    "stablelm": Built("use_qkv_bias", centred=True, qk_norm="all", qk_when="qk_layernorm"),
    "starcoder2": Built("use_bias", "use_bias", "use_bias", gated=False, centred=True),
}
"""Families whose weights are counted exactly; others are taken for a Llama."""


@dataclass(frozen=True)
class Weights:
    """parameters, embedding, routed, experts, chosen: as in `ModelShape`. exact: whether the family is known."""

    parameters: int
    embedding: int
    routed: int
    experts: int
    chosen: int
    exact: bool


def count_weights(config: Config, layers: Sequence[LayerShape], types: Sequence[str], tied: bool) -> Weights:
    """The weights of a decoder, its output layer included. tied: whether that is the embedding."""
    family, hidden = config["model_type"], config["hidden_size"]
    built, (experts, chosen) = FAMILIES.get(family, _FULLY), experts_of(config)
    total = routed = 0
    for index, layer in enumerate(layers):
        own = of_layer(config, index)
        dense, one_expert, beside = _mlp(own, built, index, layer)
        total += _mixer(own, built, index, layer, types[index]) + _norms(own, built) + dense + beside
        total += experts * one_expert
        routed += experts * one_expert
    row = config.get("word_embed_proj_dim") or hidden  # of OPT-350M it is narrower
    words, looked_up, outside = config["vocab_size"] * row, *_outside(config, built, len(layers))
    total += words * (1 if tied else 2) + looked_up + outside + 2 * hidden * row * (row != hidden)
    if not routed:
        experts = chosen = 0
    return Weights(total, looked_up + (0 if tied else words), routed, experts, chosen, family in FAMILIES)


def experts_of(config: Config) -> tuple[int, int]:
    """From how many experts a router chooses in a layer, and how many; 0, 0 where there is none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    count = next((config[name] for name in names if config.get(name)), 0)
    chosen = config.get("num_experts_per_tok") or config.get("top_k_experts") or config.get("moe_k") or 1
    return (count, chosen) if count > 1 else (0, 0)


def _on(config: Config, setting: str) -> bool:
    return setting == "always" or bool(setting and config.get(setting))


def _mixer(own: Config, built: Built, index: int, layer: LayerShape, kind: str) -> int:
    """Attention, or what a layer has instead of it."""
    hidden = own["hidden_size"]
    if kind in ("moe", "mlp"):
        return 0
    if kind == "conv":
        return 4 * hidden * hidden + hidden * own["conv_L_cache"] + 5 * hidden * _on(own, "conv_bias")
    if kind == "linear_attention":
        return _delta_rule(own) if "linear_num_value_heads" in own else 0
    if layer.kind == "latent":
        return _latent(own, layer.query_heads)
    heads, kv_heads, dim = heads_of(own, index)
    queries, keys = heads * dim, kv_heads * dim
    twice = own["model_type"].startswith(("qwen3_next", "qwen3_5"))  # a gate beside the queries
    values = 0 if own.get("attention_k_eq_v") and kind == "full_attention" else keys
    if layer.kind == "shared":
        keys = values = 0
    made = queries * (1 + twice) + keys + values
    total = made * (hidden + _on(own, built.qkv)) + queries * hidden + hidden * _on(own, built.out)
    if built.qk_norm and (not built.qk_when or own.get(built.qk_when)):
        wide = queries + keys if built.qk_norm == "all" else dim * (2 if keys else 1)
        total += wide * (2 if own["model_type"] in ("persimmon", "phi") else 1)
    return total + heads * (own["model_type"] == "gpt_oss")  # its sinks


def _latent(own: Config, heads: int) -> int:
    """Multi-head latent attention."""
    hidden, rank, turned = own["hidden_size"], own["kv_lora_rank"], own["qk_rope_head_dim"]
    whole, value, narrow = own["qk_nope_head_dim"] + turned, own["v_head_dim"], own.get("q_lora_rank")
    queries = narrow * (hidden + 1 + heads * whole) if narrow else hidden * heads * whole
    keys = hidden * (rank + turned) + rank + rank * heads * (own["qk_nope_head_dim"] + value)
    biases = ((narrow or 0) + rank + turned + hidden) * _on(own, "attention_bias")
    return queries + keys + heads * value * hidden + biases


def _delta_rule(own: Config) -> int:
    """The linear attention of Qwen3-Next and Qwen3.5."""
    heads = own["linear_num_value_heads"]
    keys, values = own["linear_num_key_heads"] * own["linear_key_head_dim"], heads * own["linear_value_head_dim"]
    made = 2 * keys + 2 * values + 2 * heads
    mixed = (2 * keys + values) * own["linear_conv_kernel_dim"] + 2 * heads + own["linear_value_head_dim"]
    return own["hidden_size"] * (made + values) + mixed


def _norms(own: Config, built: Built) -> int:
    count = built.norms
    if own["model_type"] == "stablelm" and own.get("use_parallel_residual"):
        count = 1
    if own["model_type"] == "falcon" and own.get("parallel_attn"):
        count = own.get("num_ln_in_parallel_attn") or (2 if own.get("new_decoder_architecture") else 1)
    return count * own["hidden_size"] * (1 + built.centred)


def _mlp(own: Config, built: Built, index: int, layer: LayerShape) -> tuple[int, int, int]:
    """Weights of the MLP that each token goes through, of one expert, and of what is beside them in a layer."""
    family, hidden = own["model_type"], own["hidden_size"]
    width, bias = _width(own, index), _on(own, built.mlp)

    def matrices(width: int, bias: bool = bias) -> int:
        return (2 + built.gated) * hidden * width + ((1 + built.gated) * width + hidden) * bias

    beside = _beside(own, hidden)
    experts, _ = experts_of(own)
    if family == "gemma4_text":
        if own.get("use_double_wide_mlp") and layer.kind == "shared":
            width *= 2
        if not own.get("enable_moe_block"):
            return matrices(width), 0, beside
        router = experts * (hidden + 1) + hidden + 3 * hidden
        return matrices(width), matrices(own["moe_intermediate_size"]), beside + router
    if not experts or not _is_sparse(own, index):
        return matrices(own["intermediate_size_mlp"] if family == "llama4_text" else width), 0, beside
    inner = own.get("moe_intermediate_size") or width
    shared = own.get("shared_expert_intermediate_size") or (own.get("n_shared_experts") or 0) * inner
    gate = hidden if own.get("shared_expert_intermediate_size") else 0
    if family == "llama4_text":
        shared = width
    router = experts * (hidden + (family == "gpt_oss"))
    return matrices(shared) if shared else 0, matrices(inner, bias or family == "gpt_oss"), beside + gate + router


def _width(own: Config, index: int) -> int:
    """Of an MLP's middle."""
    names = {"gpt2": "n_inner", "gpt_bigcode": "n_inner", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}
    wide = own.get(names.get(own["model_type"], "intermediate_size"))
    if isinstance(wide, list | tuple):
        wide = wide[index]
    wide = wide or 4 * own["hidden_size"]
    if own.get("block_auto_adjust_ff_dim"):  # LFM2
        wide = int(2 * wide / 3)
        if own.get("block_ffn_dim_multiplier") is not None:
            block = own["block_multiple_of"]
            wide = -(-int(own["block_ffn_dim_multiplier"] * wide) // block) * block
    return int(wide)


def _is_sparse(own: Config, index: int) -> bool:
    """Whether a layer of a model with experts has them."""
    if own.get("mlp_layer_types"):
        return bool(own["mlp_layer_types"][index] == "sparse")
    if own["model_type"] == "llama4_text":
        every = own.get("interleave_moe_layer_step") or 1
        return index in own["moe_layers"] if own.get("moe_layers") is not None else (index + 1) % every == 0
    if index in (own.get("mlp_only_layers") or ()) or (index + 1) % (own.get("decoder_sparse_step") or 1):
        return False
    return index >= (own.get("first_k_dense_replace") or 0)


def _beside(own: Config, hidden: int) -> int:
    """What a layer has beside attention, MLP and their norms."""
    if own["model_type"] == "apertus":
        return 2  # of its activation
    narrow = own.get("hidden_size_per_layer_input") or 0
    total = 2 * hidden * narrow + hidden * bool(narrow)
    if own["model_type"] == "gemma3n_text":
        inputs, rank = own["altup_num_inputs"], own["laurel_rank"]
        total += inputs * inputs + inputs**3 + inputs * hidden + 2 * hidden  # AltUp
        total += 2 * rank * hidden + hidden  # LAuReL
    return total


def _outside(config: Config, built: Built, layers: int) -> tuple[int, int]:
    """What is outside the layers, beside words: looked up by a row a token, and the rest."""
    family, hidden = config["model_type"], config["hidden_size"]
    looked_up, rest = 0, hidden * (1 + built.centred) * bool(built.norms)
    if family in ("gpt2", "gpt_bigcode", "opt"):
        looked_up = (config["max_position_embeddings"] + 2 * (family == "opt")) * hidden
    if family == "opt" and (not config.get("do_layer_norm_before", True) or config.get("_remove_final_layer_norm")):
        rest = 0
    narrow = config.get("hidden_size_per_layer_input") or 0
    if narrow:
        looked_up += config["vocab_size_per_layer_input"] * narrow * layers
        rest += hidden * narrow * layers + narrow
    if family == "gemma3n_text":
        rest += 2 * (config["altup_num_inputs"] - 1) * hidden * hidden
    if family == "phi" or (family == "phimoe" and config.get("lm_head_bias")):
        rest += config["vocab_size"]
    return looked_up, rest
