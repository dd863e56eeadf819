"""Attention over tiers against a plain softmax, in float64, over the tokens that are held.

Fresh memory is filled with NaN, so that a slot which nobody wrote shows wherever it is used.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from conftest import quick
from fivefold import blocks as blocks_module
from fivefold.attention import attend_chunk, attend_step, decode, prefill
from fivefold.attention import merge as merge_module
from fivefold.attention.merge import MASKED, attend, attend_reference, attend_window, merge, takes_windows
from fivefold.blocks import blocks
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store import group as group_module
from fivefold.store.codec import Codec
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import PAGE, Extent
from fivefold.store.slabs import Slab
from fivefold.store.spec import LayerSpec, Pools

pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = (torch.float16, torch.bfloat16)
CPU = torch.device("cpu")
# What two methods hold together: sinks that only one of them keeps go as the text grows.
BOTH = {a.intersect(b): (a, b) for a, b in [(Extent(40, 50), Extent(4, 300)), (Extent(1, 120), Extent(70, 33))]}
EXTENTS = [Extent(), Extent(0, 1), Extent(0, 40), Extent(4, 33), Extent(40, 100), Extent(4, 300), *BOTH]
CODECS = [(2, 32), (2, 128), (3, 32), (4, 64), (4, 128), (8, 32), (8, 64)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    make = Slab.__init__

    def poisoned(slab: Slab, *args: object) -> None:
        make(slab, *args)
        for tensor in slab.tensors.values():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0x5A5A)

    monkeypatch.setattr(Slab, "__init__", poisoned)


def stored(layer: LayerCache, group: RowGroup) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Positions [n] and keys and values, float64 [rows, n, head_dim], of everything that a group holds."""
    g, rows, dim = group.bounds, len(group.rows), layer.spec.head_dim
    positions, parts = [], []

    def take(first: int, last: int, *both: torch.Tensor) -> None:
        positions.extend(range(first, last))
        parts.append([x.double()[:, : last - first] for x in both])

    def pages(table: np.ndarray) -> list[torch.Tensor]:
        pool = layer.exact_pool
        return [pool.read(name, table.reshape(-1)).reshape(rows, -1, dim) for name in ("keys", "values")]

    if g.pinned_pages:
        take(0, min(g.length, g.extent.pinned * PAGE), *pages(group.exact[:, : g.pinned_pages]))
    if g.window_pages:
        take(g.exact_base, g.length, *pages(group.exact[:, g.pinned_pages :]))
    if g.packed_stop > g.packed_base:
        assert layer.codec is not None
        (pool,) = layer.packed_pools
        fields = {f.name: pool.read(f.name, group.packed.reshape(-1)) for f in layer.codec.layout.fields}
        decoded = layer.codec.decode(fields)
        take(g.packed_base, g.packed_stop, *(x.reshape(rows, -1, dim) for x in decoded))
    if not parts:
        return np.zeros(0, int), *torch.zeros(2, rows, 0, dim, dtype=torch.float64, device=layer.spec.device)
    keys, values = (torch.cat(both, 1) for both in zip(*parts))
    return np.array(positions), keys, values


def softmax_attention(
    queries: torch.Tensor,
    newest: np.ndarray,
    held: tuple[np.ndarray, torch.Tensor, torch.Tensor],
    extent: Extent,
    scaling: float,
) -> torch.Tensor:
    """queries [rows, head, query, head_dim] at the positions `newest` [query], over what is held and seen."""
    positions, keys, values = held
    q, k = newest[:, None], positions[None]
    seen = k <= q
    for one in BOTH.get(extent, (extent,)):
        if one.recent is not None:
            seen &= (k < one.sink) | (k > q - one.recent)
    assert seen.any(1).all()
    scores = queries.double() @ keys[:, None].transpose(2, 3) * scaling
    scores.masked_fill_(~torch.from_numpy(seen).to(scores.device), float("-inf"))
    return scores.softmax(-1) @ values[:, None]


