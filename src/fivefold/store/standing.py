"""The bounds of all rows of a bank, and whether they are still what somebody knows.

Layers mostly stand alike, so a field is one layer's numbers as long as it is the same in all. Nobody can write to the
arrays that are handed out: bounds are changed here, and have another number then.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fivefold.store.rows import FIELDS, Bounds

_versions = itertools.count(1)
LENGTH, EVICTED = (Bounds._fields.index(name) for name in ("length", "evicted"))


class Standing:
    """The bounds of `rows` rows of `layers` layers. fields: int64 `[rows]`, or `[rows / layers]` of one that all layers
    have the same of.

    version: stands for these very bounds; no others ever have it. grown: the version of which they are what one more
    token in every row makes; 0 where they are nothing of the kind.
    """

    def __init__(self, layers: int, rows: int, fields: Sequence[np.ndarray]) -> None:
        self.layers, self.rows, self._each = layers, rows, rows // layers
        self.every = _frozen(np.arange(rows))
        self._fields = [_frozen(x) for x in fields]
        # Of each field: whether all layers have the same, and what is there is one layer's. None is not known.
        self._same: list[bool | None] = [True if layers == 1 or len(x) < rows else None for x in fields]
        self._own: set[int] = set()
        self._wide: list[np.ndarray | None] = [None] * FIELDS
        self.version, self.grown = next(_versions), 0
        self._full: tuple[int, np.ndarray] | None = None

    @classmethod
    def gathered(cls, parts: Sequence[tuple[Standing, np.ndarray]], source: np.ndarray) -> Standing:
        """Rows of several, one after the other: of each layer those `local`. source: where these are among the rows of
        all parts."""
        layers, starts = parts[0][0].layers, np.cumsum([0] + [one._each for one, _ in parts])
        local = np.concatenate([first + rows for first, (_, rows) in zip(starts, parts)])
        fields = []
        for number in range(FIELDS):
            if all(one._same[number] for one, _ in parts):
                fields.append(np.concatenate([one._fields[number] for one, _ in parts])[local])
            else:
                fields.append(np.concatenate([one._all(number) for one, _ in parts])[source])
        return cls(layers, len(source), fields)

    # -- what there is ------------------------------------------------------------------------------------

    def whole(self, rows: np.ndarray) -> bool:
        """Whether these are all rows, one after the other."""
        return rows is self.every or (rows.shape == self.every.shape and np.array_equal(rows, self.every))

    def _all(self, number: int) -> np.ndarray:
        """A field of all rows."""
        if self.layers == 1 or not self._same[number]:
            return self._fields[number]
        wide = self._wide[number]
        if wide is None:
            wide = self._wide[number] = _frozen(np.tile(self._fields[number], self.layers))
        return wide

    @property
    def bounds(self) -> Bounds:
        """Of all rows."""
        return Bounds(*map(self._all, range(FIELDS)))

    def at(self, rows: np.ndarray) -> Bounds:
        """Of some rows; any shape."""
        if self.whole(rows):
            return self.bounds
        local = rows if self.layers == 1 or not any(self._same) else rows % self._each
        return Bounds(*(x[local if same else rows] for x, same in zip(self._fields, self._same)))

    def one(self, row: int) -> Bounds:
        """Of one row, as whole numbers."""
        local = row % self._each
        return Bounds(*(int(x[local if same else row]) for x, same in zip(self._fields, self._same)))

    def seen(self, rows: np.ndarray) -> np.ndarray:
        """`Bounds.seen` of some rows."""
        return (self._all(LENGTH) + self._all(EVICTED))[rows]

    def layer(self, index: int) -> Bounds:
        """Of one layer's rows."""
        mine = slice(index * self._each, (index + 1) * self._each)
        return Bounds(*(x if same else x[mine] for x, same in zip(self._fields, self._same)))

    @property
    def same(self) -> bool:
        """Whether all layers have the same bounds."""
        for number, known in enumerate(self._same):
            if known is None:
                x = self._fields[number].reshape(self.layers, -1)
                self._same[number] = known = bool((x == x[:1]).all())
                if known:
                    self._fields[number], self._wide[number] = _frozen(x[0].copy()), self._fields[number]
            if not known:
                return False
        return True

    @property
    def level(self) -> bool:
        """Whether all rows have the same bounds."""
        return self.same and all(bool((x == x[:1]).all()) for x in self._fields)

    def of_layers(self) -> Bounds:
        """Of each layer, `[layers, rows]`; `[1, rows]` where all have the same."""
        if self.same:
            return Bounds(*(x[None] for x in self._fields))
        return Bounds(*(x.reshape(self.layers, -1) for x in self.bounds))

    @property
    def nbytes(self) -> int:
        """Of as many numbers as there can be: as if no layers were alike."""
        return FIELDS * 8 * self.rows

    @property
    def full(self) -> np.ndarray:
        """`Bounds.full` of each layer, in the form of `of_layers`."""
        if self._full is None or self._full[0] != self.version:
            self._full = self.version, self.of_layers().full
        return self._full[1]

    @property
    def full_rows(self) -> np.ndarray:
        """The rows whose next token needs a page of its own."""
        full = self.full
        rows = np.flatnonzero(full)
        if len(full) < self.layers and len(rows):
            rows = (np.arange(self.layers)[:, None] * self._each + rows).reshape(-1)
        return rows

    # -- how it changes -----------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], None]:
        """What brings back the bounds as they are now, whatever is done to them: nothing is copied but what is."""
        fields, same, version, grown = list(self._fields), list(self._same), self.version, self.grown
        self._own = set()

        def restore() -> None:
            self._fields, self._same, self.version, self.grown = list(fields), list(same), version, grown
            self._own, self._wide = set(), [None] * FIELDS

        return restore

    def grow(self) -> None:
        """One more token in every row."""
        self.version, self.grown = next(_versions), self.version
        self._fields[LENGTH], self._wide[LENGTH] = _frozen(self._fields[LENGTH] + 1), None
        self._own.add(LENGTH)

    def put(self, rows: np.ndarray, values: Mapping[int, Any]) -> None:
        """Let rows have these values of fields, by number: arrays `[len(rows)]`, one number for all, or one layer's
        `[len(rows) / layers]` where `rows` are the same ones of every layer."""
        whole = self.whole(rows)
        self.version, self.grown = next(_versions), 0
        for number, x in values.items():
            single = np.ndim(x) == 0
            if not whole:
                self._write(number, rows, x, not single and len(x) < len(rows))
            elif single or (x is not self._fields[number] and x is not self._wide[number]):
                self._fields[number] = new = _frozen(np.full(self._each, x) if single else x)
                self._same[number], self._wide[number] = True if len(new) == self._each else None, None
                self._own.discard(number)  # it may be somebody else's, too

    def _write(self, number: int, rows: np.ndarray, x: Any, everywhere: bool) -> None:
        """Part of a field. everywhere: x is of one layer, and all get the same."""
        apart = self.layers > 1 and bool(self._same[number]) and not everywhere
        if apart or number not in self._own:
            self._fields[number] = (self._all(number) if apart else self._fields[number]).copy()
            self._own.add(number)
        field, self._wide[number] = self._fields[number], None
        field.flags.writeable = True
        if everywhere and self._same[number]:
            field[rows[: len(x)]] = x
        else:
            field[rows] = np.tile(x, self.layers) if everywhere else x
            self._same[number] = True if self.layers == 1 else None
        field.flags.writeable = False


def _frozen(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x
