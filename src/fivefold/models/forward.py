"""A model's `forward` as a transaction of its cache.

`install` puts a `Forward` in the place of the `forward` of a model and of the models in it. It begins a transaction of
the cache that it is given, calls what was there before, and commits; whatever fails anywhere in between, the last MLP
and the head included, leaves the cache as it was. With `cuda_graph=True` it replays decoding steps (`models/graph.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from fivefold.calibrate.profile import signature
from fivefold.engine import decoding, recording
from fivefold.engine.admission import Padded
from fivefold.errors import CacheStateError, UnsupportedModelError
from fivefold.interrupts import uninterrupted
from fivefold.models import calls, compiled, skipping
from fivefold.models.attention import NAME
from fivefold.models.cache import FivefoldCache
from fivefold.models.chunks import Chunks
from fivefold.models.selection import Remembered, decoder_config, selected
from fivefold.models.specs import configs_of, rope_switch


class Forward:
    """What stands in the place of a model's `forward`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Somebody else's, put there before.
        self.before: Callable[..., Any] | None = vars(model).get("forward")
        self.signature = Remembered(_signature)
        functools.update_wrapper(self, model.forward, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for cache in (kwargs.get("past_key_values"), *args):
            if isinstance(cache, FivefoldCache):
                return self._outside(cache, args, kwargs)
        return self.plain(*args, **kwargs)

    @torch.compiler.disable(recursive=False)
    def _outside(self, cache: FivefoldCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Outside of any graph: `torch.compile` traces the model's own code alone (`models/compiled.py`)."""
        session = cache.session
        if not session.forwards:
            uninterrupted.fresh()
        with uninterrupted.call():
            session.forwards += 1
            try:
                with compiled.suspended() as callback:
                    return self._inside(callback, cache, args, kwargs)
            finally:
                session.forwards -= 1

    def _inside(self, callback: Any, cache: FivefoldCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self.plain
        if compiled.compiles(callback, self.before):
            run = self._run(callback, cache, args, kwargs)
        if cache.session.running:
            return run(*args, **kwargs)
        if cache.model != (mine := self.signature(self.model)):  # which `convert` may have changed
            raise CacheStateError(
                f"the cache was made for {cache.model} and called with {mine}: make one for this model."
            )
        return self._call(run, cache, args, kwargs)

    def _run(
        self, callback: Any, cache: FivefoldCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any]:
        """The model's own code, compiled, if that can be."""
        region = self.compiled
        mask = region.named(args, kwargs).get("attention_mask")
        why = compiled.why_not(self.model, cache, calls.chunk_of(args, kwargs), mask)
        if why is None and not skipping.checked(self.model, cache.absent):
            why = ""  # for the first forward, which is watched
        step = cache.step
        if why is None and step is not None and not step.broken and compiled.makes_graphs(callback):
            step.reset()
            step.failed = "torch.compile makes graphs of its own in this mode; take its default mode for one of all"
            step.broken = True
            decoding.tell(cache.session, f"decoding without a CUDA graph: {step.failed}", 5)
        if why is None:
            counts = decoder_config(self.model) is not self.model.config
            return lambda *args, **kwargs: region(callback, self.plain, cache, counts, **region.named(args, kwargs))
        if why and not region.warned:
            region.warned = True
            compiled.warn(why)
        plain: Callable[..., Any] = getattr(self.before, "_torchdynamo_orig_callable", self.plain)
        return plain

    def _call(
        self, run: Callable[..., Any], cache: FivefoldCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        recording.bound(cache.session)
        args, kwargs = calls.checked(cache, args, kwargs)
        length, chunk = cache.session.length, calls.chunk_of(args, kwargs)
        if self.switch is not None and 0 < length <= self.switch < length + chunk:
            raise UnsupportedModelError(_crossing(self.switch))
        if cache.session.ragged:
            kwargs = {**kwargs, **calls.places(cache, args, kwargs)}
        try:
            return self._take(run, cache, args, kwargs, True)
        except Padded:
            cache.session.trusting = False
            return self._take(run, cache, args, kwargs, False)

    def _take(
        self,
        run: Callable[..., Any],
        cache: FivefoldCache,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        graph: bool,
    ) -> Any:
        if len(args) <= 1:
            given = {"input_ids": args[0], **kwargs} if args else kwargs
            out = cache.step(self.model, run, cache, given) if graph and cache.step is not None else None
            if out is None and getattr(run, "func", None) is type(self.model).forward:  # nothing that is compiled
                out = self.chunks(cache, given)
            if out is not None:
                return out
        with selected(self.configs, NAME, cache.windows), cache.session.atomic():
            out = run(*args, **kwargs)
            if calls.chunk_of(args, kwargs) and not cache.session.chunk:
                raise CacheStateError(
                    "the model was called with a compressed cache and did not use it, as with gradient checkpointing "
                    "in train mode: call model.eval() first."
                )
            return out

    @functools.cached_property
    def compiled(self) -> compiled.Compiled:
        return compiled.Compiled(self.model)

    @functools.cached_property
    def chunks(self) -> Chunks:
        return Chunks(self.model)

    @functools.cached_property
    def configs(self) -> list[Any]:
        return configs_of(self.model)

    @functools.cached_property
    def switch(self) -> int | None:
        return rope_switch(self.model)

    @property
    def plain(self) -> Callable[..., Any]:
        return self.before or functools.partial(type(self.model).forward, self.model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Forward:
        twin = Forward(copy.deepcopy(self.model, memo))
        twin.before = copy.deepcopy(self.before, memo)
        return twin


compiled.skip(Forward.__call__, Forward._outside, vars(Forward)["plain"].fget)


def _signature(model: PreTrainedModel) -> str:
    return signature(decoder_config(model))


def _crossing(switch: int) -> str:
    return (
        f"this model turns keys by position otherwise in texts of more than {switch:,} tokens (longrope), and a cache "
        f"cannot grow beyond that: keep the text within {switch:,} tokens, or begin with more than that at once."
    )


class Inputs:
    """What stands in the place of the `prepare_inputs_for_generation` of a model with longrope, which goes on without
    the cache that it was given where the text has become longer than `Forward.switch`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = type(self.model).prepare_inputs_for_generation(self.model, *args, **kwargs)
        cache, switch = kwargs.get("past_key_values"), rope_switch(self.model)
        if isinstance(cache, FivefoldCache) and out.get("past_key_values") is None and switch:
            if cache.get_seq_length():
                raise UnsupportedModelError(_crossing(switch))
            out["past_key_values"] = cache  # an empty one is as good as none
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Inputs:
        return Inputs(copy.deepcopy(self.model, memo))


def _models(model: torch.nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def install(model: torch.nn.Module) -> None:
    """Make forwards of a model, and of the models in it, transactions. Safe to call again."""
    for one in _models(model):
        # accelerate keeps what it wraps as `_old_forward`.
        if not any(isinstance(vars(one).get(name), Forward) for name in ("forward", "_old_forward")):
            one.forward = Forward(one)
        if rope_switch(one) is not None and hasattr(type(one), "prepare_inputs_for_generation"):
            one.prepare_inputs_for_generation = Inputs(one)


def remove(model: torch.nn.Module) -> None:
    """Undo `install`."""
    for one in _models(model):
        mine, inner = vars(one).get("forward"), vars(one).get("_old_forward")
        if isinstance(mine, Forward):
            del one.forward
            if mine.before is not None:
                one.forward = mine.before
        if isinstance(inner, Forward):
            one._old_forward = inner.plain
        if isinstance(vars(one).get("prepare_inputs_for_generation"), Inputs):
            del one.prepare_inputs_for_generation
