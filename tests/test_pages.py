"""Pools of pages: which pages are given out, who holds them, what is in them, and the cap on their bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import CacheFullError
from fivefold.store.layout import Field, PageLayout
from fivefold.store.pages import SLAB_SHIFT, Budget, PagePool
from fivefold.store.tier import Tier
from fivefold.store.transaction import Transaction

CPU = torch.device("cpu")
LAYOUT = PageLayout(
    "test",
    4,
    (Field("numbers", (4, 2), torch.float32, "exact"), Field("codes", (3,), torch.int16, "codes", own=True)),
)
BYTES = 4 * 2 * 4 + 3 * 2


def pool(limit: int | None = None) -> PagePool:
    return PagePool(LAYOUT, CPU, Budget(limit))


def ids(slab: int, *index: int) -> list[int]:
    return [(slab << SLAB_SHIFT) + i for i in index]


def fill(pages: PagePool, which: np.ndarray) -> dict[str, torch.Tensor]:
    """Write something different into every page."""
    n = len(which)
    values = {"numbers": torch.randn(n, 4, 2), "codes": torch.randint(-999, 999, (n, 3)).to(torch.int16)}
    for name, x in values.items():
        pages.write(name, which, x)
    return values


def test_layout_counts_bytes() -> None:
    assert LAYOUT.nbytes == BYTES
    assert LAYOUT.bytes_by_kind() == {"exact": 32, "codes": 6}
    shared, own = LAYOUT.split()
    assert own is not None
    assert [f.name for f in shared.fields] == ["numbers"] and [f.name for f in own.fields] == ["codes"]
    assert shared.nbytes + own.nbytes == BYTES
    assert shared.split() == (shared, None)


def test_a_pool_grows_by_what_is_asked_and_ahead_of_steps_by_a_sixteenth() -> None:
    for step in (False, True):
        pages = pool()
        assert pages.allocate(0, step).tolist() == []
        assert pages.allocate(32, step).tolist() == ids(0, *range(32))
        assert (pages.total_pages, pages.free_pages) == (32, 0)
        assert pages.allocate(1, step).tolist() == ids(1, 0)
        assert (pages.total_pages, pages.free_pages) == ((34, 1) if step else (33, 0))
        assert pages.allocated_bytes == pages.budget.used == pages.total_pages * BYTES


@pytest.mark.parametrize(("step", "part"), [(False, 128), (True, 16)])
def test_slabs_stay_few_however_few_pages_are_asked_for_at_a_time(step: bool, part: int) -> None:
    pages = pool()
    for _ in range(4096):
        pages.allocate(1, step)
        assert pages.free_pages * part <= pages.total_pages
    assert len(list(pages._live())) <= part * (2 + np.log(4096 / part))


def test_steps_of_many_rows_find_free_pages_and_slabs_stay_few() -> None:
    """Rows of different lengths want a page each in nearly every step, hundreds of rows at a time: the pool grows by a
    hundredth, not with each of them, and what is free can be taken ahead (`ample`)."""
    pages, there = pool(), []
    pages.allocate(30_000)
    for _ in range(64):
        there.append(pages.ample(100))
        pages.allocate(100, step=True)
        assert pages.free_pages * 100 <= pages.total_pages
    assert len(list(pages._live())) < 40 and sum(there) > 28
    assert pages.total_pages <= 30_000 + 64 * 100 + pages.total_pages // 100


def test_a_step_uses_scattered_pages_before_the_pool_grows() -> None:
    for step in (False, True):
        pages = pool()
        first = pages.allocate(200)
        pages.release(first[::2])
        taken = pages.allocate(90, step)
        assert pages.total_pages == (200 if step else 290)
        assert set(taken.tolist()) <= set(first[::2].tolist()) if step else (np.diff(taken) == 1).all()
        assert len(pages.allocate(30, step)) == 30 and pages.total_pages == (290 if not step else 230)


def test_allocation_takes_a_run_where_there_is_one() -> None:
    pages = pool()
    first = pages.allocate(10)
    pages.release(first[[1, 4, 5, 6]])
    assert pages.allocate(3).tolist() == ids(0, 4, 5, 6)
    assert pages.allocate(1).tolist() == ids(0, 1)


def test_a_run_is_the_first_one_that_is_long_enough() -> None:
    rng = np.random.default_rng(0)
    pages = pool()
    slabs = [pages.allocate(count) for count in (40, 200, 90)]
    held = list(np.concatenate(slabs))
    for _ in range(300):
        count = int(rng.integers(1, 30))
        free = pages.references(np.concatenate(slabs)) == 0
        ends = np.flatnonzero(np.diff(np.concatenate(slabs)) != 1)  # of slabs: no run goes on behind them
        starts = [i for i in range(len(free) - count + 1) if free[i : i + count].all()]
        starts = [i for i in starts if not ((ends >= i) & (ends < i + count - 1)).any()]
        taken = pages._run(count)
        assert (taken is not None) == bool(starts)
        if taken is not None:
            assert taken.tolist() == np.concatenate(slabs)[starts[0] : starts[0] + count].tolist()
            held += list(taken)
        gone = rng.permutation(len(held))[: rng.integers(0, 25)]
        pages.release(np.array(held, dtype=np.int64)[gone])
        held = [page for i, page in enumerate(held) if i not in gone]
        assert pages.pages_in_use == len(held)


def test_scattered_pages_are_free_ones_though_they_were_found_before() -> None:
    """Pages that are remembered from one look may be somebody's by the next, or their slab may be gone."""
    rng = np.random.default_rng(1)
    pages = pool()
    held = [*pages.allocate(60), *pages.allocate(200), *pages.allocate(90)]
    for turn in range(400):
        gone = rng.permutation(len(held))[: rng.integers(0, 40)]
        pages.release(np.array(held, dtype=np.int64)[gone])
        held = [page for i, page in enumerate(held) if i not in gone]
        count, free = int(rng.integers(1, 9)), pages.free_pages
        taken = pages._run(count) if turn % 3 == 0 else pages._scattered(count, [turn % 2] if turn % 5 == 0 else [])
        if taken is not None:
            assert len(taken) == min(count, free) or turn % 5 == 0
            held += list(taken)
        assert len(set(held)) == len(held) == pages.pages_in_use
        assert (pages.references(np.array(held, dtype=np.int64)) == 1).all()
        if turn % 50 == 49:  # all of a slab is free, and it goes
            mine = [page for page in held if page >> 20 == 0]
            pages.release(np.array(mine, dtype=np.int64))
            held = [page for page in held if page >> 20]
            pages.trim()
            held += pages.allocate(60).tolist()


