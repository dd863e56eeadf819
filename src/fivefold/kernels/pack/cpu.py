"""Tokens into planar KIVI pages on a CPU: `pack.cpp`, compiled for the shapes it is used with.

Its names are those of `triton.py`, so that either can be had for the other; threads are torch's.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.compiled import library
from fivefold.kernels.pack.reference import fields_of
from fivefold.kernels.packed_decode.reference import Form

_SOURCE = Path(__file__).with_name("pack.cpp")
_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def supports(form: Form, dtype: torch.dtype) -> bool:
    """Whether tokens of a dtype can be packed into such pages."""
    whole = form.group % 32 == 0 and form.tokens % form.group == 0
    return whole and form.head_dim % form.channels == 0 and form.channels % 8 == 0 and dtype in _TYPES


def pack_pages(
    form: Form, keys: torch.Tensor, values: torch.Tensor, slot: int, opened: tuple[torch.Tensor, ...] | None
) -> tuple[torch.Tensor, ...]:
    """`pack_reference` in one go; the fields are views of one record per page."""
    pages, tokens, _ = keys.shape
    records = torch.empty((pages, form.nbytes // 2), dtype=torch.int16)
    fields = fields_of(form, records)
    if opened is not None:
        for field, old in zip(fields, opened):
            field.copy_(old)
    elif slot:
        records.zero_()
    keys, values = keys.contiguous(), values.contiguous()
    _kernel(form, keys.dtype)(
        None, None, keys.data_ptr(), values.data_ptr(), records.data_ptr(), slot // 32, pages, tokens // 32,
        torch.get_num_threads(),
    )  # fmt: skip
    return fields


def pack_exact(form: Form, sources: torch.Tensor, places: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Pack exact pages as they lie into pages as they lie.

    sources: contiguous int64 `[pages, planes, 2]`, addresses of the exact pages' keys and values, in units of 16 bytes;
    places: contiguous int64 `[pages, 2]`, address of the packed page and the plane from which on it is filled. Returns
    the largest absolute value that was packed, infinity for NaN, once for each page: float32 `[pages]`. Where that is
    beyond float16, new planes say nothing; older ones are what they were.
    """
    pages, planes, _ = sources.shape
    peak = _kernel(form, dtype)(
        sources.data_ptr(), places.data_ptr(), None, None, None, 0, pages, planes, torch.get_num_threads()
    )
    return torch.tensor([peak], dtype=torch.float32).expand(pages)


@cache
def _kernel(form: Form, dtype: torch.dtype) -> Any:
    kernel = library(
        _SOURCE, strict=True, D=form.head_dim, BITS=form.bits, GROUP=form.group, CHANNELS=form.channels,
        EXACT=_TYPES[dtype],
    ).pack  # fmt: skip
    at, number = ctypes.c_void_p, ctypes.c_int
    kernel.argtypes = at, at, at, at, at, number, number, number, number
    kernel.restype = ctypes.c_float
    return kernel
