"""The decoding kernel in CUDA C++ against its reference, without a GPU: its source is compiled for the CPU
(`cuda_on_cpu.h`), thread by thread, product by product."""

from __future__ import annotations

import ctypes
import importlib
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_on_cpu
from conftest import quick
from cuda_on_cpu import written_in_front
from fivefold.kernels.packed_decode import Form, Reader, cuda, decode_reference, schedule
from fivefold.kernels.planar_decode import attend_planar
from fivefold.methods.bits.gear import Gear
from fivefold.methods.bits.mikv import MiKV
from fivefold.methods.method import Method
from test_packed_decode import exact_tier, packed_tier
from test_planar_decode import packed_of, page_tier

pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.packed_decode.triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
LAUNCH = """
extern "C" void launch(int blocks, int late, const Query* queries, const long long* table, const long long* exact,
                       const int* spans, const int* starts, const int* begins, float* out, float* lse,
                       const float* balance, float* found, float* scored, float scale, int rows, int once, int columns,
                       int exact_columns, int heads, int slots, int exact_slots, long long base, long long exact_base) {
  run(blocks, late, [&] {
    packed(queries, table, exact, spans, starts, begins, out, lse, balance, found, scored, scale, rows, once, columns,
           exact_columns, heads, slots, exact_slots, base, exact_base);
  });
}
"""


def compiled(
    form: Reader, dtype: torch.dtype, exact: torch.dtype | None, pairs: int, folder: Path, heads: int = 8,
    found: bool = False, scored: bool = False,
) -> ctypes.CDLL:  # fmt: skip
    values = cuda.definitions(form, dtype, exact, kernel.SPAN, pairs, 1, heads, found, scored)
    return cuda_on_cpu.compiled(cuda.SOURCE, "cuda_on_cpu.h", LAUNCH, values, folder)


def work_lists(span: torch.Tensor, page: int, joined: bool, programs: int, once: int) -> tuple[torch.Tensor, ...]:
    """Of packed pages, and exact ones that are joined to them: shared out to `programs`, or taken in turn by `once`."""
    pages = kernel.pages_of(span.numpy(), page, joined=joined)
    most = programs, 0 if joined else len(span)
    return torch.from_numpy(schedule.in_turn(pages[0], once) if once else kernel.starts_of(pages, most)).unbind(0)


