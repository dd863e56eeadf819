"""Profiles: a folder with `profile.json` (what it is) and `profile.safetensors` (its tensors). Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fivefold.errors import ProfileError
from fivefold.kernels.shared import shared
from fivefold.signature import config_hash as config_hash
from fivefold.signature import of_layer as of_layer
from fivefold.signature import signature as signature

FORMAT = 2


@dataclass(frozen=True)
class Profile:
    """What was learned: `method` it is for, the `model` it came from (`signature`), settings and tensors.

    config: `config_hash` of the model, empty if unknown. made: how it was made (recipe, Fivefold's version, hash of the
    text, tokens, seed). sha256: of the file of tensors, empty before it is saved.
    """

    method: str
    model: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    config: str = ""
    made: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def save_profile(folder: Path, profile: Profile) -> None:
    """Write a profile, atomically per file and the description last. Raises `ProfileError`."""
    data = save({name: tensor.contiguous() for name, tensor in profile.tensors.items()})
    text = {
        "format": FORMAT,
        "method": profile.method,
        "model": profile.model,
        "config": profile.config,
        "settings": profile.settings,
        "made": profile.made,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    text["check"] = _check(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in (
            ("profile.safetensors", data),
            ("profile.json", (json.dumps(text, indent=2) + "\n").encode()),
        ):
            temporary = folder / f".{name}.{os.getpid()}"
            temporary.write_bytes(content)
            temporary.replace(folder / name)
    except OSError as error:
        raise ProfileError(
            f"cannot write the profile to {folder} ({error.strerror or error}): give a folder that can be written."
        ) from None


def _check(text: dict[str, Any]) -> str:
    """SHA-256 of a description without its own hash."""
    rest = {name: value for name, value in text.items() if name != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def load_profile(where: str, method: str, model: str, config: str = "") -> Profile:
    """The profile in the folder `where`, or the one that ships with Fivefold under that name.

    model, config: `LayerSpec.model` and `LayerSpec.config`; one that is empty is not compared. Raises `ProfileError` if
    it is missing, damaged, of a newer format, or for another method or model.
    """
    folder = Path(where)
    if not folder.is_dir():
        folder = Path(str(files("fivefold").joinpath("profiles", where)))
    if not (folder / "profile.json").is_file():
        raise ProfileError(f"there is no profile {where!r}: give a folder with a profile.json, or a list by hand.")
    profile = read_profile(folder, where)
    if profile.method != method:
        raise ProfileError(f"the profile {where!r} is for {profile.method}, not for {method}: give the right one.")
    if profile.model != model:
        raise ProfileError(f"the profile {where!r} was made for {profile.model}, and this model is {model}.")
    if config and profile.config and profile.config != config:
        raise ProfileError(
            f"the profile {where!r} was made for a model of the same shape whose configuration is another (for example "
            "its RoPE): calibrate this one."
        )
    return profile


def read_profile(folder: Path, where: str) -> Profile:
    """The profile in a folder, called `where` in errors. Raises `ProfileError` if it cannot be read or was changed."""
    try:
        stamps = [(folder / name).stat().st_mtime_ns for name in ("profile.json", "profile.safetensors")]
    except OSError as error:
        raise _unreadable(where, error) from None
    return _read(folder, where, tuple(stamps))


@shared(8)  # every layer of a model asks for it
def _read(folder: Path, where: str, stamps: tuple[int, ...]) -> Profile:
    try:
        text = json.loads((folder / "profile.json").read_text(encoding="utf-8"))
        data = (folder / "profile.safetensors").read_bytes()
        if text["format"] > FORMAT:
            raise ProfileError(f"the profile {where!r} has format {text['format']}: update Fivefold to read it.")
        if text["format"] < FORMAT:
            raise ProfileError(f"the profile {where!r} has the old format {text['format']}: make it anew.")
        if hashlib.sha256(data).hexdigest() != text["sha256"]:
            raise ProfileError(f"the profile {where!r} is damaged (its tensors do not match its hash): make it anew.")
        if _check(text) != text["check"]:
            raise ProfileError(f"the profile {where!r} was changed (its text does not match its hash): make it anew.")
        known = (text["method"], text["model"], text["settings"], load(data))
        return Profile(*known, text.get("config", ""), text.get("made", {}), text["sha256"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise _unreadable(where, error) from None


def _unreadable(where: str, error: Exception) -> ProfileError:
    return ProfileError(f"the profile {where!r} cannot be read ({type(error).__name__}): make it anew.")
