"""A layer of `rotatekv` on a CPU: the codec that packs pages in transformers, over vLLM's blocks. It needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fivefold.attention.decode import MASKED, softmax_
from fivefold.attention.merge import merge
from fivefold.methods import Codec
from fivefold.methods.bits.rotatekv import RotateCodec
from fivefold.serving.vllm.cpu import CpuPath, _at
from fivefold.serving.vllm.options import PAGE, Pages
from fivefold.serving.vllm.rotated import RotatedForm
from fivefold.store import Context
from fivefold.store.context import running

Part = tuple[torch.Tensor, torch.Tensor]
TOGETHER = 1 << 16
"""Packed tokens that decoding requests read at a time: bounds the memory of a step."""


class RotatedPath(CpuPath):
    """See `backend.Path`. codecs: of the model's layers."""

    codec: RotateCodec

    def __init__(self, pages: Pages, codecs: Sequence[RotateCodec]) -> None:
        super().__init__(pages)
        assert isinstance(pages.form, RotatedForm)
        self.form, self.codecs = pages.form, codecs
        self.compiled = True  # by the codec, where there is a compiler

    def forward(self, shared: Any, impl: Any, *rest: Any) -> None:
        self.codec = self.codecs[impl.number]
        super().forward(shared, impl, *rest)

    def _of(self, heads: int, first: int, stop: int, requests: int = 1) -> Codec:
        """The codec on pages that hold the tokens first..stop of all heads."""
        context = Context((*range(heads),) * requests, heads, running(first, stop, torch.device("cpu")))
        return self.codec.of(context)

    # -- decoding ---------------------------------------------------------------------------------------------

    def _decode(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: torch.Tensor, exact: torch.Tensor,
        step: Any, scale: float,
    ) -> torch.Tensor:  # fmt: skip
        count, kv_heads = key.shape[:2]
        rows = query.float().unflatten(1, (kv_heads, -1)) * scale  # [requests, kv_heads, heads, head_dim]
        # Of each request: tokens that are read packed, exact slots that are read, and the position of slot 0.
        seen, first, last = step.tables.spans[: count * kv_heads : kv_heads, [1, 3, 4]].long().unbind(1)
        start = seen - first
        newest, tokens = start + last - 1, self._tokens(exact)
        block, state = _exact_pages(exact, step.exact_blocks[:count], newest[:, None] // PAGE)
        tokens[block[:, 0], :, state[:, 0], :, newest % PAGE] = torch.stack([key, value], 2)
        for i in ((newest + 1) % PAGE == 0).nonzero()[:, 0].tolist():
            group = tokens[block[i, 0], :, state[i, 0]].transpose(0, 1)
            self._pack_pages(group, int(newest[i]) + 1 - PAGE, 1, packed, step.packed_blocks[i])
        columns = start[:, None] // PAGE + torch.arange(self.pages.columns)
        block, state = _exact_pages(exact, step.exact_blocks[:count], columns)
        held = tokens[block, :, state].permute(3, 0, 2, 1, 4, 5).flatten(3, 4)  # [2, requests, kv_heads, slots, dim]
        slots = torch.arange(held.shape[3])
        there = ((slots >= first[:, None]) & (slots < last[:, None]))[:, None, :, None]
        keys, values = (x.float().masked_fill(~there, 0) for x in held)
        scores = (rows @ keys.transpose(2, 3)).masked_fill(~there.transpose(2, 3), MASKED)
        lse = softmax_(scores)
        parts = [(scores @ values, lse)]
        if int(seen.max()):
            parts.append(self._packed_of(rows, seen, packed, step.packed_blocks[:count]))
        return merge(parts)[0].to(query.dtype).flatten(1, 2)

    def _packed_of(self, rows: torch.Tensor, seen: torch.Tensor, packed: torch.Tensor, blocks: torch.Tensor) -> Part:
        """Attention over the first `seen [requests]` tokens packed. rows: scaled queries `[requests, kv_heads, heads,
        head_dim]`."""
        size, some = self.form.tokens, max(1, TOGETHER // max(1, int(seen.max())))
        if some < len(rows):
            each = zip(*(x.split(some) for x in (rows, seen, blocks)))
            made = [self._packed_of(x, y, packed, z) for x, y, z in each]
            return torch.cat([out for out, _ in made]), torch.cat([lse for _, lse in made])
        pages = max(1, -(-int(seen.max()) // size))
        page = torch.arange(pages)
        records = packed[blocks[:, page // packed.shape[2]].long(), :, page % packed.shape[2]].transpose(1, 2)
        there = (torch.arange(pages * size) < seen[:, None])[:, None]  # [requests, 1, tokens]
        fields = self.form.read(records)
        for name in ("value_scale", "value_zero"):  # numbers of no token may be none, and count nothing
            lanes = there.view(len(rows), 1, pages, -1, 1, 32)
            fields[name] = fields[name].masked_fill(~lanes, 0)
        fields = {name: x.flatten(0, 1) for name, x in fields.items()}
        codec = self._of(rows.shape[1], 0, pages * size, len(rows))
        scores = codec.scores(rows.flatten(0, 1), fields).view(*rows.shape[:3], -1)
        scores.masked_fill_(~there[:, None], MASKED)
        lse = softmax_(scores)
        return codec.output(scores.flatten(0, 1), fields).view(rows.shape), lse

    # -- pages ------------------------------------------------------------------------------------------------

    def _decoded(self, packed: torch.Tensor, blocks: torch.Tensor, first: int, stop: int, dtype: torch.dtype) -> Part:
        heads, size = packed.shape[1], self.form.tokens
        block, state = _at(packed, blocks, first // size, -(-stop // size))
        fields = self.form.read(packed[block, :, state].transpose(0, 1).flatten(0, 1))
        found = self._of(heads, first, first + len(block) * size).decode(fields)
        keys, values = (x.reshape(heads, -1, self.form.head_dim)[:, : stop - first].to(dtype) for x in found)
        return keys, values

    def _pack_pages(
        self, tokens: torch.Tensor, first: int, count: int, packed: torch.Tensor, blocks: torch.Tensor
    ) -> None:
        form, heads = self.form, tokens.shape[1]
        block, state = _at(packed, blocks, first // form.tokens, first // form.tokens + count)
        slot, opened = first % form.tokens, None
        if slot:
            opened = form.read(packed[block, :, state].transpose(0, 1).flatten(0, 1))
        keys, values = (x.unflatten(1, (count, -1)).flatten(0, 1) for x in tokens)
        codec = self._of(heads, first, first + tokens.shape[2])
        made = form.records(codec.encode(keys, values, slot, opened))
        packed[block, :, state] = made.unflatten(0, (heads, count)).transpose(0, 1)


def _exact_pages(exact: torch.Tensor, blocks: torch.Tensor, pages: torch.Tensor) -> Part:
    """Blocks of exact pages `[requests, n]`, by their numbers in the text, and their numbers in these."""
    columns = (pages // exact.shape[2]).clamp_max(blocks.shape[1] - 1)
    return blocks.gather(1, columns).long(), pages % exact.shape[2]
