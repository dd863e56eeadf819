"""The decoding step on a CPU (`decode.cpp`) against its reference in float64: ragged rows, pages scattered in memory,
and NaN in everything that nobody sees."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from conftest import quick
from fivefold.kernels import compiled
from fivefold.kernels.choice import choose
from fivefold.kernels.pack import pack_reference
from fivefold.kernels.packed_decode import Form, cpu, decode_page, decode_reference

pytestmark = pytest.mark.skipif(choose(torch.device("cpu")).path != "cpp", reason="no C++ compiler")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Form, dtype of exact pages, query heads, head_dim: each is a kernel of its own.
SHAPES = [
    (Form(2, 32, 32, 64), F32, 3, 64),
    (Form(2, 128, 128, 128), BF16, 4, 128),
    (Form(2, 256, 8, 8), F16, 1, 8),
    (Form(3, 32, 24, 24), F32, 5, 24),
    (Form(3, 160, 16, 80), F16, 2, 80),
    (Form(4, 64, 64, 64), F32, 16, 64),
    (Form(4, 32, 4, 40), BF16, 7, 40),
    (Form(4, 128, 6, 96), F32, 3, 96),  # channels that are no whole vectors
    (Form(8, 32, 32, 256), F32, 2, 256),
    (Form(8, 64, 1, 16), F16, 4, 16),
    (Form(8, 32, 64, 64), F32, 1, 64),
    (None, F32, 1, 64),
    (None, F16, 16, 128),
    (None, BF16, 3, 200),
    (None, F32, 13, 256),
]  # fmt: skip
BOUNDS = {F32: 5e-6, BF16: 5e-3, F16: 7e-4}
"""Of an output's error, beside values of about 1: float32 sums, and one rounding to the queries' dtype."""


@pytest.fixture(autouse=True, params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def numbers(*shape: int) -> torch.Tensor:
    """Normal numbers, an offset per channel, and a few channels that are ten times as large."""
    scale = torch.where(torch.rand(shape[-1]) < 0.05, 10.0, 1.0)
    return (torch.randn(shape) + torch.randn(shape[-1])) * scale


@dataclass
class Pages:
    """Pages in memory in any order, among others that are poison, which the tables name where nothing is seen.

    memory: `[pages, words]`; addresses: in units of 16 bytes, `[rows, columns]`.
    """

    memory: torch.Tensor
    addresses: torch.Tensor

    @classmethod
    def of(cls, contents: torch.Tensor, seen: torch.Tensor) -> Pages:
        """contents: int16 `[rows, columns, words]`; seen: bool `[rows, columns]`."""
        count = seen.numel()
        memory = torch.full((2 * count + 1, contents.shape[2]), -1, dtype=torch.int16)  # NaN, whatever is read there
        assert memory.data_ptr() % 16 == 0 and contents.shape[2] % 8 == 0
        places = torch.randperm(2 * count)[:count]
        memory[places] = contents.flatten(0, 1)
        places = torch.where(seen.flatten(), places, 2 * count).view(seen.shape)
        return cls(memory, memory.data_ptr() // 16 + places * (contents.shape[2] // 8))


def packed_pages(form: Form, seen: torch.Tensor) -> tuple[Pages, tuple[torch.Tensor, ...]]:
    """Pages of tokens of which `seen: [rows, slots]` are, and their fields `[rows, columns, *shape]`."""
    rows, columns = len(seen), seen.shape[1] // form.tokens
    shape = (rows * columns, form.tokens, form.head_dim)
    keys, values = numbers(*shape), numbers(*shape) / 10
    values[0, 0] *= 1e-5  # scales that are subnormal
    fields = [field.unflatten(0, (rows, columns)) for field in pack_reference(form, keys, values, 0, None)]
    groups = seen.unflatten(1, (columns, -1, form.group)).any(3)
    tokens = seen.unflatten(1, (columns, -1, 1, 32))
    for i in (1, 2):
        fields[i] = fields[i].masked_fill(~groups[..., None], float("nan"))
        fields[i + 3] = fields[i + 3].masked_fill(~tokens, float("nan"))
    records = torch.cat([field.contiguous().view(torch.int16).flatten(2) for field in fields], 2)
    assert records.shape[2] * 2 == form.nbytes
    return Pages.of(records, seen.unflatten(1, (columns, -1)).any(2)), tuple(fields)


def exact_pages(head_dim: int, dtype: torch.dtype, seen: torch.Tensor) -> tuple[Pages, torch.Tensor]:
    """Pages whose keys and values, `[rows, slots, head_dim]`, are NaN where they are not seen."""
    rows, slots = seen.shape
    x = (numbers(rows, slots, head_dim) / 3).to(dtype).masked_fill(~seen[..., None], float("nan"))
    contents = x.unflatten(1, (-1, 32)).flatten(2).view(torch.int16)
    return Pages.of(contents, seen.unflatten(1, (-1, 32)).any(2)), x


def attention(
    queries: torch.Tensor, scaling: float, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """In float64, over tokens `[rows, tokens, head_dim]` of which `seen [rows, tokens]` are."""
    scores = (queries.double() * scaling @ keys.double().transpose(1, 2)).masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(2)
    weights = (scores - lse[..., None]).exp().masked_fill(~seen[:, None], 0)
    return weights @ values.double().masked_fill(~seen[..., None], 0), lse


def spans_of(pick: random.Random, rows: int, packed: int, exact: int) -> list[tuple[int, ...]]:
    """Rows of any length, some empty: all, windows, windows beside sinks, and sinks that fade."""
    out = []
    for _ in range(rows):
        high = pick.choice([0, packed, pick.randint(0, packed)])
        stop = pick.choice([0, exact, pick.randint(0, exact), min(exact, 1)])
        low = pick.choice([0, pick.randint(0, high)])
        sink, start = pick.choice([(0, 0), (pick.randint(0, 40), pick.randint(0, stop)), (0, pick.randint(0, stop))])
        fading = pick.choice([(0, 0), (sink, pick.randint(sink, 70)), (pick.randint(0, 9), pick.randint(0, stop))])
        out.append((low, high, sink, start, stop, *fading, 0))
    return out


def seen_of(spans: torch.Tensor, packed: int, exact: int) -> tuple[torch.Tensor, torch.Tensor]:
    low, high, sink, start, stop, fading, faded = spans[:, :7, None].unbind(1)
    slot, at = torch.arange(packed), torch.arange(exact)
    shown = (at < sink) | (at >= start) | (at >= fading) & (at < faded)
    return (slot >= low) & (slot < high), shown & (at < stop)


def check(form: Form | None, dtype: torch.dtype, heads: int, head_dim: int, seed: int, picked: bool = False) -> None:
    """A ragged step, and the same by the reference."""
    torch.manual_seed(seed)
    pick = random.Random(seed)
    rows = pick.randint(1, 6)
    packed = pick.randint(1, 1 + 900 // form.tokens) * form.tokens if form is not None and pick.random() < 0.9 else 0
    exact = pick.choice([32, 64, 1024, 32 * pick.randint(1, 40)]) if not packed or pick.random() < 0.8 else 0
    spans = torch.tensor(spans_of(pick, rows, packed, exact), dtype=torch.int32)
    seen, shown = seen_of(spans, packed, exact)
    picks = None
    if picked:
        count, slots = pick.randint(1, 300), packed or exact
        picks = torch.randint(0, slots, (rows, count), dtype=torch.int32)
        picks[torch.rand(rows, count) < 0.3] = -1
        named = torch.zeros(rows, slots + 1, dtype=torch.bool)
        named.scatter_(1, torch.where(picks < 0, slots, picks).long(), True)
        if packed:
            seen = named[:, :-1]
        else:
            shown, spans = named[:, :-1], torch.tensor([[0, 0, 0, 0, count, 0, 0, 0]] * rows, dtype=torch.int32)
    queries = numbers(rows, heads, head_dim).to(pick.choice([F32, F32, BF16, F16]))
    scaling = head_dim**-0.5 / 4
    pages = slots_of = fields = keys = values = None
    if packed:
        assert form is not None
        memory, fields = packed_pages(form, seen)
        pages = cpu.Packed(memory.addresses, form)
    if exact:
        key_memory, keys = exact_pages(head_dim, dtype, shown)
        value_memory, values = exact_pages(head_dim, dtype, shown)
        slots_of = cpu.Exact(torch.stack([key_memory.addresses, value_memory.addresses], 2), dtype)
    found, lse = cpu.decode(queries, scaling, spans, pages, slots_of, with_lse=True, picks=picks)
    if picks is None:
        wanted, wanted_lse = decode_reference(queries, scaling, spans, form, fields, keys, values)
    else:
        at, there = picks.clamp(min=0).long()[..., None].expand(-1, -1, head_dim), picks >= 0
        if packed:
            assert form is not None and fields is not None
            both = decode_page(form, tuple(field.flatten(0, 1) for field in fields))
            all_keys, all_values = (x.view(rows, packed, -1).gather(1, at) for x in both)
            if exact:
                all_keys, all_values = torch.cat([all_keys, keys], 1), torch.cat([all_values, values], 1)
                there = torch.cat([there, shown], 1)
        else:
            all_keys, all_values = keys.gather(1, at), values.gather(1, at)
        wanted, wanted_lse = attention(queries, scaling, all_keys, all_values, there)
    assert lse is not None and found.dtype == queries.dtype and found.shape == queries.shape
    some = wanted_lse.isfinite()
    assert (found[~some] == 0).all() and (lse[~some] == -torch.inf).all() and found.isfinite().all()
    largest = max(1.0, float(wanted.abs().max()))
    assert (found.double() - wanted).abs().max() < BOUNDS[queries.dtype] * largest
    assert torch.allclose(lse[some].double(), wanted_lse[some], rtol=5e-6, atol=5e-6)
    without, none = cpu.decode(queries, scaling, spans, pages, slots_of, picks=picks)
    assert none is None and torch.equal(without, found)
    if picks is not None:
        return
    # The scores of what is seen, row by row in the order of the slots.
    parts = []
    if packed:
        assert form is not None and fields is not None
        parts.append(
            (decode_page(form, tuple(field.flatten(0, 1) for field in fields))[0].view(rows, packed, -1), seen)
        )
    if exact:
        assert keys is not None
        parts.append((keys, shown))
    all_keys, visible = torch.cat([x.double() for x, _ in parts], 1), torch.cat([x for _, x in parts], 1)
    scores = torch.full((rows, heads, int(visible.sum(1).max()) + 3), torch.nan)
    again, _ = cpu.decode(queries, scaling, spans, pages, slots_of, with_lse=True, scores=scores)
    assert torch.equal(again, found)
    for row, mine in enumerate(visible):
        wanted = queries[row].double() * scaling @ all_keys[row, mine].T
        count = wanted.shape[1]
        assert scores[row, :, count:].isnan().all()
        assert torch.allclose(scores[row, :, :count].double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", quick(SHAPES, 3), ids=str)
def test_random_rows(shape: tuple) -> None:
    for seed in range(12):
        check(*shape, seed=seed)


@pytest.mark.parametrize("shape", quick(SHAPES, 6), ids=str)
def test_random_picks(shape: tuple) -> None:
    for seed in range(6):
        check(*shape, seed=seed, picked=True)


WRONG = [
    ("span[5]), std::min({span[6], start, stop})", "span[5]), std::min({sinks, start, stop})"),  # fading sinks
    ("ranges[2] = {std::max(sinks, start), stop}", "ranges[2] = {start, stop}"),  # sinks counted twice
    ("std::max(0, span[0])", "std::max(0, span[0] / 32 * 32)"),  # where a window begins
    ("step = seen ? step : vec{}, zero = seen ? zero : vec{};", ""),  # poison
    ("s.at[q][part] += added", "s.at[q][part] += 0 * added"),  # zero points of keys
    ("acc[q][c] *= s.shrink[FIRST + q];", ";"),  # sums of blocks whose largest scores differ
    ("total += weight * part.total;", "total += part.total;"),  # of units
    ("+ plane * ROWS / GROUP * D +", "+"),  # the first group's scale for all
]


@pytest.mark.parametrize(("right", "wrong"), WRONG)
@pytest.mark.slow
def test_wrong_kernels_are_caught(
    right: str, wrong: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistakes that the kernel might have are put into it, one at a time."""
    if threads == 2:
        pytest.skip("once is enough")
    source = cpu._SOURCE.read_text()
    assert source.count(right) == 1
    (tmp_path / "wrong").mkdir()
    path = tmp_path / "wrong" / "decode.cpp"
    path.write_text(source.replace(right, wrong))
    for header in cpu._SOURCE.parent.parent.glob("*.h"):
        shutil.copy(header, tmp_path)
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cpu, "_SOURCE", path)
    monkeypatch.setattr(cpu, "_decode", cpu._decode.__wrapped__)
    with pytest.raises(AssertionError):
        for seed in range(12):
            check(*SHAPES[0], seed=seed)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_the_newest_token_goes_into_the_last_slot(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, columns, dim = 5, 3, 24
    stops = torch.tensor([1, 32, 33, 96, 70])
    memory = torch.zeros(rows, columns, 2, 32, dim, dtype=dtype)
    bytes_each = 32 * dim * dtype.itemsize
    places = torch.randperm(rows * columns * 2).view(rows, columns, 2)
    exact = cpu.Exact((memory.data_ptr() + places * bytes_each) // 16, dtype)
    spans = torch.zeros(rows, cpu.SPAN, dtype=torch.int32)
    spans[:, 4] = stops
    keys, values = torch.randn(rows, dim).to(dtype), torch.randn(rows, dim).to(dtype)
    cpu.append(keys, values, spans, exact)
    pages = memory.view(-1, 32, dim)
    for row, stop in enumerate((stops - 1).tolist()):
        for side, x in enumerate((keys, values)):
            page = pages[places[row, stop // 32, side]]
            assert torch.equal(page[stop % 32], x[row])
            page[stop % 32] = 0
    assert not memory.any()


def test_not_a_number_comes_out_where_it_went_in() -> None:
    """In queries of one row, and in what that row sees."""
    queries = torch.randn(2, 3, 64)
    queries[0, 1, 5] = float("nan")
    pages, _ = exact_pages(64, F32, torch.ones(2, 64, dtype=torch.bool))
    exact = cpu.Exact(torch.stack([pages.addresses] * 2, 2), F32)
    spans = torch.tensor([[0, 0, 0, 0, 50, 0, 0, 0]] * 2, dtype=torch.int32)
    found, lse = cpu.decode(queries, 0.125, spans, None, exact, with_lse=True)
    assert lse is not None and found[0, 1].isnan().all() and lse[0, 1].isnan()
    assert found[0, [0, 2]].isfinite().all() and found[1].isfinite().all()


def test_which_shapes_are_taken() -> None:
    for form, _, heads, head_dim in SHAPES:
        assert cpu.supports(form, heads, head_dim) is None
    assert cpu.supports(None, 17, 64) == "17 query heads share a kv head, more than 16"
    for head_dim in (4, 60, 264):
        assert cpu.supports(None, 1, head_dim) == f"head_dim {head_dim} is not a multiple of 8 up to 256"
    for group, channels in ((16, 32), (96, 32), (32, 24)):
        assert cpu.supports(Form(2, group, channels, 64), 1, 64) == f"groups of {group} tokens and {channels} channels"


def test_a_kernel_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check(*SHAPES[0], seed=0)
    monkeypatch.setattr(compiled, "library", None)
    monkeypatch.setattr(cpu, "library", None)
    check(*SHAPES[0], seed=0)
