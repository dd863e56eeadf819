"""What a model is recognised by: the shape of its decoder, and what in its configuration shapes keys and values."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# What in a configuration shapes keys and values; the rest changes with transformers' version and with where it lies.
_SHAPING = (
    "model_type", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size",
    "intermediate_size", "vocab_size", "layer_types", "sliding_window", "hidden_act", "rms_norm_eps", "layer_norm_eps",
    "rope_parameters", "attention_bias", "query_pre_attn_scalar", "use_parallel_residual",
)  # fmt: skip


def signature(config: Any) -> str:
    """The shape of a decoder as a short text: what a profile is matched with.

    config: a transformers configuration of a decoder-only model.
    """
    first = of_layer(config, 0)
    heads = first.num_attention_heads
    kv_heads = getattr(first, "num_key_value_heads", None) or heads
    dim = getattr(first, "head_dim", None) or config.hidden_size // heads
    return f"{config.model_type}-l{config.num_hidden_layers}-q{heads}-kv{kv_heads}-d{dim}-v{config.vocab_size}"


def of_layer(config: Any, index: int) -> Any:
    """The configuration of one layer, where layers have their own."""
    return config.per_layer_config[index] if getattr(config, "is_heterogeneous", False) else config


def _own_names(config: Any) -> list[str]:
    """What each layer has a value of its own for."""
    return sorted(getattr(config, "per_layer_attributes", None) or ())


def config_hash(config: Any) -> str:
    """SHA-256 of everything in a model's configuration that shapes its keys and values, the weights aside."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    shaping = {name: getattr(text, name, None) for name in _SHAPING if name not in _own_names(text)}
    if _own_names(text):  # of layers that differ
        count = text.num_hidden_layers
        shaping |= {name: [getattr(of_layer(text, i), name, None) for i in range(count)] for name in _own_names(text)}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()
