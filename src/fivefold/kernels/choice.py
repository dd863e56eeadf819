"""Which kernels run: the environment variable FIVEFOLD_KERNELS, and what this machine has.

auto        on a CPU C++ where there is a compiler; on an NVIDIA GPU of compute capability 8.0 or more Triton where it
            is installed, and CUDA C++ for packed pages where cuda-bindings can compile it for that GPU; else the
            reference
reference   plain PyTorch everywhere
cpp         C++ on a CPU, or an error
triton      Triton or an error
cuda        Triton, and CUDA C++ for packed pages, or an error
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch

from fivefold.errors import CacheStateError
from fivefold.kernels import compiled
from fivefold.kernels.device import numbered

PATHS = ("auto", "reference", "cpp", "triton", "cuda")
MAX_QUERIES = 16
"""Queries of a row that the CPU kernels take. With more, unpacking is little of the work, and the rest is matrix
products, which torch does as well."""


class Choice(NamedTuple):
    path: str
    why: str
    possible: bool = True

    @property
    def triton(self) -> bool:
        """Whether Triton runs, whatever runs beside it."""
        return self.path in ("triton", "cuda")

    @property
    def asked(self) -> bool:
        """Whether the environment variable says so, and not what this machine has."""
        return self.why.startswith("FIVEFOLD_KERNELS=")


_planned: ContextVar[Choice | None] = ContextVar("planned", default=None)


@contextmanager
def planned(choice: Choice) -> Iterator[None]:
    """Within it, the meta device stands for one of which this is the path: a cache that is planned, not made."""
    token = _planned.set(choice)
    try:
        yield
    finally:
        _planned.reset(token)


def choose(device: torch.device) -> Choice:
    """The path for tensors on a device, and why. `possible` is False where what was asked for cannot be had."""
    if device.type == "meta" and (choice := _planned.get()) is not None:
        return choice
    return _choose(os.environ.get("FIVEFOLD_KERNELS", "auto"), numbered(torch.device(device)))


def possible(device: torch.device) -> Choice:
    """The same. Raises `CacheStateError` where what was asked for cannot be had."""
    choice = choose(device)
    if not choice.possible:
        raise CacheStateError(
            f"the kernels that were asked for cannot run: {choice.why}; set FIVEFOLD_KERNELS=auto, or unset it."
        )
    return choice


def check_asked(device: torch.device) -> None:
    """Raise `CacheStateError` for a model on this device if what was asked for cannot be had there, nor on another
    device of this machine, to which it may yet be moved."""
    others = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    if not any(choose(one).possible for one in (device, *others)):
        possible(device)


@cache
def loaded(name: str) -> Any:
    """A module of kernels that needs Triton, as `merge.triton`: imported where it is first used."""
    return importlib.import_module(f"fivefold.kernels.{name}")


def runs_cpp(device: torch.device) -> bool:
    """Whether kernels in C++ run there."""
    return choose(device).path == "cpp"


def takes_cpp(queries: torch.Tensor) -> bool:
    """Whether the CPU kernels serve queries (or weights of queries) `[rows, query, ...]`."""
    return queries.shape[1] <= MAX_QUERIES and runs_cpp(queries.device)


@cache
def _choose(asked: str, device: torch.device) -> Choice:
    if asked not in PATHS:
        return Choice("reference", f"FIVEFOLD_KERNELS={asked} is none of {', '.join(PATHS)}", False)
    if asked == "reference":
        return Choice("reference", "FIVEFOLD_KERNELS=reference")
    if asked == "cpp" or (asked == "auto" and device.type == "cpu"):
        if device.type != "cpu":
            return Choice("reference", f"C++ kernels are written for CPUs, and the cache is on {device.type}", False)
        lacking = compiled.lacking()
        if lacking is not None:
            return Choice("reference", lacking, asked == "auto")
        return Choice("cpp", "FIVEFOLD_KERNELS=cpp" if asked == "cpp" else f"a CPU with {compiled.compiler()}")
    lacking = _lacking(device)
    if lacking is not None:
        return Choice("reference", lacking, asked == "auto")
    if asked == "triton":
        return Choice("triton", "FIVEFOLD_KERNELS=triton")
    lacking = _lacks_compiler(device)
    if lacking is not None:
        return Choice("triton", f"Triton is there, but {lacking}", asked == "auto")
    return Choice(
        "cuda", "FIVEFOLD_KERNELS=cuda" if asked == "cuda" else "a GPU with Triton and a compiler of CUDA C++"
    )


def _lacks_compiler(device: torch.device) -> str | None:
    """Why CUDA C++ cannot be compiled for a device (torch's CUDA wheels bring what it takes); None if it can."""
    try:
        from cuda.bindings import driver, nvrtc

        error, archs = nvrtc.nvrtcGetSupportedArchs()
        there = not int(error) and hasattr(driver, "cuLaunchKernel")
    except (ImportError, RuntimeError):  # no such package, or no such library
        there = False
    if not there:
        return "not cuda-bindings, which compiles CUDA C++"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor not in archs:
        return f"the CUDA compiler (NVRTC) knows no compute capability {major}.{minor}"
    return None


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
