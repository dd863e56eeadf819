"""Tokens into pages: the kernels give the bytes of their reference."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from conftest import DEVICES
from fivefold.errors import NonFiniteError
from fivefold.kernels import compiled
from fivefold.kernels import pack as package
from fivefold.kernels.choice import choose
from fivefold.kernels.pack import cpu, pack_pages, pack_reference
from fivefold.kernels.pack.reference import fields_of
from fivefold.kernels.packed_decode import Form
from fivefold.kernels.packed_decode.reference import decode_page
from fivefold.methods.bits.kivi import Kivi
from fivefold.store import pack as packer
from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec, Pools

interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="without a GPU Triton interprets, of tensors on a CPU"
)
needs_cpp = pytest.mark.skipif(compiled.lacking() is not None, reason="no C++ compiler")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FORMS = [(2, 32, 32), (2, 64, 64), (2, 128, 128), (3, 32, 32), (4, 32, 32), (4, 64, 64), (4, 128, 128), (8, 32, 32)]
# Each is a kernel of its own.
SHAPES = [
    *((Form(bits, group, min(channels, 64), 64), F32) for bits, group, channels in FORMS),
    (Form(2, 32, 32, 128), BF16),
    (Form(2, 256, 32, 32), F16),
    (Form(2, 32, 8, 8), BF16),
    (Form(3, 160, 40, 80), F16),
    (Form(3, 32, 24, 24), F32),
    (Form(4, 128, 96, 96), BF16),
    (Form(4, 64, 64, 256), F16),
    (Form(8, 64, 32, 32), BF16),
    (Form(8, 32, 16, 48), F32),
]


def triton_kernel() -> ModuleType:
    pytest.importorskip("triton", reason="needs Triton")
    from fivefold.kernels.pack import triton

    return triton


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
    kernel = triton_kernel()
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
    kernel = triton_kernel()
    torch.manual_seed(bits + group)
    form = Form(bits, group, min(channels, dim), dim)
    keys, values = (tokens(6, form.tokens, dim, torch.float32) for _ in range(2))
    fields = tuple(x.to(device) for x in pack_reference(form, keys, values, 0, None))
    records = torch.cat([x.reshape(6, -1).view(torch.int16) for x in fields], 1)
    order = torch.tensor([[3, 0, 5], [1, 4, 2]])
    table = (records.data_ptr() + order * form.nbytes).to(device) // 16
    found = kernel.unpack_pages(form, table[:, 1:], torch.float32)
    named = kernel.unpack_pages(form, table[:, 1:], torch.float32, torch.tensor([1, 0, 1], device=device))
    assert all(torch.equal(mine, theirs[[1, 0, 1]]) for mine, theirs in zip(named, found))
    count = form.tokens + 5  # of a run of rows, from a column on, up to a token within a page
    part = kernel.unpack_pages(form, table, torch.float32, slice(1, 2), 1, count)
    assert all(torch.equal(mine, theirs[1:2, :count]) for mine, theirs in zip(part, found))
    for mine, theirs in zip(found, decode_page(form, fields)):
        wanted = theirs[order[:, 1:].to(device)].flatten(1, 2)
        # One rounding less where product and sum are one instruction.
        torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))


def hard(pages: int, count: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """As `tokens`, and more: numbers as large as float16 holds and as small as float32 does, zeros of both signs,
    scales that are subnormal or zero, constants that float16 does not hold. Nine pages or more, which differ."""
    x = tokens(pages, count, dim, F32)
    pairs = [(-65504.0, 65504.0), (65000.0, -65000.0), (0.0, -0.0), (1e-7, -1e-7), (6e-8, 3e-5), (1e-30, -1e-40)]
    for channel, ends in enumerate(pairs):
        x[:, :, channel] = torch.tensor(ends)[torch.randint(2, (pages, count))]
    x[:, :, 6] = torch.tensor([[-1e-9, 3e-8, 2049.0, -0.1, 0.0, -0.0][page % 6] for page in range(pages)])[:, None]
    for page in range(pages):
        # The same of tokens, whose values are groups.
        for token in range(0, count, 3):
            low, high = pairs[(page + token) % len(pairs)]
            x[page, token] = torch.where(torch.rand(dim) < 0.5, low, high)
            if token % 2:
                x[page, token + 1 :: 24] *= 10.0 ** -torch.randint(0, 12, (1,)).item()
    # Ties, which a quotient that is off by one bit decides: half of the numbers lie halfway between two codes; then
    # the scales do, between two that float16 holds.
    for page, steps in enumerate((3, 7, 15, 255) * 2, 1):
        for own in (x[page, :, 7, None], x[page, 2::8].T):
            scale = (torch.randint(1024, 2048, own.shape[1:]) + (page > 4) / 2) / 1024
            own.copy_(torch.randint(0, 2 * steps + 1, own.shape) / 2 * scale)
            own[::8], own[1::8] = 0.0, steps * scale
    # bfloat16 has larger numbers than the pages hold.
    return x.clamp(-65280.0 if dtype == BF16 else -65504.0, 65280.0 if dtype == BF16 else 65504.0).to(dtype)


def same(found: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> None:
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert torch.equal(mine.contiguous().view(torch.int16), theirs.contiguous().view(torch.int16))


def check_pages(form: Form, dtype: torch.dtype, kernel: ModuleType, seed: int = 0) -> None:
    """Tokens side by side, from every slot on: over what stood there, and with nothing before or behind."""
    torch.manual_seed(seed)
    keys, values = (hard(9, form.tokens, form.head_dim, dtype) for _ in range(2))
    whole = pack_reference(form, keys, values, 0, None)
    for slot in range(0, form.tokens, form.group):
        for stop in {slot + form.group, form.tokens}:
            part = slice(slot, stop)
            for opened in (whole, None) if slot else (None,):
                wanted = pack_reference(form, keys[:, part], values[:, part], slot, opened)
                same(kernel.pack_pages(form, keys[:, part], values[:, part], slot, opened), wanted)


@needs_cpp
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("form", "dtype"), SHAPES)
def test_the_bytes_on_a_cpu_are_those_of_the_reference(form: Form, dtype: torch.dtype) -> None:
    check_pages(form, dtype, cpu)


class Scattered:
    """Exact pages and packed ones anywhere in memory, among others that nobody may write into.

    keys, values: `[pages, planes * 32, head_dim]`; planes: the one from which on each page is filled.
    """

    def __init__(self, form: Form, keys: torch.Tensor, values: torch.Tensor, planes: list[int]) -> None:
        pages, count = len(keys), keys.shape[1] // 32
        halves = torch.stack([x.unflatten(1, (-1, 32)) for x in (keys, values)], 2).flatten(0, 2)
        self.exact = torch.full((2 * len(halves), *halves.shape[1:]), float("nan"), dtype=keys.dtype)
        where = torch.randperm(len(self.exact))[: len(halves)]
        self.exact[where] = halves
        step = self.exact.stride(0) * self.exact.itemsize
        self.sources = (self.exact.data_ptr() + where * step).view(pages, count, 2) // 16
        self.memory = torch.randint(-(2**15), 2**15, (2 * pages + 1, form.nbytes // 2), dtype=torch.int16)
        self.where = torch.randperm(2 * pages)[:pages]
        self.places = torch.stack([(self.memory.data_ptr() + self.where * form.nbytes) // 16, torch.tensor(planes)], 1)

    def wanted(self, form: Form, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The memory when they are packed."""
        out = self.memory.clone()
        for page, place, plane in zip(range(len(keys)), self.where.tolist(), self.places[:, 1].tolist()):
            own = fields_of(form, out[place : place + 1])
            opened = tuple(x.clone() for x in own) if plane else None
            packed = pack_reference(form, keys[page, None], values[page, None], plane * 32, opened)
            for field, x in zip(own, packed):
                field.copy_(x)
        return out


