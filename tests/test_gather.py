"""Exact pages that lie anywhere, made dense by a kernel."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICES, KERNELS
from fivefold.attention.fused import gather_fused
from fivefold.attention.tables import tables_of
from fivefold.kernels.gather.reference import PAGE, gather_pages
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec, Pools

kernel = pytest.importorskip("fivefold.kernels.gather.triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 33, 96])
def test_the_kernel_is_the_reference(device: str, dtype: torch.dtype, tokens: int, touched) -> None:
    """Pages in no order, the last one not full; a table that is part of a wider one."""
    dim, columns = 16, -(-tokens // PAGE)
    pages = torch.randn(12, PAGE, dim).to(dtype)
    order = torch.randperm(12).view(2, 3, 2)
    there = pages.to(device)
    touched.append(there)
    wide = (there.data_ptr() + order * PAGE * dim * dtype.itemsize).to(device) >> 4
    found = kernel.gather_pages(wide[:, :columns], tokens, dim, dtype)
    named = kernel.gather_pages(wide[:, :columns], tokens, dim, dtype, torch.tensor([1, 1, 0], device=device))
    assert all(torch.equal(mine, theirs[[1, 1, 0]]) for mine, theirs in zip(named, found))
    part = kernel.gather_pages(wide, max(1, tokens - PAGE), dim, dtype, slice(1, 2), int(tokens > PAGE))
    assert all(torch.equal(mine, theirs[1:2, -mine.shape[1] :]) for mine, theirs in zip(part, found))
    here = (pages.data_ptr() + order * PAGE * dim * dtype.itemsize) >> 4
    for mine, theirs in zip(found, gather_pages(here[:, :columns], tokens, dim, dtype)):
        assert mine.dtype == dtype and torch.equal(mine.cpu(), theirs)


@pytest.mark.parametrize("device", DEVICES)
def test_tables_that_have_grown_are_what_new_ones_are(device: str, monkeypatch) -> None:
    """Although only what the ones before did not know is sent."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    spec = LayerSpec(0, 1, 2, 2, 16, torch.float32, torch.device(device))
    layer = LayerCache(spec, Pools(), [Extent(), Extent(4, 90)])
    layer.start(2)
    for count in (900, 40, 4000, 700):
        for group in layer.groups:
            x = torch.randn(2, len(group.rows), count, 16, device=device)
            layer.append(group, x[0], x[1])
        before, held = layer.bank.mirror, [int(group.bounds.exact_pages) for group in layer.groups]
        tables = tables_of(layer.bank)
        tables.sync()
        assert (tables is before) is (count in (40, 700))
        found = tables.tables[0].clone()
        layer.bank.mirror = None
        fresh = tables_of(layer.bank)
        fresh.sync()
        for group, columns in zip(layer.groups, held):
            assert torch.equal(found[group.rows_tensor, :columns], fresh.tables[0][group.rows_tensor, :columns])
        tables.bind(layer.bank)
        tables.sync()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extent", [Extent(), Extent(4, 60)])
def test_what_a_layer_holds(device: str, extent: Extent, monkeypatch) -> None:
    """All that the exact tier holds, and from some page on, also after it has grown and slid; heads of a kind that are
    a run, and that are none."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    spec = LayerSpec(0, 1, 4, 4, 16, torch.float32, torch.device(device))
    layer = LayerCache(spec, Pools(), [Extent(4, 90), extent, Extent(4, 90), extent])
    layer.start(2)
    for count in (50, 70, 9):
        for group in layer.groups:
            x = torch.randn(2, len(group.rows), count, 16, device=device)
            layer.append(group, x[0], x[1])
        for group in layer.groups:
            with layer.bank.atomic():
                held = int(group.bounds.exact_tokens)
                wanted = [torch.cat(group.exact_parts(name), 1) for name in ("keys", "values")]
                for first in (0, 1):
                    found = gather_fused(group, first, held - first * PAGE)
                    for mine, theirs in zip(found, wanted):
                        assert torch.equal(mine, theirs[:, first * PAGE :])
