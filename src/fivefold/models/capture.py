"""What a method learns from, taken from a model of transformers while it reads.

The attention function is the one place that sees queries, keys and values of every family in the same shape, whatever
projections and norms made them. They come with RoPE, which the pre-hook's `position_embeddings` take off again.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fivefold.calibrate.learner import OBSERVED, Capture
from fivefold.models.attention import mask, stock_attention
from fivefold.models.specs import attention_modules

_NAME = "fivefold_capture"
_SEEN = "fivefold_seen"


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """`(a, b)` to `(-b, a)`, the halves of the last axis."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE as the supported families apply it. x: `[batch, heads, tokens, head_dim]`; cos, sin: `[batch, tokens,
    rotary_dim]`, of which the channels from rotary_dim on are left as they are."""
    cos, sin = cos[:, None].float(), sin[:, None].float()
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + rotate_half(turned) * sin, passed], -1)


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """What `rotate` made `x` of: the rotation back, and a scaling of cos and sin (YaRN) undone."""
    scale = cos.float().square() + sin.float().square()
    return rotate(x, cos.float() / scale, -sin.float() / scale)


@contextlib.contextmanager
def capturing(
    model: PreTrainedModel, wanted: Collection[Capture], see: Callable[[int, dict[Capture, torch.Tensor]], None]
) -> Iterator[None]:
    """Within it, every forward of the model without a cache calls `see(layer, captured)` for each layer.

    What is captured has the shapes of `fivefold.calibrate.learner.Capture`. The model is as it was afterwards.
    """
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, mask)
    signatures = {index: inspect.signature(module.forward) for index, module in attention_modules(model).items()}

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index: int = module.layer_idx  # type: ignore[assignment]
        given = signatures[index].bind(*args, **kwargs).arguments
        cos, sin = given["position_embeddings"]

        def take(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
            captured: dict[Capture, torch.Tensor] = {}
            if "keys" in wanted:
                captured["keys"] = unrotate(key.float(), cos, sin)
            if "queries" in wanted:
                captured["queries"] = unrotate(query.float(), cos, sin)
            if "values" in wanted:
                captured["values"] = value.float()
            if "inputs" in wanted:
                captured["inputs"] = given["hidden_states"].float()
            if "attention" in wanted:
                captured["attention"] = _weights(query[:, :, -OBSERVED:].float() * scaling, key.float())
            see(index, captured)

        return args, {**kwargs, _SEEN: take}

    before = model.config._attn_implementation
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in attention_modules(model).values()]
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        for one in hooks:
            one.remove()
        model.set_attn_implementation(before)


def _weights(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last queries, `[batch, query_head, queries, tokens]`."""
    count, tokens = queries.shape[2], keys.shape[2]
    scores = torch.matmul(queries.unflatten(1, (keys.shape[1], -1)), keys[:, :, None].transpose(3, 4)).flatten(1, 2)
    later = torch.ones((count, tokens), dtype=torch.bool, device=keys.device).triu_(tokens - count + 1)
    return scores.masked_fill_(later, float("-inf")).softmax(-1)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    take = kwargs.pop(_SEEN, None)
    if take is not None:
        take(query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return stock_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
