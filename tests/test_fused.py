"""A decoding step by kernels, from the engine: the choice of path, the tables, the spans."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from conftest import DEVICES, KERNELS
from fivefold.attention import attend_chunk, attend_picked, attend_step
from fivefold.attention.decode import exact_bias, exact_tokens, packed_bias
from fivefold.attention.fused import pack_due, spans, why_not
from fivefold.errors import CacheStateError, NonFiniteError
from fivefold.kernels import choice, compiled
from fivefold.kernels.choice import choose
from fivefold.methods.bits.kivi import Kivi
from fivefold.store.layer_cache import LayerCache, LayerSpec, Pools
from fivefold.store.tiers import Extent, Geometry, Packing

pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("one_thread")


def make(device: str, extents: list[Extent], codec: Kivi | None, dtype: torch.dtype = torch.float32) -> LayerCache:
    spec = LayerSpec(0, 1, len(extents), 4 * len(extents), 64, dtype, torch.device(device))
    return LayerCache(spec, Pools(), extents, codec and codec.codec(spec), codec.residual if codec else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("extents", "codec"),
    [
        ([Extent()] * 2, Kivi(bits=4, residual=32)),
        ([Extent(), Extent(4, 100)], Kivi(bits=2, residual=40)),
        ([Extent(40, 70), Extent(0, 33)], None),
    ],
)
def test_a_step_is_that_of_the_reference(device, extents, codec, monkeypatch) -> None:
    """Over page boundaries, packing, sliding windows, forks and crops."""
    torch.manual_seed(0)
    layer = make(device, extents, codec)
    layer.start(2)

    def append(tokens: int, settle: bool = True) -> None:
        for cohort in layer.cohorts:
            layer.append(cohort, *torch.randn(2, len(cohort.rows), tokens, 64, device=device), settle=settle)

    def compare() -> None:
        for cohort in layer.cohorts:
            queries = torch.randn(len(cohort.rows), 4, 64, device=device)
            monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
            wanted = attend_step(layer, cohort, queries, 0.125)[0]
            monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
            assert why_not(layer, queries.device, 4) is None
            found = attend_step(layer, cohort, queries, 0.125)[0]
            assert (found - wanted).norm() < 3e-3 * wanted.norm()
            assert cohort.exact_table is not None

    for tokens in (1, 30, 150):
        append(tokens)
        compare()
    for _ in range(3):
        append(1, settle=False)
        compare()
        append(1)
    before = layer.fork()
    append(200)
    compare()
    layer = before
    compare()
    layer.crop(1)
    append(33)
    compare()


def test_spans_are_the_slots_that_the_reference_sees() -> None:
    random.seed(0)
    for _ in range(300):
        extent = random.choice([Extent(), Extent(random.randint(0, 70), random.randint(1, 200))])
        packing = random.choice([None, Packing(32, random.randint(0, 64), 128)])
        geometry = Geometry(extent)
        for tokens in (random.randint(1, 400), 1, random.randint(1, 90), 1):
            geometry = geometry.appended(tokens)
            if random.random() < 0.7:
                geometry = geometry.settled(packing)
            low, high, sink, start, stop = spans(geometry)
            slot = torch.arange(exact_tokens(geometry))
            assert stop == len(slot) and high == geometry.packed_stop - geometry.packed_base
            bias = exact_bias(geometry, torch.device("cpu"))
            seen = torch.ones_like(slot, dtype=torch.bool) if bias is None else bias == 0
            assert torch.equal((slot < sink) | (slot >= start), seen)
            bias = packed_bias(geometry, torch.device("cpu"))
            slot = torch.arange(high)
            seen = torch.ones_like(slot, dtype=torch.bool) if bias is None else bias[:high] == 0
            assert torch.equal(slot >= low, seen)


def test_which_path_and_why(monkeypatch) -> None:
    cpu = torch.device("cpu")
    for asked, path in (("auto", "cpp"), ("cpp", "cpp"), ("reference", "reference")):
        monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
        found = choose(cpu)
        assert found.path == path and found.possible and found.why and not found.triton
    monkeypatch.setenv("FIVEFOLD_KERNELS", "fast")
    layer = make("cpu", [Extent()], None)
    with pytest.raises(CacheStateError, match="FIVEFOLD_KERNELS=fast is none of auto, reference, cpp"):
        why_not(layer, cpu, 4)


def test_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "lacking", lambda: "no compiler")
    assert [choice._choose.__wrapped__(asked, torch.device("cpu"))[::2] for asked in ("auto", "cpp")] == [
        ("reference", True), ("reference", False)
    ]  # fmt: skip
    assert not choice._choose.__wrapped__("cpp", torch.device("cuda")).possible


def test_which_path_on_a_gpu(monkeypatch) -> None:
    """CUDA C++ where it can be compiled, else Triton; only what was asked for by name is an error."""
    found = {}
    monkeypatch.setattr(choice, "_lacking", lambda device: None)
    for lacking in (None, "no compiler"):
        monkeypatch.setattr(choice, "_lacks_compiler", lambda device, lacking=lacking: lacking)
        for asked in ("auto", "triton", "cuda"):
            # Past its memory, which is not to keep this.
            found[asked, lacking] = choice._choose.__wrapped__(asked, torch.device("cuda"))
    assert [one.path for one in found.values()] == ["cuda", "triton", "cuda", "triton", "triton", "triton"]
    assert [one.possible for one in found.values()] == [True] * 5 + [False]
    assert "no compiler" in found["auto", "no compiler"].why and "no compiler" in found["cuda", "no compiler"].why


def test_what_the_compiler_lacks(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    assert choice._lacks_compiler(torch.device("cuda")) == "not cuda-bindings, which compiles CUDA C++"


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_beyond_the_kernels_take_the_reference(device, monkeypatch) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    layer = make(device, [Extent()], Kivi(bits=4, residual=32))
    layer.start(1)
    (cohort,) = layer.cohorts
    tokens = torch.randn(2, 1, 80, 64, device=device)
    tokens[0, 0, 5, 3] = 2000.0
    layer.append(cohort, *tokens)
    assert why_not(layer, tokens.device, 4) == "keys or values reach 2000, more than the kernels' 750"
    out, _ = attend_step(layer, cohort, torch.randn(1, 4, 64, device=device), 0.125)
    assert out.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (3, 32)])
def test_groups_are_packed_where_they_lie_to_the_same_bytes(device, dtype, bits, group, monkeypatch) -> None:
    """In all layers together, in open pages and fresh ones, shared ones, and behind a sliding window."""
    codec = Kivi(bits=bits, group=group, residual=32)
    extents = [Extent(), Extent(4, 200)]
    layers = [make(device, extents, codec, dtype) for _ in range(4)]
    for layer in layers:
        layer.start(2)

    def append(tokens: int, settle: bool) -> None:
        new = torch.randn(2, 2, 2, 2, tokens, 64, device=device, dtype=dtype)
        for number, layer in enumerate(layers):
            for cohort, (keys, values) in zip(layer.cohorts, new[number % 2]):
                layer.append(cohort, keys, values, settle=settle)

    packed = 0
    append(100, True)
    forks = [layer.fork() for layer in layers]
    for number in range(270):
        append(1, False)
        before = [cohort.geometry.packed_stop for cohort in layers[0].cohorts]
        monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
        pack_due(layers[:2], 0)
        packed += before != [cohort.geometry.packed_stop for cohort in layers[0].cohorts]
        monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
        pack_due(layers[2:], 0)
        for layer in layers:
            for cohort in layer.cohorts:
                layer.append(cohort, None, None)
        if number % 45 == 0:
            for one, other in zip(layers[:2], layers[2:]):
                for mine, theirs in zip(one.cohorts, other.cohorts):
                    assert mine.geometry == theirs.geometry
                    if not mine.packed.shape[1]:
                        continue
                    for name, field in one.packed_fields(mine, 0, mine.packed.shape[1]).items():
                        assert torch.equal(field, other.packed_fields(theirs, 0, theirs.packed.shape[1])[name])
                    assert torch.equal(one.dense_part(mine, 0), other.dense_part(theirs, 0))
    assert packed >= 270 // group
    for one, other in zip(forks[:2], forks[2:]):  # nobody has written into what the forks share
        for mine, theirs in zip(one.cohorts, other.cohorts):
            assert torch.equal(one.dense_part(mine, 1), other.dense_part(theirs, 1))
    for layer in [*layers, *forks]:
        layer.free()
    assert all(pool.pages_in_use == 0 for layer in layers for pool in layer.pools)


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_that_cannot_be_packed_is_said_and_stays(device, monkeypatch) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    layer = make(device, [Extent()], Kivi(bits=4, residual=32))
    layer.start(1)
    (cohort,) = layer.cohorts
    tokens = torch.randn(2, 1, 64, 64, device=device)
    tokens[1, 0, 5, 3] = float("nan")
    layer.append(cohort, *tokens, settle=False)
    before = cohort.geometry
    pack_due([layer], 0)
    assert cohort.geometry == before and cohort.packed.shape[1] == 0 and layer.packed_pool.pages_in_use == 0
    with pytest.raises(NonFiniteError, match="values to be packed reach nan"):
        layer.append(cohort, None, None)
    assert cohort.geometry == before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "codec", [None, Kivi(bits=4, residual=32), Kivi(bits=2, group=64, residual=32), Kivi(bits=3, residual=32)]
)
def test_picked_tokens_are_those_of_the_reference(device, dtype, codec, monkeypatch) -> None:
    """With some that a row does not hold, and the newest among them or not; packed ones beside the whole exact tier."""
    torch.manual_seed(0)
    layer = make(device, [Extent()] * 2, codec, dtype)
    layer.start(2)
    (cohort,) = layer.cohorts
    layer.append(cohort, *torch.randn(2, 4, 332, 64, device=device, dtype=dtype))
    layer.append(cohort, *torch.randn(2, 4, 1, 64, device=device, dtype=dtype), settle=False)
    assert (cohort.packed.shape[1] > 0) == (codec is not None)
    positions = torch.stack([torch.randperm(333, device=device)[:130] for _ in range(4)])
    positions[0, :5], positions[1, 7] = -1, 332
    queries = torch.randn(4, 4, 64, device=device, dtype=dtype)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    wanted = attend_picked(layer, cohort, queries, 0.125, positions.clone())[0]
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    found = attend_picked(layer, cohort, queries, 0.125, positions.clone())[0]
    assert cohort.exact_table is not None and (cohort.packed_table is None) == (codec is None)
    assert (found.float() - wanted.float()).norm() < (
        3e-3 if dtype is torch.float32 else 1.5e-2
    ) * wanted.float().norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extents", [[Extent()] * 2, [Extent(4, 150)] * 2])
def test_a_chunk_over_packed_pages_is_that_of_the_reference(device, extents, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = make(device, extents, Kivi(bits=4, residual=32))
    layer.start(2)
    (cohort,) = layer.cohorts
    layer.append(cohort, *torch.randn(2, 4, 300, 64, device=device))
    queries, (keys, values) = torch.randn(4, 4, 50, 64, device=device), torch.randn(2, 4, 50, 64, device=device)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    wanted, wanted_lse = attend_chunk(layer, cohort, queries, keys, values, 0.125)
    assert cohort.packed_table is None
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    found, lse = attend_chunk(layer, cohort, queries, keys, values, 0.125)
    assert cohort.packed_table is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)
