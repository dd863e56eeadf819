"""What codecs that hold keys as they were before RoPE have in common, once they know whose pages they work on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fivefold.calibrate.profile import Profile
from fivefold.kernels.choice import runs_cpp
from fivefold.methods.method import Codec
from fivefold.store import Context, Rope

# Numbers of keys that are made again at a time: bounds the memory of a step.
SLICE = 1 << 20


class LearnedCodec(Codec):
    """A codec that does what a profile says, and keeps what it makes of that for heads that are packed together.

    made: tensors for the groups of heads of a `Context`, made when they are asked for.
    """

    profile: Profile
    rope: Rope
    made: dict[tuple[tuple[int, ...], ...], list[torch.Tensor]]

    @property
    def fingerprint(self) -> str:
        return self.profile.sha256

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for tensors in self.made.values() for x in tensors)

    def forget(self) -> None:
        self.made.clear()

    def compiled(self, device: torch.device) -> bool:
        return runs_cpp(device)

    def of(self, context: Context) -> Codec:
        return self.bound(context, [self])

    def stacked(self, codecs: Sequence[Any]) -> Codec:
        return _Layers(codecs)

    def bound(self, context: Context, layers: Sequence[Any]) -> Codec:
        """The codec on pages of some rows of these layers' codecs, this being the first; only to encode if these are
        several."""
        raise NotImplementedError


class _Layers(Codec):
    """Codecs of several layers, which differ in what they have `made` alone, as one that encodes."""

    def __init__(self, codecs: Sequence[LearnedCodec]) -> None:
        self.codecs, self.layout, self.group = codecs, codecs[0].layout, codecs[0].group

    def of(self, context: Context) -> Codec:
        return self.codecs[0].bound(context, self.codecs)


def stack(layers: Sequence[LearnedCodec], groups: tuple[tuple[int, ...], ...], number: int) -> torch.Tensor:
    """Tensor `number` of what each layer's codec has made for these groups of heads: `[layers, *shape]`.

    It is there once: what the codecs hold becomes part of it the first time, and is found again by where it lies.
    """
    parts = [codec.made[groups][number] for codec in layers]
    first, size = parts[0], parts[0].numel()
    memory, start = first.untyped_storage().data_ptr(), first.storage_offset()
    if all(
        x.untyped_storage().data_ptr() == memory and x.storage_offset() == start + i * size and x.is_contiguous()
        for i, x in enumerate(parts)
    ):
        return first.as_strided((len(parts), *first.shape), (size, *first.stride()), start)
    whole = torch.stack(parts)
    for codec, part in zip(layers, whole):
        codec.made[groups][number] = part
    return whole


class BeforeRope(Codec):
    """A codec on the pages of the rows of `context`."""

    codec: Any
    rope: Rope
    planes: int
    """How many stretches a page's tokens are in when it is read: those of all pages then stand together, so that
    everything done to keys is done to long rows of memory."""

    def __init__(self, codec: Any, context: Context) -> None:
        self.codec, self.context, self.rope = codec, context, codec.rope
        self.layout, self.group = codec.layout, codec.group

    def unturned(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys `[rows * pages, token, head_dim]` as they were before RoPE, channels in the paired order: float32
        `[groups, tokens, together, head_dim]`."""
        paired = self.rope.pair(self.context.join(keys.float()))
        return self.rope.rotate(paired, self.rope.phases_of(self.context).conj())

    def arranged(self, fields: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What `before` reads, from pages `[rows, pages, *shape]` or `[rows * pages, *shape]`: pages in the third
        axis."""
        raise NotImplementedError

    def before(self, parts: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Keys as `unturned` has them, as near as pages hold them, a channel's tokens in the last axes: float32
        `[groups, together * head_dim, planes, pages, tokens of a plane]`, planes as in `planes`.

        And memory of that shape that is not needed any more, if there is: two such buffers stay in the processor's
        cache where three may not.
        """
        raise NotImplementedError

    def keys(self, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Keys after RoPE of whole pages: float32 `[pages, token, head_dim]`."""
        columns = self.before(self.arranged(fields))[0].unflatten(1, (self.context.together, -1))
        turned = self.rope.rotate_columns(columns, self.rope.cos_sin_of(self.context, columns.shape[4], self.planes))
        tokens = turned[:, :, self.rope.back].permute(0, 1, 4, 3, 5, 2).contiguous()
        return tokens.view(-1, self.layout.tokens, columns.shape[2])

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        page, paired = self.layout.tokens, self.rope.pair(queries.float())
        (rows, pages), (_, query, dim) = next(iter(fields.values())).shape[:2], queries.shape
        parts, cos_sin = self.arranged(fields), self.rope.cos_sin_of(self.context, pages, self.planes)
        step = max(1, SLICE // (rows * page * dim))
        if step < pages:
            out = paired.new_empty((rows, query, pages, page))
            for first in range(0, pages, step):
                at = slice(first, first + step)
                some = {name: x[:, :, at] for name, x in parts.items()}
                out[:, :, at] = self._scores(paired, some, (cos_sin[0][:, :, :, :, at], cos_sin[1][:, :, :, :, at]))
        else:
            out = self._scores(paired, parts, cos_sin)
        return out.flatten(2)

    def _scores(
        self, paired: torch.Tensor, parts: dict[str, torch.Tensor], cos_sin: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """`scores` for queries in the paired order, of pages that make at most `SLICE` numbers: `[rows, query, pages,
        token]`."""
        columns, spare = self.before(parts)
        shape = (-1, self.context.together, paired.shape[2], *columns.shape[2:])
        turned = self.rope.rotate_columns(columns.view(shape), cos_sin, None if spare is None else spare.view(shape))
        products = torch.bmm(paired, turned.view(len(paired), paired.shape[2], -1))
        return products.view(*products.shape[:2], *columns.shape[2:]).transpose(2, 3).flatten(3)
