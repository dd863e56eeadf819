"""The decoding kernel against its reference: in Triton's interpreter on a CPU, on the real thing with `-m gpu`."""

from __future__ import annotations

import importlib
import itertools
import os
import random

import numpy as np
import pytest
import torch

from fivefold.kernels.packed_decode import Form, decode_reference, schedule
from fivefold.methods.bits.kivi import Kivi, KiviCodec
from fivefold.store.layer_cache import LayerSpec, exact_layout
from fivefold.store.pages import PagePool

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.packed_decode.triton")

tl = pytest.importorskip("triton.language")


@kernel.triton.jit
def _rows_of(starts, out, rows, R: tl.constexpr):
    tl.store(out + tl.program_id(0), kernel._row(starts, rows, R))


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
PATHS = [pytest.param("cuda", marks=ON_GPU), pytest.param("triton", marks=ON_GPU)]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the kernels are compiled for the GPU here")),
    *PATHS,
]


@pytest.fixture
def device(request, monkeypatch) -> str:
    """A path of the kernels as a parameter, the device it is for as a value."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", "auto" if request.param == "cpu" else request.param)
    return "cpu" if request.param == "cpu" else "cuda"


FORMS = [(2, 32, 32), (2, 64, 64), (2, 128, 128), (3, 32, 32), (4, 32, 32), (4, 128, 128), (8, 32, 32), (8, 64, 64)]


class Tier:
    """Pages of random tokens in a pool, scattered, over two slabs, with poison in what no table names."""

    def __init__(self, rows: int, columns: int, layout, device: str, encode) -> None:
        self.pool = PagePool(layout, torch.device(device))
        count = max(1, rows * columns)
        first, second = self.pool.allocate(count + 3), self.pool.allocate(count)
        for part in layout.fields:
            for ids in (first, second):
                bad = torch.full((len(ids), *part.shape), 1, dtype=part.dtype, device=device)
                self.pool.write(part.name, ids, bad * (float("nan") if part.dtype.is_floating_point else -1))
        picked = np.random.permutation(np.concatenate([first, second]))[: rows * columns]
        self.table = picked.reshape(rows, columns)
        self.fields = encode(rows * columns)
        for name, x in self.fields.items():
            self.pool.write(name, picked, x)

    def rows(self, name: str) -> torch.Tensor:
        return self.fields[name].unflatten(0, self.table.shape)

    def addresses(self, name: str) -> torch.Tensor:
        assert (self.pool.addresses(name, self.table) % 16 == 0).all()
        return torch.from_numpy(self.pool.addresses(name, self.table) // 16).to(self.pool.device)


def numbers(shape: tuple[int, ...], device: str) -> torch.Tensor:
    """Normal numbers with a few channels that are 20 times as large, and an offset per channel."""
    scale = torch.where(torch.rand(shape[-1], device=device) < 0.05, 20.0, 1.0)
    return (torch.randn(shape, device=device) + torch.randn(shape[-1], device=device)) * scale


def packed_tier(rows: int, columns: int, form: Form, device: str) -> Tier:
    spec = LayerSpec(0, 1, 1, 1, form.head_dim, torch.float32, torch.device(device))
    codec: KiviCodec = Kivi(bits=form.bits, group=form.group).codec(spec)
    assert codec.form == form and codec.layout.nbytes == form.nbytes
    shape = (form.tokens, form.head_dim)
    return Tier(
        rows, columns, codec.layout, device,
        lambda n: codec.encode(numbers((n, *shape), device), numbers((n, *shape), device), 0, None),
    )  # fmt: skip


def exact_tier(rows: int, columns: int, head_dim: int, dtype: torch.dtype, device: str) -> Tier:
    shape = (32, head_dim)
    return Tier(
        rows, columns, exact_layout(head_dim, dtype), device,
        lambda n: {name: numbers((n, *shape), device).to(dtype) for name in ("keys", "values")},
    )  # fmt: skip


def check(
    device: str,
    rows: int,
    heads: int,
    form: Form,
    columns: int,
    exact_columns: int,
    spans: list[tuple[int, ...]],
    dtype: torch.dtype = torch.float16,
    bound: float = 3e-3,
    programs: tuple[int, int] | None = None,
    size: float = 1.0,
) -> None:
    """size: of the queries; their scores are as large as ever."""
    packed = packed_tier(rows, columns, form, device) if columns else None
    exact = exact_tier(rows, exact_columns, form.head_dim, dtype, device) if exact_columns else None
    queries = (torch.randn(rows, heads, form.head_dim, device=device) * size).to(dtype if size == 1 else torch.float32)
    span = torch.zeros(rows, kernel.SPAN, dtype=torch.int32, device=device)
    span[:, : len(spans[0])] = torch.tensor(spans, dtype=torch.int32, device=device)
    scaling = form.head_dim**-0.5 / size
    pages, fields, slots, keys, values = None, None, None, None, None
    if packed is not None:
        pages = kernel.Packed(packed.addresses("key_words"), form)
        fields = tuple(packed.rows(part.name) for part in packed.pool.layout.fields)
    if exact is not None:
        slots = kernel.Exact(torch.stack([exact.addresses("keys"), exact.addresses("values")], 2), dtype)
        keys, values = (exact.rows(name).flatten(1, 2) for name in ("keys", "values"))
    found, lse = kernel.decode(queries, scaling, span, pages, slots, with_lse=True, programs=programs)
    wanted, wanted_lse = decode_reference(queries, scaling, span, form, fields, keys, values)
    assert found.dtype == queries.dtype and found.shape == queries.shape
    some = wanted_lse.isfinite().all(1)
    assert (found[~some] == 0).all() and (lse[~some] == -torch.inf).all()
    if some.any():
        error = (found.double() - wanted)[some].norm() / wanted[some].norm()
        assert error < bound, float(error)
        if dtype is torch.bfloat16:  # the same numbers, without the rounding of what comes out
            found = kernel.decode(queries.float(), scaling, span, pages, slots, programs=programs)[0]
            error = (found.double() - wanted)[some].norm() / wanted[some].norm()
            assert error < 3e-3, float(error)
        assert (lse.double() - wanted_lse)[some].abs().max() < 20 * bound


@pytest.mark.parametrize("device", DEVICES[:2], indirect=True)
@pytest.mark.parametrize("columns", [(3, 0), (0, 12), (3, 12)], ids=["packed", "exact", "both"])
def test_parts_of_few_rows_are_merged_some_channels_at_a_time(device, columns: tuple[int, int], monkeypatch) -> None:
    """More parts of a row than are read at once; as where a GPU has more processors than there are heads."""
    torch.manual_seed(4)
    np.random.seed(4)
    monkeypatch.setattr(kernel, "processors", lambda device: 1000)
    form, (packed, exact) = Form(4, 32, 32, 64), columns
    spans = [(0, packed * 128, 0, 0, exact * 32), (min(packed, 1) * 70, packed * 128, 0, 3, exact * 32)]
    check(device, 2, 3, form, packed, exact, spans, programs=(6, 6))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("bits", "group", "channels"), FORMS)
def test_packed_and_exact_pages(device: str, bits: int, group: int, channels: int, head_dim: int) -> None:
    torch.manual_seed(bits * 1000 + group + head_dim)
    np.random.seed(0)
    form = Form(bits, group, min(channels, head_dim), head_dim)
    page = form.tokens
    # Whole pages and a group less; a window that begins inside a page; nothing packed; one exact token.
    spans = [(0, 2 * page - group, 0, 0, 33), (page + 5, 2 * page, 3, 40, 64), (0, 0, 0, 0, 1)]
    check(device, 3, 4, form, 2, 2, spans, programs=(5, 5))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 3, 9, 16])
def test_heads_and_dtypes(device: str, heads: int, dtype: torch.dtype) -> None:
    torch.manual_seed(heads)
    form = Form(4, 32, 32, 64)
    bound = 3e-3 if dtype is torch.float32 else 1.5e-2
    check(device, 2, heads, form, 1, 1, [(0, 96, 0, 0, 17), (0, 32, 0, 0, 32)], dtype, bound)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_wide_heads(device: str) -> None:
    torch.manual_seed(0)
    check(device, 1, 2, Form(2, 32, 32, 256), 1, 1, [(0, 224, 0, 0, 9)])


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_queries_that_float16_does_not_hold(device: str, size: float) -> None:
    torch.manual_seed(3)
    check(device, 2, 3, Form(4, 32, 32, 64), 1, 1, [(0, 96, 0, 0, 17), (5, 9, 0, 0, 0)], size=size)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_tiers_alone_and_rows_that_see_nothing(device: str) -> None:
    torch.manual_seed(1)
    form = Form(2, 32, 32, 64)
    check(device, 2, 4, form, 2, 0, [(0, 300, 0, 0, 0), (0, 0, 0, 0, 0)], programs=(5, 5))
    check(device, 2, 4, form, 0, 5, [(0, 0, 4, 120, 150), (0, 0, 0, 0, 0)], programs=(3, 3))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_sinks_that_fade_out(device: str) -> None:
    """Exact slots that are seen between the sinks and the window, or among either."""
    torch.manual_seed(2)
    form = Form(2, 32, 32, 64)
    for fading in [(4, 30), (2, 70), (100, 130), (0, 0)]:
        check(device, 2, 3, form, 1, 5, [(0, 64, 4, 120, 150, *fading), (0, 0, 0, 90, 99, 0, 7)], programs=(3, 3))


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_programs_find_their_rows(device) -> None:
    """Among more rows than are looked at at once, of which some have no program; the last two are for nobody."""
    for rows, size in ((1, 1), (3, 4), (4, 4), (5, 4), (13, 4), (16, 4), (30, 8)):
        shares = torch.from_numpy(np.random.default_rng(rows).integers(0, 3, rows))
        starts = torch.cat([shares.new_zeros(1), shares.cumsum(0)]).int()
        count = int(starts[-1])
        found = torch.full((count + 2,), -1, dtype=torch.int32, device=device)
        _rows_of[(count + 2,)](starts.to(device), found, rows, R=size)
        assert found.tolist() == [*torch.arange(rows).repeat_interleave(shares).tolist(), rows, rows]
    for rows in (1, 2, 255, 257, 1024, 65536, 65537, 1000000):
        size = schedule.searched(rows)
        assert size**2 >= rows and size == kernel.triton.next_power_of_2(size) <= max(256, 2 * rows**0.5)


def test_work_lists() -> None:
    """No more programs than there are, none with more pages than needed, and no row without any."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        rows, most = int(rng.integers(1, 20)), int(rng.integers(20, 300))
        pages = rng.integers(0, rng.choice([3, 50, 2000]), (1, 2, rows))
        starts = kernel.starts_of(pages, (most, 20))
        shares = np.diff(starts, axis=-1)
        assert (starts[..., 0] == 0).all() and (starts[..., -1] <= (most, 20)).all()
        assert ((shares > 0) == (pages > 0)).all() and (shares <= pages).all()
        for kind, programs in enumerate((most, 20)):
            each = next(n for n in itertools.count(1) if (-(-pages[0, kind] // n)).sum() <= programs)
            largest = (-(-pages[0, kind] // np.maximum(1, shares[0, kind]))).max()
            assert largest <= each + max(1, each // 32)
    assert np.diff(kernel.starts_of(np.array([[2048] * 8, [0] * 8]), (264, 0)))[0].tolist() == [33] * 8


def test_programs_get_a_share_that_is_worth_beginning_for() -> None:
    """Where the device is filled more than once, and not of rows so different that the longest would begin last."""
    many = schedule.Programs(2112, 0, 264, 32)
    for rows, most in (([133] * 64, 264), ([133, 9] * 32, 264), ([133] * 1024, 4096), ([5, 0, 0, 7] * 16, 264)):
        found = np.diff(schedule.starts_of(np.array([rows, 0 * np.array(rows)]), many)[0])
        assert (found >= np.minimum(rows, 1)).all() and found.sum() <= most
    different, beside = np.array([list(range(8, 264)), [0] * 256]), many._replace(exact=1056)
    assert np.array_equal(schedule.starts_of(different, beside), schedule.starts_of(different, beside[:2]))
    spans = np.array([[0, 600, 0, 0, 33], [300, 512, 0, 0, 0], [0, 0, 0, 0, 0], [7, 7, 0, 0, 64]])
    assert kernel.pages_of(spans, 256).tolist() == [[3, 1, 0, 0], [1, 0, 0, 1]]
    assert kernel.pages_of(spans, 256, joined=True).tolist() == [[5, 1, 0, 2], [0, 0, 0, 0]]


def test_programs_of_exact_pages_alone(monkeypatch) -> None:
    """Two sequences fill the device once; of more, programs have some tiles each, and nobody waits for the last."""
    monkeypatch.setattr(kernel, "processors", lambda device: 132)
    few, several, packed = (
        kernel.programs_for(rows, torch.device("cpu"), form)
        for rows, form in ((16, None), (24, None), (24, Form(4, 32, 32, 64)))
    )
    assert few.exact == packed.exact == 528 and several.exact == 4224 and several.packed == 528
    assert [one.alone for one in (few, several, packed)] == [False, True, False]
    many = schedule.Programs(528, 4224, 528, 1, True)
    for rows in (9, 16, 24, 64, 100, 128, 133, 300, 512, 640, 1000, 2048):
        for tiles in (1, 3, 8, 16, 64, 72, 80, 118, 128, 256, 512, 4096):
            pages, most = np.array([[0] * rows, [tiles] * rows]), max(4224, 2 * rows)
            parts = np.diff(schedule.starts_of(pages, many._replace(exact=most))[1])
            assert parts.min() >= 1 and parts.max() <= tiles and parts.sum() <= most
            # Never a few more than fill the device, but where each tile is a program's; and not much fewer.
            assert not 528 < parts.sum() < 1.75 * 528 or parts.min() == tiles
            assert parts.sum() > 0.75 * 528 or parts.min() == tiles
    for rows, tiles, found in ((64, 512, 4224), (64, 64, 512), (64, 80, 512), (512, 16, 2048), (640, 16, 1920)):
        pages = np.array([[0] * rows, [tiles] * rows])
        assert np.diff(schedule.starts_of(pages, many)[1]).sum() == found


def test_programs_that_take_rows_in_turn() -> None:
    """Every page of every row is some program's, none has more than its length, and parts have no gaps between them."""
    rng = np.random.default_rng(1)
    for _ in range(100):
        rows, once = int(rng.integers(1, 40)), int(rng.integers(1, 30))
        pages = rng.integers(0, rng.choice([2, 50, 3000]), rows) * (rng.random(rows) < 0.8)
        starts, begins = schedule.in_turn(pages, once)
        length, parts, done = max(1, -(-begins[-1] // once)), list[int](), np.zeros(rows, dtype=int)
        for program in range(once):
            place = program * length
            for row in range(rows):
                first, last = max(place - begins[row], 0), min(place + length - begins[row], pages[row])
                if first < last:
                    assert first == done[row]
                    done[row] = last
                    parts.append(int(starts[row] + program - begins[row] // length))
        assert (done == pages).all() and parts == list(range(starts[-1])) and len(parts) < once + rows
        assert begins[-1] <= once * length


@pytest.mark.parametrize("device", PATHS[:1], indirect=True)
@pytest.mark.parametrize(("bits", "head_dim"), [(2, 128), (4, 128), (4, 64), (8, 64)])
def test_rows_in_turn_on_a_gpu(device: str, bits: int, head_dim: int) -> None:
    """Packed and exact pages of rows from none to many, by few programs; those that there is nothing for end too."""
    torch.manual_seed(bits)
    np.random.seed(bits)
    form, programs = Form(bits, 32, 32, head_dim), schedule.Programs(60, 0, 12, 4)
    spans = [(0, 32 * (row * row % 97), 2, 9, row * 37 % 300) for row in range(20)]
    pages = kernel.pages_of(np.array(spans), form.tokens, joined=True)
    assert schedule.starts_of(pages, programs)[1].any()
    columns = -(-32 * 96 // form.tokens)
    check(device, 20, 4, form, columns, 10, spans, torch.bfloat16, 1.5e-2, programs)


def test_rows_are_taken_in_turn_where_they_are_different() -> None:
    """By a kernel that does packed and exact pages; of thousands of rows each gets programs of its own."""
    many = schedule.Programs(2112, 0, 264, 32)
    different, alike = np.geomspace(8, 264, 256).astype(int), np.full(256, 60)
    found = schedule.starts_of(np.stack([[different, 0 * different], [alike, 0 * alike]]), many)
    assert np.array_equal(found[0], schedule.in_turn(different, 264)) and found[0, 1].any() and not found[1, 1].any()
    thousands = np.array([np.tile(different, 8), np.zeros(2048, dtype=int)])
    for pages, programs in (
        ([different, 0 * different], many[:2]),
        ([different, 0 * different], many._replace(exact=1056)),
        (thousands, many._replace(packed=4096)),
    ):
        assert not schedule.starts_of(np.array(pages), programs)[1].any()


def test_many_rows_are_cut_only_where_one_is_very_long() -> None:
    """Heads of two kinds in a large batch: a part more begins and ends once more, and ends little sooner."""
    programs = schedule.Programs(16384, 0, 528, 32)
    pages = np.zeros((2, 8192), dtype=int)
    pages[0] = np.where(np.arange(8192) % 8 < 4, 20, 12)
    assert schedule.starts_of(pages, programs)[0, -1] == 8192
    pages[0, 77] = 4096
    found = np.diff(schedule.starts_of(pages, programs)[0])
    assert found[77] > 100 and found.sum() <= 16384


@pytest.mark.parametrize("device", PATHS, indirect=True)
@pytest.mark.parametrize("part", range(10))
def test_random_shapes(device: str, part: int) -> None:
    for trial in range(20 * part, 20 * part + 20):
        random.seed(trial)
        torch.manual_seed(trial)
        bits, group, channels = random.choice(FORMS)
        head_dim = random.choice([64, 128])
        form = Form(bits, group, min(channels, head_dim), head_dim)
        rows, heads, columns, exact = (random.randint(1, n) for n in (9, 16, 20, 12))
        spans = []
        for _ in range(rows):
            high = random.randint(0, columns * form.tokens // 32) * 32
            stop = random.randint(0, exact * 32)
            low = random.choice([0, random.randint(0, high)])
            sink, start = random.choice([(0, 0), (random.randint(0, 8), random.randint(0, stop))])
            fading = random.choice([0, random.randint(0, stop)])
            spans.append((low, high, sink, start, stop, fading, random.choice([0, random.randint(fading, stop)])))
        dtype = random.choice([torch.float16, torch.float32, torch.bfloat16])
        check(device, rows, heads, form, columns, exact, spans, dtype, 1.5e-2 if dtype is torch.bfloat16 else 3e-3)


@pytest.mark.parametrize("device", PATHS, indirect=True)
def test_which_kernel_attends(device: str) -> None:
    """CUDA C++ where it can, and if it is not forbidden."""
    wanted = os.environ["FIVEFOLD_KERNELS"] == "cuda"
    assert kernel.by_cuda(Form(2, 32, 32, 128), 8, torch.device(device)) == wanted
    for form, heads in ((Form(2, 32, 32, 256), 4), (Form(2, 32, 32, 128), 9)):
        assert not kernel.by_cuda(form, heads, torch.device(device))
