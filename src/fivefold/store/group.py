"""Rows of one layer that stand alike, and how they are read.

What is plain PyTorch works on whole tensors, so it takes rows with equal `Bounds` together. Groups are made from the
row tables when somebody asks (`LayerCache.groups`) and hold nothing of their own but what was worked out from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch

from fivefold.kernels.device import sent
from fivefold.store.codec import Codec
from fivefold.store.context import Context, running
from fivefold.store.held import Held
from fivefold.store.interfaces import Layer
from fivefold.store.pages import Location
from fivefold.store.rows import PAGE, Bounds, run_of

# Numbers of one field that are gathered at a time where pages do not lie in a row: small enough for the
# processor's cache.
GATHERED = 1 << 19
KV = ("keys", "values")


Block = tuple[int, int, list[Location]]
"""First column, last column, and where these pages lie, of each pool."""


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
        self.run = run_of(self.rows)
        self._index = run_of(self.flat) or self.flat
        self.touched_exact()
        self.touched_packed()

    count = 1
    """Of how many layers its rows are: see `Stacked`."""

    def touched_exact(self) -> None:
        self._exact_blocks: list[tuple[int, int, Location]] | None = None
        self.tail: list[torch.Tensor] | None = None

    def touched_packed(self) -> None:
        self._packed_blocks: list[Block] | None = None

    # -- tables -------------------------------------------------------------------------------------------

    def rows_on(self, device: torch.device) -> torch.Tensor:
        """`rows` on a device: the same tensor as long as nobody asks for another device."""
        if self._rows_on is None or self._rows_on.device != device:
            self._rows_on = sent(device, self.rows)[0]
        return self._rows_on

    def index_on(self, device: torch.device) -> slice | torch.Tensor:
        """`rows` as an index of tensors on a device."""
        return self.run or self.rows_on(device)

    @property
    def exact(self) -> np.ndarray:
        """Pages of the exact tier: int64 `[rows, columns]`."""
        return self.layer.exact_tier.pages(self._index, int(self.bounds.exact_pages))

    @property
    def packed(self) -> np.ndarray:
        """Pages of the packed tier: int64 `[rows, columns]`."""
        return self.packed_tables[0]

    @property
    def packed_tables(self) -> list[np.ndarray]:
        """The same of each pool: of what sharers of packed pages have in common, and keep for themselves."""
        tier = self.layer.packed_tier
        if tier is None:
            return [np.empty((len(self.rows), 0), dtype=np.int64)]
        columns = int(self.bounds.packed_pages(self.layer.packing))
        return [tier.pages(self._index, columns, which) for which in range(len(tier.pools))]

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

    def packed_blocks(self, numbers: int) -> list[Block]:
        """Blocks that cover the packed tier, each of at most about `numbers` keys times channels."""
        packing = self.layer.packing
        assert packing is not None
        if self._packed_blocks is None:
            longest = max(1, numbers // (packing.page * len(self.rows) * self.layer.spec.head_dim))
            tables = self.packed_tables
            self._packed_blocks = [
                (first, last, self._located([table[:, first:last] for table in tables]))
                for first, last in _blocks(tables[0], longest)
            ]
        return self._packed_blocks

    def _located(self, tables: Sequence[np.ndarray]) -> list[Location]:
        return [pool.locate(table) for pool, table in zip(self.layer.packed_pools, tables)]

    def read_packed(self, where: Sequence[Location]) -> dict[str, torch.Tensor]:
        """Every field of a block of the packed tier: `[rows, columns, *shape]`."""
        pools = zip(self.layer.packed_pools, where)
        return {name: x for pool, at in pools for name, x in pool.fetch_all(at).items()}

    def packed_fields(self, first: int, last: int) -> dict[str, torch.Tensor]:
        """Every field of packed columns first..last: `[rows, columns, *shape]`."""
        return self.read_packed(self._located([table[:, first:last] for table in self.packed_tables]))

    def fields_at(self, rows: np.ndarray, columns: np.ndarray) -> dict[str, torch.Tensor]:
        """Every field of single packed pages, of the rows with these indices: `[pages, *shape]`."""
        fields = self.read_packed(self._located([table[rows, columns][None] for table in self.packed_tables]))
        return {name: x[0] for name, x in fields.items()}

    def decoded(self, first: int, last: int) -> list[torch.Tensor]:
        """Keys and values of packed columns first..last, float32: `[rows, slots, head_dim]` each."""
        fields = {name: x.flatten(0, 1) for name, x in self.packed_fields(first, last).items()}
        pair = self.codec(first, last).decode(fields)
        return [x.reshape(len(self.rows), -1, self.layer.spec.head_dim) for x in pair]

    # -- both ---------------------------------------------------------------------------------------------

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all slots, packed ones decoded: `[rows, slots, head_dim]` in the layer's dtype."""
        return self.dense_part(0), self.dense_part(1)

    def dense_part(self, which: int) -> torch.Tensor:
        """The keys (0) or values (1) of all slots: `[rows, slots, head_dim]` in the layer's dtype."""
        spec, parts, columns = self.layer.spec, [], self.packed.shape[1]
        if columns:
            packed = self.decoded(0, columns)[which].to(spec.dtype)
            parts.append(packed[:, : int(self.bounds.packed_tokens)])
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
        alone = self.codec(0, 1) is layer.codec  # its pages say the same whosever they are
        if alone and len(layer.packed_pools) == 1:
            out = torch.empty((2, len(flat), layer.spec.head_dim), device=layer.spec.device)
            for tensors, at, where in layer.packed_pools[0].by_slab(self.packed[rows, column]):
                ids, inside, target = sent(layer.spec.device, at, slot[where], where)
                for whole, part in zip(out, layer.codec.take(tensors, ids, inside)):
                    whole.index_copy_(0, target, part)
            return out[0].view(shape), out[1].view(shape)
        # Heads that are packed together are decoded together.
        together, width = 1 if alone else self.together, self.packed.shape[1]
        pairs, place = np.unique(rows // together * width + column, return_inverse=True)
        r = ((pairs // width * together)[:, None] + np.arange(together)).reshape(-1)
        c = np.repeat(pairs % width, together)
        first = torch.from_numpy(bounds.packed_base + c * layer.packing.page)[:, None]
        codec = self.codec_at(first + torch.arange(layer.packing.page), r)
        which, inside = sent(layer.spec.device, place * together + rows % together, slot)
        pair = codec.decode(self.fields_at(r, c))
        return pair[0][which, inside].view(shape), pair[1][which, inside].view(shape)

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
        assert self.layer.packing is not None
        base, page = int(self.bounds.packed_base), self.layer.packing.page
        return self.codec_of(base + first * page, base + last * page)

    def codec_of(self, start: int, stop: int, held: Held | None = None) -> Codec:
        """The codec for the tokens in slots start..stop. held: what the policy will know, if not what it knows."""
        assert self.layer.codec is not None
        return self.layer.codec.of(_Context(self, None, lambda: self._positions(start, stop, held)))

    def codec_at(self, slots: torch.Tensor, rows: np.ndarray, held: Held | None = None) -> Codec:
        """The same for slots `[rows, tokens]` of the rows with these indices."""
        assert self.layer.codec is not None
        return self.layer.codec.of(_Context(self, rows, lambda: self._positions_at(slots, rows, held)))

    @property
    def offsets(self) -> np.ndarray:
        """Padding in front of each row's tokens: int64 `[rows]`."""
        return self.layer.offsets[self.rows]

    def learned(self, rows: np.ndarray | None) -> dict[str, torch.Tensor]:
        """What was learned of the rows with these indices; None is all of them."""
        known = self.layer.learned
        if rows is None and len(self.rows) == self.layer.rows:
            return known
        mine = self.rows if rows is None else self.rows[rows]
        return {name: x[sent(x.device, mine)[0]] for name, x in known.items()}

    def _positions(self, start: int, stop: int, held: Held | None) -> torch.Tensor:
        """The model's positions of the tokens in slots start..stop: int64 `[rows or 1, tokens]`."""
        device, offset = self.layer.spec.device, self.offsets
        first, held = int(offset[0]), held or self.held
        if held is None and (offset == first).all():
            return running(start + first, stop + first, device)
        slots = running(start, stop, device).expand(len(self.rows), -1)
        return self._positions_at(slots, np.arange(len(self.rows)), held)

    def _positions_at(self, slots: torch.Tensor, rows: np.ndarray, held: Held | None) -> torch.Tensor:
        device, held = self.layer.spec.device, held or self.held
        slots = slots.to(device)
        if held is not None:
            where = sent(device, rows)[0]
            slots = held.positions[where].gather(1, slots.clamp(max=held.slots - 1))
        return slots.long() + sent(device, self.offsets[rows])[0][:, None]


class Stacked(RowGroup):
    """The same rows of several layers of a bank, one layer after the other, for a codec of all of them: `rows` repeats
    with every layer."""

    def __init__(self, layers: Sequence[Layer], rows: np.ndarray, bounds: Bounds) -> None:
        super().__init__(layers[0], np.tile(rows, len(layers)), bounds)
        self.layers, self.count, self._local = layers, len(layers), rows
        self.flat = np.concatenate([layer.base + rows for layer in layers])
        self.run = run_of(self.rows)
        self._index = run_of(self.flat) or self.flat

    @cached_property
    def _codec(self) -> Codec:
        codecs = [layer.codec for layer in self.layers]
        assert codecs[0] is not None
        return codecs[0].stacked(codecs)

    def codec_of(self, start: int, stop: int, held: Held | None = None) -> Codec:
        return self._codec.of(_Context(self, None, lambda: self._positions(start, stop, held)))

    @property
    def offsets(self) -> np.ndarray:
        return np.concatenate([layer.offsets[self._local] for layer in self.layers])

    def learned(self, rows: np.ndarray | None) -> dict[str, torch.Tensor]:
        parts = [layer.learned for layer in self.layers]
        known = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if rows is None and len(self._local) == self.layer.rows:
            return known
        places = (np.arange(self.count)[:, None] * self.layer.rows + self._local).reshape(-1)
        mine = places if rows is None else places[rows]
        return {name: x[sent(x.device, mine)[0]] for name, x in known.items()}


class _Context(Context):
    """Of the rows of a group with these indices (None is all), worked out as far as a codec asks for it."""

    def __init__(self, group: RowGroup, rows: np.ndarray | None, positions: Callable[[], torch.Tensor]) -> None:
        self._group, self._rows, self._where = group, rows, positions

    @cached_property
    def heads(self) -> tuple[int, ...]:
        rows = self._group.rows if self._rows is None else self._group.rows[self._rows]
        return tuple((rows % self._group.layer.spec.kv_heads).tolist())

    @cached_property
    def together(self) -> int:
        return self._group.together

    @cached_property
    def layers(self) -> int:
        return self._group.count

    @cached_property
    def positions(self) -> torch.Tensor:
        return self._where()

    @cached_property
    def learned(self) -> dict[str, torch.Tensor]:
        return self._group.learned(self._rows)


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