class Run:
    """A layer that is fed random tokens, with attention checked on the way."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device = CPU) -> None:
        self.rng = rng = random.Random(seed)
        torch.manual_seed(seed)
        self.device = device
        self.heads, self.batch, self.group = rng.randint(1, 3), rng.randint(1, 3), rng.randint(1, 8)
        self.dim, self.dtype = rng.choice((8, 16, 32) if device == CPU else (64, 128)), dtype
        extents = [rng.choice(EXTENTS) for _ in range(self.heads)]
        codec: Codec | None = None
        if rng.random() < 0.85:
            bits, group = rng.choice(CODECS)
            codec = KiviCodec(bits, group, min(group, self.dim), self.dim)
        spec = LayerSpec(0, 1, self.heads, self.heads * self.group, self.dim, dtype, device)
        self.layer = LayerCache(spec, Pools(), extents, codec, rng.choice((0, 32, 50, 128)))
        self.layer.start(self.batch)
        self.scaling = rng.choice((1.0, self.dim**-0.5))

    def feed(self, counts: list[int], revocable: int = 0) -> None:
        layer, chunk, rows = self.layer, max(counts), self.batch * self.heads
        offset = torch.randn(rows, 1, self.dim)
        pair = ((torch.randn(rows, chunk, self.dim) + offset).to(self.dtype) for _ in range(2))
        keys, values = (x.to(self.device) for x in pair)
        queries = torch.randn(rows, chunk, self.group, self.dim).to(self.dtype).to(self.device).transpose(1, 2)
        for group, count in layer.split_by(np.array(counts)):
            if count == 0:
                continue
            pick, new = group.rows_tensor, slice(chunk - count, chunk)
            q, k, v = queries[pick][:, :, new], keys[pick, new], values[pick, new]
            extent, length = group.bounds.extent, group.bounds.length
            newest = np.arange(length, length + count)
            if count == 1:
                layer.append(group, k, v, advance=False)
                found = attend_step(group, q[:, :, 0], self.scaling)[0][:, :, None]
                held = stored(layer, group)
                layer.append(group, None, None, revocable=revocable)
            else:
                found, _ = attend_chunk(group, q, k, v, self.scaling)
                positions, old_keys, old_values = stored(layer, group)
                layer.append(group, k, v, revocable=revocable)
                held = (
                    np.concatenate([positions, newest]),
                    torch.cat([old_keys, k.double()], 1),
                    torch.cat([old_values, v.double()], 1),
                )
            wanted = softmax_attention(q, newest, held, extent, self.scaling)
            assert found.dtype == self.dtype and found.shape == q.shape
            error = (found.double() - wanted).abs().max().item()
            assert error < TOLERANCE[self.dtype] * max(1, wanted.abs().max().item()), (
                extent,
                group.bounds,
            )

    def go(self, chunks: int = 8, longest: int = 300) -> None:
        for _ in range(chunks):
            revocable = self.rng.choice((0, 0, 24))
            if self.rng.random() < 0.6:
                longest_now = self.rng.choice((3, 40, longest))
                counts = [self.rng.randint(0, longest_now) for _ in range(self.batch)]
                if self.rng.random() < 0.5:
                    counts = [max(counts)] * self.batch
                if any(counts):
                    self.feed(counts, revocable)
            else:
                for _ in range(self.rng.randint(1, 40)):
                    self.feed([1] * self.batch, revocable)


def needs_cuda(test: Callable[..., None]) -> Callable[..., None]:
    found = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test)
    return pytest.mark.gpu(found)


def window_reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, shift: int, recent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    q, k = torch.arange(queries.shape[2])[:, None] + shift, torch.arange(keys.shape[2])
    seen = (k <= q) & (k > q - recent)
    assert seen.any(1).all()
    return attend_reference(queries, keys, values, scaling, torch.where(seen, 0.0, MASKED).to(queries.device))


@pytest.mark.parametrize("seed", quick([7, *range(7), *range(8, 16)], 4))  # 7: a chunk beside what is stored
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_of_all_queries_at_once(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU, but for the kernel of windows.
    if seed % 2:  # with blocks of every size that is worth a plan of cuDNN: all are
        for module in (prefill, blocks_module):
            monkeypatch.setattr(module, "CHUNK_STEP", 1)
        for module in (merge_module, blocks_module):
            monkeypatch.setattr(module, "RECURRING_OPERATIONS", 0)
    monkeypatch.setattr(prefill, "takes_windows", lambda _: True)
    monkeypatch.setattr(prefill, "attend_window", window_reference)
    Run(seed, dtype).go()


def test_blocks_of_packed_pages_are_regular_while_pages_are_full() -> None:
    for columns, whole, page, sizes in [
        (120, 120, 256, (32768, 16384, 8192)),
        (65, 64, 256, (16384, 8192)),
        (9, 8, 64, (256,)),
    ]:
        found = list(blocks(columns, whole, page, sizes, 1 << 30))
        assert [last for _, last in found[:-1]] == [first for first, _ in found[1:]]
        assert found[0][0] == 0 and found[-1][1] == columns
        assert all((last - first) * page in sizes and last <= whole for first, last in found[:-1])
    assert list(blocks(121, 120, 256, (32768, 16384, 8192), 1 << 15)) == [(0, 64), (64, 96), (96, 121)]
    assert list(blocks(121, 120, 256, (32768, 16384, 8192), 1 << 14)) == [(0, 121)]
    queries = torch.empty((8, 4, 2048, 128), device="meta")
    assert prefill._block_sizes(queries, 256) == [2048]  # not on a GPU


@needs_cuda
@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_chunks_over_any_tiers_on_a_gpu(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks whose windows, merges and tables are kernels', from the first one on: also those that end among sinks."""
    monkeypatch.setitem(TOLERANCE, dtype, 3e-2)
    run = Run(seed, dtype, torch.device("cuda", 0))
    for longest in (2, 20, 50, 300, 1000, 300, 40):
        counts = [run.rng.randint(2, longest) for _ in range(run.batch)]
        run.feed(counts if run.rng.random() < 0.3 else [longest] * run.batch, run.rng.choice((0, 24)))


