"""Caches beside plain models of them, how changes of both are made, let fail, and compared."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from plain_model import DIM, LAYERS, MOST_TOKENS, Plain, check_accounts, compare, numpy_of, poison, shows, tiers

from faults import Fault, Faults
from fivefold.engine import persist
from fivefold.engine.arrivals import Arrival
from fivefold.engine.session import Session
from fivefold.errors import CacheFullError, CacheStateError, SavedCacheError
from fivefold.methods.bits.kivi import KiviCodec
from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache
from fivefold.store.pages import PagePool
from fivefold.store.rows import PAGE, Extent
from fivefold.store.spec import LayerSpec, Pools

Chunk = list[tuple[torch.Tensor, torch.Tensor]]
EXTENTS = (
    Extent(), Extent(0, 2), Extent(0, 20), Extent(4, 33), Extent(4, 100), Extent(33, 64), Extent(40, 7),
    Extent(3, 300), Extent(40, 30).intersect(Extent(2, 110)), Extent(4, 20, share=0.3, compensate=True),
    Extent(0, 50, share=0.0), Extent(40, 1, share=0.6, compensate=True),
)  # fmt: skip
GROUPS = ((2, 32), (2, 64), (2, 128), (3, 32), (4, 32), (4, 64), (4, 128), (8, 32), (8, 64))
REFUSED = object()
# Parts of changes that may fail too, beside those of a pool.
PARTS: list[tuple[Any, str]] = [
    (Bank, "_gather"), (Bank, "join"), (Bank, "split"), (Bank, "free"), (PagePool, "take_over"), (PagePool, "read"),
    (Session, "commit"),
]  # fmt: skip
DISK: list[tuple[Any, str]] = [(persist, "save_file"), (persist, "_sync"), (Path, "replace"), (Path, "write_text")]


class DiskFault(OSError, Fault):
    """A disk that is full, on purpose."""


@dataclass(frozen=True)
class Setup:
    """How the caches of a system are made. `group` 0 is no codec; `own`: packed keys and values are in
    pools of their own; `united`: layers have common tables once they hold something.
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

    def codec(self) -> KiviCodec | None:
        if not self.group:
            return None
        return (SharedKeys if self.own else KiviCodec)(self.bits, self.group, min(self.group, DIM), DIM)


class SharedKeys(KiviCodec):
    """KIVI whose pages share the keys and keep the values for themselves."""

    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        fields = (dataclasses.replace(f, own=f.name.startswith("value")) for f in self.layout.fields)
        self.layout = dataclasses.replace(self.layout, fields=tuple(fields))


@dataclass(eq=False)
class Twin:
    """A cache and its model."""

    session: Session
    plain: Plain

    @property
    def layers(self) -> list[LayerCache]:
        return list(self.session.stores.values())

    def bases(self) -> bytes:
        """What changes when tokens move."""
        return b"".join(np.stack(bank.bounds[6:]).tobytes() for bank in self.session.banks)


