"""A decoding step by kernels, from the engine: the choice of path, the tables, the spans."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from conftest import DEVICES, KERNELS, quick
from fivefold.attention import attend_chunk, attend_picked, attend_step
from fivefold.attention.decode import exact_bias, packed_bias
from fivefold.attention.fused import Alike, why_not
from fivefold.errors import CacheStateError, NonFiniteError
from fivefold.kernels import choice, compiled
from fivefold.kernels.choice import choose
from fivefold.methods.bits.kivi import Kivi
from fivefold.store import pack as packer
from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Bounds, Extent, Packing
from fivefold.store.spec import LayerSpec, Pools

pytest.importorskip("triton", reason="needs Triton")
from fivefold.kernels.pack import triton as pack_kernel

pytestmark = pytest.mark.usefixtures("one_thread")
# As `DEVICES`, with the kernels to ask for there: those in C++ run on every CPU.
PATHS = [
    *(pytest.param(*part.values, KERNELS, marks=part.marks, id=f"{part.values[0]}-{KERNELS}") for part in DEVICES),
    pytest.param("cpu", "cpp", id="cpu-cpp"),
]


def make(
    device: str,
    extents: list[Extent],
    codec: Kivi | None,
    dtype: torch.dtype = torch.float32,
    pools: Pools | None = None,
) -> LayerCache:
    spec = LayerSpec(0, 1, len(extents), 4 * len(extents), 64, dtype, torch.device(device))
    return LayerCache(spec, pools or Pools(), extents, codec and codec.codec(spec), codec.residual if codec else 0)


@pytest.mark.parametrize(("device", "asked"), PATHS)
@pytest.mark.parametrize(
    ("extents", "codec"),
    [
        ([Extent()] * 2, Kivi(bits=4, residual=32)),
        pytest.param([Extent(), Extent(4, 100)], Kivi(bits=2, residual=40), marks=pytest.mark.slow),
        ([Extent(40, 70), Extent(0, 33)], None),
        pytest.param(
            [Extent(40, 70).intersect(Extent(4, 150)), Extent(4, 90).intersect(Extent(64, 33))],
            Kivi(bits=4, residual=0),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_step_is_that_of_the_reference(device, asked, extents, codec, monkeypatch) -> None:
    """Over page boundaries, packing, sliding windows, forks and crops."""
    torch.manual_seed(0)
    layer = make(device, extents, codec)
    layer.start(2)

    def append(tokens: int, advance: bool = True) -> None:
        for group in layer.groups:
            layer.append(group, *torch.randn(2, len(group.rows), tokens, 64, device=device), advance=advance)

    def compare() -> None:
        for group in layer.groups:
            queries = torch.randn(len(group.rows), 4, 64, device=device)
            monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
            wanted = attend_step(group, queries, 0.125)[0]
            monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
            assert why_not(layer, queries.device, 4) is None
            layer.bank.mirror = layer.bank.mirror if random.random() < 0.8 else None
            found = attend_step(group, queries, 0.125)[0]
            assert (found - wanted).norm() < 3e-3 * wanted.norm()
            assert layer.bank.mirror is not None  # the tables that kernels read

    for tokens in (1, 30, 150):
        append(tokens)
        compare()
    for _ in range(3):
        append(1, advance=False)
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
    late = 0
    for _ in range(400):
        one, other = (Extent(random.randint(0, 70), random.randint(1, 200)) for _ in range(2))
        extent = random.choice([Extent(), one, one.intersect(other)])
        packing = random.choice([None, Packing(32, random.randint(0, 64), 128)])
        bounds = Bounds.empty(extent)
        for tokens in (random.randint(1, 400), 1, random.randint(1, 90), 1):
            bounds = bounds.appended(tokens)
            if random.random() < 0.7:
                bounds = bounds.advanced(packing)
            span = bounds.span()
            slot = torch.arange(bounds.exact_tokens)
            assert span.stop == len(slot) and span.packed_stop == bounds.packed_stop - bounds.packed_base
            bias = exact_bias(bounds, torch.device("cpu"))
            seen = torch.ones_like(slot, dtype=torch.bool) if bias is None else bias == 0
            mine = (slot < span.sinks) | (slot >= span.first)
            assert torch.equal(mine | ((slot >= span.late_first) & (slot < span.late_stop)), seen)
            late += not torch.equal(mine, seen)
            bias = packed_bias(bounds, torch.device("cpu"))
            slot = torch.arange(int(span.packed_stop))
            seen = torch.ones_like(slot, dtype=torch.bool) if bias is None else bias[: len(slot)] == 0
            assert torch.equal(slot >= span.packed_first, seen)
    assert late > 20


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
def test_large_numbers_are_attended_on_token_by_token(device, monkeypatch) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    layer = make(device, [Extent(), Extent(4, 150)], Kivi(bits=4, residual=32))
    layer.start(2)
    tokens = torch.randn(2, 4, 300, 64, device=device)
    tokens[:, 2, 250, 3] = tokens[0, 1, 200, 7] = 60000.0
    for group in layer.groups:
        layer.append(group, *tokens[:, group.rows_tensor.to(device)])
    assert why_not(layer, tokens.device, 4) == "keys or values reach 60000, more than the kernels' 750"
    queries = torch.randn(4, 4, 64, device=device)
    queries[..., 3] = queries[..., 7] = 1e-3
    monkeypatch.setattr("fivefold.attention.decode.attend_packed", None)  # nobody goes through plain PyTorch
    got = [attend_step(group, queries[group.rows_tensor.to(device)], 0.125)[0] for group in layer.groups]
    monkeypatch.undo()
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    for group, out in zip(layer.groups, got, strict=True):
        want, _ = attend_step(group, queries[group.rows_tensor.to(device)], 0.125)
        assert (out - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("by", ["kernel", "codec"])
@pytest.mark.parametrize("device", DEVICES)
def test_only_the_rows_that_hold_large_numbers_lose_the_kernels(device, by, monkeypatch) -> None:
    """And only as long as they are there: a sequence that goes takes the loss with it, to whatever cache it joins."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    if by == "codec":
        monkeypatch.setattr(packer, "_by_kernel", lambda *args: False)
    pools = Pools()
    layers = [make(device, [Extent(), Extent()], Kivi(bits=4, residual=32), pools=pools) for _ in range(2)]
    tokens = torch.randn(2, 2, 4, 200, 64, device=device)
    tokens[0, 1, 3, 5, 3], tokens[1, 1, 2, 199, 0] = -2000.0, 3000.0  # packed, and still exact
    for layer, new in zip(layers, tokens.unbind(1)):
        layer.start(2)
        layer.append(layer.groups[0], *new)
    apart = Alike(dict(enumerate(layers)), {})
    assert apart.stands(dict(enumerate(layers)))
    bank = Bank.united(layers, None)
    assert not apart.stands(dict(enumerate(layers)))
    for layer, new in zip(layers, tokens.unbind(1)):
        packed = new[:, :, : int(layer.groups[0].bounds.packed_stop)].abs().amax((0, 2, 3)).cpu()
        assert torch.equal(torch.from_numpy(bank.peak)[layer.base : layer.base + 4], packed)

    alike = Alike(dict(enumerate(layers)), {})

    def lost() -> list[bool]:
        assert alike.stands(dict(enumerate(layers)))
        each = alike.whys()
        return ["2000" in (each[number] or "") for number in range(2)]

    assert lost() == [False, True]
    forked = [layer.fork() for layer in layers]
    assert not alike.stands(dict(enumerate(forked)))
    bank.select(np.array([0]))
    assert lost() == [False, False] and forked[1].bank.peaks().max() == 2000
    bank.free()
    assert not bank.peaks().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 64), (3, 32)])
