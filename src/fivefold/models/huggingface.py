"""Life inside transformers, in one file: its cache classes, attention and mask functions, and its traps.

How a chunk flows. `prepare` registers an attention and a mask function under the name "fivefold", selects them
on the model, and puts a forward pre-hook on every attention module. The hook sees which cache the module is called
with; if it is ours, it hands the layer to the attention function as a keyword argument (attention modules pass
those on verbatim) and arms the cache. The module then calls `update`, which only checks, and the attention
function, which does everything. A model that was not prepared never arms the cache, and `update` refuses.
With any other cache the attention function is transformers' own SDPA.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fivefold.attention import attend_chunk, attend_observed, attend_picked, attend_step, pick
from fivefold.attention.fixed import FixedTables
from fivefold.attention.fused import pack_due
from fivefold.calibrate.profile import config_hash, signature
from fivefold.errors import CacheFullError, CacheStateError, FivefoldError, UnsupportedModelError
from fivefold.methods import ReadPolicy, TokenPolicy
from fivefold.models import graph
from fivefold.recipe import Recipe
from fivefold.report import Report, measure
from fivefold.store.context import Rope
from fivefold.store.layer_cache import Cohort, LayerCache, LayerSpec, Pools

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
            f"an attention mask of shape {tuple(attention_mask.shape)} cannot be used with a compressed cache: "
            "give a [batch, tokens] padding mask over all tokens so far, or none."
        )
    if query.requires_grad or key.requires_grad or value.requires_grad:
        raise CacheStateError(
            "a compressed cache does not train: call the model under torch.inference_mode() or torch.no_grad()."
        )
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
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


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
    if 1 < q_length < kv_length:
        # `_stock_attention` takes None for the last queries of all tokens, SDPA for the first (static caches).
        kwargs["allow_is_causal_skip"] = False
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
    config: Any = getattr(model, "config", None)
    kind = getattr(config, "model_type", type(model).__name__)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"models of the family {kind!r} are not supported: use one of {', '.join(FAMILIES)}."
        )
    if kind == "phi3" and config.max_position_embeddings > config.original_max_position_embeddings:
        # Its `prepare_inputs_for_generation` goes on with a cache of its own from there.
        raise UnsupportedModelError(
            f"this phi3 model scales its positions from {config.original_max_position_embeddings} tokens on (longrope) "
            "and drops its cache there, compressed or not: use one without."
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
            modules = attention_modules(model)
            hooks = [module.register_forward_pre_hook(_hand_over, with_kwargs=True) for module in modules.values()]
            indices = {module: index for index, module in modules.items()}
            for layer in model.modules():
                for child in layer.children():
                    if child in indices:
                        hook = partial(_hand_in, indices[child])
                        hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
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
        graph.remove(model)
        if hasattr(model, "_fivefold_before"):
            model.set_attn_implementation(model._fivefold_before)
            del model._fivefold_before


def _hand_in(index: int, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A layer's input, which its attention module sees only behind a norm, for codecs that want to know it."""
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    layer = cache.layers[index] if isinstance(cache, FivefoldCache) else None
    if isinstance(layer, FivefoldLayer) and layer.contextual:
        layer.inputs = args[0] if args else kwargs["hidden_states"]


