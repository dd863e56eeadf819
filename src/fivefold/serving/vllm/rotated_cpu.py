"""A layer of `rotatekv` on a CPU, request by request: the codec that packs pages in transformers, over vLLM's blocks.
It needs no vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fivefold.attention.decode import MASKED, softmax_
from fivefold.kernels.choice import takes_cpp
from fivefold.methods import Codec
from fivefold.methods.bits.rotatekv import RotateCodec
from fivefold.serving.vllm.cpu import CpuPath, _at
from fivefold.serving.vllm.options import Pages
from fivefold.serving.vllm.rotated import RotatedForm
from fivefold.store import Context
from fivefold.store.context import running


class RotatedPath(CpuPath):
    """See `backend.Path`. codecs: of the model's layers."""

    codec: RotateCodec

    def __init__(self, pages: Pages, codecs: Sequence[RotateCodec]) -> None:
        super().__init__(pages)
        assert isinstance(pages.form, RotatedForm)
        self.form, self.codecs, self.compiled = pages.form, codecs, False

    def forward(self, shared: Any, impl: Any, *rest: Any) -> None:
        self.codec = self.codecs[impl.number]
        super().forward(shared, impl, *rest)

    def _of(self, heads: int, first: int, stop: int) -> Codec:
        """The codec on pages that hold the tokens first..stop of all heads."""
        return self.codec.of(Context(tuple(range(heads)), heads, running(first, stop, torch.device("cpu"))))

    def _read(
        self, packed: torch.Tensor, blocks: torch.Tensor, first: int, stop: int
    ) -> tuple[Codec, dict[str, torch.Tensor]]:
        """The pages that tokens first..stop lie in, fields `[kv_heads, pages, *shape]`; first begins one."""
        size = self.form.tokens
        block, state = _at(packed, blocks, first // size, -(-stop // size))
        codec = self._of(packed.shape[1], first, first + len(block) * size)
        return codec, self.form.read(packed[block, :, state].transpose(0, 1))

    def _packed_parts(
        self, queries: torch.Tensor, packed: torch.Tensor, blocks: torch.Tensor, stop: int, scale: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        rows = queries.flatten(1, 2).float() * scale
        if not stop or not takes_cpp(rows):
            return super()._packed_parts(queries, packed, blocks, stop, scale)
        codec, fields = self._read(packed, blocks, 0, stop)
        scores = codec.scores(rows, fields)
        scores[:, :, stop:] = MASKED
        lse = softmax_(scores)
        out = codec.output(scores, fields)
        return [(out.view(queries.shape), lse.view(queries.shape[:3]))]

    def _decoded(
        self, packed: torch.Tensor, blocks: torch.Tensor, first: int, stop: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        codec, fields = self._read(packed, blocks, first, stop)
        found = codec.decode({name: x.flatten(0, 1) for name, x in fields.items()})
        keys, values = (x.reshape(packed.shape[1], -1, self.form.head_dim)[:, : stop - first] for x in found)
        return keys.to(dtype), values.to(dtype)

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
