"""Profiles of the tiny models, made by the methods' own learners from random text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from conftest import VOCAB
from fivefold.calibrate.learner import Subject
from fivefold.calibrate.profile import Profile, config_hash, save_profile, signature
from fivefold.models.capture import capturing
from fivefold.models.huggingface import make_cache
from fivefold.recipe import Recipe


def learn(model: Any, recipe: str, folder: Path, chunks: int = 4) -> str:
    """A profile of the recipe's first method in `folder`, whose name is returned."""
    method = Recipe.parse(recipe).methods[0]
    specs = {index: store.spec for index, store in make_cache(model, Recipe()).session.stores.items()}
    learner = method.learner(list(specs.values()))

    def see(layer: int, captured: Any) -> None:
        if layer in specs:
            learner.see(layer, captured)

    generator = torch.Generator().manual_seed(1)
    pieces = learner.pieces(Subject(model, None, list(specs.values()), [], 1024, 0))
    with torch.inference_mode(), capturing(model, method.captures, see):
        for ids in pieces or [torch.randint(1, VOCAB, (1, 256), generator=generator) for _ in range(chunks)]:
            model(ids.to(model.device), use_cache=False)
    settings, tensors = learner.finish(lambda done, total, what: None)
    made = Profile(method.name, signature(model.config), settings, tensors, config_hash(model.config))
    save_profile(folder, made)
    return str(folder)
