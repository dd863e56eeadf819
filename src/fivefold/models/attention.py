"""The attention and mask functions that Fivefold registers with transformers under its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import causal_mask_function

from fivefold.engine.layer import attend
from fivefold.engine.session import Session
from fivefold.errors import CacheStateError, UnsupportedModelError
from fivefold.models.compiled import Handed, here, source_of
from fivefold.models.selection import NAME, is_selected, stock_attention, stock_mask, windows_here

CALLED = "fivefold_called"
"""The keyword argument by which a module's pre-hook tells the attention function what it was called with."""


@dataclass(frozen=True)
class Called:
    """The layer that an attention module works for, and what it was called with, where a codec wants to know it."""

    session: Session
    index: int
    positions: torch.Tensor | None
    inputs: torch.Tensor | None

    @property
    def stores(self) -> bool:
        """Whether the layer stores what it is given; else it shares the keys of another."""
        return self.index in self.session.stores

    def source(self, key: torch.Tensor, value: torch.Tensor) -> int | None:
        return source_of(self.session.brought, self.index, key, value)

    def attend(
        self,
        source: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        sinks: torch.Tensor | None,
        cap: float | None,
    ) -> torch.Tensor:
        out = attend(
            self.session, source, query, key, value, mask, scaling, self.positions, self.inputs, sinks, cap,
            not self.stores,
        )  # fmt: skip
        if self.index not in self.session.sources:
            self.session.brought.pop(self.index, None)
        self.session.done(self.index)
        return out


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, Any]:
    """query `[batch, query_head, tokens, head_dim]`, key and value `[batch, kv_head, tokens, head_dim]`."""
    called: Called | Handed | None = kwargs.pop(CALLED, None)
    index = None if called is None else called.source(key, value)
    # Or it shares the keys of a layer that stays transformers' own.
    if called is None or (index is None and not called.stores):
        return stock_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if index is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to other keys and values than it gives to the cache, which Fivefold "
            "cannot know of: use DynamicCache."
        )
    if kwargs.get("position_bias") is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks for a position bias, which Fivefold does not compute: use DynamicCache."
        )
    if kwargs.get("output_attentions"):
        raise CacheStateError(
            "output_attentions=True needs the whole attention matrix, which a compressed cache never builds: drop it."
        )
    if attention_mask is not None and attention_mask.shape[1:3] == (1, 1) and attention_mask.dtype == torch.bool:
        attention_mask = attention_mask[:, 0, 0]  # as `mask` gives it where layers share keys
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
    sinks, cap = kwargs.get("s_aux"), kwargs.get("softcap")
    return called.attend(index, query, key, value, attention_mask, scaling, sinks, cap), None


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
) -> Any:
    """The padding mask alone where the rest is plainly causal, so that no [query, key] matrix is built; for layers that
    stay transformers' own what they want."""
    alone = mask_function is causal_mask_function and local_size is None
    if here():  # the mask is with the cache
        if alone or (local_size is not None and kwargs.get("allow_is_causal_skip", True)):
            return None
        raise UnsupportedModelError(
            "a mask that is not causal cannot be used with a compressed cache: use DynamicCache."
        )
    plain = (
        is_selected(NAME)
        and (alone or (local_size in windows_here() and kwargs.get("allow_is_causal_skip", True)))
        and not isinstance(q_offset, torch.Tensor)
        and kv_offset == 0
        and kv_length == q_offset + q_length
        and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    )
    config = kwargs.get("config")
    if getattr(config, "num_kv_shared_layers", 0):
        # Such a model cuts the queries, and masks with four axes, down to the last tokens before the layers that share.
        kwargs["allow_is_causal_skip"] = False
        if plain and attention_mask is not None:
            return attention_mask[:, None, None]
    if plain:
        return attention_mask
    return stock_mask(
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
