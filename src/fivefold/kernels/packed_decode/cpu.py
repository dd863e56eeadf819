"""One decoding step over packed and exact pages on a CPU: `decode.cpp`, compiled for the shapes it is used with.

Its names are those of `triton.py`, so that either can be had for the other. Pages lie where the tables' addresses say,
sums are float32 whatever pages hold, and threads are torch's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.compiled import library
from fivefold.kernels.packed_decode.reader import Reader
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import PICKS, SPAN, TILE, Exact, Packed, lacks, pages_of, starts_of

__all__ = [
    "LIMIT",
    "PICKS",
    "SPAN",
    "TILE",
    "Exact",
    "Packed",
    "append",
    "decode",
    "pages_of",
    "programs_for",
    "starts_of",
    "supports",
]

LIMIT = float("inf")
"""Keys and values up to this absolute value can be attended on packed."""

_SOURCE, _APPEND = (Path(__file__).with_name(name) for name in ("decode.cpp", "append.cpp"))
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def supports(form: Reader | None, heads: int, head_dim: int) -> str | None:
    """Why these shapes cannot be attended on, in a few words; None if they can."""
    if not isinstance(form, Form | None):
        return "no C++ kernel reads this codec's pages at once"
    if head_dim not in range(8, 257, 8):
        return f"head_dim {head_dim} is not a multiple of 8 up to 256"
    return lacks(form, heads)


def programs_for(rows: int, device: torch.device, form: Reader | None = None, heads: int = 1) -> tuple[int, int]:
    """As many as `starts_of` takes; the kernel shares out its work by itself."""
    return max(1, rows), max(1, rows)


def append(keys: torch.Tensor, values: torch.Tensor, spans: torch.Tensor, exact: Exact) -> None:
    """Write the newest token of each row, contiguous `[rows, head_dim]` in the pages' dtype, into the last exact slot
    that `spans` says there is."""
    table = exact.table
    _append()(
        keys.data_ptr(), values.data_ptr(), table.data_ptr(), table.shape[1], spans.data_ptr(), spans.shape[1],
        len(keys), keys.shape[1] * keys.element_size(),
    )  # fmt: skip


def decode(
    queries: torch.Tensor,
    scaling: float,
    spans: torch.Tensor,
    packed: Packed | None = None,
    exact: Exact | None = None,
    with_lse: bool = False,
    asm: bool | None = None,
    starts: torch.Tensor | None = None,
    programs: tuple[int, int] | None = None,
    picks: torch.Tensor | None = None,
    scores: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of one query per row and head over packed and exact pages: see `decode_reference`.

    queries: contiguous `[rows, query_heads, head_dim]`, float16, bfloat16 or float32; spans: int32 `[rows, SPAN]`.
    picks: int32 `[rows, n]`, the packed slots that are attended on if there are packed pages, else the exact ones;
    negative ones are none. scores: float32 `[rows, query_heads, tokens]`, which gets those of all tokens that are seen,
    packed ones first; not beside picks. All tensors are contiguous. `asm`, `starts` and `programs` are what Triton's
    kernels take. Returns the output in the dtype of the queries and, if asked for, the natural log-sum-exp, float32.
    """
    rows, heads, dim = queries.shape
    form, packed_at, packed_columns, exact_at, exact_columns, picks_at, count = None, None, 0, None, 0, None, 0
    dtype = torch.float32
    if packed is not None:
        assert isinstance(packed.form, Form)
        form, table = packed.form, packed.table
        packed_at, packed_columns = table.data_ptr(), table.shape[1]
    if exact is not None:
        dtype, table = exact.dtype, exact.table
        exact_at, exact_columns = table.data_ptr(), table.shape[1]
    if picks is not None:
        picks_at, count = picks.data_ptr(), picks.shape[1]
    out = torch.empty_like(queries)
    lse = torch.empty((rows, heads), dtype=torch.float32) if with_lse else None
    _decode(form, dtype, heads, dim)(
        queries.data_ptr(), _TYPES[queries.dtype], scaling, spans.data_ptr(), spans.shape[1],
        packed_at, packed_columns, exact_at, exact_columns, picks_at, count,
        out.data_ptr(), None if lse is None else lse.data_ptr(),
        None if scores is None else scores.data_ptr(), 0 if scores is None else scores.shape[2],
        rows, torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


@cache
def _decode(form: Form | None, dtype: torch.dtype, heads: int, head_dim: int) -> Any:
    """The kernel of these shapes. dtype: of exact pages."""
    numbers = {"D": head_dim, "QUERIES": heads, "EXACT": _TYPES[dtype], "BITS": 0}
    if form is not None:
        numbers |= {"BITS": form.bits, "GROUP": form.group, "CHANNELS": form.channels}
    kernel = library(_SOURCE, **numbers).decode
    at, number = ctypes.c_void_p, ctypes.c_int
    kernel.argtypes = (
        at, number, ctypes.c_float, at, number, at, number, at, number, at, number, at, at, at, ctypes.c_int64, number,
        number,
    )  # fmt: skip
    kernel.restype = None
    return kernel


@cache
def _append() -> Any:
    kernel = library(_APPEND).append
    at, number = ctypes.c_void_p, ctypes.c_int
    kernel.argtypes = at, at, at, number, at, number, number, number
    kernel.restype = None
    return kernel