def test_scattered_pages_are_used_before_the_pool_grows() -> None:
    pages = pool()
    first = pages.allocate(10)
    pages.release(first[[1, 4, 7]])
    assert pages.allocate(3).tolist() == ids(0, 1, 4, 7)
    assert pages.total_pages == 10


def test_many_scattered_pages_are_worth_a_run_of_their_own_unless_the_cap_forbids_it() -> None:
    for limit, grown in ((None, True), (400 * BYTES, True), (250 * BYTES, False)):
        pages = pool(limit)
        first = pages.allocate(200)
        pages.release(first[::2])
        run = pages.allocate(100)
        assert (np.diff(run) == 1).all() == grown
        assert pages.total_pages == (300 if grown else 200)


def test_an_eighth_of_the_cap_is_not_spent_on_convenience() -> None:
    kinds = set()
    for limit in range(300 * BYTES, 360 * BYTES, 7):
        pages = pool(limit)
        first = pages.allocate(200)
        pages.release(first[::2])
        run = pages.allocate(100)  # a run of its own, or scattered
        roomy = 300 * BYTES + limit // 8 <= limit
        assert (np.diff(run) == 1).all() == roomy
        assert pages.total_pages == (300 if roomy else 200)
        if not roomy:
            pages.allocate(100)
            assert pages.budget.used == 300 * BYTES
        kinds.add(roomy)
    assert kinds == {False, True}


def test_the_cap_is_exact_and_a_refusal_takes_nothing() -> None:
    pages = pool(10 * BYTES)
    pages.allocate(7)
    with pytest.raises(CacheFullError) as caught:
        pages.allocate(4)
    assert str(caught.value) == (
        f"the cache is full: {4 * BYTES} bytes more are needed, and {7 * BYTES} of the cap of {10 * BYTES} "
        "bytes are in use; nothing was stored: raise max_bytes, or use a recipe that keeps less."
    )
    assert (pages.total_pages, pages.free_pages, pages.budget.used) == (7, 0, 7 * BYTES)
    pages.allocate(3)
    assert pages.budget.used == 10 * BYTES
    with pytest.raises(CacheFullError):
        pages.allocate(1)