@pytest.mark.parametrize(
    ("form", "dtype", "joined", "heads"),
    [
        (Form(2, 32, 32, 128), torch.bfloat16, torch.bfloat16, 4),
        (Form(2, 128, 64, 64), torch.float16, torch.float16, 8),
        (Form(3, 32, 32, 64), torch.float32, None, 1),
        (Form(4, 128, 128, 128), torch.float32, torch.bfloat16, 3),
        (Form(8, 64, 64, 64), torch.float16, None, 5),
    ],
    ids=str,
)
def test_the_source_does_as_the_reference(
    form: Form, dtype: torch.dtype, joined: torch.dtype | None, heads: int, tmp_path: Path
) -> None:
    """Shares of several pages, whole and cut at both ends; copies that come at once, and as late as they may. joined:
    with exact pages of that dtype, where what is not seen is not a number."""
    torch.manual_seed(form.bits)
    np.random.seed(0)
    random.seed(0)
    pairs, resident = cuda.arrangement(form)
    assert pairs * resident == 4
    library = compiled(form, dtype, joined, pairs, tmp_path, scored=joined is not None)
    columns, page, shared = 5, form.tokens, cuda.shared_bytes(form, pairs)
    assert shared < 1 << 18
    spans = [(0, 5 * page - form.group, 0, 0, 0), (page + 5, 2 * page, 0, 0, 0), (0, 0, 0, 0, 0), (3, 9, 0, 0, 0)]
    if joined is not None:
        exact = [(0, 0, 33), (3, 40, 61), (0, 20, 40, 2, 9), (5, 4, 3), (0, 0, 0)]
        spans = [(*pages[:2], *slots) for pages, slots in zip([*spans, (0, 0)], exact)]
    else:
        spans = [(0, 0)] * 40 + spans  # more rows than a warp looks at at a time
    rows = len(spans)
    tier = packed_tier(rows, columns, form, "cpu")
    span = torch.zeros(rows, kernel.SPAN, dtype=torch.int32)
    for row, numbers in enumerate(spans):
        span[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    queries, table = torch.randn(rows, heads, form.head_dim).to(dtype), tier.addresses("key_words")
    fields = tuple(tier.rows(part.name) for part in tier.pool.layout.fields)
    scaling, slots, keys, values = form.head_dim**-0.5, table, None, None
    if joined is not None:
        store = exact_tier(rows, 2, form.head_dim, joined, "cpu")
        slots = torch.stack([store.addresses("keys"), store.addresses("values")], 2)
        keys, values = (store.rows(name).flatten(1, 2) for name in ("keys", "values"))
        slot, (sink, start, stop, fading, faded) = torch.arange(64), span[:, 2:7, None].unbind(1)
        seen = (slot < stop) & ((slot < sink) | (slot >= start) | ((slot >= fading) & (slot < faded)))
        for name, x in (("keys", keys), ("values", values)):
            poisoned = x.masked_fill(~seen[..., None], torch.nan).unflatten(1, (2, 32))
            store.pool.write(name, store.table.reshape(-1), poisoned.flatten(0, 1))
    wanted, wanted_lse = decode_reference(queries, scaling, span, form, fields, keys, values)
    late_ones = [] if joined is None else [x for _, slab in store.pool._live() for x in slab.tensors.values()]
    _kept = written_in_front(library, queries, *late_ones)
    bases = [int(x.min()) - 7 for x in (table, slots)]  # from which addresses are counted
    table, slots = (x - base for x, base in zip((table, slots), bases))
    bases = [ctypes.c_longlong(base) for base in bases]
    for late, programs, once in ((False, 4, 0), (True, 6, 0), (False, 2, 2), (True, 5, 5)):
        starts, begins = work_lists(span, page, joined is not None, programs, once)
        out = torch.full((programs + rows, heads, form.head_dim), torch.nan)
        lse = torch.full((programs + rows, heads), torch.nan)
        scores = torch.full((rows, heads, 64), torch.nan)
        tensors = (queries, table, slots, span, starts, begins, out, lse, lse, lse, scores)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        sizes = (rows, once, columns, slots.shape[1], heads, 0, 64)
        # One more than there is work for.
        library.launch(programs + 1, late, *pointers, ctypes.c_float(scaling * math.log2(math.e)), *sizes, *bases)
        assert library.ended_without_waiting() == library.launched_without_waiting() == 0
        assert lse[int(starts[-1]) :].isnan().all() and lse[: int(starts[-1])].isfinite().all()
        if keys is not None:
            there = (torch.arange(64) < span[:, 4, None])[:, None].expand_as(scores)
            logs = (queries.double() * scaling) @ keys.double().nan_to_num(0).transpose(1, 2)
            logs = logs.masked_fill(~seen[:, None], -1e30).float()
            assert torch.allclose(scores[there], logs[there], 1e-2, 0.06) and scores[~there].isnan().all()
        for row in range(rows):
            part = slice(int(starts[row]), int(starts[row + 1]))
            if part.start == part.stop:
                assert wanted_lse[row].isinf().all()
                continue
            natural = lse[part].double() * math.log(2)
            total = natural.logsumexp(0)
            found = (out[part].double() * (natural - total).exp()[..., None]).sum(0)
            assert (found - wanted[row]).norm() < (1e-2 if joined is torch.bfloat16 else 3e-3) * wanted[row].norm()
            assert (total - wanted_lse[row]).abs().max() < 0.06


OTHERS = [
    (Gear(), 64, torch.float32, 3),
    (MiKV(), 64, torch.bfloat16, 4),
    (Gear(), 128, torch.bfloat16, 4),
    (MiKV(), 128, torch.bfloat16, 4),
    (Gear(bits=4, sparsity=0.05, rank=8), 64, torch.float32, 3),
    (MiKV(low=4, group=64), 64, torch.float16, 5),
    (Gear(base="kcvt", rank=2, sparsity=0.0), 64, torch.float32, 8),
    (MiKV(low=3, balance=False, unbias=False, group=128), 128, torch.float32, 1),
]


@pytest.mark.parametrize("case", quick(OTHERS, 2), ids=lambda case: f"{case[0]}-{case[1]}".replace(" ", ""))
def test_pages_of_other_kinds(case: tuple[Method, int, torch.dtype, int], tmp_path: Path) -> None:
    """What `test_planar_decode.py` asks of Triton's kernel: whole pages, cut ones, none; and the scores it leaves.
    Of a model in 16 bits beside exact pages."""
    method, dim, dtype, heads = case
    torch.manual_seed(1)
    np.random.seed(1)
    columns, rows = 3, 3
    joined = None if dtype is torch.float32 else dtype
    tier, form = page_tier(method, dim, rows, columns, "cpu")
    assert cuda.supports(form, heads)
    pairs, resident = cuda.arrangement(form, heads=heads)
    assert pairs * resident == 4
    library, page = compiled(form, dtype, joined, pairs, tmp_path, heads, True), form.tokens
    assert cuda.shared_bytes(form, pairs, heads) < 1 << 18
    span = torch.zeros(rows, kernel.SPAN, dtype=torch.int32)
    span[:, :2] = torch.tensor([[0, 3 * page], [page - 40, 2 * page + 32], [0, 0]])
    queries = (torch.randn(rows, heads, dim) * (1 if dtype is torch.float16 else 1e5)).to(dtype)
    scaling = dim**-0.5 * (1 if dtype is torch.float16 else 1e-5)
    learned = (torch.rand(rows, dim) + 0.5,) if form.balanced else ()
    fields = tuple(tier.rows(name) for name in form.parts)
    wanted, wanted_lse = attend_planar(form, queries, scaling, span, fields, learned)
    table = slots = packed_of(tier, form, learned).table.contiguous()
    both = wanted_lse
    if joined is not None:
        span[:, 2:5] = torch.tensor([[0, 3, 40], [2, 33, 61], [0, 0, 0]])
        store = exact_tier(rows, 2, dim, joined, "cpu")
        slots = torch.stack([store.addresses("keys"), store.addresses("values")], 2)
        exact = (store.rows(name).flatten(1, 2) for name in ("keys", "values"))
        other, other_lse = decode_reference(queries, scaling, span, None, None, *exact)
        both = torch.logaddexp(wanted_lse, other_lse)
        parts = ((wanted, wanted_lse), (other, other_lse))
        wanted = sum(x * (y - both).exp().nan_to_num(0)[..., None] for x, y in parts)
    late_ones = [] if joined is None else [x for _, slab in store.pool._live() for x in slab.tensors.values()]
    _kept = written_in_front(library, queries, *late_ones)
    for late, programs, once in ((False, 3, 0), (True, 5, 0), (True, 2, 2)):
        starts, begins = work_lists(span, page, joined is not None, programs, once)
        out, lse = torch.full((programs + rows, heads, dim), torch.nan), torch.full((programs + rows, heads), torch.nan)
        found = torch.full((rows, heads, columns * page), torch.nan)
        tensors = (queries, table, slots, span, starts, begins, out, lse, learned[0] if learned else lse, found, lse)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        sizes = (rows, once, columns, slots.shape[1], heads, columns * page, 0)
        bases = (ctypes.c_longlong(0),) * 2
        library.launch(programs + 1, late, *pointers, ctypes.c_float(scaling * math.log2(math.e)), *sizes, *bases)
        assert library.ended_without_waiting() == library.launched_without_waiting() == 0
        for row in range(2):
            part = slice(int(starts[row]), int(starts[row + 1]))
            natural = lse[part].double() * math.log(2)
            total = natural.logsumexp(0)
            output = (out[part].double() * (natural - total).exp()[..., None]).sum(0)
            assert (output - wanted[row]).norm() < 5e-3 * wanted[row].norm()
            assert torch.allclose(total, both[row], 3e-4, 3e-2)
            low, high = span[row, :2].tolist()
            seen = found[row, :, low:high].double() * math.log(2)
            assert torch.allclose(seen.logsumexp(1), wanted_lse[row], 3e-4, 3e-2)
            assert found[row, :, :low].isnan().all() and found[row, :, high:].isnan().all()
