"""A model compiled by `torch.compile`, called with our cache.

What the store does depends on the text, step by step, and is no graph: were it traced, each step would be compiled
anew. So only the model's own code is. `Forward` (`models/forward.py`) runs outside of any graph, and hands the model a
`Stand` in the place of the cache: it takes what attention modules give it, knows what a graph may depend on, and
nothing that changes from step to step. Attention is one operation, `fivefold::attend`, which finds the cache of the
forward that this thread is in. So there is one graph for chunks and one for single tokens, however long the text gets.

The operation writes into the cache, which the compiler does not know: it says that it is a function of its arguments.
Each layer's hidden states depend on the layer before, so that it can neither be moved nor be merged; that none was
dropped is checked (`running`).
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._C._dynamo.eval_frame import set_eval_frame
from torch._dynamo.decorators import skip_code
from transformers.cache_utils import Cache
from transformers.masking_utils import create_sliding_window_causal_mask

from fivefold.engine.admission import positional
from fivefold.engine.layer import attend
from fivefold.errors import CacheStateError
from fivefold.models.cache import FivefoldCache
from fivefold.models.selection import decoder_config, stock_attention
from fivefold.models.specs import attention_modules
from fivefold.models.stock import StockLayers

_here = threading.local()
_UNKNOWN = object()


class Stand(Cache):
    """What a compiled model gets in the place of a cache.

    absent: layers whose attention is left out; sources: layers whose keys and values later ones share; stored: layers
    that store what they are given; windows: those with a window that stay transformers' own; first: the layer that
    wants positions, or -1.
    """

    def __init__(self, cache: FivefoldCache, counted: bool) -> None:
        session = cache.session
        self.layers: list[Any] = []
        self.absent = tuple(sorted(cache.absent))
        self.stored = tuple(session.stores)
        self.sources = tuple(sorted(session.sources))
        self.windows = tuple(session.companions.windows) if isinstance(session.companions, StockLayers) else ()
        self.first = session.first if positional(session.stores) is not None else -1
        # A size may be any in one graph; a number may not. Sizes 0 and 1 are told from others, hence 2 more.
        self.length = _any_size(session.length + 2) if counted else None
        self.kind = self.absent, self.stored, self.sources, self.windows, self.first, counted
        """What a graph depends on."""
        self.inputs: torch.Tensor | None = None
        self.brought: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.brought[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """0 where positions are given to the model: nothing else that it computes asks for the length."""
        return 0 if self.length is None else self.length.shape[0] - 2

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return query_length, 0


@dataclass
class Handed:
    """What an attention module was called with, as `Called` in `models/attention.py`."""

    cache: Stand
    index: int
    positions: torch.Tensor | None
    inputs: torch.Tensor | None

    @property
    def stores(self) -> bool:
        return self.index in self.cache.stored

    def source(self, key: torch.Tensor, value: torch.Tensor) -> int | None:
        return source_of(self.cache.brought, self.index, key, value)

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
        """mask: not used, as that which the model was called with holds."""
        if self.index not in self.cache.sources:
            self.cache.brought.pop(self.index, None)
        inputs, positions = self.inputs, self.positions
        return torch.ops.fivefold.attend(
            query, key, value, sinks, positions, inputs, self.index, source, scaling, cap
        )  # fmt: skip


def source_of(
    brought: dict[int, tuple[torch.Tensor, torch.Tensor]], index: int, key: torch.Tensor, value: torch.Tensor
) -> int | None:
    """The layer that has given these very tensors to the cache: this one, or the one whose keys it shares."""
    for layer in (index,) if index in brought else tuple(brought):
        if brought[layer][0] is key and brought[layer][1] is value:
            return layer
    return None


def hand_in(cache: Stand, index: int, inputs: torch.Tensor | None) -> None:
    """The hook before a layer."""
    if index in cache.stored:
        cache.inputs = inputs


def hand_over(cache: Stand, index: int, kwargs: dict[str, Any]) -> Handed | None:
    """The hook before an attention module."""
    if index in cache.absent:
        return None
    inputs, cache.inputs = cache.inputs, None
    return Handed(cache, index, kwargs.get("position_ids") if index == cache.first else None, inputs)


# -- the operation ----------------------------------------------------------------------------------------


@dataclass
class Running:
    """A forward of a compiled model. mask: bool `[batch, all tokens]`, where a token is no padding, or None. modules:
    of attention, by layer. seen: the layers that have attended."""

    cache: FivefoldCache
    mask: torch.Tensor | None
    modules: dict[int, torch.nn.Module]
    seen: set[int] = field(default_factory=set)
    window_mask: Any = _UNKNOWN
    """What transformers' own layers with a window want, once the first of them has come."""

    def beside(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **given: Any
    ) -> torch.Tensor:
        """The attention of a layer that stays transformers' own, as it is without us."""
        module = self.modules[layer]
        with _set(None):
            if self.window_mask is _UNKNOWN:
                embeds = query.transpose(1, 2)  # of which they ask the shape, the dtype and the device
                self.window_mask = create_sliding_window_causal_mask(
                    config=module.config, inputs_embeds=embeds, attention_mask=self.mask, past_key_values=self.cache
                )
            key, value = self.cache.layers[layer].update(key, value)
            given["sliding_window"] = getattr(module, "sliding_window", None)
            out: torch.Tensor = stock_attention(module, query, key, value, self.window_mask, **given)[0]
        return out


