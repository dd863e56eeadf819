"""The cache as transformers sees it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from fivefold.engine import decoding, persist, recording, sequences
from fivefold.engine.session import Session
from fivefold.errors import CacheStateError
from fivefold.interrupts import uninterrupted
from fivefold.models import saving
from fivefold.models.graph import Step
from fivefold.models.stock import StockLayers
from fivefold.recipe import Recipe
from fivefold.report import Report, measure

__all__ = ["FivefoldCache"]  # what is public here


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
        store = self.session.stores.get(self.index)
        if store is None:
            return True  # its attention is left out
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
        policy: Any = self.session.stores[self.session.first].policy
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


def cache_in(kwargs: dict[str, Any]) -> Any:
    """The cache that a module is called with, if any."""
    return kwargs.get("past_key_values", kwargs.get("layer_past"))


def cache_of(kwargs: dict[str, Any]) -> FivefoldCache | None:
    """The same, if it is ours."""
    cache = cache_in(kwargs)
    return cache if isinstance(cache, FivefoldCache) else None


def _indices(indices: Any) -> np.ndarray:
    """Numbers of sequences as int64 `[n]`."""
    found = np.asarray(indices.cpu() if isinstance(indices, torch.Tensor) else indices).reshape(-1)
    if found.size and found.dtype.kind not in "iu":
        raise CacheStateError(f"{indices!r} are not numbers of sequences: give whole numbers, such as [0, 2].")
    return found.astype(np.int64)


class FivefoldCache(Cache):
    """A transformers cache whose layers are compressed as a recipe says. Made by `fivefold.compress`.

    model: the signature of the model that it is for.
    """

    def __init__(self, recipe: Recipe, session: Session, model: str, layers: int, cuda_graph: bool = False) -> None:
        stock = session.companions.layers if isinstance(session.companions, StockLayers) else {}
        super().__init__(layers=[stock[i] if i in stock else FivefoldLayer(i, session) for i in range(layers)])
        self.recipe = recipe
        self.session = session
        self.model = model
        self.absent = frozenset(spec.layer for spec in session.absent)
        """The layers whose attention is left out."""
        specs = [*(store.spec for store in session.stores.values()), *session.absent]
        self.windows = frozenset(spec.window for spec in specs if spec.window)
        """The lengths of the sliding windows of layers that are compressed."""
        self.step = Step() if cuda_graph else None
        self.of: Callable[[], Any] | None = None
        """A weak reference to the model that it is for, if that is known."""
        self.armed: int | None = None
        """The layer whose attention module has announced itself, and is prepared for this cache."""
        self.selection: Any = None
        """What `models.selection.selected` returned for a module that is called by itself."""
        self.begun = False
        """Whether `generate` has been called with it, and has not called the model yet."""

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
        out = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx in self.session.stores:
            self.session.brought[layer_idx] = out
        return out

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The logical length, the same for all layers: tokens seen, padding included, whatever is stored."""
        return self.session.length

    @property
    def _is_user_defined(self) -> bool:
        """transformers' `generate` sets it when it begins with a cache that it was given. Whether tokens may be taken
        back it says later."""
        return True

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self.begun = True
        recording.end(self.session)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens (negative), or all but that many (positive, as in older
        transformers). Raises `CacheStateError`, changing nothing, where that would show tokens again that were
        given up."""
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.get_seq_length() - tokens_to_remove)
        recording.crop(self.session, count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Sequence i becomes what sequence beam_idx[i] was: page tables move, bytes do not."""
        self.session.select(beam_idx.to("cpu").numpy().astype(np.int64))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, side by side."""
        self.session.select(np.repeat(np.arange(self.session.batch), repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences, int64 `[n]` or bool `[batch]`."""
        index = indices.to("cpu")
        picked = index.nonzero()[:, 0] if index.dtype == torch.bool else index
        self.session.select(picked.numpy().astype(np.int64))

    def report(self) -> Report:
        """What the cache holds, in exact bytes, and which way its decoding steps go (see `fivefold.report.Report`)."""
        self.session.tidy()
        return measure(self.session, str(self.recipe), 0 if self.step is None else self.step.nbytes, self.decoding)

    def __repr__(self) -> str:
        return f"<FivefoldCache {self.recipe}, {self.get_seq_length():,} tokens>"

    @property
    def decoding(self) -> str:
        """Which way its decoding steps go, and why, in a plain sentence."""
        graph = ""
        if self.step is not None:
            with suppress(CacheStateError):  # kernels that are asked for and not here, as `describe` says
                why = self.step.failed if self.step.broken else self.step.why_not(self.session)
                own = f" of the model's own code ({self.step.own})" if self.step.own else ""
            graph = f"not as a CUDA graph ({why})" if why else f"as a CUDA graph{own}"
        elif self.session.devices[0].type == "cuda":
            graph = "launch by launch (cuda_graph=True was not asked for)"
        beside = self.session.companions
        windows = len(beside.windows) if isinstance(beside, StockLayers) else 0
        own = f"; {windows} more, with a sliding window, are transformers' own" if windows else ""
        return decoding.describe(self.session, graph) + own

    def warn(self, stacklevel: int = 1) -> None:
        """Say, once, where decoding steps go a slower way than this machine could give (`SlowPathWarning`)."""
        with suppress(CacheStateError):  # kernels that are asked for and not here are an error when a step comes
            decoding.warn(self.session, self.session.why_not_fused(), stacklevel + 1)
            if self.step is not None and (why := self.step.why_not(self.session)):
                decoding.tell(self.session, f"decoding without a CUDA graph: {why}", stacklevel + 1)

    @uninterrupted
    def fork(self) -> FivefoldCache:
        """A second cache of the same tokens: every page is shared until either side writes to it."""
        return self._of(self.session.fork(), self.step is not None)

    def _of(self, session: Session, cuda_graph: bool) -> FivefoldCache:
        cache = FivefoldCache(self.recipe, session, self.model, len(self.layers), cuda_graph)
        cache.of = self.of
        return cache

    # -- at rest ------------------------------------------------------------------------------------------

    @property
    def offloaded(self) -> bool:
        """Whether what it holds is in host memory, and none of its pages."""
        return self.session.state is not None

    def offload(self) -> None:
        """Bring everything to host memory, as it is, and give the pages back. Until `restore` the model cannot be
        called with this cache; it can be saved, forked and freed."""
        recording.end(self.session)
        persist.offload(self.session)
        if self.step is not None:
            self.step.reset()
        self.session.pools.budget.trim()

    def restore(self) -> None:
        """Undo `offload`: everything is as it was, to the bit. Raises `CacheFullError` where there is no room now; it
        is still offloaded then."""
        persist.restore(self.session)

    def save(self, folder: str | Path, note: Any = None) -> None:
        """Write everything to a folder (`cache.json` and a file of tensors), for `fivefold.load_cache`.

        What the folder held before can be read until the new files are complete. The cache goes on as it was. Raises
        `SavedCacheError` if the folder cannot be written to, and `CacheStateError` for an empty cache. note: whatever
        belongs to it, as JSON can hold it; it is written with the cache or not at all, and `load` returns it.
        """
        if not self.batch:
            raise CacheStateError("there is nothing to save in an empty cache: give it some text first.")
        recording.end(self.session)
        persist.write(Path(folder), persist.collect(self.session), {**self._identity(), "note": note})

    def load(self, folder: str | Path) -> Any:
        """Let this empty cache hold what `save` wrote to a folder, to the bit. Returns the note that was given then.

        Raises `SavedCacheError` if there is nothing, or it is damaged, of a newer format, or of another model, recipe
        or profile; `CacheFullError` where there is no room, and `CacheStateError` if the cache is not empty.
        """
        return saving.load(self.session, Path(folder), self._identity())

    def _identity(self) -> dict[str, Any]:
        known = saving.identity(str(self.recipe), self.model, None if self.of is None else self.of())
        return {**known, "sliding": bool(self.windows)}

    # -- sequences ----------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """How many sequences it holds; 0 for an empty cache."""
        return len(self.lengths())

    def lengths(self) -> np.ndarray:
        """Tokens seen by each sequence, padding left out: int64 `[batch]`."""
        return self.session.lengths()

    def new(self, cuda_graph: bool | None = None) -> FivefoldCache:
        """An empty cache of the same recipe, whose pages come from the same pools, under the same cap."""
        return self._of(self.session.new(), self.step is not None if cuda_graph is None else cuda_graph)

    def join(self, other: FivefoldCache) -> None:
        """Add the sequences of another cache of the same recipe behind those here; `other` is empty then.

        Page tables move, bytes do not. Sequences may be of any length: the logical length (`get_seq_length`) is that of
        the longest, and shorter ones count as padded on the left. A call of the model needs neither an attention mask
        nor positions for that: each sequence goes on with its own.

        Raises `CacheStateError` where the caches do not fit together, and `CacheFullError` where the cap has no room:
        for the bytes of `other`, if it was not made from this one by `new`, `fork` or `take`, or for page tables as
        wide as the longest sequence wants them. Nothing has changed then.
        """
        if not isinstance(other, FivefoldCache):
            raise CacheStateError(f"a {type(other).__name__} cannot join: give a cache that compress() or new() made.")
        if (str(other.recipe), other.model) != (str(self.recipe), self.model):
            raise CacheStateError(
                f"a cache with {other.recipe} for {other.model} cannot join one with {self.recipe} for {self.model}: "
                "make both with the same recipe for the same model."
            )
        for cache in (self, other):
            recording.end(cache.session)
        sequences.join(self.session, other.session)

    @uninterrupted
    def take(self, indices: Any) -> FivefoldCache:
        """Take sequences out into a cache of their own: whole numbers `[n]` (a list, array or tensor), each once.

        Pages stay where they are. The logical length of both caches is then that of the longest sequence that they
        hold. Raises `CacheStateError`, changing nothing, for a sequence that is not there.
        """
        recording.end(self.session)
        return self._of(sequences.take(self.session, _indices(indices)), self.step is not None)

    def reserve(self, tokens: int) -> None:
        """With `cuda_graph=True`: let steps have room for sequences of so many tokens, so that a step of a batch of any
        size is captured once. Nothing else needs to know beforehand."""
        if self.step is not None:
            self.step.reserved = max(self.step.reserved, tokens)

    def drop(self, indices: Any) -> None:
        """Take sequences out and give their pages back; as `take`."""
        self.take(indices).free()

    def __copy__(self) -> FivefoldCache:
        return self.fork()

    def __deepcopy__(self, memo: dict[int, Any]) -> FivefoldCache:
        return self.fork()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise CacheStateError(
            "a compressed cache cannot be pickled: its pages are memory that it shares with its forks. Use fork() for "
            "a copy in this process, and save() for one on the disk."
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
            with uninterrupted:
                session.free()
                session.pools.budget.trim()
                uninterrupted.done()  # nobody would hear of it here
