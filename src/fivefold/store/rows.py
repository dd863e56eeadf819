"""Where the tokens of a row are: the arithmetic of tiers, without any data.

A *row* is one KV head of one sequence in one layer. Positions count the tokens that its sequence has really seen
(padding is never stored), from 0:

    exact tier   pinned pages: positions 0 .. pinned           only for rows with a window: their sinks
                 window pages: positions exact_base .. length  the residual, or everything without a codec
    packed tier  packed_base .. packed_stop (= exact_base)     whole groups, encoded
    nowhere      what the row's extent no longer covers, or a policy has evicted

Nothing outside this file does arithmetic on these bounds. `Bounds` holds whole numbers of one row, or int64 arrays of
many: the same formulas serve both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

PAGE = 32
"""Tokens of an exact page; one plane of a packed page, and the smallest group a codec can pack."""
ALL = 1 << 40
"""`Bounds.recent` of a row that holds the whole text."""
SHARES = 1_000_000
"""`Bounds.share` counts in parts of this; -1 where a window is one of each query."""


def run_of(rows: np.ndarray) -> slice | None:
    """Ascending rows, int64 `[rows]`, as a slice, which makes views of tables instead of copies; None if they are no
    run."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if len(rows) == last - first + 1 else None


@dataclass(frozen=True)
class Extent:
    """Which tokens a head holds: the first `sink` and the last `recent`, itself included; None is all.

    A query at position p sees key position k <= p iff `k < sink`, or `k > p - recent`, or `k < late_sink` and
    `k > p - late_recent`: sinks that go as the text grows (see `intersect`).

    With a `share`, 0 to 1, the window is one of the text and not of each query: after a chunk or a step that makes the
    text n tokens long, tokens leave a page at a time until the last `max(recent, share * n)` are left, and up to a page
    more. A query sees whatever has not left when its chunk comes. compensate: what leaves goes into one compensation
    token of the row (`store/compensation.py`).
    """

    sink: int = 0
    recent: int | None = None
    late_sink: int = 0
    late_recent: int = 0
    share: float | None = None
    compensate: bool = False

    @property
    def pinned(self) -> int:
        """Exact pages that hold the sinks and are never given up."""
        return 0 if self.recent is None else int(_pages(max(self.sink, self.late_sink)))

    def intersect(self, other: Extent) -> Extent:
        """What both hold."""
        if self.recent is None or other.recent is None or self == other:
            return self if other.recent is None else other
        if self.share is not None or other.share is not None:
            raise ValueError(f"{self} and {other}: a window of the text cannot be cut by another")
        sink, recent = min(self.sink, other.sink), min(self.recent, other.recent)
        few, many = sorted((self, other), key=lambda extent: extent.sink)
        longer = few.recent > many.recent and few.sink < many.sink  # type: ignore[operator]
        if not longer or self.late_sink or other.late_sink:
            return Extent(sink, recent)
        # The sinks that only one of them keeps are held as long as they are in the other one's window.
        return Extent(sink, recent, many.sink, few.recent or 0)


@dataclass(frozen=True)
class Packing:
    """How rows pack: `group` tokens at a time, once they are `residual` old, into pages of `page`."""

    group: int
    residual: Any
    page: int


class Span(NamedTuple):
    """Which slots of its tiers the newest token of a row sees (int, or int32 arrays `[rows]`).

    Packed slots `packed_first .. packed_stop`; exact slots that are below `sinks`, or in `late_first .. late_stop`, or
    at least `first`, all below `stop`. The order is that of the kernels' tables (`kernels/packed_decode`).
    """

    packed_first: Any
    packed_stop: Any
    sinks: Any
    first: Any
    stop: Any
    late_first: Any
    late_stop: Any


