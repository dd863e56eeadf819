"""One token of a row that stands for all that have left it: the mean of their keys and of their values.

A row whose `Extent` says `compensate` keeps two running means of the tokens that have left its window, float32
`[head_dim]` each, keys as they attend (after RoPE). How many they were is known to its `Bounds` (`compensated`). In
attention the token counts as that many equal ones: see `attention/compensate.py`.

The means are part of what a layer has learned of its rows (`LayerCache.learned`): transactions, forks, sequences that
move, files and `report()` treat them as what codecs remember.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from fivefold.store.chunk import Part, each
from fivefold.store.codec import Pair
from fivefold.store.group import KV, RowGroup
from fivefold.store.interfaces import Tables
from fivefold.store.rows import PAGE, Bounds

MEANS = ("left_keys", "left_values")
"""Their names in `LayerCache.learned`: `[rows, head_dim]` each, of no meaning where `Bounds.compensated` is 0."""
# Numbers of packed keys that are decoded at a time.
_NUMBERS = 1 << 22


def absorb(bank: Tables, rows: np.ndarray, old: Bounds, new: Bounds, parts: Sequence[Part] = ()) -> None:
    """Before rows go from bounds `old` to `new`: what leaves goes into their means.

    parts: the tokens behind `old.length`, all rows then standing alike. Whatever lies in pages is taken as it is read
    from there: packed tokens decoded.
    """
    due = np.flatnonzero(np.asarray(new.compensated > old.compensated))
    if not len(due):
        return
    kinds: Iterable[tuple[np.ndarray, Part | None]] = each(parts)
    if not parts:
        keys = np.stack([rows // bank.rows, new.left, *old])[:, due]
        which = np.unique(keys, axis=1, return_inverse=True)[1].reshape(-1)
        kinds = ((due[which == number], None) for number in range(int(which.max()) + 1))
    for at, part in kinds:
        layer, bounds = bank.layers[int(rows[at[0]]) // bank.rows], Bounds(*(int(x[at[0]]) for x in old))
        group = RowGroup(layer, rows[at] - layer.base, bounds)
        before, after = int(bounds.compensated), int(new.compensated[at[0]])
        start, stop = max(bounds.left, bounds.sink), int(new.left[at[0]])
        share = (after - before) / after
        for name, mean in zip(MEANS, _means(group, start, stop, part and part.pair)):
            whole = layer.learned.get(name)
            if whole is None:
                whole = mean.new_zeros((layer.rows, mean.shape[1]))
            where = group.rows_tensor.to(whole.device)
            layer.learned[name] = whole.index_copy(0, where, torch.lerp(whole[where], mean, share))


def _means(group: RowGroup, start: int, stop: int, chunk: Pair | None) -> list[torch.Tensor]:
    """Of the keys and of the values of the tokens at positions start..stop: float32 `[rows, head_dim]`."""
    spec = group.layer.spec
    sums = [torch.zeros((len(group.rows), spec.head_dim), device=spec.device) for _ in KV]
    if spec.device.type == "meta":
        return sums
    for pair in _tokens(group, start, stop, chunk):
        for total, x in zip(sums, pair):
            total += x.sum(1, dtype=torch.float32)
    return [total / (stop - start) for total in sums]


def _tokens(group: RowGroup, start: int, stop: int, chunk: Pair | None) -> Iterator[Pair]:
    """Keys and values at positions start..stop, from wherever they are: `[rows, some of the tokens, head_dim]`."""
    layer, bounds, dim = group.layer, group.bounds, group.layer.spec.head_dim
    for first, last in ((0, int(bounds.pinned_tokens)), (bounds.exact_base, bounds.length)):
        low, high = max(start, first), min(stop, last)
        if low < high:
            column, slot = int(low // PAGE if first == 0 else bounds.exact_column(low)), low % PAGE
            pages = group.exact[:, column : column - (slot + high - low) // -PAGE]
            keys, values = (layer.exact_pool.read(name, pages).reshape(len(pages), -1, dim) for name in KV)
            yield keys[:, slot : slot + high - low], values[:, slot : slot + high - low]
    low, high = max(start, bounds.packed_base), min(stop, bounds.packed_stop)
    while low < high:
        assert layer.packing is not None
        page = layer.packing.page
        column, slot = (int(x) for x in bounds.packed_place(low, layer.packing))
        count = min(high - low, max(1, _NUMBERS // (page * len(group.rows) * dim)) * page - slot)
        columns = -((slot + count) // -page)
        keys, values = (x[:, slot : slot + count] for x in group.decoded(column, column + columns))
        yield keys, values
        low += count
    low = max(start, bounds.length)
    if low < stop:
        assert chunk is not None
        keys, values = (x[:, low - bounds.length : stop - bounds.length] for x in chunk)
        yield keys, values
