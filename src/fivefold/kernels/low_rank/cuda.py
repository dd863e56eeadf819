"""Pages of low-rank features in CUDA C++ (`features.cu`), compiled at run time by NVRTC, for Hopper.

It does what `triton._features` does, with products of a whole group of warps, several of which are under way at a time.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.device import numbered, processors
from fivefold.kernels.low_rank.reference import Features, padded
from fivefold.kernels.nvrtc import launch, loaded
from fivefold.kernels.packed_decode.schedule import SPAN

SOURCE = Path(__file__).with_name("features.cu")
WORKERS = 2
"""Groups of four warps in a program."""
UNIT = 64
"""Tokens that one of them works on at a time."""
COLUMNS = 8
"""Query heads of a program, at most."""
HELD, KEYS = 512, 512
"""Features of keys and of values together, and of keys alone, that there are registers for."""
SHARED = 227 << 10
"""Bytes of shared memory that a program may have on Hopper."""
_QUERIES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def supports(form: Features, device: torch.device) -> bool:
    """Whether it reads these pages on a device."""
    return device.type == "cuda" and choose(device).path == "cuda" and _hopper(numbered(device)) and fits(form)


def fits(form: Features) -> bool:
    """Whether there is a kernel for these pages."""
    return (
        form.head_dim in (64, 128)
        and form.work.itemsize == 2
        and not any(rank % 2 for rank in form.ranks)
        and padded(form.team * form.ranks[0]) <= KEYS
        and form.team <= 32
        and not (scores_alone(form) and (form.bits or form.team * form.ranks[1] % 16))
        and group(form) > 0
    )


@cache
def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


def scores_alone(form: Features) -> bool:
    """Whether it leaves scores, and values are summed by another kernel."""
    return sum(padded(form.team * rank) for rank in form.ranks) > HELD


def shared_bytes(form: Features, heads_at_once: int) -> int:
    """Of a program that makes the keys of so many heads: see `features.cu`."""
    up = padded(form.team * form.ranks[0]) * form.head_dim * 2
    keys, values = (form.side(rank) if form.bits else UNIT * rank * 2 for rank in form.ranks)
    words, alone = form.head_dim // 2 * COLUMNS, scores_alone(form)
    units = form.team * (keys if alone else WORKERS * (keys + values))
    used = heads_at_once * up + units + words * 8 + WORKERS * heads_at_once * words * 4
    used += form.head_dim // 2 * 8 + 16 * WORKERS + 16
    merged = 4 * WORKERS * 4 * (16 + 9 * padded(form.team * form.ranks[1]))
    return used if alone else max(used, merged)


def group(form: Features) -> int:
    """How many kv heads of a team a program makes the keys of: as many as fit; 0 if not one does."""
    fit = (
        n
        for n in range(form.team, 0, -1)
        if form.team % n == 0 and n * form.queries <= COLUMNS and shared_bytes(form, n) <= SHARED
    )
    return next(fit, 0)


def definitions(form: Features, dtype: torch.dtype) -> dict[str, int]:
    """What `features.cu` is compiled with; dtype: of queries."""
    return {
        "HEADS": form.team, "RK": form.ranks[0], "RV": form.ranks[1], "BITS": form.bits or 0,
        "KIND": 2 if form.work == torch.bfloat16 else 1, "D": form.head_dim, "M": form.queries,
        "QUERIES": _QUERIES[dtype], "ROPE": form.pairs, "NEIGHBOURS": int(form.neighbours), "SPAN": SPAN,
        "BLOCKS": form.blocks, "GROUP": group(form), "SCORES": int(scores_alone(form)),
    }  # fmt: skip


def features(
    form: Features,
    table: torch.Tensor,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    sums: torch.Tensor,
    sums_lse: torch.Tensor,
    scores: torch.Tensor,
    early: bool = False,
) -> tuple[int, int]:
    """Leave weighted features, divided, in sums, float32 `[programs, team * heads, features]`, and their log-sum-exp in
    sums_lse: of a team's first programs only. Which these are, `_expand` works out from what is returned: how many
    launched programs share a team's heads out, and processors. Where `scores_alone` leave these, to the base 2, in
    scores, float32 `[teams, slots, team * heads]`. early: see `Reader.attend`."""
    (rows, columns), device, made = table.shape, queries.device, form.prepared
    function, shared, there = _kernel(form, queries.dtype, numbered(device))
    split = form.team // group(form)
    # Teams with too few tokens for a program have one all the same, but not all of them where any has more than one. A
    # program too many would hold everything up: it has to wait for a processor.
    programs = min(len(sums), max(1, there // split) + rows // form.team - 1) * split
    tensors = (queries, table, spans, starts, made.keys, made.waves, made.angles, sums, sums_lse, scores)
    pointers = [x.data_ptr() for x in tensors]
    types = (*[ctypes.c_void_p] * 10, ctypes.c_float, *[ctypes.c_int] * 3)
    values = (*pointers, scale, rows, columns, there)
    launch(function, programs, 128 * WORKERS, shared, device, values, types, early)
    return split, there


def _kernel(form: Features, dtype: torch.dtype, device: torch.device) -> tuple[Any, int, int]:
    """The kernel, loaded; bytes of shared memory that it takes; processors of the device."""
    shared = shared_bytes(form, group(form))
    return _loaded(tuple(definitions(form, dtype).items()), shared, device)


@cache
def _loaded(definitions: tuple[tuple[str, int], ...], shared: int, device: torch.device) -> tuple[Any, int, int]:
    with torch.cuda.device(device):
        function = loaded(SOURCE, "features", dict(definitions), shared, device, "a")
        return function, shared, processors(device)
