"""The arithmetic of tiers against a simulation that knows every single token."""

from __future__ import annotations

import random

import numpy as np
import pytest

from conftest import quick
from fivefold.store.rows import ALL, FIXED, PAGE, Bounds, Extent, Packing, Span

EXTENTS = [
    Extent(), Extent(7), Extent(0, 1), Extent(0, 2), Extent(0, 31), Extent(0, 32), Extent(0, 33),
    Extent(1, 1), Extent(4, 64), Extent(4, 100), Extent(32, 5), Extent(33, 97), Extent(64, 300),
    Extent(64, 30).intersect(Extent(4, 200)), Extent(2, 300).intersect(Extent(33, 100)),
]  # fmt: skip
PACKINGS = [
    None, Packing(32, 0, 256), Packing(32, 32, 128), Packing(32, 50, 160), Packing(64, 0, 64),
    Packing(64, 128, 256), Packing(128, 1, 256), Packing(128, 100, 128),
]  # fmt: skip


class Simulation:
    """One head, token by token: pages are lists of positions."""

    def __init__(self, extent: Extent, packing: Packing | None) -> None:
        self.extent, self.packing = extent, packing
        self.length = 0
        self.pinned: list[int] = []
        self.exact: list[int] = []
        self.packed: list[int] = []

    def append(self, tokens: int) -> None:
        for _ in range(tokens):
            sinks = max(self.extent.sink, self.extent.late_sink)
            room = self.extent.recent is not None and len(self.pinned) < -(-sinks // PAGE) * PAGE
            (self.pinned if room else self.exact).append(self.length)
            self.length += 1

    def unseen(self, positions: list[int], revocable: int) -> bool:
        """Whether no query from `revocable` tokens back on sees any of these (sinks are elsewhere)."""
        recent = self.extent.recent
        return recent is not None and all(p <= self.length - revocable - recent for p in positions)

    def advance(self, revocable: int) -> None:
        while len(self.exact) >= PAGE and self.unseen(self.exact[:PAGE], revocable):
            del self.exact[:PAGE]
        if self.packing is None:
            return
        group, page = self.packing.group, self.packing.page
        while self.packed and self.unseen(self.packed[:page], revocable):
            del self.packed[:page]
        while len(self.exact) >= self.packing.residual + revocable + group:
            self.packed += self.exact[:group]
            del self.exact[:group]

    def crop(self, tokens: int) -> bool:
        """False, changing nothing, where a token is gone that the next query sees."""
        length = self.length - tokens
        seen = 0 if self.extent.recent is None else length + 1 - self.extent.recent
        first = (self.packed or self.exact or [self.length])[0]
        if length > len(self.pinned) and first > max(seen, len(self.pinned)):
            return False
        self.length = length
        self.pinned = [p for p in self.pinned if p < length]
        self.exact = [p for p in self.exact if p < length]
        if self.packed and self.packed[-1] >= length:
            assert self.packing is not None and not self.exact
            whole = sum(p < length for p in self.packed) // self.packing.group * self.packing.group
            self.exact = [p for p in self.packed[whole:] if p < length]
            self.packed = self.packed[:whole]
        return True


def positions(bounds: Bounds) -> tuple[list[int], list[int], list[int]]:
    pinned = min(bounds.length, bounds.extent.pinned * PAGE)
    return (
        list(range(pinned)),
        list(range(bounds.exact_base, bounds.length)),
        list(range(bounds.packed_base, bounds.packed_stop)),
    )


def sees(extent: Extent, query: int, key: int) -> bool:
    """Whether a query at a position sees a key at another."""
    if extent.recent is None:
        return True
    late = key < extent.late_sink and key > query - extent.late_recent
    return key < extent.sink or key > query - extent.recent or late


def compare(bounds: Bounds, simulation: Simulation) -> None:
    packing, extent = simulation.packing, bounds.extent
    assert positions(bounds) == (simulation.pinned, simulation.exact, simulation.packed)
    assert bounds.pinned_pages == -(-len(simulation.pinned) // PAGE)
    assert bounds.window_pages == -(-len(simulation.exact) // PAGE)
    assert bounds.exact_pages == bounds.pinned_pages + bounds.window_pages
    page = packing.page if packing else 1
    assert bounds.packed_pages(packing) == (-(-len(simulation.packed) // page) if packing else 0)
    held = {*simulation.pinned, *simulation.exact, *simulation.packed}
    assert bounds.stored_tokens == len(held)
    assert bounds.packed_tokens == len(simulation.packed)
    exact = [*simulation.pinned, *simulation.exact]
    assert bounds.exact_tokens == len(exact)
    seen = {k for k in range(bounds.length) if sees(extent, bounds.length, k)}
    assert seen <= held
    # Where things are.
    assert bounds.exact_positions(int(bounds.exact_pages))[: len(exact)].tolist() == exact
    for position in simulation.exact[:: PAGE - 1]:
        assert bounds.exact_column(position) == exact.index(position) // PAGE
    for position in simulation.packed[::31]:
        assert packing is not None
        assert bounds.packed_place(position, packing) == divmod(simulation.packed.index(position), page)
    # What the newest token sees, slot by slot.
    if bounds.length:
        assert slots(bounds.span()) == (
            [slot for slot, k in enumerate(simulation.packed) if sees(extent, bounds.length - 1, k)],
            [slot for slot, k in enumerate(exact) if sees(extent, bounds.length - 1, k)],
        )


def slots(span: Span) -> tuple[list[int], list[int]]:
    """The packed and the exact slots that a span names."""
    exact = [
        slot
        for slot in range(int(span.stop))
        if slot < span.sinks or span.late_first <= slot < span.late_stop or slot >= span.first
    ]
    return list(range(int(span.packed_first), int(span.packed_stop))), exact


@pytest.mark.parametrize("packing", quick(PACKINGS, 3), ids=str)
@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_bounds_are_what_a_simulation_of_every_token_says(extent: Extent, packing: Packing | None) -> None:
    rng = random.Random(f"{extent} {packing}")
    for _ in range(6):
        bounds, simulation = Bounds.empty(extent), Simulation(extent, packing)
        assert bounds.extent == extent
        compare(bounds, simulation)
        for _ in range(40):
            tokens = rng.choice((1, 1, 1, 2, 31, 32, 33, rng.randint(1, 400)))
            revocable = rng.choice((0, 0, 0, 16, 64))
            if rng.random() < 0.25:
                tokens = rng.choice((int(bounds.length), rng.randint(0, int(bounds.length))))
                cropped = bounds.cropped(tokens, packing)
                assert (cropped is not None) == simulation.crop(tokens)
                bounds = cropped or bounds
            else:
                bounds = bounds.appended(tokens)
                simulation.append(tokens)
                compare(bounds, simulation)
                before = [*simulation.packed], [*simulation.exact]
                old, bounds = bounds, bounds.advanced(packing, revocable)
                simulation.advance(revocable)
                assert bounds.advanced(packing, revocable) == bounds
                compare_gone(old, bounds, before, simulation)
                if not revocable:
                    check_idle(bounds, packing)
            compare(bounds, simulation)


def compare_gone(old: Bounds, new: Bounds, before: tuple[list[int], list[int]], simulation: Simulation) -> None:
    """Which pages at the front of each tier are given up."""
    stay = set(simulation.exact)
    pages = [before[1][first : first + PAGE] for first in range(0, len(before[1]), PAGE)]
    assert old.exact_gone(new) == sum(not stay & set(page) for page in pages)
    if simulation.packing is not None:
        stay, size = set(simulation.packed), simulation.packing.page
        pages = [before[0][first : first + size] for first in range(0, len(before[0]), size)]
        assert old.packed_gone(new, simulation.packing) == sum(not stay & set(page) for page in pages)


def check_idle(bounds: Bounds, packing: Packing | None) -> None:
    """Until so many tokens have come, nothing is due."""
    idle = int(min(bounds.idle(packing), 500))
    for tokens in range(1, idle):
        later = bounds.appended(tokens)
        assert later.advanced(packing) == later


@pytest.mark.parametrize("page", [32, 128])
@pytest.mark.parametrize("seed", quick(range(8), 3))
def test_arrays_of_bounds_are_what_each_is_alone(seed: int, page: int) -> None:
    """Rows of any extents, lengths and residuals at once."""
    rng = random.Random(seed)
    group = rng.choice([32, page])
    for packed in (False, True):
        residuals = np.array([rng.choice([0, 1, 32, 50, 100]) for _ in range(60)])
        packings = [Packing(group, int(residual), page) if packed else None for residual in residuals]
        packing = Packing(group, residuals, page) if packed else None
        alone = [Bounds.empty(rng.choice(EXTENTS)) for _ in residuals]
        for _ in range(30):
            revocable = rng.choice((0, 0, 16))
            tokens = [rng.choice((0, 1, 1, 31, 32, 33, rng.randint(1, 300))) for _ in alone]
            many = Bounds(*(np.array(x) for x in zip(*alone)))
            compare_arrays(many, alone, packing, packings)
            grown, mine = many.appended(np.array(tokens)), [x.appended(n) for x, n in zip(alone, tokens)]
            compare_arrays(grown, mine, packing, packings)
            settled = grown.advanced(packing, revocable)
            alone = [x.advanced(p, revocable) for x, p in zip(mine, packings)]
            compare_arrays(settled, alone, packing, packings)
            assert grown.exact_gone(settled).tolist() == [x.exact_gone(y) for x, y in zip(mine, alone)]
            if packing is not None:
                gone = [x.packed_gone(y, p) for x, y, p in zip(mine, alone, packings)]  # type: ignore[arg-type]
                assert grown.packed_gone(settled, packing).tolist() == gone
            at = rng.randrange(len(alone))
            alone[at] = alone[at].cropped(rng.randint(0, int(alone[at].length)), packings[at]) or alone[at]
        assert {x.sink for x in alone} > {4} and (many.recent == ALL).any()


NUMBERS = (
    "seen", "pinned_pages", "window_pages", "exact_pages", "pinned_tokens", "exact_tokens", "packed_tokens",
    "stored_tokens", "oldest_visible", "first_held",
)  # fmt: skip


def compare_arrays(many: Bounds, alone: list[Bounds], packing: Packing | None, packings: list[Packing | None]) -> None:
    for number, field in enumerate(many):
        assert field.tolist() == [x[number] for x in alone], Bounds._fields[number]
    for name in NUMBERS:
        assert getattr(many, name).tolist() == [getattr(x, name) for x in alone], name
    assert many.packed_pages(packing).tolist() == [x.packed_pages(p) for x, p in zip(alone, packings)]
    assert many.idle(packing).tolist() == [x.idle(p) for x, p in zip(alone, packings)]
    assert many.full.tolist() == (many.appended(1).exact_pages > many.exact_pages).tolist()
    ends = [x.length - 1 for x in alone]
    assert many.exact_column(np.array(ends)).tolist() == [x.exact_column(end) for x, end in zip(alone, ends)]
    if packing is not None:
        stops = many.packed_stop
        places = [x.packed_place(x.packed_stop, p) for x, p in zip(alone, packings)]  # type: ignore[arg-type]
        assert np.stack(many.packed_place(stops, packing), 1).tolist() == [list(place) for place in places]
    for field, wanted in zip(many.span(), zip(*(x.span() for x in alone)), strict=True):
        assert np.broadcast_to(field, len(alone)).tolist() == [int(x) for x in wanted]


def test_what_never_changes_comes_first() -> None:
    bounds = Bounds.empty(Extent(40, 30).intersect(Extent(4, 200)))
    for other in (bounds.appended(500), bounds.appended(500).advanced(Packing(32, 0, 128))):
        assert other != bounds and other[:FIXED] == bounds[:FIXED]


def test_intersect_is_what_both_hold() -> None:
    assert Extent().intersect(Extent(4, 100)) == Extent(4, 100) == Extent(4, 100).intersect(Extent())
    assert Extent(4, 100).intersect(Extent(64, 50)) == Extent(4, 50, 64, 100)
    assert Extent(4, 100).intersect(Extent(64, 200)) == Extent(4, 100)
    assert Extent(4, 100).intersect(Extent(4, 50)) == Extent(4, 50) == Extent(4, 50).intersect(Extent(4, 100))


@pytest.mark.parametrize("packing", [None, Packing(32, 32, 128)], ids=str)
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Extent(64, 256), Extent(4, 1020)), (Extent(64, 256), Extent(4, 100)), (Extent(33, 40), Extent(0, 70)),
        (Extent(70, 10), Extent(1, 64)), (Extent(5, 20), Extent(4, 30)), (Extent(40, 300), Extent(100, 300)),
    ],
)  # fmt: skip
def test_both_hold_exactly_this_at_every_length(one: Extent, other: Extent, packing: Packing | None) -> None:
    """Sinks that only one of them keeps are held while they are in the other one's window: late sinks."""
    bounds = {}
    for extent in (one.intersect(other), other.intersect(one)):
        assert Bounds.empty(extent).extent == extent
        bounds[extent] = Bounds.empty(extent)
    assert len(bounds) == 1
    ((extent, row),) = bounds.items()
    late = 0
    for query in range(1300):
        row = row.appended(1)
        keys = np.arange(query + 1)
        both = np.ones(query + 1, dtype=bool)
        for part in (one, other):
            both &= (keys < part.sink) | (keys > query - part.recent)
        assert [sees(extent, query, k) for k in keys[:: max(1, query // 50)]] == both[:: max(1, query // 50)].tolist()
        span = row.span()
        pinned, exact, packed = positions(row)
        seen = np.zeros(query + 1, dtype=bool)
        mine = slots(span)
        seen[np.array(packed, dtype=int)[mine[0]]] = True
        seen[np.array([*pinned, *exact], dtype=int)[mine[1]]] = True
        assert np.array_equal(seen, both), query
        late += span.late_stop > span.late_first
        row = row.advanced(packing)
    assert (late > 0) == (extent.late_sink > 0)


def test_pinned_pages() -> None:
    assert [Extent(sink, 8).pinned for sink in (0, 1, 32, 33, 64, 65)] == [0, 1, 1, 2, 2, 3]
    assert Extent(100).pinned == 0
    assert Extent(64, 256).intersect(Extent(4, 1020)).pinned == 2
