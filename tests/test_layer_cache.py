"""One layer's tiers: what is stored where, what is shared with whom, and what is taken back."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fivefold.errors import CacheFullError, CacheStateError, NonFiniteError
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store.layer_cache import Cohort, LayerCache, LayerSpec, Pools, _blocks
from fivefold.store.tiers import PAGE, Extent

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
DIM = 8
EXACT_PAGE = 2 * PAGE * DIM * 4


class SharedKeys(KiviCodec):
    """KIVI whose pages share the keys and keep the values for themselves."""

    def __init__(self, bits: int = 2) -> None:
        super().__init__(bits, 32, DIM, DIM)
        fields = (dataclasses.replace(f, own=f.name.startswith("value")) for f in self.layout.fields)
        self.layout = dataclasses.replace(self.layout, fields=tuple(fields))


def make(
    extents: list[Extent] | None = None,
    codec: KiviCodec | None = None,
    residual: int = 32,
    pools: Pools | None = None,
    batch: int = 1,
) -> LayerCache:
    extents = extents or [Extent()]
    spec = LayerSpec(0, 1, len(extents), len(extents), DIM, torch.float32, CPU)
    layer = LayerCache(spec, pools or Pools(), extents, codec, residual)
    layer.start(batch)
    return layer


def kivi(bits: int = 2, group: int = 32) -> KiviCodec:
    return KiviCodec(bits, group, DIM, DIM)


def extend(layer: LayerCache, tokens: int | list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Append random tokens: one number for all sequences, or one for each (padded left). Returns them."""
    counts = np.full(layer.batch, tokens) if isinstance(tokens, int) else np.array(tokens)
    generator = torch.Generator().manual_seed(seed)
    chunk = int(counts.max())
    keys, values = torch.randn(2, layer.batch * layer.spec.kv_heads, chunk, DIM, generator=generator)
    for cohort, count in layer.split_by(counts):
        if count:
            pick = cohort.rows_tensor
            layer.append(cohort, keys[pick, chunk - count :], values[pick, chunk - count :])
    return keys, values


def exact(layer: LayerCache, cohort: Cohort, name: str = "keys") -> torch.Tensor:
    """All filled slots of the exact tier: [rows, tokens, DIM]."""
    g = cohort.geometry
    filled = min(g.length, g.extent.pinned * PAGE) + max(0, g.length - g.exact_base)
    blocks = [layer.exact(name, location) for _, _, location in layer.exact_blocks(cohort)]
    return torch.cat([torch.empty(len(cohort.rows), 0, DIM), *blocks], 1)[:, :filled]


