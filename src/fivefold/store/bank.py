"""The rows of several layers whose pages have the same formats and lie on the same device, in common tables.

A row's index is `(layer * batch + sequence) * kv_heads + kv_head`. Each number that the engine keeps of rows is one
array over all of them, so that a decoding step of a whole model is a few operations on arrays, whether its sequences
are of the same length or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fivefold.interrupts import uninterrupted
from fivefold.store.chunk import Part
from fivefold.store.codec import PairCodec
from fivefold.store.compensation import absorb
from fivefold.store.context import Memo
from fivefold.store.held import joined
from fivefold.store.interfaces import Layer
from fivefold.store.pack import pack
from fivefold.store.pairs import pack_pairs
from fivefold.store.rows import FIELDS, FIXED, Bounds
from fivefold.store.standing import EVICTED, LENGTH, Standing
from fivefold.store.tier import Ahead, Tier
from fivefold.store.transaction import Transaction

ROWS = ("offset", "chosen", "residual", "peak")
"""What a bank knows of each row besides its bounds."""


class Bank:
    """The common tables of `layers`, which get their place in them.

    standing: the rows' bounds. offset: int64 `[rows]`, the position that the model gave a row's first token
    (with codecs that look at positions). chosen: bool `[rows]`, where a policy chooses tokens. residual: int64
    `[rows]`, tokens that always stay exact. peak: float32 `[rows]`, the largest absolute number that was packed, for
    kernels with a narrower range than the pages.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        first = layers[0]
        self.layers = list(layers)
        self.heads, self.device, self.packing = first.spec.kv_heads, first.spec.device, first.packing
        self.paired = isinstance(first.codec, PairCodec)
        """Whether layers 2i and 2i + 1 share packed pages (`store/pairs.py`)."""
        for index, layer in enumerate(layers):
            assert layer.format == first.format
            layer.bank, layer.index = self, index
        self.change: Transaction | None = None
        self.ahead: Ahead | None = None
        self.mirror: Any = None
        """The device tables that show these rows (`attention/tables.py`), if somebody made them."""
        self.live: Any = None
        """Where what policies know of the tokens is while steps are a kernel's (`attention/watch.py`)."""
        self._clear()

    @classmethod
    def united(cls, layers: Sequence[Layer], change: Transaction | None) -> Bank:
        """One bank of layers that have several, with all that they hold; they must have the same sequences."""
        old = list(dict.fromkeys(layer.bank for layer in layers))
        rows = [(layer.bank, np.arange(layer.base, layer.base + layer.bank.rows)) for layer in layers]
        before = [(layer, layer.bank, layer.index, list(layer.held), dict(layer.learned)) for layer in layers]

        def part() -> None:
            for layer, bank, index, held, learned in before:
                layer.bank, layer.index, layer.held, layer.learned = bank, index, held, learned
                layer.regroup()

        if change is not None:
            change.undo(part)
        bank = cls(layers)
        if change is not None:
            change.members.append(bank)
        for layer, _, _, held, learned in before:
            layer.held, layer.learned = held, learned
        bank.batch, bank.change = old[0].batch, change
        for name in ROWS:
            setattr(bank, name, np.concatenate([getattr(one, name)[at] for one, at in rows]))
        fields = zip(*(one.at(at) for one, at in rows))
        bank.standing = Standing(len(layers), len(bank.offset), [np.concatenate(parts) for parts in fields])
        bank.pending = [write for one in old for write in one.pending]
        bank.exact = _stacked([(one.exact, at) for one, at in rows])
        bank.packed = None if bank.packed is None else _stacked([(one.packed, at) for one, at in rows])
        return bank

    def _clear(self) -> None:
        self.batch, self.live = 0, None
        self.standing = Standing(len(self.layers), 0, list(np.zeros((FIELDS, 0), dtype=np.int64)))
        self.offset = np.zeros(0, dtype=np.int64)
        self.chosen = np.zeros(0, dtype=bool)
        self.residual = np.zeros(0, dtype=np.int64)
        self.peak = np.zeros(0, dtype=np.float32)
        self.exact, self.packed = self._tiers(0)
        self.mirror = None
        self.memo = Memo()
        self.due: np.ndarray | None = None
        """Nothing is due for a row before it has so many tokens, int64 `[rows]`, or `[rows of a layer]` where that is
        so of the row in every layer; None where it is not known."""
        self._free: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None] | None = None
        self.pending: list[tuple[str, np.ndarray, np.ndarray, torch.Tensor]] = []
        for layer in self.layers:
            layer.held, layer.learned = [], {}
            layer.regroup()

    def _tiers(self, rows: int) -> tuple[Tier, Tier | None]:
        first = self.layers[0]
        return Tier([first.exact_pool], rows), Tier(first.packed_pools, rows) if first.packed_pools else None

    @property
    def kind(self) -> tuple[object, ...]:
        """Sequences can move between banks, whatever their pools, where this is the same."""
        tiers = [self.exact] + ([] if self.packed is None else [self.packed])
        layouts = [(pool.layout, pool.device) for tier in tiers for pool in tier.pools]
        return (*layouts, self.packing, *((layer.spec.layer, layer.extents) for layer in self.layers))

    def peaks(self) -> np.ndarray:
        """Of each layer: the largest absolute number in its pages, float32 `[layers]`."""
        return self.peak.reshape(len(self.layers), -1).max(1, initial=0)

    def note(self, rows: np.ndarray, peak: np.ndarray) -> None:
        """Numbers up to `peak`, float32 `[n]`, were packed for these rows, `[n]`, some of which may be named twice."""
        self.peak = self.peak.copy()  # a rollback has the old one
        np.maximum.at(self.peak, rows, peak)

    # -- changes ------------------------------------------------------------------------------------------

    def begin(self, change: Transaction) -> None:
        """All that follows is part of `change`."""
        self.flush()
        if not change.step:
            self.drop_ahead()
        change.undo(self._restore())
        self.change = change
        change.members.append(self)

    def _restore(self) -> Callable[[], None]:
        """What brings the rows back as they are now; the page tables know themselves what was done to them."""
        names = (*ROWS, "batch", "standing", "exact", "packed", "mirror", "pending", "live")
        before, bounds = {name: getattr(self, name) for name in names}, self.standing.snapshot()
        layers = [(list(layer.known), dict(layer.learned)) for layer in self.layers]
        tiers = [(tier, tier.shared, tier.capacity) for tier in (self.exact, self.packed) if tier is not None]

        def restore() -> None:
            self.drop_ahead()
            other = self.mirror is not before["mirror"]
            bounds()
            vars(self).update(before, due=None, memo=Memo())
            for tier, shared, capacity in tiers:
                tier.shared = shared
                tier.narrow(capacity)
                if other and self.mirror is not None:
                    tier.track()  # it has not seen what another one was sent
            for layer, (held, learned) in zip(self.layers, layers):
                layer.held, layer.learned = held, learned
                layer.regroup()

        return restore

    @contextmanager
    def atomic(self) -> Iterator[Transaction]:
        """A change that happens as a whole or not at all; within another one, a part of it."""
        if self.change is not None:
            yield self.change
            return
        change = Transaction()
        with uninterrupted:
            try:
                self.begin(change)
                yield change
                change.verify()
            except BaseException:
                change.rollback()
                raise
            change.commit()

    def write_later(self, name: str, pages: np.ndarray, slots: np.ndarray, values: torch.Tensor) -> None:
        """Single exact tokens that take the places of committed ones: they are written once this change is committed,
        before anything is read (`flush`). Doing so again does no harm, so a failure in between does none either."""
        self.pending = [*self.pending, (name, pages, slots, values)]

    def flush(self) -> None:
        """Write what `write_later` left, and what a step on a device chose."""
        if self.change is not None:
            return
        if self.live is not None and self.live.pending:
            assert self.mirror.watch is self.live.watch
            self.mirror.sync()
            self.mirror.overwrite()
            self.live = replace(self.live, pending=False)
        if not self.pending:
            return
        for name, pages, slots, values in self.pending:
            self.exact.pool.write_tokens(name, pages, slots, values)
        self.pending = []

    def tidy(self) -> None:
        """Give back what is held for what may come."""
        self.flush()
        self.drop_ahead()
        self.memo = Memo()

    def settle(self, stepped: bool = False) -> None:
        """What policies know of the tokens becomes the layers' own again (`LayerCache.held`). stepped: see `Watch`."""
        if self.live is None:
            return
        self.flush()
        held = self.live.watch.held(self, stepped)
        for layer, mine in zip(self.layers, held):
            layer.known = mine
        self.live = None

    # -- rows ---------------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Of one layer."""
        return self.batch * self.heads

    def rows_of(self, layers: Sequence[Layer] | None = None) -> np.ndarray:
        """Indices of the rows of some layers; None is all."""
        if layers is None or len(layers) == len(self.layers):
            return self.standing.every
        return np.concatenate([np.arange(layer.base, layer.base + self.rows) for layer in layers])

    @property
    def bounds(self) -> Bounds:
        """Of all rows, as arrays."""
        return self.standing.bounds

    def at(self, rows: np.ndarray) -> Bounds:
        """The bounds of rows, as arrays."""
        return self.standing.at(rows)

    def set(self, rows: np.ndarray, bounds: Bounds) -> None:
        """Let rows have these bounds: see `Standing.put`."""
        self.standing.put(rows, dict(enumerate(bounds[FIXED:], FIXED)))
        if self.due is not None:
            if len(self.due) == self.standing.rows:
                self.due[rows] = 0
            elif np.ndim(bounds.length) and len(bounds.length) < len(rows):
                self.due[rows[: len(bounds.length)]] = 0
            else:
                self.due = None

    def lengthen(self, rows: np.ndarray, length: int) -> None:
        """Tokens have come to rows."""
        self.standing.put(rows, {LENGTH: length})

    def touch(self, rows: np.ndarray) -> None:
        """The groups of these rows' layers are no longer what they were."""
        whole = len(rows) == self.standing.rows
        layers = range(len(self.layers)) if whole else np.flatnonzero(np.bincount(rows // max(1, self.rows))).tolist()
        for index in layers:
            self.layers[index].regroup()

    def start(self, batch: int) -> None:
        """Begin `batch` empty sequences."""
        assert not self.batch
        with self.atomic():
            one = [[Bounds.empty(extent) for extent in layer.extents] for layer in self.layers]
            per_layer = np.array(one, dtype=np.int64).transpose(2, 0, 1)[:, :, None]  # [fields, layers, 1, heads]
            fields = np.broadcast_to(per_layer, (*per_layer.shape[:2], batch, self.heads)).reshape(FIELDS, -1)
            rows = fields.shape[1]
            self.standing = Standing(len(self.layers), rows, list(fields))
            self.batch, self.due = batch, None
            self.offset, self.peak = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.float32)
            self.exact, self.packed = self._tiers(rows)
            for name in ("chosen", "residual"):
                each = np.array([getattr(layer, f"head_{name}") for layer in self.layers])[:, None]
                setattr(self, name, np.broadcast_to(each, (len(each), batch, self.heads)).reshape(-1).copy())
            for layer in self.layers:
                layer.start_held()
                layer.regroup()

    def select(self, sequences: np.ndarray) -> None:
        """Sequence i becomes what sequence `sequences[i]` was: repeats share pages, absent ones are given up."""
        with self.atomic() as change:
            old = [(tier, columns) for tier, columns in self.columns()]
            self._gather([(self, sequences)], len(set(sequences.tolist())) < len(sequences))
            for tier, columns in self.columns():
                tier.retain(change, columns)
            for tier, columns in old:
                tier.release(change, columns)

    def fork(self) -> Bank:
        """The same rows once more, for layers of their own: every page is shared until either side writes."""
        self.flush()
        twin = Bank([layer.twin() for layer in self.layers])
        with self.atomic() as change:
            for tier, _ in self.columns():
                tier.shared = True
            for layer in self.layers:
                layer.regroup()  # whoever knows an open page must look at its references again
            if self.batch:
                twin._gather([(self, np.arange(self.batch))], True)
                for tier, columns in twin.columns():
                    tier.retain(change, columns)
        return twin

    def join(self, other: Bank) -> None:
        """The sequences of another bank of the same formats come behind these. It is empty then: no page has changed
        its owner, and both are part of the same change."""
        assert self.change is not None and other.change is self.change and not other.pending
        self._gather([(bank, np.arange(bank.batch)) for bank in (self, other)])
        other._clear()

    def split(self, other: Bank, indices: np.ndarray, rest: np.ndarray) -> None:
        """Sequences `indices` go to an empty bank of the same formats, `rest` stay; pages keep their owner."""
        assert self.change is not None and other.change is self.change and not other.batch
        other._gather([(self, indices)])
        self._gather([(self, rest)])
        for bank in (self, other):
            if bank is other or self.exact.pool.budget.limit is not None:  # two tables are no more than one then
                for tier, columns in bank.columns():
                    tier.narrow(int(columns.max(initial=0)))

    def _gather(self, parts: Sequence[tuple[Bank, np.ndarray]], shared: bool = False) -> None:
        """Become sequences of banks of the same formats, one after the other; references are the caller's to count.
        shared: whether pages will have several owners by that."""
        mirror, self.mirror = self.mirror if self.mirror is not None and self.mirror.fit() else None, None
        if mirror is not None:
            mirror.sync()  # or what it does not know yet would be lost
        heads, layers, first = np.arange(self.heads), np.arange(len(self.layers))[:, None, None], 0
        places, local = [], []
        for bank, sequences in parts:
            places.append(first + (layers * bank.batch + sequences[:, None]) * self.heads + heads)
            local.append((sequences[:, None] * self.heads + heads).reshape(-1))
            first += bank.standing.rows
        source = np.concatenate(places, 1).reshape(-1)
        kept = [
            joined([(bank.layers[index].selected(rows), len(rows)) for (bank, _), rows in zip(parts, local)])
            for index in range(len(self.layers))
        ]
        for layer, (held, learned) in zip(self.layers, kept):
            layer.held, layer.learned = held, learned
        for name in ROWS:
            setattr(self, name, np.concatenate([getattr(bank, name) for bank, _ in parts])[source])
        self.standing = Standing.gathered([(bank.standing, rows) for (bank, _), rows in zip(parts, local)], source)
        shape = len(self.layers), self.heads, shared
        packed = [(bank.packed, bank.batch, which) for bank, which in parts if bank.packed is not None]
        self.exact = Tier.gathered([(bank.exact, bank.batch, which) for bank, which in parts], *shape)
        self.packed = Tier.gathered(packed, *shape) if packed else None
        self.batch, self.due = sum(len(sequences) for _, sequences in parts), None
        if mirror is not None:
            mirror.follow(np.concatenate([which if bank is self else 0 * which - 1 for bank, which in parts]))
        for layer in self.layers:
            layer.regroup()

    def columns(self) -> Iterator[tuple[Tier, np.ndarray]]:
        """The tiers, with how many columns of each row count."""
        bounds = self.bounds
        yield self.exact, bounds.exact_pages
        if self.packed is not None:
            yield self.packed, bounds.packed_pages(self.packing)

    def free(self) -> None:
        """Forget everything, and give every page back."""
        with self.atomic() as change:
            for tier, columns in self.columns():
                tier.release(change, columns)
            self._clear()

    # -- steps --------------------------------------------------------------------------------------------

    def open(self, rows: np.ndarray) -> None:
        """One more token of each row: a slot behind the others in an exact page that nobody shares, which is the
        caller's to write."""
        assert self.change is not None
        standing, whole, ahead = self.standing, self.standing.whole(rows), self.ahead
        if ahead is not None and whole and ahead.version == standing.version:
            self.change.adopt(self.exact.pool, ahead.pages)
            self.ahead = None
            if not ahead.known:
                self.exact.change(ahead.rows, ahead.columns)
        elif self.exact.shared or not whole:
            old = self.at(rows)
            fresh, columns = old.full, old.exact_pages
            self.exact.widen(self.change, rows[fresh], columns[fresh], 1)
            if self.exact.shared:
                self.exact.unshare(self.change, rows[~fresh], columns[~fresh] - 1)
        elif len(fresh := standing.full_rows):  # often a few of thousands
            self.exact.widen(self.change, fresh, standing.at(fresh).exact_pages, 1)
        if whole:
            standing.grow()
        else:
            standing.put(rows, {LENGTH: old.length + 1})
        if self.live is not None:
            self.live = replace(self.live, opened=True)
        self.touch(rows)

    def look_ahead(self, most: int) -> None:
        """Take the pages that `open` will want for one more token of all rows, if nothing happens before. most: columns
        that a row can have."""
        self.drop_ahead()
        rows = self.standing.full_rows
        if len(rows) and (columns := self.standing.at(rows).exact_pages).max() < most:
            self.ahead = self.exact.reach_out(self.standing.version, rows, columns)

    def drop_ahead(self) -> None:
        """Give pages back that were taken ahead."""
        ahead, self.ahead = self.ahead, None
        if ahead is not None:
            ahead.tier.pool.release(ahead.pages)

    def give(self, rows: np.ndarray) -> None:
        """One token of each row goes, and the newest one takes its place, which is the device's to do."""
        assert self.change is not None
        standing = self.standing
        each = len(self.layers) if standing.whole(rows) and standing.same else 1
        old = standing.layer(0) if each > 1 else self.at(rows)
        new = old._replace(length=old.length - 1, evicted=old.evicted + 1)
        gone = old.exact_pages - new.exact_pages
        if gone.any():
            first, gone, columns = (np.tile(x, each) for x in (old.exact_pages - 1, gone, old.exact_pages))
            self.exact.drop(self.change, rows, first, gone, columns)
        standing.put(rows, {LENGTH: new.length, EVICTED: new.evicted})
        self.touch(rows)

    def _plain(self) -> tuple[np.ndarray, int]:
        """Rows in which no policy chooses: all of them, or those of one layer where they stand for the same rows of so
        many."""
        if self._free is None or self._free[0] is not self.chosen or self._free[1] is not self.residual:
            rows, each = np.flatnonzero(~self.chosen), len(self.layers)
            layers = [x.reshape(each, -1) for x in (self.chosen, self.residual)]
            local = rows[: len(rows) // each] if all((x == x[:1]).all() for x in layers) else None
            self._free = self.chosen, self.residual, rows, local
        _, _, rows, local = self._free
        return (rows, 1) if local is None or not self.standing.same else (local, len(self.layers))

    def advance(self, rows: np.ndarray | None = None, revocable: int = 0) -> None:
        """Let windows slide, and pack what is due; rows: None is all in which no policy chooses. The newest
        `revocable` tokens may yet be taken back."""
        rows, each = self._plain() if rows is None else (rows, 1)
        old, due = self.standing.layer(0) if each > 1 else self.bounds, self.due
        if due is None:
            due = np.zeros(len(old.length), dtype=np.int64)
        elif len(due) != len(old.length):
            due = due.reshape(each, -1).min(0) if each > 1 else np.tile(due, len(self.layers))
        self.due = due
        if not revocable:
            late = old.length >= due
            rows = rows[late[rows]] if late.any() else rows[:0]
        if not len(rows):
            return
        old = old if len(rows) == len(due) else old.at(rows)
        packing = self.packing and replace(self.packing, residual=self.residual[rows])
        new = old.advanced(packing, revocable)
        moved = (new.exact_base != old.exact_base) | (new.packed_base != old.packed_base)
        moved |= (new.packed_stop != old.packed_stop) | (new.left != old.left)
        if moved.any():
            some = (rows, old, new) if moved.all() else (rows[moved], old.at(moved), new.at(moved))
            which = (np.arange(each)[:, None] * self.rows + some[0]).reshape(-1) if each > 1 else some[0]
            with self.atomic():
                self.move(which, *some[1:])
            self.touch(which)
            if self.mirror is not None and self.mirror.fit():
                self.mirror.sync()  # here a GPU is still at work on the step
        due[rows] = 0 if revocable else new.length + new.idle(packing)
        self.due = due

    def move(self, rows: np.ndarray, old: Bounds, new: Bounds, parts: Sequence[Part] = ()) -> None:
        """From bounds to bounds, of `rows` or, if they are the same ones of every layer, of those of one: pack groups,
        give up pages of either tier. parts: see `pack`."""
        assert self.change is not None
        before, after = old, new
        if len(old.length) < len(rows):
            before = self.at(rows)
            each = zip(before, old, new)
            after = Bounds(*(b if x is y else np.tile(y, len(self.layers)) for b, x, y in each))
        absorb(self, rows, before, after, parts)
        if self.packed is not None:
            (pack_pairs if self.paired else pack)(self, rows, before, after, parts)
        self.exact.drop(self.change, rows, before.pinned_pages, before.exact_gone(after), before.exact_pages)
        self.set(rows, new)

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        arrays = [getattr(self, name) for name in ROWS]
        tiers = [tier for tier in (self.exact, self.packed) if tier is not None]
        waiting = sum(pages.nbytes + slots.nbytes + x.nbytes for _, pages, slots, x in self.pending)
        mirror = 0 if self.mirror is None else self.mirror.nbytes
        rows = self.standing.nbytes + sum(x.nbytes for x in arrays)
        return rows + sum(tier.nbytes for tier in tiers) + waiting + mirror + self.memo.nbytes


def _stacked(parts: list[tuple[Tier, np.ndarray]]) -> Tier:
    """Rows of several tiers, one after the other."""
    return Tier.gathered([(tier, len(tier.table), rows) for tier, rows in parts], 1, 1, False)
