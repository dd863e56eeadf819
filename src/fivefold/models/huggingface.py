"""Life inside transformers: how a model is prepared, and how a cache is made for it.

How a chunk flows. `prepare` registers an attention and a mask function under the name "fivefold", makes the model's
`forward` a transaction (`models/forward.py`), and puts hooks on every attention module. While the model is called with
our cache, and only then, its configuration names our attention (`models/selection.py`). The hook before a module sees
which cache the module is called with; if it is ours, it hands the layer to the attention function as a keyword argument
(attention modules pass those on verbatim) and arms the cache. The module then calls `update`, which only checks, and
the attention function, which does everything. A model that was not prepared never arms the cache, and `update` refuses.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fivefold.calibrate.profile import signature
from fivefold.engine.admission import positional
from fivefold.engine.build import build
from fivefold.errors import RecipeError, UnsupportedModelError
from fivefold.kernels.choice import check_asked
from fivefold.kernels.device import let_memory_grow
from fivefold.models import compiled, forward, skipping
from fivefold.models.attention import CALLED, NAME, Called, attention, mask
from fivefold.models.cache import FivefoldCache, cache_in, cache_of
from fivefold.models.selection import decoder_config, is_selected, selected
from fivefold.models.specs import attention_modules, check_model, decoder_layers, has_weights, layer_spec
from fivefold.models.stock import STATES, StockLayers
from fivefold.recipe import Recipe
from fivefold.store.spec import LayerSpec, Pools

__all__ = ["NAME", "FivefoldCache", "attention_modules", "check_model", "make_cache", "prepare", "restore"]

_HOOKS = "_fivefold_hooks"
_prepared_lock = threading.Lock()


def prepare(model: PreTrainedModel, absent: Collection[int] = ()) -> None:
    """Hook a model's attention modules and its `forward`. Safe to call again, from any thread, and for a wrapper around
    the model or what it wraps. absent: layers whose attention a cache may leave out."""
    check_model(model)
    with _prepared_lock:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        modules, layers = attention_modules(model), decoder_layers(model)
        for index, layer in layers.items():
            child = modules[index]
            if _HOOKS not in vars(child):
                into = partial(_hand_in, index)
                vars(child)[_HOOKS] = [
                    layer.register_forward_pre_hook(into, with_kwargs=True),
                    child.register_forward_pre_hook(_hand_over, with_kwargs=True),
                    child.register_forward_hook(_let_go, with_kwargs=True, always_call=True),
                ]
        for index in absent:
            skipping.install(layers[index], modules[index])
        forward.install(model)


def restore(model: torch.nn.Module) -> None:
    """Undo `prepare`: the model is as it was before the first `compress`."""
    with _prepared_lock:
        for module in model.modules():
            for hook in vars(module).pop(_HOOKS, ()):
                hook.remove()
        skipping.remove(model)
        forward.remove(model)


def _hand_in(index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A layer's input, which its attention module sees only behind a norm, for codecs that learn of it."""
    given = cache_in(kwargs)
    if isinstance(given, compiled.Stand):
        compiled.hand_in(given, index, args[0] if args else kwargs.get("hidden_states"))
        return
    cache = cache_of(kwargs)
    if cache is not None and index in cache.session.stores:
        cache.session.inputs = args[0] if args else kwargs.get("hidden_states")


