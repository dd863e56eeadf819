"""The kernel for planar pages of other kinds than KIVI's (`gear`, `mikv`, bits of their own), against its reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import quick
from fivefold.kernels.packed_decode import schedule
from fivefold.kernels.planar_decode import Planar, attend_planar, decode_planar
from fivefold.methods.bits.gear import Gear
from fivefold.methods.bits.kivi import Kivi
from fivefold.methods.bits.mikv import MiKV
from fivefold.methods.method import Method
from fivefold.store.spec import LayerSpec

pytest.importorskip("triton", reason="needs Triton")
from test_packed_decode import DEVICES, Tier, device, kernel, numbers

pytestmark = pytest.mark.usefixtures("one_thread")
__all__ = ["device"]

METHODS = [
    (Gear(), 64),
    (MiKV(), 64),
    (Gear(bits=4, group=32), 128),
    (MiKV(low=4, group=64), 128),
    (Gear(base="kcvt", rank=0), 128),
    (Gear(sparsity=0.0, rank=9), 64),
    (MiKV(low=3, balance=False, unbias=False), 64),
    (Kivi(key_bits=4, value_bits=2), 64),
    (Kivi(bits=2, unbias=True), 128),
    (Kivi(bits=4, group=64, unbias=True), 64),
]


def page_tier(method: Method, head_dim: int, rows: int, columns: int, device: str) -> tuple[Tier, Planar]:
    spec = LayerSpec(0, 1, 1, 1, head_dim, torch.float32, torch.device(device))
    codec = method.codec(spec)
    form, shape = codec.reader, (codec.layout.tokens, head_dim)
    assert isinstance(form, Planar) and form.tokens == codec.layout.tokens
    assert list(form.parts) == [part.name for part in codec.layout.fields]
    assert list(form.parts.values()) == [part.nbytes for part in codec.layout.fields]

    def encode(pages: int) -> dict[str, torch.Tensor]:
        return codec.encode(numbers((pages, *shape), device), numbers((pages, *shape), device), 0, None)

    tier = Tier(rows, columns, codec.layout, device, encode)
    decoded = codec.decode(tier.fields)
    for mine, theirs in zip(decode_planar(form, tuple(tier.fields[name] for name in form.parts)), decoded):
        assert torch.allclose(mine.float(), theirs, 1e-4, 1e-4)
    return tier, form


def packed_of(tier: Tier, form: Planar, learned: tuple[torch.Tensor, ...]) -> schedule.Packed:
    table = torch.stack([tier.addresses(name) for name in form.fields], 2)
    return schedule.Packed(table[:, :, 0].contiguous() if len(form.fields) == 1 else table, form, learned)


@pytest.mark.parametrize("device", DEVICES[:2], indirect=True)
@pytest.mark.parametrize("case", quick(METHODS, 2), ids=lambda case: f"{case[0]}-{case[1]}".replace(" ", ""))
def test_parts_are_those_of_the_reference(device, case) -> None:
    """Whole and open pages, a window that begins inside a page, and a row with nothing."""
    torch.manual_seed(1)
    np.random.seed(1)
    (method, head_dim), heads, dtype = case, 3, torch.float32
    tier, form = page_tier(method, head_dim, 3, 2, device)
    assert form.lacks(heads) is None
    page = form.tokens
    spans = torch.zeros(3, schedule.SPAN, dtype=torch.int32, device=device)
    spans[:, :2] = torch.tensor([[0, 2 * page], [page - 40, page + 32], [0, 0]])
    queries = torch.randn(3, heads, head_dim, device=device) * 1e5  # more than float16 holds
    learned = (torch.rand(3, head_dim, device=device) + 0.5,) if form.balanced else ()
    fields = tuple(tier.rows(name) for name in form.parts)
    scaling = 1e-5 * head_dim**-0.5
    wanted, wanted_lse = attend_planar(form, queries.to(dtype), scaling, spans, fields, learned)
    packed = packed_of(tier, form, learned)
    scores = torch.full((3, heads, 2 * page), torch.nan, device=device)
    settings = {"with_lse": True, "programs": (3, 1), "packed_scores": scores}
    found, lse = kernel.decode(queries.to(dtype), scaling, spans, packed, **settings)
    assert found.dtype == dtype and (found[2] == 0).all() and (lse[2] == -torch.inf).all()
    for row in range(2):
        bound = 5e-3  # keys of some channels are 20 times as large, and float16
        assert (found[row].double() - wanted[row]).norm() < bound * wanted[row].norm()
        assert torch.allclose(lse[row].double(), wanted_lse[row], 3e-4, 3e-2)
    for row in range(2):
        low, high = spans[row, :2].tolist()
        weights = (scores[row, :, low:high] * 0.6931471805599453 - lse[row, :, None]).exp()
        assert torch.allclose(weights.sum(1), torch.ones(heads, device=device), 1e-2)
        assert scores[row, :, :low].isnan().all() and scores[row, :, high:].isnan().all()
