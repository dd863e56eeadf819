"""Sequences come and go: they move between caches, with all that is known about them.

Page tables move, pages stay where they are. Each of these is one change of both sessions: it happens as a whole or not
at all.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fivefold.engine.session import Session
from fivefold.errors import CacheStateError
from fivefold.interrupts import uninterrupted
from fivefold.store.transfer import absorb, renumber


@uninterrupted
def join(mine: Session, other: Session) -> None:
    """The sequences of `other` come behind those of `mine`, and `other` is empty.

    The logical length is the longer one: a shorter sequence counts as padded on the left. Raises `CacheStateError` if
    the caches do not fit together, and `CacheFullError` where the bytes of pools of its own are beyond the cap, or the
    page tables of both, which are as wide as the longest sequence wants them.
    """
    if mine is other:
        raise CacheStateError("a cache cannot join itself: fork() it, and join the fork.")
    for session in (mine, other):
        session.check_here()
        session.rollback()
    if not other.batch:
        return
    if mine.recording or other.recording:
        raise CacheStateError("sequences cannot join while tokens may be taken back (assisted decoding): crop first.")
    with mine.atomic():
        change = mine.change
        assert change is not None
        other.include(change)
        if not mine.batch:
            mine.adopt_specs(other, change)
        for session in (mine, other):
            if not session.united:
                session.unite(change)
        pairs = {mine.stores[index].bank: store.bank for index, store in other.stores.items()}
        for bank, its in pairs.items():
            if bank.kind != its.kind:
                raise CacheStateError(
                    "these caches hold different pages and cannot become one: make both with the same recipe, for the "
                    "same model in the same dtype on the same device."
                )
        if other.pools is not mine.pools:
            moved = absorb(change, mine.pools, other.pools, other)
            for its in other.banks:
                renumber(its, moved)
        length = max(mine.length, other.length)
        if mine.companions is not None and other.companions is not None:
            mine.companions.join(other.companions, mine.batch, length)
        for bank, its in pairs.items():
            bank.join(its)
        mine.length, mine.ragged = length, True
        other.length = other.chunk = 0
        budget = other.pools.budget
        change.undo(partial(budget.count, id(other), budget.charged.get(id(other), 0)))
        budget.count(id(other), 0)
    other.emptied()


@uninterrupted
def take(session: Session, indices: np.ndarray) -> Session:
    """Sequences `indices` (int64, each once) go into a cache of their own, in that order.

    The logical length of both is then that of the longest sequence that they hold: padding that all have is gone.
    Raises `CacheStateError`.
    """
    session.check_here()
    session.rollback()
    batch = session.batch
    bad = [int(i) for i in indices if not -batch <= i < batch]
    if bad:
        raise CacheStateError(f"there is no sequence {bad[0]}: the cache holds {batch}, numbered from 0.")
    indices = indices % max(1, batch)
    if len(set(indices.tolist())) < len(indices):
        raise CacheStateError(f"sequences {indices.tolist()} are not all different: name each one once.")
    if session.recording:
        raise CacheStateError("sequences cannot leave while tokens may be taken back (assisted decoding): crop first.")
    twin = session.new()
    if not len(indices):
        return twin
    rest = np.setdiff1d(np.arange(batch), indices)
    with session.atomic(grows=False):
        change = session.change
        assert change is not None
        twin.include(change)
        twin.adopt_specs(session, change)
        twin.unite(change)
        if not session.united:
            session.unite(change)
        lengths = session.lengths()
        if session.companions is not None:
            twin.companions = session.companions.take(
                indices, rest, _longest(lengths[indices]), _longest(lengths[rest])
            )
        for index, store in session.stores.items():
            if store.index == 0:  # once for each bank
                store.bank.split(twin.stores[index].bank, indices, rest)
        for one, kept in ((twin, lengths[indices]), (session, lengths[rest])):
            one.length, one.ragged = _longest(kept), True
    if not len(rest):
        session.emptied()
    budget = twin.pools.budget
    budget.count(id(twin), twin.charged)
    if not budget.room_for(0):
        budget.trim()  # two page tables are larger than one
    return twin


def _longest(lengths: np.ndarray) -> int:
    return int(lengths.max(initial=0))
