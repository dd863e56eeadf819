"""Attention modules that do not run at all while the model is called with a cache that leaves them out.

Hooks cannot keep a module from running, so a `Skip` stands in the place of its `forward`. Called with a cache that
leaves the layer out, it returns zeros, whatever biases the module has; with any other cache, or none, it calls what was
there before. Which it is, each call says by the cache that it brings, so that threads do not disturb each other.

Zeros must still be zeros where the layer adds them to the residual stream: behind a norm with a bias they would not be.
The first forward shows that (`models/residual.py`), and a layer that adds something all the same is refused.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

from fivefold.errors import UnsupportedModelError
from fivefold.models.cache import cache_of
from fivefold.models.residual import Following


class Skip:
    """What stands in the place of the `forward` of an attention module. layer: the layer that holds the module."""

    def __init__(self, layer: torch.nn.Module, module: torch.nn.Module) -> None:
        self.layer, self.module = layer, module
        # Somebody else's, put there before.
        self.before: Callable[..., Any] | None = vars(module).get("forward")
        functools.update_wrapper(self, module.forward)
        self.checked = False
        """Whether the layer has been seen to add nothing."""
        self._here = threading.local()
        self.hooks = [
            layer.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_hook(self._end, always_call=True),
        ]

    @property
    def plain(self) -> Callable[..., Any]:
        return self.before or functools.partial(type(self.module).forward, self.module)

    def leaves_out(self, kwargs: dict[str, Any]) -> bool:
        cache = cache_of(kwargs)
        return cache is not None and self.module.layer_idx in cache.absent

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.leaves_out(kwargs):
            return self.plain(*args, **kwargs)
        out = torch.zeros_like(args[0] if args else kwargs["hidden_states"])
        if (following := getattr(self._here, "following", None)) is not None:
            following.follow(out)
        return out, None

    def _begin(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.checked and self.leaves_out(kwargs):
            self._here.following = Following()
            self._here.following.__enter__()

    def _end(self, layer: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        following, self._here.following = getattr(self._here, "following", None), None
        if following is None:
            return
        following.__exit__(None, None, None)
        if out is None:  # it has failed
            return
        if following.added is None or following.added.count_nonzero():
            raise UnsupportedModelError(
                f"the attention of layer {self.module.layer_idx} cannot be left out, because {type(layer).__name__} "
                "adds something of its own even where its attention gives nothing: use drop() for other layers, or "
                "duo() with windows."
            )
        self.checked = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Skip:
        twin = memo[id(self)] = Skip.__new__(Skip)
        rest = {name: x for name, x in vars(self).items() if name != "_here"}
        vars(twin).update(copy.deepcopy(rest, memo), _here=threading.local())
        return twin


def install(layer: torch.nn.Module, module: torch.nn.Module) -> None:
    """Let an attention module be skipped. Safe to call again."""
    # accelerate keeps what it wraps as `_old_forward`.
    if not any(isinstance(vars(module).get(name), Skip) for name in ("forward", "_old_forward")):
        module.forward = Skip(layer, module)


def remove(model: torch.nn.Module) -> None:
    """Undo `install` in all modules of a model."""
    for module in model.modules():
        mine, inner = vars(module).get("forward"), vars(module).get("_old_forward")
        for skip in (mine, inner):
            if isinstance(skip, Skip):
                for hook in skip.hooks:
                    hook.remove()
        if isinstance(mine, Skip):
            del module.forward
            if mine.before is not None:
                module.forward = mine.before
        if isinstance(inner, Skip):
            module._old_forward = inner.plain  # type: ignore[assignment]
