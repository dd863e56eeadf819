"""The terminal: results go to `out`, everything else to `err`; bars, and Ctrl-C as a request."""

from __future__ import annotations

import contextlib
import signal
import time
import types
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

out = Console(highlight=False, markup=False)
err = Console(highlight=False, markup=False, stderr=True)


def progress_bars() -> Progress:
    """Bars on stderr that disappear when done; nothing where stderr is no terminal."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}", markup=False),
        TimeElapsedColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextlib.contextmanager
def work_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar with an estimate of the time that is left; yields a callback (done, total, what is being done)."""
    start = time.perf_counter()
    with progress_bars() as bars:
        bar = bars.add_task("Starting", total=None, amount="")

        def progress(done: int, total: int, what: str) -> None:
            left = ""
            if done:
                seconds = (time.perf_counter() - start) / done * (total - done)
                left = f", about {seconds / 60:.0f} min left" if seconds > 90 else f", about {seconds:.0f} s left"
            bars.update(bar, completed=done, total=total, description=what, amount=f"{done} of {total}{left}")

        yield progress


@contextlib.contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Within it, Ctrl-C is a request, asked for with the yielded function; a second one interrupts at once."""
    asked = False

    def ask(signum: int, frame: types.FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
