"""What a method learns from, taken from a model of transformers while it reads.

The attention function is the one place that sees queries, keys and values of every family in the same shape, whatever
projections and norms made them. They come with RoPE, which the pre-hook's `position_embeddings` take off again, in the
way in which the layer has put it on (`models/rotary.py`).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fivefold.calibrate.learner import OBSERVED, Capture
from fivefold.errors import UnsupportedModelError
from fivefold.models.residual import Following
from fivefold.models.rotary import turning_of, unrotate
from fivefold.models.selection import selected, stock_attention, stock_mask
from fivefold.models.specs import attention_modules, configs_of, decoder_layers

_NAME = "fivefold_capture"
_SEEN = "fivefold_seen"


@contextlib.contextmanager
def capturing(
    model: PreTrainedModel, wanted: Collection[Capture], see: Callable[[int, dict[Capture, torch.Tensor]], None]
) -> Iterator[None]:
    """Within it, every forward of the model without a cache calls `see(layer, captured)` for each layer.

    What is captured has the shapes of `fivefold.calibrate.learner.Capture`. The model is as it was afterwards.
    """
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, stock_mask)
    modules = attention_modules(model)
    signatures = {index: inspect.signature(module.forward) for index, module in modules.items()}
    turned = {"keys", "queries"} & set(wanted)
    turnings = {index: turning_of(model, index, module) if turned else None for index, module in modules.items()}
    unknown = next((modules[index] for index, turning in turnings.items() if turned and turning is None), None)
    if unknown is not None:
        raise UnsupportedModelError(
            f"Fivefold does not know how {type(unknown).__name__} turns keys by position, and cannot learn from keys "
            "before that: use a method that needs no such profile."
        )

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index: int = module.layer_idx  # type: ignore[assignment]
        given = signatures[index].bind(*args, **kwargs).arguments
        turning = turnings[index]

        def before(x: torch.Tensor) -> torch.Tensor:
            if turning is None:
                return x
            cos, sin = given["position_embeddings"]
            return unrotate(x, cos, sin, turning)

        def take(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> None:
            captured: dict[Capture, torch.Tensor] = {}
            if "keys" in wanted:
                captured["keys"] = before(key.float())
            if "queries" in wanted:
                captured["queries"] = before(query.float())
            if "values" in wanted:
                captured["values"] = value.float()
            if "inputs" in wanted:
                captured["inputs"] = given["hidden_states"].float()
            if "attending_queries" in wanted:
                captured["attending_queries"] = query.float() * scaling
            if "attending_keys" in wanted:
                captured["attending_keys"] = key.float()
            if "attention" in wanted:
                captured["attention"] = _weights(query[:, :, -OBSERVED:].float() * scaling, key.float())
            if around:
                seen[index] = captured  # until the layer has added what its attention gives
            else:
                see(index, captured)

        return args, {**kwargs, _SEEN: take}

    around = bool({"residual", "added"} & set(wanted))
    seen: dict[int, dict[Capture, torch.Tensor]] = {}
    hooks = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules.values()]
    for index, layer in decoder_layers(model).items() if around else ():
        hooks += _around(layer, modules[index], partial(_complete, index, layer, wanted, seen, see))
    try:
        with selected(configs_of(model), _NAME):
            yield
    finally:
        for one in hooks:
            one.remove()


def _around(
    layer: torch.nn.Module, module: torch.nn.Module, done: Callable[[torch.Tensor, Following], None]
) -> list[Any]:
    """Hooks by which a layer calls `done` with its input, and what its attention has added to what."""
    given: list[torch.Tensor] = []
    modes: list[Following] = []

    def begin(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[:] = [(args[0] if args else kwargs["hidden_states"]).clone()]
        modes.append(Following())
        modes[-1].__enter__()

    def attended(_: Any, args: Any, out: Any) -> None:
        modes[-1].follow(out[0] if isinstance(out, tuple) else out)

    def end(_: Any, args: Any, out: Any) -> None:
        if modes:
            mode = modes.pop()
            mode.__exit__(None, None, None)
            if out is not None:  # else it has failed
                done(given[0], mode)

    return [
        layer.register_forward_pre_hook(begin, with_kwargs=True),
        module.register_forward_hook(attended),
        layer.register_forward_hook(end, always_call=True),
    ]


def _complete(
    index: int,
    layer: torch.nn.Module,
    wanted: Collection[Capture],
    seen: dict[int, dict[Capture, torch.Tensor]],
    see: Callable[[int, dict[Capture, torch.Tensor]], None],
    given: torch.Tensor,
    mode: Following,
) -> None:
    """Show what was captured of a layer. given: its input; mode: what has followed its attention's output."""
    if mode.added is None or mode.to is None:
        raise UnsupportedModelError(
            f"{type(layer).__name__} never adds what its attention gives to anything, so that nobody can say what that "
            "adds: use a method that needs no such profile."
        )
    captured = seen.pop(index)
    if "residual" in wanted:
        # A layer may carry several streams and give its attention one of them.
        captured["residual"] = (given if given.shape == mode.added.shape else mode.to).float()
    if "added" in wanted:
        captured["added"] = mode.added.float()
    see(index, captured)


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
    return stock_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
