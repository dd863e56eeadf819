"""Kernels in CUDA C++ on a CPU: compiled behind a header that is enough of CUDA (`cuda_on_cpu.h`)."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from fivefold.kernels.compiled import built

_HERE = Path(__file__).parent


def compiled(kernel: Path, header: str, launch: str, values: Mapping[str, object], folder: Path) -> ctypes.CDLL:
    """A `.cu` file between a header of this folder and what launches it, with macros for `values`. Kept as the CPU
    kernels are, and copied into the test's folder: another test's launches leave nothing in it."""
    source = folder / f"{kernel.stem}.cpp"
    source.write_text(f'#define CUDA_ON_CPU\n#include "{header}"\n#include "{kernel.name}"\n{launch}')
    headers = [*sorted(_HERE.glob("*.h")), kernel, *sorted(kernel.parents[1].glob("*.cuh"))]
    # Products of halves take the machine's own instructions, and are rounded one by one all the same.
    options = "-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-w", "-shared", "-fPIC"
    defined = [f"-D{name}={value}" for name, value in values.items()]
    library = shutil.copy(built(source, [*options, *defined], headers), folder)
    return ctypes.CDLL(library)


def written_in_front(library: ctypes.CDLL, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """These are what the kernel in front of an early one writes: there once a thread has waited, in each block."""
    copies = [x.clone() for x in tensors]
    for x, copy in zip(tensors, copies):
        assert x.is_contiguous()
        library.arrives(*(ctypes.c_void_p(one.data_ptr()) for one in (x, copy)), ctypes.c_long(x.nbytes))
    return copies
