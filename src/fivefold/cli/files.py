"""Files that a command reads and writes. Every error is one sentence, an `InputError`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from fivefold.cli.terminal import err
from fivefold.errors import InputError, first_line


def read_text(file: str, what: str = "the prompt file") -> str:
    """The text of a UTF-8 file, or of stdin if `file` is '-'."""
    name = "stdin" if file == "-" else f"{what} {file!r}"
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 text (byte {error.start}): convert it.") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise InputError(f"{name} cannot be read ({reason(error)}).") from None
    if not text.strip():
        raise InputError(f"{name} is empty.")
    return text


def writable(name: str) -> Path:
    """The file `name`, links followed, after making sure that it can be written."""
    try:
        path = Path(name).resolve()
        if path.exists() and not path.is_file():
            raise InputError(f"{name!r} is not a file that results can be written to.")
        if path.exists() and not os.access(path, os.W_OK):
            raise InputError(f"{name!r} cannot be written (Permission denied).")
        partial = _partial(path)
        partial.touch(exist_ok=False)
        partial.unlink()
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise InputError(f"{name!r} cannot be written ({reason(error)}).") from None
    return path


def write(path: Path, text: str) -> None:
    """Write `text` in one move: whatever happens, `path` is the old file or the complete new one."""
    partial = _partial(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written ({reason(error)}).") from None
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, results: dict[str, Any], allow_nan: bool = True) -> None:
    write(path, json.dumps(results, indent=2, allow_nan=allow_nan) + "\n")


def write_results(target: Path | None, name: str | None, results: dict[str, Any], allow_nan: bool = True) -> None:
    """Write results to the file that was asked for, if one was, and say so by the `name` the user gave it."""
    if target is not None:
        write_json(target, results, allow_nan)
        err.print(f"\nAll results are in {name}.", soft_wrap=True)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or first_line(error)
