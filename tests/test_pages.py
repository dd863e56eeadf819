"""Pools of pages: which pages are given out, who holds them, what is in them, and the cap on their bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fivefold.errors import CacheFullError
from fivefold.store.pages import SLAB_SHIFT, Budget, Field, PageLayout, PagePool

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


def test_a_slab_grows_by_what_is_asked_and_at_least_a_sixteenth() -> None:
    pages = pool()
    assert pages.allocate(0).tolist() == []
    assert pages.allocate(32).tolist() == ids(0, *range(32))
    assert (pages.total_pages, pages.free_pages) == (32, 0)
    assert pages.allocate(1).tolist() == ids(1, 0)
    assert (pages.total_pages, pages.free_pages) == (34, 1)
    assert pages.allocated_bytes == pages.budget.used == 34 * BYTES


def test_allocation_takes_a_run_where_there_is_one() -> None:
    pages = pool()
    first = pages.allocate(10)
    pages.release(first[[1, 4, 5, 6]])
    assert pages.allocate(3).tolist() == ids(0, 4, 5, 6)
    assert pages.allocate(1).tolist() == ids(0, 1)


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


def test_what_is_reserved_is_not_spent_on_convenience() -> None:
    pages = pool(300 * BYTES)
    first = pages.allocate(200)
    pages.release(first[::2])
    pages.budget.reserve({pages: 150})
    assert pages.budget.reserved == 50 * BYTES
    pages.allocate(100)  # scattered: a run of its own would take the 50 pages that are promised
    assert pages.total_pages == 200
    pages.allocate(50)
    assert pages.budget.used == 250 * BYTES


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


def test_a_reservation_counts_free_pages_and_all_pools_together() -> None:
    budget = Budget(10 * BYTES)
    one, two = PagePool(LAYOUT, CPU, budget), PagePool(LAYOUT, CPU, budget)
    held = one.allocate(6)
    one.release(held[:2])
    budget.reserve({one: 3, two: 3})
    with pytest.raises(CacheFullError):
        budget.reserve({one: 4, two: 3})
    one.release(held[2:])
    budget.reserve({two: 10})
    assert one.total_pages == 0
    Budget().reserve({one: 10**9})


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


def test_copy_on_write() -> None:
    pages = pool()
    held = pages.allocate(3)
    values = fill(pages, held)
    assert pages.unshare(held) is held
    pages.retain(held[1:])
    mine = pages.unshare(held)
    assert mine[0] == held[0] and not set(mine[1:]) & set(held)
    for name, x in values.items():
        assert torch.equal(pages.read(name, mine), x)
    assert pages.references(held).tolist() == [1, 1, 1]
    assert pages.references(mine).tolist() == [1, 1, 1]
    pages.write("numbers", mine[2:], torch.zeros(1, 4, 2))
    assert torch.equal(pages.read("numbers", held), values["numbers"])


def test_two_holders_in_one_table_each_get_a_copy() -> None:
    pages = pool()
    held = pages.allocate(1)
    values = fill(pages, held)
    pages.retain(held)
    table = np.array([held[0], held[0]])
    mine = pages.unshare(table)
    assert len({*mine.tolist(), *held.tolist()}) == 3
    assert torch.equal(pages.read("numbers", mine), values["numbers"].expand(2, -1, -1))
    assert pages.references(held).tolist() == [0]


def test_copy_on_write_that_does_not_fit_changes_nothing() -> None:
    pages = pool(3 * BYTES)
    held = pages.allocate(2)
    pages.retain(held)
    with pytest.raises(CacheFullError):
        pages.unshare(held)
    assert pages.references(held).tolist() == [2, 2]
    assert pages.budget.used == 2 * BYTES


def test_consecutive_pages_are_copied_to_scattered_ones_of_the_same_slab() -> None:
    pages = pool()
    taken = pages.allocate(8)
    values = fill(pages, taken)
    pages.copy(taken[1:4], taken[[6, 0, 5]])
    for name, x in values.items():
        assert torch.equal(pages.read(name, taken), x[[2, 1, 2, 3, 4, 3, 1, 7]])
