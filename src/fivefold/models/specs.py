"""What Fivefold must know of a model before it reads anything: whether it can attend for it, and its layers."""

from __future__ import annotations

import hashlib
import inspect
import itertools
from typing import Any

import torch
from transformers import PreTrainedModel

from fivefold.calibrate.profile import config_hash, of_layer, signature
from fivefold.errors import UnsupportedModelError
from fivefold.models.rotary import rope_of
from fivefold.models.selection import decoder_config
from fivefold.store.spec import DTYPES, LayerSpec


def configs_of(model: PreTrainedModel) -> list[Any]:
    """Those from which a model's attention and masks take their implementation."""
    found = [module.config for module in attention_modules(model).values() if hasattr(module, "config")]
    return list({id(config): config for config in (decoder_config(model), *found)}.values())


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The attention modules of a model's decoder by layer."""
    config = decoder_config(model)
    return {
        module.layer_idx: module
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
        and isinstance(getattr(module, "layer_idx", None), int)
        and (config is model.config or getattr(module, "config", config) is config)
    }


def decoder_layers(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The layers that hold those modules, by the same numbers."""
    indices = {module: index for index, module in attention_modules(model).items()}
    return {indices[child]: layer for layer in model.modules() for child in layer.children() if child in indices}


def rope_switch(model: PreTrainedModel) -> int | None:
    """From how many tokens on a model turns keys by position in another way (longrope); None if it never does."""
    config = decoder_config(model)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return None
    first = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return first if first and first < config.max_position_embeddings else None


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` unless Fivefold can do what the model's attention does."""
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no model of transformers: give one that AutoModelForCausalLM loads."
        )
    config = decoder_config(model)
    why = _why_not(model, config)
    if why is not None:
        raise UnsupportedModelError(
            f"models of the family {config.model_type!r} are not supported, because {why}: use DynamicCache for it."
        )


def _why_not(model: PreTrainedModel, config: Any) -> str | None:
    if getattr(config, "is_encoder_decoder", False):
        return "they are encoder-decoder models, whose cross-attention has a cache of another kind"
    if getattr(config, "kv_lora_rank", None):
        return "their attention (MLA) keeps a compressed latent instead of keys and values"
    modules = attention_modules(model)
    if not modules:
        return "none of their layers is an attention module that transformers numbers"
    for module in {type(module): module for module in modules.values()}.values():
        forward = inspect.unwrap(type(module).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
            return f"{type(module).__name__} computes attention in code of its own, not through AttentionInterface"
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()):
            return f"{type(module).__name__} hands nothing on to the attention function"
        if not getattr(module, "is_causal", True):
            return f"{type(module).__name__} is not causal"
        dims = [getattr(module, name, None) for name in ("head_dim", "v_head_dim")]
        if None not in dims and dims[0] != dims[1]:
            return f"{type(module).__name__} has values of {dims[1]} channels beside keys of {dims[0]}"
    return None


def has_weights(model: torch.nn.Module) -> bool:
    """Whether there is anything to compute with: weights that are here, or that accelerate brings."""
    tensors = [*model.parameters(), *model.buffers()]
    brought = any(hasattr(module, "_hf_hook") for module in model.modules())
    return brought or any(x.device.type != "meta" for x in tensors)


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of some numbers of every weight, by which models of the same shape are told apart; empty where weights
    are elsewhere (offloaded by accelerate), or not in tensors that can be read."""
    weights = dict(model.named_parameters())
    if not weights or any(x.device.type == "meta" for x in weights.values()):
        return ""
    out = hashlib.sha256()
    for device in dict.fromkeys(x.device for x in weights.values()):
        some = [
            x.detach().reshape(-1)[:: max(1, x.numel() // 61)].float() for x in weights.values() if x.device == device
        ]
        out.update(torch.cat(some).cpu().numpy().tobytes())
    return out.hexdigest()


def device_of(module: torch.nn.Module, model: torch.nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them for it."""
    moved = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if moved is not None:
        return torch.device("cuda", moved) if isinstance(moved, int) else torch.device(moved)
    for part in (module, model):
        for tensor in (*part.parameters(), *part.buffers()):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("cpu")


def _dtype_of(module: torch.nn.Module, model: PreTrainedModel) -> torch.dtype:
    """A guess at what keys are in: the first chunk says it."""
    tensors = itertools.chain(module.parameters(), model.parameters(), model.buffers())  # a large model has thousands
    found: set[torch.dtype] = set()
    for x in tensors:
        if x.dtype in DTYPES:
            return x.dtype
        found.add(x.dtype)
    if torch.float64 in found:
        raise UnsupportedModelError("a model in torch.float64 is not supported: load it in bfloat16 or float32.")
    return torch.float32


def layer_spec(model: PreTrainedModel, index: int, module: torch.nn.Module, turned: bool) -> LayerSpec:
    """What the methods may know about a layer of a model; the first chunk corrects what is guessed here.

    turned: whether a method wants to know how keys are turned by position.
    """
    config: Any = decoder_config(model)
    own: Any = of_layer(config, index)
    heads, kv_heads = (_number(getattr(own, f"num_{name}_heads", None), index) for name in ("attention", "key_value"))
    kv_heads = kv_heads or heads
    dim = getattr(module, "head_dim", None) or getattr(own, "head_dim", None) or config.hidden_size // heads
    made = getattr(getattr(module, "k_proj", None), "out_features", None)
    if isinstance(made, int) and made % dim == 0:
        kv_heads = made // dim
        heads = kv_heads * getattr(module, "num_key_value_groups", heads // kv_heads)
    rope, no_rope = None, "the method says that it does not ask (`before_rope = False`)"
    if turned:
        rope, no_rope = rope_of(model, index, module, dim)
    return LayerSpec(
        layer=index,
        layers=config.num_hidden_layers,
        kv_heads=kv_heads,
        query_heads=heads,
        head_dim=dim,
        dtype=_dtype_of(module, model),
        device=device_of(module, model),
        model=signature(config),
        config=config_hash(config),
        rope=rope,
        no_rope=no_rope,
    )


def _number(value: Any, index: int) -> Any:
    return value[index] if isinstance(value, list | tuple) else value
