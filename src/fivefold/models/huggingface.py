"""Life inside transformers, in one file: its cache classes, attention and mask functions, and its traps.

How a chunk flows. `prepare` registers an attention and a mask function under the name "fivefold", selects them on the
model, and puts a forward pre-hook on every attention module. The hook sees which cache the module is called with; if
it is ours, it hands the layer to the attention function as a keyword argument (attention modules pass those on
verbatim) and arms it. The module then calls `update`, which only checks, and the attention function, which does
everything. A model that is left on another attention implementation never arms the layer, and `update` refuses.
With any other cache the attention function is transformers' own SDPA.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fivefold.attention import attend_chunk, attend_step
from fivefold.calibrate.profile import signature
from fivefold.errors import CacheStateError, UnsupportedModelError
from fivefold.recipe import Recipe
from fivefold.report import Report, measure
from fivefold.store.layer_cache import LayerCache, LayerSpec, Pools

NAME = "fivefold"
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma3_text", "gpt_neox")
HORIZON = 64
"""While a caller may take tokens back (assisted decoding), this many of the newest ones are left alone."""

_LAYER = "fivefold_layer"
_prepared_lock = threading.Lock()


# -- the attention and mask functions ---------------------------------------------------------------------


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
    """query `[batch, query_head, tokens, head_dim]`, key and value `[batch, kv_head, tokens, head_dim]`."""
    layer: FivefoldLayer | None = kwargs.pop(_LAYER, None)
    if layer is None:
        return _stock_attention(module, query, key, value, attention_mask, scaling, dropout, **kwargs)
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} asks for {name}, which Fivefold does not compute: use DynamicCache."
            )
    if kwargs.get("output_attentions"):
        raise CacheStateError(
            "output_attentions=True needs the whole attention matrix, which a compressed cache never builds: drop it."
        )
    if attention_mask is not None and attention_mask.ndim != 2:
        raise CacheStateError(
            f"a custom attention mask of shape {tuple(attention_mask.shape)} cannot be used with a compressed cache: "
            "give a [batch, tokens] padding mask, or none."
        )
    if query.requires_grad:
        raise CacheStateError("a compressed cache does not train: call the model under torch.inference_mode().")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(query, key, value, attention_mask, scaling), None


def _stock_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA for any cache but ours, with the causal mask that `_mask` left to the caller."""
    chunk, total = query.shape[2], key.shape[2]
    padded = attention_mask is not None and attention_mask.ndim == 2
    if padded or (attention_mask is None and 1 < chunk < total):
        attention_mask = sdpa_mask(
            batch_size=query.shape[0],
            q_length=chunk,
            kv_length=total,
            q_offset=total - chunk,
            attention_mask=attention_mask,
            allow_is_causal_skip=False,
            device=query.device,
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
    )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The padding mask alone where the rest is plainly causal, so that no [query, key] matrix is built."""
    plain = (
        mask_function is causal_mask_function
        and local_size is None
        and not isinstance(q_offset, torch.Tensor)
        and kv_offset == 0
        and kv_length == q_offset + q_length
        and (attention_mask is None or attention_mask.shape[-1] == kv_length)
    )
    if plain:
        return attention_mask
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        **kwargs,
    )


# -- preparing a model ------------------------------------------------------------------------------------


def check_model(model: PreTrainedModel) -> None:
    """Raise `UnsupportedModelError` unless the model's family is one that Fivefold attends for."""
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"models of the family {kind!r} are not supported: use one of {', '.join(FAMILIES)}."
        )


def attention_modules(model: PreTrainedModel) -> dict[int, torch.nn.Module]:
    """The model's attention modules by layer."""
    return {
        module.layer_idx: module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int)
    }


def prepare(model: PreTrainedModel) -> None:
    """Select our attention on a model and hook its attention modules. Safe to call again, from any thread."""
    check_model(model)
    with _prepared_lock:
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, _mask)
        if not hasattr(model, "_fivefold_hooks"):
            hooks = [
                module.register_forward_pre_hook(_hand_over, with_kwargs=True)
                for module in attention_modules(model).values()
            ]
            model._fivefold_hooks = hooks
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
        if hasattr(model, "_fivefold_before"):
            model.set_attn_implementation(model._fivefold_before)
            del model._fivefold_before


