"""Two adjacent layers whose packed pages are in part the same: each page table names the common ones, and has own ones.

Both layers lie in one bank, the first of a pair at an even index, and have equal bounds between two forwards. A chunk
of the first layer waits, as it is, until the second one has it too; then the groups that are due are packed for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from fivefold.errors import CacheStateError, UnsupportedModelError
from fivefold.kernels.device import sent
from fivefold.store.chunk import Part, take
from fivefold.store.codec import Pair, PairCodec, whole
from fivefold.store.group import RowGroup
from fivefold.store.interfaces import Layer, Tables
from fivefold.store.pack import Due, Way, at_once, collect, layers_at_once, note
from fivefold.store.rows import Bounds
from fivefold.store.tier import Tier
from fivefold.store.transaction import Transaction

KNOWN = "known"
"""What the first layer's `learned` calls the statistics of its rows (`PairCodec.measure`)."""


class Waiting(NamedTuple):
    """A chunk of the first of two layers, of some of its rows: keys and values `[rows, tokens, head_dim]`."""

    rows: np.ndarray
    chunk: Pair


def couple(stores: Mapping[int, Layer], change: Transaction | None = None) -> None:
    """Put layers that share pages into one bank, once both have as many sequences. Raises `UnsupportedModelError` where
    their keys have different shapes."""
    for first in stores.values():
        codec = first.codec
        if not isinstance(codec, PairCodec) or first.spec.layer != codec.layers[0]:
            continue
        second = stores[codec.layers[1]]
        if first.bank is second.bank or first.batch != second.batch:
            continue
        if first.format != second.format:
            raise UnsupportedModelError(
                f"layers {codec.layers[0]} and {codec.layers[1]} cannot share pages: their keys differ in shape or "
                "device; leave this pair out of the recipe."
            )
        type(first.bank).united([first, second], change)


def take_in(
    layer: Layer, group: RowGroup, keys: torch.Tensor | None, values: torch.Tensor | None, advance: bool, revocable: int
) -> None:
    """`LayerCache.take_in` of one of two layers. A chunk of the first one waits for that of the second."""
    bank, last = layer.bank, layer.index % 2 == 1
    if keys is not None and values is not None and advance:
        if last:
            _take_both(layer, group, (keys, values), revocable)
        else:
            _wait(layer, Waiting(group.rows, (keys, values)))
        return
    if keys is not None:
        layer.take_in(group, keys, values, False, revocable)
    if advance and last:
        bank.advance(np.concatenate([group.flat - bank.rows, group.flat]), revocable)
        group.bounds = bank.standing.one(int(group.flat[0]))
        group.touched_exact()
        group.touched_packed()


def _wait(layer: Layer, one: Waiting) -> None:
    assert layer.bank.change is not None
    layer.bank.change.undo(layer.waiting.clear)
    layer.waiting.append(one)


def _take_both(layer: Layer, group: RowGroup, chunk: Pair, revocable: int) -> None:
    """A chunk of the second layer has come: store it, and that of the first one."""
    bank, old = layer.bank, group.bounds
    first: Layer = bank.layers[layer.index - 1]
    number = next((i for i, one in enumerate(first.waiting) if np.array_equal(one.rows, group.rows)), None)
    if number is None:
        raise CacheStateError(
            f"layer {layer.spec.layer} was given tokens that layer {first.spec.layer}, which shares its pages, lacks: "
            "run all layers of the model in each forward."
        )
    one = Part(RowGroup(first, group.rows, old), *first.waiting.pop(number).chunk)
    new = old.appended(chunk[0].shape[1]).advanced(layer.packing, revocable)
    take(bank, [one, Part(group, *chunk)], new)
    first.regroup()


def pack_pairs(bank: Tables, rows: np.ndarray, old: Bounds, new: Bounds, parts: Sequence[Part] = ()) -> None:
    """`pack` for rows of both layers of pairs. parts: of a chunk that has just come to one pair, the tokens of both
    layers; without, all lie in exact pages. Raises `CacheStateError` where the rows of a pair do not hold the same
    tokens."""
    tier, packing, change = bank.packed, bank.packing, bank.change
    assert tier is not None and packing is not None and change is not None
    if all(np.array_equal(a, b) for a, b in zip(old, new)):
        return  # tokens have come for one of the layers
    one, two = _sides(bank, rows, old)
    first, second, old, new = rows[one], rows[two], old.at(one), new.at(one)
    way = Way.between(old, new, packing)
    for wanted in np.unique(way.fresh[way.fresh > 0]).tolist():
        some = way.fresh == wanted
        _widen(tier, change, first[some], second[some], way.columns[some], wanted)
    layers = first // bank.rows
    encoders = np.array([layer.encoder for layer in bank.layers])[layers]
    kinds = np.stack([encoders, way.slot, way.count, np.clip(old.length - way.start, 0, way.count)])
    for kind in np.unique(kinds[:, way.count > 0], axis=1).T:
        alike = (kinds == kind[:, None]).all(0)
        _, slot, count, stored = kind.tolist()
        # Of both layers, keys and values at a time.
        step, pairs = layers_at_once(bank, 4 * count * bank.rows), np.unique(layers[alike])
        for start in range(0, len(pairs), step):
            some = alike & np.isin(layers, pairs[start : start + step])
            sides = [
                Due(side[some], old.at(some), way.start[some], way.column[some], slot, count, stored)
                for side in (first, second)
            ]
            _encode(bank, sides, [part.pair for part in parts] or (None, None))
    columns = way.columns + np.maximum(0, way.fresh)
    tier.drop(change, np.concatenate([first, second]), 0, *(np.concatenate([x, x]) for x in (way.gone, columns)))


