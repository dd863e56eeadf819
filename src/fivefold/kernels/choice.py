"""Which kernels run: the environment variable FIVEFOLD_KERNELS, and what this machine has.

auto        Triton on an NVIDIA GPU of compute capability 8.0 or more where Triton is installed, else the reference
reference   plain PyTorch everywhere
triton      Triton or an error
cuda        Triton, and CUDA C++ for packed pages, or an error: faster, and not yet what `auto` takes, because its tests
            on a GPU have not all been run since it was last changed
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch

PATHS = ("auto", "reference", "triton", "cuda")


class Choice(NamedTuple):
    path: str
    why: str
    possible: bool = True


def choose(device: torch.device) -> Choice:
    """The path for tensors on a device, and why. `possible` is False where what was asked for cannot be had."""
    return _choose(os.environ.get("FIVEFOLD_KERNELS", "auto"), torch.device(device))


@cache
def _choose(asked: str, device: torch.device) -> Choice:
    if asked not in PATHS:
        return Choice("reference", f"FIVEFOLD_KERNELS={asked} is none of {', '.join(PATHS)}", False)
    if asked == "reference":
        return Choice("reference", "FIVEFOLD_KERNELS=reference")
    lacking = _lacking(device)
    if lacking is not None:
        return Choice("reference", lacking, asked == "auto")
    if asked == "cuda":
        if not _compiler():
            return Choice("triton", "Triton is there, but not cuda-bindings, which compiles CUDA C++", False)
        return Choice("cuda", "FIVEFOLD_KERNELS=cuda")
    return Choice("triton", "FIVEFOLD_KERNELS=triton" if asked == "triton" else f"a {device.type} device with Triton")


def _compiler() -> bool:
    """Whether what compiles and launches CUDA C++ is installed (torch's CUDA wheels bring it)."""
    try:
        from cuda.bindings import driver, nvrtc

        return not int(nvrtc.nvrtcVersion()[0]) and hasattr(driver, "cuLaunchKernel")
    except (ImportError, RuntimeError):  # no such package, or no such library
        return False


def _lacking(device: torch.device) -> str | None:
    """Why kernels cannot run on a device; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") == "1" and os.environ.get("FIVEFOLD_KERNELS") == "triton":
            return None  # slow, for tests
        return "the cache is on a CPU"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are written for NVIDIA GPUs, and the cache is on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is less than 8.0"
    return None
