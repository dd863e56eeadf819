"""A model of transformers rewritten to fewer KV heads: what `fivefold.convert` needs to know of it, and does to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fivefold.calibrate.learner import Capture, second_moments
from fivefold.calibrate.reading import chunks, default_texts
from fivefold.errors import InputError, UnsupportedModelError, first_line
from fivefold.merging import By, Group, Heads
from fivefold.models.capture import capturing
from fivefold.models.rotary import rope_of
from fivefold.models.selection import decoder_config
from fivefold.models.specs import attention_modules, check_model

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_SIDES: tuple[Capture, Capture] = ("keys", "values")
_NORMS = ("q_norm.weight", "k_norm.weight")
_MORE = 4
"""Padded groups are at most so many times as large as they have to be."""

Moments = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """query_heads, kv_heads, head_dim of all layers. pairs: of each layer int64 `[pairs, 2]`, the channels of a head
    that RoPE turns together."""

    query_heads: int
    kv_heads: int
    head_dim: int
    pairs: dict[int, torch.Tensor]


def shape_of(model: PreTrainedModel, align: bool) -> Shape:
    """What heads a model has. Raises `UnsupportedModelError` where they cannot be rewritten."""
    check_model(model)
    config, modules = decoder_config(model), attention_modules(model)
    query_heads, kv_heads = (getattr(config, f"num_{name}_heads", None) for name in ("attention", "key_value"))
    if not isinstance(query_heads, int) or not isinstance(kv_heads, int) or query_heads % kv_heads:
        raise _refused(config, f"its configuration does not say how many KV heads all layers have ({kv_heads})")
    pairs, dims = {}, set()
    for index, module in modules.items():
        why = _why_not(module, query_heads, kv_heads, align)
        if why is not None:
            raise _refused(config, why)
        dim: int = module.k_proj.out_features // kv_heads  # type: ignore[union-attr, operator, assignment]
        dims.add(dim)
        pairs[index] = torch.empty(0, 2, dtype=torch.long)
        if align:
            rope, no_rope = rope_of(model, index, module, dim)
            if rope is None:
                raise _refused(
                    config, f"{no_rope}, and heads cannot be aligned then (align=False merges them as they are)"
                )
            pairs[index] = rope.order[: 2 * rope.pairs].view(-1, 2)
    if len(dims) != 1:
        raise _refused(config, f"its layers have heads of {', '.join(map(str, sorted(dims)))} channels")
    return Shape(query_heads, kv_heads, dims.pop(), pairs)


def _refused(config: Any, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"this {config.model_type} model cannot be converted to fewer KV heads: {why}.")


def _why_not(module: nn.Module, query_heads: int, kv_heads: int, align: bool) -> str | None:
    name = type(module).__name__
    for part in _PROJECTIONS:
        linear = getattr(module, part, None)
        if type(linear) is not nn.Linear:
            found = "none" if linear is None else f"a {type(linear).__name__}"
            return f"{name} needs a torch.nn.Linear called {part} and has {found}"
        if linear.weight.device.type == "meta" or hasattr(linear, "_hf_hook"):
            return f"the weights of {name} are not here (load it without offloading)"
        if not linear.weight.is_floating_point():
            return f"the weights of {name} are quantised"
    q_proj, k_proj, v_proj, o_proj = (getattr(module, part) for part in _PROJECTIONS)
    dim = k_proj.out_features // kv_heads
    if (q_proj.out_features, v_proj.out_features, o_proj.in_features) != (
        query_heads * dim, kv_heads * dim, query_heads * dim,
    ) or k_proj.out_features % kv_heads:  # fmt: skip
        return f"the projections of {name} do not have {query_heads} query heads over {kv_heads} KV heads"
    known = {f"{part}.{kind}" for part in _PROJECTIONS for kind in ("weight", "bias")}
    rest = {part: x for part, x in module.named_parameters() if part not in known}
    strange = [part for part, x in rest.items() if part not in _NORMS or x.shape != (dim,)]
    if strange:
        return f"{name} has parameters that depend on its heads, or may ({', '.join(strange)})"
    if align and any(part == "k_norm.weight" or part == "q_norm.weight" for part in rest):
        return f"{name} normalises queries and keys, which does not commute with aligning heads (use align=False)"
    return None


def moments(model: PreTrainedModel, tokenizer: Any, ids: torch.Tensor | None, tokens: int) -> dict[int, Moments]:
    """Second moments of keys before RoPE and of values, of all heads of each layer: float64 `[n, n]` each."""
    longest = getattr(decoder_config(model), "max_position_embeddings", None)
    if ids is None:
        pieces = chunks(tokenizer, default_texts(), tokens, 0, longest)
    elif ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        raise InputError(f"convert(ids=...) are token ids [texts, tokens], and these are {ids.dtype} {[*ids.shape]}.")
    else:
        pieces = list(ids.split(1))
    out: dict[int, Moments] = {}

    def see(layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        keys, values = (second_moments(captured[name].cpu()) for name in _SIDES)
        had = out.get(layer)
        out[layer] = (keys, values) if had is None else (had[0] + keys, had[1] + values)

    training = model.training
    try:
        model.eval()
        with torch.inference_mode(), capturing(model, _SIDES, see):
            for piece in pieces:
                model(input_ids=piece.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        model.train(training)
    if not all(bool(x.isfinite().all()) for both in out.values() for x in both):
        raise InputError("keys or values of the text hold infinities or NaN: load the model in float32 or bfloat16.")
    return out


def groups_of(
    shape: Shape, moments: Mapping[int, Moments] | None, kv_heads: int, by: By, align: bool
) -> dict[int, list[Group]]:
    """The new KV heads of every layer. moments: of each layer, if `by` or `align` need them."""
    out = {}
    for layer, pairs in shape.pairs.items():
        heads = Heads(shape.query_heads, shape.kv_heads, shape.head_dim, pairs, align)
        out[layer] = heads.groups(kv_heads, by, *(moments[layer] if moments is not None else (None, None)))
    return out


@torch.no_grad()
def rewrite(model: PreTrainedModel, shape: Shape, layers: Mapping[int, list[Group]]) -> PreTrainedModel:
    """Give the model these groups as its KV heads. Everything is worked out before anything is changed."""
    config = decoder_config(model)
    count = len(next(iter(layers.values())))
    modules = attention_modules(model)
    least = max(len(group.queries) for groups in layers.values() for group in groups)
    size = _size(config, next(iter(modules.values())), shape, count, least)
    made = {index: _projections(modules[index], shape, groups, size) for index, groups in layers.items()}
    for index, linears in made.items():
        module: Any = modules[index]
        for name, linear in linears.items():
            setattr(module, name, linear)
        module.num_key_value_groups = size
        for name, value in (("num_heads", count * size), ("num_key_value_heads", count)):
            if hasattr(module, name):
                setattr(module, name, value)
    for one in {id(c): c for c in (config, *(getattr(modules[index], "config", config) for index in made))}.values():
        _set(one, shape, count, size)
    return model


def _set(config: Any, shape: Shape, count: int, size: int) -> None:
    config.head_dim = shape.head_dim
    config.num_attention_heads, config.num_key_value_heads = count * size, count


def _size(config: Any, module: nn.Module, shape: Shape, count: int, least: int) -> int:
    """Query heads of a group, padding included: as few as the configuration's own checks allow, and with which the
    family makes an attention module of these heads (some take head_dim for hidden_size / num_attention_heads)."""
    why = ""
    for size in range(least, _MORE * least + 1):
        tried = copy.deepcopy(config)
        try:
            _set(tried, shape, count, size)
            type(config)(**tried.to_dict())
            with torch.device("meta"):
                made: Any = type(module)(tried, layer_idx=module.layer_idx)
            if {made.q_proj.out_features, made.o_proj.in_features} == {count * size * shape.head_dim}:
                return size
            why = why or f"{type(module).__name__} makes heads of another size then"
        except Exception as error:  # of whatever type the configuration's checks raise
            why = why or first_line(error)
    raise InputError(
        f"convert(kv_heads={count}) makes {count * least} query heads or more, which a {config.model_type} "
        f"configuration does not take ({why}): use another number."
    )


def _projections(module: nn.Module, shape: Shape, groups: list[Group], size: int) -> dict[str, nn.Linear]:
    """New projections of an attention module."""
    old = {name: getattr(module, name) for name in _PROJECTIONS}
    dim, each = shape.head_dim, shape.query_heads // shape.kv_heads

    def rows(name: str, kind: str) -> torch.Tensor:
        """`[head, head_dim, inputs]` (of a bias 1), of o_proj its columns so: float64."""
        x = getattr(old[name], kind).detach().double()
        if name == "o_proj":
            x = x.T
        return x.reshape(-1, dim, x.shape[1] if kind == "weight" else 1)

    out = {}
    for name, linear in old.items():
        query_side, turn = name in ("q_proj", "o_proj"), 0 if name in ("q_proj", "k_proj") else 1
        heads = len(groups) * (size if query_side else 1) * dim
        inputs, outputs = (heads, linear.out_features) if name == "o_proj" else (linear.in_features, heads)
        new = nn.Linear(inputs, outputs, bias=linear.bias is not None, device="meta")
        for kind in ("weight", "bias") if linear.bias is not None else ("weight",):
            parameter = getattr(linear, kind)
            if name == "o_proj" and kind == "bias":
                x = parameter.detach().clone()
            else:
                x = rows(name, kind)
                parts = []
                for group in groups:
                    turns = {head: both[turn].to(x.device) for head, both in group.turns.items()}
                    if query_side:
                        parts += [turns[query // each] @ x[query] for query in group.queries]
                        parts += [torch.zeros_like(x[0])] * (size - len(group.queries))
                    else:
                        parts.append(sum((s * turns[h] @ x[h] for h, s in group.share.items()), torch.zeros_like(x[0])))
                x = torch.cat(parts)
                x = x.T if name == "o_proj" else x if kind == "weight" else x[:, 0]
            made = nn.Parameter(x.to(parameter.dtype).contiguous(), requires_grad=parameter.requires_grad)
            setattr(new, kind, made)
        out[name] = new.train(linear.training)
    return out
