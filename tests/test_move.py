"""Pages and tokens in many slabs, moved by a kernel that is given their addresses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import DEVICES
from fivefold.kernels.move import reference
from fivefold.store import pages as store
from fivefold.store.layout import Field, PageLayout
from fivefold.store.pages import PagePool
from fivefold.store.transaction import Transaction

kernel = pytest.importorskip("fivefold.kernels.move.triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("nbytes", [16, 48, 4112])
def test_the_kernel_is_the_reference(device: str, nbytes: int, touched) -> None:
    """Numbers of more than one block, places in no order."""
    memory = torch.randint(-(1 << 31), 1 << 31, (12, nbytes // 4), dtype=torch.int64).to(torch.int32)
    there = memory.to(device)
    touched.append(there)
    order = torch.tensor([7, 0, 11, 3])
    place = [(x.data_ptr() + order * nbytes) >> 4 for x in (memory, there)]
    found, wanted = kernel.gather(place[1].to(device), nbytes), reference.gather(place[0], nbytes)
    assert torch.equal(found.cpu(), wanted) and torch.equal(wanted, memory[order])
    new = torch.randn(4, 2, nbytes // 8)
    values = new.to(device)
    touched.append(values)
    kernel.scatter(place[1].to(device), values)
    reference.scatter(place[0], new)
    assert torch.equal(there.cpu(), memory) and torch.equal(memory[order].view(torch.float32), new.flatten(1))


def pool(device: str, record: bool, dtype: torch.dtype) -> tuple[PagePool, np.ndarray]:
    """Pages of three slabs, in no order."""
    fields = Field("words", (32, 16), torch.int16, "codes"), Field("scale", (32, 8), dtype, "scales")
    made = PagePool(PageLayout("some", 32, fields, record), torch.device(device))
    pages = np.concatenate([made.allocate(70) for _ in range(3)])
    return made, np.random.default_rng(0).permutation(pages)[:9]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("record", [False, True])
def test_what_a_pool_reads_and_writes(device: str, record: bool, dtype: torch.dtype, monkeypatch, touched) -> None:
    """By addresses as slab by slab: whole pages, one of their fields, tokens, and what a rollback brings back."""
    (one, pages), (other, same) = (pool(device, record, dtype) for _ in range(2))
    assert (pages == same).all() and len(set((pages >> store.SLAB_SHIFT).tolist())) == 3
    touched += [
        x for _, slab in one._live() for x in (slab.tensors.values() if slab.records is None else [slab.records])
    ]
    slots = np.arange(len(pages)) * 3
    words = torch.randint(-99, 99, (len(pages), 32, 16)).to(torch.int16)
    new = {"words": [words[:4], words[4:]], "scale": [torch.randn(len(pages), 32, 8)]}
    new = {name: [x.to(device) for x in parts] for name, parts in new.items()}
    token, seen, launched = torch.randn(len(pages), 8, device=device).to(dtype), [], list[int]()
    for mine, by_address in ((one, True), (other, False)):
        monkeypatch.setattr(store, "by_address", lambda device, said=by_address: said)
        launched.clear()
        for name in ("gather", "scatter"):
            real = getattr(kernel, name)
            monkeypatch.setattr(kernel, name, lambda *args, real=real: launched.append(1) or real(*args))
        mine.write_fields(pages, new)
        if not record:
            mine.write_tokens("scale", pages, slots, token)
        found = [mine.read_tokens(name, pages, slots) for name in ("words", "scale")]
        change = Transaction()
        change.keep(mine, pages[:5])
        found += [mine.read("scale", pages), *mine.fetch_all(mine.locate(pages.reshape(3, 3))).values()]
        mine.write("words", pages, torch.zeros_like(words, device=device))
        assert not mine.read("words", pages).any()
        change.rollback()
        found.append(mine.read("words", pages))
        assert bool(launched) == by_address
        seen.append([x.cpu() for x in found])
        monkeypatch.undo()
    assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(*seen, strict=True))
    assert torch.equal(seen[0][0], words[np.arange(len(pages)), slots]) and torch.equal(seen[0][5][:5], words[:5])
