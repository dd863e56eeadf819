"""What kernels touch in Triton's interpreter, and what a step that could be captured holds on to."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fivefold.kernels import shared


def _spans(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    stores = [x.untyped_storage() for x in tensors]
    return [(store.data_ptr(), store.data_ptr() + store.nbytes()) for store in stores if store.nbytes()]


def _pages(cache: Any) -> list[tuple[int, int]]:
    """The bytes of every page that somebody owns."""
    out = []
    for pool in cache.session.pools:
        for _, slab in pool._live():
            owned = np.flatnonzero(slab.references > 0)
            for part in pool.layout.fields:
                x = slab.tensors[part.name]
                first = x.data_ptr() + owned * x.stride(0) * x.element_size()
                out += zip(first.tolist(), (first + part.nbytes).tolist())
    return out


@contextmanager
def checked(*caches: Any, also: Sequence[torch.Tensor] = ()) -> Iterator[list[str]]:
    """Within it, what a kernel reads or writes must be part of one of its arguments, or of a page of these caches that
    has an owner, or of what is there `also`. Yields the names of the kernels that have run."""
    from triton.runtime import interpreter

    real, (load, store) = interpreter._interpreter, (interpreter._interpreter.load, interpreter._interpreter.store)
    call, ran = interpreter.GridExecutor.__call__, []
    allowed: list[np.ndarray] = []

    def look(what: str, ptrs: Any, mask: Any, size: int) -> None:
        at = np.asarray(ptrs).reshape(-1)[np.asarray(mask).reshape(-1).astype(bool)].astype(np.int64)
        starts, stops = allowed
        place = np.searchsorted(starts, at, "right") - 1
        good = (place >= 0) & (at + size <= stops[place])
        assert good.all(), f"{ran[-1]} {what} {int((~good).sum())} of {at.size} places that are nobody's"

    class Checker:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def load(self, ptrs: Any, mask: Any, other: Any, dtype: Any) -> Any:
            look("reads", ptrs, mask, np.dtype(dtype).itemsize)
            return load(ptrs, mask, other, dtype)

        def store(self, ptrs: Any, value: Any, mask: Any) -> Any:
            look("writes", ptrs, mask, np.asarray(value).dtype.itemsize)
            return store(ptrs, value, mask)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        more = [cache.session.banks[0].mirror._padding for cache in caches if cache.session.banks[0].mirror]
        spans = {*_spans([*tensors, *more, *also]), *(span for cache in caches for span in _pages(cache))}
        both = np.array(sorted(spans))
        # Pieces may lie within each other: each ends where the farthest of those before it does.
        allowed[:] = both[:, 0], np.maximum.accumulate(both[:, 1])
        ran.append(self.fn.__name__)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_interpreter", Checker())
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield ran


class _Inputs(TorchDispatchMode):
    """Storages that are read and were there before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: set[int] = set()
        self.found: dict[int, StorageWeakRef] = {}

    def note(self, tensors: Any) -> None:
        for x in tensors:
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.made:
                self.found[x.untyped_storage()._cdata] = StorageWeakRef(x.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.note(flat)
        out = func(*args, **(kwargs or {}))
        self.kept = [*getattr(self, "kept", []), out]  # so that no other storage gets its place
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                cdata = x.untyped_storage()._cdata
                if cdata not in self.found:
                    self.made.add(cdata)
        return out


@contextmanager
def captured(step: Any) -> Iterator[list[StorageWeakRef]]:
    """Within it, what the steps read that they have not made, as a graph would that was captured from them."""
    from triton.runtime import interpreter

    run, call, found = type(step)._run, interpreter.GridExecutor.__call__, []

    def record(self: Any, *args: Any) -> Any:
        mode = _Inputs()

        def launch(kernel: Any, *given: Any, **kwargs: Any) -> Any:
            mode.note((*given, *kwargs.values()))
            return call(kernel, *given, **kwargs)

        with pytest.MonkeyPatch.context() as patch, mode:
            patch.setattr(interpreter.GridExecutor, "__call__", launch)
            out = run(self, *args)
        found[:] = mode.found.values()
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(step), "_run", record)
        yield found


def gone(found: list[StorageWeakRef]) -> int:
    """How many of these nobody holds any more, once what the process shares has been forgotten too."""
    for table in list(shared._tables):
        table.clear()
    gc.collect()
    return sum(ref.expired() for ref in found)
