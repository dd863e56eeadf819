"""What a codec may know about the rows whose pages it is given, and the rotary embedding that their keys carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fivefold.kernels.shared import table

KEPT = 8
"""What is kept of a kind: what the blocks of a step need."""


class Memo:
    """Small tensors that all layers of a cache ask for in a step. The latest are kept; they go with the cache."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        """What was made under this key, or makes it: a tensor, a tuple of them, or None."""
        if key in self._made:
            return self._made[key]
        made = self._made[key] = make()
        while len(self._made) > KEPT:
            del self._made[next(iter(self._made))]
        return made

    @property
    def nbytes(self) -> int:
        parts = [x for made in self._made.values() for x in (made if isinstance(made, tuple) else (made,))]
        return sum(x.nbytes for x in parts if isinstance(x, torch.Tensor))


@dataclass(frozen=True)
class Context:
    """The rows whose pages a codec works on, and the tokens of those pages.

    heads: the kv head of each row. together: so many rows in succession hold the same tokens of one sequence, one of
    each head, and are always given together; 1 where every head chooses its own tokens. positions: int64
    `[rows or 1, tokens]`, the position (as the model counts them) of every token of the pages, page after page; of
    slots that are not filled anything. learned: what `Codec.learn` made of the rows' first tokens, `[rows, ...]` each.
    layers: the rows are those of so many layers, one after the other, of each the same heads of the same sequences.

    Pages are given as `[rows * pages, ...]` or `[rows, pages, ...]`, rows first in both.
    """

    heads: tuple[int, ...]
    together: int
    positions: torch.Tensor
    learned: dict[str, torch.Tensor] = field(default_factory=dict)
    layers: int = 1

    def again(self, owner: Rope, what: object, make: Callable[[], Any]) -> Any:
        """What is worked out from positions that all rows share, once for all layers of a step."""
        return make() if self.positions.shape[0] > 1 else owner.made.again((what, self.positions), KEPT, make)

    @property
    def rows(self) -> int:
        return len(self.heads)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The heads of a layer's rows that are together: once if they are the same all along, else of each group."""
        parts = [self.heads[i : i + self.together] for i in range(0, self.rows // self.layers, self.together)]
        return parts[:1] if len(set(parts)) == 1 else parts

    def join(self, x: torch.Tensor) -> torch.Tensor:
        """`[rows * pages, token, numbers]` as `[groups, pages * token, together, numbers]`."""
        return x.reshape(self.rows // self.together, self.together, -1, x.shape[-1]).transpose(1, 2)

    def part(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        """The other way round, for pages of so many tokens."""
        return x.transpose(1, 2).reshape(-1, tokens, x.shape[-1])


_running = table()


def running(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The positions start..stop: int64 `[1, tokens]`; the same tensor for the same numbers, for a while."""
    return _running.again((start, stop, device), KEPT, lambda: torch.arange(start, stop, device=device)[None])


def forget() -> None:
    """Let go of positions."""
    _running.clear()


class Rope:
    """A rotary position embedding: channels i and i + pairs of a head are turned by `position * inv_freq[i]`; with
    `neighbours`, channels 2i and 2i + 1.

    Channels from `2 * pairs` on are left alone (partial rotary embeddings; all of them without any pairs). A factor
    that the model multiplies cosine and sine with stays in the keys: it is the same for all of them.

    Numbers are turned in the *paired* order of channels, where those of a pair stand side by side, as one complex
    product; `order` brings a head's channels into it, `back` undoes that: int64 `[head_dim]` each.
    """

    def __init__(self, inv_freq: torch.Tensor, head_dim: int, neighbours: bool = False) -> None:
        self.inv_freq = inv_freq.detach().double().cpu()
        self.pairs, self.neighbours = len(inv_freq), neighbours
        turned = torch.arange(2 * self.pairs)
        if self.pairs and not neighbours:
            turned = turned.view(2, -1).T.reshape(-1)
        self.order = torch.cat([turned, torch.arange(2 * self.pairs, head_dim)])
        self.back = self.order.argsort()
        self.made = table()
        """For positions: shared by all layers and caches of a model."""

    def phases(self, positions: torch.Tensor) -> torch.Tensor:
        """`exp(i * position * inv_freq)`: complex64 `[*positions.shape, pairs]`."""
        angles = positions[..., None].double() * self.inv_freq.to(positions.device)
        return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)

    def phases_of(self, context: Context) -> torch.Tensor:
        """The same for what `Context.join` makes: complex64 `[groups or 1, tokens, 1, pairs]`."""
        phases = self.phases(context.positions)
        return (phases if phases.shape[0] == 1 else phases[:: context.together])[:, :, None]

    def cos_sin_of(self, context: Context, pages: int, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine for `rotate_columns`, from the positions of so many pages whose tokens stand plane by plane:
        float32 `[groups or 1, 1, pairs, planes, pages, tokens of a plane]` each."""

        def make() -> tuple[torch.Tensor, torch.Tensor]:
            phases = self.phases_of(context)[:, :, 0].transpose(1, 2)[:, None]
            phases = phases.unflatten(3, (pages, planes, -1)).transpose(3, 4)
            return phases.real.contiguous(), phases.imag.contiguous()

        return context.again(self, ("cos_sin", pages, planes), make)

    def pair(self, x: torch.Tensor) -> torch.Tensor:
        """Float32 x `[..., head_dim]` in the paired order."""
        turned = 2 * self.pairs
        if self.neighbours or not turned:
            return x
        z = torch.view_as_real(torch.complex(x[..., : self.pairs], x[..., self.pairs : turned])).flatten(-2)
        return z if turned == x.shape[-1] else torch.cat([z, x[..., turned:]], -1)

    def rotate(self, x: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
        """Float32 x `[..., head_dim]` in the paired order, turned by phases `[..., pairs]` (broadcast)."""
        turned = 2 * self.pairs
        if not turned:
            return x
        z = torch.view_as_complex(x[..., :turned].unflatten(-1, (-1, 2)))
        out = torch.view_as_real(z * phases).flatten(-2)
        return out if turned == x.shape[-1] else torch.cat([out, x[..., turned:]], -1)

    def rotate_columns(
        self, x: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The same of float32 x `[groups, heads, head_dim, ...]`, by what `cos_sin_of` says of the tokens in the axes
        behind."""
        cosine, sine = cos_sin
        turned = 2 * self.pairs
        out = torch.empty_like(x) if out is None else out
        pairs = (*x.shape[:2], self.pairs, 2, *x.shape[3:])
        old, new = (y[:, :, :turned].view(pairs) for y in (x, out))
        torch.mul(old, cosine[:, :, :, None], out=new)
        new[:, :, :, 0].addcmul_(old[:, :, :, 1], sine, value=-1)
        new[:, :, :, 1].addcmul_(old[:, :, :, 0], sine)
        if turned < x.shape[2]:
            out[:, :, turned:] = x[:, :, turned:]
        return out