def check_exact(form: Form, dtype: torch.dtype, count: int, pages: int) -> None:
    """Of `count` planes in each of so many pages, from a plane of its own; nothing else is written."""
    planes = (pages * list(range(0, form.tokens // 32 - count + 1, form.group // 32)))[:pages]
    keys, values = (hard(pages, 32 * count, form.head_dim, dtype) for _ in range(2))
    scattered = Scattered(form, keys, values, planes)
    wanted = scattered.wanted(form, keys, values)
    peak = cpu.pack_exact(form, scattered.sources, scattered.places, dtype)
    assert torch.equal(scattered.memory, wanted)
    assert peak.dtype == F32 and peak.tolist() == [max(keys.abs().max().item(), values.abs().max().item())] * pages


@needs_cpp
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("form", "dtype"), SHAPES)
def test_pages_are_packed_where_they_lie(form: Form, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    share, total = form.group // 32, form.tokens // 32
    for count in {share, total // share // 2 * share or share, total}:
        check_exact(form, dtype, count, 12)


@needs_cpp
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_share_the_pages(threads: int) -> None:
    """So many that it is worth it; the largest number is that of all of them."""
    form, before = Form(8, 32, 32, 128), torch.get_num_threads()
    torch.manual_seed(threads)
    torch.set_num_threads(threads)
    try:
        check_exact(form, F32, 1, 80)
        keys, values = torch.randn(2, 80, 64, 128)
        for page in (0, 41, 79):
            keys[page, 3, 3] *= 1000
            pages = Scattered(form, keys, values, [0] * 80)
            assert cpu.pack_exact(form, pages.sources, pages.places, F32)[page] == keys.abs().max()
        same(cpu.pack_pages(form, keys, values, 0, None), pack_reference(form, keys, values, 0, None))
    finally:
        torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("odd", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_is_an_infinite_peak(dtype: torch.dtype, odd: float) -> None:
    """Wherever it stands, and pages beside it and planes before it are as they would be."""
    form = Form(4, 32, 32, 64)
    torch.manual_seed(0)
    for place in range(12):
        both = torch.stack([tokens(4, 32, 64, dtype) for _ in range(2)])
        side, token, channel = place % 2, [0, 31, 17][place % 3], [0, 63, 21, 32][place % 4]
        good = both.clone()
        both[side, 2, token, channel] = odd
        pages = Scattered(form, *both, [0, 1, 2, 3])
        wanted = fields_of(form, pages.wanted(form, *good))
        old = fields_of(form, pages.memory.clone())
        assert cpu.pack_exact(form, pages.sources, pages.places, dtype).tolist() == [float("inf")] * len(pages.places)
        found = fields_of(form, pages.memory)
        rest = pages.where[[0, 1, 3]]
        same(tuple(x[rest] for x in found), tuple(x[rest] for x in wanted))
        for number, rows in enumerate((None, 2, 2, None, 2, 2)):
            mine, theirs = (x[number][pages.where[2]] for x in (found, old))
            if rows is None:  # words: the planes before
                assert torch.equal(mine & 0xFF, theirs & 0xFF)
            else:
                assert torch.equal(mine[:rows].view(torch.int16), theirs[:rows].view(torch.int16))


@needs_cpp
def test_older_planes_never_change_while_others_are_packed() -> None:
    """Somebody else may be reading them."""
    form = Form(2, 32, 32, 64)
    torch.manual_seed(0)
    keys, values = (tokens(64, 64, 64, F32) for _ in range(2))
    pages = Scattered(form, keys, values, [4] * 64)
    fields = fields_of(form, pages.memory[pages.where[:1]])  # a copy: shapes only
    assert fields[0].shape == (1, 32, 64)
    kept = pages.memory[:, : 32 * 64] & 0xFF
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            wrong.append(not np.array_equal(pages.memory.numpy()[:, : 32 * 64] & 0xFF, kept.numpy()))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(100):
        pages.memory[:, : 32 * 64] |= -256  # so that packing has bits to change
        cpu.pack_exact(form, pages.sources, pages.places, F32)
    done.set()
    reader.join()
    assert wrong and not any(wrong)


@needs_cpp
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("/ (float)MASK", "* (1.0f / MASK)"),
        ("(x - zero) / step", "(x - zero) * (1.0f / step)"),
        ("vec{}), all(MASK)) + 12582912.0f", "vec{}), all(MASK)) + 0.5f + 12582911.75f"),
        ("if (found)", "if (false)"),
        ("high > vec{} ? high : all(1)", "high > 6.2e-5f ? high : all(1)"),
        ("const shorts start = narrowed(low);\n    low = halved(start);", "const shorts start = narrowed(low);"),
        ("high = halved(step);", "high = (high - low) / (float)MASK;"),
        ("record[i] & kept", "record[i]"),
        ("if (!first) {", "if (false) {"),
        ("", ""),  # compiled as the other kernels are
    ],
)
def test_a_wrong_kernel_is_found(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = cpu._SOURCE.read_text()
    assert source.count(right) == 1 or not right
    monkeypatch.setattr(compiled, "_STRICT", compiled._STRICT if right else ())
    (tmp_path / "wrong").mkdir()
    path = tmp_path / "wrong" / "pack.cpp"
    path.write_text(source.replace(right, wrong) if right else source)
    for header in cpu._SOURCE.parent.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_SOURCE", path)
    monkeypatch.setattr(cpu, "_kernel", cpu._kernel.__wrapped__)
    with pytest.raises(AssertionError):
        check_pages(Form(4, 32, 32, 32), F32, cpu)
        check_exact(Form(4, 32, 32, 32), F32, 1, 12)


@needs_cpp
def test_the_kernel_packs_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", "auto")
    assert choose(torch.device("cpu")).path == "cpp" or torch.cuda.is_available()
    monkeypatch.setenv("FIVEFOLD_KERNELS", "cpp")
    paths: list[str] = []
    for module, path in ((package, "reference"), (cpu, "cpp")):
        name = "pack_reference" if path == "reference" else "pack_pages"
        by = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, by=by, path=path: paths.append(path) or by(*args))
    for form, dtype, wanted in (
        (Form(2, 32, 32, 64), F32, "cpp"),
        (Form(2, 32, 24, 24), BF16, "cpp"),
        (Form(2, 32, 4, 64), F32, "reference"),
        (Form(2, 32, 12, 12), F16, "reference"),
        (Form(2, 32, 32, 64), torch.float64, "reference"),
    ):
        keys, values = (tokens(2, 64, form.head_dim, dtype) for _ in range(2))
        same(pack_pages(form, keys, values, 0, None), pack_reference(form, keys, values, 0, None))
        assert paths.pop() == wanted and not paths
    monkeypatch.setenv("FIVEFOLD_KERNELS", "reference")
    pack_pages(Form(2, 32, 32, 64), *torch.randn(2, 2, 64, 64), 0, None)
    assert paths == ["reference"]


def layers_of(dim: int, dtype: torch.dtype, codec: Kivi, extents: list[Extent], count: int) -> list[LayerCache]:
    pools = Pools()
    spec = LayerSpec(0, 1, len(extents), 4 * len(extents), dim, dtype, torch.device("cpu"))
    return [LayerCache(spec, pools, extents, codec.codec(spec), codec.residual) for _ in range(count)]


@needs_cpp
@pytest.mark.parametrize(
    ("dim", "dtype", "bits", "group"),
    [(64, F32, 2, 32), (64, BF16, 4, 64), (24, BF16, 3, 32), (96, F16, 2, 32), (40, F32, 8, 64), (64, F16, 4, 32)],
)
def test_rows_are_packed_by_the_kernel_to_the_bytes_of_the_codec(dim, dtype, bits, group, monkeypatch) -> None:
    """Of two layers together, in open pages and fresh ones, shared ones, and behind a sliding window."""
    torch.manual_seed(0)
    codec, extents = Kivi(bits=bits, group=group, residual=32), [Extent(), Extent(4, 200)]
    sides = [layers_of(dim, dtype, codec, extents, 2) for _ in range(2)]
    for layer in (*sides[0], *sides[1]):
        layer.start(2)
    banks = [Bank.united(side, None) for side in sides]
    calls: list[int] = []
    pack_exact = cpu.pack_exact
    monkeypatch.setattr(cpu, "pack_exact", lambda *args: calls.append(len(args[1])) or pack_exact(*args))

    def append(tokens: int, advance: bool) -> None:
        new = torch.randn(2, 2, 2, 2, tokens, dim, dtype=dtype)
        for side in sides:
            for number, layer in enumerate(side):
                for group, (keys, values) in zip(layer.groups, new[number]):
                    layer.append(group, keys, values, advance=advance)

    def compare() -> None:
        for one, other in zip(*sides):
            for mine, theirs in zip(one.groups, other.groups, strict=True):
                assert mine.bounds == theirs.bounds
                if mine.packed.shape[1]:
                    wanted = theirs.packed_fields(0, theirs.packed.shape[1])
                    for name, field in mine.packed_fields(0, mine.packed.shape[1]).items():
                        assert torch.equal(field.view(torch.int16), wanted[name].view(torch.int16))
                assert torch.equal(mine.dense_part(0), theirs.dense_part(0))

    append(100, True)
    forks = [fork for bank in banks for fork in bank.fork().layers]
    calls.clear()
    packed = 0
    for _ in range(270):
        append(1, False)
        before = [group.bounds.packed_stop for group in sides[0][0].groups]
        for bank, asked in zip(banks, ("cpp", "reference")):
            monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
            bank.advance(bank.rows_of())
        if before != [group.bounds.packed_stop for group in sides[0][0].groups]:
            packed += 1
            compare()
        assert len(calls) == packed
    assert packed >= 270 // group and max(calls) == (8 if group == 32 else 4)
    for one, other in zip(forks[:2], forks[2:]):  # nobody has written into what the forks share
        for mine, theirs in zip(one.groups, other.groups, strict=True):
            assert torch.equal(mine.dense_part(1), theirs.dense_part(1))


@pytest.mark.parametrize("path", [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize(
    ("dim", "dtype", "bits", "group", "sizes"),
    [
        (64, F32, 2, 32, (100, 37, 1, 300, 64, 33)),
        (64, BF16, 4, 64, (64, 64, 31, 500)),
        (128, F16, 3, 32, (1, 31, 400)),
        (64, BF16, 2, 128, (140, 200, 129)),
    ],
)
def test_chunks_are_packed_by_the_kernel_to_the_bytes_of_the_codec(
    dim, dtype, bits, group, sizes, path, monkeypatch
) -> None:
    """Tokens of exact pages and of a chunk, planes that lie in both, several pages at once, and what forks share."""
    torch.manual_seed(0)
    codec, extents = Kivi(bits=bits, group=group, residual=32), [Extent(), Extent(40, 260)]
    sides = [layers_of(dim, dtype, codec, extents, 1)[0] for _ in range(2)]
    for side in sides:
        side.start(2)
    encoded: list[str] = []
    encode = type(sides[0].codec).encode

    def noted(self: Any, *args: Any) -> Any:
        encoded.append(os.environ["FIVEFOLD_KERNELS"])
        return encode(self, *args)

    monkeypatch.setattr(type(sides[0].codec), "encode", noted)
    forks = []
    for size in sizes:
        forks.append([side.fork() for side in sides])
        before = [fork.groups[0].dense_part(0) for fork in forks[-1]]
        # Values as models make them: heads side by side in memory.
        new = torch.randn(2, 2, size, 2, dim).to(dtype).transpose(2, 3).flatten(1, 2)
        for side, asked in zip(sides, (path, "reference")):
            monkeypatch.setenv("FIVEFOLD_KERNELS", asked)
            for group in side.groups:
                side.append(group, *(x[group.rows_tensor] if len(side.groups) > 1 else x for x in new))
        for one, other in zip(sides[0].groups, sides[1].groups, strict=True):
            assert one.bounds == other.bounds
            wanted = other.packed_fields(0, other.packed.shape[1]) if other.packed.shape[1] else {}
            for name, field in wanted.items():
                mine = one.packed_fields(0, one.packed.shape[1])[name]
                assert torch.equal(field.view(torch.int16), mine.view(torch.int16)), name
            assert torch.equal(one.dense_part(0), other.dense_part(0))
            assert torch.equal(one.dense_part(1), other.dense_part(1))
        for fork, wanted in zip(forks[-1], before):
            assert torch.equal(fork.groups[0].dense_part(0), wanted)
    assert sides[0].bank.peak.min() > 0
    assert path not in encoded and "reference" in encoded


@needs_cpp
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), 70000.0])
def test_rows_that_cannot_be_packed_are_said_by_the_codec_and_stay(odd: float, monkeypatch) -> None:
    monkeypatch.setenv("FIVEFOLD_KERNELS", "cpp")
    (layer,) = layers_of(64, F32, Kivi(bits=4, residual=32), [Extent()], 1)
    layer.start(1)
    for place in (0, 40):  # a fresh page, and one that is open
        new = torch.randn(2, 1, 64, 64)
        if place:
            new[1, 0, 5, 3] = odd
        layer.append(layer.groups[0], *new, advance=False)
        if not place:
            layer.bank.advance(layer.bank.rows_of())
    before, wanted = layer.groups[0].bounds, layer.groups[0].dense_part(0)
    assert before.packed_stop and layer.bank.peak.max() < packer.LARGEST
    with pytest.raises(NonFiniteError, match="values to be packed reach"):
        layer.bank.advance(layer.bank.rows_of())
    assert layer.groups[0].bounds == before
    torch.testing.assert_close(layer.groups[0].dense_part(0), wanted, rtol=0, atol=0, equal_nan=True)