def _hand_over(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if not isinstance(cache, FivefoldCache):
        return None
    layer = cache.layers[module.layer_idx]  # type: ignore[index]
    if not isinstance(layer, FivefoldLayer):
        return None
    selected = module.config._attn_implementation  # type: ignore[union-attr]
    if selected != NAME:
        raise CacheStateError(
            f"the model was switched to {selected!r} attention, which cannot read a compressed cache: call "
            "fivefold.compress(model, ...) again, or model.set_attn_implementation('fivefold')."
        )
    layer.armed = True
    return args, {**kwargs, _LAYER: layer}


# -- the cache --------------------------------------------------------------------------------------------


class _State:
    """What the layers of one cache have in common."""

    def __init__(self, stores: dict[int, LayerCache], pools: Pools) -> None:
        self.stores = stores
        self.pools = pools
        self.first = min(stores)
        self.logical = dict.fromkeys(stores, 0)
        self.recording = False
        self.tokens = np.zeros(0, dtype=np.int64)

    @property
    def horizon(self) -> int:
        return HORIZON if self.recording else 0

    def begin(self, batch: int, chunk: int, mask: torch.Tensor | None) -> None:
        """Before the first layer of a forward takes a chunk: everything that could refuse it."""
        self._mend()
        first = self.stores[self.first]
        if first.batch == 0:
            for store in self.stores.values():
                store.start(batch)
        elif first.batch != batch:
            raise CacheStateError(f"the cache holds {first.batch} sequences and was given {batch}: use a new cache.")
        self.tokens = np.full(batch, chunk, dtype=np.int64)
        if mask is not None:
            past = self.logical[self.first]
            real = mask.to("cpu", torch.bool).numpy()
            new = real[:, past:]
            self.tokens = new.sum(1)
            leading = np.arange(chunk)[None] >= (chunk - self.tokens)[:, None]
            if (new != leading).any():
                raise CacheStateError("padding inside or after a sequence cannot be stored: pad on the left.")
            if (real[:, :past].sum(1) != first.lengths()).any():
                raise CacheStateError(
                    "the attention mask says otherwise about stored tokens than when they came: masks may only grow."
                )
        self.reserve()

    def reserve(self) -> None:
        """Make sure that all layers can take the chunk, or raise `CacheFullError` before any has."""
        if self.pools.budget.limit is None:
            return
        running: dict[Any, int] = {}
        peak: dict[Any, int] = {}
        for store in self.stores.values():
            for pool, (taken, freed) in store.demand(self.tokens, self.horizon).items():
                running[pool] = running.get(pool, 0) + taken
                peak[pool] = max(peak.get(pool, 0), running[pool])
                running[pool] -= freed
        self.pools.budget.reserve(peak)

    def _mend(self) -> None:
        """An earlier forward that was broken off has left some layers ahead of others: take that back."""
        shortest = min(self.logical.values())
        for index, store in self.stores.items():
            extra = self.logical[index] - shortest
            if extra:
                if shortest == 0:
                    store.free()
                else:
                    store.crop(extra)
                self.logical[index] = shortest
        batches = {store.batch for store in self.stores.values()}
        if len(batches) > 1:
            for store in self.stores.values():
                store.free()


class FivefoldLayer(CacheLayerMixin):
    """One layer of a `FivefoldCache`, as transformers sees it."""

    is_sliding = False
    is_compileable = False

    def __init__(self, index: int, state: _State) -> None:
        super().__init__()
        self.index = index
        self.state = state
        self.store = state.stores[index]
        self.armed = False

    @property
    def is_croppable(self) -> bool:
        """Whether taking tokens back leaves no trace: nothing given up or packed that would have to return."""
        return self.store.packing is None and all(e.recent is None for e in self.store.extents)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Check a chunk and hand it back as it is: our attention function stores it."""
        if not self.armed:
            raise CacheStateError(
                "this cache can only be read by Fivefold's attention, and the model that was called is not prepared "
                "for it: make the cache with fivefold.compress(model, ...) for that very model."
            )
        spec = self.store.spec
        if key_states.shape[1] != spec.kv_heads or key_states.shape[3] != spec.head_dim or (
            value_states.shape != key_states.shape
        ):
            raise CacheStateError(
                f"layer {spec.layer} was given keys of {key_states.shape[1]} heads x {key_states.shape[3]}, and the "
                f"cache was made for {spec.kv_heads} x {spec.head_dim}: make a cache for this model."
            )
        if key_states.dtype != spec.dtype or key_states.device != spec.device:
            raise CacheStateError(
                f"layer {spec.layer} was given {key_states.dtype} keys on {key_states.device}, and the cache was made "
                f"for {spec.dtype} on {spec.device}: call compress() after moving the model, outside autocast."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Attention of a chunk over all that is stored and itself; then it is stored.

        query `[batch, query_head, tokens, head_dim]`; mask: bool `[batch, all tokens]` padding mask or None.
        Returns `[batch, tokens, query_head, head_dim]`.
        """
        self.armed = False
        state, store = self.state, self.store
        batch, query_heads, chunk, dim = query.shape
        if self.index == state.first:
            state.begin(batch, chunk, mask)
        group, rows = query_heads // store.spec.kv_heads, batch * store.spec.kv_heads
        queries = query.reshape(rows, group, chunk, dim)
        keys, values = key.reshape(rows, chunk, dim), value.reshape(rows, chunk, dim)
        parts = store.split_by(state.tokens)
        alone = len(parts) == 1 and parts[0][1] == chunk
        out = queries if alone else torch.zeros_like(queries, memory_format=torch.contiguous_format)
        horizon = state.horizon
        for cohort, tokens in parts:
            if tokens == 0:
                continue
            new = slice(chunk - tokens, chunk)
            if alone:
                q, k, v = queries, keys, values
            else:
                pick = cohort.rows_tensor.to(query.device)
                q, k, v = queries[pick][:, :, new], keys[pick][:, new], values[pick][:, new]
            if tokens == 1:
                store.append(cohort, k, v, settle=False)
                part = attend_step(store, cohort, q[:, :, 0], scaling)[:, :, None]
                store.append(cohort, None, None, horizon=horizon)
            else:
                part = attend_chunk(store, cohort, q, k, v, scaling)
                store.append(cohort, k, v, horizon=horizon)
            if alone:
                out = part
            else:
                out[pick, :, new] = part
        state.logical[self.index] += chunk
        return out.reshape(batch, query_heads, chunk, dim).transpose(1, 2).contiguous()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, padding included, whatever is still stored."""
        return self.state.logical[self.index]

    def get_max_length(self) -> int:
        return -1

    def activate_past_recording(self) -> None:
        """From now on the newest tokens may be taken back by `crop`: the policies leave them alone until then."""
        self.state.recording = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (negative), or all but that many (positive, as in older
        transformers). Raises `CacheStateError` where that would show tokens again that were given up."""
        length = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        count = min(count, length)
        if count:
            self.store.crop(count)
            self.state.logical[self.index] -= count
        if self.state.recording:
            for cohort in self.store.cohorts:
                self.store.append(cohort, None, None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was: page tables move, bytes do not."""
        if self.store.batch:
            self.store.select(beam_idx.to("cpu").numpy().astype(np.int64))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store.batch:
            self.store.select(np.repeat(np.arange(self.store.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.store.batch:
            index = indices.to("cpu")
            picked = index.nonzero()[:, 0] if index.dtype == torch.bool else index
            self.store.select(picked.numpy().astype(np.int64))

    def reset(self) -> None:
        self.store.free()
        self.state.logical[self.index] = 0

    def offload(self) -> None:
        raise CacheStateError("a compressed cache is not offloaded layer by layer: use a recipe that fits, or no offloading.")

    prefetch = offload


class FivefoldCache(Cache):
    """A transformers cache whose layers are compressed as a recipe says. Made by `fivefold.compress`."""

    def __init__(self, recipe: Recipe, layers: list[Any], state: _State) -> None:
        super().__init__(layers=layers)
        self.recipe = recipe
        self.state = state

    def report(self) -> Report:
        """What the cache holds, in exact bytes (see `fivefold.report.Report`)."""
        return measure(self)

    def fork(self) -> FivefoldCache:
        """A second cache of the same tokens: every page is shared until either side writes to it."""
        stores = {index: store.fork() for index, store in self.state.stores.items()}
        state = _State(stores, self.state.pools)
        state.logical = dict(self.state.logical)
        state.recording = self.state.recording
        layers = [
            FivefoldLayer(index, state) if index in stores else copy.deepcopy(layer)
            for index, layer in enumerate(self.layers)
        ]
        for layer, original in zip(layers, self.layers):
            layer.is_initialized = original.is_initialized
        return FivefoldCache(self.recipe, layers, state)

    def free(self) -> None:
        """Give all memory back now, and begin anew."""
        self.reset()
        self.state.pools.budget.trim()

    def __del__(self) -> None:
        # Forks share the pools: what only this cache held must not stay taken.
        state = getattr(self, "state", None)
        if state is not None and not sys.is_finalizing():
            for store in state.stores.values():
                store.free()


def layer_spec(model: PreTrainedModel, index: int, module: torch.nn.Module) -> LayerSpec:
    """What the methods may know about a layer of a model."""
    config = model.config
    heads = config.num_attention_heads
    parameter = next(module.parameters())
    return LayerSpec(
        layer=index,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        query_heads=heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=model.dtype,
        device=parameter.device,
        model=signature(config),
    )


def make_cache(model: PreTrainedModel, recipe: Recipe, max_bytes: int | None = None) -> FivefoldCache:
    """A cache for `model` that compresses as `recipe` says; see `fivefold.compress`."""
    check_model(model)
    modules = attention_modules(model)
    stock = DynamicCache(config=model.config).layers
    pools = Pools(max_bytes)
    stores: dict[int, LayerCache] = {}
    codec_owner = recipe.get("bits") or recipe.get("channels")
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
        codec = codec_owner.codec(spec) if codec_owner else None
        residual = codec_owner.exact_tokens if codec_owner else 0
        stores[index] = LayerCache(spec, pools, recipe.extents(spec), codec, residual)
    if not stores:
        raise UnsupportedModelError(
            "every layer of this model has a sliding window, so there is no growing cache to compress: use DynamicCache."
        )
    state = _State(stores, pools)
    layers: list[Any] = [FivefoldLayer(i, state) if i in stores else layer for i, layer in enumerate(stock)]
    return FivefoldCache(recipe, layers, state)