def test_two_pools_under_one_cap_give_way_to_each_other() -> None:
    budget = Budget(10 * BYTES)
    one, two = PagePool(LAYOUT, CPU, budget), PagePool(LAYOUT, CPU, budget)
    held = one.allocate(8)
    with pytest.raises(CacheFullError):
        two.allocate(3)
    one.release(held)  # a wholly free slab goes to who needs it
    assert len(two.allocate(9)) == 9
    assert (one.total_pages, budget.used) == (0, 9 * BYTES)
    assert one.allocate(1).tolist() == ids(0, 0)


def test_what_owners_charge_counts_with_the_pages_of_all_pools() -> None:
    budget = Budget(10 * BYTES)
    one, two = PagePool(LAYOUT, CPU, budget), PagePool(LAYOUT, CPU, budget)
    held = one.allocate(4)
    two.allocate(2)
    budget.charge(1, 3 * BYTES)
    budget.charge(2, BYTES)
    for refused in (lambda: budget.charge(2, BYTES + 1), lambda: budget.charge(3, 1), lambda: two.allocate(1)):
        with pytest.raises(CacheFullError, match=f"and {10 * BYTES} of the cap"):
            refused()
        assert budget.charged == {1: 3 * BYTES, 2: BYTES} and budget.used == 6 * BYTES
    budget.charge(1, 2 * BYTES)  # instead of what it had
    two.allocate(1)
    one.release(held)
    budget.charge(2, 5 * BYTES)  # for which a wholly free slab goes
    assert (one.total_pages, budget.used) == (0, 3 * BYTES)
    with pytest.raises(CacheFullError):
        budget.charge(1, 2 * BYTES + 1)
    budget.charge(2, 0)
    assert budget.charged == {1: 2 * BYTES}
    Budget().charge(1, 10**18)


def test_trim_gives_back_slabs_that_are_wholly_free() -> None:
    pages = pool()
    first, second = pages.allocate(4), pages.allocate(4)
    pages.release(second)
    pages.release(first[:3])
    pages.trim()
    assert (pages.total_pages, pages.free_pages) == (4, 3)
    assert pages.budget.used == 4 * BYTES
    assert pages.allocate(5).tolist() == ids(1, *range(5))  # the number is used again
    pages.release(first[3:])
    pages.release(np.array(ids(1, *range(5))))
    pages.trim()
    assert (pages.total_pages, pages.free_pages, pages.budget.used) == (0, 0, 0)


def test_references() -> None:
    pages = pool()
    table = pages.allocate(6).reshape(2, 3)
    pages.retain(table[0])
    pages.retain(np.array([table[1, 2], table[1, 2]]))  # the same page twice
    assert pages.references(table).tolist() == [[2, 2, 2], [1, 1, 3]]
    pages.release(table)
    assert pages.references(table).tolist() == [[1, 1, 1], [0, 0, 2]]
    assert (pages.free_pages, pages.pages_in_use) == (2, 4)
    with pytest.raises(AssertionError):
        pages.retain(table[1])
    assert pages.references(pages.allocate(2)).tolist() == [1, 1]


def test_a_page_cannot_be_released_more_often_than_it_is_held() -> None:
    pages = pool()
    held = pages.allocate(2)
    pages.release(held)
    with pytest.raises(AssertionError):
        pages.release(held)


def test_write_and_read_across_slabs() -> None:
    pages = pool()
    a, b = pages.allocate(5), pages.allocate(7)
    order = np.concatenate([a, b])[np.random.default_rng(0).permutation(12)]
    values = fill(pages, order)
    for name, x in values.items():
        assert torch.equal(pages.read(name, order), x)
        for i, page in enumerate(order):
            assert torch.equal(pages.read(name, order[i : i + 1])[0], x[i])
            slab = pages._slabs[int(page) >> SLAB_SHIFT]
            assert slab is not None and torch.equal(slab.tensors[name][int(page) & (1 << SLAB_SHIFT) - 1], x[i])


