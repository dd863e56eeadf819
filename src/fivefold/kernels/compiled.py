"""How functions that numba compiles for the CPU are compiled and called.

They are given plain memory: `flat` makes a one-dimensional view of a page field and says how far its pages lie apart,
so that one compiled function serves pages that stand side by side and pages inside records. They use torch's threads
where both found the same OpenMP library.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch

# Not every threading layer that numba may find can be called from two threads.
_LOCK = threading.Lock()

part = numba.njit(fastmath=True, nogil=True, error_model="numpy", inline="always")
"""Decorates what kernels share."""


def kernel(signature: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Decorates a function over numpy arrays and numbers that uses `numba.prange`; the compiled code is kept on disk.

    What is decorated takes tensors for the arrays. It is compiled when it is first called.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        made: list[Any] = []

        def call(*args: Any) -> None:
            arrays = [x.numpy() if isinstance(x, torch.Tensor) else x for x in args]
            threads = torch.get_num_threads()
            with _LOCK:
                if not made:
                    compile_ = numba.njit(
                        signature, parallel=True, cache=True, fastmath=True, nogil=True, error_model="numpy"
                    )
                    made.append(compile_(function))
                numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
                made[0](*arrays)
            if torch.get_num_threads() != threads:  # starting numba's threads sets OpenMP's number of them
                torch.set_num_threads(threads)

        return call

    return decorate


def flat(field: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """A page field `[rows, pages, *shape]` of 16-bit numbers as int16 memory `[span]`, and the strides of rows and
    pages in it; every page's own numbers are one run."""
    rows, pages, run = field.shape[0], field.shape[1], field[0, 0].numel()
    if field.stride()[2:] != field[0, 0].contiguous().stride():
        field = field.contiguous()
    row, page = field.stride()[:2]
    span = (rows - 1) * row + (pages - 1) * page + run
    return field.view(torch.int16).as_strided((span,), (1,)), row, page


@part
def halves(bits, floats):
    """float16 numbers given as int16 memory, into float32 memory of the same length. No infinities, no NaN."""
    shifted = floats.view(np.int32)
    for i in range(len(bits)):
        half = np.int32(bits[i])
        shifted[i] = np.int32((half & 0x7FFF) << 13 | (half & 0x8000) << 16)
    for i in range(len(bits)):
        floats[i] *= np.float32(2.0**112)
