"""Prompts that begin alike: what was read once is shared.

A `PrefixStore` keeps forks of caches as they were after each whole block of a prompt, by a hash of all tokens up to
there. A request whose prompt begins with these tokens goes on from a fork: pages are shared until either side writes.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from fivefold.engine.session import Session
from fivefold.errors import InputError
from fivefold.recipe import Recipe
from fivefold.sizes import parse_bytes
from fivefold.store.pages import PagePool


class Forkable(Protocol):
    """What the store must know of a cache."""

    @property
    def session(self) -> Session: ...

    def fork(self) -> Any: ...

    def free(self) -> None: ...


@dataclass(frozen=True)
class PrefixStatistics:
    """What a `PrefixStore` has done. hits, misses: requests that found a prefix, or none. tokens_shared, tokens_read:
    tokens of their prompts that were found, and that had to be read. entries: states that are kept. nbytes: bytes that
    are held for these alone, pages and what is known of their tokens, as counted when each was kept."""

    hits: int = 0
    misses: int = 0
    tokens_shared: int = 0
    tokens_read: int = 0
    entries: int = 0
    nbytes: int = 0


@dataclass(frozen=True, eq=False)
class _Entry:
    """The state after a block. nbytes: of what nobody else had when it was kept, besides whoever read the block."""

    shelf: Shelf
    cache: Forkable
    nbytes: int


class PrefixStore:
    """Prefixes of prompts that requests share, for as many calls of `generate_many` (and models) as it is given to.

    With a store, prompts are read block by block, whether anything is found or not, so that no token depends on what
    is. The least recently used goes first, ends of prompts before their beginnings. A store holds memory until
    `clear()`, or until its last reference goes; it must be cleared if a model's weights change. Threads may share it.

    Args:
        block: tokens of a block; rounded up to whole groups of the recipe's codec.
        max_bytes: a cap on what is held for the store alone. Beside it, all counts against the cap of the caches
            (`max_bytes` of `generate_many`), where the store gives way to requests.
        max_entries: a cap on the number of states that are kept, one for each block.

    Raises `InputError` for numbers that are not positive.
    """

    def __init__(self, block: int = 512, max_bytes: int | str | None = None, max_entries: int = 4096) -> None:
        max_bytes = parse_bytes(max_bytes)
        for name, value in (("block", block), ("max_bytes", max_bytes), ("max_entries", max_entries)):
            if value is not None and not (isinstance(value, int) and value > 0):
                raise InputError(f"{name}={value!r} is not possible for a prefix store: give a positive whole number.")
        self.block, self.max_bytes, self.max_entries = block, max_bytes, max_entries
        self._lock = threading.RLock()
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        """By the hash of all tokens up to there, the least recently used first."""
        self._shelves: dict[tuple[int, str], Shelf] = {}
        self._counts = dict.fromkeys(("hits", "misses", "tokens_shared", "tokens_read"), 0)

    @staticmethod
    def why_not(recipe: Recipe) -> str | None:
        """One sentence saying why prompts of a recipe are not shared; None if they are."""
        if recipe.chooser is None:
            return None
        return (
            f"{recipe.chooser.name}() chooses tokens by the whole prompt, so what is held of a prefix depends on what "
            "follows: prompts are read without the prefix store."
        )

    @property
    def statistics(self) -> PrefixStatistics:
        """What it has done so far, and holds now."""
        with self._lock:
            return PrefixStatistics(**self._counts, entries=len(self._entries), nbytes=self._nbytes)

    @property
    def _nbytes(self) -> int:
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Let go of everything. Requests that are under way keep what they share."""
        with self._lock:
            while self._entries:
                self._drop(next(iter(self._entries)))

    def shelf(self, owner: object, identity: str, make: Callable[[], Any]) -> Shelf:
        """The prefixes of one model and recipe.

        owner: the model, which is told from others by identity and not kept alive. identity: what else a state depends
        on, as text (recipe, dtype, device). make: an empty cache, from whose pools all caches of this shelf must be.
        """
        with self._lock:
            for key, shelf in list(self._shelves.items()):
                if shelf.owner() is None:
                    self._drop_all(shelf)
                    del self._shelves[key]
            key = (id(owner), identity)
            if key not in self._shelves:
                self._shelves[key] = Shelf(self, owner, identity, make())
            return self._shelves[key]

    # -- entries ------------------------------------------------------------------------------------------

    def _drop(self, digest: bytes) -> None:
        self._entries.pop(digest).cache.free()

    def _drop_all(self, shelf: Shelf) -> None:
        for digest in [digest for digest, entry in self._entries.items() if entry.shelf is shelf]:
            self._drop(digest)

    def _shrink(self) -> None:
        while self._entries and (
            len(self._entries) > self.max_entries or (self.max_bytes is not None and self._nbytes > self.max_bytes)
        ):
            self._drop(next(iter(self._entries)))


