"""What a cache must hold, as plain arrays, and the comparison of a session with it.

For every layer, sequence and KV head: the keys and values that the store must give back for each position, and which of
them are packed. The model knows what a head must hold (`Extent`), how far pages may make it hold more, and how far a
packed number may lie from what was put in; it knows nothing of groups, references or slabs. Whatever moves in a store
moves by whole pages, so the model keeps positions in blocks of 32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch

from fivefold.engine.session import Session
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store.bank import Bank
from fivefold.store.pages import SLAB_SHIFT, PagePool
from fivefold.store.rows import ALL, FIXED, PAGE, Bounds, Extent
from fivefold.store.spec import Pools

LAYERS = 2
DIM = 4
MOST_TOKENS = 640
BLOCKS = MOST_TOKENS // PAGE
SLOTS = np.arange(PAGE)
# On which axis the sequences of an array of `Plain` stand.
AXES = {"keys": 1, "values": 1, "packed": 1, "lengths": 1, "floors": 1, "revocables": 0, "marks": 0}


class Plain:
    """keys, values: float32 `[layers, batch, heads, BLOCKS, PAGE, DIM]`, which are what they became where they are
    packed, bool `[layers, batch, heads, BLOCKS]`. lengths, floors: int64 `[layers, batch]`; a crop can always go back
    to a floor, as the revocable promised. revocables, marks: int64 `[batch]`, what could be taken back when the policy
    last moved a sequence's tokens, and a number that goes wherever it goes. length, ragged: as the session's.
    """

    def __init__(self, heads: int, batch: int = 0) -> None:
        self.keys, self.values = (np.zeros((LAYERS, batch, heads, BLOCKS, PAGE, DIM), np.float32) for _ in range(2))
        self.packed = np.zeros((LAYERS, batch, heads, BLOCKS), bool)
        self.lengths, self.floors = (np.zeros((LAYERS, batch), np.int64) for _ in range(2))
        self.revocables, self.marks = (np.zeros(batch, np.int64) for _ in range(2))
        self.length, self.ragged = 0, False

    @property
    def batch(self) -> int:
        return len(self.marks)

    @property
    def heads(self) -> int:
        return self.packed.shape[2]

    @property
    def longest(self) -> int:
        """Of the first layer, as a session counts."""
        return int(self.lengths[0].max(initial=0))

    def selected(self, order: Sequence[int]) -> Plain:
        out = copy.copy(self)
        for name, axis in AXES.items():
            setattr(out, name, np.take(getattr(self, name), np.array(order, dtype=np.int64), axis))
        return out

    def joined(self, other: Plain) -> Plain:
        out = copy.copy(self)
        for name, axis in AXES.items():
            setattr(out, name, np.concatenate([getattr(self, name), getattr(other, name)], axis))
        out.length, out.ragged = max(self.length, other.length), True
        return out

    def append(self, counts: np.ndarray, new: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """The last `counts [batch]` tokens of what each layer was given: `[batch * heads, tokens, DIM]` each."""
        shape = *self.keys.shape[:3], -1, DIM
        for layer, given in enumerate(new):
            for whole, x in zip((self.keys, self.values), given):
                fresh = x.float().numpy().reshape(self.batch, self.heads, -1, DIM)
                for sequence, count in enumerate(counts.tolist()):
                    first = self.lengths[layer, sequence]
                    target = whole.reshape(shape)[layer, sequence, :, first : first + count]
                    target[:] = fresh[sequence, :, fresh.shape[2] - count :]
        self.lengths = self.lengths + counts
        self.length = max(self.length, self.longest)

    def advance(self, which: np.ndarray, revocable: int) -> None:
        """The policies have moved what is due of sequences `which`, bool `[batch]`."""
        self.revocables = np.where(which, revocable, self.revocables)
        self.floors = np.where(which, np.maximum(self.floors, self.lengths - revocable), self.floors)

    def crop(self, layer: int, count: int) -> None:
        self.lengths[layer] = np.maximum(0, self.lengths[layer] - count)
        self.floors[layer] = np.minimum(self.floors[layer], self.lengths[layer])
        self.packed[layer] &= np.arange(BLOCKS) * PAGE < self.lengths[layer][:, None, None]


# -- what must be there -----------------------------------------------------------------------------------


@cache
def fixed(layers: tuple[tuple[Extent, ...], ...], batch: int) -> np.ndarray:
    """The part of `Bounds` that never changes, of layers whose heads have these extents: int64 `[FIXED, rows]`."""
    each = [
        (
            e.sink,
            ALL if e.recent is None else e.recent,
            e.late_sink,
            e.late_recent,
            e.pinned * PAGE,
            -1 if e.share is None else round(1e6 * e.share),
            int(e.compensate),
        )
        for extents in layers
        for _ in range(batch)
        for e in extents
    ]
    return np.array(each, dtype=np.int64).T


def tiers(bounds: Bounds) -> np.ndarray:
    """Where every block is: `[rows, BLOCKS]` of 0 nowhere, 1 exact, 2 packed. No block may be in two places."""
    pinned, base, first, stop = (
        x[:, None] // PAGE for x in (bounds.pinned, bounds.exact_base, bounds.packed_base, bounds.packed_stop)
    )
    block = np.arange(BLOCKS)
    seen = block * PAGE < bounds.length[:, None]
    parts = seen & (block < pinned), seen & (block >= base), (block >= first) & (block < stop)
    assert (parts[0] + parts[1].astype(np.int8) + parts[2]).max(initial=0) <= 1
    assert not (parts[2] & ~seen).any()
    return (parts[0] | parts[1]) + 2 * parts[2].astype(np.int8)


def shows(bounds: Bounds, where: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether the query at position `length [rows]` finds all that it sees, with tiers as `where`: bool `[rows]`."""
    sink, recent, late_sink, late_recent, end = (
        x[:, None] for x in (bounds.sink, windows(bounds, length + 1), bounds.late_sink, bounds.late_recent, length)
    )
    first = np.arange(BLOCKS) * PAGE
    # What has left a window of the text can be seen again only where pages are pinned.
    where = np.where((first >= bounds.pinned[:, None]) & (first < bounds.left[:, None]), 0, where)
    last = np.minimum(first + PAGE, end) - 1  # of what a block holds; before `first` where that is nothing
    late = np.maximum(first, end - late_recent + 1) <= np.minimum(last, late_sink - 1)
    seen = (last >= first) & ((first < sink) | (last > end - recent) | late)
    return ~(seen & (where == 0)).any(1)


