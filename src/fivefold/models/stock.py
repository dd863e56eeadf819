"""Layers that stay transformers' own beside those that a cache compresses: with a sliding window, or with a state whose
size does not depend on the text (linear attention, convolutions)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fivefold.errors import CacheStateError

STATES = ("conv_states", "recurrent_states")
"""Where layers with states keep them: dicts of tensors `[batch, ...]`, which are written into."""


class StockLayers:
    """Such layers, by index.

    Those with a window replace their tensors and never write into them; those with states write into theirs.
    """

    def __init__(self, layers: dict[int, Any]) -> None:
        self.layers = layers

    @property
    def windows(self) -> dict[int, int]:
        """The layers with a window, and how long it is."""
        return {i: layer.sliding_window for i, layer in self.layers.items() if hasattr(layer, "sliding_window")}

    @property
    def nbytes(self) -> int:
        # After a long chunk the tensors of windows are views of more than the window.
        held: dict[int, int] = {}
        for layer in self.layers.values():
            beside = (x for x in vars(layer).values() if isinstance(x, torch.Tensor))
            for tensor in (*(where[key] for where, key in _held(layer)), *beside):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return sum(held.values())

    def snapshot(self) -> Callable[[], None]:
        before = {index: _state(layer) for index, layer in self.layers.items()}

        def restore() -> None:
            for index, state in before.items():
                vars(self.layers[index]).clear()
                vars(self.layers[index]).update(state)

        return restore

    def crop(self, tokens: int, length: int) -> None:
        for index, layer in self.layers.items():
            if tokens:
                _check_crop(index, layer, tokens, length)
        for layer in self.layers.values():
            if any(True for _ in _held(layer)) and (tokens or getattr(layer, "record_past", False)):
                layer.crop(-tokens)

    def record(self, on: bool) -> None:
        for layer in self.layers.values():
            if not hasattr(layer, "record_past"):
                continue
            if layer.record_past and not on and any(True for _ in _held(layer)):
                layer.crop(0)
                for index, states in getattr(layer, "conv_states", {}).items():  # they are padded where none are kept
                    if states is not None and (missing := layer.conv_kernel_size[index] - states.shape[-1]) > 0:
                        layer.conv_states[index] = torch.nn.functional.pad(states, (missing, 0))
            layer.record_past = on

    def select(self, rows: np.ndarray) -> None:
        """Sequence i becomes what sequence `rows[i]` was."""
        for layer in self.layers.values():
            for where, key in _held(layer):
                where[key] = where[key][torch.from_numpy(rows).to(where[key].device)]

    def reset(self) -> None:
        for layer in self.layers.values():
            vars(layer).update(vars(_empty(layer)))  # transformers 5.17 only fills them with zeros

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        facts: dict[str, Any] = {}
        tensors: dict[str, torch.Tensor] = {}
        for index, layer in self.layers.items():
            names = {}
            for where, key in _held(layer):
                names[str(key) if isinstance(key, str) else f"{_name(layer, where)}.{key}"] = where[key]
            if names:
                facts[str(index)] = {"device": str(layer.device)}
                if hasattr(layer, "sliding_window"):
                    facts[str(index)]["seen"] = layer.cumulative_length
                tensors |= {f"{index}.{name}": tensor for name, tensor in names.items()}
        return facts, tensors

    def install(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
        for index, known in facts.items():
            layer, there = self.layers[int(index)], torch.device(known["device"])
            there = there if there.type == device.type else device
            mine = {
                name.partition(".")[2]: x.to(there) for name, x in tensors.items() if name.partition(".")[0] == index
            }
            if "keys" in mine:
                layer.lazy_initialization(mine["keys"], mine["values"])
                layer.keys, layer.values, layer.cumulative_length = mine["keys"], mine["values"], known["seen"]
                continue
            for name, tensor in mine.items():
                kind, _, state = name.partition(".")
                layer.lazy_initialization(**{kind: tensor, "state_idx": int(state)})
                getattr(layer, kind)[int(state)] = tensor.clone()
                layer.has_previous_state[int(state)] = True

    def fork(self) -> StockLayers:
        return StockLayers(copy.deepcopy(self.layers))

    def new(self) -> StockLayers:
        return StockLayers({index: _empty(layer) for index, layer in self.layers.items()})

    def join(self, other: StockLayers, batch: int, length: int) -> None:
        for index, layer in self.layers.items():
            rest = other.layers[index]
            if not batch:
                vars(layer).update(vars(rest))
                continue
            for (where, key), (others, _) in zip(_held(layer), _held(rest)):
                both = [where[key], others[key]]
                if hasattr(layer, "sliding_window"):
                    both = [_last(x, length, layer.sliding_window) for x in both]
                where[key] = torch.cat(both)
            if hasattr(layer, "sliding_window"):
                layer.cumulative_length = length
        other.reset()

    def take(self, indices: np.ndarray, rest: np.ndarray, length: int, left: int) -> StockLayers:
        out = self.new()
        for index, layer in out.layers.items():
            vars(layer).update(_state(self.layers[index]))
        for layers, kept, tokens in ((out, indices, length), (self, rest, left)):
            if not len(kept):
                layers.reset()
                continue
            layers.select(kept)
            for index, window in layers.windows.items():
                layer = layers.layers[index]
                for where, key in _held(layer):
                    where[key] = _last(where[key], tokens, window)
                layer.cumulative_length = tokens
        return out


def _held(layer: Any) -> Iterator[tuple[dict[Any, Any], Any]]:
    """Where a layer's tensors are, those with a row for each sequence: a dict and a key, of each."""
    if hasattr(layer, "sliding_window"):
        if layer.is_initialized:
            yield from ((vars(layer), name) for name in ("keys", "values"))
        return
    for name in STATES:
        states = getattr(layer, name, {})
        yield from ((states, key) for key, x in states.items() if isinstance(x, torch.Tensor))


