"""What is checked before any layer takes a chunk: its padding, and its positions.

Of a decoding step nobody waits for them. It is taken for one with a token for every sequence, at the next position, and
whether it is one is looked at before it is committed; if not, it is taken back, and done once more (`Padded`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from fivefold.errors import CacheStateError
from fivefold.store.layer_cache import LayerCache
from fivefold.store.transaction import Transaction


class Padded(CacheStateError):
    """A step was not what it was taken for: to be taken back, and done once more with a look at its mask first."""

    def __init__(self) -> None:
        super().__init__("the mask or the positions of a step are not those of one token for every sequence.")


def positional(stores: Mapping[int, LayerCache]) -> LayerCache | None:
    """The first layer whose codec undoes RoPE; None if there is none, so that nobody need know positions."""
    return next((one for one in stores.values() if one.codec is not None and one.codec.rope is not None), None)


def admitted(
    trusted: Transaction | None,
    stores: Mapping[int, LayerCache],
    length: int,
    batch: int,
    chunk: int,
    mask: torch.Tensor | None,
    positions: torch.Tensor | None,
) -> tuple[np.ndarray, np.ndarray]:
    """How many tokens of a chunk are no padding, and the position of each sequence's first token: int64 `[batch]` each.

    The arguments are those of `new_tokens` and `offsets`. trusted: the change that a decoding step is, if it may be
    taken for what steps usually are; None has a look. Raises `CacheStateError`.
    """
    first = positional(stores) or next(iter(stores.values()))
    held, known = np.zeros(batch, dtype=np.int64), None
    if first.batch:
        held, known = first.lengths(), first.offsets[:: first.spec.kv_heads]
    if trusted is not None and known is not None and held.all():
        expect(trusted, mask, length, held, positions, known)
        return np.ones_like(held), np.zeros_like(held) if positions is None else known
    tokens = new_tokens(mask, length, held, chunk)
    if positions is None:
        return tokens, np.zeros_like(held)
    return tokens, offsets(positions.expand(batch, -1).cpu().numpy(), held, tokens, known)


def expect(
    change: Transaction,
    mask: torch.Tensor | None,
    length: int,
    held: np.ndarray,
    positions: torch.Tensor | None,
    known: np.ndarray,
) -> None:
    """Before a step is committed: raise `Padded` unless it has a token for every sequence, at the next position.

    The arguments are those of `new_tokens` and `offsets`.
    """
    wanted = [] if mask is None else [held, np.ones_like(held)]
    wanted += [] if positions is None else [known + held]
    if not wanted:
        return
    expected = np.concatenate(wanted).tolist()

    def look(numbers: list[float]) -> None:
        if numbers != expected:
            raise Padded

    def count() -> None:
        found = list[torch.Tensor]()
        if mask is not None:
            some = mask != 0
            found += [part.sum(1).expand(len(held)) for part in (some[:, :length], some[:, length:])]
        if positions is not None:
            found.append(positions[:, -1].expand(len(held)).to(found[0].device if found else positions.device))
        change.check(torch.cat(found), look)

    change.postpone(count)  # a GPU need not count before it begins


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
