"""The kernels around attention in a decoding step against torch's operations; on a CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICES
from fivefold.kernels.packed_decode.schedule import SPAN, Exact
from fivefold.kernels.step import reference
from fivefold.kernels.step.reference import ACTS, Norm, Pages, Turn

step = pytest.importorskip("fivefold.kernels.step.triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread", "touched")
# The interpreter cuts off what bfloat16 does not hold, where a GPU rounds.
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2 if torch.cuda.is_available() else 5e-2}
TYPES = list(BOUNDS)


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


def random(device, dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert (found.float() - wanted.float()).norm() <= BOUNDS[found.dtype] * wanted.float().norm()
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("dtype", TYPES)
def test_products(device, dtype, count: int) -> None:
    """Of several weights at once, whose rows fill no tiles, after a norm and with biases."""
    x, norm = random(device, dtype, count, 72) * 3, Norm(random(device, dtype, 72, seed=1), 1e-5)
    weights = [random(device, dtype, rows, 72, seed=rows) for rows in (37, 16, 5)]
    biases = [random(device, dtype, len(weight), seed=9) for weight in weights]
    for found, wanted in zip(step.products(x, weights, biases, norm), reference.products(x, weights, biases, norm)):
        alike(found, wanted)
    residual = random(device, dtype, count, 37, seed=4)
    alike(step.added(x, weights[0], None, residual), reference.added(x, weights[0], None, residual))
    late = step.Tiles(4, 128, 4, late=True)
    if count == 1:
        alike(
            step.products(x, weights[:1], [None], norm, tiles=late)[0],
            reference.products(x, weights, biases[:1], norm)[0] - biases[0],
        )


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("count", [1, 3, 6])
def test_gated(device, act: str, count: int) -> None:
    for dtype in TYPES if act == "silu" else TYPES[:1]:
        x, norm = random(device, dtype, count, 64), Norm(random(device, dtype, 64, seed=1), 1e-6)
        gate, up = (random(device, dtype, 45, 64, seed=seed) / 4 for seed in (2, 3))
        biases = [random(device, dtype, 45, seed=seed) for seed in (4, 5)]
        for given in (biases, [None, None]):
            alike(step.gated(x, gate, up, given, norm, act), reference.gated(x, gate, up, given, norm, act))
        alike(step.gate_times(x @ gate.T, x @ up.T, act), reference.gate_times(x @ gate.T, x @ up.T, act))
        alike(step.normed(x, norm), reference.normed(x, norm))


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("dtype", TYPES)
def test_heads(device, dtype, count: int, normed: bool, touched) -> None:
    """Queries, keys and values after RoPE; in exact pages, wherever they lie, if they go there."""
    heads, kv_heads, dim, pages = 3, 2, 64, 5
    x, norm = random(device, dtype, count, 48), Norm(random(device, dtype, 48, seed=1), 1e-5)
    weights = [random(device, dtype, n * dim, 48, seed=n) / 4 for n in (heads, kv_heads, kv_heads)]
    weights[2] = -weights[2]
    biases = [random(device, dtype, len(weight), seed=6) for weight in weights]
    cos, sin = (random(device, dtype, count, dim, seed=seed) for seed in (7, 8))
    norms = [Norm(random(device, dtype, dim, seed=seed), 1e-6) for seed in (9, 10)]
    turn = Turn(cos, sin, (norms[0], norms[1]) if normed else (None, None))
    wanted = reference.heads(x, weights, biases, norm, turn)
    for one, other in zip(step.heads(x, weights, biases, norm, turn), wanted):
        alike(one, other)
    rows = count * kv_heads
    memory = torch.full((rows, pages, 2, 32, dim), float("nan"), dtype=dtype, device=device)
    touched.append(memory)
    order = torch.randperm(rows * pages * 2, generator=torch.Generator().manual_seed(3)).to(device)
    table = (memory.data_ptr() + order * 32 * dim * memory.element_size()).view(rows, pages, 2) >> 4
    stops = torch.randint(1, 32 * pages, (rows,), generator=torch.Generator().manual_seed(4))
    spans = torch.zeros(rows, SPAN, dtype=torch.int32)
    spans[:, 4] = stops.int()
    queries, *nothing = step.heads(x, weights, biases, norm, turn, Pages(spans.to(device), Exact(table, dtype)))
    alike(queries, wanted[0])
    assert nothing == [None, None]
    flat, order = memory.view(-1, 32, dim), order.view(rows, pages, 2).cpu()
    for row, stop in enumerate(stops.tolist()):
        for side in (0, 1):
            at = flat[order[row, (stop - 1) // 32, side]]
            alike(at[(stop - 1) % 32], wanted[1 + side].view(rows, dim)[row])
    assert int(torch.isfinite(memory).sum()) == 2 * rows * dim  # and nothing else
