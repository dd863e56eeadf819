"""The file of `--out`: a line for each request that has ended, written as it ends. It says what is still to be done.

Every line names the request ("id", or "line"), the recipe, the model, and the "key" of what its tokens depend on: so
what was written by another run is never taken for a result of this one.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

from fivefold.cli.files import reason, write
from fivefold.cli.prompt_file import Line
from fivefold.errors import InputError

Name = tuple[str, str | int]


class ResultFile:
    """path: the file, links followed; shown: as the user named it. about: recipe and model. restart: what the file
    holds is of no interest."""

    def __init__(self, path: Path, shown: str, about: dict[str, str], restart: bool) -> None:
        self.path, self.shown, self.about, self.restart = path, shown, about, restart
        self._file: IO[str] | None = None

    def done(self, lines: Sequence[Line]) -> dict[Name, str]:
        """The lines of results that are there, by request; without requests that have failed.

        Raises `InputError` where the file holds something else: it is never overwritten unasked.
        """
        if self.restart or not self.path.exists():
            return {}
        try:
            raw = self.path.read_bytes()
        except OSError as error:
            raise InputError(f"{self.shown!r} cannot be read ({reason(error)}).") from None
        asked, found = {line.name: line for line in lines}, {}
        whole, _, _ = raw.rpartition(b"\n")  # a line that a kill tore has no end
        for number, text in enumerate(whole.split(b"\n") if whole else [], 1):
            row = _row(text)
            if row is None:
                self._refuse(f"line {number} of {self.shown!r} is no result of this command")
            for what, mine in self.about.items():
                if row.get(what) != mine:
                    self._refuse(f"{self.shown!r} holds results of the {what} {row.get(what)}, and this is {mine}")
            name: Name = ("id", row["id"]) if "id" in row else ("line", row["line"])
            line = asked.get(name)
            if line is None:
                self._refuse(f"{self.shown!r} holds a result for {name[0]} {name[1]!r}, which is not asked for now")
            if line.key != row["key"]:
                self._refuse(f"{line.where} or a setting has changed since its result was written to {self.shown!r}")
            if "error" not in row:
                found[name] = text.decode()
        return found

    def _refuse(self, why: str) -> NoReturn:
        raise InputError(f"{why}: give another --out, or --restart to replace it.")

    @contextlib.contextmanager
    def opened(self, lines: Sequence[Line]) -> Any:
        """Have the file to oneself, with nothing in it but what is done, which is yielded as by `done`."""
        try:
            lock = self.path.open("a", encoding="utf-8")
            self._lock(lock)
            found = self.done(lines)
            # In one move, so that nothing that is done is ever missing.
            write(self.path, "".join(f"{text}\n" for text in found.values()))
            self._file = self.path.open("a", encoding="utf-8")
            self._lock(self._file)
            lock.close()
        except OSError as error:
            raise InputError(f"{self.shown!r} cannot be written ({reason(error)}).") from None
        try:
            yield found
        finally:
            self._file.close()

    def add(self, line: Line, row: dict[str, Any]) -> None:
        assert self._file is not None
        whole = {line.name[0]: line.name[1], **row, **self.about, "key": line.key}
        try:
            self._file.write(json.dumps(whole, ensure_ascii=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.shown!r} cannot be written ({reason(error)}): make room, and the same command goes on."
            ) from None

    def _lock(self, file: IO[str]) -> None:
        try:
            import fcntl
        except ImportError:  # not on Windows
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                raise BlockingIOError  # it has just been replaced
        except BlockingIOError:
            raise InputError(f"{self.shown!r} is being written by another run: give another --out, or wait.") from None


def _row(text: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not {"key", "recipe", "model"} <= set(row):
        return None
    return row if isinstance(row.get("id", row.get("line")), str | int) else None
