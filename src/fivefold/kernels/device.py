"""Kernels run on the device of their tensors, which need not be the current one; arrays that are sent there."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import numpy as np
import torch

_NOTHING = nullcontext()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Within it, what is launched runs on `device`, on the stream that is current there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


SETTINGS = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"
"""Where a user sets up torch's allocator; then it is left as it is."""


def let_memory_grow(device: torch.device) -> None:
    """Have torch's allocator map a GPU's memory page by page from now on (`expandable_segments`), unless the
    environment says how it is to work. Pages of a cache stay while what a model computes with comes and goes: blocks of
    fixed size would leave up to a third of the memory in gaps between them that nothing fits into."""
    if device.type == "cuda" and sys.platform == "linux" and not any(name in os.environ for name in SETTINGS):
        _let_memory_grow()


@cache
def _let_memory_grow() -> None:
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if change is not None and torch.version.hip is None and torch.cuda.get_allocator_backend() == "native":
        change("expandable_segments:True")


def sent(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Arrays of int64 on a device. A GPU takes them in one copy when it gets there, and nobody waits for it."""
    if device.type != "cuda":
        return [torch.from_numpy(x).to(device) for x in arrays]
    host = torch.empty(sum(x.size for x in arrays), dtype=torch.int64, pin_memory=True)
    np.concatenate([x.reshape(-1) for x in arrays], out=host.numpy())
    parts = host.to(device, non_blocking=True).split([x.size for x in arrays])
    return [part.view(x.shape) for part, x in zip(parts, arrays)]


def power_of_2(count: int) -> int:
    """The least one that is no less. (Triton's own takes a hundred times as long, with every launch.)"""
    return 1 << max(0, count - 1).bit_length()


def overlaps(device: torch.device) -> bool:
    """Whether kernels may start before the one before them has ended, and wait for it themselves (programmatic
    dependent launch)."""
    return device.type == "cuda" and _capability(numbered(device))[0] >= 9


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def processors(device: torch.device) -> int:
    """How many processors a GPU has; one elsewhere."""
    return _processors(numbered(device))


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def coming(x: torch.Tensor) -> Callable[[], list[float]]:
    """What gives the numbers of a tensor `[n]`. A GPU sends them once it has got here: who asks waits for that, not for
    what came since."""
    if not x.is_cuda:
        return x.tolist
    host, event = torch.empty(x.shape, dtype=x.dtype, pin_memory=True), torch.cuda.Event()
    host.copy_(x, non_blocking=True)
    event.record(torch.cuda.current_stream(x.device))

    def wait() -> list[float]:
        event.synchronize()
        found: list[float] = host.tolist()
        return found

    return wait


class Beside:
    """Where work runs that waits for what a GPU had been given at one moment (`mark`), beside what came since: a stream
    of its own. On a CPU it runs as ever."""

    def __init__(self, device: torch.device) -> None:
        self._device, cuda = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._event = torch.cuda.Event() if cuda else None
        self._used = False

    def mark(self) -> None:
        """This is the moment."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it, what is launched goes there."""
        if self._stream is None or self._event is None:
            yield
            return
        self._stream.wait_event(self._event)
        self._used = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What the GPU is given from now on waits for that work."""
        if self._used and self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            self._used = False


@contextmanager
def no_garbage() -> Iterator[None]:
    """For a capture of a CUDA graph: without Python's collector of cycles, which might destroy a graph that is nobody's
    any more in the midst of it, and so end it."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def numbered(device: torch.device) -> torch.device:
    """A CUDA device by its number, so that what is kept for a device is kept for that one."""
    if device.type != "cuda" or device.index is not None:
        return device
    if not torch.cuda.is_initialized() and not torch.cuda.is_available():
        return device
    return torch.device("cuda", torch.cuda.current_device())
