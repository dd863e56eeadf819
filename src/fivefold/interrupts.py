"""Ctrl-C waits for what must happen as a whole.

Python raises `KeyboardInterrupt` in the main thread between any two instructions: between the moment in which a page is
taken and that in which it is noted, too. Within `uninterrupted` it is remembered. It is raised where nothing is half
done (`passing`), or behind the outermost `uninterrupted`; where something has been done by then, an exception would say
that it has not, and so it stops what begins next.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # what `signal` takes ten times as long to call
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
_INT = int(signal.SIGINT)
_STOPS = 1.0
"""Seconds after which nobody expects any more that Ctrl-C stops something."""


class Uninterrupted:
    """A context, which may be entered again within itself, and a decorator. Other threads pass through: Python
    interrupts the main thread alone."""

    def __init__(self) -> None:
        self._depth = 0
        self._calls = 0
        self._kept = False
        """Whether it is held until the outermost `call` ends."""
        self._before: Any = None
        """Whose Ctrl-C is, outside; None if that does not end in Python."""
        self._asked = False
        self._done = False
        self._late: float | None = None

    def __enter__(self) -> None:
        if not _main():
            return
        self._depth += 1
        if self._depth == 1:
            try:
                before = _signal.getsignal(_INT)
                if callable(before):
                    self._before = before
                    _signal.signal(_INT, self._ask)
            except BaseException:
                self._depth = 0
                raise

    def __exit__(self, *_: object) -> None:
        if not _main():
            return
        if self._depth == 1:
            before = self._before
            try:
                if before is not None:
                    _signal.signal(_INT, before)  # from here on it raises by itself
            finally:
                asked, done = self._asked, self._done
                self._before, self._asked, self._done, self._depth = None, False, False, 0
            if asked and done and before is signal.default_int_handler:
                self._late = time.monotonic()
            elif asked:
                before(_INT, None)
        else:
            self._depth -= 1

    def __call__(self, method: F) -> F:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return method(*args, **kwargs)

        return cast(F, run)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Somebody is called who may do something: if so, it is held until he returns."""
        if not _main():
            yield
            return
        self._calls += 1
        try:
            yield
        finally:
            self._returned(self._calls - 1)

    def fresh(self) -> None:
        """No call is under way; where Ctrl-C came between two lines of `call`, one may look as if it were."""
        if _main():
            self._returned(0)

    def _returned(self, calls: int) -> None:
        """So many calls are under way still."""
        self._calls = calls
        if self._kept and not calls:
            self._kept = False
            self.__exit__()

    def _ask(self, *_: object) -> None:
        self._asked = True

    def passing(self) -> None:
        """Nothing is half done: what was asked for is raised now."""
        if self._asked and _main():
            self._asked = False
            self._before(_INT, None)

    def done(self) -> None:
        """Something has happened."""
        if _main():
            self._done = True
            if self._calls and not self._kept:
                self._kept = True
                self._depth += 1

    def begin(self) -> None:
        """Something begins. Raises `KeyboardInterrupt` where that was asked for a moment ago."""
        if self._late is not None and _main():
            late, self._late = self._late, None
            if time.monotonic() - late < _STOPS:
                raise KeyboardInterrupt


def _main() -> bool:
    return _here() == _thread


def _forked() -> None:
    global _thread
    _thread = threading.main_thread().ident


_here, _thread = threading.get_ident, threading.main_thread().ident
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
uninterrupted = Uninterrupted()
