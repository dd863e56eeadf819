"""Saved caches: whether one that lies in a folder belongs to the model and recipe that want it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fivefold.calibrate.profile import config_hash
from fivefold.engine import persist
from fivefold.engine.session import Session
from fivefold.errors import SavedCacheError
from fivefold.models.specs import weights_hash


def identity(recipe: str, signature: str, model: PreTrainedModel | None) -> dict[str, Any]:
    """By what it is told whose a cache is. model: None if it is gone; then only its shape is compared."""
    return {
        "recipe": recipe, "model": signature, "config": "" if model is None else config_hash(model.config),
        "weights": "" if model is None else weights_hash(model),
    }  # fmt: skip


def load(session: Session, folder: Path, mine: dict[str, Any]) -> Any:
    """Let an empty session hold what a folder does. mine: the `identity` of its cache. Returns the note
    beside it. Raises `SavedCacheError`."""
    text = persist.describe(folder)
    for name, what in {
        "model": f"for a model {text['model']}, and this one is {mine['model']}",
        "config": "for a model of the same shape with another configuration",
        "weights": "for a model of the same shape with other weights",
        "recipe": f"with the recipe {text['recipe']}, and this cache has {mine['recipe']}",
    }.items():
        if text[name] and mine[name] and text[name] != mine[name]:
            raise SavedCacheError(f"the cache in {folder} was saved {what}: load it for what it was made for.")
    persist.install(session, persist.read(folder, text))
    return text["note"]
