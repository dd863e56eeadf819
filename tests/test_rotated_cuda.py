"""The kernels of rotated pages in CUDA C++ against their reference, without a GPU (see `test_packed_cuda.py`)."""

from __future__ import annotations

import ctypes
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_on_cpu
from conftest import quick
from cuda_on_cpu import written_in_front
from fivefold.kernels.packed_decode import schedule
from fivefold.kernels.rotated_decode import attend_rotated, cuda
from fivefold.store.context import Context

pytest.importorskip("triton", reason="needs Triton")
from test_packed_decode import Tier, numbers
from test_rotated_decode import codec_of

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
SCORES = """
extern "C" void launch(int blocks, int late, const Query* queries, const long long* order, const long long* table,
                       const int* spans, const int* starts, const int* places, const long long* turns,
                       const float* small, const Query* keys, float* found, float scale, int rows, int columns,
                       int heads, long long slots) {
  gridDim.x = blocks;
  run(blocks, late, [&] {
    scores(queries, order, table, spans, starts, places, turns, small, keys, found, scale, rows, columns, heads, slots);
  });
}
"""
VALUES = """
extern "C" void launch(int blocks, int late, const float* found, const long long* table, const int* spans,
                       const int* starts, const Query* sinks, float* out, float* lse, int rows, int columns, int heads,
                       long long slots) {
  run(blocks * TEAM, late, [&] { values(found, table, spans, starts, sinks, out, lse, rows, columns, heads, slots); });
}
"""
# Bits, head_dim, kv heads, heads rotated together at most, sinks, whether RoPE turns neighbours; query heads, dtype.
CASES = [
    ((2, 64, 2, 4, 4, False), 3, torch.bfloat16),
    ((2, 128, 4, 4, 4, False), 4, torch.float32),
    ((3, 128, 4, 2, 4, True), 5, torch.float16),
    ((4, 64, 4, 4, 0, True), 1, torch.float32),
    ((4, 128, 1, 4, 2, False), 8, torch.float32),
    ((2, 64, 4, 4, 4, True), 7, torch.bfloat16),
    ((4, 128, 5, 4, 4, False), 4, torch.bfloat16),  # as a set of heads may be: rotated one by one, sorted together
]


def compiled(shape: cuda.Shape, scores: bool, folder: Path) -> ctypes.CDLL:
    launch = f"{SCORES if scores else VALUES}\nint bytes() {{ return BYTES; }}"
    values = {**shape.definitions(scores), "RESIDENT": 1}
    return cuda_on_cpu.compiled(cuda.SOURCE, "rotated_on_cpu.h", launch, values, folder)


@pytest.mark.parametrize("given", quick(CASES, 1), ids=str)
def test_the_source_does_as_the_reference(given: tuple, tmp_path: Path) -> None:
    """Two sequences far into a text, one with a window that begins inside a page; exact tokens among the others."""
    case, heads, dtype = given
    torch.manual_seed(2)
    np.random.seed(2)
    codec, (_, dim, kv_heads, _, sinks, _) = codec_of(*case, "cpu"), case
    form, rows, columns, far = codec.reader, 2 * kv_heads, 3, 100_000
    shape = cuda.Shape.of(form, heads, dtype)
    assert cuda.supports(form, heads, dtype) and shape.lacks() is None
    page = form.tokens
    keys, values = (numbers((rows, columns * page, dim), "cpu") for _ in range(2))
    learned, where = {}, [0, 7, page + 3, page + 40][:sinks]
    if sinks:
        learned = {name: torch.randn(rows, sinks, dim).to(dtype) * 8 for name in ("sink_keys", "sink_values")}
        keys[:, where] = learned["sink_keys"][:, : len(where)].to(keys.dtype)
    positions = torch.arange(far, far + columns * page)[None]
    bound = codec.of(Context(tuple(range(kv_heads)) * 2, kv_heads, positions, learned))

    def encode(pages: int) -> dict[str, torch.Tensor]:
        pages_of = (rows * columns, page, dim)
        return bound.encode(keys.reshape(pages_of), values.reshape(pages_of), 0, None)

    tier = Tier(rows, columns, codec.layout, "cpu", encode)
    fields = tuple(tier.rows(name) for name in form.fields)
    spans = torch.zeros(rows, schedule.SPAN, dtype=torch.int32)
    spans[:, 7] = far
    spans[:kv_heads, 1], spans[kv_heads:, 1] = 3 * page, page + 64
    spans[kv_heads:, 0] = page - 40
    queries = (torch.randn(rows, heads, dim) * 1e3).to(dtype)
    scaling = 1e-3 * dim**-0.5
    wanted, wanted_lse = attend_rotated(form, queries, scaling, spans, fields, tuple(learned.values()))
    table = torch.stack([torch.from_numpy(tier.pool.addresses(name, tier.table)) for name in form.fields], 2)
    table = (table // form.unit).contiguous()
    slots = columns * page
    sink_keys, sink_values = tuple(learned.values()) if sinks else (queries, queries)
    turns, small, _, _ = form.tables
    sizes = rows, columns, heads, ctypes.c_longlong(slots)
    first, second = (compiled(shape, kind, tmp_path) for kind in (True, False))
    assert [x._Z5bytesv() for x in (first, second)] == list(shape.shared)
    # One share a program; shares of a page that four programs take planes of; and of several pages.
    for late, programs in ((False, 3), (True, 5), (True, 2)):
        pages = schedule.pages_of(spans.numpy(), page, form.team)
        programs *= kv_heads // form.team
        starts = torch.from_numpy(schedule.starts_of(pages, (programs, rows)))[0].contiguous()
        found = torch.full((rows, heads, slots), torch.nan)
        out = torch.full((programs, form.team * heads, dim), torch.nan)
        lse = torch.full((programs, form.team * heads), torch.nan)

        def at(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
            return [ctypes.c_void_p(x.data_ptr()) for x in tensors]

        # Queries where they are, or where an order says.
        order = torch.randperm(rows) if late else torch.arange(rows)
        asked = torch.empty_like(queries)
        asked[order] = queries
        _asked = written_in_front(first, asked)
        where = at(order)[0] if late else ctypes.c_void_p(0)
        given = at(table, spans, starts, form.places, turns, small, sink_keys, found)
        scale = ctypes.c_float(scaling * math.log2(math.e))
        first.launch(programs * (4 if late else 1), late, *at(asked), where, *given, scale, *sizes)
        assert first.ended_without_waiting() == 0
        first.forget()
        scores = found.clone()
        _kept = written_in_front(second, scores)
        second.launch(programs + 1, late, *at(scores, table, spans, starts, sink_values, out, lse), *sizes)
        assert second.ended_without_waiting() == second.launched_without_waiting() == 0
        second.forget()
        for row in range(rows):
            lead = row // form.team * form.team
            part, mine = slice(int(starts[lead]), int(starts[lead + 1])), slice(row % form.team * heads, None)
            natural = lse[part, mine][:, :heads].double() * math.log(2)
            total = natural.logsumexp(0)
            weighed = out[part, mine][:, :heads].double() * (natural - total).exp()[..., None]
            assert (weighed.sum(0) - wanted[row]).norm() < 8e-3 * wanted[row].norm()
            assert torch.allclose(total, wanted_lse[row], 3e-4, 3e-2)
