"""The store beside a plain model of it, and the operations that drive both.

The model is, for every layer, sequence and KV head, the keys and values that the store must give back for
each position, and which of them are packed. It knows what a head must hold (`Extent`), how far pages may make
it hold more, and how far a packed number may lie from what was put in; it knows nothing of groups,
references or slabs.

`test_store.py` lets hypothesis choose the operations, `benchmarks/store_stress.py` draws them at random.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from faults import Fault, Faults
from fivefold.errors import CacheFullError, CacheStateError, NonFiniteError
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store import compact
from fivefold.store.bank import Bank
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.pages import SLAB_SHIFT, PagePool
from fivefold.store.rows import PAGE, Bounds, Extent
from fivefold.store.spec import LayerSpec, Pools
from fivefold.store.transaction import Transaction

T = TypeVar("T")
LAYERS = 2
DIM = 4
MOST_TOKENS = 640
MOST_SEQUENCES = 4
MOST_CACHES = 4
REVOCABLE = 24

EXTENTS = (
    Extent(), Extent(0, 2), Extent(0, 20), Extent(4, 33), Extent(4, 100), Extent(33, 64), Extent(40, 7),
    Extent(3, 300), Extent(40, 30).intersect(Extent(2, 110)),
)  # fmt: skip
GROUPS = ((2, 32), (2, 64), (2, 128), (3, 32), (4, 32), (4, 64), (4, 128), (8, 32), (8, 64))

WEIGHTS = {
    "decode": 8, "chunk": 6, "fork": 2, "select": 3, "crop": 4, "free": 1, "trim": 1, "cap": 1, "share": 2,
    "record": 1, "overflow": 1, "compact": 2,
}  # fmt: skip
# The operations and the range of each of their arguments. One more is where they fail (see `System.operate`).
FAULTS = (-40, 40)
OPERATIONS: dict[str, tuple[tuple[int, int], ...]] = {
    "decode": ((0, 3), (0, 15), (1, 4), (0, 3), FAULTS),
    "chunk": ((0, 3), (0, 300), (0, 90), (0, 3), FAULTS),
    "fork": ((0, 3), FAULTS),
    "select": ((0, 3), (1, MOST_SEQUENCES), (0, 255), FAULTS),
    "crop": ((0, 3), (0, LAYERS), (1, 400), FAULTS),
    "free": ((0, 3), FAULTS),
    "trim": (FAULTS,),
    "cap": ((-8, 30), FAULTS),
    "share": ((0, 3), (0, 1), FAULTS),
    "record": ((0, 3), FAULTS),
    "overflow": ((0, 3), (0, 7), (1, 300), FAULTS),
    "compact": ((0, 3), FAULTS),
}


@dataclass(frozen=True)
class Setup:
    """How the caches of a system are made. `group` 0 is no codec; `own`: layers may share the keys they
    packed; `united`: they have common tables once they hold something.
    """

    seed: int
    extents: tuple[tuple[Extent, ...], ...]
    bits: int
    group: int
    residual: int
    own: bool
    dtype: torch.dtype
    united: bool

    @staticmethod
    def draw(rng: random.Random) -> Setup:
        heads = [rng.choice(EXTENTS) for _ in range(rng.randint(1, 2))]
        second = heads if rng.random() < 0.6 else [rng.choice(EXTENTS) for _ in heads]
        bits, group = rng.choice((*GROUPS, (2, 0)))
        return Setup(
            seed=rng.getrandbits(32),
            extents=(tuple(heads), tuple(second)),
            bits=bits,
            group=group,
            residual=rng.choice((0, 1, 32, 50, 128)),
            own=rng.random() < 0.5,
            dtype=torch.float32 if rng.random() < 0.7 else torch.bfloat16,
            united=rng.random() < 0.6,
        )


class SharedKeys(KiviCodec):
    """KIVI whose pages share the keys and keep the values for themselves."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__(bits, group, min(group, DIM), DIM)
        fields = (dataclasses.replace(f, own=f.name.startswith("value")) for f in self.layout.fields)
        self.layout = dataclasses.replace(self.layout, fields=tuple(fields))


