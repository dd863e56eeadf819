"""Pages of rotated keys and values in CUDA C++ (`rotated.cu`): what `triton.py` does, where heads are few enough.

Per plane of a page, Triton takes every tile through shared memory once for each of the products it is part of, and a
thread loads the scales of channels that stand anywhere. Here a thread takes channels in the order that they were sorted
in, and what one product leaves in registers is the operand of the next one.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.device import numbered
from fivefold.kernels.packed_decode import cuda
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN
from fivefold.kernels.rotated_decode.reference import Rotated

SOURCE = Path(__file__).with_name("rotated.cu")
PAIRS, UNITS = 2, 3
"""Of `values`: pairs of warps of a program, and pages in shared memory for each."""
MOST = 227 << 10
"""Bytes of shared memory of a program on an H100, at most."""


@dataclass(frozen=True)
class Shape:
    """What the source is compiled for."""

    bits: int
    channels: int
    head_dim: int
    kv_heads: int
    team: int
    sinks: int
    neighbours: bool
    heads: int
    dtype: torch.dtype

    @classmethod
    def of(cls, form: Rotated, heads: int, dtype: torch.dtype) -> Shape:
        of = form.bits, form.channels, form.head_dim, form.kv_heads, form.team, form.sinks, form.neighbours
        return cls(*of, heads, dtype)

    @property
    def each(self) -> int:
        """Columns for the query heads of a row."""
        return 1 << (self.heads - 1).bit_length()

    def lacks(self) -> str | None:
        """Why there is no kernel for it, in a few words; None if there is one."""
        if self.head_dim not in (64, 128) or self.channels < 32 or self.head_dim % self.channels:
            return f"heads of {self.head_dim} channels in groups of {self.channels}"
        if self.team & (self.team - 1) or self.each * self.team > 16:
            return f"{self.team} heads of {self.heads} queries"
        if self.kv_heads * self.head_dim > 1 << 15 or self.kv_heads > 32 * self.team:
            return f"{self.kv_heads} kv heads"
        if self.shared[0] > MOST:
            return f"{self.shared[0]} bytes of shared memory"
        return None

    @property
    def shared(self) -> tuple[int, int]:
        """Bytes of shared memory of a program of `scores` and of `values`, as in the source."""
        dim, n, groups = self.head_dim, self.team * self.head_dim, self.head_dim // self.channels
        columns, tiles = max(8, self.each * self.team), dim // 8
        tokens = 32 * {2: 8, 3: 5, 4: 4}[self.bits]
        scores = n * 80 + n * 64 + 2 * self.kv_heads * groups * 128
        scores += (32 + columns) * 4 * (tiles // 4 + 1) * 16 + 4 * self.team * columns * 36 + 4 * n + 48 * self.kv_heads
        scores += 8 * columns + 16 + 8 * self.team * max(1, self.sinks)
        unit = 64 * dim + 4 * tokens * groups + self.each * (4 * tokens + 64)
        return scores, PAIRS * UNITS * unit + 16 + 8 * 32

    def definitions(self, scores: bool) -> dict[str, int]:
        return {
            "SCORES": int(scores), "PAIRS": self.team if scores else PAIRS, "UNITS": UNITS, "BITS": self.bits,
            "CHANNELS": self.channels, "D": self.head_dim, "KV_HEADS": self.kv_heads, "TEAM": self.team,
            "SINKS": self.sinks, "NEIGHBOURS": int(self.neighbours), "EACH": self.each,
            "QUERIES": cuda.QUERIES[self.dtype], "SPAN": SPAN, "FIELDS": 7 if self.sinks else 6, "EXACT": 0,
            "RESIDENT": 2 if self.shared[not scores] + 1024 <= 114 << 10 else 1,
        }  # fmt: skip


def supports(form: Rotated, heads: int, dtype: torch.dtype) -> bool:
    """Whether there are kernels for these pages and that many query heads a KV head."""
    return dtype in cuda.QUERIES and form.split and Shape.of(form, heads, dtype).lacks() is None


@cache
def _functions(shape: Shape, device: torch.device) -> tuple[Any, Any]:
    capability = torch.cuda.get_device_capability(device)
    codes = [cuda.compiled_source(SOURCE, shape.definitions(scores), capability) for scores in (True, False)]
    scores, values = (
        cuda.loaded(code, name, shared, device)
        for code, name, shared in zip(codes, (b"scores", b"values"), shape.shared)
    )
    return scores, values


def attend(
    form: Rotated,
    packed: Packed,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor,
) -> None:
    """See `Reader.attend`."""
    rows, heads, _ = queries.shape
    columns, (places,), (turns, small, _, _) = packed.table.shape[1], form.constants, form.tables
    keys, values = packed.learned if form.sinks else (queries, queries)
    shape, device = Shape.of(form, heads, queries.dtype), queries.device
    first, second = _functions(shape, numbered(device))
    ints = [(x, ctypes.c_int) for x in (rows, columns, heads)]
    sizes = *ints, (columns * form.tokens, ctypes.c_longlong)
    given = [(x, None) for x in (queries, packed.table, spans, starts, places, turns, small, keys, scores)]
    cuda.launch(
        first, (len(out), 1), 64 * form.team, shape.shared[0], device, *given, (scale, ctypes.c_float), *sizes
    )  # fmt: skip
    given = [(x, None) for x in (scores, packed.table, spans, starts, values, out, lse)]
    cuda.launch(second, (len(out), form.team), 64 * PAIRS, shape.shared[1], device, *given, *sizes)
