"""The packed pages of a decoding step in CUDA C++ (`packed.cu`), compiled at run time by NVRTC.

Triton moves each operand through shared memory and waits there; this kernel loads words straight into the operands of
the tensor cores, and its copies run ahead of it. It does what `triton._packed` does, and what `planar_decode` does for
most of its pages, for heads of 64 or 128 numbers and up to 8 query heads a KV head; the rest, and what is not packed,
is left to Triton.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.device import numbered
from fivefold.kernels.nvrtc import function_of, launch, machine_code
from fivefold.kernels.packed_decode.reader import Packed, Reader
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import Exact
from fivefold.kernels.planar import PLANES
from fivefold.kernels.planar_decode.reference import Planar

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


def supports(form: Reader, heads: int) -> bool:
    """Whether there is a kernel for these pages and that many query heads a KV head."""
    if heads > 8 or not isinstance(form, Form | Planar) or form.head_dim not in HEAD_DIMS:
        return False
    if isinstance(form, Form):
        return True
    alike = form.key_bits == form.value_bits and PLANES.get(form.key_bits) == form.planes
    by_token = not form.group and form.channels >= 32 and form.head_dim // form.channels <= 4
    added = form.rank or form.key_outliers or form.value_outliers
    fits = form.rank in (0, 2, 4, 8) and not form.key_outliers % 2 and not form.value_outliers % 2
    kinds = (by_token and not added) or (form.group > 0 and not form.unbias and form.record)
    return alike and kinds and fits and shared_bytes(form, 1, heads) < SHARED


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
        starts: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, scale: float, found: torch.Tensor | None = None,
        scored: torch.Tensor | None = None, begins: torch.Tensor | None = None, once: int = 0, early: bool = False,
    ) -> None:  # fmt: skip
        """Leave the parts of `programs` programs in out `[parts, heads, head_dim]` and lse `[parts, heads]`;
        found, scored: scores of packed and exact slots, see `triton.decode`. begins, once: of rows that `once` programs
        may take in turn (`schedule.in_turn`). early: it may read packed pages before the kernel in front of it is
        done."""
        rows, heads = queries.shape[:2]
        table, base = packed.table, packed.base
        slots, exact_base = (table, base) if exact is None else (exact.table, exact.base)
        learned = packed.learned[0] if packed.learned else lse
        found, scored, begins = (lse if x is None else x for x in (found, scored, begins))
        tensors = queries, table, slots, spans, starts, begins, out, lse, learned, found, scored
        pointers = [x.data_ptr() for x in tensors]
        types = (*[ctypes.c_void_p] * 11, ctypes.c_float, *[ctypes.c_int] * 7, *[ctypes.c_longlong] * 2)
        sizes = rows, once, table.shape[1], slots.shape[1], heads, found.shape[-1], scored.shape[-1]
        values = (*pointers, scale, *sizes, base, exact_base)
        launch(self.function, programs, 64 * self.pairs, self.shared, queries.device, values, types, early)


def _shape(form: Reader, heads: int) -> dict[str, int]:
    """What `packed.cu` must know of a form of pages."""
    if isinstance(form, Form):
        named = {"BITS": form.bits, "GROUP": form.group, "CHANNELS": form.channels, "D": form.head_dim, "RECORD": 1}
        more = ("BY_TOKEN", "UNBIAS", "BALANCED", "RANK", "KEY_OUT", "VALUE_OUT", "ROOM")
        return {**named, **dict.fromkeys(more, 0), "HEADS": 2}
    assert isinstance(form, Planar)
    return {
        "BITS": form.key_bits, "GROUP": form.group or form.tokens, "CHANNELS": form.channels, "D": form.head_dim,
        "RECORD": int(form.record), "BY_TOKEN": int(not form.group), "UNBIAS": int(form.unbias),
        "BALANCED": int(form.balanced), "RANK": form.rank, "KEY_OUT": form.key_outliers,
        "VALUE_OUT": form.value_outliers, "ROOM": 2, "HEADS": heads + heads % 2,
    }  # fmt: skip


def shared_bytes(form: Reader, pairs: int, heads: int = 8) -> int:
    """Of a program of so many pairs of warps: sides of pages, each with room for the larger of the two, and sums of
    what outliers add to up to `heads` query heads."""
    shape, tokens = _shape(form, heads), form.tokens
    dim, scales = form.head_dim, 4 * tokens * (form.head_dim // shape["CHANNELS"])
    key_scales = scales if shape["BY_TOKEN"] else 4 * tokens // shape["GROUP"] * dim
    factors, key_outliers, value_outliers = 2 * shape["RANK"] * (tokens + dim), shape["KEY_OUT"], shape["VALUE_OUT"]
    side = 64 * dim + factors + max(key_scales + 3 * key_outliers * dim, scales + 3 * value_outliers * tokens)
    sums = (tokens + 2 if key_outliers else 0) + (2 * (dim + 4) if value_outliers else 0)
    return pairs * (UNITS * side + 4 * shape["HEADS"] * sums)


def arrangement(form: Reader, there: int = SHARED, heads: int = 8) -> tuple[int, int]:
    """Pairs of warps of a program, and programs on a processor with `there` bytes of shared memory: as many pairs as
    fit, in few programs, because each leaves a part to be merged. (The driver keeps 1 KiB of each for itself.)"""
    fit = [(pairs, min(PAIRS // pairs, there // (shared_bytes(form, pairs, heads) + 1024))) for pairs in (2, 1)]
    return max(fit, key=lambda x: x[0] * x[1])


def resident(form: Reader, device: torch.device, heads: int = 8) -> int:
    """Programs that fit on a processor at a time."""
    return _arrangement(form, numbered(device), heads)[1]


@cache
def _arrangement(form: Reader, device: torch.device, heads: int) -> tuple[int, int]:
    there = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return arrangement(form, there, heads)


def definitions(
    form: Reader, dtype: torch.dtype, exact: torch.dtype | None, span: int, pairs: int, resident: int,
    heads: int = 8, found: bool = False, scored: bool = False,
) -> dict[str, int]:  # fmt: skip
    """What `packed.cu` is compiled with. exact: of exact pages, None to leave them out; span: columns of a table of
    spans; found, scored: with scores of the packed slots, and of the exact ones."""
    return {
        **_shape(form, heads), "UNITS": UNITS, "PAIRS": pairs, "QUERIES": _QUERIES[dtype], "EXACT": _EXACT[exact],
        "SPAN": span, "RESIDENT": resident, "FOUND": int(found), "SCORED": int(scored),
    }  # fmt: skip


@cache
def compiled(
    form: Reader, dtype: torch.dtype, exact: torch.dtype | None, capability: tuple[int, int], span: int, pairs: int,
    resident: int, heads: int = 8, found: bool = False, scored: bool = False,
) -> bytes:  # fmt: skip
    """The machine code for one form of pages."""
    values = definitions(form, dtype, exact, span, pairs, resident, heads, found, scored)
    return machine_code(SOURCE, values, capability)


def kernel(
    form: Reader, dtype: torch.dtype, exact: torch.dtype | None, device: torch.device, span: int, heads: int = 8,
    found: bool = False, scored: bool = False,
) -> Kernel:  # fmt: skip
    """The kernel for packed pages, dtypes of queries and exact pages (None: without them), and a device, on which it is
    compiled and loaded once. heads: of a KV head; found, scored: with scores of packed slots, of exact
    ones."""
    heads = 8 if isinstance(form, Form) else heads
    return _kernel(form, dtype, exact, numbered(device), span, heads, found, scored)


@cache
def _kernel(
    form: Reader, dtype: torch.dtype, exact: torch.dtype | None, device: torch.device, span: int, heads: int,
    found: bool, scored: bool,
) -> Kernel:  # fmt: skip
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context
        pairs, resident = _arrangement(form, device, heads)
        capability = torch.cuda.get_device_capability(device)
        code = compiled(form, dtype, exact, capability, span, pairs, resident, heads, found, scored)
        shared = shared_bytes(form, pairs, heads)
        function = function_of(code, "packed", shared)
    return Kernel(function, shared, pairs)
