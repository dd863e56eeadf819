"""The cache as transformers sees it: its classes, and layers with a sliding window, which stay transformers' own."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from fivefold.engine.session import Session
from fivefold.errors import CacheStateError
from fivefold.models.graph import Step
from fivefold.recipe import Recipe
from fivefold.report import Report, measure


class SlidingLayers:
    """Layers with a sliding window, by index: transformers' own, which replace tensors and never write into them."""

    def __init__(self, layers: dict[int, Any]) -> None:
        self.layers = layers

    @property
    def nbytes(self) -> int:
        # After a long chunk their tensors are views of more than the window.
        held = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for layer in self.layers.values()
            for tensor in vars(layer).values()
            if isinstance(tensor, torch.Tensor)
        }
        return sum(held.values())

    def snapshot(self) -> Callable[[], None]:
        before = {index: dict(vars(layer)) for index, layer in self.layers.items()}

        def restore() -> None:
            for index, state in before.items():
                vars(self.layers[index]).clear()
                vars(self.layers[index]).update(state)

        return restore

    def crop(self, tokens: int, recording: bool) -> None:
        for layer in self.layers.values():
            if layer.is_initialized and (tokens or recording):
                layer.crop(-tokens)

    def reset(self) -> None:
        for layer in self.layers.values():
            # transformers 5.17 only fills them with zeros.
            vars(layer).update(vars(type(layer)(sliding_window=layer.sliding_window)))

    def fork(self) -> SlidingLayers:
        return SlidingLayers(copy.deepcopy(self.layers))


class FivefoldLayer(CacheLayerMixin):
    """One layer of a `FivefoldCache`. It only checks what it is given: the attention function stores it."""

    is_sliding = False
    is_compileable = False

    def __init__(self, index: int, session: Session) -> None:
        super().__init__()
        self.index = index
        self.session = session

    @property
    def is_croppable(self) -> bool:
        """Whether taking tokens back leaves no trace: nothing was given up or packed that must return."""
        store = self.session.stores[self.index]
        return store.packing is None and store.policy is None and all(e.recent is None for e in store.extents)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Check a chunk and hand it back as it is: our attention function stores it."""
        spec = self.session.stores[self.index].spec
        heads, dim = key_states.shape[1], key_states.shape[3]
        if value_states.shape != key_states.shape or value_states.dtype != key_states.dtype:
            raise CacheStateError(
                f"layer {spec.layer} was given keys {tuple(key_states.shape)} in {key_states.dtype} and values "
                f"{tuple(value_states.shape)} in {value_states.dtype}, which Fivefold does not store: use no autocast, "
                "or DynamicCache."
            )
        if self.session.length:
            if (heads, dim) != (spec.kv_heads, spec.head_dim):
                raise CacheStateError(
                    f"layer {spec.layer} was given keys of {heads} heads x {dim}, and the cache holds "
                    f"{spec.kv_heads} x {spec.head_dim}: make a cache for this model."
                )
            for given in (key_states, value_states):
                if given.dtype != spec.dtype or given.device != spec.device:
                    raise CacheStateError(
                        f"layer {spec.layer} was given {given.dtype} on {given.device}, and the cache holds "
                        f"{spec.dtype} on {spec.device}: call compress() after moving the model, and no autocast for "
                        "some calls only."
                    )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + int(query_length), 0

    def get_seq_length(self) -> int:
        """The logical length: tokens seen, padding included, whatever is still stored."""
        return self.session.length

    def get_max_length(self) -> int:
        return -1

    @property
    def record_past(self) -> bool:
        """Whether the newest tokens may be taken back: the policies then leave them alone until `crop` comes."""
        return self.session.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self.session.recording = value

    def activate_past_recording(self) -> None:
        policy: Any = self.session.stores[self.index].policy
        if policy is not None and policy.commits:
            raise CacheStateError(
                f"{policy.name} counts the attention of every token and cannot take tokens back: generate without an "
                "assistant model or prompt lookup, or use snapkv() or streaming()."
            )
        self.record_past = True

    def reset(self) -> None:
        self.session.free()

    def offload(self) -> None:
        raise CacheStateError(
            "a compressed cache is not offloaded layer by layer: use a recipe that fits, or no offloading."
        )

    prefetch = offload

    def _by_cache(self, *args: Any) -> None:
        raise CacheStateError("the layers of a compressed cache change together: call the cache's own method.")

    reorder_cache = batch_repeat_interleave = batch_select_indices = crop = _by_cache


class FivefoldCache(Cache):
    """A transformers cache whose layers are compressed as a recipe says. Made by `fivefold.compress`.

    model: the signature of the model that it is for.
    """

    def __init__(self, recipe: Recipe, session: Session, model: str, layers: int, cuda_graph: bool = False) -> None:
        sliding = session.companions.layers if isinstance(session.companions, SlidingLayers) else {}
        super().__init__(layers=[sliding.get(i) or FivefoldLayer(i, session) for i in range(layers)])
        self.recipe = recipe
        self.session = session
        self.model = model
        self.sliding = sliding
        self.step = Step() if cuda_graph else None
        self.armed: int | None = None
        """The layer whose attention module has announced itself, and is prepared for this cache."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by the attention module of a layer: see `FivefoldLayer.update`."""
        if self.armed != layer_idx:
            raise CacheStateError(
                "this cache can only be read by Fivefold's attention, and the model that was called is not "
                "prepared for it: make the cache with fivefold.compress(model, ...) for that very model."
            )
        self.armed = None
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length, the same for all layers: tokens seen, padding included, whatever is stored."""
        return self.session.length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (negative), or all but that many (positive, as in older
        transformers). Raises `CacheStateError`, changing nothing, where that would show tokens again that were
        given up."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        self.session.crop(count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was: page tables move, bytes do not."""
        self.session.select(beam_idx.to("cpu").numpy().astype(np.int64))
        for layer in self.sliding.values():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        self.session.select(np.repeat(np.arange(self.session.batch), repeats))
        for layer in self.sliding.values():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences, int64 `[n]` or bool `[batch]`."""
        index = indices.to("cpu")
        picked = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        self.session.select(picked.numpy().astype(np.int64))
        for layer in self.sliding.values():
            layer.batch_select_indices(indices)

    def report(self) -> Report:
        """What the cache holds, in exact bytes (see `fivefold.report.Report`)."""
        self.session.tidy()
        return measure(self.session, str(self.recipe), 0 if self.step is None else self.step.nbytes)

    def fork(self) -> FivefoldCache:
        """A second cache of the same tokens: every page is shared until either side writes to it."""
        return FivefoldCache(self.recipe, self.session.fork(), self.model, len(self.layers), self.step is not None)

    def __copy__(self) -> FivefoldCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> FivefoldCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheStateError(
            "a compressed cache cannot be pickled: its pages are memory that it shares with its forks. Use fork() for "
            "a copy in this process."
        )

    def reset(self) -> None:
        """Forget everything."""
        self.session.free()
        self.session.recording = False
        if self.step is not None:
            self.step.reset()
        if self.session.companions is not None:
            self.session.companions.reset()

    def free(self) -> None:
        """Forget everything, and give all memory back now."""
        self.reset()
        self.session.pools.budget.trim()

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # Forks share the pools: what only this cache held must not stay taken. At the very end `sys` may be gone.
        session = getattr(self, "session", None)
        if session is not None and not ending():
            session.free()
            session.pools.budget.trim()