class Tokens(NamedTuple):
    """What one head of one sequence has seen: keys, values float32 [length, DIM]; packed bool [length].

    Where `packed`, keys and values are what they became when they were packed. Never modified in place.
    """

    keys: np.ndarray
    values: np.ndarray
    packed: np.ndarray


NOTHING = Tokens(np.zeros((0, DIM), np.float32), np.zeros((0, DIM), np.float32), np.zeros(0, bool))


class Twin:
    """A cache (one `LayerCache` per layer) and its model: per layer, `tokens[sequence, head]`."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.tokens: list[dict[tuple[int, int], Tokens]] = [{} for _ in layers]
        self.revocables: list[int] = []  # of each sequence, when the policy last moved its tokens
        # Per layer and sequence: the length that a crop can always go back to, as the revocable promised.
        self.floors: list[list[int]] = [[] for _ in layers]
        self.recording = False

    @property
    def batch(self) -> int:
        return len(self.revocables)

    @property
    def banks(self) -> list[Bank]:
        return list(dict.fromkeys(layer.bank for layer in self.layers))

    def tiers(self) -> list[tuple[int, int]]:
        return [(c.bounds.exact_base, c.bounds.packed_base) for layer in self.layers for c in layer.groups]


class System:
    """Caches that share their pools, with their models. Every operation takes plain numbers and bends them to
    what is possible; `check` compares everything."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.random = np.random.default_rng(setup.seed)
        self.pools = Pools()
        self.count = 0
        layers = []
        for index, extents in enumerate(setup.extents):
            spec = LayerSpec(index, LAYERS, len(extents), len(extents), DIM, setup.dtype, torch.device("cpu"))
            codec = None
            if setup.group:
                codec = (
                    SharedKeys(setup.bits, setup.group)
                    if setup.own
                    else KiviCodec(setup.bits, setup.group, min(setup.group, DIM), DIM)
                )
            layers.append(LayerCache(spec, self.pools, extents, codec, setup.residual))
        self.heads = len(setup.extents[0])
        self.caches = [Twin(layers)]
        self.touched: list[Twin] = []  # by the operation that was the last
        self.fault = 0

    def operate(self, name: str, arguments: Sequence[int]) -> None:
        """An operation, each of whose changes fails first, if the last argument is positive: at that call of a pool or
        a codec, or at its end if there are fewer. Nothing may then be left of it, and it is done again."""
        *arguments, self.fault = arguments
        getattr(self, name)(*arguments)

    # -- operations ---------------------------------------------------------------------------------------

    def decode(self, which: int, mask: int, steps: int, tight: int) -> None:
        """Some steps of one token; sequences whose bit is set in `mask` are padding and get none."""
        cache = self._pick(which)
        for _ in range(steps):
            if cache not in self.caches:
                break  # it grew too long and was freed
            counts = [1 - (mask >> i & 1) for i in range(self._begin(cache))]
            self._take(cache, counts, tight)

    def chunk(self, which: int, tokens: int, fewer: int, tight: int) -> None:
        """A chunk; each sequence gets `fewer` tokens less than the one before it."""
        cache = self._pick(which)
        self._take(cache, [max(0, tokens - fewer * i) for i in range(self._begin(cache))], tight)

    def fork(self, which: int) -> None:
        cache = self._pick(which)
        if len(self.caches) == MOST_CACHES:
            return self.free(which)
        twin = Twin(self._do(cache, lambda: self._fork(cache)))
        twin.tokens = [dict(tokens) for tokens in cache.tokens]
        twin.revocables = list(cache.revocables)
        twin.floors = [list(floors) for floors in cache.floors]
        twin.recording = cache.recording
        self.caches.append(twin)

    def select(self, which: int, count: int, code: int) -> None:
        cache = self._pick(which)
        if not cache.batch:
            return
        order = [(code >> 2 * i) % cache.batch for i in range(count)]

        def select() -> None:
            for bank in cache.banks:
                bank.select(np.array(order, dtype=np.int64))

        self._do(cache, select)
        for tokens in cache.tokens:
            old = dict(tokens)
            tokens.clear()
            tokens.update({(i, h): old[j, h] for i, j in enumerate(order) for h in range(self.heads)})
        cache.revocables = [cache.revocables[j] for j in order]
        cache.floors = [[floors[j] for j in order] for floors in cache.floors]

    def crop(self, which: int, only: int, count: int) -> None:
        """Take tokens back, in one layer only or (`only == LAYERS`) in all."""
        cache = self._pick(which)
        for index in range(LAYERS) if only == LAYERS else [only]:
            layer, tokens = cache.layers[index], cache.tokens[index]
            legal = all(self._can_crop(group.bounds, count) for group in layer.groups)
            try:
                self._do(cache, lambda layer=layer: layer.crop(count), single=True)  # type: ignore[misc]
            except CacheStateError:
                assert not legal, "a crop was refused that loses nothing"
                self._unchanged()
                continue
            except CacheFullError:
                assert self.pools.budget.limit is not None
                self._unchanged()
                continue
            assert legal, "a crop went through that shows tokens which are gone"
            for key, (keys, values, packed) in tokens.items():
                rest = max(0, len(keys) - count)
                tokens[key] = Tokens(keys[:rest], values[:rest], packed[:rest])
                cache.floors[index][key[0]] = min(cache.floors[index][key[0]], rest)
            self._check_cache(cache, cropped=True)
        if cache.recording and cache.batch:
            self._take(cache, [0] * cache.batch, 0, settle=True)

    def free(self, which: int) -> None:
        cache = self._pick(which)

        def free() -> None:
            for bank in cache.banks:
                bank.free()

        self._do(cache, free)
        for bank in cache.banks:
            for layer in bank.layers:
                Bank([layer])  # as a session does: what comes next may be of another kind
        for tokens in cache.tokens:
            tokens.clear()
        cache.revocables = []
        cache.floors = [[] for _ in cache.layers]
        if len(self.caches) > 1:
            self.caches.remove(cache)

    def trim(self) -> None:
        self.pools.budget.trim()

    def cap(self, pages: int) -> None:
        """Allow so many pages more than are there, or (negative) any number."""
        budget = self.pools.budget
        budget.limit = None if pages < 0 else budget.used + pages * max(p.layout.nbytes for p in self.pools)

    def share(self, which: int, source: int) -> None:
        cache = self._pick(which)
        mine, theirs = cache.layers[1 - source], cache.layers[source]
        if mine.packing is None:
            return
        places = [
            {row: group.bounds for group in layer.groups for row in group.rows.tolist()} for layer in (mine, theirs)
        ]
        alike = places[0] == places[1]
        try:
            self._do(cache, lambda: mine.share_packed(theirs), single=True)
        except CacheStateError:
            assert not alike
            self._unchanged()
            return
        assert alike
        tokens = cache.tokens[1 - source]
        for key, other in cache.tokens[source].items():
            packed = other.packed[:, None]
            keys, values, flags = tokens[key]
            values = values if self.setup.own else np.where(packed, other.values, values)
            tokens[key] = Tokens(np.where(packed, other.keys, keys), values, flags)

    def record(self, which: int) -> None:
        """From now on (or no longer) the newest tokens may be taken back."""
        cache = self._pick(which)
        cache.recording = not cache.recording

    def overflow(self, which: int, group: int, count: int) -> None:
        """Give one group a chunk with a number that cannot be packed, where it would be packed at once."""
        cache = self._pick(which)
        layer = cache.layers[group % LAYERS]
        if not layer.groups or layer.packing is None or self.pools.budget.limit is not None:
            return
        target = layer.groups[group // LAYERS % len(layer.groups)]
        old = target.bounds
        new = old.appended(count).settled(layer.packing)
        position = new.packed_stop - 1
        if max(old.length, new.packed_base) > position:
            return
        rows = len(target.rows)
        keys, values = self._numbers(rows, count), self._numbers(rows, count)
        (keys, values)[count % 2][rows - 1, position - old.length, 1] = float(("nan", "inf", "-inf", "1e6")[count % 4])
        try:
            layer.append(target, keys, values)
        except NonFiniteError:
            self._unchanged()
            return
        raise AssertionError("a number that float16 cannot hold was packed")

    def compact(self, which: int) -> None:
        """Move pages out of slabs that are mostly free, and give those up."""
        cache, before = self._pick(which), self.pools.budget.used
        due = compact.due(self.pools)
        for pool in due:
            for bank in cache.banks:
                self._do(cache, partial(compact.compact, bank, pool), single=True)
            pool.trim()
        self._unchanged()
        assert self.pools.budget.used <= before

    def finish(self) -> None:
        """Give everything back: no byte may stay."""
        for cache in self.caches:
            for bank in cache.banks:
                bank.free()
        self.caches = []
        self._check_accounts()
        assert all(pool.pages_in_use == 0 for pool in self.pools)
        self.pools.budget.trim()
        self._check_accounts()
        assert self.pools.budget.used == 0

    # -- how the engine does it ---------------------------------------------------------------------------

    def _pick(self, which: int) -> Twin:
        cache = self.caches[which % len(self.caches)]
        self.touched = [cache]
        return cache

    def _begin(self, cache: Twin) -> int:
        """The number of sequences, of which there is at least one."""
        if not cache.batch:
            batch = 1 + int(self.random.integers(3))
            for bank in cache.banks:
                bank.start(batch)
            for tokens in cache.tokens:
                tokens.update({(i, h): NOTHING for i in range(batch) for h in range(self.heads)})
            cache.revocables = [0] * batch
            cache.floors = [[0] * batch for _ in cache.layers]
        return cache.batch

    def _numbers(self, rows: int, tokens: int) -> torch.Tensor:
        """[rows, tokens, DIM]: channels of different scale and offset, some groups constant."""
        x = self.random.standard_normal((rows, tokens, DIM), dtype=np.float32)
        x = x * np.array([1, 0.01, 20, 3], np.float32) + np.array([0, 1, -7, 100], np.float32)
        if self.random.random() < 0.1:
            x[:] = x[:, :1]
        return torch.from_numpy(x).to(self.setup.dtype)

    def _do(self, cache: Twin, action: Callable[[], T], single: bool = False) -> T:
        """A change of a cache; if it is to fail, that first. single: it is one call of the store, which is whole by
        itself."""
        if self.fault > 0:
            alone = single and self.fault % 2 == 0
            try:
                with Faults(self.fault):
                    if alone:
                        return action()  # where it did not come to that
                    with whole(cache):
                        action()
                        raise Fault("at the end")
            except (Fault, CacheFullError, CacheStateError):
                self._unchanged()
        if single:
            return action()
        with whole(cache):
            return action()

    def _unchanged(self) -> None:
        """After a failure: everything is as the model has it, and no page is lost."""
        self._check_accounts()
        self._poison()
        for cache in self.caches if self.count % 4 == 0 else self.touched:
            self._check_cache(cache)

    @staticmethod
    def _fork(cache: Twin) -> list[LayerCache]:
        twins = {}
        for bank in cache.banks:
            for old, new in zip(bank.layers, bank.fork().layers):
                twins[old] = new
        return [twins[layer] for layer in cache.layers]

    def _take(self, cache: Twin, counts: list[int], tight: int, settle: bool = False) -> None:
        """A forward. tight 1 or 2: under a cap that leaves room for some pages, or for part of one.

        settle: no new tokens, but the policy moves what is due.
        """
        if any(c > MOST_TOKENS for c in self._longest(cache, counts)):
            return self.free(self.caches.index(cache))
        budget, limit = self.pools.budget, self.pools.budget.limit
        revocable = 0 if settle or not cache.recording else REVOCABLE
        if limit is None and tight in (1, 2):
            budget.trim()
            most = 1 + sum(counts) // PAGE * 2 if tight == 1 else 3
            page = max(pool.layout.nbytes for pool in self.pools)
            budget.limit = budget.used + int(self.random.integers(most * len(counts) * page))
        chunk, rows = max(counts, default=0), cache.batch * self.heads
        new = [(self._numbers(rows, chunk), self._numbers(rows, chunk)) for _ in cache.layers]
        opened = chunk == 1 and self.random.random() < 0.5
        before = cache.tiers()
        try:
            self._do(cache, lambda: (self._open if opened else self._append)(cache, counts, new, settle, revocable))
        except CacheFullError:
            assert budget.limit is not None
            self._unchanged()
            return
        finally:
            budget.limit = limit
        for held, (keys, values) in zip(cache.tokens, new):
            for (sequence, head), old in held.items():
                count = counts[sequence]
                if count:
                    row, fresh = sequence * self.heads + head, slice(chunk - count, chunk)
                    held[sequence, head] = Tokens(
                        np.concatenate([old.keys, keys[row, fresh].float().numpy()]),
                        np.concatenate([old.values, values[row, fresh].float().numpy()]),
                        np.concatenate([old.packed, np.zeros(count, bool)]),
                    )
        for sequence, count in enumerate(counts):
            if count or settle or opened:
                cache.revocables[sequence] = revocable
                for floors, held in zip(cache.floors, cache.tokens):
                    floors[sequence] = max(floors[sequence], len(held[sequence, 0].keys) - revocable)
        if cache.tiers() != before:
            self._check_cache(cache)  # so that the model learns what the tokens became that were packed

    def _append(
        self, cache: Twin, counts: list[int], new: list[tuple[torch.Tensor, torch.Tensor]], settle: bool, revocable: int
    ) -> None:
        """Layer by layer and group by group."""
        chunk, tokens = max(counts, default=0), np.array(counts, dtype=np.int64)
        for layer, (keys, values) in zip(cache.layers, new):
            for group, count in layer.split_by(tokens):
                fresh = slice(chunk - count, chunk)
                mine = keys[group.rows_tensor, fresh], values[group.rows_tensor, fresh]
                if count == 1:
                    layer.append(group, *mine, settle=False)
                    layer.append(group, None, None, revocable=revocable)
                elif count:
                    layer.append(group, *mine, revocable=revocable)
                elif settle:
                    layer.append(group, None, None, revocable=revocable)
        self._unite(cache)

    def _open(
        self, cache: Twin, counts: list[int], new: list[tuple[torch.Tensor, torch.Tensor]], settle: bool, revocable: int
    ) -> None:
        """A token of all rows at once, as kernels store it."""
        rows = np.flatnonzero(np.repeat(np.array(counts), self.heads))
        for bank in cache.banks:
            mine = np.concatenate([layer.base + rows for layer in bank.layers])
            bank.open(mine)
            bounds = bank.at(mine)
            pages = bank.exact.table[mine, bounds.exact_pages - 1]
            for side, name in enumerate(("keys", "values")):
                x = torch.cat([new[cache.layers.index(layer)][side][rows, 0] for layer in bank.layers])
                bank.exact.pool.write_tokens(name, pages, (bounds.exact_tokens - 1) % PAGE, x)
        self._unite(cache)
        for bank in cache.banks:
            bank.settle(bank.rows_of(), revocable)

    def _unite(self, cache: Twin) -> None:
        if self.setup.united and len(cache.banks) > 1:
            Bank.united(cache.layers, cache.layers[0].bank.change)

    def _longest(self, cache: Twin, counts: list[int]) -> list[int]:
        return [
            max(len(tokens[i, h].keys) for tokens in cache.tokens for h in range(self.heads)) + count
            for i, count in enumerate(counts)
        ]

    @staticmethod
    def _can_crop(bounds: Bounds, count: int) -> bool:
        """Whether all that the next query sees after the crop is there."""
        length = max(0, bounds.length - count)
        return bool(held(bounds)[:length][visible(bounds.extent, length)].all())

    # -- comparison ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """After an operation: the cache it was done to, from time to time all of them, and every page's
        owners.
        """
        self.count += 1
        for cache in self.caches if self.count % 8 == 0 else self.touched:
            self._check_cache(cache)
        self.touched = []
        self._check_accounts()
        self._poison()

    def _check_cache(self, cache: Twin, cropped: bool = False) -> None:
        for layer, tokens, floors in zip(cache.layers, cache.tokens, cache.floors):
            rows = [row for group in layer.groups for row in group.rows.tolist()]
            assert sorted(rows) == list(range(cache.batch * self.heads)) and layer.batch == cache.batch
            for group in layer.groups:
                self._check_group(cache, layer, group, tokens, cropped)
                for sequence in set((group.rows // self.heads).tolist()):
                    assert self._can_crop(group.bounds, group.bounds.length - floors[sequence])
            lengths = [len(tokens[i, 0].keys) for i in range(cache.batch)]
            assert layer.lengths().tolist() == lengths

    def _check_group(
        self,
        cache: Twin,
        layer: LayerCache,
        group: RowGroup,
        tokens: dict[tuple[int, int], Tokens],
        cropped: bool,
    ) -> None:
        """Rows may stand alike that came there differently."""
        names = [divmod(row, self.heads) for row in group.rows.tolist()]
        parts: dict[tuple[bytes, int], list[int]] = {}
        for at, name in enumerate(names):
            parts.setdefault((tokens[name].packed.tobytes(), cache.revocables[name[0]]), []).append(at)
        for (_, revocable), part in parts.items():
            mine = [names[at] for at in part]
            self._check_rows(layer, group, np.array(part), mine, revocable, tokens, cropped)

    def _check_rows(
        self,
        layer: LayerCache,
        group: RowGroup,
        part: np.ndarray,
        names: list[tuple[int, int]],
        revocable: int,
        tokens: dict[tuple[int, int], Tokens],
        cropped: bool,
    ) -> None:
        bounds, packing = group.bounds, layer.packing
        tables = group.exact[part], group.packed[part], group.own[part]
        assert all(layer.extents[head] == bounds.extent for _, head in names)
        mine = [tokens[name] for name in names]
        length, base, stop = bounds.length, bounds.packed_base, bounds.packed_stop
        assert all(len(each.keys) == length for each in mine)

        # What the next query sees is held, and little more than that.
        assert held(bounds)[visible(bounds.extent, length)].all()
        pinned = bounds.extent.pinned * PAGE
        recent = bounds.extent.recent
        oldest = pinned if recent is None else max(pinned, length + 1 - recent - revocable)
        packed_pages = 0
        if stop > base:
            assert packing is not None
            assert stop == bounds.exact_base and pinned <= base and (stop - base) % packing.group == 0
            assert base + packing.page > oldest and stop > oldest
            packed_pages = ceil(stop - base, packing.page)
        else:
            assert bounds.exact_base == pinned or bounds.exact_base + PAGE > oldest
        if packing is not None:
            waiting = length - max(bounds.exact_base, oldest // PAGE * PAGE)
            assert waiting - packing.residual - revocable < packing.group
        pinned_filled = min(length, pinned)
        window_filled = max(0, length - bounds.exact_base)
        rows = len(names)
        assert tables[0].shape == (rows, ceil(pinned_filled, PAGE) + ceil(window_filled, PAGE))
        assert tables[1].shape == (rows, packed_pages)
        assert tables[2].shape == (rows, packed_pages if len(layer.packed_pools) > 1 else 0)

        # The exact tier gives back what was put in.
        positions = np.r_[:pinned_filled, length - window_filled : length]
        stored = read(layer.exact_pool, tables[0])
        was_packed = mine[0].packed
        assert cropped or not was_packed[positions].any()
        for name, expected in (("keys", [t.keys for t in mine]), ("values", [t.values for t in mine])):
            found = stored[name].reshape(rows, -1, DIM)[:, : len(positions)]
            wanted = np.stack(expected)[:, positions]
            if was_packed[positions].any():
                wanted = torch.from_numpy(wanted).to(self.setup.dtype).float().numpy()
            assert np.array_equal(found, wanted), f"exact {name} differ"
        returned = positions[was_packed[positions]]
        fresh = slice(stop, stop)
        packed = None
        if stop > base:
            assert packing is not None
            fields = {}
            for pool, table in zip(layer.packed_pools, tables[1:]):
                fields |= read(pool, table)
            packed = [x.reshape(rows, -1, DIM)[:, : stop - base] for x in decode(layer.codec, fields)]
            # Packed tokens stay what they became; those that were packed just now lie within half a step.
            start = base + int(was_packed[base:stop].sum())
            assert was_packed[base:start].all() and (start - base) % packing.group == 0
            for found, expected in zip(packed, ([t.keys for t in mine], [t.values for t in mine])):
                wanted = np.stack([x[base:start] for x in expected])
                assert np.array_equal(found[:, : start - base], wanted), "packed tokens changed"
            if start < stop:
                assert stop <= length - packing.residual - revocable, "tokens were packed too early"
                self._check_steps(layer.codec, mine, start, stop, [x[:, start - base :] for x in packed])
                fresh = slice(start, stop)
        if len(returned) or fresh.start < fresh.stop:
            for row, (name, each) in enumerate(zip(names, mine)):
                keys, values, flags = (x.copy() for x in each)
                for x, name_ in ((keys, "keys"), (values, "values")):
                    x[positions] = stored[name_].reshape(rows, -1, DIM)[row, : len(positions)]
                flags[returned] = False
                if packed is not None:
                    keys[fresh] = packed[0][row, fresh.start - base :]
                    values[fresh] = packed[1][row, fresh.start - base :]
                    flags[fresh] = True
                tokens[name] = Tokens(keys, values, flags)

    def _check_steps(
        self, codec: KiviCodec, mine: list[Tokens], start: int, stop: int, found: list[np.ndarray]
    ) -> None:
        rows = len(mine)
        keys = np.stack([t.keys[start:stop] for t in mine])
        values = np.stack([t.values[start:stop] for t in mine])
        for x, y, shape, axis in (
            (keys, found[0], (rows, -1, codec.group, DIM), 2),
            (values, found[1], (rows, stop - start, -1, codec.channels), 3),
        ):
            group = x.reshape(shape)
            low, high = group.min(axis, keepdims=True), group.max(axis, keepdims=True)
            bound = quantisation_bound(low, high, codec.bits)
            assert (np.abs(group - y.reshape(shape)) <= bound).all(), "packed tokens are further off than half a step"

    def _check_accounts(self) -> None:
        """Every page is held as often as tables name it; the pools and the budget agree on what there is."""
        named: dict[PagePool, list[np.ndarray]] = {pool: [] for pool in self.pools}
        for cache in self.caches:
            for layer in cache.layers:
                for group in layer.groups:
                    named[layer.exact_pool].append(group.exact.reshape(-1))
                    for pool, table in zip(layer.packed_pools, (group.packed, group.own)):
                        named[pool].append(table.reshape(-1))
        total_bytes = 0
        for pool, tables in named.items():
            ids = np.concatenate(tables) if tables else np.empty(0, np.int64)
            slab_of = ids >> SLAB_SHIFT
            free = total = seen = 0
            for number, slab in enumerate(pool._slabs):
                if slab is None:
                    continue
                index = ids[slab_of == number] & ((1 << SLAB_SHIFT) - 1)
                seen += len(index)
                count = np.bincount(index, minlength=len(slab.references))
                assert np.array_equal(count, slab.references), "a page is held more or less often than tables name it"
                assert slab.free == int((count == 0).sum())
                free += slab.free
                total += len(slab.references)
                total_bytes += sum(t.nbytes for t in slab.tensors.values())
            assert seen == len(ids), "a table names a page of a slab that was given back"
            assert (pool.free_pages, pool.total_pages) == (free, total)
        budget = self.pools.budget
        assert budget.used == total_bytes == sum(pool.allocated_bytes for pool in self.pools)
        assert budget.limit is None or budget.used <= budget.limit

    def _poison(self) -> None:
        """Nobody may rely on what stands in a free page."""
        for pool in self.pools:
            for slab in pool._slabs:
                if slab is not None and slab.free:
                    index = torch.from_numpy(np.flatnonzero(slab.references == 0))
                    for tensor in slab.tensors.values():
                        tensor.index_fill_(0, index, float("nan") if tensor.is_floating_point() else 0x5A5A)


@contextmanager
def whole(cache: Twin) -> Iterator[None]:
    """All layers of a cache change together or not at all, as in a session."""
    change, banks = Transaction(), cache.banks
    try:
        for bank in banks:
            bank.begin(change)
        yield
    except BaseException:
        change.rollback()
        for bank in banks:
            bank.change = None
        raise
    for bank in (*banks, *cache.banks):
        bank.change = None
    change.commit()


def ceil(tokens: int, page: int) -> int:
    return -(-tokens // page)


def visible(extent: Extent, length: int) -> np.ndarray:
    """Which of the positions 0 .. length the query at position `length` sees: bool [length]."""
    k = np.arange(length)
    if extent.recent is None:
        return np.ones(length, bool)
    late = (k < extent.late_sink) & (k > length - extent.late_recent)
    return (k < extent.sink) | (k > length - extent.recent) | late


def held(bounds: Bounds) -> np.ndarray:
    """Which positions are stored: bool [length]. No position may be in two tiers."""
    count = np.zeros(bounds.length, np.int64)
    count[: bounds.extent.pinned * PAGE] += 1
    count[bounds.exact_base :] += 1
    count[bounds.packed_base : bounds.packed_stop] += 1
    assert count.max(initial=0) <= 1
    return count == 1


def read(pool: PagePool, pages: np.ndarray) -> dict[str, np.ndarray]:
    """Every field of a table of pages, float32 or int16 [rows, columns, *shape], read one slab at a time."""
    flat = pages.reshape(-1)
    slab_of, index = flat >> SLAB_SHIFT, torch.from_numpy(flat & ((1 << SLAB_SHIFT) - 1))
    places = [(number, np.flatnonzero(slab_of == number)) for number in dict.fromkeys(slab_of.tolist())]
    out = {}
    for field in pool.layout.fields:
        whole = np.empty((len(flat), *field.shape), np.float32 if field.dtype.is_floating_point else np.int16)
        for number, where in places:
            slab = pool._slabs[number]
            assert slab is not None
            part = slab.tensors[field.name][index[where]]
            whole[where] = (part.float() if field.dtype.is_floating_point else part).numpy()
        out[field.name] = whole.reshape(*pages.shape, *field.shape)
    return out


def decode(codec: KiviCodec, fields: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of planar pages [rows, columns, *shape], written down anew: [rows, columns, planes, 32,
    DIM].
    """
    planes = np.arange(codec.planes)[:, None, None]

    def codes(words: np.ndarray) -> np.ndarray:
        shifted = words.view(np.uint16)[:, :, None] >> (codec.bits * planes).astype(np.uint16)
        return (shifted & (2**codec.bits - 1)).astype(np.float32)

    share = codec.planes * 32 // codec.group
    scale, zero = (
        np.repeat(fields[name], codec.planes // share, axis=2)[:, :, :, None] for name in ("key_scale", "key_zero")
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
