"""Profiles: a folder with `profile.json` (what it is) and `profile.safetensors` (its tensors). Never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from fivefold.errors import ProfileError

FORMAT = 1


@dataclass(frozen=True)
class Profile:
    """What was learned: `method` it is for, the `model` it came from (`signature`), settings and tensors."""

    method: str
    model: str
    settings: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def signature(config: Any) -> str:
    """The shape of a decoder as a short text: what a profile is matched with.

    config: a transformers configuration of a decoder-only model.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return f"{config.model_type}-l{config.num_hidden_layers}-q{heads}-kv{kv_heads}-d{dim}-v{config.vocab_size}"


def save_profile(folder: Path, profile: Profile) -> None:
    """Write a profile, atomically per file and the description last. Raises `ProfileError`."""
    data = save({name: tensor.contiguous() for name, tensor in profile.tensors.items()})
    text = {
        "format": FORMAT,
        "method": profile.method,
        "model": profile.model,
        "settings": profile.settings,
        "sha256": hashlib.sha256(data).hexdigest(),
    }
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
        raise ProfileError(f"cannot write the profile to {folder}: {error.strerror or error}.") from None


def load_profile(where: str, method: str, model: str) -> Profile:
    """The profile in the folder `where`, or the one that ships with Fivefold under that name.

    Raises `ProfileError` if it is missing, damaged, of a newer format, or for another method or model.
    """
    folder = Path(where)
    if not folder.is_dir():
        folder = Path(str(files("fivefold").joinpath("profiles", where)))
    if not (folder / "profile.json").is_file():
        raise ProfileError(f"there is no profile {where!r}: give a folder with a profile.json, or a list by hand.")
    try:
        text = json.loads((folder / "profile.json").read_text())
        data = (folder / "profile.safetensors").read_bytes()
        if text["format"] > FORMAT:
            raise ProfileError(f"the profile {where!r} has format {text['format']}: update Fivefold to read it.")
        if hashlib.sha256(data).hexdigest() != text["sha256"]:
            raise ProfileError(f"the profile {where!r} is damaged (its tensors do not match its hash): make it anew.")
        profile = Profile(text["method"], text["model"], text["settings"], load(data))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ProfileError(f"the profile {where!r} cannot be read ({type(error).__name__}): make it anew.") from None
    if profile.method != method:
        raise ProfileError(f"the profile {where!r} is for {profile.method}, not for {method}: give the right one.")
    if profile.model != model:
        raise ProfileError(f"the profile {where!r} was made for {profile.model}, and this model is {model}.")
    return profile
