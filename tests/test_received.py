"""The attention that keys receive: the kernel against whole matrices, and in the engine."""

from __future__ import annotations

import importlib

import pytest
import torch

from conftest import DEVICES
from fivefold.attention.merge import attend_reference
from fivefold.kernels.received import received_reference
from fivefold.methods.bits.kivi import Kivi
from fivefold.methods.tokens.h2o import H2O
from policies import Run

pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.received.triton")
GPU = torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 16), (torch.float16, 64), (torch.float16, 128)])
@pytest.mark.parametrize(("heads", "chunk", "stored"), [(1, 1, 0), (3, 200, 0), (4, 70, 131), (2, 1, 300), (1, 129, 1)])
def test_the_kernel_sums_columns(
    device: str, dtype: torch.dtype, dim: int, heads: int, chunk: int, stored: int
) -> None:
    torch.manual_seed(chunk)
    total = stored + chunk
    # Some keys draw most of the attention, as in real models; the queries are a view.
    keys = (torch.randn(2, total, dim) * torch.rand(total, 1).pow(4) * 8).to(dtype).to(device)
    queries = torch.randn(2, chunk, heads, dim, dtype=dtype).to(device).transpose(1, 2)
    bias = torch.zeros(chunk, total).masked_fill(torch.ones(chunk, total, dtype=torch.bool).triu(stored + 1), -1e30)
    spread = keys[:, None].expand(-1, heads, -1, -1)
    _, lse = attend_reference(queries, spread, spread, 0.3, bias.to(device))
    whole = ((queries.double() * 0.3) @ spread.double().transpose(-1, -2) + bias.to(device)).softmax(-1).sum((1, 2))
    for found in (received_reference(queries, keys, lse, 0.3), kernel.received(queries, keys, lse, 0.3)):
        assert found.shape == (2, total) and found.dtype == torch.float32
        assert torch.allclose(found.double(), whole, rtol=2e-3, atol=2e-3)
        assert float(found.sum()) == pytest.approx(2 * heads * chunk, rel=1e-3)


@pytest.mark.skipif(GPU, reason="the kernels are compiled for the GPU here")
@pytest.mark.parametrize("codec", [None, "kivi"])
def test_policies_choose_by_it(monkeypatch, codec: str | None) -> None:
    torch.manual_seed(5)
    q, k, v = torch.randn(1, 2, 4, 260, 16), torch.randn(1, 2, 2, 260, 16) * 2, torch.randn(1, 2, 2, 260, 16)
    found, calls, real = [], [], kernel.received
    monkeypatch.setattr(kernel, "received", lambda *given: calls.append(given) or real(*given))
    for path in ("reference", "triton"):
        monkeypatch.setenv("FIVEFOLD_KERNELS", path)
        run = Run(H2O(keep=0.6), 2, 4, 16)
        if codec is not None:
            made = Kivi(bits=8).codec(run.session.stores[0].spec)
            run = Run(H2O(keep=0.6), 2, 4, 16, codec=made, residual=32)
        outs = [
            run.take(q[..., part, :], k[..., part, :], v[..., part, :])[0] for part in (slice(170), slice(170, 260))
        ]
        assert len(calls) == (2 if path == "triton" else 0)  # one for each chunk
        found.append((run.kept(), torch.cat(outs, 1), run.session.stores[0].groups[0].held.scores))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert torch.allclose(found[0][2], found[1][2], rtol=1e-4, atol=1e-4)
