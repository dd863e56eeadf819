"""The GPU's path of the vLLM plug-in, without vLLM: beside the CPU's, over the same steps of an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fivefold.errors import NonFiniteError
from fivefold.kernels.paged_pack import Place

pytest.importorskip("triton", reason="needs Triton")
from fivefold.serving.vllm import cuda
from fivefold.serving.vllm.cpu import CpuPath
from fivefold.serving.vllm.options import Options, Pages

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
HEADS, SHARED_BY, BLOCKS = 1, 2, 40
pytestmark = [pytest.mark.gpu] if GPU else []  # otherwise in the interpreter


class Plain:
    """What FlashAttention does, in plain PyTorch."""

    def __init__(self, scale: float, head_dim: int) -> None:
        self.scale = scale

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, key_ends: torch.Tensor,
        longest: int, key_longest: int, causal: bool, out: torch.Tensor | None = None, lse: bool = False,
    ) -> Any:  # fmt: skip
        parts = []
        assert longest == ends.diff().max() and key_longest == key_ends.diff().max()
        assert len(query) == ends[-1] and len(key) == key_ends[-1]
        for a, b, c, d in zip(ends, ends[1:], key_ends, key_ends[1:]):
            k, v = (x[c:d].double().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[a:b].double(), k) * self.scale
            if causal:
                hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=k.device).triu(d - c - (b - a) + 1)
                scores = scores.masked_fill(hidden, -torch.inf)
            parts.append((torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)))
        found = torch.cat([part[0] for part in parts]).to(query.dtype)
        if out is not None:
            out.copy_(found)
        return (found, torch.cat([part[1] for part in parts], 1).float()) if lse else found

    @staticmethod
    def merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> Any:
        both = torch.logaddexp(lse, other_lse)
        weights = [(x - both).exp().T[..., None] for x in (lse, other_lse)]
        return (out * weights[0] + other * weights[1]).to(out.dtype), both


class Engine:
    """What vLLM gives a layer, of one kind of device: memory and tables of blocks."""

    def __init__(self, pages: Pages, device: torch.device, path: Any, tables: Any) -> None:
        dim = pages.form.head_dim
        self.pages, self.device, self.path, self.tables = pages, device, path, tables
        shape = (BLOCKS, HEADS, pages.together, pages.form.nbytes)
        self.packed = torch.zeros(shape, dtype=torch.int8, device=device)
        # An exact block is as large as a packed one.
        exact = torch.zeros((BLOCKS, HEADS * pages.block_bytes), dtype=torch.int8, device=device)
        self.exact = exact[:, : HEADS * pages.exact_bytes].view(BLOCKS, HEADS, 1, pages.exact_bytes)
        self.impl = SimpleNamespace(scale=dim**-0.5, num_kv_heads=HEADS)

    def step(self, new: list[int], lengths: list[int], tables: list[torch.Tensor], qkv: list[torch.Tensor]) -> Any:
        """Tokens `[tokens, heads, dim]` of a batch: requests with one new token first."""
        ends = [0, *torch.tensor(new).cumsum(0).tolist()]
        decodes = next((i for i, n in enumerate(new) if n > 1), len(new))
        packed, exact = (x.to(self.device) for x in tables)
        position = torch.cat([torch.arange(n - m, n) for m, n in zip(new, lengths)])
        request = torch.arange(len(new)).repeat_interleave(torch.tensor(new))
        slots = tables[1][request, position // 32].long() * 32 + position % 32
        step = SimpleNamespace(
            tables=self.tables, tokens=ends[-1], decodes=decodes, longest=max(lengths[:decodes], default=0),
            completes=True, packed_blocks=packed, exact_blocks=exact, exact_slots=slots.to(self.device),
            lengths=torch.tensor(lengths, dtype=torch.int32, device=self.device), plan=None,
            prefills=[
                SimpleNamespace(number=i, first=ends[i], last=ends[i + 1], known=lengths[i] - new[i])
                for i in range(decodes, len(new))
            ],
        )  # fmt: skip
        if decodes:
            places = Place.of(self.packed), Place.of(self.exact)
            self.tables.fill(*places, packed[:decodes], exact[:decodes], step.lengths[:decodes], step.longest)
        self.path.prepare(step)
        query, key, value = (x.to(self.device) for x in qkv)
        out = torch.full_like(query, torch.nan)
        self.path.forward(None, self.impl, query, key, value, self.packed, self.exact, step, out)
        return out.cpu()


@pytest.mark.parametrize(("bits", "residual"), [(4, 64), pytest.param(2, 0, marks=pytest.mark.slow)])
def test_both_paths_serve_alike(bits: int, residual: int, monkeypatch) -> None:
    """Prompts, decoding beside a chunk that goes on, a group that a step makes full, and a prefix hit. What one step
    leaves is what the next one reads, so differences would grow."""
    torch.manual_seed(0)
    monkeypatch.setattr(cuda, "PIECE", 64)
    pages = Options.parse(f"kivi(bits={bits}, residual={residual})").pages(64, torch.bfloat16)
    monkeypatch.setenv("FIVEFOLD_KERNELS", "auto")
    cpu = CpuPath(pages)
    cpu_tables = cuda.Tables(pages, HEADS, 4, 600, torch.device("cpu"))
    slow = Engine(pages, torch.device("cpu"), cpu, cpu_tables)
    kernels = "auto" if GPU else "triton"
    monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
    path = cuda.CudaPath(pages, DEVICE, attention=Plain)
    fast = Engine(pages, DEVICE, path, cuda.CudaTables(pages, HEADS, 4, 600, DEVICE, SHARED_BY))

    ids = iter((torch.randperm(BLOCKS - 1) + 1).tolist())
    tables = [torch.zeros((4, count), dtype=torch.int32) for count in (-(-600 // pages.block), 20)]
    exact_ids = iter((torch.randperm(BLOCKS - 1) + 1).tolist())
    lengths = [0] * 4
    hit = -(-128 // pages.block) * pages.block

    def step(*asked: tuple[int, int]) -> None:
        """Pairs of request and new tokens."""
        for request, new in asked:
            before, lengths[request] = lengths[request], lengths[request] + new
            for place in range(-(-lengths[request] // pages.block)):
                if tables[0][request, place] == 0:
                    tables[0][request, place] = next(ids)
            keep = pages.packed(lengths[request]) // 32 if new > 1 else before // 32
            for place in range(keep, -(-lengths[request] // 32)):
                if tables[1][request, place] == 0:
                    tables[1][request, place] = next(exact_ids)
        rows = [request for request, _ in asked]
        new = [n for _, n in asked]
        heads = HEADS * SHARED_BY, HEADS, HEADS
        wide = torch.randn(sum(new), sum(heads), 64).to(torch.bfloat16)
        batch = [new, [lengths[r] for r in rows], [x[rows] for x in tables], list(wide.split(heads, 1))]
        monkeypatch.setenv("FIVEFOLD_KERNELS", "auto")
        wanted = slow.step(*batch)
        monkeypatch.setenv("FIVEFOLD_KERNELS", kernels)
        found = fast.step(*batch)
        error = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert error < 1e-2, (asked, float(error))
        assert torch.equal(fast.packed[1:].cpu(), slow.packed[1:]), asked

    step((0, 40), (1, 31))
    step((0, 1), (1, 1), (2, hit - 30))
    step((0, 1), (1, 1), (2, 77))
    tables[0][3, : hit // pages.block] = tables[0][2, : hit // pages.block]  # a prefix hit: packed blocks alone
    lengths[3] = hit
    step((1, 1), (2, 1), (3, 21))
    step((0, 1), (1, 1), (2, 1), (3, 1))
    assert path.peak.view(torch.float32).item() > 2
    for table in tables:
        table[[0, 3]] = 0
    lengths[0], lengths[3] = 0, hit  # a hit of blocks that the same step fills, for another request
    for place in range(hit // pages.block):
        tables[0][[0, 3], place] = next(ids)
    step((3, 1), (0, hit + 2))


@pytest.mark.parametrize("number", [751.0, float("inf")])
def test_numbers_that_are_too_large_stop_the_engine(number: float, monkeypatch) -> None:
    """What was packed is asked for now and then, and without waiting: the engine says so some steps later."""
    monkeypatch.setenv("FIVEFOLD_KERNELS", "auto" if GPU else "triton")
    path = cuda.CudaPath(Options.parse("kivi(bits=2)").pages(64, torch.bfloat16), DEVICE, attention=Plain)
    step = SimpleNamespace(prefills=[], plan=None)
    for _ in range(2 * cuda.EVERY):
        path.prepare(step)
    path.peak.view(torch.float32).fill_(number)
    with pytest.raises(
        NonFiniteError, match=f"reach {number:g}, and a GPU's kernels attend on packed numbers up to 750"
    ):
        for _ in range(2 * cuda.EVERY):
            path.prepare(step)
