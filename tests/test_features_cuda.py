"""The kernel over pages of features in CUDA C++ against its reference, without a GPU: its source is compiled for a CPU
(`features_on_cpu.h`), thread by thread, product by product."""

from __future__ import annotations

import ctypes
import importlib
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_on_cpu
from cuda_on_cpu import written_in_front
from fivefold.kernels.low_rank import Features, cuda, decode_reference
from fivefold.kernels.low_rank.reference import blocked_keys, blocked_waves
from fivefold.kernels.packed_decode.schedule import SPAN, pages_of, starts_of
from test_low_rank import form_of, pages, records

pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.low_rank.triton")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]
LAUNCH = """
extern "C" void launch(int blocks, int late, const Query* queries, const long long* table, const int* spans,
                       const int* starts, const char* ups, const uint4* waves, const double* angles, float* sums,
                       float* sums_lse, float* scores, float scale, int rows, int columns, int processors) {
  run(blocks, late, [&] {
    features(queries, table, spans, starts, ups, waves, angles, sums, sums_lse, scores, scale, rows, columns,
             processors);
  });
}
"""


def compiled(form: Features, dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    values = {**cuda.definitions(form, dtype), "PAIRS": 4, "EXACT": 2 if form.work == torch.bfloat16 else 0}
    return cuda_on_cpu.compiled(cuda.SOURCE, "features_on_cpu.h", LAUNCH, values, folder)


def expanded(form: Features, sums: torch.Tensor, lse: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `_expand` makes of the parts `[parts, team * heads, features]` of a team of the first block."""
    natural = lse.double() * math.log(2)
    total = natural.logsumexp(0)
    merged = (sums.double() * (natural - total).exp()[..., None]).sum(0).unflatten(0, (form.team, heads))
    return merged @ form.prepared.values[0].double(), total.unflatten(0, (form.team, heads))


@pytest.mark.parametrize(
    ("shape", "heads", "dtype"),
    [
        ({"heads": 4, "ranks": (6, 10), "head_dim": 128, "neighbours": True}, 4, torch.bfloat16),
        ({"heads": 2, "ranks": (10, 8), "bits": 4}, 3, torch.float16),
        ({"heads": 3, "ranks": (6, 6), "bits": 8, "pairs": 16}, 1, torch.float32),
        ({"heads": 2, "ranks": (32, 64), "dtype": torch.bfloat16}, 2, torch.bfloat16),
        ({"heads": 8, "ranks": (26, 26), "head_dim": 128, "bits": 4}, 4, torch.bfloat16),
        ({"heads": 8, "ranks": (26, 18), "head_dim": 128, "dtype": torch.bfloat16}, 4, torch.bfloat16),
    ],
    ids=["half", "bits4", "bits8", "swapped", "llama4", "llama16"],
)
@pytest.mark.parametrize("alone", [False, True], ids=["", "scores"])
def test_the_source_does_as_the_reference(shape, heads, dtype, alone, tmp_path, monkeypatch):
    """Teams of one program, of several and of none; units that are seen in part; copies at once, and as late as may be.
    What is not seen, and is in no plane of codes that is, is not a number. alone: it leaves scores."""
    if alone and torch.cuda.is_available():
        pytest.skip("what weighs the scores is compiled for the GPU here")
    if alone:
        monkeypatch.setattr(cuda, "HELD", 0)
        if "bits" in shape or shape["heads"] * shape["ranks"][1] % 16:
            assert not cuda.fits(form_of("cpu", queries=heads, **shape))
            return
    torch.manual_seed(heads)
    form = form_of("cpu", queries=heads, **shape)
    assert cuda.fits(form) and cuda.shared_bytes(form, cuda.group(form)) < 1 << 18
    library = compiled(form, dtype, tmp_path)
    page, columns = form.tokens, 4
    shown = [(0, 4 * page - 32, 70000), (page + 5, 2 * page, 17), (0, 0, 0), (3, 9, 0)]
    spans = torch.zeros(4, SPAN, dtype=torch.int32)
    spans[:, [0, 1, 7]] = torch.tensor(shown, dtype=torch.int32)
    spans = spans.repeat_interleave(form.team, 0)
    rows = len(spans)
    fields = pages(form, rows, columns, "cpu")
    slots = torch.arange(columns * page).view(columns, page)
    low, high = spans[:, 0, None, None], spans[:, 1, None, None]
    if form.bits is None:
        unseen = (slots < low) | (slots >= high)
        poisoned = [x.masked_fill(unseen[..., None], math.nan) for x in fields]
    else:
        planes = slots[:, ::32]
        unseen = ((planes + 32 <= low) | (planes >= high))[..., None]
        poisoned = [x if x.dtype == torch.int16 else x.masked_fill(unseen, math.nan) for x in fields]
    _memory, table = records(tuple(poisoned))
    queries = (torch.randn(rows, heads, form.head_dim) * 2).to(dtype)
    scaling = form.head_dim**-0.5
    wanted, wanted_lse = decode_reference(queries, scaling, spans, form, fields)
    _kept = written_in_front(library, queries, table)
    bound = 2e-2 if form.work == torch.bfloat16 else 3e-3
    for late, programs, most in ((False, 4, 99), (True, 7, 4)):
        split = form.team // cuda.group(form)
        processors = most * split
        starts = torch.from_numpy(starts_of(pages_of(spans.numpy(), page, form.team), (programs, 0)))[0].contiguous()
        features = cuda.padded(form.team * form.ranks[1])
        sums = torch.full((programs, form.team * heads, features), math.nan)
        lse = torch.full(sums.shape[:2], math.nan)
        made = form.prepared
        keys, waves = blocked_keys(made.keys), blocked_waves(made.waves)
        scores = torch.full((rows // form.team, columns * page, form.team * heads), math.nan)
        tensors = (queries, table, spans, starts, keys, waves, made.angles, sums, lse, scores)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
        blocks = min(programs, max(1, processors // split) + rows // form.team - 1) * split
        more = blocks + split  # than there is work for
        library.launch(more, late, *pointers, ctypes.c_float(scaling * math.log2(math.e)), rows, columns, processors)
        assert library.ended_without_waiting() == library.launched_without_waiting() == 0
        if alone:
            kernel.weigh(form, table, heads, scores, spans, starts, sums, lse)
            split, processors = 0, 1
        each = max(1, -(-int(starts[rows]) * split // processors))
        counts = np.diff(starts.numpy()[:: form.team])
        for team, count in enumerate(counts):
            mine = slice(team * form.team, (team + 1) * form.team)
            if not count:
                assert wanted_lse[mine].isinf().all()
                continue
            part = slice(int(starts[mine.start]), int(starts[mine.start]) + max(1, int(count) // each))
            found, total = expanded(form, sums[part], lse[part], heads)
            assert (found - wanted[mine]).norm() < bound * wanted[mine].norm()
            assert (total - wanted_lse[mine]).abs().max() < 20 * bound
        assert alone or sum(max(1, int(count) // each) for count in counts if count) <= blocks // split
