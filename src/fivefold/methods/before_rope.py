"""What codecs that hold keys as they were before RoPE have in common, once they know whose pages they work on."""

from __future__ import annotations

from typing import Any

import torch

from fivefold.methods.base import Codec
from fivefold.store import Context, Rope

# Numbers of keys that are made again at a time, so that they stay in the processor's cache.
SLICE = 1 << 18


class BeforeRope(Codec):
    """A codec on the pages of the rows of `context`."""

    contextual = True
    codec: Any
    rope: Rope

    def __init__(self, codec: Any, context: Context) -> None:
        self.codec, self.context, self.rope = codec, context, codec.rope
        self.layout, self.group = codec.layout, codec.group

    def unturned(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys `[rows * pages, token, head_dim]` as they were before RoPE, channels in the paired order: float32
        `[groups, tokens, together, head_dim]`."""
        paired = self.rope.pair(self.context.join(keys.float()))
        return self.rope.turn(paired, self.rope.phases_of(self.context).conj())

    def before(self, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """The same from pages `[rows, pages, *shape]` or `[rows * pages, *shape]`, as near as they hold it."""
        raise NotImplementedError

    def keys(self, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        """Keys after RoPE of whole pages: float32 `[pages, token, head_dim]`."""
        turned = self.rope.turn(self.before(fields), self.rope.phases_of(self.context))
        return self.context.part(turned[..., self.rope.back], self.layout.tokens)

    def scores(self, queries: torch.Tensor, fields: dict[str, torch.Tensor]) -> torch.Tensor:
        page, paired = self.layout.tokens, self.rope.pair(queries.float())
        rows, pages = next(iter(fields.values())).shape[:2]
        phases = self.rope.phases_of(self.context)
        out = paired.new_empty((rows, queries.shape[1], pages * page))
        step = max(1, SLICE // (rows * page * queries.shape[2]))
        for first in range(0, pages, step):
            at = slice(first * page, min(first + step, pages) * page)
            keys = self.before({name: x[:, first : first + step] for name, x in fields.items()})
            out[:, :, at] = paired @ self.rope.turn(keys, phases[:, at]).permute(0, 2, 3, 1).flatten(0, 1)
        return out
