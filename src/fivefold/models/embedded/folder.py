"""The folder that the model is kept in: where it is, whether it is complete, and how it is sealed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fivefold.models.embedded import pins
from fivefold.paths import cache_dir

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total); a total of 0 means unknown. Stages, in order, as they apply: "wait"
(another process is fetching), "download" (bytes), "verify" (bytes), "convert" (tensors), "write" (bytes)."""

_MANIFEST = "fivefold.json"
_FORMAT = 1  # raise it when the folder's layout changes: older folders are then fetched again


def model_dir() -> Path:
    """The folder where the model is, or would be after `fetch`."""
    return cache_dir() / f"smollm2-135m-instruct-{pins.GGUF_SHA256[:8]}"


def is_fetched() -> bool:
    """Whether the model is there, complete and of the version that is pinned (sizes, not hashes: quick)."""
    return read_manifest(model_dir()) is not None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest, or None when the folder is absent, incomplete or of another version."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["model"] != pins.MODEL_NAME:
            return None
        if manifest["source"] == "pypi" and manifest["gguf_sha256"] != pins.GGUF_SHA256:
            return None
        sizes: dict[str, int] = manifest["files"]
        complete = all((folder / name).stat().st_size == size for name, size in sizes.items())
        return manifest if complete and set(pins.MUST_HAVE) <= set(sizes) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def seal(folder: Path, source: str, facts: dict[str, Any]) -> None:
    """Write the manifest, last, and push everything to the disk before the rename makes it visible."""
    names = sorted(path.name for path in folder.iterdir())
    with (folder / "model.safetensors").open("rb") as data:
        weights = hashlib.file_digest(data, "sha256").hexdigest()
    packages = ("fivefold", "torch", "transformers", "tokenizers", "safetensors", "gguf")
    manifest = {
        "format": _FORMAT,
        "model": pins.MODEL_NAME,
        "license": "Apache-2.0",
        "source": source,
        **facts,
        "weights_sha256": weights,
        "files": {name: (folder / name).stat().st_size for name in names},
        "versions": {"python": platform.python_version(), **{name: package_version(name) for name in packages}},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def package_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