def test_groups_are_packed_where_they_lie_to_the_same_bytes(device, dtype, bits, group, monkeypatch) -> None:
    """In all layers together, in open pages and fresh ones, shared ones, and behind a sliding window; by the kernel and
    by the codec, from one packer."""
    codec, size = Kivi(bits=bits, group=group, residual=32), group
    extents, pools = [Extent(), Extent(4, 200)], [Pools(), Pools()]
    layers = [make(device, extents, codec, dtype, pools[number // 2]) for number in range(4)]
    for layer in layers:
        layer.start(2)
    banks = [Bank.united(pair, None) for pair in (layers[:2], layers[2:])]
    launches = []
    pack_exact = pack_kernel.pack_exact
    monkeypatch.setattr(pack_kernel, "pack_exact", lambda *args: launches.append(args[1]) or pack_exact(*args))

    def append(tokens: int, advance: bool) -> None:
        new = torch.randn(2, 2, 2, 2, tokens, 64, device=device, dtype=dtype)
        for number, layer in enumerate(layers):
            for group, (keys, values) in zip(layer.groups, new[number % 2]):
                layer.append(group, keys, values, advance=advance)

    packed = 0
    append(100, True)
    forks = [fork for bank in banks for fork in bank.fork().layers]
    for number in range(270):
        append(1, False)
        before = [group.bounds.packed_stop for group in layers[0].groups]
        for bank, asked in zip(banks, (KERNELS, "reference")):
            monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
            bank.advance(bank.rows_of())
        packed += before != [group.bounds.packed_stop for group in layers[0].groups]
        assert len(launches) == packed
        if number % 45 == 0:
            for one, other in zip(layers[:2], layers[2:]):
                for mine, theirs in zip(one.groups, other.groups, strict=True):
                    assert mine.bounds == theirs.bounds
                    if not mine.packed.shape[1]:
                        continue
                    wanted = theirs.packed_fields(0, theirs.packed.shape[1])
                    for name, field in mine.packed_fields(0, mine.packed.shape[1]).items():
                        assert torch.equal(field, wanted[name])
                    assert torch.equal(mine.dense_part(0), theirs.dense_part(0))
    assert packed >= 270 // size
    # Rows of both layers; behind their sinks' page, groups of two pages are due at other times.
    assert max(len(sources) for sources in launches) == (8 if size == 32 else 4)
    for one, other in zip(forks[:2], forks[2:]):  # nobody has written into what the forks share
        for mine, theirs in zip(one.groups, other.groups, strict=True):
            assert torch.equal(mine.dense_part(1), theirs.dense_part(1))
    for layer in (layers[0], layers[2], forks[0], forks[2]):
        layer.free()
    assert all(pool.pages_in_use == 0 for some in pools for pool in some)


@pytest.mark.parametrize("device", DEVICES)
def test_a_group_that_cannot_be_packed_is_said_and_stays(device, monkeypatch) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    layer = make(device, [Extent()], Kivi(bits=4, residual=32))
    layer.start(1)
    (group,) = layer.groups
    tokens = torch.randn(2, 1, 64, 64, device=device)
    tokens[1, 0, 5, 3] = float("nan")
    layer.append(group, *tokens, advance=False)
    before, pages = layer.groups[0].bounds, layer.groups[0].exact.tolist()
    for advance in (
        lambda: layer.bank.advance(layer.bank.rows_of()),
        lambda: layer.append(layer.groups[0], None, None),
    ):
        with pytest.raises(NonFiniteError, match="values to be packed reach nan"):
            advance()
        (group,) = layer.groups
        assert group.bounds == before and group.packed.shape[1] == 0 and layer.packed_pools[0].pages_in_use == 0
        assert group.exact.tolist() == pages and layer.exact_pool.pages_in_use == 2


@pytest.mark.parametrize(("device", "asked"), PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "codec", quick([None, Kivi(bits=4, residual=32), Kivi(bits=2, group=64, residual=32), Kivi(bits=3, residual=32)], 2)
)
def test_picked_tokens_are_those_of_the_reference(device, asked, dtype, codec, monkeypatch) -> None:
    """With some that a row does not hold, and the newest among them or not; packed ones beside the whole exact tier."""
    torch.manual_seed(0)
    layer = make(device, [Extent()] * 2, codec, dtype)
    layer.start(2)
    (group,) = layer.groups
    layer.append(group, *torch.randn(2, 4, 332, 64, device=device, dtype=dtype))
    layer.append(group, *torch.randn(2, 4, 1, 64, device=device, dtype=dtype), advance=False)
    assert (group.packed.shape[1] > 0) == (codec is not None)
    positions = torch.stack([torch.randperm(333, device=device)[:130] for _ in range(4)])
    positions[0, :5], positions[1, 7] = -1, 332
    queries = torch.randn(4, 4, 64, device=device, dtype=dtype)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    wanted = attend_picked(group, queries, 0.125, positions.clone())[0]
    assert layer.bank.mirror is None
    monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
    found = attend_picked(group, queries, 0.125, positions.clone())[0]
    assert layer.bank.mirror is not None
    assert (found.float() - wanted.float()).norm() < (
        3e-3 if dtype is torch.float32 else 1.5e-2
    ) * wanted.float().norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("extents", [[Extent()] * 2, [Extent(4, 150)] * 2])
def test_a_chunk_over_packed_pages_is_that_of_the_reference(device, extents, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = make(device, extents, Kivi(bits=4, residual=32))
    layer.start(2)
    (group,) = layer.groups
    layer.append(group, *torch.randn(2, 4, 300, 64, device=device))
    queries, (keys, values) = torch.randn(4, 4, 50, 64, device=device), torch.randn(2, 4, 50, 64, device=device)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    wanted, wanted_lse = attend_chunk(group, queries, keys, values, 0.125)
    assert layer.bank.mirror is None
    monkeypatch.setenv("FIVEFOLD_KERNELS", KERNELS)
    found, lse = attend_chunk(group, queries, keys, values, 0.125)
    assert layer.bank.mirror is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-4, atol=1e-4)