def test_write_a_part_of_pages() -> None:
    pages = pool()
    held = np.concatenate([pages.allocate(3), pages.allocate(3)])
    fill(pages, held)
    for which in (held[:3], held[[0, 2, 5]], held[4:5]):
        before = pages.read("numbers", held).clone()
        new = torch.randn(len(which), 2, 2, dtype=torch.float64)
        pages.write("numbers", which, new, slice(1, 3))
        before[[held.tolist().index(page) for page in which], 1:3] = new.float()
        assert torch.equal(pages.read("numbers", held), before)
    pages.write("numbers", held[:0], torch.empty(0, 4, 2))


@pytest.mark.parametrize(
    ("rows", "columns", "row_stride", "column_stride"),
    [(1, 1, 1, 1), (1, 6, 1, 1), (6, 1, 1, 1), (3, 2, 2, 1), (2, 3, 1, 2), (2, 2, 7, 3), (4, 3, 5, 1)],
)
def test_a_regular_grid_of_pages_is_read_without_a_copy(
    rows: int, columns: int, row_stride: int, column_stride: int
) -> None:
    pages = pool()
    pages.allocate(2)
    run = pages.allocate(40)
    values = fill(pages, run)
    index = 5 + row_stride * np.arange(rows)[:, None] + column_stride * np.arange(columns)
    location = pages.locate(run[index])
    assert location.slab is not None
    for name, x in values.items():
        view = pages.fetch(name, location)
        assert torch.equal(view, x[torch.from_numpy(index)])
        assert view.untyped_storage().data_ptr() == location.slab.tensors[name].untyped_storage().data_ptr()


def test_what_chunks_left_side_by_side_is_joined_without_indices() -> None:
    pages = pool()
    parts = [pages.allocate(count).reshape(3, -1) for count in (6, 3, 12)]
    table = np.concatenate(parts, 1)
    values = fill(pages, table.reshape(-1))
    location = pages.locate(table)
    assert [run.shape for run in location.runs] == [(3, 2), (3, 1), (3, 4)] and not location.parts
    for name, x in values.items():
        assert torch.equal(pages.fetch(name, location), x.view(3, 7, *x.shape[1:]))
    mixed = table.copy()
    mixed[1, 3] = table[2, 3]  # of another stride
    assert not pages.locate(mixed).runs


def test_any_other_table_is_gathered() -> None:
    pages = pool()
    a, b = pages.allocate(6), pages.allocate(6)
    values = fill(pages, np.concatenate([a, b]))
    everything = np.concatenate([a, b])
    rng = np.random.default_rng(1)
    for _ in range(50):
        rows, columns = rng.integers(1, 4), rng.integers(1, 5)
        source = a if rng.random() < 0.5 else everything
        index = rng.integers(0, len(source), (rows, columns))  # pages may come twice
        location = pages.locate(source[index])
        for name, x in values.items():
            found = pages.fetch(name, location)
            assert found.shape == (rows, columns, *x.shape[1:])
            assert torch.equal(found, x[torch.from_numpy(index)])


def tier_of(pools: list[PagePool], rows: int) -> tuple[Tier, list[np.ndarray]]:
    """A page of each pool in every row."""
    tier, change = Tier(pools, rows), Transaction()
    tier.widen(change, np.arange(rows), 0, 1)
    change.commit()
    return tier, [table[:, 0].copy() for table in tier.tables]


@pytest.mark.parametrize("back", [False, True])
def test_copy_on_write(back: bool) -> None:
    pages = pool()
    tier, (held,) = tier_of([pages], 3)
    values, rows = fill(pages, held), np.arange(3)
    for tier.shared in (False, True):  # nobody else holds them
        change = Transaction()
        tier.unshare(change, rows, 0)
        change.commit()
        assert tier.table[:, 0].tolist() == held.tolist() and pages.pages_in_use == 3
    pages.retain(held[1:])
    change = Transaction()
    tier.unshare(change, rows, 0)
    mine = tier.table[:, 0].copy()
    assert mine[0] == held[0] and not set(mine[1:]) & set(held)
    for name, x in values.items():
        assert torch.equal(pages.read(name, mine), x)
    pages.write("numbers", mine[2:], torch.zeros(1, 4, 2))
    if back:
        change.rollback()
        assert tier.table[:, 0].tolist() == held.tolist()
        assert pages.references(held).tolist() == [1, 2, 2] and pages.pages_in_use == 3
    else:
        assert pages.references(held).tolist() == [1, 2, 2]  # until nothing can bring them back
        change.commit()
        assert pages.references(held).tolist() == [1, 1, 1]
        assert pages.references(mine).tolist() == [1, 1, 1]
    for name, x in values.items():
        assert torch.equal(pages.read(name, held), x)


