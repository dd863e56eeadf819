"""What is checked before any layer takes a chunk: its padding, and its positions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fivefold.errors import CacheStateError
from fivefold.store.layer_cache import LayerCache


def positional(stores: Mapping[int, LayerCache]) -> LayerCache | None:
    """The first layer whose codec looks at positions; None if there is none, so that nobody need know them."""
    return next((one for one in stores.values() if one.codec is not None and one.codec.positional), None)


def new_tokens(mask: torch.Tensor | None, length: int, held: np.ndarray, chunk: int) -> np.ndarray:
    """How many tokens of a chunk are no padding, int64 `[batch]`; they stand at its end.

    mask: `[batch or 1, length + chunk]`, not 0 where a token is no padding; length: tokens before the chunk, padding
    included; held: those of each sequence that were no padding, int64 `[batch]`. Raises `CacheStateError`.
    """
    batch = len(held)
    if mask is None:
        return np.full(batch, chunk, dtype=np.int64)
    # Of what is stored only the sum comes to the host.
    past = (mask[:, :length] != 0).sum(1, keepdim=True)
    both = torch.cat([past, mask[:, length:] != 0], 1).expand(batch, -1).cpu().numpy()
    new = both[:, 1:] != 0
    tokens: np.ndarray = new.sum(1)
    if (new != (np.arange(chunk)[None] >= (chunk - tokens)[:, None])).any():
        raise CacheStateError("padding inside or after a text cannot be stored: pad each turn on the left.")
    if (both[:, 0] != held).any():
        raise CacheStateError(
            "the attention mask says otherwise about stored tokens than when they came: masks may only grow."
        )
    return tokens


def offsets(positions: np.ndarray, held: np.ndarray, tokens: np.ndarray, known: np.ndarray | None) -> np.ndarray:
    """The position that the model gives each sequence's first token, int64 `[batch]`.

    Codecs that undo the rotary embedding count from it, so positions must run on by one. positions: int64 `[batch,
    chunk]`; held: how many tokens of each sequence are stored, tokens: how many come, `[batch]` each; known: the result
    of earlier chunks. Raises `CacheStateError`.
    """
    chunk = positions.shape[1]
    first = positions[:, -1] - (held + tokens - 1)
    if known is not None:
        first = np.where(held > 0, known, first)
    new = np.arange(chunk) >= (chunk - tokens)[:, None]
    expected = (first + held + tokens - chunk)[:, None] + np.arange(chunk)
    if (new & (positions != expected)).any():
        row, column = np.argwhere(new & (positions != expected))[0]
        raise CacheStateError(
            f"position {positions[row, column]} was given where {expected[row, column]} is next: this recipe keeps "
            "keys as they are before the rotary embedding, and needs positions that go up by one."
        )
    return first
