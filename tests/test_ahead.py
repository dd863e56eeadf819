"""Pages that are taken for the next step before it comes (`Bank.look_ahead`): only such as nobody misses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import PAGE, Extent
from fivefold.store.spec import LayerSpec, Pools
from fivefold.store.transaction import Transaction

SPEC = LayerSpec(0, 1, 2, 4, 16, torch.float32, torch.device("cpu"))


@pytest.fixture
def bank() -> Bank:
    """Two sequences of a full page each, and sixteen free pages."""
    layer = LayerCache(SPEC, Pools(), [Extent()] * 2, None, 0)
    layer.start(2)
    for group in list(layer.groups):
        layer.append(group, *torch.randn(2, len(group.rows), PAGE, 16))
    layer.exact_pool._grow(16)
    return layer.bank


def used(bank: Bank) -> int:
    return bank.exact.pool.pages_in_use


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("commits", [False, True])
def test_the_step_that_comes_has_them(bank: Bank, known: bool, commits: bool) -> None:
    before = used(bank)
    bank.exact.track()
    bank.look_ahead(9)
    ahead = bank.ahead
    assert ahead is not None and not ahead.known and used(bank) == before + 4
    bank.ahead = replace(ahead, known=known)
    bank.exact.known()
    change = Transaction(step=True)
    bank.begin(change)
    bank.open(bank.rows_of())
    assert bank.exact.table[:, 1].tolist() == ahead.pages.tolist() and bank.ahead is None
    assert bool(bank.exact.changed) is not known  # what the device tables are yet to be told
    change.commit() if commits else change.rollback()
    assert used(bank) == before + 4 * commits and (bank.bounds.length == PAGE + commits).all()


def test_any_other_change_gives_them_back(bank: Bank) -> None:
    before = used(bank)
    for change in (Transaction(), Transaction(step=True)):
        bank.look_ahead(9)
        assert used(bank) == before + 4
        bank.begin(change)
        assert used(bank) == before + 4 * change.step
        change.rollback()
        assert bank.ahead is None and used(bank) == before
    bank.look_ahead(9)
    bank.tidy()
    assert used(bank) == before
    bank.look_ahead(9)
    bank.free()
    assert used(bank) == 0


def test_where_they_would_be_missed(bank: Bank) -> None:
    pool = bank.exact.pool
    for limit, taken in ((None, True), (pool.budget.used + 4 * pool.layout.nbytes, False)):
        pool.budget.limit = limit
        bank.look_ahead(9)
        assert (bank.ahead is not None) == taken
    pool.budget.limit = None
    bank.look_ahead(1)  # the device tables have one column alone
    assert bank.ahead is None
    bank.exact.shared = True  # a fork may hold the pages
    bank.look_ahead(9)
    assert bank.ahead is None
    bank.exact.shared = False
    pool.allocate(pool.free_pages - 3)
    bank.look_ahead(9)
    assert bank.ahead is None


def test_other_bounds_do_not_have_them(bank: Bank) -> None:
    before = used(bank)
    bank.look_ahead(9)
    assert bank.ahead is not None
    change = Transaction(step=True)
    bank.begin(change)
    bank.standing.put(np.arange(4), {})  # whatever has happened since
    bank.open(bank.rows_of())
    assert len(set(bank.exact.table[:, 1].tolist())) == 4
    change.rollback()
    assert bank.ahead is None and used(bank) == before
