"""Where the tokens of one head are: the arithmetic of tiers, without any data.

Positions count the tokens that a sequence has really seen (padding is never stored), from 0. For one KV head:

    exact tier   pinned pages: positions 0 .. pinned*PAGE      only for heads with a window: their sinks
                 window pages: positions exact_base .. length  the residual, or everything without a codec
    packed tier  packed_base .. packed_stop (= exact_base)     whole groups, encoded
    nowhere      what the head's extent no longer covers, or a policy has given up

Heads with equal numbers move together (a *cohort*), so this is computed once for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

PAGE = 32
"""Tokens of an exact page; one plane of a packed page, and the smallest group a codec can pack."""


def _pages(tokens: int, page: int = PAGE) -> int:
    return max(0, -(-tokens // page))


@dataclass(frozen=True)
class Extent:
    """Which tokens a head holds: the first `sink` and the last `recent`, itself included; None is all.

    A query at position p sees key position k <= p iff `k < sink` or `k > p - recent`.
    """

    sink: int = 0
    recent: int | None = None

    @property
    def pinned(self) -> int:
        """Exact pages that hold the sinks and are never given up."""
        return 0 if self.recent is None else _pages(self.sink)

    def meet(self, other: Extent) -> Extent:
        """What both hold."""
        if self.recent is None or other.recent is None:
            return self if other.recent is None else other
        return Extent(min(self.sink, other.sink), min(self.recent, other.recent))


@dataclass(frozen=True)
class Packing:
    """How a layer packs: `group` tokens at a time, once they are `residual` old, into pages of `page`."""

    group: int
    residual: int
    page: int


@dataclass(frozen=True)
class Geometry:
    """Where the tokens of each head of a cohort are (see the module's text).

    evicted: tokens that a policy chose to give up, one by one. The others then count as one text without gaps: what is
    called a position here is a *slot* (see `Held`).
    """

    extent: Extent
    length: int = 0
    exact_base: int = -1
    packed_base: int = 0
    packed_stop: int = 0
    evicted: int = 0

    def __post_init__(self) -> None:
        if self.exact_base < 0:
            object.__setattr__(self, "exact_base", self.extent.pinned * PAGE)

    @property
    def seen(self) -> int:
        """Tokens of the text so far, held or not."""
        return self.length + self.evicted

    @property
    def pinned_pages(self) -> int:
        return min(self.extent.pinned, _pages(self.length))

    @property
    def window_pages(self) -> int:
        return _pages(self.length - self.exact_base)

    def packed_pages(self, packing: Packing | None) -> int:
        return 0 if packing is None else _pages(self.packed_stop - self.packed_base, packing.page)

    @property
    def oldest_visible(self) -> int:
        """The first position (sinks apart) that the next query can see."""
        return 0 if self.extent.recent is None else self.length + 1 - self.extent.recent

    @property
    def first_held(self) -> int:
        """The first position after the pinned pages that is still stored."""
        return self.packed_base if self.packed_stop > self.packed_base else self.exact_base

    @property
    def stored_tokens(self) -> int:
        pinned = min(self.length, self.extent.pinned * PAGE)
        return pinned + max(0, self.length - self.exact_base) + self.packed_stop - self.packed_base

    def appended(self, tokens: int) -> Geometry:
        return replace(self, length=self.length + tokens)

    def settled(self, packing: Packing | None, horizon: int = 0) -> Geometry:
        """After the policy moved what is due: windows slide, whole groups older than the residual are packed.

        The newest `horizon` tokens may yet be taken back: nothing is moved on their account.
        """
        exact, base, stop = self.exact_base, self.packed_base, self.packed_stop
        oldest = self.oldest_visible - horizon
        exact += PAGE * max(0, (oldest - exact) // PAGE)
        if packing is not None:
            base += packing.page * max(0, (oldest - base) // packing.page) if stop > base else 0
            if stop <= oldest or base >= stop:
                base = stop = exact
            groups = max(0, (self.length - horizon - packing.residual - exact) // packing.group)
            if groups:
                base = base if stop > base else exact
                exact = stop = exact + groups * packing.group
        return replace(self, exact_base=exact, packed_base=base, packed_stop=stop)

    def cropped(self, tokens: int, packing: Packing | None) -> Geometry | None:
        """After forgetting the last `tokens` tokens, or None if one that is visible again was given up."""
        length = self.length - tokens
        if length <= self.extent.pinned * PAGE:
            return Geometry(self.extent, length)  # all that is left is in the pinned pages
        out = replace(self, length=length)
        if self.first_held > max(self.extent.pinned * PAGE, out.oldest_visible):
            return None
        if length >= self.exact_base or packing is None or self.packed_stop == self.packed_base:
            return out
        stop = max(self.packed_base, self.packed_base + (length - self.packed_base) // packing.group * packing.group)
        return replace(out, packed_stop=stop, exact_base=stop)
