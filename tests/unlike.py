"""Models that fused kernels must leave to their own code, each with what is said of it."""

from __future__ import annotations

from typing import Any

import torch

from families import build

ONE = {"head_dim": 64, "num_hidden_layers": 1}
TWO = {"head_dim": 64, "num_hidden_layers": 2}
Case = tuple[Any, str]


class Scaled(torch.nn.Linear):
    """What an adapter, or a quantised weight, would be."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def multiplied(device: torch.device) -> Case:
    return build("granite", residual_multiplier=0.3, **ONE).to(device), "layer 0 computes something else"


def logits_scaled(device: torch.device) -> Case:
    return build("granite", logits_scaling=3.0, **ONE).to(device), "the head computes something else"


def hooked(device: torch.device) -> Case:
    model = build("llama", **TWO).to(device)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: 2 * out)
    return model, "a hook of unlike on model.layers.1.mlp"


def adapted(device: torch.device) -> Case:
    model = build("llama", **TWO)
    mine = Scaled(64, 96, bias=False)
    mine.weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj = mine
    return model.to(device), "a projection is a Scaled"


def wrapped(device: torch.device) -> Case:
    model = build("llama", **TWO).to(device)
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: type(mlp).forward(mlp, x)
    return model, "another forward in the place of that of model.layers.0.mlp"


def other_parts(device: torch.device) -> Case:
    return build("olmo2", **ONE).to(device), "Olmo2DecoderLayer without input_layernorm"


ALL = [multiplied, hooked, other_parts, logits_scaled, adapted, wrapped]
"""Of these a quick run takes the first."""


def asking(device: torch.device) -> Case:
    model = build("llama", **ONE).to(device)
    model.config.output_hidden_states = True
    return model, "asks for hidden states"
