"""Life inside transformers: how a model is prepared, and how a cache is made for it.

How a chunk flows. `prepare` registers an attention and a mask function under the name "fivefold", selects them on the
model, and puts a forward pre-hook on every attention module. The hook sees which cache the module is called with; if it
is ours, it hands the layer to the attention function as a keyword argument (attention modules pass those on verbatim)
and arms the cache. The module then calls `update`, which only checks, and the attention function, which does
everything. A model that was not prepared never arms the cache, and `update` refuses. With any other cache the attention
function is transformers' own SDPA. The model's `forward` is a transaction (`models/forward.py`).
"""

from __future__ import annotations

import threading
import weakref
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from fivefold.calibrate.profile import signature
from fivefold.engine.session import Session
from fivefold.errors import CacheStateError, UnsupportedModelError
from fivefold.methods import ReadPolicy, TokenPolicy
from fivefold.models import forward
from fivefold.models.attention import CALLED, NAME, Called, attention, mask
from fivefold.models.cache import FivefoldCache, FivefoldLayer, SlidingLayers
from fivefold.models.specs import FAMILIES, attention_modules, check_model, layer_spec
from fivefold.recipe import Recipe
from fivefold.store.layer_cache import LayerCache
from fivefold.store.spec import LayerSpec, Pools

__all__ = ["FAMILIES", "NAME", "FivefoldCache", "attention_modules", "check_model", "make_cache", "prepare", "restore"]

_prepared_lock = threading.Lock()


def prepare(model: PreTrainedModel) -> None:
    """Select our attention on a model and hook its attention modules. Safe to call again, from any thread."""
    check_model(model)
    with _prepared_lock:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        if not hasattr(model, "_fivefold_hooks"):
            modules = attention_modules(model)
            hooks = [module.register_forward_pre_hook(_hand_over, with_kwargs=True) for module in modules.values()]
            indices = {module: index for index, module in modules.items()}
            for layer in model.modules():
                for child in layer.children():
                    if child in indices:
                        hook = partial(_hand_in, indices[child])
                        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
            model._fivefold_hooks = hooks
        forward.install(model)
        if model.config._attn_implementation != NAME:
            model._fivefold_before = model.config._attn_implementation
            model.set_attn_implementation(NAME)


def restore(model: PreTrainedModel) -> None:
    """Undo `prepare`: the model is as it was before the first `compress`."""
    with _prepared_lock:
        for hook in getattr(model, "_fivefold_hooks", ()):
            hook.remove()
        if hasattr(model, "_fivefold_hooks"):
            del model._fivefold_hooks
        forward.remove(model)
        if hasattr(model, "_fivefold_before"):
            model.set_attn_implementation(model._fivefold_before)
            del model._fivefold_before


def _cache_of(kwargs: dict[str, Any]) -> FivefoldCache | None:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    return cache if isinstance(cache, FivefoldCache) else None


def _hand_in(index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A layer's input, which its attention module sees only behind a norm, for codecs that want to know it."""
    cache = _cache_of(kwargs)
    if cache is not None and index in cache.session.stores:
        codec = cache.session.stores[index].codec
        if codec is not None and codec.contextual:
            cache.session.inputs = args[0] if args else kwargs["hidden_states"]


def _hand_over(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = _cache_of(kwargs)
    if cache is None:
        return None
    selected = module.config._attn_implementation  # type: ignore[union-attr]
    if selected != NAME:
        raise CacheStateError(
            f"the model was switched to {selected!r} attention, which cannot read a compressed cache: call "
            "fivefold.compress(model, ...) again, or model.set_attn_implementation('fivefold')."
        )
    index: int = module.layer_idx  # type: ignore[assignment]
    cache.armed, session = index, cache.session
    session.arrive(index)
    if not isinstance(cache.layers[index], FivefoldLayer):
        return None
    codec, inputs = session.stores[index].codec, session.inputs
    positional = codec is not None and codec.contextual and codec.positional
    session.inputs = None
    called = Called(session, index, kwargs.get("position_ids") if positional else None, inputs)
    return args, {**kwargs, CALLED: called}


def make_cache(
    model: PreTrainedModel, recipe: Recipe, max_bytes: int | None = None, cuda_graph: bool = False
) -> FivefoldCache:
    """A cache for `model` that compresses as `recipe` says; see `fivefold.compress`."""
    check_model(model)
    modules = attention_modules(model)
    stock = DynamicCache(config=model.config).layers
    if len(stock) != model.config.num_hidden_layers:
        raise UnsupportedModelError(
            f"only {len(stock)} of the {model.config.num_hidden_layers} layers of this model have a cache of their own "
            "(the others share it), which Fivefold cannot compress."
        )
    pools = Pools(max_bytes)
    specs: dict[int, LayerSpec] = {}
    codec_owner = recipe.get("bits") or recipe.get("channels")
    policy = next((method for method in recipe.methods if isinstance(method, TokenPolicy)), None)
    for index, layer in enumerate(stock):
        if isinstance(layer, DynamicSlidingWindowLayer):
            continue
        if type(layer) is not DynamicLayer or index not in modules:
            raise UnsupportedModelError(
                f"layer {index} of this {model.config.model_type} model is a {type(layer).__name__}, which Fivefold "
                "cannot compress."
            )
        spec = layer_spec(model, index, modules[index])
        if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UnsupportedModelError(f"a model in {spec.dtype} is not supported: load it in bfloat16 or float32.")
        specs[index] = spec

    def build(spec: LayerSpec) -> LayerCache:
        codec = codec_owner.codec(spec) if codec_owner else None
        residual = codec_owner.exact_tokens if codec_owner else 0
        return LayerCache(spec, pools, recipe.extents(spec), codec, residual, policy)

    if not specs:
        raise UnsupportedModelError(
            "every layer of this model has a sliding window, so no cache grows and none can shrink: use DynamicCache."
        )
    windows = {index: layer for index, layer in enumerate(stock) if index not in specs}
    reads = recipe.get("reads")
    roles: dict[int, str] = {}
    if isinstance(reads, ReadPolicy):
        roles = dict(zip(specs, reads.roles(list(specs.values()))))
    companions = SlidingLayers(windows) if windows else None
    session = Session(specs.values(), build, pools, companions, roles, getattr(reads, "top", 0))
    cache = FivefoldCache(recipe, session, signature(model.config), len(stock), cuda_graph)
    cache.of = weakref.ref(model)
    return cache
