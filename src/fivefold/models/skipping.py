"""Attention modules that do not run at all while the model is called with a cache that leaves them out.

Hooks cannot keep a module from running, so a `Skip` stands in the place of its `forward`. Called with a cache that
leaves the layer out, it returns zeros, whatever biases the module has; with any other cache, or none, it calls what was
there before. Which it is, each call says by the cache that it brings, so that threads do not disturb each other.

The first forward is watched (`models/residual.py`). Zeros must still be zeros where the layer adds them to the residual
stream; behind a norm with a bias they would not be, and such a layer is refused. And where nobody but the attention
module is given what the norm before it makes, that norm need not run either: from then on it returns what it is given.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Collection
from typing import Any

import torch

from fivefold.errors import UnsupportedModelError
from fivefold.models.cache import FivefoldCache, cache_in, cache_of
from fivefold.models.compiled import Stand
from fivefold.models.residual import Following, tensors_in


class Replaced:
    """What stands in the place of the `forward` of a module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        # Somebody else's, put there before.
        self.before: Callable[..., Any] | None = vars(module).get("forward")
        functools.update_wrapper(self, module.forward, updated=())  # type: ignore[arg-type]
        module.forward = self  # type: ignore[assignment]

    @property
    def plain(self) -> Callable[..., Any]:
        return self.before or functools.partial(type(self.module).forward, self.module)

    def remove(self) -> None:
        """Put back what was there."""
        mine = vars(self.module)
        if mine.get("forward") is self:
            del self.module.forward
            if self.before is not None:
                self.module.forward = self.before
        if mine.get("_old_forward") is self:  # what accelerate has wrapped
            self.module._old_forward = self.plain


class Skip(Replaced):
    """In the place of an attention module's. layer: the layer that holds it."""

    def __init__(self, layer: torch.nn.Module, module: torch.nn.Module) -> None:
        super().__init__(module)
        self.layer = layer
        self.checked = False
        """Whether the layer has been seen to add nothing."""
        self.norm: Idle | None = None
        self.here = threading.local()
        self.hooks = [
            layer.register_forward_pre_hook(self._begin, with_kwargs=True),
            layer.register_forward_hook(self._end, always_call=True),
        ]

    def leaves_out(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the layer, or its attention module, is called with a cache that leaves it out."""
        given = cache_in(kwargs)
        if isinstance(given, Stand):
            return self.module.layer_idx in given.absent
        caches = [cache_of(kwargs), *(x for x in args if isinstance(x, FivefoldCache))]
        return any(cache is not None and self.module.layer_idx in cache.absent for cache in caches)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.leaves_out(args, kwargs):
            return self.plain(*args, **kwargs)
        given = args[0] if args else kwargs["hidden_states"]
        out = torch.zeros_like(given)
        if torch.compiler.is_dynamo_compiling():
            return out, None
        if (watch := getattr(self.here, "watch", None)) is not None:
            watch.attends(given, out)
        return out, None

    def _begin(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_dynamo_compiling():
            return  # a graph has no norm whose output nobody takes
        self.here.idle = self.leaves_out(args, kwargs)
        if self.here.idle and not self.checked:
            self.here.watch = Watch([child for child in layer.children() if child is not self.module])
            self.here.watch.__enter__()

    def _end(self, layer: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if torch.compiler.is_dynamo_compiling():
            return
        watch, self.here.watch, self.here.idle = getattr(self.here, "watch", None), None, False
        if watch is None:
            return
        watch.__exit__(None, None, None)
        if out is None:  # it has failed
            return
        if watch.adds is not False:
            raise UnsupportedModelError(
                f"the attention of layer {self.module.layer_idx} cannot be left out, because {type(layer).__name__} "
                "adds something of its own even where its attention gives nothing: use drop() for other layers, or "
                "duo() with windows."
            )
        if watch.norm is not None and self.norm is None:
            self.norm = Idle(watch.norm, self)
        self.checked = True

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        if self.norm is not None:
            self.norm.remove()
        super().remove()

    def __deepcopy__(self, memo: dict[int, Any]) -> Skip:
        twin = memo[id(self)] = Skip.__new__(Skip)
        rest = {name: x for name, x in vars(self).items() if name != "here"}
        vars(twin).update(copy.deepcopy(rest, memo), here=threading.local())
        return twin


class Idle(Replaced):
    """In the place of the norm's before an attention module, which is made for that module alone."""

    def __init__(self, module: torch.nn.Module, skip: Skip) -> None:
        super().__init__(module)
        self.skip = skip

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.plain(*args, **kwargs)
        return args[0] if getattr(self.skip.here, "idle", False) and args else self.plain(*args, **kwargs)


class Watch(Following):
    """Also finds which of a layer's other modules makes what its attention is given. adds: whether a number that is
    not 0 was added; None if nothing ever was. norm: that module, if nothing else takes what it makes: no module, and no
    function of torch; None if something does."""

    def __init__(self, children: list[torch.nn.Module]) -> None:
        super().__init__()
        self.adds: bool | None = None
        self.norm: torch.nn.Module | None = None
        self._given: torch.Tensor | None = None
        self._made: list[tuple[torch.nn.Module, torch.Tensor]] = []
        self._used: set[int] = set()
        self._hooks = [
            hook
            for child in children
            for hook in (
                child.register_forward_pre_hook(self._takes, with_kwargs=True),
                child.register_forward_hook(self._makes),
            )
        ]

    def attends(self, given: torch.Tensor, out: torch.Tensor) -> None:
        """The attention module was given this, and gives that."""
        self.follow(out)
        self._given = given
        if id(given) not in self._used:
            self.norm = next((child for child, made in self._made if made is given), None)
        self._made = []

    def found(self, added: torch.Tensor, to: torch.Tensor) -> None:
        self.adds = bool(added.count_nonzero())

    def _takes(self, child: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._use((*args, *kwargs.values()))

    def _makes(self, child: torch.nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if self._given is None and isinstance(out, torch.Tensor) and args and isinstance(args[0], torch.Tensor):
            self._used.discard(id(out))
            if out is not args[0] and (out.shape, out.dtype) == (args[0].shape, args[0].dtype):
                self._made.append((child, out))

    def _use(self, values: tuple[Any, ...]) -> None:
        found = {id(x) for x in tensors_in(values)}
        if self._given is None:
            self._used |= found
        elif id(self._given) in found:
            self.norm = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        made = {id(x) for x in tensors_in((out,))}
        if made and getattr(func, "__name__", "") != "zeros_like":  # else only its shape was asked for
            self._use((*args, *(kwargs or {}).values()))
        if self._given is None:
            self._used -= made - {id(x) for x in tensors_in(args)}  # new ones, at the place of some that are gone
        return out

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)


def install(layer: torch.nn.Module, module: torch.nn.Module) -> None:
    """Let an attention module be skipped. Safe to call again."""
    # accelerate keeps what it wraps as `_old_forward`.
    if not any(isinstance(vars(module).get(name), Skip) for name in ("forward", "_old_forward")):
        Skip(layer, module)


def checked(model: torch.nn.Module, absent: Collection[int]) -> bool:
    """Whether all layers whose attention a cache leaves out have been watched."""
    skips = [vars(module).get("forward") for module in model.modules()] if absent else []
    return all(skip.checked for skip in skips if isinstance(skip, Skip) and skip.module.layer_idx in absent)


def remove(model: torch.nn.Module) -> None:
    """Undo `install` in all modules of a model."""
    for module in model.modules():
        for name in ("forward", "_old_forward"):
            found = vars(module).get(name)
            if isinstance(found, Skip):
                found.remove()