def packed(layer: LayerCache, cohort: Cohort) -> list[torch.Tensor]:
    """Keys and values of the packed tier, decoded: [rows, tokens, DIM]."""
    assert layer.codec is not None
    g = cohort.geometry
    fields = layer.packed_fields(cohort, 0, cohort.packed.shape[1])
    decoded = layer.codec.decode({name: x.flatten(0, 1) for name, x in fields.items()})
    return [x.reshape(len(cohort.rows), -1, DIM)[:, : g.packed_stop - g.packed_base] for x in decoded]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to the rounding of 8-bit codes."""
    return bool((a - b).abs().max() < 0.03)


def image(layer: LayerCache) -> list[object]:
    """Everything a layer holds and claims, for comparing before and after."""
    out: list[object] = []
    for cohort in layer.cohorts:
        out += [cohort.geometry, cohort.rows.tolist(), exact(layer, cohort).tolist()]
        out += [exact(layer, cohort, "values").tolist()]
        if cohort.packed.shape[1]:
            out += [x.tolist() for x in packed(layer, cohort)]
    return out


# -- cohorts and tokens -----------------------------------------------------------------------------------


def test_heads_of_equal_extent_move_together() -> None:
    window = Extent(4, 64)
    layer = make([Extent(), window, Extent(), window], batch=2)
    assert [cohort.rows.tolist() for cohort in layer.cohorts] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert [cohort.geometry.extent for cohort in layer.cohorts] == [Extent(), window]
    with pytest.raises(ValueError, match="1 extents for 2 kv heads"):
        LayerCache(LayerSpec(0, 1, 2, 2, DIM, torch.float32, CPU), Pools(), [Extent()])


def test_sequences_of_different_lengths_part_and_keep_their_tokens() -> None:
    layer = make([Extent(), Extent(0, 40)], batch=3)
    keys, _ = extend(layer, [100, 37, 100])
    assert layer.lengths().tolist() == [100, 37, 100]
    assert sorted(cohort.rows.tolist() for cohort in layer.cohorts) == [[0, 4], [1, 5], [2], [3]]
    for cohort in layer.cohorts:
        start = 0 if cohort.geometry.extent.recent is None else cohort.geometry.exact_base
        new = keys[cohort.rows_tensor][:, 100 - cohort.geometry.length + start :]
        assert torch.equal(exact(layer, cohort), new)


def test_decoding_one_token_at_a_time_stores_what_a_chunk_stores() -> None:
    extents = [Extent(), Extent(4, 50), Extent(40, 9)]
    stepped, whole = make(extents, kivi(8), batch=2), make(extents, kivi(8), batch=2)
    keys, values = torch.randn(2, 6, 200, DIM)
    for t in range(200):
        for cohort in stepped.cohorts:
            pick = cohort.rows_tensor
            stepped.append(cohort, keys[pick, t : t + 1], values[pick, t : t + 1], settle=False)
            stepped.append(cohort, None, None)
    for cohort in whole.cohorts:
        whole.append(cohort, keys[cohort.rows_tensor], values[cohort.rows_tensor])
    for a, b in zip(stepped.cohorts, whole.cohorts):
        # Windows slide page by page, so how much lies before what is seen may differ; where both hold, they
        # agree.
        assert a.geometry.length == b.geometry.length
        if a.geometry == b.geometry:
            assert torch.equal(exact(stepped, a), exact(whole, b))
            if a.packed.shape[1]:
                assert all(torch.equal(x, y) for x, y in zip(packed(stepped, a), packed(whole, b)))
    full = stepped.cohorts[0]
    assert full.geometry == whole.cohorts[0].geometry and full.geometry.packed_stop == 160
    assert torch.equal(exact(stepped, full), keys[full.rows_tensor, 160:])
    assert close(packed(stepped, full)[1], values[full.rows_tensor, :160])


def test_horizon_leaves_the_newest_tokens_alone() -> None:
    layer = make([Extent(), Extent(0, 32)], kivi(), residual=0)
    keys, values = torch.randn(2, 2, 128, DIM)
    for i, cohort in enumerate(layer.cohorts):
        layer.append(cohort, keys[i : i + 1], values[i : i + 1], horizon=64)
    assert [cohort.geometry.exact_base for cohort in layer.cohorts] == [64, 64]
    assert [cohort.geometry.packed_base for cohort in layer.cohorts] == [0, 32]
    layer.crop(60)
    for cohort in layer.cohorts:
        layer.append(cohort, None, None)
    assert [cohort.geometry.exact_base for cohort in layer.cohorts] == [64, 64]


@pytest.mark.parametrize("own", [False, True])
def test_numbers_that_cannot_be_packed_change_nothing(own: bool) -> None:
    codec = SharedKeys(8) if own else kivi(8)
    layer = make([Extent(0, 150)], codec)
    extend(layer, 200)
    (cohort,) = layer.cohorts
    used = [pool.pages_in_use for pool in layer.pools]
    for number in (float("nan"), float("inf"), -float("inf"), 65520.0):
        for which in range(2):
            tokens = [torch.randn(1, 200, DIM), torch.randn(1, 200, DIM)]
            tokens[which][0, 100, 3] = number
            before = image(layer)
            with pytest.raises(NonFiniteError, match="float16"):
                layer.append(cohort, *tokens)
            assert image(layer) == before
            assert [pool.pages_in_use for pool in layer.pools] == used
    keys, _ = extend(layer, 200, seed=1)
    assert torch.equal(exact(layer, cohort), keys[:, cohort.geometry.exact_base - 200 :])
    assert close(packed(layer, cohort)[0][:, -100:], keys[:, -100 - exact(layer, cohort).shape[1] :][:, :100])


# -- sharing ----------------------------------------------------------------------------------------------


def test_a_fork_shares_every_page_until_either_writes() -> None:
    layer = make([Extent()], kivi(8))
    extend(layer, 140)
    used = layer.pools.budget.used
    twin = layer.fork()
    before = image(layer)
    assert image(twin) == before and layer.pools.budget.used == used
    (mine,), (other,) = layer.cohorts, twin.cohorts
    assert np.array_equal(mine.exact, other.exact) and np.array_equal(mine.packed, other.packed)

    extend(twin, 10, seed=1)
    assert image(layer) == before
    assert mine.exact[0, :-1].tolist() == other.exact[0, :1].tolist()[: mine.exact.shape[1] - 1]
    assert mine.exact[0, -1] != other.exact[0, -1]  # the open page was copied
    extend(layer, 100, seed=2)
    after = image(layer)
    twin.free()
    assert image(layer) == after
    layer.free()
    assert all(pool.pages_in_use == 0 for pool in layer.pools)


def test_a_fork_that_packs_into_a_shared_open_page_copies_it() -> None:
    layer = make([Extent()], kivi(2))
    extend(layer, 140)
    twin = layer.fork()
    before = image(layer)
    extend(twin, 64, seed=1)
    assert twin.cohorts[0].packed.shape == layer.cohorts[0].packed.shape == (1, 1)
    assert twin.cohorts[0].packed[0, 0] != layer.cohorts[0].packed[0, 0]
    assert image(layer) == before
    old = packed(layer, layer.cohorts[0])
    assert all(torch.equal(x[:, : y.shape[1]], y) for x, y in zip(packed(twin, twin.cohorts[0]), old))


def test_select_repeats_drops_and_reorders() -> None:
    layer = make([Extent(), Extent(0, 40)], kivi(8), batch=3)
    extend(layer, [200, 150, 90])
    before = {}
    for cohort in layer.cohorts:
        for i, row in enumerate(cohort.rows.tolist()):
            before[row] = (cohort.geometry, exact(layer, cohort)[i], exact(layer, cohort, "values")[i])
    in_use = layer.exact_pool.pages_in_use
    layer.select(np.array([2, 0, 2, 2]))
    assert layer.batch == 4 and layer.lengths().tolist() == [90, 200, 90, 90]
    assert layer.exact_pool.pages_in_use < in_use
    for cohort in layer.cohorts:
        for i, row in enumerate(cohort.rows.tolist()):
            sequence, head = divmod(row, 2)
            geometry, keys, values = before[[2, 0, 2, 2][sequence] * 2 + head]
            assert cohort.geometry == geometry
            assert torch.equal(exact(layer, cohort)[i], keys)
            assert torch.equal(exact(layer, cohort, "values")[i], values)
    keys, _ = extend(layer, 3, seed=5)  # sequences that were one now differ
    for cohort in layer.cohorts:
        assert torch.equal(exact(layer, cohort)[:, -3:], keys[cohort.rows_tensor])
    layer.select(np.array([], dtype=np.int64))
    assert layer.batch == 0 and all(pool.pages_in_use == 0 for pool in layer.pools)


def test_two_layers_share_their_packed_pages_and_keep_their_own_fields() -> None:
    pools = Pools()
    one, two = make(codec=SharedKeys(), pools=pools), make(codec=SharedKeys(), pools=pools)
    extend(one, 600, seed=1)
    extend(two, 600, seed=2)
    assert one.packed_pool is two.packed_pool and one.own_pool is two.own_pool
    assert one.packed_pool is not None and one.own_pool is not None
    (mine,), (theirs,) = two.cohorts, one.cohorts
    pages = mine.packed.size
    values, keys = packed(two, mine)[1], packed(one, theirs)[0]
    assert one.packed_pool.pages_in_use == one.own_pool.pages_in_use == 2 * pages
    one_before = image(one)

    two.share_packed(one)
    assert one.packed_pool.pages_in_use == pages  # stored, and counted, once
    assert one.own_pool.pages_in_use == 2 * pages
    assert torch.equal(packed(two, mine)[0], keys)
    assert torch.equal(packed(two, mine)[1], values)
    assert image(one) == one_before
    pools.budget.trim()
    assert pools.budget.used == sum(pool.allocated_bytes for pool in pools)

    extend(two, 100, seed=3)  # packs into the open page, of which two now needs a copy
    assert image(one) == one_before
    assert torch.equal(packed(two, mine)[0][:, :544], keys[:, :544])
    after = image(two)
    one.free()
    assert image(two) == after
    two.free()
    assert all(pool.pages_in_use == 0 for pool in pools)


def test_a_layer_whose_packed_pages_were_taken_over_copies_them_before_it_writes() -> None:
    pools = Pools()
    one, two = make(codec=SharedKeys(), pools=pools), make(codec=SharedKeys(), pools=pools)
    extend(one, 300, seed=1)
    extend(two, 300, seed=2)
    two.share_packed(one)
    before = image(two)
    one.crop(100)
    extend(one, 100, seed=3)
    assert one.cohorts[0].geometry.packed_stop == 256 and image(two) == before


def test_layers_share_only_what_stands_at_the_same_place() -> None:
    pools = Pools()
    extents = [Extent(), Extent(0, 300)]
    one = make(extents, SharedKeys(), pools=pools, batch=2)
    two = make(extents, SharedKeys(), pools=pools, batch=2)
    extend(one, [300, 300], seed=1)
    extend(two, [300, 300], seed=2)
    two.cohorts.reverse()
    two.cohorts[0], two.cohorts[1] = two.cohorts[1], two.cohorts[0]
    extend(two, [0, 1], seed=3)
    before, pages = image(two), [cohort.packed.tolist() for cohort in two.cohorts]
    with pytest.raises(CacheStateError, match="the same tokens"):
        two.share_packed(one)
    extend(one, [1, 1], seed=4)
    with pytest.raises(CacheStateError, match="the same tokens"):
        two.share_packed(one)
    assert image(two) == before and [cohort.packed.tolist() for cohort in two.cohorts] == pages


def test_shared_own_pages_are_counted_when_an_append_must_copy_them() -> None:
    pools = Pools()
    one, two = make(codec=SharedKeys(), pools=pools), make(codec=SharedKeys(), pools=pools)
    extend(one, 160, seed=1)
    extend(two, 160, seed=2)
    twin = two.fork()  # holds the own pages of `two` as well
    two.share_packed(one)
    one.free()
    twin_before = image(twin)
    demand = two.demand(np.array([32]))
    assert two.packed_pool is not None and two.own_pool is not None
    assert (demand[two.packed_pool][0], demand[two.own_pool][0]) == (0, 1)
    pools.budget.trim()
    reserve_exactly(pools, demand)
    extend(two, 32, seed=3)
    assert image(twin) == twin_before


# -- the cap ----------------------------------------------------------------------------------------------


def reserve_exactly(pools: Pools, demand: dict) -> None:
    """Cap the pools at what an append demands, to the byte."""
    pools.budget.trim()
    need = sum(max(0, taken - pool.free_pages) * pool.layout.nbytes for pool, (taken, _) in demand.items())
    pools.budget.limit = pools.budget.used + need
    pools.budget.reserve({pool: taken for pool, (taken, _) in demand.items()})


def test_demand_is_what_an_unshared_append_takes() -> None:
    for extents in ([Extent()], [Extent(), Extent(4, 100)], [Extent(40, 70)]):
        layer = make(extents, kivi(8), batch=2)
        extend(layer, [90, 30])
        for step, tokens in enumerate(([50, 50], [1, 1], [300, 2], [0, 1], [64, 0], [7, 7])):
            demand = layer.demand(np.array(tokens))
            before = {pool: pool.pages_in_use for pool in layer.pools}
            extend(layer, tokens, seed=step)
            for pool, (taken, freed) in demand.items():
                assert pool.pages_in_use - before[pool] == taken - freed, (tokens, pool.layout.name)


def test_pages_given_back_are_counted_for_the_rows_that_give_them() -> None:
    layer = make([Extent(0, 64)], batch=2)
    extend(layer, [200, 200])
    (cohort,) = layer.cohorts
    layer.exact_pool.retain(cohort.exact[0])  # somebody else holds the first row's pages
    ((_, freed),) = layer.demand(np.array([65, 0])).values()
    assert freed == 0
    ((_, freed),) = layer.demand(np.array([0, 65])).values()
    assert freed == 2


def test_an_append_that_was_announced_fits_to_the_byte_and_one_byte_less_is_refused() -> None:
    for tokens in (1, 2, 33, 500):
        layer = make([Extent(), Extent(4, 100)], kivi(), batch=2)
        extend(layer, 160)
        twin = layer.fork()
        demand = twin.demand(np.full(2, tokens))
        reserve_exactly(twin.pools, demand)
        extend(twin, tokens, seed=1)
        budget = layer.pools.budget
        assert budget.used <= (budget.limit or 0)
        budget.trim()
        demand = layer.demand(np.full(2, tokens))
        need = sum(max(0, taken - pool.free_pages) * pool.layout.nbytes for pool, (taken, _) in demand.items())
        budget.limit = budget.used + need - 1
        before = image(layer)
        with pytest.raises(CacheFullError, match="nothing was stored"):
            budget.reserve({pool: taken for pool, (taken, _) in demand.items()})
        assert image(layer) == before


# -- taking back ------------------------------------------------------------------------------------------


def test_crop_takes_the_newest_tokens_back() -> None:
    layer = make([Extent()], batch=2)
    keys, _ = extend(layer, [100, 40])
    layer.crop(50)
    assert layer.lengths().tolist() == [50, 0]
    more, _ = extend(layer, 5, seed=1)
    for cohort in layer.cohorts:
        (row,) = cohort.rows.tolist()
        kept = keys[row : row + 1, :50] if row == 0 else keys[:1, :0]
        assert torch.equal(exact(layer, cohort), torch.cat([kept, more[row : row + 1]], 1))
    layer.crop(10**6)
    assert layer.lengths().tolist() == [0, 0] and layer.exact_pool.pages_in_use == 0


@pytest.mark.parametrize("count", [1, 32, 33, 40, 72, 73, 100, 170, 199, 200])
def test_crop_into_packed_groups(count: int) -> None:
    layer = make([Extent()], kivi(8))
    keys, _ = extend(layer, 200)
    (cohort,) = layer.cohorts
    was = packed(layer, cohort)
    twin = layer.fork()
    before = image(twin)
    layer.crop(count)
    left = 200 - count
    assert cohort.geometry.length == left
    stop = cohort.geometry.packed_stop
    assert stop == min(160, left // 32 * 32)
    if stop:
        assert all(torch.equal(x, y[:, :stop]) for x, y in zip(packed(layer, cohort), was))
    if left > stop:
        wanted = keys[:, stop:left] if left > 160 else was[0][:, stop:left]
        assert torch.equal(exact(layer, cohort), wanted)
    assert image(twin) == before
    new, _ = extend(layer, 90, seed=1)
    assert torch.equal(exact(layer, cohort)[:, -32:], new[:, -32:])
    assert image(twin) == before


def test_crop_of_a_window() -> None:
    layer = make([Extent(), Extent(4, 64)])
    keys, _ = extend(layer, 300)
    before = image(layer)
    layer.plan_crop(13)
    assert image(layer) == before
    with pytest.raises(CacheStateError, match="cannot take back 100 tokens: heads with a window of 64 tokens"):
        layer.crop(100)
    with pytest.raises(CacheStateError):
        layer.plan_crop(100)
    assert image(layer) == before
    layer.crop(300 - 20)  # all that is left is in the sinks' page
    for cohort in layer.cohorts:
        assert torch.equal(exact(layer, cohort), keys[cohort.rows_tensor, :20])
    new, _ = extend(layer, 100, seed=1)
    window = layer.cohorts[1]
    assert torch.equal(exact(layer, window)[:, :32], torch.cat([keys[1:, :20], new[1:, :12]], 1))


def test_crop_that_does_not_fit_under_the_cap_changes_nothing() -> None:
    layer = make([Extent(), Extent(0, 300)], kivi(8, 64), residual=0, batch=2)
    extend(layer, 256)
    assert all(cohort.exact.shape[1] == 0 for cohort in layer.cohorts)
    budget = layer.pools.budget
    budget.trim()
    before = image(layer)
    budget.limit = budget.used + 7 * EXACT_PAGE
    with pytest.raises(CacheFullError):
        layer.crop(10)  # 54 tokens of each row come back to the exact tier: 8 pages
    assert image(layer) == before
    budget.limit += EXACT_PAGE
    layer.crop(10)
    assert layer.lengths().tolist() == [246, 246]


def test_start_again_after_free() -> None:
    layer = make([Extent()], kivi())
    extend(layer, 300)
    layer.free()
    assert layer.batch == 0 and layer.lengths().tolist() == []
    layer.start(2)
    keys, _ = extend(layer, 20)
    assert torch.equal(exact(layer, layer.cohorts[0]), keys)


# -- blocks -----------------------------------------------------------------------------------------------


def test_blocks_cover_a_table_in_order() -> None:
    rng = np.random.default_rng(0)
    assert _blocks(np.empty((3, 0), np.int64), 4) == []
    for _ in range(300):
        rows, columns = rng.integers(1, 4), rng.integers(1, 60)
        jumps = rng.random(columns) < rng.choice([0.02, 0.3, 0.9])
        ids = np.arange(columns) + 100 * np.cumsum(jumps) + 10_000 * np.arange(rows)[:, None]
        longest = int(rng.integers(1, 70))
        blocks = _blocks(ids, longest)
        assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])] and blocks[-1][1] == columns
        assert all(0 < last - first <= longest for first, last in blocks)
        runs = np.split(np.arange(columns), np.flatnonzero(jumps[1:]) + 1)
        for run in runs:
            if 8 <= len(run) <= longest:
                assert (run[0], run[-1] + 1) in blocks


@pytest.mark.parametrize("scattered", [False, True])
def test_blocks_read_what_the_tables_name(scattered: bool) -> None:
    layer = make([Extent()], kivi(), batch=2)
    if scattered:
        for i in range(60):
            extend(layer, [15, 10] if i % 3 else [3, 14], seed=i)
    else:
        extend(layer, 900)
    for cohort in layer.cohorts:
        table = layer.exact_pool.read("keys", cohort.exact.reshape(-1)).reshape(len(cohort.rows), -1, DIM)
        assert torch.equal(exact(layer, cohort), table[:, : exact(layer, cohort).shape[1]])
        whole = layer.packed_fields(cohort, 0, cohort.packed.shape[1])
        blocks = [layer.packed(location, own) for _, _, location, own in layer.packed_blocks(cohort, 4096)]
        for name, x in whole.items():
            assert torch.equal(torch.cat([block[name] for block in blocks], 1), x)


def test_table_bytes() -> None:
    layer = make([Extent()], kivi(), batch=2)
    extend(layer, 300)  # 8 groups packed, in a page; 12 + 32 tokens exact, in two
    assert layer.table_bytes == 8 * (2 + 2 * 2 + 2 * 1)