def _check_crop(index: int, layer: Any, tokens: int, length: int) -> None:
    """Raise `CacheStateError` where a layer has given up what it would have to show again."""
    if hasattr(layer, "sliding_window"):
        wanted, held = layer.sliding_window - 1, layer.keys.shape[2] if layer.is_initialized else length
        what = f"has a sliding window of {layer.sliding_window} tokens, and"
    elif not hasattr(layer, "conv_states"):
        return
    elif layer.is_croppable:
        wanted = max(size or 0 for size in layer.conv_kernel_size.values())
        held = min(where[key].shape[-1] for where, key in _held(layer)) if layer.record_past else 0
        what = "keeps a state of its last tokens, and"
    elif any(True for _ in _held(layer)):
        raise CacheStateError(
            f"layer {index} keeps a state from which no token can be taken back: generate without an assistant model "
            "or prompt lookup, and fork() the cache before tokens that may be taken back."
        )
    else:
        return
    if held - tokens < min(wanted, length - tokens):
        raise CacheStateError(
            f"cannot take back {tokens} tokens: layer {index} {what} has already given up what it would have to show "
            "again; fork() the cache before the tokens that may be taken back."
        )


def _name(layer: Any, where: dict[Any, Any]) -> str:
    return next(name for name in STATES if getattr(layer, name) is where)


def _state(layer: Any) -> dict[str, Any]:
    """All attributes of a layer, so that nothing that happens to it later shows in them."""
    state = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}
    for name in STATES:
        if name in state:
            state[name] = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in state[name].items()}
    return state


def _empty(layer: Any) -> Any:
    """A new layer of the same kind."""
    names = ("sliding_window", "number_of_states")
    return type(layer)(**{name: getattr(layer, name) for name in names if hasattr(layer, name)})


def _last(x: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """What a sliding layer stores of x `[batch, heads, tokens, head_dim]` if `length` tokens count as seen: the newest,
    with padding before them where they are fewer."""
    stored = min(length, window - 1)
    x = x[:, :, max(0, x.shape[2] - stored) :]
    return torch.nn.functional.pad(x, (0, 0, stored - x.shape[2], 0))
