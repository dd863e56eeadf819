"""What Fivefold must know of a model before it reads anything: its family, its layers, its rotary embedding."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from transformers import PreTrainedModel

from fivefold.calibrate.profile import config_hash, signature
from fivefold.errors import UnsupportedModelError
from fivefold.store.context import Rope
from fivefold.store.spec import LayerSpec

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gpt_neox")


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` unless the model's family is one that Fivefold attends for."""
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"models of the family {kind!r} are not supported: use one of {', '.join(FAMILIES)}."
        )
    if kind == "phi3" and config.max_position_embeddings > config.original_max_position_embeddings:
        # Its `prepare_inputs_for_generation` goes on with a cache of its own from there.
        raise UnsupportedModelError(
            f"this phi3 model scales its positions from {config.original_max_position_embeddings} tokens on (longrope) "
            "and drops its cache there, compressed or not: use one without."
        )


def weights_hash(model: PreTrainedModel) -> str:
    """SHA-256 of some numbers of every weight, by which models of the same shape are told apart; empty where weights
    are elsewhere (offloaded by accelerate)."""
    weights = dict(model.named_parameters())
    if any(x.device.type == "meta" for x in weights.values()):
        return ""
    out = hashlib.sha256()
    for device in dict.fromkeys(x.device for x in weights.values()):
        some = [
            x.detach().reshape(-1)[:: max(1, x.numel() // 61)].float() for x in weights.values() if x.device == device
        ]
        out.update(torch.cat(some).cpu().numpy().tobytes())
    return out.hexdigest()


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The model's attention modules by layer."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int)
    }


def device_of(module: torch.nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where accelerate brings them for it."""
    moved = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if moved is not None:
        return torch.device("cuda", moved) if isinstance(moved, int) else torch.device(moved)
    device = next(module.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


# One for all layers and caches of a model that have the same.
_ropes: weakref.WeakKeyDictionary[Any, dict[str, Rope]] = weakref.WeakKeyDictionary()


def rope_of(model: PreTrainedModel, index: int, head_dim: int) -> tuple[Rope | None, str]:
    """How the keys of a layer are turned by position; or None, and why that is not known."""
    rotary: Any = next((m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"), None)
    types = getattr(model.config, "layer_types", None)
    kind, inv_freq = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    if isinstance(kind, dict) and types:  # of each type of layer its own
        kind, inv_freq = kind.get(types[index]), getattr(rotary, f"{types[index]}_inv_freq", None)
    if inv_freq is None:
        return None, f"Fivefold finds no rotary embedding in this {model.config.model_type} model"
    if kind not in ("default", "linear", "llama3", "yarn"):
        return None, f"its rotary embedding ({kind}) changes with the length of the text"
    made = _ropes.setdefault(rotary, {})
    key = types[index] if types and isinstance(rotary.rope_type, dict) else ""
    if key not in made or not torch.equal(made[key].inv_freq, inv_freq.detach().double().cpu()):
        made[key] = Rope(inv_freq, head_dim)
    return made[key], ""


def layer_spec(model: PreTrainedModel, index: int, module: torch.nn.Module) -> LayerSpec:
    """What the methods may know about a layer of a model."""
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope, no_rope = rope_of(model, index, head_dim)
    return LayerSpec(
        layer=index,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        query_heads=heads,
        head_dim=head_dim,
        dtype=model.dtype,
        device=device_of(module),
        model=signature(config),
        config=config_hash(config),
        rope=rope,
        no_rope=no_rope,
    )