def _hand_over(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if not isinstance(cache, FivefoldCache):
        return None
    selected = module.config._attn_implementation  # type: ignore[union-attr]
    if selected != NAME:
        raise CacheStateError(
            f"the model was switched to {selected!r} attention, which cannot read a compressed cache: call "
            "fivefold.compress(model, ...) again, or model.set_attn_implementation('fivefold')."
        )
    index: int = module.layer_idx  # type: ignore[assignment]
    if index == 0:
        cache.state.begin(signature(module.config))
    cache.state.armed = index
    layer = cache.layers[index]
    if isinstance(layer, FivefoldLayer) and layer.contextual:
        positional = layer.store.codec is not None and layer.store.codec.positional
        layer.positions = kwargs.get("position_ids") if positional else None
    return (args, {**kwargs, _LAYER: layer}) if isinstance(layer, FivefoldLayer) else None


# -- the cache --------------------------------------------------------------------------------------------


class _State:
    """What the layers of one cache have in common.

    stores: the layers that are ours; stock: layers with a sliding window, left to transformers. `logical` counts
    the tokens that each of our layers has seen. After a whole forward all layers have seen the same; if one was
    broken off (an exception, Ctrl-C), the first ones are ahead, and `mend` takes that back before the next.
    """

    def __init__(
        self,
        stores: dict[int, LayerCache],
        stock: dict[int, Any],
        pools: Pools,
        roles: dict[int, str] | None = None,
        top: int = 0,
    ) -> None:
        self.stores = stores
        # What each layer reads in a decoding step, and what was picked for the rows in this one.
        self.roles = roles or {}
        self.top = top
        self._picks: dict[int, torch.Tensor] = {}
        self.stock = stock
        self.pools = pools
        self.first = min(stores)
        self.last = max(stores)
        self.layers = len(stores) + len(stock)
        self.logical = dict.fromkeys(stores, 0)
        self.recording = False
        self.armed: int | None = None
        """The layer whose attention module has announced itself (see `_hand_over`)."""
        self.tokens = np.zeros(0, dtype=np.int64)
        self.offsets = np.zeros(0, dtype=np.int64)
        # The stock layers as they were when the forward began: they replace tensors and never write into them.
        self.before: dict[int, dict[str, Any]] = {}
        self.fixed: FixedTables | None = None
        """While a step runs for a graph (`models/graph.py`), which has opened the token's slots."""

    @property
    def device(self) -> torch.device:
        return self.stores[self.first].spec.device

    @property
    def horizon(self) -> int:
        return HORIZON if self.recording else 0

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return min([*self.logical.values(), *(layer.get_seq_length() for layer in self.stock.values())])

    def begin(self, model: str) -> None:
        """A forward begins."""
        made_for = self.stores[self.first].spec.model
        if model != made_for:
            raise CacheStateError(
                f"the cache was made for {made_for} and called with {model}: make one for this model."
            )
        self.mend()
        self._picks = {}
        self.before = {index: dict(vars(layer)) for index, layer in self.stock.items()}

    def picked(self, cohort: Cohort, positions: torch.Tensor) -> None:
        """A layer has picked tokens for the layers after it: `[rows, top]`."""
        for at, row in enumerate(cohort.rows.tolist()):
            self._picks[row] = positions[at]

    def picks(self, cohort: Cohort) -> torch.Tensor | None:
        """What was picked for the rows of a cohort, `[rows, top]`; None if nothing was for one of them, or if all that
        there is would be read anyway."""
        found = [self._picks.get(row) for row in cohort.rows.tolist()]
        if any(part is None or len(part) >= cohort.geometry.length for part in found):
            return None
        return torch.stack([part for part in found if part is not None])

    def finished(self, index: int) -> None:
        """A layer has taken its chunk."""
        if index == self.layers - 1:
            self.before = {}

    def mend(self, length: int | None = None) -> None:
        """Bring layers that a broken-off forward has left ahead of the others back to where it began, or to `length`
        tokens."""
        if self.fixed is not None:
            return
        length = self.length if length is None else length
        for index, layer in self.stock.items():
            if layer.get_seq_length() > length:
                vars(layer).update(self.before[index])
        ahead = {index: seen - length for index, seen in self.logical.items() if seen > length}
        if not ahead:
            return
        if length == 0:
            self.free()
            return
        for index, extra in ahead.items():
            self.stores[index].crop(extra)
            self.logical[index] = length

    def admit(self, batch: int, chunk: int, mask: torch.Tensor | None, positions: torch.Tensor | None) -> None:
        """Before the first of our layers takes a chunk: everything that could refuse it.

        positions: int64 `[batch or 1, chunk]`, as the model counts them; None if no codec wants them.
        """
        first = self.stores[self.first]
        if first.batch not in (0, batch):
            raise CacheStateError(f"the cache holds {first.batch} sequences and was given {batch}: use a new cache.")
        self.tokens = np.full(batch, chunk, dtype=np.int64)
        if mask is not None:
            held = first.lengths() if first.batch else np.zeros(batch, dtype=np.int64)
            past = self.logical[self.first]
            real = mask.expand(batch, -1).to("cpu", torch.bool).numpy()
            new = real[:, past:]
            self.tokens = new.sum(1)
            leading = np.arange(chunk)[None] >= (chunk - self.tokens)[:, None]
            if (new != leading).any() or ((self.tokens < chunk) & (held > 0)).any():
                raise CacheStateError("padding inside or after a sequence cannot be stored: pad on the left.")
            if (real[:, :past].sum(1) != held).any():
                raise CacheStateError(
                    "the attention mask says otherwise about stored tokens than when they came: masks may only grow."
                )
        self.offsets = np.zeros(batch, dtype=np.int64)
        if positions is not None:
            self.offsets = self._offsets(positions.expand(batch, -1).cpu().numpy(), first)
        fresh = first.batch == 0
        if fresh:
            for store in self.stores.values():
                store.start(batch)
        try:
            self.reserve(self.tokens, self.horizon)
        except CacheFullError:
            if fresh:
                self.free()
            raise

    def _offsets(self, positions: np.ndarray, first: LayerCache) -> np.ndarray:
        """The position that the model gives each sequence's first token, int64 `[batch]`.

        Codecs that undo the rotary embedding count from it, so positions must run on by one.
        """
        batch, chunk = positions.shape
        seen = first.lengths() if first.batch else np.zeros(batch, dtype=np.int64)
        offsets = positions[:, -1] - (seen + self.tokens - 1)
        for cohort in first.cohorts:
            if cohort.geometry.seen:
                offsets[cohort.rows // first.spec.kv_heads] = cohort.offset
        new = np.arange(chunk) >= (chunk - self.tokens)[:, None]
        expected = (offsets + seen + self.tokens - chunk)[:, None] + np.arange(chunk)
        if (new & (positions != expected)).any():
            row, column = np.argwhere(new & (positions != expected))[0]
            raise CacheStateError(
                f"position {positions[row, column]} was given where {expected[row, column]} is next: this recipe keeps "
                "keys as they are before the rotary embedding, and needs positions that go up by one."
            )
        return offsets

    def reserve(self, tokens: np.ndarray, horizon: int) -> None:
        """Make sure that all layers can take `tokens: [batch]`, or raise `CacheFullError` before any has."""
        if self.pools.budget.limit is None:
            return
        running: dict[Any, int] = {}
        peak: dict[Any, int] = {}
        for store in self.stores.values():
            for pool, (taken, freed) in store.demand(tokens, horizon).items():
                running[pool] = running.get(pool, 0) + taken
                peak[pool] = max(peak.get(pool, 0), running[pool])
                # A chunk's layers settle one by one, a step's all at its end (see `FivefoldLayer.attend`).
                if (tokens > 1).any():
                    running[pool] -= freed
        self.pools.budget.reserve(peak)

    def settle(self, horizon: int) -> None:
        """Let the policies of all layers move what is due."""
        pack_due(self.stores.values(), horizon)
        for store in self.stores.values():
            for cohort in store.cohorts:
                if store.packing is not None or cohort.held is not None or cohort.geometry.extent.recent is not None:
                    store.append(cohort, None, None, horizon=horizon)

    def choose_together(self) -> None:
        """After a chunk, where the budgets of the layers hang together: share them out and choose."""
        policy = self.stores[self.first].policy
        if policy is None or not (policy.evicts and policy.waits):
            return
        batch = self.stores[self.first].batch
        statistics = torch.zeros(len(self.stores), batch)
        for row, store in enumerate(self.stores.values()):
            for cohort in store.cohorts:
                if cohort.held is not None:
                    sequences = cohort.held.sequences.cpu()
                    counts = sequences.bincount(minlength=batch)
                    values = policy.statistic(cohort.held).cpu() / counts[sequences]
                    statistics[row].index_add_(0, sequences, values)
        shares = policy.shares(statistics)
        for row, store in enumerate(self.stores.values()):
            store.choose_together(dict(enumerate(shares[row].tolist())))

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens in all layers, or raise before any has."""
        self.mend()
        count = min(count, self.length)
        everything = count == self.length
        if count and not everything:
            pages: dict[Any, int] = {}
            for store in self.stores.values():
                pages[store.exact_pool] = pages.get(store.exact_pool, 0) + store.plan_crop(count)[1]
            self.pools.budget.reserve(pages)
        for layer in self.stock.values():
            if layer.is_initialized and (count or self.recording):
                layer.crop(-count)
        if everything:
            self.free()
        elif count:
            for index, store in self.stores.items():
                store.crop(count)
                self.logical[index] -= count
        if self.recording:
            try:
                self.reserve(np.zeros(self.stores[self.first].batch, dtype=np.int64), 0)
            except CacheFullError:
                return  # no room to pack in: what is due waits for the next chunk
            self.settle(0)

    def free(self) -> None:
        """Forget everything, and give the pages back to the pools."""
        for index, store in self.stores.items():
            store.free()
            self.logical[index] = 0


class FivefoldLayer(CacheLayerMixin):
    """One layer of a `FivefoldCache`, as transformers sees it."""

    is_sliding = False
    is_compileable = False

    def __init__(self, index: int, state: _State) -> None:
        super().__init__()
        self.index = index
        self.state = state
        self.store = state.stores[index]
        self.contextual = self.store.codec is not None and self.store.codec.contextual
        # What the layer was called with, if the codec wants to know it: see `_hand_in` and `_hand_over`.
        self.inputs: torch.Tensor | None = None
        self.positions: torch.Tensor | None = None

    @property
    def is_croppable(self) -> bool:
        """Whether taking tokens back leaves no trace: nothing was given up or packed that must return."""
        return (
            self.store.packing is None
            and self.store.policy is None
            and all(e.recent is None for e in self.store.extents)
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Check a chunk and hand it back as it is: our attention function stores it."""
        spec = self.store.spec
        heads, dim = key_states.shape[1], key_states.shape[3]
        if (heads, dim) != (spec.kv_heads, spec.head_dim) or value_states.shape != key_states.shape:
            raise CacheStateError(
                f"layer {spec.layer} was given keys of {heads} heads x {dim}, and the cache was made for "
                f"{spec.kv_heads} x {spec.head_dim}: make a cache for this model."
            )
        for given in (key_states, value_states):
            if given.dtype != spec.dtype or given.device != spec.device:
                raise CacheStateError(
                    f"layer {spec.layer} was given {given.dtype} on {given.device}, and the cache was made for "
                    f"{spec.dtype} on {spec.device}: call compress() after moving the model, and no autocast."
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
        state, store = self.state, self.store
        batch, query_heads, chunk, dim = query.shape
        if self.index == state.first and state.fixed is None:
            try:
                state.admit(batch, chunk, mask, self.positions)
            except FivefoldError:
                state.mend()  # sliding layers before this one have taken the chunk
                raise
        group, rows = query_heads // store.spec.kv_heads, batch * store.spec.kv_heads
        if state.fixed is not None:
            newest = key.reshape(rows, dim), value.reshape(rows, dim)
            out = state.fixed.attend(self.index, query.reshape(rows, group, dim), *newest, scaling)
            return out.view(batch, 1, query_heads, dim)
        queries = query.reshape(rows, group, chunk, dim)
        keys, values = key.reshape(rows, chunk, dim), value.reshape(rows, chunk, dim)
        if chunk > 1 and store.codec is not None:
            store.codec.check(keys, values)
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
            if self.contextual and cohort.geometry.seen == 0:
                sequences = cohort.rows // store.spec.kv_heads
                assert self.inputs is not None
                inputs = self.inputs if alone else self.inputs[torch.from_numpy(np.unique(sequences)).to(query.device)]
                store.learn(cohort, state.offsets[sequences], q, k, v, inputs[:, new])
            if tokens == 1 and (chunk == 1 or cohort.held is None):
                store.append(cohort, k, v, settle=False)
                part = self._step(cohort, q[:, :, 0], scaling, chunk == 1)[:, :, None]
                if chunk > 1:
                    store.append(cohort, None, None, horizon=horizon)
            else:
                observed = None
                if cohort.held is None:
                    part, _ = attend_chunk(store, cohort, q, k, v, scaling)
                else:
                    part, observed = attend_observed(store, cohort, q, k, v, scaling)
                store.append(cohort, k, v, horizon=horizon, observed=observed)
            if alone:
                out = part
            else:
                out[pick, :, new] = part
        self.inputs = self.positions = None
        state.logical[self.index] += chunk
        state.finished(self.index)
        if self.index == state.last:
            # Only now, so that a step that was broken off can always be taken back.
            if chunk == 1:
                state.settle(horizon)
            else:
                state.choose_together()
        return out.reshape(batch, query_heads, chunk, dim).transpose(1, 2).contiguous()

    def _step(self, cohort: Cohort, queries: torch.Tensor, scaling: float, decoding: bool) -> torch.Tensor:
        """Attention of the newest token of each row; the policies are told of it."""
        state, store, policy = self.state, self.store, self.store.policy
        watch = cohort.held is not None and policy is not None and policy.chooses and policy.watches
        role = state.roles.get(self.index, "full") if decoding and cohort.geometry.extent.recent is None else "full"
        picks = state.picks(cohort) if role == "sparse" else None
        if picks is not None:
            out, weights = attend_picked(store, cohort, queries, scaling, picks, watch)
        else:
            out, weights = attend_step(store, cohort, queries, scaling, watch or role == "select")
        if weights is not None and role == "select":
            state.picked(cohort, pick(store, cohort, weights, state.top))
        if weights is not None and watch:
            store.observe(cohort, weights)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, padding included, whatever is still stored."""
        return self.state.logical[self.index]

    def get_max_length(self) -> int:
        return -1

    @property
    def record_past(self) -> bool:
        """Whether the newest tokens may be taken back: the policies then leave them alone until `crop` comes."""
        return self.state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.state.recording = value

    def activate_past_recording(self) -> None:
        policy = self.store.policy
        if policy is not None and policy.commits:
            raise CacheStateError(
                f"{policy.name} counts the attention of every token and cannot take tokens back: generate without an "
                "assistant model or prompt lookup, or use snapkv() or streaming()."
            )
        self.record_past = True

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
        raise CacheStateError(
            "a compressed cache is not offloaded layer by layer: use a recipe that fits, or no offloading."
        )

    prefetch = offload


class FivefoldCache(Cache):
    """A transformers cache whose layers are compressed as a recipe says. Made by `fivefold.compress`."""

    def __init__(self, recipe: Recipe, state: _State, cuda_graph: bool = False) -> None:
        super().__init__(layers=[state.stock.get(i) or FivefoldLayer(i, state) for i in range(state.layers)])
        self.recipe = recipe
        self.state = state
        self.step = graph.Step() if cuda_graph else None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention module of a layer: see `FivefoldLayer.update`."""
        if self.state.armed != layer_idx:
            raise CacheStateError(
                "this cache can only be read by Fivefold's attention, and the model that was called is not "
                "prepared for it: make the cache with fivefold.compress(model, ...) for that very model."
            )
        self.state.armed = None
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.state.stock:
            self.state.finished(layer_idx)
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length, the same for all layers: tokens seen, padding included, whatever is stored."""
        return self.state.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        self.state.mend()  # the first thing of a forward that asks what the layers hold
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (negative), or all but that many (positive, as in older
        transformers). Raises `CacheStateError`, changing nothing, where that would show tokens again that were
        given up."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        self.state.crop(count)

    def report(self) -> Report:
        """What the cache holds, in exact bytes (see `fivefold.report.Report`)."""
        return measure(self)

    def fork(self) -> FivefoldCache:
        """A second cache of the same tokens: every page is shared until either side writes to it."""
        self.state.mend()
        stores = {index: store.fork() for index, store in self.state.stores.items()}
        old = self.state
        state = _State(stores, copy.deepcopy(old.stock), old.pools, old.roles, old.top)
        state.logical = dict(self.state.logical)
        state.recording = self.state.recording
        return FivefoldCache(self.recipe, state, self.step is not None)

    def __deepcopy__(self, memo: dict[int, Any]) -> FivefoldCache:
        return self.fork()

    def reset(self) -> None:
        """Forget everything."""
        self.state.free()
        self.state.recording = False
        if self.step is not None:
            self.step.reset()
        for layer in self.state.stock.values():
            # transformers 5.17 only fills them with zeros.
            vars(layer).update(vars(type(layer)(sliding_window=layer.sliding_window)))

    def free(self) -> None:
        """Forget everything, and give all memory back now."""
        self.reset()
        self.state.pools.budget.trim()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Forks share the pools: what only this cache held must not stay taken. At the very end `sys` may be gone.
        state = getattr(self, "state", None)
        if state is not None and not ending():
            state.free()
            state.pools.budget.trim()


# One for all layers and caches of a model that have the same.
_ropes: weakref.WeakKeyDictionary[Any, dict[str, Rope]] = weakref.WeakKeyDictionary()


def rope_of(model: PreTrainedModel, index: int, head_dim: int) -> tuple[Rope | None, str]:
    """How the keys of a layer are turned by position; or None, and why that is not known."""
    rotary: Any = next((m for name, m in model.named_modules() if name.split(".")[-1] == "rotary_emb"), None)
    types = getattr(model.config, "layer_types", None)
    kind, inv_freq = getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    if isinstance(kind, dict) and types:  # of each type of layer its own
        kind, inv_freq = kind.get(types[index]), getattr(rotary, f"{types[index]}_inv_freq", None)
    if inv_freq is None:
        return None, f"Fivefold finds no rotary embedding in this {model.config.model_type} model"
    if kind not in ("default", "linear", "llama3", "yarn"):
        return None, f"its rotary embedding ({kind}) changes with the length of the text"
    made = _ropes.setdefault(rotary, {})
    key = types[index] if types and isinstance(rotary.rope_type, dict) else ""
    if key not in made or not torch.equal(made[key].inv_freq, inv_freq.detach().double().cpu()):
        made[key] = Rope(inv_freq, head_dim)
    return made[key], ""


def layer_spec(model: PreTrainedModel, index: int, module: torch.nn.Module) -> LayerSpec:
    """What the methods may know about a layer of a model."""
    config = model.config
    heads = config.num_attention_heads
    parameter = next(module.parameters())
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope, no_rope = rope_of(model, index, head_dim)
    return LayerSpec(
        layer=index,
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        query_heads=heads,
        head_dim=head_dim,
        dtype=model.dtype,
        device=parameter.device,
        model=signature(config),
        config=config_hash(config),
        rope=rope,
        no_rope=no_rope,
    )


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
    stores: dict[int, LayerCache] = {}
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
        codec = codec_owner.codec(spec) if codec_owner else None
        residual = codec_owner.exact_tokens if codec_owner else 0
        stores[index] = LayerCache(spec, pools, recipe.extents(spec), codec, residual, policy)
    if not stores:
        raise UnsupportedModelError(
            "every layer of this model has a sliding window, so no cache grows and none can shrink: use DynamicCache."
        )
    windows = {index: layer for index, layer in enumerate(stock) if index not in stores}
    reads = recipe.get("reads")
    roles: dict[int, str] = {}
    if isinstance(reads, ReadPolicy):
        roles = dict(zip(stores, reads.roles([store.spec for store in stores.values()])))
    return FivefoldCache(recipe, _State(stores, windows, pools, roles, getattr(reads, "top", 0)), cuda_graph)
