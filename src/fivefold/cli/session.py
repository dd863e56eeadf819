"""A conversation in a folder: `cache/`, which `cache.save` wrote, with all that belongs to it as its note, so that both
are of the same turn whatever happens; and `conversation.json`, what was said, for people."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.cli.conversation import Conversation, Message, Turn
from fivefold.cli.files import reason, write_json
from fivefold.errors import InputError

FORMAT = 1


@dataclass(frozen=True)
class Reading:
    """The longest piece of text that was read at once in a conversation, and what that took."""

    tokens: int = 0
    seconds: float = 0.0

    def longer(self, turn: Turn) -> Reading:
        return Reading(turn.read, turn.seconds_reading) if turn.read > self.tokens else self

    def estimate(self, tokens: int) -> float | None:
        """Seconds to read so many tokens; None where what was measured is too short to tell."""
        return tokens / self.tokens * self.seconds if 4 * self.tokens >= tokens > 0 else None


@dataclass(frozen=True)
class Held:
    """What a folder holds besides the cache. model: as the user named it; None is the embedded one."""

    recipe: str
    model: str | None
    dtype: str
    messages: tuple[Message, ...]
    ids: list[int]
    reading: Reading


class Folder:
    """A session's folder. Raises `InputError` and `SavedCacheError`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(name).expanduser()
        self.cache = self.path / "cache"

    def held(self) -> Held | None:
        """What the folder holds; None if there is no conversation in it."""
        from fivefold.engine import persist

        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.name!r} is not a folder that a conversation can be kept in.")
        if not (self.cache / persist.FILE).exists():
            return None
        note = persist.describe(self.cache)["note"]
        try:
            if note["chat"] > FORMAT:
                raise InputError(
                    f"{self.name!r} holds a conversation of a newer Fivefold (format {note['chat']}): update Fivefold."
                )
            reading = Reading(**note["reading"])
            return Held(
                note["recipe"], note["model"], note["dtype"], tuple(note["messages"]), list(note["ids"]), reading
            )
        except (KeyError, TypeError):
            raise InputError(f"{self.name!r} holds a cache and no conversation: give another folder.") from None

    def save(self, conversation: Conversation, model: str | None, reading: Reading) -> None:
        """Write a conversation; what the folder held before stays readable until all of it is there."""
        from fivefold.engine import persist

        about = {"chat": FORMAT, "recipe": str(conversation.cache.recipe), "model": model}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if conversation.ids:
                note = about | {
                    "dtype": dtype_of(conversation.model), "messages": conversation.messages, "ids": conversation.ids,
                    "reading": vars(reading),
                }  # fmt: skip
                conversation.cache.save(self.cache, note)
            elif (self.cache / persist.FILE).exists():
                (self.cache / persist.FILE).unlink()  # without it the rest is nothing
                shutil.rmtree(self.cache)
            write_json(self.path / "conversation.json", about | {"messages": conversation.messages})
        except OSError as error:
            raise InputError(f"the conversation cannot be kept in {self.name!r} ({reason(error)}).") from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Have the folder to oneself. The system releases it when the process dies."""
        from filelock import FileLock, Timeout  # comes with torch

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(self.path / ".lock"))
            lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{self.name!r} is in use by another chat: end that, or give another folder.") from None
        except (OSError, NotImplementedError) as error:
            raise InputError(f"a conversation cannot be kept in {self.name!r} ({reason(error)}).") from None
        try:
            yield
        finally:
            lock.release()


def dtype_of(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")
