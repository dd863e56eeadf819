"""The decoding kernel in CUDA C++ against its reference, without a GPU: its source is compiled for the CPU
(`cuda_on_cpu.h`), thread by thread, product by product."""

from __future__ import annotations

import ctypes
import importlib
import math
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fivefold.kernels.packed_decode import Form, cuda, decode_reference
from test_packed_decode import packed_tier

pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.packed_decode.triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
LAUNCH = """
extern "C" void launch(int blocks, int late, const Query* queries, const long long* table, const int* spans,
                       const int* starts, float* out, float* lse, float scale, int rows, int columns, int heads) {
  run(blocks, late, [&] { packed(queries, table, spans, starts, out, lse, scale, rows, columns, heads); });
}
"""


def compiled(form: Form, dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    source, library = folder / "packed.cpp", folder / "packed.so"
    header = Path(__file__).with_name("cuda_on_cpu.h")
    source.write_text(f'#define CUDA_ON_CPU\n#include "{header}"\n#include "{cuda.SOURCE}"\n{LAUNCH}')
    values = cuda.definitions(form, dtype, kernel.SPAN, 1)
    options = [f"-D{name}={value}" for name, value in values.items()]
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", *options, str(source), "-o", str(library)]
    subprocess.run(command, check=True, timeout=120)
    return ctypes.CDLL(str(library))


@pytest.mark.parametrize(
    ("form", "dtype", "heads"),
    [
        (Form(2, 32, 32, 128), torch.bfloat16, 4),
        (Form(2, 128, 64, 64), torch.float16, 8),
        (Form(3, 32, 32, 64), torch.float32, 1),
        (Form(4, 128, 128, 128), torch.float32, 3),
        (Form(8, 64, 64, 64), torch.float16, 5),
    ],
    ids=str,
)
def test_the_source_does_as_the_reference(form: Form, dtype: torch.dtype, heads: int, tmp_path: Path) -> None:
    """Shares of several pages, whole and cut at both ends; copies that come at once, and as late as they may."""
    torch.manual_seed(form.bits)
    np.random.seed(0)
    random.seed(0)
    launch = compiled(form, dtype, tmp_path).launch
    columns, page, shared = 5, form.tokens, cuda.shared_bytes(form)
    assert shared < 1 << 17
    spans = [(0, 5 * page - form.group, 0, 0, 0), (page + 5, 2 * page, 0, 0, 0), (0, 0, 0, 0, 0), (3, 9, 0, 0, 0)]
    rows = len(spans)
    tier = packed_tier(rows, columns, form, "cpu")
    span = torch.zeros(rows, kernel.SPAN, dtype=torch.int32)
    span[:, :5] = torch.tensor(spans, dtype=torch.int32)
    queries, table = torch.randn(rows, heads, form.head_dim).to(dtype), tier.addresses("key_words")
    fields = tuple(tier.rows(part.name) for part in tier.pool.layout.fields)
    scaling = form.head_dim**-0.5
    wanted, wanted_lse = decode_reference(queries, scaling, span, form, fields)
    for late, programs in ((False, 4), (True, 4), (True, 6)):
        starts = torch.from_numpy(kernel.starts_of(kernel.pages_of(span.numpy(), page), (programs, rows)))[
            0
        ].contiguous()
        out = torch.full((programs, heads, form.head_dim), torch.nan)
        lse = torch.full((programs, heads), torch.nan)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (queries, table, span, starts, out, lse)]
        launch(programs, late, *pointers, ctypes.c_float(scaling * math.log2(math.e)), rows, columns, heads)
        for row in range(rows):
            part = slice(int(starts[row]), int(starts[row + 1]))
            if part.start == part.stop:
                assert wanted_lse[row].isinf().all()
                continue
            natural = lse[part].double() * math.log(2)
            total = natural.logsumexp(0)
            found = (out[part].double() * (natural - total).exp()[..., None]).sum(0)
            assert (found - wanted[row]).norm() < 3e-3 * wanted[row].norm()
            assert (total - wanted_lse[row]).abs().max() < 0.06
