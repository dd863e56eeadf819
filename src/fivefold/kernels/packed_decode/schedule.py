"""What the kernels of a decoding step have in common: where pages lie, what is seen of them, how work is shared out.

It needs neither Triton nor a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from fivefold.kernels.packed_decode.reader import Packed, Reader
from fivefold.kernels.packed_decode.reference import Form

__all__ = [
    "HEADS", "LIMIT", "PAGE", "PICKS", "SPAN", "TILE", "Exact", "Packed", "Programs", "lacks",
    "pages_of", "searched", "starts_of", "supports",
]  # fmt: skip
SPAN = 8
"""Columns of a table of spans; the first seven are used (see `decode_reference`)."""
PAGE = 32
"""Tokens of an exact page."""
TILE = 64
"""Exact slots that are one piece of work."""
PICKS = 32
"""Picked packed slots that are one piece of work."""
LIMIT = Form.limit
"""KIVI's keys and values up to this absolute value can be attended on packed by the kernels of a GPU."""
HEADS = 16
"""Query heads of a row, at most."""


@dataclass(frozen=True)
class Exact:
    """Exact pages of 32 tokens: table int64 `[rows, columns, 2]` of the addresses of keys and values, in units of
    16 bytes, counted from `base`, and the dtype of both. Rounded ones, `[rows, columns, 6]`, have codes of eight bits
    there, and then the addresses of float16 scales and zero points of keys, and of values, `[32]` each."""

    table: torch.Tensor
    dtype: torch.dtype
    base: int = 0

    @property
    def rounded(self) -> bool:
        return self.table.shape[2] == 6


def lacks(form: Reader | None, heads: int) -> str | None:
    """Why no kernel attends on these shapes, in a few words; None if one may."""
    if heads > HEADS:
        return f"{heads} query heads share a kv head, more than {HEADS}"
    if not isinstance(form, Form):
        return None if form is None else form.lacks(heads)
    if form.group % 32 or form.tokens % form.group or form.head_dim % form.channels:
        return f"groups of {form.group} tokens and {form.channels} channels"
    return None


def supports(form: Reader | None, heads: int, head_dim: int) -> str | None:
    """Why a GPU's kernels cannot attend on these shapes, in a few words; None if they can."""
    if head_dim not in (64, 128, 256):
        return f"head_dim {head_dim} is none of 64, 128, 256"
    if isinstance(form, Form) and form.channels & (form.channels - 1):
        return f"groups of {form.channels} channels"
    return lacks(form, heads)


