"""How what is stored is cut for the chunks of a prompt: what attention does, and the planner predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

# cuDNN plans 45 to 70 ms for a new shape, on an H100, and then takes about half of FlashAttention 2's time: a model of
# 32 layers has that back from its first prompt if an attention is of so many operations.
CUDNN_OPERATIONS = 1 << 40
# ... and from so many on, if attention of that shape comes again with nearly every chunk.
RECURRING_OPERATIONS = 1 << 37
KEY_NUMBERS = 1 << 25
"""Numbers of stored keys that a chunk attends to at a time on a GPU."""
CHUNK_STEP = 256
"""Chunks of a multiple of so many tokens are taken to come again."""


def by_itself(each: float, chunk: int) -> bool:
    """Whether a chunk is attended on by itself, by cuDNN, and not together with what is stored. each: operations of a
    pair of tokens, of which a causal mask leaves half."""
    return chunk % CHUNK_STEP == 0 and each * chunk * (chunk // 2) >= RECURRING_OPERATIONS


def halved(most: int, page: int, worth: Callable[[int], bool]) -> list[int]:
    """Tokens of the blocks that are attended on at a time, the largest first: `most`, and halves of that, in whole
    pages, while so many tokens are worth it."""
    sizes = [max(1, most // page)]
    while sizes[-1] > 1 and worth(sizes[-1] // 2 * page):
        sizes.append(sizes[-1] // 2)
    return [size * page for size in sizes]


def blocks(columns: int, whole: int, page: int, sizes: Sequence[int], large: int) -> Iterator[tuple[int, int]]:
    """First and last column of the blocks of `columns` pages, the first `whole` of which are full: of the first of
    these sizes, then all that is left if that is `large` tokens, else of the other sizes while they fit."""
    first, most = 0, sizes[0] // page
    while first < columns:
        size = next((size // page for size in sizes if first + size // page <= whole), most)
        last = min(first + (most if (columns - first) * page >= large else size), columns)
        yield first, last
        first = last
