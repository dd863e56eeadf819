"""All layers and sequences of one cache.

A forward is a transaction: `begin`, then every layer takes its chunk (`engine/layer.py`), then `commit`, which lets the
policies move what is due. Whatever fails in between, in the store, in the model or anywhere else, `rollback` leaves
every layer exactly as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch

from fivefold.attention.fused import Alike
from fivefold.engine import admission, decoding, together
from fivefold.engine.arrivals import Arrivals
from fivefold.engine.companions import Companions
from fivefold.engine.picks import Picks, Reads
from fivefold.engine.stepping import opened
from fivefold.errors import CacheFullError, CacheStateError, UnsupportedModelError
from fivefold.interrupts import uninterrupted
from fivefold.store import compact, context, joint, pairs
from fivefold.store.bank import Bank
from fivefold.store.layer_cache import LayerCache
from fivefold.store.spec import DTYPES, LayerSpec, Pools
from fivefold.store.transaction import Transaction

REVOCABLE = 64
"""While a caller may take tokens back (assisted decoding), this many of the newest ones are left alone at least."""
_EVERYTHING = Reads()


class Session:
    """The layers of one cache, by their index in the model.

    stores: those that are compressed. build: makes the store of a layer from its spec. reads: what each layer reads in
    a decoding step. sources: layers whose keys and values later ones share. entry: the first layer whose attention
    runs. absent: layers whose attention does not. length: tokens that have been committed, padding included.
    """

    def __init__(
        self,
        specs: Iterable[LayerSpec],
        build: Callable[[LayerSpec], LayerCache],
        pools: Pools,
        companions: Companions | None = None,
        reads: Reads = _EVERYTHING,
        stores: dict[int, LayerCache] | None = None,
        sources: frozenset[int] = frozenset(),
        entry: int = 0,
        absent: Sequence[LayerSpec] = (),
    ) -> None:
        self.build, self.pools, self.companions = build, pools, companions
        self.stores = {spec.layer: build(spec) for spec in specs} if stores is None else stores
        pairs.couple(self.stores)
        self.reads, self.sources, self.entry, self.absent = reads, sources, entry, absent
        self.first, self.last = min(self.stores), max(self.stores)
        self.length = 0
        self.ragged = False
        """Whether sequences have come or gone, so that they may stand at different lengths without any padding."""
        self.settled = 0
        """The length that a caller who may take tokens back has agreed to last (`crop`)."""
        self._recording = False
        self.sparse = False
        """Whether a chunk may have left slabs with few pages."""
        self.united = False
        """Whether layers whose pages are alike have common tables."""
        self.change: Transaction | None = None
        self.tokens = np.zeros(0, dtype=np.int64)
        """Of the chunk that is under way, how many are real, by sequence."""
        self.offsets = np.zeros(0, dtype=np.int64)
        self.chunk = 0
        self.brought: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """The keys and values of this forward, by layer: the very tensors that attention is to see."""
        self.arrivals = Arrivals(bool(sources))
        self.stepping: frozenset[int] = frozenset()
        """Layers of which a kernel stores and attends the newest token of all rows at once, in this forward."""
        self.trusting = True
        """Whether a step is taken for one of every sequence before its mask is known (`engine/admission.py`)."""
        self.captured = False
        """While a step runs for a graph: whoever runs it has admitted it."""
        self.picks = Picks(reads)
        """What layers have picked for those after them, in this forward."""
        self._alike: Alike | None = None
        self.turn = 0
        """Another one whenever somebody is about to change anything."""
        self.forwards = 0
        """How many forwards of models are under way, one within the other."""
        self._thread = 0
        self._alone = False
        """Whether a forward was begun by its first layer, and ends with its last one."""
        self.state: Any = None
        """All that the cache holds, while it is offloaded (`engine/persist.py`)."""
        self.told: set[str] = set()  # what has been said of its ways (`engine/decoding.py`)
        pools.users.add(self)
        self.inputs: torch.Tensor | None = None
        """What the layer that comes next was given, for codecs that want to know it."""

    # -- what there is ------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        return self.stores[self.first].batch

    def lengths(self) -> np.ndarray:
        """Tokens seen by each sequence, padding left out: int64 `[batch]`."""
        if self.state is not None:
            return np.array(self.state.facts["lengths"], dtype=np.int64)
        return self.stores[self.first].lengths()

    @property
    def banks(self) -> list[Bank]:
        return list({store.bank: None for store in self.stores.values()})

    @property
    def devices(self) -> list[torch.device]:
        return list({store.spec.device: None for store in self.stores.values()})

    @property
    def recording(self) -> bool:
        """Whether the newest tokens may be taken back."""
        return self._recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._recording, self.settled = value, self.length

    @property
    def revocable(self) -> int:
        return max(REVOCABLE, self.length - self.settled + self.chunk) if self.recording else 0

    @property
    def learned_bytes(self) -> int:
        """Bytes of what codecs hold besides pages."""
        return sum({id(s.codec): s.codec.nbytes for s in self.stores.values() if s.codec is not None}.values())

    @property
    def statistics_bytes(self) -> int:
        """Bytes of what policies know about the tokens, and codecs about the rows."""
        return sum(store.statistics_bytes for store in self.stores.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of page tables and of what was made from them."""
        return sum(bank.nbytes for bank in self.banks)

    @property
    def charged(self) -> int:
        """Bytes that count against the cap and are no pages."""
        beside = 0 if self.companions is None else self.companions.nbytes
        return self.learned_bytes + self.statistics_bytes + self.table_bytes + beside

    # -- transactions -------------------------------------------------------------------------------------

    @uninterrupted
    def begin(self, step: bool = False) -> None:
        """A change begins; one that was broken off is rolled back. step: it is the step that was looked ahead to."""
        uninterrupted.begin()
        self.check_here()
        if self.change is not None and self._thread != threading.get_ident():
            raise CacheStateError(
                "this cache is in use by a forward of another thread: fork() it, and give each thread a cache of its "
                "own."
            )
        self.rollback()
        self._compact()
        change = Transaction(step)
        self.chunk, self.picks, self.stepping = 0, Picks(self.reads), frozenset()
        try:
            self.include(change)
        except BaseException:
            change.rollback()
            raise
        self.change, self._thread, self._alone = change, threading.get_ident(), False

    def check_here(self) -> None:
        """Raise `CacheStateError` while the cache is offloaded."""
        if self.state is not None:
            raise CacheStateError("this cache is offloaded to host memory: call restore() first.")

    def include(self, change: Transaction) -> None:
        """What happens to this session is part of `change` from now on."""
        self.turn += 1
        before = {name: getattr(self, name) for name in ("length", "ragged", "united", "companions")}
        stores = dict(self.stores)
        change.undo(lambda: vars(self).update(before, stores=stores))
        if self.companions is not None:
            change.undo(self.companions.snapshot())
        for bank in self.banks:
            bank.begin(change)

    @uninterrupted
    def commit(self, grows: bool = True) -> None:
        """Let the policies move what is due after a forward; then what it did stands. grows: whether it may have more
        bytes than before, so that the cap has a say."""
        change = self.change
        assert change is not None
        if self.batch and not self.united:
            self.unite(change)
        self.arrivals.store(self.revocable)
        self.brought = {}
        if self.chunk == 1:
            self.advance(self.revocable)
        elif self.chunk:
            self.choose_together()
        chunk, self.chunk = self.chunk, 0
        self.length += chunk
        if self.pools.budget.limit is not None:
            before = self.pools.budget.charged.get(id(self), 0)
            change.undo(lambda: self.pools.budget.count(id(self), before))
            self._charge(grows)
        change.verify()
        uninterrupted.passing()
        self.change = None
        change.commit()
        for pool in self.pools:
            pool.shrink()
        self.sparse = self.sparse or chunk > 1
        uninterrupted.done()

    def _charge(self, grows: bool) -> None:
        budget = self.pools.budget
        if not grows:
            budget.count(id(self), self.charged)
            return
        try:
            budget.charge(id(self), self.charged)
        except CacheFullError:
            for store in self.stores.values():
                if store.codec is not None:
                    store.codec.forget()  # or what it has just made would be above the cap
            raise

    def _compact(self) -> None:
        """After a chunk: give memory back that evicted and packed tokens have left free in pieces."""
        if not self.sparse:
            return
        for pool in compact.due(self.pools):
            compact.compact(self.banks, pool)
            pool.trim()
        self.sparse = False

    @uninterrupted
    def rollback(self) -> None:
        """Undo all that has happened since `begin`; nothing if nothing has."""
        self.turn += 1
        change = self.change
        if change is not None:
            self.brought = {}
            self.arrivals.clear()
            change.rollback()
            self.change = None
            self.pools.budget.trim()  # what it took for itself

    @contextmanager
    def atomic(self, grows: bool = True, step: bool = False) -> Iterator[None]:
        """A forward, or another change of the whole cache: it happens as a whole or not at all. step: see `begin`."""
        mine = None
        try:
            with uninterrupted:
                self.begin(step)
                mine = self.change
            yield
            self.commit(grows)
        except BaseException:
            if mine is not None and self.change is mine:  # else it is over, or another's
                self.rollback()
            raise

    @contextmanager
    def _all_banks(self) -> Iterator[Transaction]:
        """What happens to all banks happens as a whole or not at all, also while the cache is offloaded."""
        change = Transaction()
        with uninterrupted:
            try:
                for bank in self.banks:
                    bank.begin(change)
                yield change
            except BaseException:
                change.rollback()
                raise
            change.commit()
            uninterrupted.done()

    @property
    def running(self) -> bool:
        """Whether a forward is under way that somebody else has begun, and will end, in this thread."""
        mine = not self._alone and self._thread == threading.get_ident()
        return self.change is not None and mine and self.forwards > 1

    def arrive(self, index: int) -> None:
        """A layer's attention is called. Where nobody has begun a forward (somebody calls the layers one by one), the
        first layer does."""
        if self.change is None or (self._alone and index == self.entry):
            with uninterrupted:
                self.begin()
                self._alone = True

    def done(self, index: int) -> None:
        """A layer has taken its chunk."""
        if self._alone and index == self.last:
            try:
                self.commit()
            except BaseException:
                self.rollback()
                raise

    def unite(self, change: Transaction | None = None) -> None:
        """Give layers whose pages are alike common tables, once it is known what they are."""
        kinds: dict[tuple[object, ...], list[LayerCache]] = {}
        for store in self.stores.values():
            kinds.setdefault(store.format, []).append(store)
        for layers in kinds.values():
            if len(layers) > 1:
                Bank.united(layers, change)
        self.united = True

    # -- a forward ----------------------------------------------------------------------------------------

    def admit(
        self,
        batch: int,
        chunk: int,
        mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        whys: Mapping[int, str | None] | None = None,
    ) -> None:
        """Before the first layer takes a chunk: everything that could refuse it.

        mask: bool `[batch or 1, all tokens]`, where a token is no padding; positions: int64 `[batch or 1, chunk]`, as
        the model counts them, None if no codec wants them; whys: of a step, `why_not_fused` where it is known already.
        """
        if self.batch not in (0, batch):
            raise CacheStateError(f"the cache holds {self.batch} sequences and was given {batch}: use a new cache.")
        trusted = self.change if self.trusting and chunk == 1 and not self._alone else None
        self.tokens, self.offsets = admission.admitted(trusted, self.stores, self.length, batch, chunk, mask, positions)
        self.trusting, self.chunk = chunk > 1 or bool(self.tokens.all()), chunk
        if self.change is not None:
            self.change.step = chunk == 1
        if chunk == 1 and self.batch and self.tokens.all():
            whys = self.why_not_fused() if whys is None else whys
            decoding.warn(self, whys)
            self.stepping = opened(self.stores, self.banks, whys, self.reads, self.revocable)

    def why_not_fused(self) -> dict[int, str | None]:
        """Why a layer's decoding step is not one call of a kernel, in a few words, of each layer; None if it is."""
        if self._alike is None or not self._alike.stands(self.stores):
            self._alike = Alike(self.stores, self.reads.roles)
        return self._alike.whys()

    def deliver(self, index: int, spec: dict[str, Any]) -> LayerCache:
        """The store of a layer that is given its chunk. spec: what the chunk says about the layer; where the cache is
        still empty, that decides how its pages are made."""
        store = self.stores[index]
        if spec["dtype"] not in DTYPES:
            raise UnsupportedModelError(f"keys in {spec['dtype']} are not supported: load the model in bfloat16.")
        if not self.length:
            store = self.respec(index, spec)
        if not store.batch:
            store.start(len(self.tokens))
            pairs.couple(self.stores, self.change)
        return store

    def respec(self, index: int, spec: dict[str, Any]) -> LayerCache:
        """While it is empty: the store of a layer of which this is so."""
        store = self.stores.get(index)
        if store is not None and any(getattr(store.spec, name) != value for name, value in spec.items()):
            assert self.change is not None
            store = self.build(replace(store.spec, **spec))
            store.bank.begin(self.change)
            self.stores = {**self.stores, index: store}
        return cast(LayerCache, store)

    def advance(self, revocable: int) -> None:
        """Let the policies of all layers move what is due."""
        banks = self.banks
        for bank in banks:
            bank.advance(revocable=revocable)
            if bank.live is not None and not bank.live.watch.advance(bank):
                bank.settle(stepped=True)
            if bank.mirror is not None:
                bank.mirror.prepare()
        done = [store for bank in banks for store in joint.advance(bank, revocable)]
        for store in self.stores.values():
            if store.known and store.bank.live is None and store not in done:
                for group in store.groups:
                    if group.held is not None:
                        store.append(group, None, None, revocable=revocable)

    def choose_together(self) -> None:
        """After a chunk, where the budgets of the layers depend on each other: share them out and choose."""
        together.choose(self.stores, self.first, self.batch, self.pools.budget)

    # -- other changes ------------------------------------------------------------------------------------

    @uninterrupted
    def put(self, batch: int, tokens: int, write: Callable[[LayerCache], None]) -> None:
        """Without a model: `write` appends so many tokens to all `batch` sequences of a layer."""
        with self.atomic():
            for store in self.stores.values():
                if not store.batch:
                    store.start(batch)
                write(store)
            self.length += tokens

    @uninterrupted
    def select(self, sequences: np.ndarray) -> None:
        """Sequence i becomes what sequence `sequences[i]` was: page tables move, bytes do not."""
        self.check_here()
        self.rollback()
        if self.batch:
            with self.atomic():
                for bank in self.banks:
                    bank.select(sequences)
                if self.companions is not None:
                    self.companions.select(sequences)

    @uninterrupted
    def fork(self) -> Session:
        """A second cache of the same tokens: every page is shared until either side writes to it. Raises
        `CacheFullError` where the cap has no room for its page tables."""
        self.rollback()
        with self._all_banks() as change:
            twins = {bank: bank.fork() for bank in self.banks}
            stores = {i: cast(LayerCache, twins[one.bank].layers[one.index]) for i, one in self.stores.items()}
            companions = None if self.companions is None else self.companions.fork()
            twin = self._twin(companions, stores)
            twin.length, twin.recording, twin.united = self.length, self.recording, self.united
            twin.ragged, twin.state, twin.settled = self.ragged, self.state, self.settled
            if self.pools.budget.limit is not None:
                change.undo(partial(self.pools.users.discard, twin))
                change.undo(partial(self.pools.budget.count, id(twin), 0))
                twin._charge(True)
        return twin

    def new(self) -> Session:
        """An empty one of the same kind, with pages from the same pools."""
        companions = None if self.companions is None else self.companions.new()
        return self._twin(companions, {index: store.twin() for index, store in self.stores.items()})

    def _twin(self, companions: Companions | None, stores: dict[int, LayerCache]) -> Session:
        kind = self.reads, stores, self.sources, self.entry, self.absent
        twin = Session([], self.build, self.pools, companions, *kind)
        twin.told = self.told
        return twin

    def adopt_specs(self, other: Session, change: Transaction) -> None:
        """While it is empty: be of the kind that `other` has found its layers to be."""
        for index, store in other.stores.items():
            if self.stores[index].spec != store.spec:
                self.stores[index] = self.build(store.spec)
                self.stores[index].bank.begin(change)

    @uninterrupted
    def tidy(self) -> None:
        """Give back what need not be held: free pages in pieces, and what was worked out from page tables."""
        self.rollback()
        for bank in self.banks:
            bank.tidy()
        self._compact()
        for store in self.stores.values():
            store.regroup()

    @uninterrupted
    def free(self) -> None:
        """Forget everything, and give the pages back to the pools."""
        self.release()
        for store in self.stores.values():
            if store.spec.rope is not None:
                store.spec.rope.made.clear()
            if store.codec is not None:
                store.codec.forget()
        context.forget()

    @uninterrupted
    def release(self, state: Any = None) -> None:
        """Give all pages back. state: what they held, if that is to come back (see `state`)."""
        self.rollback()
        with self._all_banks() as change:
            change.undo(partial(setattr, self, "state", self.state))
            self.state = state
            for bank in self.banks:
                bank.free()
        self.emptied()

    def emptied(self) -> None:
        """No sequence is left: what the next forward delivers may be of another kind."""
        for store in self.stores.values():
            Bank([store])
        pairs.couple(self.stores)
        self.length, self.united, self.ragged, self.settled = 0, False, False, 0
        self.pools.budget.charge(id(self), 0)