def windows(bounds: Bounds, tokens: np.ndarray) -> np.ndarray:
    """How long the windows are where a text has so many tokens: int64 `[rows]`."""
    return np.maximum(bounds.recent, np.floor(tokens * bounds.share / 1e6 + 1e-9).astype(np.int64))


def ceil(tokens: np.ndarray, page: int) -> np.ndarray:
    return -(-tokens // page)


# -- comparison -------------------------------------------------------------------------------------------


def compare(session: Session, plain: Plain, residual: int, cropped: bool = False) -> None:
    """A session must hold what the model does. The model learns what tokens became that were packed just now.

    cropped: a crop was the last thing that happened.
    """
    assert session.length == plain.length
    assert np.array_equal(session.lengths(), plain.lengths[0])
    stored = plain
    if session.state is not None:
        assert plain.batch and not session.recording
        assert session.state.facts["ragged"] == plain.ragged
        stored = Plain(plain.heads)  # nothing is in pages
    else:
        assert session.ragged == plain.ragged
    assert session.batch == stored.batch
    for bank in session.banks:
        assert bank.batch == stored.batch and bank.change is None
        if not stored.batch:
            assert not bank.standing.rows and not bank.offset.size
            continue
        Comparison(bank, stored, residual).run(cropped)


class Comparison:
    """Of a bank with its part of a model; everything `[rows of the bank, ...]`."""

    def __init__(self, bank: Bank, plain: Plain, residual: int) -> None:
        self.bank, self.residual = bank, residual
        first = bank.layers[0].spec.layer
        self.layers = slice(first, first + len(bank.layers))
        self.rows = len(bank.layers) * plain.batch * plain.heads
        self.plain, self.bounds = plain, bank.bounds
        # Views, so that the model can learn.
        self.keys, self.values, self.packed = (
            x[self.layers].reshape(self.rows, *x.shape[3:]) for x in (plain.keys, plain.values, plain.packed)
        )
        self.length, self.floor = (np.repeat(x[self.layers], plain.heads) for x in (plain.lengths, plain.floors))
        self.revocable, self.marks = (
            np.tile(np.repeat(x, plain.heads), len(bank.layers)) for x in (plain.revocables, plain.marks)
        )

    def run(self, cropped: bool) -> None:
        self.check_rows()
        self.check_groups()
        self.where = tiers(self.bounds)
        assert shows(self.bounds, self.where, self.length).all(), "a token is gone that the next one sees"
        if (self.floor < self.length).any():
            assert shows(self.bounds, self.where, self.floor).all(), "a crop can not go back as far as it was promised"
        self.check_bounds()
        self.check_exact(cropped)
        if self.bank.packed is not None:
            self.check_packed()

    def check_rows(self) -> None:
        bank, marks = self.bank, self.marks
        extents = tuple(layer.extents for layer in bank.layers)
        assert np.array_equal(np.stack(bank.bounds[:FIXED]), fixed(extents, self.plain.batch))
        assert np.array_equal(self.bounds.length, self.length) and not self.bounds.evicted.any()
        assert not (np.stack(bank.bounds[FIXED + 1 :]) % PAGE).any()
        assert np.array_equal(bank.offset, marks) and not bank.chosen.any()
        assert bank.residual.shape == marks.shape and (bank.residual == self.residual).all()
        for layer, part in zip(bank.layers, marks.reshape(len(bank.layers), -1)):
            assert np.array_equal(layer.learned["mark"].numpy(), part)

    def check_groups(self) -> None:
        for layer in self.bank.layers:
            groups = layer.groups
            assert sorted(np.concatenate([group.rows for group in groups]).tolist()) == list(range(layer.rows))
            for group in groups:
                assert (np.stack(self.bank.at(group.flat)) == np.array(group.bounds)[:, None]).all()

    def check_bounds(self) -> None:
        """What the next query sees is held, and little more than that."""
        bounds, packing, length = self.bounds, self.bank.packing, self.length
        pinned, base, stop, exact = bounds.pinned, bounds.packed_base, bounds.packed_stop, bounds.exact_base
        tokens = length + 1 - self.revocable
        oldest = np.maximum(pinned, tokens - windows(bounds, tokens))
        lags = bounds.share >= 0
        left = np.maximum(pinned, bounds.left)  # nothing has left while that is nothing behind what is pinned
        assert (~lags | (left + PAGE > tokens - windows(bounds, tokens))).all() and not bounds.left[~lags].any()
        oldest = np.where(lags, left, oldest)  # a crop lets less have left
        full = stop > base
        assert (full | (exact == pinned) | (exact + PAGE > oldest)).all()
        self.packed_pages = np.zeros(self.rows, np.int64)
        if packing is None:
            assert not full.any()
        else:
            assert (~full | ((stop == exact) & (pinned <= base) & ((stop - base) % packing.group == 0))).all()
            assert (~full | ((base + packing.page > oldest) & (stop > oldest))).all()
            waiting = length - np.maximum(exact, oldest // PAGE * PAGE)
            assert (waiting - self.residual - self.revocable < packing.group).all()
            self.packed_pages = ceil(np.where(full, stop - base, 0), packing.page)
        self.pinned_pages = ceil(np.minimum(length, pinned), PAGE)
        self.exact_pages = self.pinned_pages + ceil(np.maximum(0, length - exact), PAGE)
        assert np.array_equal(bounds.exact_pages, self.exact_pages)
        assert np.array_equal(bounds.packed_pages(packing), self.packed_pages)

    def check_exact(self, cropped: bool) -> None:
        """The exact tier gives back what was put in; what a crop brought back, as it was packed."""
        tier, pool = self.bank.exact, self.bank.exact.pool
        row, column = np.nonzero(np.arange(tier.capacity) < self.exact_pages[:, None])
        pinned = self.pinned_pages[row]
        block = np.where(column < pinned, column, self.bounds.exact_base[row] // PAGE + column - pinned)
        assert len(row) == self.exact_pages.sum() == (self.where == 1).sum() and (self.where[row, block] == 1).all()
        if not len(row):
            return
        returned = (self.where == 1) & self.packed
        if returned.any():
            assert cropped
            dtype = pool.layout.fields[0].dtype
            for x in (self.keys, self.values):
                x[returned] = torch.from_numpy(x[returned]).to(dtype).float().numpy()
            self.packed[returned] = False
        filled = (block * PAGE)[:, None] + SLOTS < self.length[row][:, None]
        stored = read(pool, tier.table[row, column])
        for name, wanted in (("keys", self.keys), ("values", self.values)):
            same = (stored[name] == wanted[row, block]).all(-1)
            assert (same | ~filled).all(), f"exact {name} differ"

    def check_packed(self) -> None:
        """Packed tokens stay what they became; those that were packed just now lie within half a step."""
        bank, packing = self.bank, self.bank.packing
        assert bank.packed is not None and packing is not None
        tier, codec = bank.packed, bank.layers[0].codec
        base, stop, inside = self.bounds.packed_base, self.bounds.packed_stop, self.where == 2
        row, column = np.nonzero(np.arange(tier.capacity) < self.packed_pages[:, None])
        assert len(row) == self.packed_pages.sum()
        if not len(row):
            return
        fields: dict[str, np.ndarray] = {}
        for pool, table in zip(tier.pools, tier.tables):
            fields |= read(pool, table[row, column])
        block = (base[row] // PAGE + column * codec.planes)[:, None] + np.arange(codec.planes)
        there = block < (stop[row] // PAGE)[:, None]
        row, block = np.broadcast_to(row[:, None], block.shape)[there], block[there]
        assert len(row) == inside.sum() and inside[row, block].all()
        found = [x[there] for x in decode(codec, fields)]
        fresh = inside & ~self.packed
        start = base + PAGE * (inside & self.packed).sum(1)
        assert np.array_equal(fresh, inside & (np.arange(BLOCKS) * PAGE >= start[:, None]))
        assert not ((start - base) % packing.group)[stop > base].any()
        new = fresh[row, block]
        for x, wanted in zip(found, (self.keys, self.values)):
            assert np.array_equal(x[~new], wanted[row[~new], block[~new]]), "packed tokens changed"
        if new.any():
            early = stop > self.length - self.residual - self.revocable
            assert not (early & fresh.any(1)).any(), "tokens were packed too early"
            row, block = row[new], block[new]
            check_steps(codec, self.keys[row, block], self.values[row, block], found[0][new], found[1][new])
            for x, wanted in zip(found, (self.keys, self.values)):
                wanted[row, block] = x[new]
            self.packed[row, block] = True


def check_steps(codec: KiviCodec, keys: np.ndarray, values: np.ndarray, *found: np.ndarray) -> None:
    for x, y, shape, axis in (
        (keys, found[0], (-1, codec.group, DIM), 1),
        (values, found[1], (-1, DIM // codec.channels, codec.channels), 2),
    ):
        group = x.reshape(shape)
        low, high = group.min(axis, keepdims=True), group.max(axis, keepdims=True)
        bound = quantisation_bound(low, high, codec.bits)
        assert (np.abs(group - y.reshape(shape)) <= bound).all(), "packed tokens are further off than half a step"


def numpy_of(x: torch.Tensor) -> np.ndarray:
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def read(pool: PagePool, pages: np.ndarray) -> dict[str, np.ndarray]:
    """Every field of pages, float32 or int16 `[pages, *shape]`, read one slab at a time."""
    numbers, index, out = pages >> SLAB_SHIFT, pages & ((1 << SLAB_SHIFT) - 1), {}
    places = [(slab, numbers == number) for number, slab in enumerate(pool._slabs) if slab is not None]
    places = [(slab, here) for slab, here in places if here.any()]
    for field in pool.layout.fields:
        whole = numpy_of(places[0][0].tensors[field.name])
        if len(places) == 1:
            whole = whole[index]
        else:
            whole = np.empty((len(pages), *field.shape), whole.dtype)
            for slab, here in places:
                whole[here] = numpy_of(slab.tensors[field.name])[index[here]]
        if field.dtype == torch.bfloat16:
            whole = (whole.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        out[field.name] = whole.astype(np.float32) if whole.dtype == np.float16 else whole
    return out


def decode(codec: KiviCodec, fields: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of planar pages `[pages, *shape]`, written down anew: `[pages, planes, PAGE, DIM]`."""
    planes = np.arange(codec.planes)[:, None, None]

    def codes(words: np.ndarray) -> np.ndarray:
        shifted = words.view(np.uint16)[:, None] >> (codec.bits * planes).astype(np.uint16)
        return (shifted & (2**codec.bits - 1)).astype(np.float32)

    share = codec.planes * 32 // codec.group
    scale, zero = (
        np.repeat(fields[name], codec.planes // share, axis=1)[:, :, None] for name in ("key_scale", "key_zero")
    )
    keys = codes(fields["key_words"]) * scale + zero
    scale, zero = (
        np.repeat(np.swapaxes(fields[name], -1, -2), codec.channels, axis=-1) for name in ("value_scale", "value_zero")
    )
    return keys, codes(fields["value_words"]) * scale + zero


def quantisation_bound(low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """How far a number of a group may lie from its packed form: half a step, or as far as the float16 zero
    point and scale fall short of the group's ends."""
    steps = 2**bits - 1
    zero = low.astype(np.float16).astype(np.float32)
    scale = np.maximum(0, (high - zero) / steps).astype(np.float16).astype(np.float32)
    short = np.maximum(np.abs(zero - low), np.abs(high - zero - steps * scale))
    return np.maximum(scale / 2, short) + 1e-6 * np.maximum(np.abs(low), np.abs(high))


# -- pages ------------------------------------------------------------------------------------------------


def check_accounts(sessions: Sequence[Session]) -> None:
    """Every page is held as often as tables name it; the pools and the budgets agree on what there is."""
    named: dict[PagePool, list[np.ndarray]] = {}
    for session in sessions:
        for bank in session.banks:
            for tier, columns in bank.columns():
                for number, pool in enumerate(tier.pools):
                    named.setdefault(pool, []).append(tier.held(columns, number))
    for pools in dict.fromkeys(session.pools for session in sessions):
        for pool in pools:
            check_pool(pool, named.pop(pool, []))
        budget = pools.budget
        assert budget.used == sum(pool.allocated_bytes for pool in pools)
        charged = sum(budget.charged.values())
        assert budget.limit is None or budget.used + charged <= budget.limit
        assert set(budget.charged) <= {id(session) for session in sessions if session.pools is pools and session.batch}
    assert not named, "a table names pages of pools that are not its cache's"


def check_pool(pool: PagePool, named: list[np.ndarray]) -> None:
    ids = np.concatenate(named) if named else np.empty(0, np.int64)
    counts = [np.empty(0, np.int32) if slab is None else slab.references for slab in pool._slabs]
    sizes = np.array([len(x) for x in counts], dtype=np.int64)
    references = np.concatenate([np.empty(0, np.int32), *counts])
    slab_of, index = ids >> SLAB_SHIFT, ids & ((1 << SLAB_SHIFT) - 1)
    assert (ids >= 0).all() and (index < sizes[slab_of]).all(), "a table names a page of a slab that was given back"
    count = np.bincount((np.cumsum(sizes) - sizes)[slab_of] + index, minlength=len(references))
    assert np.array_equal(count, references), "a page is held more or less often than tables name it"
    assert (pool.free_pages, pool.total_pages) == (int((count == 0).sum()), len(references))
    for number, (slab, mine) in enumerate(zip(pool._slabs, counts)):
        assert pool._free[number] == (mine == 0).sum()
        if slab is not None:
            assert sum(t.nbytes for t in slab.tensors.values()) == len(mine) * pool.layout.nbytes


def poison(pools: Iterable[Pools]) -> None:
    """Nobody may rely on what stands in a free page."""
    for pool in (pool for one in pools for pool in one):
        for slab in pool._slabs:
            if slab is None:
                continue
            free = slab.references == 0
            if free.any():
                for tensor in slab.tensors.values():
                    x = numpy_of(tensor)
                    x[free] = np.nan if x.dtype.kind == "f" else 0x7FC5 if tensor.dtype == torch.bfloat16 else 0x5A5A
