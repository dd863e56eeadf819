"""Kernels on a GPU that is not the current one."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from fivefold.kernels import device as devices
from fivefold.kernels.device import numbered, on
from fivefold.kernels.packed_decode import Form, decode_page, decode_reference

ON_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


def where(memory: torch.Tensor, rows: int) -> torch.Tensor:
    """Addresses of the pages, `memory [pages, ...]`, in units of 16 bytes: int64 `[rows, columns]`."""
    step = memory[0].numel() * memory.element_size()
    at = memory.data_ptr() + step * torch.arange(len(memory), device=memory.device)
    return (at // 16).view(rows, -1)


@pytest.mark.parametrize("path", [pytest.param(path, marks=ON_GPUS) for path in ("triton", "cuda")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_the_second_gpu(path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All kernels on the first and on the second one, the first being current."""
    from fivefold.kernels.pack import pack_reference
    from fivefold.kernels.pack import triton as pack
    from fivefold.kernels.packed_decode import triton as kernel
    from fivefold.kernels.received import received_reference
    from fivefold.kernels.received import triton as received

    monkeypatch.setenv("FIVEFOLD_KERNELS", path)
    form, rows, columns, heads = Form(2, 32, 32, 64), 3, 2, 4
    bound = 3e-3 if dtype is torch.float32 else 1.5e-2
    for index in (0, 1, 0, 1):
        device = torch.device("cuda", index)
        torch.manual_seed(index)
        assert torch.cuda.current_device() == 0 and kernel.by_cuda(form, heads, device) == (path == "cuda")
        keys, values = (torch.randn(rows * columns, form.tokens, 64, device=device) for _ in range(2))
        fields = pack.pack_pages(form, keys, values, 0, None)
        for got, expected in zip(fields, pack_reference(form, keys, values, 0, None)):
            assert torch.equal(got, expected)
        records = fields[0].as_strided((rows * columns, form.nbytes // 2), (form.nbytes // 2, 1))
        packed = kernel.Packed(where(records, rows), form)
        sides = [torch.randn(rows * 4, 32, 64, device=device).to(dtype) for _ in range(2)]
        exact = kernel.Exact(torch.stack([where(side, rows) for side in sides], 2), dtype)
        spans = torch.tensor(
            [[0, 300, 0, 0, 100, 0, 0, 0], [7, 512, 4, 50, 128, 10, 20, 0], [0, 0, 0, 0, 1, 0, 0, 0]],
            dtype=torch.int32, device=device,
        )  # fmt: skip
        newest = [torch.randn(rows, 64, device=device).to(dtype) for _ in range(2)]
        kernel.append(*newest, spans, exact)
        dense = [side.view(rows, 128, 64) for side in sides]
        last = (spans[:, 4] - 1).long()
        for side, token in zip(dense, newest):
            assert torch.equal(side[torch.arange(rows, device=device), last], token)
        queries = torch.randn(rows, heads, 64, device=device).to(dtype)
        found, lse = kernel.decode(queries, 0.125, spans, packed, exact, with_lse=True)
        rowwise = tuple(field.unflatten(0, (rows, columns)) for field in fields)
        wanted, wanted_lse = decode_reference(queries, 0.125, spans, form, rowwise, *dense)
        assert found.device == device and (found - wanted).norm() < bound * wanted.norm()
        assert lse is not None and (lse - wanted_lse).abs().max() < 20 * bound
        picks = torch.arange(40, dtype=torch.int32, device=device).expand(rows, -1).contiguous()
        seen = torch.tensor([[0, 40, 0, 0, 0, 0, 0, 0]] * rows, dtype=torch.int32, device=device)
        found, _ = kernel.decode(queries, 0.125, seen, packed, picks=picks)
        wanted, _ = decode_reference(queries, 0.125, seen, form, rowwise)
        assert (found - wanted).norm() < bound * wanted.norm()
        unpacked = pack.unpack_pages(form, packed.table, torch.float32)
        for got, expected in zip(unpacked, decode_page(form, fields)):
            assert torch.allclose(got.flatten(0, 1), expected.flatten(0, 1), atol=1e-5)
        page = torch.zeros(rows, form.nbytes // 2, dtype=torch.int16, device=device)
        places = torch.cat([where(page, rows), torch.zeros(rows, 1, dtype=torch.int64, device=device)], 1)
        peak = pack.pack_exact(form, exact.table[:, :4].contiguous(), places, dtype)
        assert float(peak) == max(float(side.abs().max()) for side in sides)
        expected = pack_reference(form, *(side.float() for side in dense), 0, None)
        assert torch.equal(page[:, : 32 * 64], expected[0].flatten(1))
        lses = torch.full((rows, heads, 16), 5.0, device=device)
        chunk = torch.randn(rows, heads, 16, 64, device=device).to(dtype)
        sums = received.received(chunk, dense[0], lses, 0.125)
        assert torch.allclose(sums, received_reference(chunk, dense[0], lses, 0.125), rtol=2e-2, atol=1e-4)
        torch.cuda.synchronize(device)


def test_what_is_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is switched for tensors of the current device, and a device without a number has the current one's."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    cpu, second = torch.device("cpu"), torch.device("cuda", 1)
    assert on(cpu) is devices._NOTHING and on(second) is devices._NOTHING and isinstance(on(cpu), nullcontext)
    other = on(torch.device("cuda", 0))
    assert isinstance(other, torch.cuda.device) and other.idx == 0
    assert numbered(torch.device("cuda")) == second == numbered(second) and numbered(cpu) == cpu
