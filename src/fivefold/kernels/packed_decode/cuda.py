"""The packed pages of a decoding step in CUDA C++ (`packed.cu`), compiled at run time by NVRTC.

Triton moves each operand through shared memory and waits there; this kernel loads words straight into the operands of
the tensor cores, and its copies run ahead of it. It does what `triton._packed` does, for heads of 64 or 128 numbers and
up to 8 query heads a KV head; the rest, and what is not packed, is left to Triton.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.device import numbered, on
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import Exact, Packed

SOURCE = Path(__file__).with_name("packed.cu")
PAIRS = 4
"""Pairs of warps on a processor, at most, each at pages of its own. More are no faster, and there are registers for
four."""
UNITS = 3
"""Sides of pages (keys or values) in shared memory: one that is read, the others on their way."""
HEAD_DIMS = (64, 128)
SHARED = 228 << 10
"""Bytes of shared memory of an H100's processor."""
_QUERIES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_EXACT = {None: 0, torch.float16: 1, torch.bfloat16: 2}
"""Of the exact pages that it attends over too."""


def supports(form: Form, heads: int) -> bool:
    """Whether there is a kernel for these pages and that many query heads a KV head."""
    return form.head_dim in HEAD_DIMS and heads <= 8


def joins(dtype: torch.dtype | None) -> bool:
    """Whether it attends over exact pages of this dtype too."""
    return dtype is not None and dtype in _EXACT


@dataclass(frozen=True)
class Kernel:
    """The kernel for one form of packed pages and dtypes of queries and exact pages, loaded on a device.

    shared: bytes of shared memory a program takes; pairs: of warps.
    """

    function: Any
    shared: int
    pairs: int

    def __call__(
        self, programs: int, queries: torch.Tensor, packed: Packed, exact: Exact | None, spans: torch.Tensor,
        starts: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float,
    ) -> None:  # fmt: skip
        """Leave the parts of `programs` programs in out `[programs, heads, head_dim]` and lse `[programs, heads]`."""
        from cuda.bindings import driver

        rows, heads = queries.shape[:2]
        table, base = packed.table, packed.base
        slots, exact_base = (table, base) if exact is None else (exact.table, exact.base)
        pointers = [x.data_ptr() for x in (queries, table, slots, spans, starts, out, lse)]
        types = (*[ctypes.c_void_p] * 7, ctypes.c_float, *[ctypes.c_int] * 4, *[ctypes.c_longlong] * 2)
        values = (*pointers, scale, rows, table.shape[1], slots.shape[1], heads, base, exact_base)
        stream = torch.cuda.current_stream(queries.device).cuda_stream
        grid, block = (programs, 1, 1), (64 * self.pairs, 1, 1)
        with on(queries.device):
            _done(driver.cuLaunchKernel(self.function, *grid, *block, self.shared, stream, (values, types), 0))


def shared_bytes(form: Form, pairs: int) -> int:
    """Of a program of so many pairs of warps: sides of pages, each with room for the larger of the two."""
    dim = form.head_dim
    scales = max(form.tokens // form.group * dim, form.tokens * (dim // form.channels))
    return pairs * UNITS * (64 * dim + 4 * scales)


def arrangement(form: Form, there: int = SHARED) -> tuple[int, int]:
    """Pairs of warps of a program, and programs on a processor with `there` bytes of shared memory: as many pairs as
    fit, in few programs, because each leaves a part to be merged. (The driver keeps 1 KiB of each for itself.)"""
    fit = [(pairs, min(PAIRS // pairs, there // (shared_bytes(form, pairs) + 1024))) for pairs in (2, 1)]
    return max(fit, key=lambda x: x[0] * x[1])


def resident(form: Form, device: torch.device) -> int:
    """Programs that fit on a processor at a time."""
    return _arrangement(form, numbered(device))[1]


@cache
def _arrangement(form: Form, device: torch.device) -> tuple[int, int]:
    return arrangement(form, torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


def definitions(
    form: Form, dtype: torch.dtype, exact: torch.dtype | None, span: int, pairs: int, resident: int
) -> dict[str, int]:
    """What `packed.cu` is compiled with. exact: of exact pages, None to leave them out; span: columns of a table of
    spans."""
    return {
        "BITS": form.bits, "GROUP": form.group, "CHANNELS": form.channels, "D": form.head_dim, "UNITS": UNITS,
        "PAIRS": pairs, "QUERIES": _QUERIES[dtype], "EXACT": _EXACT[exact], "SPAN": span, "RESIDENT": resident,
    }  # fmt: skip


@cache
def compiled(
    form: Form,
    dtype: torch.dtype,
    exact: torch.dtype | None,
    capability: tuple[int, int],
    span: int,
    pairs: int,
    resident: int,
) -> bytes:
    """The machine code for one form of pages.

    Raises RuntimeError with the compiler's words if it cannot be compiled.
    """
    from cuda.bindings import nvrtc

    major, minor = capability
    options = [f"--gpu-architecture=sm_{major}{minor}", "--std=c++17"]
    options += [f"-D{name}={value}" for name, value in definitions(form, dtype, exact, span, pairs, resident).items()]
    program = _done(nvrtc.nvrtcCreateProgram(SOURCE.read_bytes(), b"packed.cu", 0, [], []))
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
        _done(nvrtc.nvrtcGetProgramLog(program, log))
        raise RuntimeError(f"packed.cu does not compile here (FIVEFOLD_KERNELS=triton does without it): {log.decode()}")
    code = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
    _done(nvrtc.nvrtcGetCUBIN(program, code))
    _done(nvrtc.nvrtcDestroyProgram(program))
    return code


def kernel(form: Form, dtype: torch.dtype, exact: torch.dtype | None, device: torch.device, span: int) -> Kernel:
    """The kernel for packed pages, dtypes of queries and exact pages (None: without them), and a device, on which it is
    compiled and loaded once."""
    return _kernel(form, dtype, exact, numbered(device), span)


@cache
def _kernel(form: Form, dtype: torch.dtype, exact: torch.dtype | None, device: torch.device, span: int) -> Kernel:
    from cuda.bindings import driver

    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context
        pairs, resident = _arrangement(form, device)
        code = compiled(form, dtype, exact, torch.cuda.get_device_capability(device), span, pairs, resident)
        module = _done(driver.cuModuleLoadData(code))
        function = _done(driver.cuModuleGetFunction(module, b"packed"))
        shared = shared_bytes(form, pairs)
        attributes = driver.CUfunction_attribute
        _done(driver.cuFuncSetAttribute(function, attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared))
    return Kernel(function, shared, pairs)


def _done(returned: tuple) -> Any:
    """What a call returned beside its error."""
    error, *rest = returned
    if int(error):
        raise RuntimeError(f"CUDA: {error!r}")
    return rest[0] if rest else None
