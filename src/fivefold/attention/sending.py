"""Numbers that the host writes and a device reads at a fixed place, and the tables of pages there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from fivefold.kernels.device import sent
from fivefold.store.bank import Bank
from fivefold.store.pages import PagePool
from fivefold.store.rows import Bounds
from fivefold.store.tier import Tier

_MANY = 1 << 20  # bytes


class Sending:
    """What is written for `there`, a tensor on a device, and sent when it is complete. The host has two of it, because
    the device may still be reading the one before."""

    def __init__(self, there: torch.Tensor) -> None:
        self.there, cuda = there, there.device.type == "cuda"
        self._hosts = [torch.zeros_like(there, device="cpu", pin_memory=cuda) for _ in range(2)]
        self._events = [torch.cuda.Event() if cuda else None for _ in range(2)]
        self._turn, self._lines = 0, len(there)

    @property
    def nbytes(self) -> int:
        return self.there.nbytes + sum(host.nbytes for host in self._hosts)

    def writable(self, alike: bool = False) -> np.ndarray:
        """Where the next numbers go; waits until nobody reads there any more. alike: whether all lines are the same, of
        which the device then makes copies itself where that is less to do."""
        self._lines = 1 if alike and self.there.nbytes > _MANY else len(self.there)
        event = self._events[1 - self._turn]
        if event is not None:
            event.synchronize()
        return self._hosts[1 - self._turn][: self._lines].numpy()

    def send(self) -> None:
        """Nobody waits for it. Where it fails the same is sent again."""
        turn = 1 - self._turn
        try:
            self.there[: self._lines].copy_(self._hosts[turn][: self._lines], non_blocking=True)
        finally:
            event = self._events[turn]
            if event is not None:
                event.record()
        if self._lines < len(self.there):
            self.there[self._lines :].copy_(self.there[:1])
        self._turn = turn


def send_pages(
    bank: Bank,
    tier: Tier,
    names: Sequence[str],
    table: torch.Tensor,
    unit: int,
    rows_there: int,
    standing: Callable[[np.ndarray], np.ndarray] | None = None,
    bounds: Bounds | None = None,
) -> None:
    """Bring a table of pages on a device up to date with a tier of a bank: where what changed lies.

    table: int64 `[layers * rows_there, columns]`, or with a last axis of `names` where there are several; unit: bytes
    that an address counts. standing: where its rows stand, if not as they are. bounds: the bank's are not yet what they
    will be (see `Standing.of_layers`).
    """
    if not tier.changed:
        return
    bounds, places = bank.standing.of_layers() if bounds is None else bounds, []
    counts = (bounds.exact_pages if tier is bank.exact else bounds.packed_pages(bank.packing)).reshape(-1)
    where = {name: (pool, tier.tables[i]) for pool, name, i in tier.fields()}
    meta, same = table.device.type == "meta", bank.rows == rows_there and standing is None
    for rows, columns in tier.changed:
        if same and not meta and _whole(bank, rows, columns, counts):
            some = slice(int(columns[0]), int(columns[-1]) + 1)
            pages = [(where[name][0], name, where[name][1][:, some]) for name in names]
            new = _addresses(pages, unit)
            table.view(len(table), -1, len(names))[:, some].copy_(sent(table.device, new)[0])
            continue
        count = counts[rows if len(counts) == bank.standing.rows else rows % len(counts)]
        there = columns < count  # what stands behind is nobody's
        places.append([x[there] for x in np.broadcast_arrays(rows, columns)])
    if not places:
        tier.known()
        return
    rows, columns = (np.concatenate(parts) for parts in zip(*places))
    pages = [(where[name][0], name, where[name][1][rows, columns]) for name in names]
    if bank.rows < rows_there:
        rows = rows // bank.rows * rows_there + rows % bank.rows
    if standing is not None:
        rows = standing(rows)
    at = rows * table.shape[1] + columns
    if len(at) and not meta:
        new = _addresses(pages, unit)
        target = table.view(-1, len(names))
        if table.device.type == "cpu":
            target.numpy()[at] = new
        else:
            target.index_copy_(0, *sent(table.device, at, new))
    tier.known()


def _whole(bank: Bank, rows: np.ndarray, columns: np.ndarray, counts: np.ndarray) -> bool:
    """Whether these are columns that all rows have, side by side: no places need be named then."""
    if rows.ndim != 2 or columns.ndim != 1 or len(rows) != bank.standing.rows or not len(columns) or not len(rows):
        return False
    run = columns[-1] - columns[0] + 1 == len(columns) and counts.min() > columns[-1]
    return bool(run) and bank.standing.whole(rows[:, 0])


def _addresses(pages: list[tuple[PagePool, str, np.ndarray]], unit: int) -> np.ndarray:
    """Where fields of pages lie, in units: of each page as many as there are fields."""
    out = np.empty((*pages[0][2].shape, len(pages)), dtype=np.int64)
    for number, (pool, name, ids) in enumerate(pages):
        np.floor_divide(pool.addresses(name, ids), unit, out=out[..., number])
    return out