def here() -> bool:
    """Whether this thread is in a forward of a compiled model with our cache."""
    return getattr(_here, "running", None) is not None


here._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what `torch.compiler.assume_constant_result` sets


@contextmanager
def _set(one: Running | None) -> Iterator[None]:
    before, _here.running = getattr(_here, "running", None), one
    try:
        yield
    finally:
        _here.running = before


@contextmanager
def running(cache: FivefoldCache, mask: torch.Tensor | None, modules: dict[int, torch.nn.Module]) -> Iterator[None]:
    one = Running(cache, mask, modules)
    with _set(one):
        yield
    lost = set(cache.session.stores) - one.seen if one.seen else set()
    if lost:
        raise CacheStateError(
            f"the compiled model left out the attention of layer {min(lost)}, which its output does not depend on: "
            "call it without torch.compile."
        )


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor | None,
    positions: torch.Tensor | None,
    inputs: torch.Tensor | None,
    layer: int,
    source: int,
    scaling: float,
    cap: float | None,
) -> torch.Tensor:
    """`engine.layer.attend` for the cache of the forward that this thread is in. Returns `[batch, queries, query_head,
    head_dim]`."""
    now: Running | None = getattr(_here, "running", None)
    if now is None:
        raise CacheStateError(
            "a compiled model was called in another thread than its cache: call it in the thread of its forward."
        )
    session, stored = now.cache.session, layer not in now.cache.session.stores
    if stored and layer == source:
        given = {name: x for name, x in (("s_aux", sinks), ("softcap", cap)) if x is not None}
        return now.beside(layer, query, key, value, scaling=scaling, dropout=0.0, **given).contiguous()
    if not stored:
        now.cache.layers[layer].update(key, value)
        if key.shape[2] > 1:  # a chunk is stored later, when the graph may have something else there
            key, value = (x.clone(memory_format=torch.contiguous_format) for x in (key, value))
    out = attend(
        session, source, query, key, value, now.mask, scaling, positions, inputs, sinks, cap, stored
    )  # fmt: skip
    now.seen.add(layer)
    session.done(layer)
    return out.contiguous()


def _shape_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)


_library = torch.library.Library("fivefold", "FRAGMENT")
_library.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? positions, Tensor? inputs, int layer, "
    "int source, float scaling, float? cap) -> Tensor",
    # What it does depends on the host: CUDA graphs of the compiler's own end before it and begin after it.
    tags=[getattr(torch.Tag, name) for name in ("cudagraph_unsafe",) if hasattr(torch.Tag, name)],
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("fivefold::attend", _shape_of, lib=_library)


# -- a call -----------------------------------------------------------------------------------------------


@contextmanager
def suspended() -> Iterator[Any]:
    """Nothing is traced in this thread within it: yields who was asked to; None if nobody was."""
    callback = set_eval_frame(None)
    try:
        yield callback
    finally:
        set_eval_frame(callback)


def skip(*functions: Any) -> None:
    """These are not compiled by themselves, or each kind of input would count; what they call is, and so are they
    where a graph calls them."""
    for function in functions:
        skip_code(inspect.unwrap(function).__code__)


def compiles(callback: Any, before: Any) -> bool:
    """Whether a model is called by way of `torch.compile`: within it, or by a forward that was compiled."""
    return callback is not None or hasattr(before, "_torchdynamo_orig_callable")


