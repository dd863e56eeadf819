"""What a layer's attention adds to the residual stream, found by following it.

Families differ in what they do with the output of an attention module before they add it: nothing, a norm (Gemma), a
factor (Granite), a dropout; and they add it to the layer's input, or to the MLP's output first (parallel attention). So
the module's output is followed through torch's functions, whatever they are, until it is added to something that did
not come from it: what is added there is the contribution.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ADDS = ("add", "add_")


class Following(TorchFunctionMode):
    """While it is entered, follows the tensor given to `follow`. added: what was added, of the shape of that tensor;
    None until it was. to: what it was added to."""

    def __init__(self) -> None:
        super().__init__()
        self.added: torch.Tensor | None = None
        self.to: torch.Tensor | None = None
        self._shape: torch.Size | None = None
        # The tensors too, so that no other one gets the number of one that is gone.
        self._from: dict[int, torch.Tensor] = {}

    def follow(self, out: torch.Tensor) -> None:
        self._shape, self._from = out.shape, {id(out): out}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._from and getattr(func, "__name__", "") in _ADDS and len(args) == 2:
            self._see_sum(*args)
        out = func(*args, **(kwargs or {}))
        if self._from and any(id(x) in self._from for x in tensors_in((*args, *(kwargs or {}).values()))):
            self._from |= {id(x): x for x in tensors_in((out,))}
        return out

    def _see_sum(self, one: Any, two: Any) -> None:
        for mine, other in ((one, two), (two, one)):
            both = isinstance(mine, torch.Tensor) and isinstance(other, torch.Tensor)
            if both and id(mine) in self._from and id(other) not in self._from and other.shape == self._shape:
                self.found(mine, other)
                self._from = {}
                return

    def found(self, added: torch.Tensor, to: torch.Tensor) -> None:
        """It is about to be added. As they are now: the sum may be written over one of them."""
        self.added, self.to = added.clone(), to.clone()


def tensors_in(values: tuple[Any, ...]) -> list[torch.Tensor]:
    """The tensors among values, and in lists and tuples there."""
    out = []
    for value in values:
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, torch.Tensor):
                out.append(x)
    return out
