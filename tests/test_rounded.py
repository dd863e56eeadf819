"""Kernels of a decoding step over exact pages that hold eight bits a number (`store/rounded.py`)."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from conftest import DEVICES, KERNELS
from fivefold.kernels.packed_decode.reference import decode_reference
from fivefold.kernels.planar import dequantise, quantise
from fivefold.store.rounded import SIDES, rounded_layout

pytest.importorskip("triton", reason="needs Triton")
from test_packed_decode import Tier, numbers

pytestmark = pytest.mark.usefixtures("one_thread")
kernel = importlib.import_module("fivefold.kernels.packed_decode.triton")
ROWS, COLUMNS, HEADS, DIM = 3, 4, 3, 64
# Everything; a window with sinks and some that fade, whose first slots are poison; a row of one token.
SPANS = ((0, 0, 0, 0, 128), (0, 0, 4, 37, 70, 10, 20), (0, 0, 0, 0, 1))


def rounded(x: torch.Tensor, name: str) -> dict[str, torch.Tensor]:
    codes, scale, zero = quantise(x.float(), 8)
    return {f"{name}.codes": codes.to(torch.uint8), f"{name}.scale": scale, f"{name}.zero": zero}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch) -> str:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    torch.manual_seed(0)
    np.random.seed(0)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_over_rounded_pages_are_those_of_the_reference(device: str, dtype: torch.dtype) -> None:
    shape = (ROWS * COLUMNS, 32, DIM)

    def encode(pages: int) -> dict[str, torch.Tensor]:
        made = [rounded(numbers(shape, device).to(dtype), name) for name in ("keys", "values")]
        return {**made[0], **made[1]}

    tier = Tier(ROWS, COLUMNS, rounded_layout(32, DIM, dtype), device, encode)
    exact = kernel.Exact(torch.stack([tier.addresses(name) for name in SIDES], 2), dtype)
    assert exact.rounded
    spans = torch.zeros(ROWS, kernel.SPAN, dtype=torch.int32, device=device)
    for row, span in enumerate(SPANS):
        spans[row, : len(span)] = torch.tensor(span)
    # The newest token of each row is stored bit for bit as the store does; one is constant, and one reaches far.
    new = [numbers((ROWS, DIM), device).to(dtype) for _ in range(2)]
    new[0][0], new[1][1] = 0.75, new[1][1] * 300
    kernel.append(*new, spans, exact)
    for x, name in zip(new, ("keys", "values")):
        for row in range(ROWS):
            page, slot = divmod(int(spans[row, 4]) - 1, 32)
            wanted = rounded(x[row], name)
            for part, one in wanted.items():
                assert torch.equal(tier.pool.read(part, tier.table[row, page : page + 1])[0, slot], one)
                tier.fields[part][row * COLUMNS + page, slot] = one
    keys, values = (
        dequantise(*(tier.rows(f"{name}.{part}") for part in ("codes", "scale", "zero"))).to(dtype).flatten(1, 2)
        for name in ("keys", "values")
    )
    queries = torch.randn(ROWS, HEADS, DIM, device=device)
    scores = torch.full((ROWS, HEADS, COLUMNS * 32), torch.nan, device=device)
    found, lse = kernel.decode(queries, 0.125, spans, None, exact, with_lse=True, scores=scores)
    wanted, wanted_lse = decode_reference(queries, 0.125, spans, None, None, keys, values)
    bound = 1e-5 if dtype is torch.float32 else 1e-2
    assert (found - wanted).norm() < bound * wanted.norm()
    assert torch.allclose(lse.double(), wanted_lse, bound, bound * 10)
    seen = queries[0] * 0.125 @ keys[0].float().T
    assert (scores[0] - seen).norm() < bound * seen.norm()