def pages_of(spans: np.ndarray, page: int, team: int = 1, joined: bool = False) -> np.ndarray:
    """How many packed pages of `page` tokens, and how many `TILE`s of exact slots, the rows see part of.

    spans: `[..., rows, >= 5]`; team: see `Reader`; joined: one kernel does both, and an exact page is a piece of work
    as a packed one is. Returns `[..., 2, rows]`.
    """
    low, high, stop = spans[..., 0], spans[..., 1], spans[..., 4]
    packed = np.where(high > low, -(-high // page) - low // page, 0)
    if joined:
        return np.stack([packed + -(-stop // PAGE), np.zeros_like(packed)], -2)
    if team > 1:
        packed = np.where(np.arange(packed.shape[-1]) % team == 0, packed, 0)
    return np.stack([packed, -(-stop // TILE)], -2)


class Programs(NamedTuple):
    """How many programs there are for packed and for exact pages. once: of the first, how many fill a device once;
    share: how many pages are worth more than these. alone: nothing is packed, and how many read exact pages depends on
    how many there are (`_of_exact`)."""

    packed: int
    exact: int
    once: int
    share: int = 1
    alone: bool = False

    @property
    def turns(self) -> int:
        """How many programs may take rows in turn: those of `packed.cu`, where it does exact pages too."""
        return 0 if self.exact else self.once


OPENING = 2
"""What a program begins and ends a row with takes the time of so many pages."""


WORTH = 15, 60
"""Tiles of exact pages for each program of those that fill a device once, from which on they are worth four times as
many, and all: with fewer, what a program begins and ends with costs more than an even end brings (on an H200)."""


def starts_of(pages: np.ndarray, programs: Programs | tuple[int, ...]) -> np.ndarray:
    """The work lists: the first part of each row, and how many parts there are, int32 `[..., 2, rows + 1]`.

    pages: `[..., 2, rows]`, at most `programs` of which may have any (none of a kind that has no programs). A part is
    what a program leaves of a row; program p leaves part p, but where rows are so different that their parts would not
    end together, and may be taken in turn: the list of the kind that has no pages then says where each row begins among
    all (see `in_turn`), and else nothing but zeros.

    No program gets more pages than it must, and few are left without any. Where the device is filled more than once,
    those of packed pages get a share of them at least: what a program begins and ends with costs more than an even end.
    Rows that are not alike are cut into more parts only where that ends sooner (`_waves`).
    """
    most = np.broadcast_to(np.array(programs[:2])[:, None], (*pages.shape[:-1], 1))
    if not isinstance(programs, Programs):
        return _parts(_shares(pages, most))
    packed, once = pages[..., :1, :], programs.once
    rows, total = (packed > 0).sum(-1, keepdims=True), packed.sum(-1, keepdims=True)
    enough = np.minimum(most[..., :1, :], np.maximum(np.maximum(rows, once), total // programs.share))
    exact = _of_exact(pages[..., 1:, :], most[..., 1:, :], once) if programs.alone else most[..., 1:, :]
    shares = _shares(pages, np.concatenate([enough, exact], -2))
    different = 10 * rows * packed.max(-1, keepdims=True, initial=0) > 11 * total
    waves = _waves(packed, shares[..., :1, :], once)
    if (finer := different & (enough > once)).any():
        # Of rows that are not alike, programs of the longest may begin last: shorter ones end sooner together.
        others = _shares(pages, most)
        sooner = finer & ((less := _waves(packed, others[..., :1, :], once)) < waves)
        shares, waves = np.where(sooner, others, shares), np.where(sooner, less, waves)
    out = _parts(shares)
    if programs.turns and (few := different & (rows <= 2 * once)).any():
        turns = in_turn(packed[..., 0, :], once)
        length = -(-turns[..., 1:, -1:] // once)
        out = np.where(few & (length + OPENING < waves), turns, out)
    return out


def _of_exact(tiles: np.ndarray, most: np.ndarray, once: int) -> np.ndarray:
    """How many programs exact pages alone are worth, of `most`: as fill the device once, some four times, or all.

    Few more than fill it once would be the worst: the last of them then run almost alone. Of many rows, as many as fill
    it once cannot be shared out evenly.
    """
    rows, total = (tiles > 0).sum(-1, keepdims=True), tiles.sum(-1, keepdims=True)
    several = np.where(total >= WORTH[1] * once, most, 4 * once)
    enough = np.where((total >= WORTH[0] * once) | (4 * rows > once), several, once)
    return np.minimum(most, np.maximum(rows, enough))


def _shares(pages: np.ndarray, most: np.ndarray) -> np.ndarray:
    """How many programs each row gets, of `most` in all, `[..., 2, 1]`: as few pages each as can be."""
    each = np.maximum(1, -(-pages.sum(-1, keepdims=True) // np.maximum(1, most)))
    while True:
        shares = -(-pages // each)
        over = shares.sum(-1, keepdims=True) > most
        if not over.any():
            break
        each += np.where(over, np.maximum(1, each // 32), 0)
    # Programs that are left go to the rows by their pages, where that makes no share larger.
    even = np.minimum(pages, np.maximum(1, pages * most // np.maximum(1, pages.sum(-1, keepdims=True))))
    worse = (-(-pages // np.maximum(1, even)) > each).any(-1, keepdims=True) | (even.sum(-1, keepdims=True) > most)
    return np.where(worse, shares, even)


def _parts(shares: np.ndarray) -> np.ndarray:
    """The first part of each row, and how many there are."""
    out = np.zeros((*shares.shape[:-1], shares.shape[-1] + 1), dtype=np.int32)
    np.cumsum(shares, -1, out=out[..., 1:])
    return out


def _waves(packed: np.ndarray, shares: np.ndarray, once: int) -> np.ndarray:
    """How long rows take that have so many programs, in pages: of more programs than `once`, the last begin when others
    end, the largest of them at any time."""
    parts, largest = shares.sum(-1, keepdims=True), (-(-packed // np.maximum(1, shares))).max(-1, keepdims=True)
    all_at_once = (packed.sum(-1, keepdims=True) + parts * OPENING) / once
    return np.where(parts > once, all_at_once + largest / 2, largest)


def in_turn(pages: np.ndarray, once: int) -> np.ndarray:
    """Rows one after the other, cut into `once` programs of the same length: the first part of each row and how many
    there are, and where each row begins and all end, int32 `[..., 2, rows + 1]`.

    pages: `[..., rows]`. A row is as long as it has pages, and `OPENING`. A program's length is what all take, divided
    by `once` and rounded up; it leaves a part of each row of which it has pages.
    """
    ends = np.cumsum(np.where(pages > 0, pages + OPENING, 0), -1)
    begins = np.concatenate([np.zeros_like(ends[..., :1]), ends], -1)
    length = np.maximum(1, -(-begins[..., -1:] // once))
    first, last = begins[..., :-1] // length, (begins[..., :-1] + pages - 1) // length
    out = np.zeros((*pages.shape[:-1], 2, pages.shape[-1] + 1), dtype=np.int32)
    np.cumsum(np.where(pages > 0, last - first + 1, 0), -1, out=out[..., 0, 1:])
    out[..., 1, :] = begins
    return out


def searched(rows: int) -> int:
    """How many starts a program that looks for its row reads at a time, a power of two whose square is `rows` or more:
    of thousands of rows, all starts would be more than the pages of a program."""
    return 1 << max(min((rows - 1).bit_length(), 8), -(-(rows - 1).bit_length() // 2))
