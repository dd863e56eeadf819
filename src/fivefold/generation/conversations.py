"""Conversations between their turns: their caches wait in pages, in host memory or on the disk."""

from __future__ import annotations

import hashlib
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.engine import persist
from fivefold.errors import CacheFullError, CacheStateError, InputError, SavedCacheError
from fivefold.models.cache import FivefoldCache


@dataclass(frozen=True)
class Waiting:
    """A conversation that waits. unread: tokens that belong to it and that its cache has not seen: the last one that
    was generated. cache: None where it is on the disk."""

    unread: tuple[int, ...]
    cache: FivefoldCache | None = None


class Conversations:
    """Caches of conversations that wait for their next turn, by name, for `Scheduler(conversations=...)`.

    Each waits in pages as long as there is room for it. Where requests need the room, the one that has waited longest
    is swapped to host memory; where more than `host_bytes` are there, it goes on to a folder. All of it comes back
    unchanged with the next turn. A folder is found again by another process: call `save` before this one ends.

    Args:
        folder: where conversations are saved; None keeps all in host memory.
        host_bytes: how much host memory they may take; None is no limit. It needs a folder.

    Threads may share it. Raises `InputError` for values that are not possible, and `SavedCacheError` for a folder that
    cannot be read.
    """

    def __init__(self, folder: str | Path | None = None, host_bytes: int | None = None) -> None:
        if host_bytes is not None and (folder is None or host_bytes < 0):
            raise InputError(
                f"host_bytes={host_bytes!r} is not possible {'without a folder' if folder is None else 'as a limit'}: "
                "give a folder, and a number of bytes from 0 on."
            )
        self.folder, self.host_bytes = None if folder is None else Path(folder), host_bytes
        self._lock = threading.RLock()
        self._waiting: OrderedDict[str, Waiting] = OrderedDict()
        """The one that has waited longest first."""
        self.resumed: dict[str, list[float]] = {"resident": [], "offloaded": [], "saved": []}
        """By where they were found: the seconds that bringing each conversation back took."""
        if self.folder is not None and self.folder.exists():
            for path in sorted(self.folder.glob(f"*/{persist.FILE}"), key=lambda path: path.stat().st_mtime_ns):
                note = _note(path.parent)
                self._waiting[note["name"]] = Waiting(note["unread"])

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def counts(self) -> dict[str, int]:
        """How many wait "resident" in pages, "offloaded" in host memory and "saved" on the disk only, and the bytes of
        the second."""
        with self._lock:
            caches = [one.cache for one in self._waiting.values()]
            there = [cache for cache in caches if cache is not None]
            offloaded = [cache for cache in there if cache.offloaded]
            return {
                "resident": len(there) - len(offloaded), "offloaded": len(offloaded),
                "saved": len(caches) - len(there), "host_bytes": self._host_bytes(),
            }  # fmt: skip

    def put(self, name: str, cache: FivefoldCache, unread: tuple[int, ...]) -> None:
        """A conversation waits from now on. Its cache is this object's."""
        with self._lock:
            if name in self._waiting:
                raise CacheStateError(f"the conversation {name!r} waits already: take it first.")
            self._waiting[name] = Waiting(unread, cache)
            while not cache.session.pools.budget.room_for(0) and self.make_room():
                pass
            self._to_disk()

    def take(self, name: str, new: FivefoldCache) -> tuple[FivefoldCache, tuple[int, ...]]:
        """A conversation's cache, in pages, and its tokens that were not read; it waits no longer.

        new: an empty cache, which is what comes back where the conversation is not known, and is filled where it is on
        the disk. Raises `CacheFullError` where there is no room, and `SavedCacheError` for what cannot be read; it
        still waits then.
        """
        with self._lock:
            one = self._waiting.get(name)
            if one is None:
                return new, ()
            start, cache, where = time.perf_counter(), one.cache, "resident"
            if cache is None:
                where, cache = "saved", new
                new.load(self._place(name))
            elif cache.session.pools is not new.session.pools:  # of another scheduler
                where = "offloaded"
                persist.install(new.session, persist.collect(cache.session))
                cache.free()
                cache = new
            elif cache.offloaded:
                where = "offloaded"
                cache.restore()
            self.resumed[where].append(time.perf_counter() - start)
            del self._waiting[name]
            return cache, one.unread

    def make_room(self) -> bool:
        """Swap the one that has waited longest in pages to host memory; False if there is none."""
        with self._lock:
            for one in self._waiting.values():
                if one.cache is not None and not one.cache.offloaded:
                    one.cache.offload()
                    self._to_disk()
                    return True
            return False

    def drop(self, name: str) -> None:
        """Forget a conversation, on the disk too."""
        with self._lock:
            one = self._waiting.pop(name, None)
            if one is not None and one.cache is not None:
                one.cache.free()
            if self.folder is not None:
                shutil.rmtree(self._place(name), ignore_errors=True)

    def save(self) -> None:
        """Write all that is not on the disk to the folder; what waits goes on waiting where it is."""
        if self.folder is None:
            raise CacheStateError("these conversations have no folder: make Conversations(folder=...).")
        with self._lock:
            for name, one in self._waiting.items():
                if one.cache is not None:
                    self._write(name, one)

    def clear(self) -> None:
        """Let go of all memory. What is on the disk stays there; what is not is lost."""
        with self._lock:
            for name, one in list(self._waiting.items()):
                if one.cache is not None:
                    one.cache.free()
                    del self._waiting[name]

    # -- the disk -----------------------------------------------------------------------------------------

    def _host_bytes(self) -> int:
        states = [one.cache.session.state for one in self._waiting.values() if one.cache is not None]
        return sum(state.nbytes for state in states if state is not None)

    def _to_disk(self) -> None:
        """While too much is in host memory: save what has waited longest there."""
        for name, one in list(self._waiting.items()):
            if self.host_bytes is None or self._host_bytes() <= self.host_bytes:
                return
            if one.cache is not None and one.cache.offloaded:
                self._write(name, one)
                one.cache.free()
                self._waiting[name] = Waiting(one.unread)

    def _place(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]

    def _write(self, name: str, one: Waiting) -> None:
        place = self._place(name)
        assert one.cache is not None
        one.cache.save(place, {"name": name, "unread": list(one.unread)})


def keep(cache: FivefoldCache) -> FivefoldCache:
    """A fork of a cache as it is now: in host memory where there is no room for its page tables."""
    try:
        return cache.fork()
    except CacheFullError:
        cache.offload()
        fork = cache.fork()
        cache.restore()
        return fork


def _note(folder: Path) -> dict[str, Any]:
    """What is written beside a conversation."""
    try:
        note = persist.describe(folder)["note"]
        return {"name": str(note["name"]), "unread": tuple(int(token) for token in note["unread"])}
    except (ValueError, KeyError, TypeError):
        raise SavedCacheError(f"{folder} holds a cache and no conversation: remove it from this folder.") from None