class Shelf:
    """The prefixes of one model and recipe in a `PrefixStore`. root: the empty cache whose pools all of them use.
    block: tokens of a block, in whole groups of the codec."""

    def __init__(self, store: PrefixStore, owner: object, identity: str, root: Any) -> None:
        self.store, self.owner, self.root = store, weakref.ref(owner), root
        groups = [one.codec.group for one in root.session.stores.values() if one.codec is not None]
        group = max(groups, default=1)
        self.block = -(-store.block // group) * group
        # Two models may look alike: the object tells them apart.
        self._seed = hashlib.sha256(f"{id(self)} {identity} {self.block}".encode()).digest()

    def digests(self, prompt: Sequence[int]) -> list[bytes]:
        """The hash of all tokens up to the end of each whole block of a prompt."""
        ids, digest, out = np.asarray(prompt, dtype=np.int64), self._seed, []
        for stop in range(self.block, len(ids) + 1, self.block):
            digest = hashlib.sha256(digest + ids[stop - self.block : stop].tobytes()).digest()
            out.append(digest)
        return out

    def find(self, prompt: Sequence[int], digests: Sequence[bytes]) -> tuple[Any, int]:
        """A fork of the state after the longest prefix of a prompt that is known and shorter than the prompt, and its
        tokens; (None, 0) if none is."""
        store = self.store
        with store._lock:
            known = min(len(digests), (len(prompt) - 1) // self.block)
            found = next((n for n in range(known, 0, -1) if digests[n - 1] in store._entries), 0)
            shared = found * self.block
            for name, count in (
                ("hits" if found else "misses", 1), ("tokens_shared", shared), ("tokens_read", len(prompt) - shared)
            ):  # fmt: skip
                store._counts[name] += count
            if not found:
                return None, 0
            self._touch(digests[:found])
            return store._entries[digests[found - 1]].cache.fork(), shared

    def keep(self, digests: Sequence[bytes], cache: Forkable) -> None:
        """Keep the state of a cache of one sequence that has just read the blocks with these hashes, and no more.
        Where it is kept already, it only counts as used. Raises `CacheFullError`, and keeps nothing, where
        there is no room for what is known of its tokens besides pages."""
        store = self.store
        with store._lock:
            if digests[-1] not in store._entries:
                fork = cache.fork()
                session: Session = fork.session
                beside = session.charged - session.learned_bytes  # what codecs learned all forks have in common
                session.pools.budget.charge(id(session), beside)
                store._entries[digests[-1]] = _Entry(self, fork, beside + _own_bytes(session))
            self._touch(digests)
            store._shrink()

    def give_up(self) -> bool:
        """Let go of the least recently used until something has been freed; False if there was nothing."""
        store = self.store
        with store._lock:
            mine = [digest for digest, entry in store._entries.items() if entry.shelf is self]
            before = _held_bytes(self.root.session)
            for digest in mine:
                store._drop(digest)
                if _held_bytes(self.root.session) < before:
                    break
            return bool(mine)

    def _touch(self, digests: Sequence[bytes]) -> None:
        # The beginning last: an end is of no use without it, and frees pages of its own when it goes.
        for digest in reversed(digests):
            if digest in self.store._entries:
                self.store._entries.move_to_end(digest)


def _own_bytes(session: Session) -> int:
    """Bytes of pages of a new fork that nobody has besides it and the one that it was forked from."""
    total = 0
    for bank in session.banks:
        for tier, columns in bank.columns():
            for number, pool in enumerate(tier.pools):
                pages, counts = np.unique(tier.held(columns, number), return_counts=True)
                if len(pages):
                    total += int((pool.references(pages) <= 2 * counts).sum()) * pool.layout.nbytes
    return total


def _held_bytes(session: Session) -> int:
    """Bytes of pages in use, by anybody, and of all that is charged besides."""

    def held(pool: PagePool) -> int:
        return pool.pages_in_use * pool.layout.nbytes

    budget = session.pools.budget
    return sum(map(held, session.pools)) + sum(budget.charged.values())
