"""A model whose attention is mixed from full and window attention by gates, one for each KV head, with gradients.

The gated attention calls the attention that the model's user chose twice: with the mask as it is, and with one that
leaves the first and the newest tokens only. So whatever a family does in there (grouped heads, soft caps, attention
sinks, windows of its own) is in both parts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fivefold.errors import UnsupportedModelError
from fivefold.models.selection import decoder_config, implementation, selected, stock_attention, stock_mask
from fivefold.models.specs import attention_modules, configs_of

_NAME = "fivefold_gated"
_GATE = "fivefold_gate"


def check_gates(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` unless a model can run with gates."""
    config = decoder_config(model)
    if getattr(config, "num_kv_shared_layers", 0):
        raise UnsupportedModelError(
            f"layers of this {config.model_type} model share keys and values, and gates for them cannot be trained: "
            "name the heads, as duo(retrieval=[[layer, kv_head], ...])."
        )
    for one in configs_of(model):
        if (name := implementation(one)) not in ("sdpa", "eager"):
            raise UnsupportedModelError(
                f"gates cannot be trained with the attention {name!r}, which takes no mask of ours: load the model "
                'with attn_implementation="sdpa".'
            )


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model is in eval mode and none of its weights wants a gradient; afterwards all is as it was."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    training = [module for module in model.modules() if module.training]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        for module in training:
            module.training = False
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
        for module in training:
            module.training = True


@contextlib.contextmanager
def gated(
    model: PreTrainedModel, gates: Mapping[int, torch.Tensor], sink: int, recent: int, recompute: bool = False
) -> Iterator[None]:
    """Within it, calls of the model without a cache mix the attention of the layers that `gates` names.

    gates: float32 `[kv_head]` by layer. A head's output is `gate * full + (1 - gate) * window` (section 2.2 of the
    DuoAttention paper), where window attention sees the first `sink` tokens and the last `recent` ones, the query's own
    included. Gradients reach the gates; backward belongs into the context. The mixing is done in float32.

    recompute: forget what is inside a layer, and compute it again for the backward. The model is as it was afterwards.
    Raises `UnsupportedModelError`.
    """
    check_gates(model)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, stock_mask)
    windows = functools.lru_cache(8)(functools.partial(_window, sink=sink, recent=recent))

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, _GATE: (gates[module.layer_idx], windows)}  # type: ignore[index]

    modules = [module for index, module in attention_modules(model).items() if index in gates]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if recompute:
            for layer in (layer for layer in model.modules() if any(m in modules for m in layer.children())):
                stack.enter_context(_recomputed(layer))
        stack.enter_context(selected(configs_of(model), _NAME))
        yield


def last_hidden_states(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What a model's head is given: `[batch, tokens, hidden]` of its dtype, behind the last norm. ids: int64 `[batch,
    tokens]`. Raises `UnsupportedModelError`."""
    out = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if out is not None:
        return out
    # The inner model is not where transformers says (Llama-4, models that peft has wrapped).
    found: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    if head is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no last hidden state and no head that is given one.")
    hook = head.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    return found[0]


@contextlib.contextmanager
def _recomputed(layer: torch.nn.Module) -> Iterator[None]:
    before = vars(layer).get("forward")
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before


def _window(tokens: int, device: torch.device, sink: int, recent: int) -> torch.Tensor:
    """Which tokens each query sees, bool `[1, 1, tokens, tokens]`."""
    at = torch.arange(tokens, device=device)
    back = at[:, None] - at
    return ((back >= 0) & ((back < recent) | (at < sink)))[None, None]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query `[batch, query_head, tokens, head_dim]`, key and value `[batch, kv_head, tokens, head_dim]`; returns
    `[batch, tokens, query_head, head_dim]`."""
    found = kwargs.pop(_GATE, None)
    full = stock_attention(module, query, key, value, attention_mask, **kwargs)[0]
    if found is None:
        return full, None
    gate, windows = found
    seen = windows(key.shape[2], key.device)
    if attention_mask is None:
        mask = seen
    elif attention_mask.dtype == torch.bool:
        mask = attention_mask & seen
    else:
        mask = attention_mask.masked_fill(~seen, torch.finfo(attention_mask.dtype).min)
    window = stock_attention(module, query, key, value, mask, **kwargs)[0].float()
    share = gate.to(full.device).repeat_interleave(query.shape[1] // key.shape[1])[:, None]
    return (window + share * (full.float() - window)).to(full.dtype), None
