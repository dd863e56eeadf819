"""What a model's layers are, from its configuration alone: for what serves it without transformers' own modules."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fivefold.errors import UnsupportedModelError
from fivefold.models.selection import decoder_config
from fivefold.models.specs import attention_modules, layer_spec
from fivefold.store import LayerSpec


def first_layer(name: str, **loading: Any) -> tuple[LayerSpec, int]:
    """What a session knows of the first layer of a model, on a CPU, and how many layers like it there are. No weights
    are read.

    loading: what transformers wants to know to load the configuration of `name`. Raises `UnsupportedModelError` for a
    model whose layers turn keys in different ways.
    """
    config = AutoConfig.from_pretrained(name, **loading)
    trust = {"trust_remote_code": True} if loading.get("trust_remote_code") else {}
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, **trust)
    text, modules = decoder_config(model), attention_modules(model)
    if not modules or not all(getattr(text, "no_rope_layers", None) or [1]):
        raise UnsupportedModelError(f"it is not known how the layers of {name} turn keys by position: use kivi().")
    # How keys are turned is found out by trying, which needs numbers: random ones for one layer.
    for path, module in [x for x in model.named_modules() if x[0].split(".")[-1] == "rotary_emb"]:
        model.get_submodule(path.rpartition(".")[0]).rotary_emb = type(module)(module.config)
    attention = modules[0].to_empty(device="cpu").float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.normal_(0, 0.05, generator=generator)
    return layer_spec(model, 0, attention, turned=True), text.num_hidden_layers
