"""Layers whose heads hold different tokens, where those that hold the same are packed together: sets of heads.

Kernels read such heads' pages together, so they are called once for each set, on rows that stand one behind the other:
device tables describe packed pages set by set, and exact ones row by row, as everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from fivefold.kernels.choice import choose
from fivefold.kernels.device import sent
from fivefold.kernels.packed_decode import Reader, schedule
from fivefold.kernels.packed_decode.reader import Divided, Packed
from fivefold.store.group import RowGroup
from fivefold.store.interfaces import Layer
from fivefold.store.rows import run_of


def readers_of(layer: Layer) -> list[Reader | None]:
    """What reads a layer's packed pages: on a GPU one for each set of its heads where those of a set are read
    together."""
    reader = None if layer.codec is None else layer.codec.reader
    if layer.codec is None or reader is None or reader.together == 1 or len(layer.sets) == 1:
        return [reader]
    if not choose(layer.spec.device).triton:
        return [reader]
    return [layer.codec.reader_of(heads) for heads in layer.sets]


class Tables(Protocol):
    """What is asked of `DeviceTables`."""

    sequences: int
    packed_columns: int
    page: int
    device: torch.device

    def programs_of(self, rows: int, reader: Reader | None) -> schedule.Programs: ...


@dataclass(frozen=True)
class Set:
    """Rows of heads that hold the same tokens: where they stand, what reads them, in how many programs, and in which
    line (of one query's numbers) the first part stands."""

    at: slice
    reader: Reader
    programs: int
    line: int

    @property
    def kind(self) -> tuple[int, int, int]:
        return self.at.stop - self.at.start, self.reader.team, self.programs


class Division:
    """The rows of the layers of device tables, set by set where a layer's heads are read so.

    order: int64 `[layers, rows]`, which row of its layer stands at a place; place: where it stands. readers: what reads
    the packed pages of layers whose rows stand as they are; of others there are `sets`. Nothing is divided where no
    kernel would read it.
    """

    def __init__(self, tables: Tables, layers: list[Any]) -> None:
        heads = layers[0].spec.kv_heads
        self.page, self.queries, self.sequences = tables.page, layers[0].spec.query_heads // heads, tables.sequences
        rows = np.arange(tables.sequences * heads)
        self.order = np.tile(rows, (len(layers), 1))
        self.readers = [None if layer.codec is None else layer.codec.reader for layer in layers]
        self.sets = [self._sets(tables, layer) for layer in layers]
        for index in np.flatnonzero([bool(some) for some in self.sets]).tolist():
            parts = [rows[np.isin(rows % heads, some)] for some in layers[index].sets]
            self.order[index] = np.concatenate(parts)
        self.place = self.order.argsort(1)
        self.rows, most = len(rows), max(len(some) for some in self.sets)
        self._starts = slice(self.rows * schedule.SPAN, self.rows * (schedule.SPAN + 1) + most)
        self._parts = slice(self._starts.stop, self._starts.stop + 4 * self.rows)
        self.width = self._parts.stop if most else 0
        """Of what kernels want to know of a layer in a step, int32: spans, place by place; the sets' work lists; and
        the parts of each row (see `Divided`)."""
        self._pages: np.ndarray | None = None
        self._places: dict[tuple[int, bytes], tuple[slice | torch.Tensor, slice | torch.Tensor]] = {}
        self._shared = np.zeros((len(layers), self._parts.stop - self._starts.start), dtype=np.int32)
        with torch.inference_mode(False):
            self._order = torch.from_numpy(self.order if most else self.order[:0]).to(tables.device)

    def _sets(self, tables: Tables, layer: Layer) -> list[Set]:
        readers, out, row, line = readers_of(layer), list[Set](), 0, 0
        if len(readers) == 1:
            return out
        for heads, reader in zip(layer.sets, readers):
            if reader is None:
                return []
            rows = tables.sequences * len(heads)
            # No more than there can be pages.
            programs = max(1, min(tables.programs_of(rows, reader)[0], rows // reader.team * tables.packed_columns))
            out.append(Set(slice(row, row + rows), reader, programs, line))
            row, line = row + rows, line + programs * reader.team * self.queries
        return out

    @property
    def nbytes(self) -> int:
        return self._order.nbytes

    @property
    def constants(self) -> list[tuple[torch.Tensor, ...]]:
        """Tensors of all readers."""
        whole = [one for one, some in zip(self.readers, self.sets) if one is not None and not some]
        return [one.constants for one in (*whole, *(one.reader for some in self.sets for one in some))]

    def standing(self, rows: np.ndarray) -> np.ndarray:
        """Where rows of all layers, int64 `layer * rows + row`, stand."""
        if not self.width:
            return rows
        layer, row = np.divmod(rows, self.rows)
        return layer * self.rows + self.place[layer, row]

    def rows_of(self, sequences: np.ndarray, each: int) -> np.ndarray:
        """The rows of some sequences in all layers, of which each has so many: int64."""
        heads = self.rows // self.sequences
        rows = sequences[:, None] * heads + np.arange(heads)
        return (np.arange(len(self.sets))[:, None] * each + rows.reshape(-1)).reshape(-1)

    # -- a step -------------------------------------------------------------------------------------------

    def fill(self, out: np.ndarray, seen: np.ndarray) -> None:
        """Write what kernels want to know, int32 `[layers, width]`, of spans `[layers or 1, rows, SPAN]`."""
        if not self.width:
            return
        spans = np.take_along_axis(np.broadcast_to(seen, (len(out), *seen.shape[1:])), self.order[:, :, None], 1)
        pages, before = schedule.pages_of(spans, self.page)[:, 0], self._pages
        changed = np.arange(len(out)) if before is None else np.flatnonzero((pages != before).any(1))
        made: dict[tuple[Any, bytes], np.ndarray] = {}  # most layers are divided alike, if not the same heads
        for index in changed.tolist():
            self._share_out(index, pages[index], made)
        self._pages = pages
        out[:, : self._starts.start] = spans.reshape(len(out), -1)
        out[:, self._starts.start :] = self._shared

    def _share_out(self, index: int, pages: np.ndarray, made: dict[tuple[Any, bytes], np.ndarray]) -> None:
        """Which programs work for which rows of a layer, whose rows see so many pages, place by place."""
        shared, first = self._shared[index], self._starts.stop - self._starts.start
        parts = np.zeros((self.rows, 4), dtype=np.int32)
        for number, one in enumerate(self.sets[index]):
            team, mine = one.reader.team, pages[one.at]
            key = one.kind, mine.tobytes()
            if key not in made:
                led = np.where(np.arange(len(mine)) % team == 0, mine, 0)
                made[key] = schedule.starts_of(np.stack([led, 0 * led]), (one.programs, 1))[0]
            starts = made[key]
            shared[one.at.start + number : one.at.stop + number + 1] = starts
            lead, member = np.divmod(np.arange(len(mine)), team)
            ends = starts[lead * team], starts[lead * team + 1]
            of = *ends, one.line + member * self.queries, np.full(len(mine), team * self.queries)
            parts[self.order[index, one.at]] = np.stack(of, 1)
        shared[first:] = parts.reshape(-1)

    def packed(self, layer: int, numbers: torch.Tensor, pages: Callable[..., Packed]) -> Packed | Divided | None:
        """All packed pages of a layer, numbers int32 `[width]` being what `fill` wrote; None if there is no reader.
        pages: gives those that stand in places, a slice of `layer * rows + place`, for a reader."""
        reader, first = self.readers[layer], layer * self.rows
        if reader is None or not self.sets[layer]:
            return None if reader is None else pages(slice(first, first + self.rows), reader)
        starts, sets = numbers[self._starts], list[tuple[Packed, torch.Tensor, int]]()
        for number, one in enumerate(self.sets[layer]):
            mine = starts[one.at.start + number : one.at.stop + number + 1]
            at = slice(first + one.at.start, first + one.at.stop)
            sets.append((pages(at, one.reader), mine, one.programs))
        spans, parts = numbers[: self._starts.start].view(self.rows, -1), numbers[self._parts].view(self.rows, 4)
        return Divided(tuple(sets), self._order[layer], spans, parts)

    def reader(self, group: RowGroup) -> Reader | None:
        """What reads the packed pages of rows that stand alike."""
        index = group.layer.index
        place, whole = self.place[index, group.rows[0]], self.readers[index]
        return next((one.reader for one in self.sets[index] if one.at.start <= place < one.at.stop), whole)

    def places(self, group: RowGroup, device: torch.device) -> tuple[slice | torch.Tensor, slice | torch.Tensor]:
        """Where the exact pages of these rows, and their packed ones, stand among those of all layers: runs, or int64
        tensors that are kept, since a prompt asks for the same with every chunk."""
        key = group.layer.index, group.rows.tobytes()
        if key not in self._places:
            if len(self._places) > 8 * len(self.sets):
                self._places.clear()
            rows = group.layer.index * self.rows + group.rows
            exact, packed = (run_of(at) or sent(device, at)[0] for at in (rows, self.standing(rows)))
            self._places[key] = exact, packed
        return self._places[key]