def _pages(tokens: Any, page: int = PAGE) -> Any:
    return np.maximum(0, -(-tokens // page))


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(condition, bool | np.bool_):  # of one row: numpy takes ten times as long
        return a if condition else b
    return np.where(condition, a, b)[()]


class Bounds(NamedTuple):
    """Where the tokens of a row, or of many, are (see the module's text).

    What a row may hold, and never changes: sink, recent, late_sink, late_recent (see `Extent`), pinned (tokens of the
    pinned pages), share (in `SHARES`), compensates (0 or 1). length: tokens that count as stored or slid out of a
    window. evicted: tokens that a policy chose to evict, one by one; the others then count as one text without gaps:
    what is called a position here is a *slot* (see `Held`). left: with a share, tokens before this position have left,
    but for the sinks.
    """

    sink: Any = 0
    recent: Any = ALL
    late_sink: Any = 0
    late_recent: Any = 0
    pinned: Any = 0
    share: Any = -1
    compensates: Any = 0
    length: Any = 0
    exact_base: Any = 0
    packed_base: Any = 0
    packed_stop: Any = 0
    evicted: Any = 0
    left: Any = 0

    @classmethod
    def empty(cls, extent: Extent) -> Bounds:
        """A row that has seen nothing."""
        recent, pinned = ALL if extent.recent is None else extent.recent, extent.pinned * PAGE
        share = -1 if extent.share is None else round(extent.share * SHARES)
        fixed = extent.sink, recent, extent.late_sink, extent.late_recent, pinned, share, int(extent.compensate)
        return cls(*fixed, exact_base=pinned)

    def at(self, which: np.ndarray | slice) -> Bounds:
        """Of some of the rows."""
        return Bounds(*(x[which] for x in self))

    def repeated(self, rows: int) -> Bounds:
        """Of one row, as arrays of so many, which are not to be written to: layers of a chunk ask for the same."""
        return _repeated(self, rows)

    @property
    def extent(self) -> Extent:
        """Of one row."""
        recent = None if self.recent == ALL else int(self.recent)
        share = None if self.share < 0 else int(self.share) / SHARES
        late = int(self.late_sink), int(self.late_recent)
        return Extent(int(self.sink), recent, *late, share, bool(self.compensates))

    # -- how much there is --------------------------------------------------------------------------------

    @property
    def seen(self) -> Any:
        """Tokens of the text so far, held or not."""
        return self.length + self.evicted

    @property
    def pinned_pages(self) -> Any:
        return np.minimum(self.pinned // PAGE, _pages(self.length))

    @property
    def window_pages(self) -> Any:
        return _pages(self.length - self.exact_base)

    @property
    def exact_pages(self) -> Any:
        return self.pinned_pages + self.window_pages

    @property
    def pinned_tokens(self) -> Any:
        return np.minimum(self.length, self.pinned)

    @property
    def exact_tokens(self) -> Any:
        """Filled slots of the exact tier; they are the first ones of its columns."""
        return self.pinned_tokens + np.maximum(0, self.length - self.exact_base)

    @property
    def full(self) -> Any:
        """Whether the next token needs a page of its own."""
        return ((self.length - self.exact_base) & (PAGE - 1)) == 0

    @property
    def packed_tokens(self) -> Any:
        return self.packed_stop - self.packed_base

    def packed_pages(self, packing: Packing | None) -> Any:
        return 0 * self.length if packing is None else _pages(self.packed_tokens, packing.page)

    @property
    def stored_tokens(self) -> Any:
        return self.exact_tokens + self.packed_tokens

    def _oldest(self, tokens: Any) -> Any:
        """Where the window of a text of so many tokens begins; negative where it holds all. Never goes back as the text
        grows: another token makes the window at most one longer."""
        return tokens - np.maximum(self.recent, tokens * self.share // SHARES)

    @property
    def oldest_visible(self) -> Any:
        """The first position (sinks apart) that the next query must be able to see; negative where it sees all."""
        return self._oldest(self.length + 1)

    @property
    def first_seen(self) -> Any:
        """The first position (sinks apart) that the newest token sees; not positive where it sees all."""
        return _where(self.share < 0, self.length - self.recent, self.left)

    @property
    def compensated(self) -> Any:
        """How many tokens the row's compensation token stands for."""
        return self.compensates * np.maximum(0, self.left - self.sink)

    @property
    def first_held(self) -> Any:
        """The first position after the pinned pages that is still stored."""
        return _where(self.packed_stop > self.packed_base, self.packed_base, self.exact_base)

    # -- where things are ---------------------------------------------------------------------------------

    def exact_column(self, position: Any) -> Any:
        """The column of the exact tier that holds a position of the window."""
        return self.pinned_pages + (position - self.exact_base) // PAGE

    def exact_positions(self, columns: int) -> np.ndarray:
        """Of one row: the position of every slot of so many exact columns, int64 `[columns * PAGE]`."""
        pinned, base = int(self.pinned_pages) * PAGE, int(self.exact_base)
        window = np.arange(base, base + columns * PAGE - pinned)
        return np.concatenate([np.arange(pinned), window]) if pinned else window

    def packed_place(self, position: Any, packing: Packing) -> tuple[Any, Any]:
        """(column of the packed tier, slot in its page) of a position."""
        return (position - self.packed_base) // packing.page, (position - self.packed_base) % packing.page

    def span(self) -> Span:
        """What the newest token sees."""
        pinned, high = self.pinned_tokens, self.packed_tokens
        oldest = self.first_seen
        out = oldest > 0  # something has left the window
        window = _where(oldest < pinned, oldest, pinned + np.maximum(0, oldest - self.exact_base))
        late = np.clip(self.length - self.late_recent, self.sink, np.maximum(self.sink, self.late_sink))
        return Span(
            _where(out, np.clip(oldest - self.packed_base, 0, high), 0),
            high,
            _where(out, self.sink, 0),
            _where(out, window, 0),
            self.exact_tokens,
            _where(out, late, 0),
            _where(out, self.late_sink, 0),
        )

    # -- how it changes -----------------------------------------------------------------------------------

    def appended(self, tokens: Any) -> Bounds:
        return self._replace(length=self.length + tokens)

    def advanced(self, packing: Packing | None, revocable: int = 0) -> Bounds:
        """After what is due has moved: windows slide, whole groups older than the residual are packed.

        The newest `revocable` tokens may yet be taken back: nothing is moved on their account.
        """
        exact, base, stop = self.exact_base, self.packed_base, self.packed_stop
        oldest = self._oldest(self.length + 1 - revocable)
        left = _where(self.share < 0, self.left, np.maximum(self.left, oldest // PAGE * PAGE))
        oldest = _where(self.share < 0, oldest, left)
        exact = exact + PAGE * np.maximum(0, (oldest - exact) // PAGE)
        if packing is not None:
            slid = packing.page * np.maximum(0, (oldest - base) // packing.page)
            base = base + _where(stop > base, slid, 0)
            gone = (stop <= oldest) | (base >= stop)
            base, stop = _where(gone, exact, base), _where(gone, exact, stop)
            groups = np.maximum(0, (self.length - revocable - packing.residual - exact) // packing.group)
            exact = exact + groups * packing.group
            stop = _where(groups > 0, exact, stop)
        return self._replace(exact_base=exact, packed_base=base, packed_stop=stop, left=left)

    def idle(self, packing: Packing | None) -> Any:
        """How many more tokens a row in which nothing is due can take until something is due; at least so many."""
        oldest = self.oldest_visible
        out = self.exact_base + PAGE - oldest
        out = _where(self.share < 0, out, np.minimum(out, self.left + PAGE - oldest))
        if packing is not None:
            packed = self.packed_stop > self.packed_base
            slides = np.minimum(self.packed_base + packing.page - oldest, self.packed_stop - oldest)
            out = np.minimum(out, _where(packed, slides, out))
            out = np.minimum(out, self.exact_base + packing.group + packing.residual - self.length)
        return out

    def packed_gone(self, new: Bounds, packing: Packing) -> Any:
        """How many packed pages at the front are given up on the way to `new`."""
        columns = self.packed_pages(packing)
        slid = np.minimum(columns, (new.packed_base - self.packed_base) // packing.page)
        emptied = (new.packed_stop == new.packed_base) | (new.packed_base >= self.packed_stop)
        return _where(emptied, columns, slid)

    def exact_gone(self, new: Bounds) -> Any:
        """How many pages of the window are given up on the way to `new`."""
        return np.minimum(self.window_pages, (new.exact_base - self.exact_base) // PAGE)

    def cropped(self, tokens: int, packing: Packing | None) -> Bounds | None:
        """Of one row: after forgetting the last `tokens` tokens, or None if one that is visible again is gone."""
        length = self.length - tokens
        if length <= self.pinned:
            empty = self._replace(exact_base=self.pinned, packed_base=0, packed_stop=0, evicted=0, left=0)
            return empty._replace(length=length)  # all that is left is in the pinned pages
        out = self._replace(length=length)
        if max(self.first_held, self.left) > max(self.pinned, out.oldest_visible):
            return None
        if self.left > max(0, out.oldest_visible):
            out = out._replace(left=0)  # all that has left is in the pinned pages, and may be seen again
        if length >= self.exact_base or packing is None or self.packed_stop == self.packed_base:
            return out
        stop = max(self.packed_base, self.packed_base + (length - self.packed_base) // packing.group * packing.group)
        return out._replace(packed_stop=stop, exact_base=stop)


@lru_cache(maxsize=16)
def _repeated(bounds: Bounds, rows: int) -> Bounds:
    out = np.repeat(np.array(bounds)[:, None], rows, 1)
    out.flags.writeable = False
    return Bounds(*out)


FIXED = 7
"""How many fields of `Bounds` never change."""
FIELDS = len(Bounds._fields)


def upgraded(data: np.ndarray) -> np.ndarray:
    """Bounds `[fields, rows]` as they are now, of rows that were saved before there were windows of the text."""
    if len(data) == FIELDS:
        return data
    new = {"share": -1, "compensates": 0, "left": 0}
    old = iter(data)
    return np.stack([np.full(data.shape[1], new[name]) if name in new else next(old) for name in Bounds._fields])
