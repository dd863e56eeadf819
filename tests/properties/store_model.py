"""The operations that drive caches and plain models of them.

`test_store.py` lets hypothesis choose the operations, `benchmarks/store_stress.py` draws them at random.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from plain_model import LAYERS, Plain
from store_driver import REFUSED, Driver, Setup, Twin

from fivefold.engine import persist, recording, sequences
from fivefold.errors import CacheStateError, NonFiniteError
from fivefold.store import compact

__all__ = ["OPERATIONS", "WEIGHTS", "Setup", "System"]

MOST_SEQUENCES = 4
MOST_JOINED = 6
MOST_CACHES = 4

WEIGHTS = {
    "decode": 8, "chunk": 6, "fork": 2, "select": 3, "crop": 4, "free": 1, "trim": 1, "cap": 1,
    "record": 1, "overflow": 1, "compact": 2, "new": 2, "join": 4, "take": 3, "offload": 2, "restore": 2, "save": 1,
}  # fmt: skip
CACHE, FAULTS = (0, 3), (-40, 40)
ARGUMENTS: dict[str, tuple[tuple[int, int], ...]] = {
    "decode": ((0, 15), (1, 4), (0, 3)),
    "chunk": ((0, 300), (-60, 90), (0, 3)),
    "select": ((1, MOST_SEQUENCES), (0, 255)),
    "crop": ((0, LAYERS), (1, 400)),
    "cap": ((-8, 30),),
    "overflow": ((0, 7), (1, 300)),
    "record": ((0, 2),),
    "new": ((0, 2),),
    "join": (CACHE, (0, 1)),
    "take": ((0, 1023),),
    "save": ((0, 1),),
}
# The operations and the range of each of their arguments: the first says of which cache, the last where they fail (see
# `System.operate`).
OPERATIONS = {name: (CACHE, *ARGUMENTS.get(name, ()), FAULTS) for name in WEIGHTS}
# What can be done while a cache is offloaded.
AT_REST = ("fork", "free", "trim", "cap", "new", "offload", "restore", "save")


class System(Driver):
    """Caches, most of which share their pools, with their models. Every operation takes plain numbers and bends them to
    what is possible; `check` compares everything."""

    def operate(self, name: str, arguments: Sequence[int]) -> None:
        """An operation, each of whose changes fails first, if the last argument is positive: at that call of a pool, a
        codec or another part of it, or at its end if there are fewer. Nothing may then be left of it, and it is done
        again."""
        which, *rest, self.fault = arguments
        self.name, cache = name, self.caches[which % len(self.caches)]
        self.touched, self.known = [cache], None
        if cache.session.state is not None and name not in AT_REST:
            return self.refuse(cache)
        getattr(self, name)(cache, *rest)

    def refuse(self, cache: Twin) -> None:
        """A cache that is offloaded does nothing that would need its pages."""
        session, other = cache.session, self.session()
        calls: list[Callable[[], Any]] = [
            session.begin, partial(session.select, np.array([0])), partial(persist.install, session, session.state),
            partial(sequences.join, session, other), partial(sequences.join, other, session),
            partial(sequences.take, session, np.array([0])),
        ]  # fmt: skip
        if cache.plain.length > 1:  # to crop all is to free it
            calls.append(partial(recording.crop, session, 1))
        for call in calls:
            try:
                call()
            except CacheStateError:
                continue
            raise AssertionError(f"a cache that is offloaded took part in {call}")
        self.unchanged()

    # -- tokens -------------------------------------------------------------------------------------------

    def decode(self, cache: Twin, mask: int, steps: int, tight: int) -> None:
        """Some steps of one token; sequences whose bit is set in `mask` are padding and get none."""
        for _ in range(steps):
            tokens = [1 - (mask >> i & 1) for i in range(self.begin(cache))]
            if self.too_long(cache.plain, tokens):
                return self.free(cache)
            self.forward(cache, tokens, tight)

    def chunk(self, cache: Twin, tokens: int, fewer: int, tight: int) -> None:
        """A chunk; each sequence gets `fewer` (if positive) tokens less than the one before it."""
        counts = [max(0, tokens - max(0, fewer) * i) for i in range(self.begin(cache))]
        if self.too_long(cache.plain, counts):
            return self.free(cache)
        self.forward(cache, counts, tight)

    def crop(self, cache: Twin, only: int, count: int) -> None:
        """Take tokens back, in one layer only or (`only == LAYERS`) in all."""
        session, plain, both = cache.session, cache.plain, only == LAYERS
        layers = cache.layers if both else [cache.layers[only]]
        gone = both and count >= plain.length
        legal = gone or all(self.can_crop(layer, count) for layer in layers)

        def part() -> None:
            for layer in layers:
                layer.crop(count)
            session.length -= count * both

        # What may move then is tried apart: a session does not say whether it had the room.
        taking_back, session.recording = session.recording, False
        whole = partial(recording.crop, session, count) if both else partial(layers[0].crop, count)
        try:
            went = self.attempt(cache, legal, whole, None if gone else part) is not REFUSED
        finally:
            session.recording = taking_back
        if went:
            for layer in layers:
                plain.crop(layer.spec.layer, count)
            plain.length -= count * both
            if gone:
                cache.plain = Plain(self.heads)
            self.compare(cache, cropped=True)
        if taking_back and cache.plain.batch:
            self.advance(cache)

    def overflow(self, cache: Twin, group: int, count: int) -> None:
        """Give one group a chunk with a number that cannot be packed, where it would be packed at once."""
        layer = cache.layers[group % LAYERS]
        if not layer.groups or layer.packing is None or cache.session.pools.budget.limit is not None:
            return
        target = layer.groups[group // LAYERS % len(layer.groups)]
        old = target.bounds
        new = old.appended(count).advanced(layer.packing)
        position = new.packed_stop - 1
        if max(old.length, new.packed_base) > position:
            return
        rows = len(target.rows)
        keys, values = self.numbers(rows, count), self.numbers(rows, count)
        (keys, values)[count % 2][rows - 1, position - old.length, 1] = float(("nan", "inf", "-inf", "1e6")[count % 4])
        try:
            layer.append(target, keys, values)
        except NonFiniteError:
            self.unchanged()
            return
        raise AssertionError("a number that float16 cannot hold was packed")

    def record(self, cache: Twin, on: int) -> None:
        """From now on (or no longer) the newest tokens may be taken back."""
        cache.session.recording = on == 1

    # -- caches and sequences -----------------------------------------------------------------------------

    def new(self, cache: Twin, own: int) -> None:
        """An empty cache, with pages from the same pools or from its own."""
        if len(self.caches) == MOST_CACHES:
            self.free(cache)
        else:
            self.caches.append(self.twin(self.session() if own else cache.session.new()))

    def fork(self, cache: Twin) -> None:
        if len(self.caches) == MOST_CACHES:
            return self.free(cache)
        session = cache.session
        twin = self.attempt(cache, True, session.fork, lambda: [bank.fork() for bank in session.banks])
        if twin is not REFUSED:
            self.caches.append(Twin(twin, cache.plain.selected(range(cache.plain.batch))))

    def select(self, cache: Twin, count: int, code: int) -> None:
        session, batch = cache.session, cache.plain.batch
        if not batch:
            return
        order = np.array([(code >> 2 * i) % batch for i in range(count)], dtype=np.int64)
        whole = partial(session.select, order)
        if self.attempt(cache, True, whole, lambda: [bank.select(order) for bank in session.banks]) is not REFUSED:
            cache.plain = cache.plain.selected(order.tolist())

    def join(self, cache: Twin, which: int, kept: int) -> None:
        """The sequences of another cache come behind those of this one; whether the other one stays, empty."""
        others = [one for one in self.caches if one is not cache and (one.plain.batch or which == 0)] or [cache]
        other = others[which % len(others)]
        mine, its = cache.session, other.session
        if cache.plain.batch + other.plain.batch > MOST_JOINED and mine is not its:
            return self.take(cache, which)
        self.touched.append(other)
        own = mine.pools is not its.pools
        shared = own and any(c.session.pools is its.pools and c.session.batch for c in self.caches if c is not other)
        legal = mine is not its and its.state is None
        legal = legal and not (other.plain.batch and (mine.recording or its.recording or shared))
        if self.attempt(cache, legal, partial(sequences.join, mine, its)) is REFUSED:
            return
        if other.plain.batch:
            cache.plain, other.plain = cache.plain.joined(other.plain), Plain(self.heads)
            assert not own or its.pools.budget.used == 0
        if not kept:
            self.caches.remove(other)

    def take(self, cache: Twin, code: int) -> None:
        """Some sequences go into a cache of their own; that is freed if there are enough."""
        session, plain, rng = cache.session, cache.plain, random.Random(code)
        batch = plain.batch
        order = rng.sample(range(batch), code % (batch + 1))
        wrong = code % 9 == 8
        named = [i - batch * (rng.random() < 0.5) for i in order] + [rng.choice((batch, -batch - 1, *order))] * wrong
        legal = not wrong and not session.recording
        taken = self.attempt(cache, legal, lambda: sequences.take(session, np.array(named, dtype=np.int64)))
        if taken is REFUSED:
            return
        twin = self.twin(taken)
        if order:
            twin.plain, cache.plain = plain.selected(order), plain.selected([i for i in range(batch) if i not in order])
            for one in (twin.plain, cache.plain):
                one.length, one.ragged = one.longest, one.batch > 0
        self.caches.append(twin)
        self.touched.append(twin)
        if len(self.caches) > MOST_CACHES:
            self.compare(twin)
            self.free(twin)

    def free(self, cache: Twin) -> None:
        banks = cache.session.banks
        self.do(cache, cache.session.free, lambda: [bank.free() for bank in banks])
        cache.plain, cache.session.recording = Plain(self.heads), False
        if len(self.caches) > 1:
            self.caches.remove(cache)

    # -- at rest ------------------------------------------------------------------------------------------

    def offload(self, cache: Twin) -> None:
        session = cache.session
        legal = not (session.recording and cache.plain.batch)
        if self.attempt(cache, legal, partial(persist.offload, session)) is not REFUSED:
            assert (session.state is not None) == (cache.plain.batch > 0)

    def restore(self, cache: Twin) -> None:
        """The next cache that is offloaded, if there is one."""
        first = self.caches.index(cache)
        cache = next((c for c in self.caches[first:] + self.caches[:first] if c.session.state is not None), cache)
        self.touched = [cache]
        if self.attempt(cache, True, partial(persist.restore, cache.session)) is not REFUSED:
            assert cache.session.state is None

    def save(self, cache: Twin, own: int) -> None:
        """To a folder and from there into another cache, with the same pools or its own."""
        session = cache.session
        if not cache.plain.batch:
            return
        state = self.attempt(cache, not session.recording, partial(persist.collect, session))
        if state is REFUSED:
            return
        found = self.through_files(state)
        twin = self.twin(self.session() if own else session.new())
        self.caches.append(twin)
        self.touched.append(twin)
        if self.attempt(twin, True, partial(persist.install, twin.session, found)) is REFUSED:
            self.caches.remove(twin)
            return
        twin.plain = cache.plain.selected(range(cache.plain.batch))
        if len(self.caches) > MOST_CACHES:
            self.compare(twin)
            self.free(twin)

    # -- memory -------------------------------------------------------------------------------------------

    def trim(self, cache: Twin) -> None:
        cache.session.pools.budget.trim()

    def cap(self, cache: Twin, pages: int) -> None:
        """Allow so many pages more than are there, or (negative) any number."""
        pools = cache.session.pools
        pools.budget.limit = None
        if pages >= 0:
            self.limit(pools, pages * max(pool.layout.nbytes for pool in pools))

    def compact(self, cache: Twin) -> None:
        """Move pages out of slabs that are mostly free, and give those up."""
        session = cache.session
        before, session.sparse = session.pools.budget.used, True

        def part() -> None:
            for pool in compact.due(session.pools):
                compact.compact(session.banks, pool)

        self.do(cache, session.tidy, part)
        self.unchanged()
        assert session.pools.budget.used <= before