def _hand_over(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given, index = cache_in(kwargs), module.layer_idx
    if isinstance(given, compiled.Stand):
        handed = compiled.hand_over(given, index, kwargs)  # type: ignore[arg-type]
        return None if handed is None else (args, {**kwargs, CALLED: handed})
    cache = cache_of(kwargs)
    if cache is None or index in cache.absent:
        return None
    assert isinstance(index, int)
    cache.armed, session = index, cache.session
    session.arrive(index)
    if not is_selected(NAME):  # somebody calls the modules one by one
        cache.selection = selected([module.config], NAME, cache.windows)
        cache.selection.__enter__()
    if index in session.stores:
        inputs, session.inputs = session.inputs, None
        # The first layer admits the chunk for all of them.
        wanted = index == session.first and positional(session.stores) is not None
        called = Called(session, index, kwargs.get("position_ids") if wanted else None, inputs)
    elif isinstance(session.companions, StockLayers) and index in session.companions.windows:
        return None
    else:  # it shares the keys of another layer
        called = Called(session, index, None, None)
    return args, {**kwargs, CALLED: called}


def _let_go(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    cache = cache_of(kwargs)
    if cache is not None and cache.selection is not None:
        selection, cache.selection = cache.selection, None
        selection.__exit__(None, None, None)


def make_cache(
    model: PreTrainedModel,
    recipe: Recipe,
    max_bytes: int | None = None,
    cuda_graph: bool = False,
    sliding: bool = False,
) -> FivefoldCache:
    """A cache for `model` that compresses as `recipe` says; see `fivefold.compress`."""
    check_model(model)
    if not has_weights(model):
        raise UnsupportedModelError(
            "this model has no weights (all are on the meta device): load them first, with from_pretrained."
        )
    config, modules = decoder_config(model), attention_modules(model)
    turned = recipe.packer is not None and recipe.packer.before_rope
    stock, shared = _stock_layers(model, config)
    specs: dict[int, LayerSpec] = {}
    beside: dict[int, Any] = {}
    for index, layer in enumerate(stock):
        window = _window(layer, config, index) if sliding else None
        if index in modules and (type(layer) is DynamicLayer or window is not None):
            specs[index] = replace(layer_spec(model, index, modules[index], turned), window=window)
        elif type(layer) is DynamicLayer or not _is_stock(layer):
            raise UnsupportedModelError(
                f"layer {index} of this {config.model_type} model is a {type(layer).__name__}, which Fivefold cannot "
                "compress: use DynamicCache for it."
            )
        else:
            beside[index] = layer
    if not specs:
        raise UnsupportedModelError(
            "no layer of this model has a cache that grows (all have a sliding window, or a state of fixed size): give "
            "sliding=True to compress what windows hold, or use DynamicCache."
        )
    check_asked(next(iter(specs.values())).device)
    for spec in specs.values():
        let_memory_grow(spec.device)
    companions = StockLayers(beside) if beside else None
    kept, absent = recipe.divided(list(specs.values()))
    gone = {spec.layer for spec in absent}
    _check_shared(config, recipe, gone)
    sources = frozenset(specs) - gone if shared else frozenset()
    session = build(recipe, kept, Pools(max_bytes), companions, sources, min(set(modules) - gone), absent)
    cache = FivefoldCache(recipe, session, signature(config), len(stock), cuda_graph)
    cache.of = weakref.ref(model)
    return cache


def _window(layer: Any, config: Any, index: int) -> int | None:
    """The sliding window of a layer; None if it has none, or attends in chunks of fixed places."""
    types = getattr(config, "layer_types", None)
    plain = types[index] == "sliding_attention" if types else not getattr(config, "attention_chunk_size", None)
    return layer.sliding_window if plain and type(layer) is DynamicSlidingWindowLayer else None


def _stock_layers(model: PreTrainedModel, config: Any) -> tuple[list[Any], bool]:
    """The layers of the cache that transformers would make, and whether others share what these hold."""
    try:
        layers = DynamicCache(config=model.config).layers
    except KeyError as error:
        raise UnsupportedModelError(
            f"this {config.model_type} model has layers of the type {error}, which transformers' own cache does not "
            "know: it cannot be compressed."
        ) from None
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    return layers, shared > 0


def _check_shared(config: Any, recipe: Recipe, gone: Collection[int]) -> None:
    """Raise `RecipeError` where a layer is left out whose keys and values others share."""
    first = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    for index in range(first, config.num_hidden_layers):
        kinds = list(config.layer_types)
        source = first - 1 - kinds[:first][::-1].index(kinds[index])
        if source in gone:
            raise RecipeError(
                f"{recipe} leaves out the attention of layer {source}, whose keys and values layer {index} and others "
                f"of this {config.model_type} model share: keep it, and name others as drop(layers=[...])."
            )


def _is_stock(layer: Any) -> bool:
    """Whether a layer can stay transformers' own beside ours."""
    kind = type(layer)
    if kind is DynamicSlidingWindowLayer or kind.__name__ == "DummyLayer":
        return True
    return all(hasattr(layer, name) for name in STATES) and not hasattr(layer, "get_mask_sizes")
