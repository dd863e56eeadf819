"""The arithmetic of tiers against a simulation that knows every single token."""

from __future__ import annotations

import random

import pytest

from fivefold.store.tiers import PAGE, Extent, Geometry, Packing

EXTENTS = [
    Extent(), Extent(7), Extent(0, 1), Extent(0, 2), Extent(0, 31), Extent(0, 32), Extent(0, 33),
    Extent(1, 1), Extent(4, 64), Extent(4, 100), Extent(32, 5), Extent(33, 97), Extent(64, 300),
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
            room = self.extent.recent is not None and len(self.pinned) < -(-self.extent.sink // PAGE) * PAGE
            (self.pinned if room else self.exact).append(self.length)
            self.length += 1

    def unseen(self, positions: list[int], horizon: int) -> bool:
        """Whether no query from `horizon` tokens back on sees any of these (sinks are elsewhere)."""
        recent = self.extent.recent
        return recent is not None and all(p <= self.length - horizon - recent for p in positions)

    def settle(self, horizon: int) -> None:
        while len(self.exact) >= PAGE and self.unseen(self.exact[:PAGE], horizon):
            del self.exact[:PAGE]
        if self.packing is None:
            return
        group, page = self.packing.group, self.packing.page
        while self.packed and self.unseen(self.packed[:page], horizon):
            del self.packed[:page]
        while len(self.exact) >= self.packing.residual + horizon + group:
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


def positions(geometry: Geometry) -> tuple[list[int], list[int], list[int]]:
    pinned = min(geometry.length, geometry.extent.pinned * PAGE)
    return (
        list(range(pinned)),
        list(range(geometry.exact_base, geometry.length)),
        list(range(geometry.packed_base, geometry.packed_stop)),
    )


def compare(geometry: Geometry, simulation: Simulation) -> None:
    assert positions(geometry) == (simulation.pinned, simulation.exact, simulation.packed)
    assert geometry.pinned_pages == -(-len(simulation.pinned) // PAGE)
    assert geometry.window_pages == -(-len(simulation.exact) // PAGE)
    page = simulation.packing.page if simulation.packing else 1
    assert geometry.packed_pages(simulation.packing) == -(-len(simulation.packed) // page)
    held = {*simulation.pinned, *simulation.exact, *simulation.packed}
    assert geometry.stored_tokens == len(held)
    sink, recent = geometry.extent.sink, geometry.extent.recent
    seen = {k for k in range(geometry.length) if recent is None or k < sink or k > geometry.length - recent}
    assert seen <= held


@pytest.mark.parametrize("packing", PACKINGS, ids=str)
@pytest.mark.parametrize("extent", EXTENTS, ids=str)
def test_geometry_is_what_a_simulation_of_every_token_says(extent: Extent, packing: Packing | None) -> None:
    rng = random.Random(f"{extent} {packing}")
    for _ in range(6):
        geometry, simulation = Geometry(extent), Simulation(extent, packing)
        compare(geometry, simulation)
        for _ in range(40):
            tokens = rng.choice((1, 1, 1, 2, 31, 32, 33, rng.randint(1, 400)))
            horizon = rng.choice((0, 0, 0, 16, 64))
            if rng.random() < 0.25:
                tokens = rng.choice((geometry.length, rng.randint(0, geometry.length)))
                cropped = geometry.cropped(tokens, packing)
                assert (cropped is not None) == simulation.crop(tokens)
                geometry = cropped or geometry
            else:
                geometry = geometry.appended(tokens)
                simulation.append(tokens)
                compare(geometry, simulation)
                geometry = geometry.settled(packing, horizon)
                simulation.settle(horizon)
                assert geometry.settled(packing, horizon) == geometry
            compare(geometry, simulation)


def test_meet_is_what_both_hold() -> None:
    assert Extent().meet(Extent(4, 100)) == Extent(4, 100) == Extent(4, 100).meet(Extent())
    assert Extent(4, 100).meet(Extent(64, 50)) == Extent(4, 50)


def test_pinned_pages() -> None:
    assert [Extent(sink, 8).pinned for sink in (0, 1, 32, 33, 64, 65)] == [0, 1, 1, 2, 2, 3]
    assert Extent(100).pinned == 0
