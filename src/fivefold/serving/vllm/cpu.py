"""A layer on a CPU: decoding requests in one call of the C++ kernel, prefills one by one. It needs no vLLM."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fivefold.attention.merge import attend, merge
from fivefold.errors import NonFiniteError
from fivefold.kernels.choice import choose
from fivefold.kernels.pack import cpu as packing
from fivefold.kernels.pack import pack_pages
from fivefold.kernels.pack.reference import fields_of
from fivefold.kernels.packed_decode import cpu as decoding
from fivefold.kernels.packed_decode import decode_page
from fivefold.serving.vllm.options import PAGE, Pages
from fivefold.serving.vllm.tables import NULL, Place, Prefill

BLOCK = 2048
"""Packed tokens that a prefill decodes at a time."""
LARGEST = torch.finfo(torch.float16).max


class Chunk(NamedTuple):
    """What a prefill reads exactly, `[2, kv_heads, tokens, head_dim]`: `held` tokens, of which the first stands at
    position `start`, and behind them the new ones."""

    recent: torch.Tensor
    start: int
    held: int


class CpuPath:
    """See `backend.Path`. Without a C++ compiler everything goes the way of a prefill, in plain PyTorch."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.compiled = choose(torch.device("cpu")).path == "cpp"

    def prepare(self, step: Any) -> None:
        pass

    def forward(
        self, shared: Any, impl: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        packed: torch.Tensor, exact: torch.Tensor, step: Any, output: torch.Tensor,
    ) -> None:  # fmt: skip
        decodes, prefills = step.decodes, step.prefills
        if not self.compiled:
            lengths = step.tables.spans[: decodes * impl.num_kv_heads : impl.num_kv_heads, [1, 3, 4]].tolist()
            before = [Prefill(i, i, i + 1, p - e + n - 1) for i, (p, e, n) in enumerate(lengths)]
            decodes, prefills = 0, [*before, *prefills]
        # All packing comes before any reading: a request may have hit a block that another one fills in this very step.
        chunks = []
        for one in prefills:
            tables = step.packed_blocks[one.number], step.exact_blocks[one.number]
            chunk = self._gather(key[one.first : one.last], value[one.first : one.last], exact, tables[1], one.known)
            self._pack(chunk, one.known, packed, tables[0])
            chunks.append((one, chunk, *tables))
        if decodes:
            now = slice(0, decodes)
            output[now] = self._decode(query[now], key[now], value[now], packed, exact, step, impl.scale)
        for one, chunk, packed_blocks, exact_blocks in chunks:
            tokens = slice(one.first, one.last)
            output[tokens] = self._attend(query[tokens], chunk, packed, packed_blocks, impl.scale)
            self._leave(chunk, exact, exact_blocks)

    def _decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: torch.Tensor, exact: torch.Tensor,
        step: Any, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        """A token of each request: append it, pack the groups that are complete now, and attend over all tiers."""
        tables, form, dtype = step.tables, self.pages.form, self.pages.dtype
        count, heads, dim = query.shape
        kv_heads = key.shape[1]
        rows = slice(0, count * kv_heads)
        packed_base, exact_base = Place.of(packed).base, Place.of(exact).base
        spans = tables.spans[rows]
        there = decoding.Exact(tables.exact[rows] + exact_base, dtype)
        keys, values = (x.reshape(count * kv_heads, dim).contiguous() for x in (key, value))
        decoding.append(keys, values, spans, there)
        if step.completes:
            due = (tables.due[rows, 1] >= 0).nonzero()[:, 0]
            places = tables.due[rows][due]
            places[:, 0] += packed_base
            peak = packing.pack_exact(form, (tables.sources[rows][due] + exact_base).contiguous(), places, dtype)
            _check(float(peak.max()) if len(peak) else 0.0)
        columns = max(1, -(-step.longest // form.tokens))
        pages = decoding.Packed(tables.packed[rows, :columns] + packed_base, form)
        queries = query.reshape(count * kv_heads, heads // kv_heads, dim).contiguous()
        out, _ = decoding.decode(queries, scale, spans, pages, there)
        return out.view(count, heads, dim)

    def _attend(
        self, query: torch.Tensor, chunk: Chunk, packed: torch.Tensor, blocks: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """A chunk over what is packed before it, what is exact, and itself."""
        form, kv_heads = self.pages.form, chunk.recent.shape[1]
        shared_by = query.shape[1] // kv_heads
        queries = query.transpose(0, 1).unflatten(0, (kv_heads, shared_by))
        parts, step = [], BLOCK // form.tokens * form.tokens
        for first in range(0, chunk.start, step):
            k, v = self._decoded(packed, blocks, first, min(chunk.start, first + step), query.dtype)
            parts.append(attend(queries, _spread(k, shared_by), _spread(v, shared_by), scale))
        for tokens, own in ((chunk.recent[:, :, : chunk.held], False), (chunk.recent[:, :, chunk.held :], True)):
            if tokens.shape[2]:
                k, v = (_spread(x, shared_by) for x in tokens)
                parts.append(attend(queries, k, v, scale, causal=own))
        return merge(parts)[0].to(query.dtype).flatten(0, 1).transpose(0, 1)

    # -- exact tokens -------------------------------------------------------------------------------------

    def _tokens(self, exact: torch.Tensor) -> torch.Tensor:
        """Exact blocks as `[blocks, kv_heads, pages, 2, 32, head_dim]` of numbers."""
        return exact.view(self.pages.dtype).unflatten(3, (2, PAGE, self.pages.form.head_dim))

    def _gather(
        self, key: torch.Tensor, value: torch.Tensor, exact: torch.Tensor, blocks: torch.Tensor, known: int
    ) -> Chunk:
        """A copy of what is read exactly: exact tokens of a request that has `known` ones, from later on where a prefix
        hit left some out, and the new ones."""
        start = self.pages.packed(known)
        block, state = _at(exact, blocks, start // PAGE, -(-known // PAGE))
        there = (block != NULL).nonzero()[:, 0]
        left = int(there[0]) if len(there) else len(block)
        start = min(known, start + left * PAGE)
        found = self._tokens(exact)[block[left:], :, state[left:]]  # [pages, kv_heads, 2, 32, dim]
        held = found.permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, : known - start]
        return Chunk(torch.cat([held, torch.stack([key, value]).transpose(1, 2)], 2), start, known - start)

    def _leave(self, chunk: Chunk, exact: torch.Tensor, blocks: torch.Tensor) -> None:
        """Write what the next step reads exactly."""
        length = chunk.start + chunk.recent.shape[2]
        first = max(chunk.start, self.pages.packed(length))
        if first >= length:
            return
        kept = torch.nn.functional.pad(chunk.recent[:, :, first - chunk.start :], (0, 0, 0, -(length - first) % PAGE))
        block, state = _at(exact, blocks, first // PAGE, -(-length // PAGE))
        self._tokens(exact)[block, :, state] = kept.unflatten(2, (-1, PAGE)).permute(2, 1, 0, 3, 4)

    # -- packed tokens ------------------------------------------------------------------------------------

    def _decoded(
        self, packed: torch.Tensor, blocks: torch.Tensor, first: int, stop: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Packed tokens first..stop, `[kv_heads, tokens, head_dim]` each; first is the beginning of a page."""
        form = self.pages.form
        block, state = _at(packed, blocks, first // form.tokens, -(-stop // form.tokens))
        records = packed[block, :, state].transpose(0, 1)  # [kv_heads, pages, bytes]
        heads, count = records.shape[:2]
        fields = fields_of(form, records.flatten(0, 1).contiguous().view(torch.int16))
        keys, values = decode_page(form, fields, dtype)
        return tuple(x.view(heads, count * form.tokens, -1)[:, : stop - first] for x in (keys, values))  # type: ignore[return-value]

    def _pack(self, chunk: Chunk, known: int, packed: torch.Tensor, blocks: torch.Tensor) -> None:
        """Pack the groups that tokens behind `known` complete: the rest of a page that is begun, whole pages, and the
        beginning of another."""
        form, recent, at = self.pages.form, chunk.recent, chunk.start
        first, stop = known // form.group * form.group, (at + recent.shape[2]) // form.group * form.group
        while first < stop:
            slot = first % form.tokens
            whole = 1 if slot or stop - first < form.tokens else (stop - first) // form.tokens
            last = min(stop, first - slot + whole * form.tokens)
            self._pack_pages(recent[:, :, first - at : last - at], first, whole, packed, blocks)
            first = last

    def _pack_pages(
        self, tokens: torch.Tensor, first: int, count: int, packed: torch.Tensor, blocks: torch.Tensor
    ) -> None:
        """Tokens `[2, kv_heads, tokens, head_dim]` from position `first` on into `count` pages."""
        form, heads = self.pages.form, tokens.shape[1]
        block, state = _at(packed, blocks, first // form.tokens, first // form.tokens + count)
        slot = first % form.tokens
        if not self.compiled:
            old = packed[block, :, state].transpose(0, 1).flatten(0, 1).contiguous().view(torch.int16)
            keys, values = (x.unflatten(1, (count, -1)).flatten(0, 1) for x in tokens)
            _check(float(tokens.float().abs().amax()))
            made = pack_pages(form, keys, values, slot, fields_of(form, old) if slot else None)
            for field, new in zip(fields_of(form, old), made):
                field.copy_(new)
            packed[block, :, state] = old.view(torch.int8).unflatten(0, (heads, count)).transpose(0, 1)
            return
        tokens = tokens.contiguous()
        planes = tokens.shape[2] // count // PAGE
        size = tokens.element_size() * PAGE * form.head_dim // 16
        page = torch.arange(heads * count * planes).view(heads * count, planes) * size
        side = heads * count * planes * size
        sources = (torch.stack([page, page + side], -1) + tokens.data_ptr() // 16).contiguous()
        where = Place.of(packed)
        places = where.base + block * where.block + state * where.page
        places = (torch.arange(heads)[:, None] * where.head + places).flatten()
        places = torch.stack([places, torch.full_like(places, slot // PAGE)], -1).contiguous()
        _check(float(packing.pack_exact(form, sources, places, self.pages.dtype).max()))


def _at(cache: torch.Tensor, blocks: torch.Tensor, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where pages first..last of a request are: their blocks, and their numbers in these."""
    page = torch.arange(first, last)
    return blocks[page // cache.shape[2]].long(), page % cache.shape[2]


def _check(peak: float) -> None:
    if not peak <= LARGEST:
        raise NonFiniteError(
            f"keys or values reach {peak:g}, and packed pages hold finite numbers up to {LARGEST:.0f}: serve the model "
            "in another --dtype, or without a recipe."
        )


def _spread(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`[kv_heads, tokens, head_dim]` seen by every query head of a KV head, without a copy."""
    return x[:, None].expand(-1, heads, -1, -1)