def test_two_holders_in_one_table_each_get_a_copy() -> None:
    pages = pool()
    tier, (both,) = tier_of([pages], 2)
    pages.release(both[1:])
    held = both[:1]
    values = fill(pages, held)
    pages.retain(held)
    tier.table[:, 0] = held
    tier.shared = True
    change = Transaction()
    tier.unshare(change, np.arange(2), 0)
    change.commit()
    mine = tier.table[:, 0]
    assert len({*mine.tolist(), *held.tolist()}) == 3
    assert torch.equal(pages.read("numbers", mine), values["numbers"].expand(2, -1, -1))
    assert pages.references(held).tolist() == [0]


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_copy_on_write_that_does_not_fit_changes_nothing(room: int) -> None:
    """Of two pools, the second of which has no room."""
    budget = Budget()
    pools = [PagePool(LAYOUT, CPU, budget) for _ in range(2)]
    tier, held = tier_of(pools, 2)
    values = [fill(pages, which) for pages, which in zip(pools, held)]
    for pages, which in zip(pools, held):
        pages.retain(which)
    tier.shared = True
    budget.limit = (4 + room) * BYTES
    change = Transaction()
    with pytest.raises(CacheFullError):
        tier.unshare(change, np.arange(2), 0)
    change.rollback()
    for pages, which, table, before in zip(pools, held, tier.tables, values):
        assert table[:, 0].tolist() == which.tolist()
        assert pages.references(which).tolist() == [2, 2] and pages.pages_in_use == 2
        assert all(torch.equal(pages.read(name, which), x) for name, x in before.items())
    budget.trim()
    assert budget.used == 4 * BYTES
    budget.limit = 8 * BYTES
    tier.unshare(change := Transaction(), np.arange(2), 0)
    change.commit()
    assert [pages.references(which).tolist() for pages, which in zip(pools, held)] == [[1, 1], [1, 1]]


def test_committed_tokens_that_are_written_over_come_back() -> None:
    pages = pool()
    old = pages.allocate(4)
    values, change = fill(pages, old), Transaction()
    fresh = change.allocate(pages, 2)
    table = np.array([old[2], fresh[0], old[0]])
    change.keep(pages, table)
    fill(pages, table)
    change.release(pages, fresh)  # at once: they may be anybody's
    other = pages.allocate(2)
    theirs = fill(pages, other)
    change.rollback()
    for name, x in values.items():
        assert torch.equal(pages.read(name, old), x)
        assert torch.equal(pages.read(name, other), theirs[name])
    assert pages.references(old).tolist() == [1] * 4 and pages.pages_in_use == 6


def test_slabs_that_could_be_emptied() -> None:
    pages = pool()
    slabs = [pages.allocate(count) for count in (10, 20, 30)]
    assert pages.sparse() == []
    pages.release(slabs[0][2:])
    assert pages.sparse() == []  # two pages, for which there is no place elsewhere
    pages.release(slabs[2][:2])
    assert pages.sparse() == [0]
    assert pages.allocate_elsewhere(5, [0]).tolist() == slabs[2][:2].tolist()
    assert pages.sparse() == []
    pages.release(slabs[1][:15])
    assert pages.sparse() == [0]
    assert pages.allocate_elsewhere(3, [0]).tolist() == slabs[1][:3].tolist()


def test_consecutive_pages_are_copied_to_scattered_ones_of_the_same_slab() -> None:
    pages = pool()
    taken = pages.allocate(8)
    values = fill(pages, taken)
    pages.copy(taken[1:4], taken[[6, 0, 5]])
    for name, x in values.items():
        assert torch.equal(pages.read(name, taken), x[[2, 1, 2, 3, 4, 3, 1, 7]])
