"""Which way decoding steps go: what a cache says of it, when it warns, and what may wait for a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fivefold
from conftest import VOCAB

pytestmark = pytest.mark.usefixtures("one_thread")


def ids(rows: int, tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def filled(model: Any, recipe: str, rows: int = 1, tokens: int = 80) -> Any:
    cache = fivefold.compress(model, recipe)
    with torch.inference_mode():
        model(ids(rows, tokens), past_key_values=cache)
    return cache


def test_large_numbers_stay_known_wherever_their_pages_go(tiny: Any, tmp_path: Path) -> None:
    """Or a kernel that cannot take them would read them: in another cache, from a file, from host memory."""
    model = tiny("llama", num_hidden_layers=2)
    cache = filled(model, "kivi(bits=4, residual=32)", 2)
    (bank,) = cache.session.banks
    assert 0 < bank.peak.max() < 750
    bank.note(np.array([bank.rows + 2]), np.array([2000.0], dtype=np.float32))  # layer 1, sequence 1
    cache.save(tmp_path)
    loaded = fivefold.load_cache(model, tmp_path)
    assert loaded.session.banks[0].peaks()[1] == 2000
    cache.offload()
    cache.restore()
    other = filled(model, "kivi(bits=4, residual=32)")
    other.join(cache)
    assert other.session.banks[0].peaks()[0] < 750 and other.session.banks[0].peaks()[1] == 2000
    gone = other.take([2])
    assert gone.session.banks[0].peaks()[1] == 2000
    assert other.session.banks[0].peaks().max() < 750
