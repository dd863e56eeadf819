"""KIVI's pages in the blocks of a serving engine (vLLM), in plain PyTorch: what the kernels must equal bit for bit.

The engine owns two memories of a layer, int8 `[blocks, kv_heads, states, bytes]`, a state being a page:

packed   pages of `Form.tokens` tokens, `Form.nbytes` bytes each
exact    pages of 32 tokens: keys `[32, head_dim]`, then values, in the model's dtype

and a table of blocks for each: int32 `[requests, columns]`, column c of which has the tokens from c * states * (tokens
of a page) on. A request has `lengths` tokens. Tokens lie in the exact memory until the group of 32 is full; then it is
packed, so what is packed is always whole groups of the text from its beginning, and requests that begin alike may share
it.

What is read packed is `[0, start)`, start being the tokens known before this step less the residual, in whole groups;
the rest is read exactly. Where the exact table has the null block, which is the engine's word for none, the group is
read packed too (what a prefix hit brought).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fivefold.kernels.pack import reference as pack
from fivefold.kernels.packed_decode.reference import Form, decode_page
from fivefold.kernels.packed_decode.schedule import PAGE, SPAN, TILE

NULL = 0
"""The block that stands in a table where a request holds none."""
UNIT = 16
"""Addresses and strides are counted in so many bytes."""


@dataclass(frozen=True)
class Place:
    """How the pages of a layer lie in memory `[blocks, kv_heads, pages, bytes]`: page p of block b and head h is at
    `base + b * block + h * head + p * page`, in units of 16 bytes. pages: of a block."""

    base: int
    block: int
    head: int
    page: int
    pages: int

    @classmethod
    def of(cls, memory: torch.Tensor) -> Place:
        steps = [x * memory.element_size() for x in memory.stride()[:3]]
        assert memory.stride(3) == 1 and not any(x % UNIT for x in (memory.data_ptr(), *steps)), (memory.shape, steps)
        block, head, page = (x // UNIT for x in steps)
        return cls(memory.data_ptr() // UNIT, block, head, page, memory.shape[2])


@dataclass(frozen=True)
class Blocks:
    """The memory of a layer for one kind of pages, int8 `[blocks, kv_heads, pages, bytes]` (its last axis contiguous,
    the strides of the others multiples of 16), and the table of blocks, int32 `[requests, columns]`."""

    memory: torch.Tensor
    table: torch.Tensor

    @property
    def place(self) -> Place:
        return Place.of(self.memory)

    def find(self, request: int, page: int) -> tuple[int, int]:
        """Block of a page of a request, and the page's number in it."""
        pages = self.memory.shape[2]
        return int(self.table[request, page // pages]), page % pages

    def view(self, request: int, page: int) -> torch.Tensor:
        """A page of every KV head, int8 `[kv_heads, bytes]`."""
        block, number = self.find(request, page)
        return self.memory[block, :, number]

    def addresses(self, request: int, page: int) -> torch.Tensor:
        """Of a page of every KV head, from the base: int64 `[kv_heads]`."""
        (block, number), place = self.find(request, page), self.place
        return block * place.block + torch.arange(self.memory.shape[1]) * place.head + number * place.page


@dataclass(frozen=True)
class Tables:
    """What `packed_decode.decode` takes, a row for each KV head of each request; all layers share it.

    packed: int64 `[requests * kv_heads, columns]`, exact: int64 `[requests * kv_heads, columns, 2]`, addresses in units
    of 16 bytes from the base of the layer's memory; spans: int32 `[requests * kv_heads, SPAN]`; starts: int32
    `[2, requests * kv_heads + 1]`, the work lists. What no span shows may be anything.
    """

    packed: torch.Tensor
    exact: torch.Tensor
    spans: torch.Tensor
    starts: torch.Tensor


def exact_columns(residual: int) -> int:
    """Exact pages that a step of one token sees, at most."""
    return -(-residual // PAGE) + 1


def seen_from(known: int, residual: int) -> int:
    """The first token that is read exactly, if so many were known before this step."""
    return max(0, known - residual) // PAGE * PAGE


def sides(page: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """An exact page int8 `[kv_heads, bytes]` as `[kv_heads, 2, 32, head_dim]`, a view."""
    return page[:, : 2 * PAGE * head_dim * dtype.itemsize].view(dtype).unflatten(1, (2, PAGE, head_dim))


def append_reference(keys: torch.Tensor, values: torch.Tensor, exact: Blocks, slots: torch.Tensor) -> None:
    """Write new tokens `[tokens, kv_heads, head_dim]` where `slots [tokens]` says: block * tokens of a block + token;
    negative ones nowhere."""
    span = exact.memory.shape[2] * PAGE
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page = sides(exact.memory[slot // span, :, slot % span // PAGE], keys.shape[2], keys.dtype)
            page[:, 0, slot % PAGE], page[:, 1, slot % PAGE] = keys[token], values[token]


def pack_reference(
    form: Form,
    keys: torch.Tensor,
    values: torch.Tensor,
    packed: Blocks,
    exact: Blocks,
    pages: torch.Tensor,
) -> None:
    """Pack the groups that this step's new tokens `[tokens, kv_heads, head_dim]` make full.

    pages: int32 `[n, 5]`, each with a request (none if negative), a page of it, its first new token among all, the
    tokens that it had before, and those that it has.
    """
    dim = form.head_dim
    for request, page, begin, known, length in pages.tolist():
        if request < 0:
            continue
        end = begin + length - known
        first = max(known // PAGE * PAGE, page * form.tokens)
        last = min(length // PAGE * PAGE, (page + 1) * form.tokens)
        if first >= last:
            continue
        both = torch.stack([keys[begin:end], values[begin:end]], 1)[max(0, first - known) : last - known]
        both = both.permute(2, 1, 0, 3)  # [kv_heads, 2, tokens, dim]
        if first < known:
            old = sides(exact.view(request, first // PAGE), dim, keys.dtype)[:, :, : known - first]
            both = torch.cat([old, both], 2)
        slot = first - page * form.tokens
        memory = packed.view(request, page)
        fields = pack.fields_of(form, memory[:, : form.nbytes].view(torch.int16))
        made = pack.pack_reference(form, both[:, 0], both[:, 1], slot, fields if slot else None)
        for field, new in zip(fields, made):
            field.copy_(new)


def tables_reference(
    form: Form,
    packed: Blocks,
    exact: Blocks,
    dtype: torch.dtype,
    lengths: torch.Tensor,
    residual: int,
    programs: tuple[int, int],
    columns: int,
) -> Tables:
    """The tables of requests that have one new token each (or no token at all). columns: of `Tables.packed`."""
    heads, requests = packed.memory.shape[1], len(lengths)
    table = torch.zeros((requests, heads, columns), dtype=torch.int64)
    slots = torch.zeros((requests, heads, exact_columns(residual), 2), dtype=torch.int64)
    spans = torch.zeros((requests, heads, SPAN), dtype=torch.int32)
    pages = np.zeros((2, requests), dtype=np.int64)
    for request, length in enumerate(lengths.tolist()):
        start, left_out = seen_from(length - 1, residual), 0
        for column, token in enumerate(range(start, length, PAGE)):
            slots[request, :, column, 0] = exact.addresses(request, token // PAGE)
            left_out += PAGE * (exact.find(request, token // PAGE)[0] == NULL)
        for page in range(-(-(start + left_out) // form.tokens)):
            table[request, :, page] = packed.addresses(request, page)
        spans[request, :, 1], spans[request, :, 3] = start + left_out, left_out
        spans[request, :, 4] = length - start
        # As many packed pages as there are at most.
        seen = -(-seen_from(length - 1, 0) // form.tokens), length - start
        pages[:, request] = (seen[0] - (-seen[1] // PAGE), 0) if programs[1] == 0 else (seen[0], -(-seen[1] // TILE))
    slots[..., 1] = slots[..., 0] + PAGE * form.head_dim * dtype.itemsize // UNIT
    starts = np.stack([starts_reference(pages[kind], heads, programs[kind]) for kind in range(2)])
    return Tables(table.flatten(0, 1), slots.flatten(0, 1), spans.flatten(0, 1), torch.from_numpy(starts))


def gather_reference(
    form: Form,
    packed: Blocks,
    exact: Blocks,
    dtype: torch.dtype,
    request: int,
    first: int,
    last: int,
    start: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[last - first, kv_heads, head_dim]` of tokens of a request: packed ones below `start`, and where
    there is no exact block. first: a multiple of 32."""
    parts = []
    for token in range(first, last, PAGE):
        if token < start or exact.find(request, token // PAGE)[0] == NULL:
            record = packed.view(request, token // form.tokens)[:, : form.nbytes].contiguous().view(torch.int16)
            inside = token % form.tokens
            decoded = decode_page(form, pack.fields_of(form, record), dtype)
            both = torch.stack([x[:, inside : inside + PAGE] for x in decoded], 1)
        else:
            both = sides(exact.view(request, token // PAGE), form.head_dim, dtype)
        parts.append(both[:, :, : last - token])
    keys, values = torch.cat(parts, 2).transpose(0, 1).transpose(1, 2)
    return keys, values


def starts_reference(pages: np.ndarray, heads: int, programs: int) -> np.ndarray:
    """A work list as `schedule.starts_of` has it, int32 `[requests * heads + 1]`, of requests whose KV heads each have
    `pages [requests]`: as few pages a program as `programs` programs allow, and those that are left go to the requests
    by their pages."""
    total = int(pages.sum()) * heads
    low, high = max(1, -(-total // max(1, programs))), max(1, int(pages.max(initial=0)))
    while low < high:
        middle = (low + high) // 2
        fits = int((-(-pages // middle)).sum()) * heads <= programs
        low, high = (low, middle) if fits else (middle + 1, high)
    shares = -(-pages // low)
    even = np.minimum(pages, np.maximum(1, pages * programs // max(1, total)))
    if (-(-pages // np.maximum(1, even)) <= low).all() and int(even.sum()) * heads <= programs:
        shares = even
    return np.concatenate([[0], np.repeat(shares, heads).cumsum()]).astype(np.int32)