def _sides(bank: Tables, rows: np.ndarray, old: Bounds) -> tuple[np.ndarray, np.ndarray]:
    """Which of these rows are those of first layers, and which those of the second ones, in the same order."""
    order = np.argsort(rows, kind="stable")
    odd = rows[order] // bank.rows % 2 == 1
    one, two = order[~odd], order[odd]
    alike = len(one) == len(two) and np.array_equal(rows[one] + bank.rows, rows[two])
    if not alike or any((x[one] != x[two]).any() for x in old):
        raise CacheStateError("layers can share packed pages only where they hold the same tokens.")
    return one, two


def _widen(tier: Tier, change: Transaction, first: np.ndarray, second: np.ndarray, at: np.ndarray, count: int) -> None:
    """`Tier.widen` for both sides of pairs."""
    tier.widen(change, first, at, count)
    columns, (pool, own) = at[:, None] + np.arange(count), tier.pools
    pages = tier.table[first[:, None], columns]
    pool.retain(pages)
    change.undo(partial(pool.release, pages))
    tier.table[second[:, None], columns] = pages
    tier.tables[1][second[:, None], columns] = change.allocate(own, columns.size).reshape(columns.shape)
    tier.change(second[:, None], columns)


def _unshare(tier: Tier, change: Transaction, first: np.ndarray, second: np.ndarray, columns: np.ndarray) -> None:
    """`Tier.unshare` for both sides of pairs."""
    for number, sides in ((0, (first, second)), (1, (first,)), (1, (second,))):
        tier.copy_shared(change, number, sides, columns)


def _pieces(slot: int, count: int, page: int, step: int) -> Iterator[tuple[int, int, int, int]]:
    """(tokens before it, tokens, column, slot) of pieces that are whole pages, `step` tokens at most, or one page."""
    done = 0
    while done < count:
        column, at = divmod(slot + done, page)
        left = count - done
        size = min(left, page - at) if at or left < page else min(left // page * page, step)
        yield done, size, column, at
        done += size


def _encode(bank: Tables, sides: Sequence[Due], chunks: Sequence[Pair | None]) -> None:
    """Measure all that is due of both layers of some pairs, then pack it, a bounded part of the tokens at a time."""
    tier, change, first = bank.packed, bank.change, sides[0]
    indices, which = np.unique(first.rows // bank.rows, return_inverse=True)
    layers = [bank.layers[index] for index in indices.tolist()]
    codec = layers[0].codec
    assert tier is not None and change is not None and bank.packing is not None and isinstance(codec, PairCodec)
    page = bank.packing.page
    for layer in layers:
        if KNOWN not in layer.learned:
            layer.learned[KNOWN] = torch.zeros((bank.rows, codec.known), device=bank.device)
    if bank.device.type == "meta":
        return
    pieces = list(_pieces(first.slot, first.count, page, at_once(bank, 4 * len(first.rows))))
    if first.slot:
        _unshare(tier, change, first.rows, sides[1].rows, first.column)
    known = torch.cat([layer.learned[KNOWN] for layer in layers])
    local = sent(bank.device, which * bank.rows + first.rows % bank.rows)[0]
    mine = known[local]
    both: list[Pair] = []
    for done, size, _, _ in pieces:
        both = [collect(bank, due, done, size, chunk) for due, chunk in zip(sides, chunks)]
        mine = torch.maximum(mine, codec.measure(both[0], both[1]))
        for due, pair in zip(sides, both):
            note(bank, due.rows, *pair)
    for layer, part in zip(layers, known.index_copy_(0, local, mine).split(bank.rows)):
        layer.learned[KNOWN] = part.clone()
    for done, size, column, slot in pieces:
        if len(pieces) > 1:
            both = [collect(bank, due, done, size, chunk) for due, chunk in zip(sides, chunks)]
        _write(tier, change, codec, sides, column, slot, page, both, mine)


def _write(
    tier: Tier,
    change: Transaction,
    codec: PairCodec,
    sides: Sequence[Due],
    column: int,
    slot: int,
    page: int,
    both: Sequence[Pair],
    known: torch.Tensor,
) -> None:
    """Encode tokens `[rows, tokens, head_dim]` of both layers into whole pages, or into one from `slot` on."""
    _, tokens, dim = both[0][0].shape
    count, at, opened = -(-(slot + tokens) // page), sides[0].column + column, None
    if slot:
        opened = [tier.open(change, due.rows, at) for due in sides]
    one, two = (
        (keys.reshape(-1, tokens // count, dim), values.reshape(-1, tokens // count, dim)) for keys, values in both
    )
    made = codec.encode_pair(one, two, slot, opened, known.repeat_interleave(count, 0))
    for due, fields in zip(sides, (whole(codec, made[0]), whole(codec, made[1], own=True))):
        tier.write(due.rows[:, None], at[:, None] + np.arange(count), fields)