class Driver:
    """Some caches.

    every: the references of all pages are counted, and free pages poisoned, after every so many operations.
    """

    def __init__(self, setup: Setup, every: int = 1) -> None:
        self.setup, self.every = setup, every
        self.random = np.random.default_rng(setup.seed)
        self.heads, self.codec = len(setup.extents[0]), setup.codec()
        self.caches = [self.twin(self.session())]
        self.touched: list[Twin] = []  # by the operation that was the last
        self.known: Twin | None = None  # compared, and nothing has happened since
        self.count, self.fault, self.name = 0, 0, ""
        self.failed: Counter[str] = Counter()
        self.folder: TemporaryDirectory[str] | None = None

    def session(self) -> Session:
        """With pools of its own. Layers that are not to be united differ in what matters nowhere else."""
        setup, pools = self.setup, Pools()

        def build(spec: LayerSpec) -> LayerCache:
            return LayerCache(spec, pools, setup.extents[spec.layer], self.codec, setup.residual)

        queries = [self.heads * (1 if setup.united else 1 + index) for index in range(LAYERS)]
        specs = [
            LayerSpec(index, LAYERS, self.heads, count, DIM, setup.dtype, torch.device("cpu"))
            for index, count in enumerate(queries)
        ]
        return Session(specs, build, pools)

    def twin(self, session: Session) -> Twin:
        return Twin(session, Plain(self.heads))

    def pools(self) -> list[Pools]:
        return list(dict.fromkeys(cache.session.pools for cache in self.caches))

    def limit(self, pools: Pools, room: int) -> None:
        """A cap that leaves room for so many bytes, as if there had always been one."""
        budget = pools.budget
        for cache in self.caches:
            if cache.session.pools is pools and cache.session.batch:
                budget.count(id(cache.session), cache.session.charged)
        for user in pools.users:  # without a cap nobody has counted
            budget.count(id(user), user.charged if user.batch else 0)
        budget.limit = budget.used + sum(budget.charged.values()) + room

    def begin(self, cache: Twin) -> int:
        """The number of sequences, of which there is at least one, if there is room."""
        if not cache.plain.batch:
            plain = Plain(self.heads, 1 + int(self.random.integers(3)))
            plain.marks[:] = self.random.integers(1, 1 << 20, plain.batch)
            marks = np.repeat(plain.marks, self.heads)

            def part() -> None:
                for layer in cache.layers:
                    layer.start(plain.batch)
                    layer.offsets[:] = marks
                    layer.learned = {"mark": torch.from_numpy(marks.copy())}

            if self.attempt(cache, True, None, part) is not REFUSED:
                cache.plain = plain
        return cache.plain.batch

    def numbers(self, rows: int, tokens: int) -> torch.Tensor:
        """[rows, tokens, DIM]: channels of different scale and offset, some groups constant."""
        x = self.random.standard_normal((rows, tokens, DIM), dtype=np.float32)
        x = x * np.array([1, 0.01, 20, 3], np.float32) + np.array([0, 1, -7, 100], np.float32)
        if self.random.random() < 0.1:
            x[:] = x[:, :1]
        return torch.from_numpy(x).to(self.setup.dtype)

    # -- changes ------------------------------------------------------------------------------------------

    def do(self, cache: Twin, whole: Callable[[], Any] | None, part: Callable[[], Any] | None = None) -> Any:
        """A change of a cache; if it is to fail, that first. whole: the change, which is whole by itself; part: the
        same within a change of the session."""
        self.known = None
        if whole is None:
            assert part is not None
            whole = partial(self.within, cache.session, part)
        if self.fault > 0:
            try:
                if part is not None and self.fault % 2:
                    with Faults(self.fault):
                        self.within(cache.session, part, Fault("at the end"))
                with Faults(1 + self.fault // 2 % 6, also=PARTS):
                    return whole()  # where it did not come to that
            except (Fault, CacheFullError, CacheStateError) as error:
                self.failed[self.name] += isinstance(error, Fault)
                self.unchanged()
        return whole()

    def attempt(
        self, cache: Twin, legal: bool, whole: Callable[[], Any] | None, part: Callable[[], Any] | None = None
    ) -> Any:
        """The same, or REFUSED where the store says so: it must if it is not `legal`, and may for want of room."""
        try:
            out = self.do(cache, whole, part)
        except CacheStateError:
            assert not legal, f"{self.name} was refused"
        except CacheFullError:
            assert cache.session.pools.budget.limit is not None
        else:
            assert legal, f"{self.name} was not refused"
            return out
        self.unchanged()
        return REFUSED

    @staticmethod
    def within(session: Session, part: Callable[[], Any], end: Fault | None = None) -> Any:
        with session.atomic():
            out = part()
            if end is not None:
                raise end
        return out

    def forward(self, cache: Twin, tokens: list[int], tight: int) -> None:
        """tight 1 or 2: under a cap that leaves room for some pages, or for part of one."""
        if not tokens:
            return
        session, plain, budget = cache.session, cache.plain, cache.session.pools.budget
        counts = np.array(tokens, dtype=np.int64)
        limit = budget.limit
        if limit is None and tight in (1, 2):
            budget.trim()
            most = 1 + sum(tokens) // PAGE * 2 if tight == 1 else 3
            page = max(pool.layout.nbytes for pool in session.pools)
            self.limit(session.pools, int(self.random.integers(most * len(tokens) * page)))
        chunk, rows = max(tokens), plain.batch * self.heads
        new = [(self.numbers(rows, chunk), self.numbers(rows, chunk)) for _ in cache.layers]
        store = self.open if chunk == 1 and self.random.random() < 0.5 else self.append
        longest = max(plain.length, int((plain.lengths[0] + counts).max()))

        def part() -> None:
            session.chunk, session.length = chunk, longest - chunk
            store(cache, counts, new)
            # The commit adds the chunk, and lets move what is due after a step.
            session.chunk, session.length = chunk, longest - chunk

        before = cache.bases()
        try:
            if self.attempt(cache, True, None, part) is REFUSED:
                return
        finally:
            budget.limit = limit
        plain.append(counts, new)
        plain.advance((counts > 0) | (chunk == 1), session.revocable)
        if cache.bases() != before:
            self.compare(cache)  # so that the model learns what the tokens became that were packed

    def append(self, cache: Twin, counts: np.ndarray, new: Chunk) -> None:
        """Layer by layer and group by group; chunks are stored when all layers have come."""
        revocable = cache.session.revocable
        for layer, (keys, values) in zip(cache.layers, new):
            for group, count in layer.split_by(counts):
                mine = [x[group.rows_tensor, x.shape[1] - count :] for x in (keys, values)]
                if count == 1:
                    layer.append(group, *mine, advance=False)
                    layer.append(group, None, None, revocable=revocable)
                elif count:
                    cache.session.arrivals.take(Arrival(layer, group, *mine, None), revocable)
        if counts.sum() % 2:
            cache.session.arrivals.store(revocable)  # before the end, as where many wait

    def open(self, cache: Twin, counts: np.ndarray, new: Chunk) -> None:
        """A token of all rows at once, as kernels store it."""
        rows = np.flatnonzero(np.repeat(counts, self.heads))
        for bank in cache.session.banks:
            mine = np.concatenate([layer.base + rows for layer in bank.layers])
            bank.open(mine)
            bounds = bank.at(mine)
            pages = bank.exact.table[mine, bounds.exact_pages - 1]
            for side, name in enumerate(("keys", "values")):
                x = torch.cat([new[layer.spec.layer][side][rows, 0] for layer in bank.layers])
                bank.exact.pool.write_tokens(name, pages, (bounds.exact_tokens - 1) % PAGE, x)

    def advance(self, cache: Twin) -> None:
        """No new tokens, but what is due moves, and nothing can be taken back any more."""
        if self.attempt(cache, True, None, partial(cache.session.advance, 0)) is not REFUSED:
            cache.plain.advance(np.ones(cache.plain.batch, bool), 0)
            self.compare(cache)

    @staticmethod
    def too_long(plain: Plain, tokens: list[int]) -> bool:
        return bool((plain.lengths + np.array(tokens, dtype=np.int64)).max(initial=0) > MOST_TOKENS)

    @staticmethod
    def can_crop(layer: LayerCache, count: int) -> bool:
        """Whether all that the next query sees after the crop is there."""
        bounds = layer.bounds
        return bool(shows(bounds, tiers(bounds), np.maximum(0, bounds.length - count)).all())

    def through_files(self, state: persist.State) -> persist.State:
        """Written to a folder and read again. What was written before is in the folder until then."""
        if self.folder is None:
            memory = Path("/dev/shm")  # where a file system waits for no disk
            self.folder = TemporaryDirectory(dir=memory if memory.is_dir() else None)
        folder = Path(self.folder.name)
        before = self.saved(folder)
        write = partial(persist.write, folder, state, {})
        if self.fault > 0:
            try:
                with Faults(1 + self.fault // 2 % 7, also=DISK, error=DiskFault if self.fault % 2 else Fault):
                    write()
            except (Fault, SavedCacheError):
                self.failed[self.name] += 1
                assert not list(folder.glob(".*")), "a failure left a file behind"
                now = self.saved(folder)
                assert before is None or now is not None
                assert now is None or same(now, state) or (before is not None and same(now, before))
        write()
        assert len(list(folder.iterdir())) == 2
        found = self.saved(folder)
        assert found is not None and same(found, state)
        return found

    @staticmethod
    def saved(folder: Path) -> persist.State | None:
        try:
            return persist.read(folder, persist.describe(folder))
        except SavedCacheError:
            assert not (folder / "cache.json").exists(), "a saved cache cannot be read"
            return None

    # -- comparison ---------------------------------------------------------------------------------------

    def check(self) -> None:
        """After an operation: the caches it was done to, from time to time all of them, and every page's owners."""
        self.count += 1
        for cache in self.caches if self.count % 8 == 0 else self.touched:
            if cache is not self.known:
                self.compare(cache)
        self.touched, self.known = [], None
        self.accounts()

    def unchanged(self) -> None:
        """After a failure: everything is as the model has it, and no page is lost."""
        self.accounts()
        for cache in self.caches if self.count % 8 == 0 else self.touched:
            self.compare(cache)

    def compare(self, cache: Twin, cropped: bool = False) -> None:
        compare(cache.session, cache.plain, self.setup.residual, cropped)
        self.known = cache

    def accounts(self, whole: bool = False) -> None:
        if whole or self.count % self.every == 0:
            check_accounts([cache.session for cache in self.caches])
            poison(self.pools())

    def finish(self) -> None:
        """Give everything back: no byte may stay."""
        for cache in self.caches:
            cache.session.free()
        self.accounts(whole=True)
        for pools in self.pools():
            assert all(pool.pages_in_use == 0 for pool in pools)
            pools.budget.trim()
            assert pools.budget.used == 0 and not pools.budget.charged
        self.accounts(whole=True)
        if self.folder is not None:
            self.folder.cleanup()


def same(a: persist.State, b: persist.State) -> bool:
    """To the bit."""
    bits = [{name: (x.dtype, x.shape, numpy_of(x).tobytes()) for name, x in one.tensors.items()} for one in (a, b)]
    return a.facts == b.facts and bits[0] == bits[1]