@needs_cuda
@pytest.mark.parametrize("seed", range(8))
def test_long_attention(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # By cuDNN where torch would take it, however short.
    monkeypatch.setattr(merge_module, "CUDNN_OPERATIONS", 0)
    rng, generator = random.Random(seed), torch.Generator("cuda").manual_seed(seed)
    causal, keys, dim, kind = bool(seed % 2), rng.randint(1, 3000), rng.choice((64, 128)), rng.choice(HALVES)
    make = partial(torch.randn, device="cuda", generator=generator, dtype=kind)
    q = make(rng.randint(1, 3), rng.randint(1, 5), keys if causal else rng.randint(1, 3000), dim)
    k, v = (make(len(q), keys, dim)[:, None].expand(-1, q.shape[1], -1, -1) for _ in range(2))
    if torch.cuda.get_device_capability()[0] == 9:
        assert merge_module._takes_cudnn(q, k, v, causal)
    wanted, found = (f(q, k, v, dim**-0.5, causal=causal) for f in (attend_reference, attend))
    torch.testing.assert_close(found[0], wanted[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-2, rtol=1e-3)


@needs_cuda
@pytest.mark.parametrize("seed", range(100))
def test_the_kernel_of_windows(seed: int) -> None:
    rng, generator = random.Random(seed), torch.Generator("cuda").manual_seed(seed)
    dim, recent, keys = rng.choice((8, 64, 96, 128, 256)), rng.randint(1, 500), rng.randint(1, 1500)
    shift = rng.randint(0, keys + recent - 2)  # of the first query from the first key; each sees one at least
    queries = rng.randint(1, min(1500, keys + recent - 1 - shift))
    rows, heads, kind = rng.randint(1, 4), rng.randint(1, 5), rng.choice(HALVES)
    make = partial(torch.randn, device="cuda", generator=generator, dtype=kind)
    q = make(rows, heads, queries, dim)
    k, v = (make(rows, keys, dim)[:, None].expand(-1, heads, -1, -1) for _ in range(2))
    assert takes_windows(q)
    wanted, found = (f(q, k, v, dim**-0.5, shift, recent) for f in (window_reference, attend_window))
    torch.testing.assert_close(found[0], wanted[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("seed", quick(range(60), 12))
def test_attention_over_any_tiers(seed: int) -> None:
    Run(seed, torch.float32).go()


@pytest.mark.parametrize("seed", quick(range(10), 3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_half_precision(seed: int, dtype: torch.dtype) -> None:
    Run(100 + seed, dtype).go(6)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("seed", quick(range(8), 2))
def test_attention_in_small_blocks(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "PACKED_BLOCK", 1)
    monkeypatch.setattr(prefill, "QUERY_BLOCK", 7)
    monkeypatch.setattr(prefill, "KEY_BLOCK", 256)
    monkeypatch.setattr(group_module, "GATHERED", 1)
    run = Run(200 + seed, dtype)
    run.go(6, 500)
    # Tables that are no regular grids: every page is a block of its own.
    run.layer.select(np.array([0, *range(run.batch)]))
    run.batch += 1
    run.go(4)


def test_attention_after_crop_into_packed_groups() -> None:
    for seed in range(300, 312):
        run = Run(seed, torch.float32)
        if any(extent.recent is not None for extent in run.layer.extents):
            continue
        run.feed([400] * run.batch)
        run.layer.crop(run.rng.randint(60, 300))
        run.go(5)


def test_attention_of_long_rows_and_long_chunks() -> None:
    """Past the sizes at which the fused kernels split their work."""
    for extent in (Extent(), Extent(4, 700)):
        run = Run(4, torch.float32)
        run.batch, run.heads, run.group, run.dim = 1, 1, 2, 16
        spec = LayerSpec(0, 1, 1, 2, 16, torch.float32, CPU)
        run.layer = LayerCache(spec, Pools(), [extent], KiviCodec(4, 32, 16, 16), 128)
        run.layer.start(1)
        for count in (1500, 1, 700, 2, 1, 1300, 1):
            run.feed([count])


# -- parts ------------------------------------------------------------------------------------------------


def dense(dtype: torch.dtype, queries: int, keys: int, dim: int, heads: int = 3) -> tuple[torch.Tensor, ...]:
    q = torch.randn(2, heads, queries, dim).to(dtype)
    k, v = (torch.randn(2, keys, dim).to(dtype)[:, None].expand(-1, heads, -1, -1) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 700), (5, 37), (600, 64), (130, 1030)])
@pytest.mark.parametrize("dim", [8, 64, 80])
def test_fused_attention_equals_the_reference(dtype: torch.dtype, queries: int, keys: int, dim: int) -> None:
    torch.manual_seed(0)
    q, k, v = dense(dtype, queries, keys, dim)
    random_bias = torch.where(torch.rand(queries, keys) < 0.3, MASKED, 0.0)
    random_bias[:, 0] = 0
    for bias in (None, random_bias):
        check_attend(q, k, v, bias, False)
    if queries == keys:
        check_attend(q, k, v, None, True)
    if queries < keys:
        q, k, v = (x[:, :, :queries] for x in (q, k, v))
        check_attend(q, k, v, None, True)


def check_attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool) -> None:
    scaling = q.shape[-1] ** -0.5
    out, lse = attend(q, k, v, scaling, bias, causal)
    wanted, wanted_lse = attend_reference(q.double(), k.double(), v.double(), scaling, bias, causal)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.shape == q.shape and lse.shape == q.shape[:-1]
    assert (out.double() - wanted).abs().max() < TOLERANCE[q.dtype]
    assert (lse.double() - wanted_lse).abs().max() < TOLERANCE[q.dtype]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_fully_masked_part_has_no_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = dense(dtype, 40, 50, 16)
    bias = torch.zeros(40, 50)
    bias[7:] = MASKED
    seen = attend(q, k, v, 0.25)
    half = attend(q, k, v, 0.25, bias)
    assert half[0].isfinite().all() and (half[1][:, :, 7:] < MASKED / 2).all()
    for parts in ([seen, half], [half, seen], [seen, half, half]):
        out, lse = merge(parts)
        assert torch.equal(out[:, :, 7:], seen[0][:, :, 7:].float())
        assert torch.equal(lse[:, :, 7:], seen[1][:, :, 7:])
    out, lse = merge([half, half])
    assert out.isfinite().all() and (lse[:, :, 7:] < MASKED / 2).all()


def test_merge_is_attention_over_the_union() -> None:
    torch.manual_seed(0)
    q, k, v = dense(torch.float32, 9, 300, 16)
    k = k * 5  # scores of different size, so that one part outweighs the others
    edges = [0, 1, 40, 41, 200, 300]
    parts = [attend_reference(q, k[:, :, a:b], v[:, :, a:b], 1.0) for a, b in pairwise(edges)]
    out, lse = merge(parts)
    wanted, wanted_lse = attend_reference(q, k, v, 1.0)
    assert torch.allclose(out, wanted, atol=2e-5)
    assert torch.allclose(lse, wanted_lse, atol=2e-5)
    assert all(x is y for x, y in zip(merge(parts[:1]), parts[0]))
