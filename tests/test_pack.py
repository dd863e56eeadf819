"""Tokens into pages: the kernel gives the bytes of its reference."""

from __future__ import annotations

import importlib

import pytest
import torch

from conftest import DEVICES
from fivefold.kernels.pack import pack_reference
from fivefold.kernels.packed_decode import Form
from fivefold.kernels.packed_decode.reference import decode_page

pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.pack.triton")
FORMS = [(2, 32, 32), (2, 64, 64), (2, 128, 128), (3, 32, 32), (4, 32, 32), (4, 64, 64), (4, 128, 128), (8, 32, 32)]


def tokens(pages: int, count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Channels of different scale and offset, ties between two codes, constant groups, a large number."""
    x = torch.randn(pages, count, dim) * torch.rand(dim) * 30 + torch.randn(dim)
    x[:, :, 3] = torch.arange(count) % 7 / 2
    x[:, :, 5] = -2049.0
    x[0, 0, 7], x[0, 1] = 60000.0, 1.25
    return x.to(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group", "channels"), FORMS)
def test_the_bytes_are_those_of_the_reference(device: str, bits: int, group: int, channels: int, dtype) -> None:
    torch.manual_seed(bits + group)
    form = Form(bits, group, min(channels, 64), 64)
    keys, values = (tokens(3, form.tokens, 64, dtype) for _ in range(2))
    whole = pack_reference(form, keys, values, 0, None)
    for slot in range(0, form.tokens, max(group, form.tokens // group // 2 * group)):
        # From `slot` on, over what stood there; and up to it, with nothing behind.
        for part, opened in ((slice(slot, None), whole if slot else None), (slice(0, slot or group), None)):
            start = part.start if opened is not None else 0
            picked = slice(start, part.stop)
            wanted = pack_reference(form, keys[:, picked], values[:, picked], start, opened)
            there = None if opened is None else tuple(x.to(device) for x in opened)
            found = kernel.pack_pages(form, keys[:, picked].to(device), values[:, picked].to(device), start, there)
            for mine, theirs in zip(found, wanted):
                assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
                assert torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "group", "channels"), FORMS)
@pytest.mark.parametrize("dim", [64, 128])
def test_unpacked_pages_are_those_of_the_reference(device: str, bits: int, group: int, channels: int, dim: int) -> None:
    """Of some columns of a table, in no order."""
    torch.manual_seed(bits + group)
    form = Form(bits, group, min(channels, dim), dim)
    keys, values = (tokens(6, form.tokens, dim, torch.float32) for _ in range(2))
    fields = tuple(x.to(device) for x in pack_reference(form, keys, values, 0, None))
    records = torch.cat([x.reshape(6, -1).view(torch.int16) for x in fields], 1)
    order = torch.tensor([[3, 0, 5], [1, 4, 2]])
    table = (records.data_ptr() + order * form.nbytes).to(device) // 16
    found = kernel.unpack_pages(form, table[:, 1:], torch.float32)
    for mine, theirs in zip(found, decode_page(form, fields)):
        wanted = theirs[order[:, 1:].to(device)].flatten(1, 2)
        # One rounding less where product and sum are one instruction.
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
