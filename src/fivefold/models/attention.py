"""The attention and mask functions that Fivefold registers with transformers under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fivefold.engine.layer import attend
from fivefold.engine.session import Session
from fivefold.errors import CacheStateError, UnsupportedModelError

NAME = "fivefold"
CALLED = "fivefold_called"
"""The keyword argument by which a module's pre-hook tells the attention function what it was called with."""


@dataclass(frozen=True)
class Called:
    """The layer that an attention module works for, and what it was called with, where a codec wants to know it."""

    session: Session
    index: int
    positions: torch.Tensor | None
    inputs: torch.Tensor | None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query `[batch, query_head, tokens, head_dim]`, key and value `[batch, kv_head, tokens, head_dim]`."""
    called: Called | None = kwargs.pop(CALLED, None)
    if called is None:
        return stock_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} asks for {name}, which Fivefold does not compute: use DynamicCache."
            )
    if kwargs.get("output_attentions"):
        raise CacheStateError(
            "output_attentions=True needs the whole attention matrix, which a compressed cache never builds: drop it."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise CacheStateError(
            f"an attention mask of shape {tuple(attention_mask.shape)} cannot be used with a compressed cache: "
            "give a [batch, tokens] padding mask over all tokens so far, or none."
        )
    if query.requires_grad or key.requires_grad or value.requires_grad:
        raise CacheStateError(
            "a compressed cache does not train: call the model under torch.inference_mode() or torch.no_grad()."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(
        called.session, called.index, query, key, value, attention_mask, scaling, called.positions, called.inputs
    )
    called.session.done(called.index)
    return out, None


def stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA for any cache but ours, with the causal mask that `mask` left to the caller."""
    chunk, total = query.shape[2], key.shape[2]
    padded = attention_mask is not None and attention_mask.ndim == 2
    if padded or (attention_mask is None and 1 < chunk < total):
        attention_mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=chunk,
            kv_length=total,
            q_offset=total - chunk,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=query.device,
        )
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask alone where the rest is plainly causal, so that no [query, key] matrix is built."""
    plain = (
        mask_function is causal_mask_function
        and local_size is None
        and not isinstance(q_offset, torch.Tensor)
        and kv_offset == 0
        and kv_length == q_offset + q_length
        and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    )
    if plain:
        return attention_mask
    if 1 < q_length < kv_length:
        # `stock_attention` takes None for the last queries of all tokens, SDPA for the first (static caches).
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )
