"""How a model's layers turn keys by position: found out by trying.

Families differ in which channels they turn together (i and i + d/2, or 2i and 2i + 1), and some layers turn nothing. So
an attention module is called with one random token at two positions, and its keys say which it is. That is done for the
methods alone that keep keys as they are before the rotary embedding, or learn from them.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Literal

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from fivefold.models.selection import decoder_config, selected
from fivefold.store.context import Rope

_NAME = "fivefold_probe"
_POSITION = 3
"""Far enough for every pair of channels to be turned, near enough for none to have come round."""

Turning = Literal["halves", "neighbours", "none"]
"""Which channels are turned together: i and i + d/2, 2i and 2i + 1, or none at all."""

# Of each rotary module: ropes by type of layer and by turning. One for all layers and caches that have the same.
_ropes: weakref.WeakKeyDictionary[Any, dict[Any, Rope]] = weakref.WeakKeyDictionary()
_turnings: weakref.WeakKeyDictionary[Any, Turning | None] = weakref.WeakKeyDictionary()


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """`(a, b)` to `(-b, a)`, the halves of the last axis."""
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turning: Turning = "halves") -> torch.Tensor:
    """A rotary embedding. x: `[batch, heads, tokens, head_dim]`; cos, sin: `[batch, tokens, rotary_dim]`, as a model
    makes them; the channels from rotary_dim on are left as they are."""
    if turning == "none":
        return x
    cos, sin = cos[:, None].float(), sin[:, None].float()
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if turning == "halves":
        turned = turned * cos + rotate_half(turned) * sin
    else:
        # A model may give each angle twice in either order: the first half, or every second one.
        cos, sin = (y[..., ::2] if _twice(y) else y[..., : y.shape[-1] // 2] for y in (cos, sin))
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    return torch.cat([turned, passed], -1)


def _twice(x: torch.Tensor) -> bool:
    """Whether neighbours are the same."""
    return bool(torch.equal(x[..., ::2], x[..., 1::2]))


def unrotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turning: Turning = "halves") -> torch.Tensor:
    """What `rotate` made `x` of: the rotation back, and a scaling of cos and sin (YaRN) undone."""
    scale = cos.float().square() + sin.float().square()
    return rotate(x, cos.float() / scale, -sin.float() / scale, turning)


def _rotary_of(model: PreTrainedModel) -> Any:
    """The rotary embedding of a model's decoder."""
    config = decoder_config(model)
    found = [module for name, module in model.named_modules() if name.split(".")[-1] == "rotary_emb"]
    return next((one for one in found if getattr(one, "config", config) is config), None)


def _type_of(rotary: Any, config: Any, index: int) -> str:
    """The type of a layer, where the embedding has frequencies of its own for each; else empty."""
    types = getattr(config, "layer_types", None)
    return types[index] if types and isinstance(getattr(rotary, "rope_type", None), dict) else ""


@torch.no_grad()
def turning_of(model: PreTrainedModel, index: int, module: torch.nn.Module) -> Turning | None:
    """Which channels of its keys a layer turns together; None if that cannot be found out."""
    if module not in _turnings:
        try:
            _turnings[module] = _probe(model, index, module)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError):
            _turnings[module] = None  # a module that wants to be called otherwise
    return _turnings[module]


def _probe(model: PreTrainedModel, index: int, module: torch.nn.Module) -> Turning | None:
    rotary, seen = _rotary_of(model), []

    def take(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **kwargs: Any) -> tuple[Any, None]:
        seen.append(key.detach().float())
        return query.transpose(1, 2), None

    AttentionInterface.register(_NAME, take)
    config: Any = decoder_config(model)
    weights = [x for x in (*module.parameters(), *model.parameters()) if x.is_floating_point()]
    dtype = weights[0].dtype if weights else torch.float32
    device = next((x.device for x in weights if x.device.type != "meta"), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, 1, config.hidden_size), generator=generator).to(device, dtype)
    typed = _type_of(rotary, config, index)
    names = inspect.signature(module.forward).parameters
    embeddings = []
    with selected([module.config], _NAME):
        for position in (0, _POSITION):
            at = torch.full((1, 1), position, device=device)
            embeddings.append(rotary(hidden, at, *([typed] if typed else [])))
            given: dict[str, Any] = {"attention_mask": None, "position_ids": at, "past_key_values": None}
            given = {name: value for name, value in given.items() if name in names}
            module(hidden_states=hidden, position_embeddings=embeddings[-1], **given)
    plain = unrotate(seen[0], *embeddings[0])  # at position 0 only a scaling
    cos, sin = embeddings[1]
    turnings: tuple[Turning, ...] = ("halves", "neighbours", "none")
    for turning in turnings:
        expected = seen[0] if turning == "none" else rotate(plain, cos, sin, turning)
        off, most = (x[x.isfinite()] for x in ((expected - seen[1]).abs(), plain.abs()))
        if len(off) and off.amax() < 0.02 * most.amax():
            return turning
    return None


def rope_of(model: PreTrainedModel, index: int, module: torch.nn.Module, head_dim: int) -> tuple[Rope | None, str]:
    """How the keys of a layer are turned by position; or None, and why that is not known."""
    config = decoder_config(model)
    rotary = _rotary_of(model)
    typed = _type_of(rotary, config, index)
    kind, inv_freq = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    if typed:
        kind, inv_freq = rotary.rope_type.get(typed), getattr(rotary, f"{typed}_inv_freq", None)
    if inv_freq is None:
        return None, f"Fivefold finds no rotary embedding in this {config.model_type} model"
    if kind not in ("default", "linear", "llama3", "yarn"):
        return None, f"its rotary embedding ({kind}) changes with the length of the text"
    turning = turning_of(model, index, module)
    if turning is None:
        return None, f"Fivefold does not know how {type(module).__name__} turns keys by position"
    if turning == "none":
        inv_freq = inv_freq[:0]
    made = _ropes.setdefault(rotary, {})
    key = typed, turning
    if key not in made or not torch.equal(made[key].inv_freq, inv_freq.detach().double().cpu()):
        made[key] = Rope(inv_freq, head_dim, neighbours=turning == "neighbours")
    return made[key], ""