def makes_graphs(callback: Any) -> bool:
    """Whether what is compiled is run as CUDA graphs of the compiler's own (`mode="reduce-overhead"`)."""
    while (inner := getattr(callback, "_torchdynamo_orig_backend", None)) is not None:
        callback = inner
    return bool((getattr(callback, "config", None) or {}).get("triton.cudagraphs"))


def why_not(model: torch.nn.Module, cache: FivefoldCache, chunk: int, mask: Any) -> str | None:
    """Why a call runs without the compiler, in a few words; an empty text where that is only for this one."""
    companions = cache.session.companions
    if companions is not None and not _slide(decoder_config(model), companions):
        return "layers with a state, chunks of fixed places, or keys that others share are transformers' own"
    total = cache.session.length + chunk
    if mask is not None and (
        getattr(mask, "ndim", 0) != 2
        or (mask.shape[1] != total and not (cache.session.ragged and mask.shape[1] > total))
    ):
        return ""  # it is refused
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()):
        return ""  # it is refused
    return None


def _slide(config: Any, companions: Any) -> bool:
    """Whether layers that stay transformers' own all have a plain sliding window, and keys of their own."""
    types = getattr(config, "layer_types", None)
    if not types or getattr(config, "num_kv_shared_layers", None) or not isinstance(companions, StockLayers):
        return False
    return all(i in companions.windows and types[i] == "sliding_attention" for i in companions.layers)


class Compiled:
    """A model's forward for calls by way of `torch.compile`."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.traced: dict[Any, Callable[..., Any]] = {}
        """What is compiled, by the kind of the cache."""
        self.warned = False

    def __reduce__(self) -> Any:
        return Compiled, (self.model,)  # what was compiled is of this process

    @functools.cached_property
    def modules(self) -> dict[int, torch.nn.Module]:
        return attention_modules(self.model)

    @functools.cached_property
    def names(self) -> list[str]:
        """The parameters of the model's forward."""
        return list(inspect.signature(type(self.model).forward).parameters)[1:]

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self.names, args)), **kwargs}

    def __call__(
        self, callback: Any, forward: Callable[..., Any], cache: FivefoldCache, counts: bool, **given: Any
    ) -> Any:
        """callback: as `suspended` yields it. counts: whether the model counts positions by itself."""
        mask, chunk, positions = given.get("attention_mask"), 0, given.get("position_ids")
        for name in ("input_ids", "inputs_embeds"):
            if given.get(name) is not None:
                chunk, device = given[name].shape[1], given[name].device
        if mask is not None:
            mask = mask.to(device=device, dtype=torch.bool)
            if positions is not None and not counts:
                del given["attention_mask"]
        elif positions is None and not counts and "position_ids" in self.names:
            length = cache.session.length
            given["position_ids"] = positions = torch.arange(length, length + chunk, device=device)[None]
        stand = Stand(cache, positions is None)
        given = {name: _plain(x, chunk) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        given["past_key_values"] = stand
        if (traced := self.traced.get(stand.kind)) is None:
            # A code of its own: what is compiled for one model and kind does not count against another's limit.
            code = _call.__code__.replace(co_name=f"call_{type(self.model).__name__}")
            traced = self.traced[stand.kind] = types.FunctionType(code, globals())
        with running(cache, mask, self.modules):
            before = set_eval_frame(callback)
            try:
                out = traced(forward, given)
            finally:
                set_eval_frame(before)
        return _with_cache(out, stand, cache)


def _call(forward: Callable[..., Any], given: dict[str, Any]) -> Any:
    return forward(**given)


def warn(why: str) -> None:
    warnings.warn(f"this model runs without torch.compile: {why}", stacklevel=6)


def _any_size(size: int) -> torch.Tensor:
    """No numbers, in a shape that tells a size."""
    out = torch.empty(size, 0)
    torch._dynamo.maybe_mark_dynamic(out, 0)
    return out


def _plain(x: torch.Tensor, chunk: int) -> torch.Tensor:
    """A copy of an input as graphs want it: of the same strides and kind in each call, and of any number of tokens."""
    with torch.inference_mode(False):
        x = x.clone(memory_format=torch.contiguous_format)
    for axis, size in enumerate(x.shape[1:], 1):
        if size > 1 and (size == chunk or x.ndim == 2):
            torch._dynamo.maybe_mark_dynamic(x, axis)
    return x


def _with_cache(out: Any, stand: Stand, cache: FivefoldCache) -> Any:
    if isinstance(out, tuple):
        return tuple(cache if x is stand else x for x in out)
    if getattr(out, "past_key_values", None) is stand:
        out.past_key_values = cache
    return out
