"""Rows of one layer that stand alike, and how they are read.

What is plain PyTorch works on whole tensors, so it takes rows with equal `Bounds` together. Groups are made from the
row tables when somebody asks (`LayerCache.groups`) and hold nothing of their own but what was worked out from them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import numpy as np
import torch

from fivefold.kernels.device import sent
from fivefold.store.codec import Codec
from fivefold.store.context import Context, running
from fivefold.store.held import Held
from fivefold.store.pages import Location, PagePool
from fivefold.store.rows import PAGE, Bounds, Packing
from fivefold.store.spec import LayerSpec
from fivefold.store.tier import Tier

# Numbers of one field that are gathered at a time where pages do not lie in a row: small enough for the
# processor's cache.
GATHERED = 1 << 19
KV = ("keys", "values")


class Layer(Protocol):
    """What a group must know of its layer (see `LayerCache`)."""

    spec: LayerSpec
    codec: Codec | None
    packing: Packing | None
    exact_pool: PagePool
    packed_pools: list[PagePool]
    held: list[Held]
    learned: dict[str, torch.Tensor]

    @property
    def rows(self) -> int: ...

    @property
    def base(self) -> int: ...

    index: int

    @property
    def exact_tier(self) -> Tier: ...

    @property
    def packed_tier(self) -> Tier | None: ...

    @property
    def offsets(self) -> np.ndarray: ...


class RowGroup:
    """Rows of a layer with equal bounds.

    rows: int64 `[rows]`, sequence * kv_heads + kv_head, ascending. number: with a policy that chooses, which of the
    layer's `held` is theirs. Whoever changes their pages calls `touched_exact` or `touched_packed`.
    """

    def __init__(self, layer: Layer, rows: np.ndarray, bounds: Bounds, number: int | None = None) -> None:
        self.layer, self.rows, self.bounds, self.number = layer, rows, bounds, number
        self.flat = layer.base + rows
        self.rows_tensor = torch.from_numpy(rows)
        self._rows_on: torch.Tensor | None = None
        run = len(rows) == rows[-1] - rows[0] + 1
        # A slice makes views of the page tables instead of copies.
        self._index = slice(int(self.flat[0]), int(self.flat[-1]) + 1) if run else self.flat
        self.touched_exact()
        self.touched_packed()

    def touched_exact(self) -> None:
        self._exact_blocks: list[tuple[int, int, Location]] | None = None
        self.tail: list[torch.Tensor] | None = None

    def touched_packed(self) -> None:
        self._packed_blocks: list[tuple[int, int, Location, Location | None]] | None = None

    # -- tables -------------------------------------------------------------------------------------------

    def rows_on(self, device: torch.device) -> torch.Tensor:
        """`rows` on a device: the same tensor as long as nobody asks for another device."""
        if self._rows_on is None or self._rows_on.device != device:
            self._rows_on = sent(device, self.rows)[0]
        return self._rows_on

    def index_on(self, device: torch.device) -> slice | torch.Tensor:
        """`rows` as an index of tensors on a device: a slice, which makes views, where they are a run."""
        run = isinstance(self._index, slice)
        return slice(int(self.rows[0]), int(self.rows[-1]) + 1) if run else self.rows_on(device)

    @property
    def exact(self) -> np.ndarray:
        """Pages of the exact tier: int64 `[rows, columns]`."""
        return self.layer.exact_tier.pages(self._index, int(self.bounds.exact_pages))

    @property
    def packed(self) -> np.ndarray:
        """Pages of the packed tier."""
        return self._packed_pages(0)

    @property
    def own(self) -> np.ndarray:
        """Pages of what sharers of packed pages keep for themselves."""
        return self._packed_pages(1)

    def _packed_pages(self, which: int) -> np.ndarray:
        tier = self.layer.packed_tier
        if tier is None or which >= len(tier.pools):
            return np.empty((len(self.rows), 0), dtype=np.int64)
        return tier.pages(self._index, int(self.bounds.packed_pages(self.layer.packing)), which)

    @property
    def held(self) -> Held | None:
        return None if self.number is None else self.layer.held[self.number]

    @held.setter
    def held(self, held: Held) -> None:
        assert self.number is not None
        self.layer.held[self.number] = held

    # -- the exact tier -----------------------------------------------------------------------------------

    def exact_blocks(self) -> list[tuple[int, int, Location]]:
        """(first column, last column, location) of blocks that cover the exact tier."""
        if self._exact_blocks is None:
            table, pool = self.exact, self.layer.exact_pool
            longest = max(1, GATHERED // (PAGE * len(self.rows) * self.layer.spec.head_dim))
            found = []
            for first, last in _blocks(table, table.shape[1]):
                whole = pool.locate(table[:, first:last])
                alone = whole.slab is not None and whole.strides[1] == 1 and pool.layout.holds is None
                if alone or last - first <= longest:
                    found.append((first, last, whole))
                    continue
                for start in range(first, last, longest):
                    stop = min(start + longest, last)
                    found.append((start, stop, pool.locate(table[:, start:stop])))
            self._exact_blocks = found
        return self._exact_blocks

    def read_exact(self, name: str, location: Location) -> torch.Tensor:
        """Keys or values of a block of the exact tier, a view if it can be: `[rows, tokens, head_dim]`."""
        return self.layer.exact_pool.fetch(name, location).flatten(1, 2)

    def exact_parts(self, name: str) -> list[torch.Tensor]:
        """Keys or values of the filled slots of the exact tier, views where they can be: `[rows, some slots,
        head_dim]` each."""
        left = int(self.bounds.exact_tokens)
        return [
            self.read_exact(name, location)[:, : max(0, left - first * PAGE)]
            for first, _, location in self.exact_blocks()
        ]

    # -- the packed tier ----------------------------------------------------------------------------------

    def packed_blocks(self, numbers: int) -> list[tuple[int, int, Location, Location | None]]:
        """(first column, last column, location, own location) of blocks that cover the packed tier.

        Each is of at most about `numbers` keys times channels.
        """
        packing, pools = self.layer.packing, self.layer.packed_pools
        assert packing is not None
        if self._packed_blocks is None:
            longest = max(1, numbers // (packing.page * len(self.rows) * self.layer.spec.head_dim))
            packed, own, found = self.packed, self.own, []
            for first, last in _blocks(packed, longest):
                mine = None if len(pools) == 1 else pools[1].locate(own[:, first:last])
                found.append((first, last, pools[0].locate(packed[:, first:last]), mine))
            self._packed_blocks = found
        return self._packed_blocks

    def read_packed(self, location: Location, own: Location | None) -> dict[str, torch.Tensor]:
        """Every field of a block of the packed tier: `[rows, columns, *shape]`."""
        out: dict[str, torch.Tensor] = {}
        for pool, where in zip(self.layer.packed_pools, (location, own)):
            assert where is not None
            out |= {part.name: pool.fetch(part.name, where) for part in pool.layout.fields}
        return out

    def packed_fields(self, first: int, last: int) -> dict[str, torch.Tensor]:
        """Every field of packed columns first..last: `[rows, columns, *shape]`."""
        tables = (self.packed, self.own)
        where = [pool.locate(table[:, first:last]) for pool, table in zip(self.layer.packed_pools, tables)]
        return self.read_packed(where[0], where[1] if len(where) > 1 else None)

    def fields_at(self, rows: np.ndarray, columns: np.ndarray) -> dict[str, torch.Tensor]:
        """Every field of single packed pages, of the rows with these indices: `[pages, *shape]`."""
        tables = (self.packed, self.own)
        where = [pool.locate(table[rows, columns][None]) for pool, table in zip(self.layer.packed_pools, tables)]
        fields = self.read_packed(where[0], where[1] if len(where) > 1 else None)
        return {name: x[0] for name, x in fields.items()}

    # -- both ---------------------------------------------------------------------------------------------

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots, packed ones decoded: `[rows, slots, head_dim]` in the layer's dtype."""
        return self.dense_part(0), self.dense_part(1)

    def dense_part(self, which: int) -> torch.Tensor:
        """The keys (0) or values (1) of all slots: `[rows, slots, head_dim]` in the layer's dtype."""
        spec, parts, columns = self.layer.spec, [], self.packed.shape[1]
        if columns:
            fields = {name: x.flatten(0, 1) for name, x in self.packed_fields(0, columns).items()}
            packed = self.codec(0, columns).decode(fields)[which].to(spec.dtype)
            tokens = int(self.bounds.packed_tokens)
            parts.append(packed.reshape(len(self.rows), -1, spec.head_dim)[:, :tokens])
        parts += self.exact_parts(KV[which])
        if not parts:
            return torch.empty((len(self.rows), 0, spec.head_dim), dtype=spec.dtype, device=spec.device)
        return torch.cat(parts, 1)

    def slots_of(self, positions: torch.Tensor) -> torch.Tensor:
        """The slots of tokens by their position in the text, int64 `[rows, tokens]`; -1 where a row does not hold
        one."""
        if self.held is None:
            return positions.long()
        ordered, slots = self.held.positions.sort(1)
        place = torch.searchsorted(ordered, positions.to(ordered.dtype)).clamp_(max=ordered.shape[1] - 1)
        return torch.where(ordered.gather(1, place) == positions, slots.gather(1, place), -1)

    def tokens(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of single tokens, of slots `[rows, tokens]` that are all in one tier:
        `[rows, tokens, head_dim]`."""
        layer, bounds = self.layer, self.bounds
        if slots.is_meta:
            nothing = slots.new_empty((*slots.shape, layer.spec.head_dim), dtype=layer.spec.dtype)
            return nothing, nothing.clone()
        index, packed_stop, shape = slots.cpu().numpy(), int(bounds.packed_stop), (*slots.shape, layer.spec.head_dim)
        rows, flat = np.repeat(np.arange(len(index)), index.shape[1]), index.reshape(-1)
        if not flat.size or flat[0] >= packed_stop:
            column, slot = np.divmod(flat - packed_stop, PAGE)
            pages = self.exact[rows, column]
            keys, values = (layer.exact_pool.read_tokens(name, pages, slot) for name in KV)
            return keys.view(shape), values.view(shape)
        assert layer.packing is not None and layer.codec is not None
        column, slot = np.divmod(flat, layer.packing.page)
        if not layer.codec.contextual and len(layer.packed_pools) == 1:
            out = torch.empty((2, len(flat), layer.spec.head_dim), device=layer.spec.device)
            for tensors, at, where in layer.packed_pools[0].by_slab(self.packed[rows, column]):
                ids, inside, target = sent(layer.spec.device, at, slot[where], where)
                for whole, part in zip(out, layer.codec.take(tensors, ids, inside)):
                    whole.index_copy_(0, target, part)
            return out[0].view(shape), out[1].view(shape)
        # Rows that share pages are given to the codec together.
        together, width = self.together if layer.codec.contextual else 1, self.packed.shape[1]
        pairs, place = np.unique(rows // together * width + column, return_inverse=True)
        r = ((pairs // width * together)[:, None] + np.arange(together)).reshape(-1)
        c = np.repeat(pairs % width, together)
        codec = layer.codec
        if codec.contextual:
            first = torch.from_numpy(bounds.packed_base + c * layer.packing.page)[:, None]
            codec = codec.of(self.context(self.positions_at(first + torch.arange(layer.packing.page), r), r))
        which = sent(layer.spec.device, place * together + rows % together, slot)
        keys, values = codec.take(self.fields_at(r, c), *which)
        return keys.view(shape), values.view(shape)

    def token(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value of one slot of each row, `[rows]`: `[rows, head_dim]` each."""
        keys, values = self.tokens(slots[:, None])
        return keys[:, 0], values[:, 0]

    # -- what codecs know about rows ----------------------------------------------------------------------

    @property
    def together(self) -> int:
        """How many rows in succession hold the same tokens of a sequence, one of each of its heads in this group."""
        return 1 if self.number is not None else len(np.unique(self.rows % self.layer.spec.kv_heads))

    def codec(self, first: int, last: int) -> Codec:
        """The codec for packed columns first..last."""
        codec, packing = self.layer.codec, self.layer.packing
        assert codec is not None and packing is not None
        if not codec.contextual:
            return codec
        base = int(self.bounds.packed_base)
        positions = self.positions(base + first * packing.page, base + last * packing.page)
        assert positions is not None
        return codec.of(self.context(positions))

    def context(self, positions: torch.Tensor, rows: np.ndarray | None = None) -> Context:
        """What a codec may know of the rows with these indices; None is all of them."""
        mine = self.rows if rows is None else self.rows[rows]
        whole = len(mine) == self.layer.rows and rows is None
        learned = {name: x if whole else x[sent(x.device, mine)[0]] for name, x in self.layer.learned.items()}
        return Context(tuple((mine % self.layer.spec.kv_heads).tolist()), self.together, positions, learned)

    def positions(self, start: int, stop: int, held: Held | None = None) -> torch.Tensor | None:
        """The model's positions of the tokens in slots start..stop: int64 `[rows or 1, tokens]`; None if the codec does
        not want them. held: what the policy will know, if not what it knows."""
        codec, device = self.layer.codec, self.layer.spec.device
        if codec is None or not codec.contextual:
            return None
        if not codec.positional:
            return running(start, stop, device)  # nobody looks at them
        offset = self.layer.offsets[self.rows]
        first, held = int(offset[0]), held or self.held
        if held is None and (offset == first).all():
            return running(start + first, stop + first, device)
        slots = running(start, stop, device).expand(len(self.rows), -1)
        return self.positions_at(slots, np.arange(len(self.rows)), held)

    def positions_at(self, slots: torch.Tensor, rows: np.ndarray, held: Held | None = None) -> torch.Tensor:
        """The same for slots `[rows, tokens]` of the rows with these indices."""
        device, held = self.layer.spec.device, held or self.held
        slots = slots.to(device)
        if held is not None:
            where = sent(device, rows)[0]
            slots = held.positions[where].gather(1, slots.clamp(max=held.slots - 1))
        return slots.long() + sent(device, self.layer.offsets[self.rows[rows]])[0][:, None]


def _blocks(ids: np.ndarray, longest: int, shortest: int = 8) -> list[tuple[int, int]]:
    """Split the columns of a page table into blocks of at most `longest`.

    Runs of pages that are consecutive in every row get blocks of their own, unless they are shorter than
    `shortest`.
    """
    columns = ids.shape[1]
    if columns == 0:
        return []
    breaks = np.flatnonzero((np.diff(ids, axis=1) != 1).any(axis=0)) + 1
    edges = [0, *breaks.tolist(), columns]
    out: list[tuple[int, int]] = []
    joinable = False
    for start, stop in pairwise(edges):
        short = stop - start < shortest
        if short and joinable and stop - out[-1][0] <= longest:
            out[-1] = (out[-1][0], stop)
        else:
            out.extend((first, min(first + longest, stop)) for first in range(start, stop, longest))
        joinable = short
    return out
