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

from fivefold.kernels.device import numbered, overlaps, processors
from fivefold.kernels.nvrtc import launch, loaded
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN
from fivefold.kernels.planar import PLANES
from fivefold.kernels.rotated_decode.reference import Rotated, values_at_once

SOURCE = Path(__file__).with_name("rotated.cu")
PAIRS, UNITS = 2, 2
"""Of `values`: pairs of warps of a program, and pages in shared memory for each."""
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MOST, SHARED = 227 << 10, 228 << 10
"""Bytes of shared memory of a program on an H100, at most, and of its processor."""
RESIDENT = 2
"""Programs of `scores` that are to fit on a processor at a time; of `values`: see `values_at_once`."""


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
        if self.team & (self.team - 1) or self.heads > 8 or self.each * self.team > 32:
            return f"{self.team} heads of {self.heads} queries"
        if self.kv_heads * self.head_dim > 1 << 15 or self.kv_heads > 32 * self.team:
            return f"{self.kv_heads} kv heads"
        if self.shared[0] > MOST:
            return f"{self.shared[0]} bytes of shared memory"
        return None

    @property
    def _unit(self) -> int:
        """Bytes of a page and its scores in shared memory."""
        tokens = 32 * PLANES[self.bits]
        return 64 * self.head_dim + 4 * tokens * (self.head_dim // self.channels) + self.each * (4 * tokens + 64)

    @property
    def shared(self) -> tuple[int, int]:
        """Bytes of shared memory of a program of `scores` and of `values`, as in the source."""
        dim, n, groups = self.head_dim, self.team * self.head_dim, self.head_dim // self.channels
        columns, tiles = max(8, self.each * self.team), dim // 8
        scores = n * 128 + 3 * self.kv_heads * groups * 128
        line = 4 * (tiles // 4 + 1) * 16
        scores += columns * line + max(32 * line, 144 * self.team * columns) + 4 * n + 48 * self.kv_heads
        scores += 8 * columns + 16 + 8 * self.team * max(1, self.sinks)
        return scores, PAIRS * UNITS * self._unit + 16 + 8 * 32

    def definitions(self, scores: bool) -> dict[str, int]:
        resident = min(RESIDENT if scores else values_at_once(self.bits), SHARED // (self.shared[not scores] + 1024))
        return {
            "SCORES": int(scores), "PAIRS": self.team if scores else PAIRS, "UNITS": UNITS, "BITS": self.bits,
            "CHANNELS": self.channels, "D": self.head_dim, "KV_HEADS": self.kv_heads, "TEAM": self.team,
            "SINKS": self.sinks, "NEIGHBOURS": int(self.neighbours), "EACH": self.each,
            "QUERIES": _DTYPES[self.dtype], "SPAN": SPAN, "FIELDS": 7 if self.sinks else 6, "EXACT": 0,
            "RESIDENT": max(1, resident),
        }  # fmt: skip


def supports(form: Rotated, heads: int, dtype: torch.dtype) -> bool:
    """Whether there are kernels for these pages and that many query heads a KV head."""
    return dtype in _DTYPES and form.split and Shape.of(form, heads, dtype).lacks() is None


@dataclass(frozen=True)
class Kernel:
    """A function that is loaded on a device: threads of a program, and bytes of shared memory it takes."""

    function: Any
    threads: int
    shared: int

    def __call__(
        self, programs: int, device: torch.device, *arguments: tuple[Any, Any], early: bool = False
    ) -> None:  # fmt: skip
        """arguments: values and their ctypes, None for a tensor. early: it may begin before the kernel in front of it
        is done."""
        values = tuple(x.data_ptr() if kind is None else x for x, kind in arguments)
        types = tuple(kind or ctypes.c_void_p for _, kind in arguments)
        launch(self.function, programs, self.threads, self.shared, device, values, types, early)


@cache
def kernels(shape: Shape, device: torch.device) -> tuple[Kernel, Kernel]:
    """`scores` and `values`, compiled and loaded once."""
    made = []
    for scores, name, shared in zip((True, False), ("scores", "values"), shape.shared):
        values = shape.definitions(scores)
        with torch.cuda.device(device):
            made.append(Kernel(loaded(SOURCE, name, values, shared, device), 64 * values["PAIRS"], shared))
    return made[0], made[1]


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
    early: bool = False,
) -> None:
    """See `Reader.attend`."""
    rows, heads = len(packed.table), queries.shape[1]
    columns, (places,), (turns, small, _, _) = packed.table.shape[1], form.constants, form.tables
    keys, values = packed.learned if form.sinks else (queries, queries)
    shape, device = Shape.of(form, heads, queries.dtype), queries.device
    scored, valued = kernels(shape, numbered(device))
    sizes = [*((x, ctypes.c_int) for x in (rows, columns, heads)), (columns * form.tokens, ctypes.c_longlong)]
    order = (0, ctypes.c_void_p) if packed.order is None else (packed.order, None)
    given = [(x, None) for x in (packed.table, spans, starts, places, turns, small, keys, scores)]
    enough = max(len(out), RESIDENT * processors(device))
    scored(enough, device, (queries, None), order, *given, (scale, ctypes.c_float), *sizes, early=early)
    given = [(x, None) for x in (scores, packed.table, spans, starts, values, out, lse)]
    valued(len(out) * form.team, device, *given, *sizes, early=overlaps(device))
