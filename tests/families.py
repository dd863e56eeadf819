"""Tiny random models of every family that is known to work, and of some that are refused, for `test_families.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 131
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
_MIXED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2}
_SHARED = {
    **_MIXED, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
}  # fmt: skip

TAKEN: dict[str, dict[str, Any]] = {
    "apertus": {},
    "arcee": {},
    "cohere": {},
    "cohere2": _MIXED,
    "ernie4_5": {},
    "exaone4": _MIXED,
    "gemma": {},
    "gemma2": {**_MIXED, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 1.0},
    "gemma3_text": _MIXED,
    "gemma3n_text": {
        **_SHARED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, "altup_num_inputs": 2,
    },
    "gemma4_text": {**_SHARED, "global_head_dim": 32},
    "glm": {},
    "glm4": {},
    "glm4_moe": {"moe_intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2},
    "gpt_neox": {},
    "gpt_oss": {**_MIXED, "num_local_experts": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4},
    "helium": {},
    "hunyuan_v1_dense": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama": {},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 24},
    "ministral": _MIXED,
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": _MIXED,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "phimoe": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48},
    "qwen3": {},
    "qwen3_5_text": _LINEAR,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_LINEAR, "shared_expert_intermediate_size": 48},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
}  # fmt: skip
"""Families by their settings beside the common ones."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "computes attention in code of its own"),
    "deepseek_v3": ({"q_lora_rank": 16, "kv_lora_rank": 16, "num_key_value_heads": 4}, "compressed latent"),
    "diffllama": ({}, "attends to other keys and values than it gives to the cache"),
    "doge": ({}, "attention mask of shape"),
    "falcon": ({"head_dim": None}, "computes attention in code of its own"),
    "mamba": ({}, "none of their layers is an attention module"),
}
"""Families that are refused, by what they do, and what the sentence says of it."""


def build(family: str, seed: int = 0, kind: Any = AutoModelForCausalLM, **changes: Any) -> Any:
    """A model of a family with wide random weights, so that its greedy tokens are not one for ever."""
    settings = {**_COMMON, **TAKEN.get(family, REFUSED.get(family, ({}, ""))[0]), **changes}
    config = AutoConfig.for_model(
        family, **{name: x for name, x in settings.items() if (name, x) != ("head_dim", None)}
    )
    return widen(kind.from_config(config), seed)


def widen(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim >= 2:
            weight.data.normal_(0, 0.12, generator=generator)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):  # attention sinks that matter
            weight.data.normal_(1, 1, generator=generator)
    model.generation_config.update(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    return model.eval()


_TEXT = {**_COMMON, "num_hidden_layers": 3}


def gemma3() -> Any:
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14,
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config={**_COMMON, **_MIXED}, vision_config=vision, image_token_index=127, boi_token_index=126,
        eoi_token_index=125, mm_tokens_per_image=4,
    )  # fmt: skip
    return widen(transformers.Gemma3ForConditionalGeneration(config))


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14,
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, "rope_parameters": rope}, vision_config=vision, image_token_id=127, video_token_id=126,
        vision_start_token_id=125, vision_end_token_id=124,
    )  # fmt: skip
    return widen(transformers.Qwen2_5_VLForConditionalGeneration(config))


MULTIMODAL: dict[str, Callable[[], Any]] = {"gemma3": gemma3, "qwen2_5_vl": qwen2_5_vl}
"""Models for text and pictures, which are given text here."""
