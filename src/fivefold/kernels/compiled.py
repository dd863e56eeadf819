"""How the CPU kernels, which are C++, are compiled and called.

A source is compiled for the very numbers (bits, head_dim, queries a head ...) that it is used with, and for this
machine's processor, when it is first called with them; that takes half a second. Libraries are kept in the user's
cache folder. They run on torch's OpenMP threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from fivefold.errors import CompileError
from fivefold.paths import cache_dir

# Not -ffast-math: linked into a library it would change how the whole process treats subnormal numbers.
_OPTIONS = (
    "-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math",
    "-fno-signed-zeros", "-fassociative-math", "-ffp-contract=fast", "-Wl,--as-needed",
)  # fmt: skip
# Where bits must be those of the reference; behind the others, which they take back.
_STRICT = ("-ffp-contract=off", "-fno-associative-math", "-fsigned-zeros")
_HERE = Path(__file__).parent
_PROBE = _HERE / "probe.cpp"


class Field(ctypes.Structure):
    """A page field `[rows, pages, *shape]` of 16-bit numbers, as `cpu.h` has it."""

    _fields_ = (("at", ctypes.c_void_p), ("row", ctypes.c_int64), ("page", ctypes.c_int64))

    @classmethod
    def of(cls, x: torch.Tensor) -> Field:
        if not x[0, 0].is_contiguous():
            x = x.contiguous()
        field = cls(x.data_ptr(), *x.stride()[:2])
        field.memory = x  # a copy would have no other owner
        return field


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    """Where the numbers of a tensor are."""
    return ctypes.c_void_p(x.data_ptr())


@cache
def lacking() -> str | None:
    """Why C++ cannot be compiled and called here; None if it can."""
    if compiler() is None:
        return "there is no C++ compiler: install g++ or clang++ to have kernels on a CPU"
    try:
        library(_PROBE).threads()
    except CompileError as error:
        return str(error)
    return None


@cache
def compiler() -> str | None:
    """$CXX, g++ or clang++, whichever is there first."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++"))), None)


@cache
def library(source: Path, *, strict: bool = False, **numbers: int) -> ctypes.CDLL:
    """The library of a C++ source with macros for `numbers`; compiled if it is not in the cache folder.

    strict: do arithmetic in the order in which it is written, every operation rounded by itself.
    Raises `CompileError` with the compiler's words.
    """
    # torch's own OpenMP: a second one would have threads of its own, which wait for work on the same cores.
    openmp = sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))
    definitions = [f"-D{name}={value}" for name, value in sorted(numbers.items())]
    options = [*_OPTIONS, *(_STRICT if strict else ()), *definitions]
    try:
        return ctypes.CDLL(str(built(source, options, sorted(_HERE.glob("*.h")), openmp)))
    except OSError as error:
        raise CompileError(
            f"{source.name} cannot be compiled or loaded in {cache_dir() / 'kernels'} ({error}): set FIVEFOLD_CACHE to "
            "a folder that can be written to."
        ) from error


def built(source: Path, options: Sequence[str], headers: Sequence[Path], linked: Sequence[Path] = ()) -> Path:
    """The library that the compiler makes of a C++ source, in the cache folder; made if it is not there.

    headers: what the source includes, from their folders. linked: libraries it is linked with. A library is known by
    what is in its sources and by the names of what it is linked with, wherever they are: a second environment compiles
    nothing anew.
    Raises `CompileError` with the compiler's words, or OSError.
    """
    texts = [path.read_bytes() for path in (source, *headers)]
    names = [path.name for path in (source, *linked)]
    key = hashlib.sha256(repr((compiler(), *options, names, _machine(), texts)).encode()).hexdigest()
    folder = cache_dir() / "kernels"
    target = folder / f"{source.stem}-{key[:24]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work:
            made = Path(work) / target.name
            folders = dict.fromkeys(f"-I{path.parent}" for path in headers)
            command = [str(compiler()), *options, *folders, str(source), *map(str, linked), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CompileError(
                    f"{source.name} does not compile here (FIVEFOLD_KERNELS=reference does without it): "
                    f"{done.stderr.strip()[-2000:]}"
                )
            made.replace(target)
    return target


@cache
def _machine() -> str:
    """What machine code is made for and by: the processor, and the compiler's version."""
    lines = []
    with contextlib.suppress(OSError):
        names = ("model name", "flags", "CPU part", "Features")
        lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(names)]
    version = subprocess.run([str(compiler()), "--version"], capture_output=True, text=True).stdout
    return "\n".join([*sorted(set(lines)), version])
