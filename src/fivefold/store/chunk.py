"""Tokens that have just come, of rows that stand alike in any of a bank's layers, and how they are stored.

What is worked out of page tables is the same for all of these rows, so it is done once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from fivefold.store.group import KV, RowGroup
from fivefold.store.held import Held
from fivefold.store.interfaces import Tables
from fivefold.store.rows import PAGE, Bounds


class Part(NamedTuple):
    """Tokens of a group's rows: keys and values `[rows, tokens, head_dim]`, None to only move what is due. held: what a
    policy will know of them."""

    group: RowGroup
    keys: torch.Tensor | None
    values: torch.Tensor | None
    held: Held | None = None

    @property
    def pair(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return None if self.keys is None or self.values is None else (self.keys, self.values)


def each(parts: Sequence[Part]) -> Iterator[tuple[np.ndarray, Part]]:
    """The parts, with which of all their rows are theirs."""
    first = 0
    for part in parts:
        yield np.arange(first, first + len(part.group.rows)), part
        first += len(part.group.rows)


def take_each(bank: Tables, parts: Sequence[Part], revocable: int) -> None:
    """Take chunks in whose rows no policy chooses for, and move what is due; those that stand alike together. The
    newest `revocable` tokens may be taken back."""
    kinds: dict[tuple[Bounds, int, int], list[Part]] = {}
    for part in parts:
        assert part.keys is not None
        kind = part.group.bounds, part.keys.shape[1], int(bank.residual[part.group.flat[0]])
        kinds.setdefault(kind, []).append(part)
    for (old, tokens, residual), alike in kinds.items():
        packing = bank.packing and replace(bank.packing, residual=residual)
        take(bank, alike, old.appended(tokens).advanced(packing, revocable))


def take(bank: Tables, parts: Sequence[Part], new: Bounds) -> None:
    """Bring rows that all stand alike to bounds `new`, with the tokens that come to them."""
    old, rows = parts[0].group.bounds, parts[0].group.flat
    if len(parts) > 1:
        rows = np.concatenate([part.group.flat for part in parts])
    before, after = old.repeated(len(rows)), new.repeated(len(rows))
    bank.move(rows, before, after._replace(length=before.length), parts)
    if new.length > old.length:
        _write(bank, rows, old, new, list(zip(*(part.pair for part in parts if part.pair is not None))))
        bank.lengthen(rows, int(new.length))
    for part in parts:
        part.group.bounds = new
        part.group.touched_exact()
        part.group.touched_packed()


def _write(bank: Tables, rows: np.ndarray, old: Bounds, new: Bounds, chunk: Sequence[tuple[torch.Tensor, ...]]) -> None:
    """The tokens behind `old.length` into exact pages, but for what was packed or is out of the window. chunk: keys and
    values, of some of the rows each."""
    assert bank.change is not None
    there, stop = int(old.exact_pages - old.exact_gone(new)), int(new.exact_pages)
    pinned = min(stop, max(there, int(new.pinned_pages)))
    for first, last in ((there, pinned), (pinned, stop)):  # what stays is apart from what goes, and leaves no gaps
        bank.exact.widen(bank.change, rows, first, last - first)
    # Pinned pages come first in the table, and window pages exist only once those are full.
    for start, stop in (
        (old.length, min(new.length, new.pinned)),
        (max(old.length, new.exact_base), new.length),
    ):
        position = int(start)
        while position < stop:
            pinned = position < new.pinned
            column = position // PAGE if pinned else int(new.exact_column(position))
            slot = position % PAGE if pinned else int(position - new.exact_base) % PAGE
            count = PAGE - slot if slot else max(PAGE, int(stop - position) // PAGE * PAGE)
            count = min(count, int(stop) - position)
            whole = not slot and count % PAGE == 0
            if slot:
                bank.exact.unshare(bank.change, rows, column)
            pages = bank.exact.pages(rows, column + (count // PAGE if whole else 1))[:, column:]
            window = slice(position - int(old.length), position - int(old.length) + count)
            shape = (-1, PAGE if whole else count, chunk[0][0].shape[2])
            tokens = {name: [x[:, window].view(x.shape[0], *shape) for x in some] for name, some in zip(KV, chunk)}
            bank.exact.pool.write_fields(pages, tokens, None if whole else slice(slot, slot + count))
            position += count
