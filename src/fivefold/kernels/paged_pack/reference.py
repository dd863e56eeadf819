"""KIVI's pages in the blocks of a serving engine (vLLM), in plain PyTorch: what the kernels must equal bit for bit.

The engine owns two memories of a layer, int8 `[blocks, kv_heads, states, bytes]`, a state being a page:

packed   pages of `Form.tokens` tokens, `Form.nbytes` bytes each
exact    pages of 32 tokens: keys `[32, head_dim]`, then values, in the model's dtype

and a table of blocks for each: int32 `[requests, columns]`, column c of which has the tokens from c * states * (tokens of
a page) on. A request has `lengths` tokens, of which those from `query_starts[r]` to `query_starts[r + 1]` of this step's
are new. Tokens lie in the exact memory until the group of 32 is full; then it is packed, so what is packed is always
whole groups of the text from its beginning, and may be shared by requests that begin alike.

What is read packed is `[0, start)`, start being the tokens known before this step less the residual, in whole groups; the
rest is read exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fivefold.kernels.pack import reference as pack
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import PAGE, SPAN, TILE


@dataclass(frozen=True)
class Blocks:
    """The memory of a layer for one kind of pages, int8 `[blocks, kv_heads, states, bytes]` (the last axis is
    contiguous, the strides of the others multiples of 16), and the table of blocks, int32 `[requests, columns]`."""

    memory: torch.Tensor
    table: torch.Tensor

    @property
    def states(self) -> int:
        return self.memory.shape[2]

    @property
    def base(self) -> int:
        """Where the memory begins, in units of 16 bytes."""
        return self.memory.data_ptr() // 16

    def place(self, request: int, page: int) -> tuple[int, int]:
        """Block and state of a page of a request."""
        return int(self.table[request, page // self.states]), page % self.states

    def view(self, request: int, page: int) -> torch.Tensor:
        """A page of every KV head, int8 `[kv_heads, bytes]`."""
        block, state = self.place(request, page)
        return self.memory[block, :, state]


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
    return max(0, (known - residual) // PAGE * PAGE)


def sides(page: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """An exact page int8 `[kv_heads, bytes]` as `[kv_heads, 2, 32, head_dim]`, a view."""
    return page[:, : 2 * PAGE * head_dim * dtype.itemsize].view(dtype).unflatten(1, (2, PAGE, head_dim))


def append_reference(keys: torch.Tensor, values: torch.Tensor, exact: Blocks, slots: torch.Tensor) -> None:
    """Write new tokens `[tokens, kv_heads, head_dim]` where `slots [tokens]` says: block * tokens of a block + token;
    negative ones nowhere."""
    span = exact.states * PAGE
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
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    pages: torch.Tensor,
) -> None:
    """Pack the groups that this step's new tokens `[tokens, kv_heads, head_dim]` make full, of the pages int32
    `[n, 2]` that are named: a request, and a page of it. Negative requests are none."""
    dim = form.head_dim
    for request, page in pages.tolist():
        if request < 0:
            continue
        begin, end = query_starts[request : request + 2].tolist()
        length = int(lengths[request])
        known = length - (end - begin)
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
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    residual: int,
    decodes: int,
    programs: tuple[int, int],
    columns: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`Tables.packed` of `columns` columns, `spans` and `starts`. Only the first `decodes` requests get work; the others
    have their packed pages in the table, for what is read of them otherwise."""
    memory, heads, requests = packed.memory, packed.memory.shape[1], len(lengths)
    table = torch.zeros((requests, heads, columns), dtype=torch.int64)
    spans = torch.zeros((requests, heads, SPAN), dtype=torch.int32)
    pages = np.zeros((2, requests), dtype=np.int64)
    for request, length in enumerate(lengths.tolist()):
        begin, end = query_starts[request : request + 2].tolist()
        start = seen_from(length - (end - begin), residual)
        for page in range(-(-start // form.tokens)):
            block, state = packed.place(request, page)
            first = block * memory.stride(0) + state * memory.stride(2)
            table[request, :, page] = (first + torch.arange(heads) * memory.stride(1)) // 16
        if request < decodes:
            spans[request, :, 1], spans[request, :, 4] = start, length - start
            seen = -(-start // form.tokens), length - start
            joined = programs[1] == 0
            pages[:, request] = (seen[0] - (-seen[1] // PAGE), 0) if joined else (seen[0], -(-seen[1] // TILE))
    starts = [starts_reference(pages[kind], heads, programs[kind]) for kind in range(2)]
    return table.flatten(0, 1), spans.flatten(0, 1), torch.from_numpy(np.stack(starts))


def exact_tables_reference(
    exact: Blocks,
    head_dim: int,
    dtype: torch.dtype,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    residual: int,
) -> torch.Tensor:
    """`Tables.exact`."""
    memory, heads, requests = exact.memory, exact.memory.shape[1], len(lengths)
    table = torch.zeros((requests, heads, exact_columns(residual), 2), dtype=torch.int64)
    for request, length in enumerate(lengths.tolist()):
        begin, end = query_starts[request : request + 2].tolist()
        start = seen_from(length - (end - begin), residual)
        for column, token in enumerate(range(start, length, PAGE)[: table.shape[2]]):
            block, state = exact.place(request, token // PAGE)
            first = (block * memory.stride(0) + state * memory.stride(2) + torch.arange(heads) * memory.stride(1)) // 16
            table[request, :, column, 0] = first
            table[request, :, column, 1] = first + PAGE * head_dim * dtype.itemsize // 16
    return table.flatten(0, 1)


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
