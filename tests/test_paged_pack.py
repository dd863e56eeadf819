"""KIVI's pages in an engine's blocks: the kernels against their references, and a text that is served step by step."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from fivefold.kernels import paged_pack
from fivefold.kernels.pack import reference as packing
from fivefold.kernels.packed_decode import Form, decode_page, decode_reference, schedule
from fivefold.kernels.paged_pack import Blocks
from fivefold.kernels.paged_pack.reference import exact_columns, seen_from, sides

GPU = torch.cuda.is_available()
pytest.importorskip("triton", reason="needs Triton")
pytestmark = pytest.mark.usefixtures("touched")
kernel = importlib.import_module("fivefold.kernels.paged_pack.triton")
attention = importlib.import_module("fivefold.kernels.packed_decode.triton")

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(GPU, reason="the kernels are compiled for the GPU here")),
    pytest.param("cuda", marks=ON_GPU), pytest.param("triton", marks=ON_GPU),
]  # fmt: skip


@pytest.fixture
def device(request, monkeypatch) -> str:
    monkeypatch.setenv("FIVEFOLD_KERNELS", "triton" if request.param == "cpu" else request.param)
    return "cpu" if request.param == "cpu" else "cuda"


def blocks(requests: int, tokens: int, page: int, nbytes: int, heads: int, states: int, device: str) -> Blocks:
    """Memory of blocks with a gap behind each, full of poison, and a table of scattered blocks for so many tokens."""
    columns = -(-tokens // (page * states))
    count = requests * columns + 2
    size = heads * states * nbytes + 64
    memory = torch.full((count, size), -1, dtype=torch.int8, device=device)[:, :-64].unflatten(
        1, (heads, states, nbytes)
    )
    table = torch.from_numpy(np.random.permutation(count - 1)[: requests * columns] + 1).to(device, torch.int32)
    return Blocks(memory, table.view(requests, columns))


class Served:
    """Requests with the given known and new tokens, and the memory that an engine has for them."""

    def __init__(
        self, form: Form, known: list[int], new: list[int], dtype: torch.dtype, device: str, heads: int = 2
    ) -> None:
        self.form, self.dtype = form, dtype
        self.lengths = torch.tensor(known, dtype=torch.int32) + torch.tensor(new, dtype=torch.int32)
        longest, requests, dim = int(self.lengths.max()), len(known), form.head_dim
        self.packed = blocks(requests, longest, form.tokens, form.nbytes, heads, 2, device)
        self.exact = blocks(requests, longest, 32, 64 * dim * dtype.itemsize, heads, 1, device)
        shape = (requests, longest, heads, dim)
        size = 1 + 5 * (torch.rand(dim) < 0.1)
        self.keys, self.values = ((torch.randn(shape) * size + torch.randn(dim)).to(device, dtype) for _ in range(2))
        for request, count in enumerate(known):
            at = self.slots(request, 0, count)
            paged_pack.append_reference(self.keys[request, :count], self.values[request, :count], self.exact, at)
            whole = [[request, page, 0, 0, count] for page in range(-(-count // form.tokens))]
            paged_pack.pack_reference(
                form, self.keys[request], self.values[request], self.packed, self.exact,
                torch.tensor(whole, dtype=torch.int32).view(-1, 5),
            )  # fmt: skip
        # As vLLM has them: keys and values are parts of one wider product.
        both = [
            torch.cat([x[r, known[r] : known[r] + new[r]] for r in range(requests)]) for x in (self.keys, self.values)
        ]
        wide = torch.cat([torch.full_like(both[0], torch.nan), *both], 1)
        self.new = wide[:, heads : 2 * heads], wide[:, 2 * heads :]
        self.new_slots = torch.cat([self.slots(r, known[r], known[r] + new[r]) for r in range(requests)])
        pages = [
            [r, p, begin, k, k + n]
            for r, (begin, k, n) in enumerate(zip(np.cumsum([0, *new]), known, new))
            for p in range(k // form.tokens, -(-(k + n) // form.tokens))
        ]
        self.pages = torch.tensor([*pages, [-1, 0, 0, 0, 0]], dtype=torch.int32)

    def slots(self, request: int, first: int, last: int) -> torch.Tensor:
        at = torch.arange(first, last)
        return self.exact.table[request].cpu().long()[at // 32] * 32 + at % 32

    def on(self, device: str) -> tuple[torch.Tensor, ...]:
        return tuple(x.to(device) for x in (self.lengths, self.new_slots, self.pages))


def twin(x: Blocks) -> Blocks:
    """A copy, with the strides it had."""
    size = x.memory.stride(0)
    memory = torch.empty((len(x.memory), size), dtype=torch.int8, device=x.memory.device)
    memory = memory[:, : x.memory[0].numel()].unflatten(1, x.memory.shape[1:])
    return Blocks(memory.copy_(x.memory), x.table)


FORMS = [Form(2, 32, 32, 64), Form(3, 32, 32, 64), Form(4, 32, 32, 128), Form(8, 32, 32, 64)]
DTYPES = [torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize(("form", "dtype"), list(zip(FORMS, DTYPES)), ids=str)
def test_a_step_writes_and_packs_as_the_reference(device: str, form: Form, dtype: torch.dtype) -> None:
    """Groups that are not full, full, the first and the last of a page; a request that is padding."""
    torch.manual_seed(form.bits)
    np.random.seed(0)
    page = form.tokens
    known = [4, 31, page - 1, page + 31, page + 63, 0]
    served = Served(form, known, [1] * len(known), dtype, device)
    lengths, slots, _ = served.on(device)
    slots[3] = -1
    packed, exact = twin(served.packed), twin(served.exact)
    peak = torch.zeros(1, dtype=torch.int32, device=device)
    kernel.step(form, *served.new, packed, exact, lengths, slots, peak)
    paged_pack.append_reference(*served.new, served.exact, slots)
    pages = torch.tensor([[r, k // page, r, k, k + 1] for r, k in enumerate(known) if r != 3])
    paged_pack.pack_reference(form, *served.new, served.packed, served.exact, pages)
    assert torch.equal(packed.memory, served.packed.memory)
    assert torch.equal(exact.memory, served.exact.memory)
    largest = max(float(x[r, k - 31 : k + 1].abs().max()) for x in (served.keys, served.values)
                  for r, k in enumerate(known) if (k + 1) % 32 == 0 and r != 3)  # fmt: skip
    assert float(peak.view(torch.float32)) == largest


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize(("form", "dtype"), list(zip(FORMS, DTYPES)), ids=str)
def test_a_chunk_is_packed_as_the_reference(device: str, form: Form, dtype: torch.dtype) -> None:
    """A first chunk, one that goes on within a group and ends within one, one that fills nothing."""
    torch.manual_seed(form.bits)
    np.random.seed(1)
    page = form.tokens
    served = Served(form, [0, page - 45, 64, 5], [page + 40, page, 96, 20], dtype, device)
    _, slots, pages = served.on(device)
    packed, exact = twin(served.packed), twin(served.exact)
    peak = torch.zeros(1, dtype=torch.int32, device=device)
    slots[: form.tokens] = slots[: form.tokens] % 32  # in the null block
    kernel.pack(form, *served.new, packed, exact, pages, peak)
    kernel.store(*served.new, exact, slots)
    paged_pack.pack_reference(form, *served.new, served.packed, served.exact, pages)
    slots[: form.tokens] = -1
    paged_pack.append_reference(*served.new, served.exact, slots)
    assert torch.equal(packed.memory, served.packed.memory)
    assert torch.equal(exact.memory, served.exact.memory)
    # The pages hold what `pack_pages` makes of the whole text.
    whole = served.keys[1, :page].transpose(0, 1), served.values[1, :page].transpose(0, 1)
    record = packed.view(1, 0)[:, : form.nbytes].contiguous().view(torch.int16)
    for found, wanted in zip(packing.fields_of(form, record), packing.pack_reference(form, *whole, 0, None)):
        assert torch.equal(found, wanted)


def buffers(rows: int, columns: int, residual: int, device: str) -> paged_pack.Tables:
    long = {"dtype": torch.int64, "device": device}
    return paged_pack.Tables(
        torch.zeros((rows, columns), **long),
        torch.zeros((rows, exact_columns(residual), 2), **long),
        torch.full((rows, schedule.SPAN), -1, dtype=torch.int32, device=device),
        torch.full((2, rows + 1), -1, dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("residual", [0, 128])
@pytest.mark.parametrize("joined", [False, True])
def test_tables(device: str, residual: int, joined: bool) -> None:
    """Also of a request that is padding, and of one whose first tokens a prefix hit brought."""
    torch.manual_seed(0)
    np.random.seed(2)
    form, dtype, heads = Form(4, 32, 32, 64), torch.bfloat16, 3
    served = Served(form, [300, 159, 128, 0, 31, 500], [1, 1, 1, 1, 1, 1], dtype, device, heads)
    lengths = torch.tensor([*served.lengths, 0], dtype=torch.int32).to(device)
    more = torch.zeros(1, served.packed.table.shape[1], dtype=torch.int32, device=device)
    packed = Blocks(served.packed.memory, torch.cat([served.packed.table, more]))
    more = torch.zeros(1, served.exact.table.shape[1], dtype=torch.int32, device=device)
    exact = Blocks(served.exact.memory, torch.cat([served.exact.table, more]))
    exact.table[2, :4] = 0
    found, programs = buffers(30, 7, residual, device), (40, 0) if joined else (24, 32)
    kernel.tables(form, packed.place, packed.table, exact.place, exact.table, heads, dtype, lengths, residual, programs,
                  600, found, 10)  # fmt: skip
    wanted = paged_pack.tables_reference(form, packed, exact, dtype, lengths, residual, programs, 7)
    assert torch.equal(found.packed[:21].cpu(), wanted.packed)
    assert torch.equal(found.spans[:21].cpu(), wanted.spans)
    assert torch.equal(found.starts[:, :22].cpu(), wanted.starts)
    live = torch.arange(exact_columns(residual)) * 32 < wanted.spans[:, 4:5]
    assert torch.equal(found.exact[:21].cpu()[live], wanted.exact[live])


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize(("form", "dtype"), list(zip(FORMS, DTYPES)), ids=str)
def test_gathering_reads_what_is_packed_and_what_is_exact(device: str, form: Form, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    np.random.seed(4)
    known = form.tokens + 75
    served = Served(form, [40, known], [1, 1], dtype, device)
    served.exact.table[1, : form.tokens // 32 + 1] = 0  # also behind start
    start = form.tokens
    for first, last in ((32, known), (form.tokens, form.tokens + 32)):
        found = [torch.full((last - first + 3, 2, form.head_dim), torch.nan, dtype=dtype, device=device) for _ in "kv"]
        kernel.gather(form, served.packed, served.exact, 1, first, last, start, *found)
        wanted = paged_pack.gather_reference(form, served.packed, served.exact, dtype, 1, first, last, start)
        for x, y in zip(found, wanted):
            assert x[last - first :].isnan().all()
            torch.testing.assert_close(x[: last - first], y, rtol=torch.finfo(dtype).eps, atol=1e-6)
    first = form.tokens + 32  # from here on exact
    found = paged_pack.gather_reference(form, served.packed, served.exact, dtype, 1, first, known, start)
    assert torch.equal(found[0], served.keys[1, first:known]) and torch.equal(found[1], served.values[1, first:known])


def test_work_lists_share_out_all_pages() -> None:
    rng = np.random.default_rng(0)
    for heads, programs in ((1, 64), (8, 264), (2, 40)):
        for _ in range(20):
            pages = rng.integers(0, 50, 5) * (rng.random(5) < 0.8)
            starts = paged_pack.starts_reference(pages, heads, programs)
            shares = np.diff(starts).reshape(5, heads)
            assert starts[-1] <= programs and (shares[:, 0] == shares[:, -1]).all()
            assert ((shares[:, 0] > 0) == (pages > 0)).all()
            longest = schedule.starts_of(np.stack([np.repeat(pages, heads)] * 2), (programs, programs))[0]
            worst = max((-(-p // s) for p, s in zip(pages, shares[:, 0]) if p), default=0)
            other = max((-(-p // s) for p, s in zip(np.repeat(pages, heads), np.diff(longest)) if p), default=0)
            assert worst <= other  # than in our own store


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("residual", [0, 128])
def test_decoding_reads_what_the_tables_say(device: str, residual: int, touched) -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    form, dtype, heads = Form(2, 32, 32, 64), torch.bfloat16, 2
    known = [300, 31, 600, 0]
    served = Served(form, known, [1] * 4, dtype, device, heads)
    touched += served.packed.memory, served.exact.memory
    lengths, slots, _ = served.on(device)
    peak = torch.zeros(1, dtype=torch.int32, device=device)
    kernel.step(form, *served.new, served.packed, served.exact, lengths, slots, peak)
    rows = 4 * heads
    programs = attention.programs_for(rows, torch.device(device), form, 3, dtype)
    tables = buffers(rows, 3, residual, device)
    kernel.tables(form, served.packed.place, served.packed.table, served.exact.place, served.exact.table, heads, dtype,
                  lengths, residual, programs, 601, tables, 4)  # fmt: skip
    queries = torch.randn(rows, 3, form.head_dim, device=device).to(dtype)
    packed = schedule.Packed(tables.packed, form, base=served.packed.place.base)
    exact = schedule.Exact(tables.exact, dtype, base=served.exact.place.base)
    out = torch.empty_like(queries)
    found, _ = attention.decode(
        queries, form.head_dim**-0.5, tables.spans, packed, exact, starts=tables.starts, programs=programs, out=out
    )
    assert found is out
    for request, length in enumerate(served.lengths.tolist()):
        start = seen_from(length - 1, residual)
        assert start == [288, 0, 576, 0][request] - (0 if residual == 0 else [128, 0, 128, 0][request])
        for head in range(heads):
            keys, values = served.keys[request, :length, head].float(), served.values[request, :length, head].float()
            if start:
                pages = torch.stack(
                    [served.packed.view(request, p)[head, : form.nbytes] for p in range(-(-start // form.tokens))]
                )
                read = decode_page(form, packing.fields_of(form, pages.contiguous().view(torch.int16)))
                keys, values = (torch.cat([x.flatten(0, 1)[:start], y[start:]]) for x, y in zip(read, (keys, values)))
            row = request * heads + head
            wanted, _ = decode_reference(
                queries[row : row + 1], form.head_dim**-0.5, torch.tensor([[0, 0, 0, 0, length]]), keys=keys[None],
                values=values[None],
            )  # fmt: skip
            assert (found[row].double() - wanted[0]).norm() < 6e-3 * wanted.norm()


def test_exact_pages_are_views() -> None:
    page = torch.zeros(2, 64 * 64 * 2, dtype=torch.int8)
    sides(page, 64, torch.bfloat16)[:, 1, 3] = 1
    assert page.view(torch.bfloat16)[:, (32 + 3) * 64 : (32 + 4) * 64].eq(1).all()
