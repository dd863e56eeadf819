"""What a policy wants done with the tokens of its rows, and how it is done.

A policy looks at what it knows (`Held`) and answers with a plan; it never moves a token. Slots are places of tokens,
int64 tensors `[rows, ...]`: those of the packed tier first, then those of the exact one, then those of a chunk that has
just come.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch

from fivefold.kernels.device import sent
from fivefold.store.codec import whole
from fivefold.store.group import KV, RowGroup
from fivefold.store.held import Held
from fivefold.store.interfaces import Layer
from fivefold.store.layout import PageLayout
from fivefold.store.rows import PAGE, Bounds, Extent, Packing
from fivefold.store.spec import LayerSpec

NUMBERS = 1 << 25
"""Of tokens, or of what is known of them, that are worked on at a time: it bounds the memory that this takes."""
Extra = dict[str, torch.Tensor]
Merge = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, Extra]]


@dataclass(frozen=True)
class Append:
    """Hold what there is; `advance`: and pack what is due."""

    advance: bool = True


@dataclass(frozen=True)
class Keep:
    """Hold these slots `[rows, kept]` in this order, and evict the others; everything is written anew.

    merge: makes of keys and values `[rows, slots, head_dim]` (float32) those of the slots that stay, and `extra`.
    """

    slots: torch.Tensor
    merge: Merge | None = None


@dataclass(frozen=True)
class Demote:
    """Of the slots behind the packed ones, in this order `[rows, slots]`, pack those that are due."""

    order: torch.Tensor


@dataclass(frozen=True)
class EvictOne:
    """Evict slot `goes [rows]` of the exact tier: the newest token takes its place.

    into, weights: slot `into [rows]` becomes its own key and value times `weights[:, 0]`, plus those that go times
    `weights[:, 1]`.
    """

    goes: torch.Tensor
    into: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    extra: Extra | None = None


@dataclass(frozen=True)
class EvictPacked:
    """Evict `goes [rows, due]` of the packed tokens and of the `due` oldest exact ones, which take the places of those
    that go."""

    goes: torch.Tensor


Plan = Append | Keep | Demote | EvictOne | EvictPacked


@dataclass(frozen=True)
class Stored:
    """What a policy may look at when a step is planned.

    keys: those of the exact tier's slots, in pieces `[rows, some slots, head_dim]`. token: key and value of one slot of
    each row, `[rows, head_dim]` each.
    """

    bounds: Bounds
    packing: Packing | None
    keys: Callable[[], list[torch.Tensor]]
    token: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Policy(Protocol):
    """What the store asks of a method that chooses tokens (`fivefold.methods.policy.TokenPolicy`)."""

    @property
    def name(self) -> str: ...

    @property
    def sums(self) -> bool: ...

    @property
    def counts_steps(self) -> bool: ...

    def first_counted(self, chunk: int) -> int: ...

    def observe(self, weights: torch.Tensor, held: Held, first: int) -> torch.Tensor: ...

    def watching(self, held: Held) -> bool: ...

    def collects(self, held: Held) -> bool: ...

    def exact_layout(self, spec: LayerSpec) -> PageLayout: ...

    def residual_of(self, held: Held, residual: int) -> int: ...

    def residual_in(self, extent: Extent, residual: int) -> int: ...

    def observed(self, held: Held, weights: torch.Tensor) -> Held: ...

    def after_chunk(
        self, held: Held, observed: torch.Tensor | None, bounds: Bounds, revocable: int
    ) -> tuple[Held, Plan]: ...

    def after_layers(self, held: Held) -> Plan: ...

    def after_step(self, held: Held, stored: Stored, revocable: int) -> Plan: ...

    def why_not_revoke(self, held: Held, tokens: int) -> str | None: ...


def execute(
    layer: Layer,
    group: RowGroup,
    plan: Plan,
    held: Held,
    keys: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
    revocable: int = 0,
) -> None:
    """Do what a plan says. held: what the policy knows, of the chunk `keys, values` too if there is one."""
    if isinstance(plan, Append):
        layer.take_in(group, keys, values, plan.advance, revocable, held)
        group.held = held
    elif isinstance(plan, Keep):
        _keep(layer, group, plan, held, keys, values, revocable)
    elif isinstance(plan, Demote):
        _demote(layer, group, plan, held, keys, values, revocable)
    elif isinstance(plan, EvictOne):
        _evict_one(layer, group, plan, held)
    else:
        _evict_packed(layer, group, plan, held)


def _keep(
    layer: Layer,
    group: RowGroup,
    plan: Keep,
    held: Held,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    revocable: int,
) -> None:
    again = keys is None
    if group.bounds.length:
        stored = group.dense()
        keys, values = (old if new is None else torch.cat([old, new], 1) for old, new in zip(stored, (keys, values)))
    assert keys is not None and values is not None
    extra = held.extra
    if plan.merge is not None:
        keys, values, extra = plan.merge(keys.float(), values.float())
    else:
        index = plan.slots[:, :, None].expand(-1, -1, layer.spec.head_dim)
        keys, values = keys.gather(1, index), values.gather(1, index)
    layer.empty(group, evicted=held.seen - plan.slots.shape[1])
    if again:
        layer.exact_pool.budget.trim()  # pages that came in this very change are free by now, and less is needed
    chosen = replace(held.select(plan.slots), extra=extra, final=held.seen - revocable)
    layer.take_in(group, keys.to(layer.spec.dtype), values.to(layer.spec.dtype), True, revocable, chosen)
    group.held = chosen


def _demote(
    layer: Layer,
    group: RowGroup,
    plan: Demote,
    held: Held,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    revocable: int,
) -> None:
    if keys is None and _demote_few(layer, group, plan, held, revocable):
        return
    stop, order = int(group.bounds.packed_stop), plan.order
    chunk = []
    for name, new in zip(KV, (keys, values)):
        parts = [*group.exact_parts(name), *(() if new is None else (new,))]
        chunk.append(torch.cat(parts, 1).gather(1, order[:, :, None].expand(-1, -1, layer.spec.head_dim)))
    layer.empty_exact(group)
    first = torch.arange(stop, device=order.device).expand(len(order), -1)
    held = replace(held.select(torch.cat([first, order + stop], 1)), final=held.seen - revocable)
    layer.take_in(group, chunk[0], chunk[1], True, revocable, held)
    group.held = held


def _demote_few(layer: Layer, group: RowGroup, plan: Demote, held: Held, revocable: int) -> bool:
    """`_demote` in a step, where few of many tokens go: they come to stand in fresh pages in the place of the first
    ones, and what stood there takes the slots that they leave. Nothing else is moved. False where that is not so."""
    bank, bounds, order = layer.bank, group.bounds, plan.order
    stop, slots = int(bounds.packed_stop), order.shape[1]
    due = int(bounds.advanced(layer.packing_of(held), revocable).packed_stop) - stop
    if due <= 0 or due % PAGE or 2 * due > slots or int(bounds.exact_tokens) != slots or int(bounds.pinned_pages):
        return False
    assert bank.change is not None
    columns, known, pool = due // PAGE, [held.positions, held.scores], bank.exact.pool
    fresh = bank.change.allocate(pool, len(group.flat) * columns)
    if not order.is_meta:
        # Of each row as many others stand in the first slots as of those that go stand elsewhere.
        index = order[:, :due].cpu().numpy()
        stays = np.ones(index.shape, dtype=bool)
        stays[np.nonzero(index < due)[0], index[index < due]] = False
        (row, first), left = np.nonzero(stays), index[index >= due]
        rows, table = group.flat[row], bank.exact.table
        if bank.exact.shared:
            width = table.shape[1]  # whole numbers are sorted much faster than pairs
            bank.exact.unshare(bank.change, *np.divmod(np.unique(rows * width + left // PAGE), width))
        for name in KV:
            pages = table[group.flat[:, None], index // PAGE].reshape(-1)
            goes = pool.read_tokens(name, pages, index.reshape(-1) % PAGE)
            pool.write(name, fresh, goes.view(-1, PAGE, layer.spec.head_dim))
            if len(row):
                moved = pool.read_tokens(name, table[rows, first // PAGE], first % PAGE)
                bank.write_later(name, table[rows, left // PAGE], left % PAGE, moved)
        at, source, target = sent(order.device, row, stop + first, stop + left)
        known = [x.clone() for x in known]
        for new, old in zip(known, (held.positions, held.scores)):
            new[:, stop : stop + due] = old.gather(1, order[:, :due] + stop)
            new[at, target] = old[at, source]
    bank.exact.move(bank.change, np.repeat(group.flat, columns), np.tile(np.arange(columns), len(group.flat)), fresh)
    group.touched_exact()
    held = replace(held, positions=known[0], scores=known[1], final=held.seen - revocable)
    layer.take_in(group, None, None, True, revocable, held)
    group.held = held
    return True


def _evict_one(layer: Layer, group: RowGroup, plan: EvictOne, held: Held) -> None:
    last, goes = int(group.bounds.length) - 1, plan.goes
    newest = goes.new_full(goes.shape, last)
    keys, values = (x.clone() for x in group.token(newest))
    if plan.into is not None and plan.weights is not None:
        gone, stays = group.token(goes), group.token(plan.into)
        merged = [plan.weights[:, :1] * a + plan.weights[:, 1:] * b for a, b in zip(stays, gone)]
        merged = [x.to(layer.spec.dtype) for x in merged]
        _write_later(layer, group, plan.into, merged[0], merged[1])
        again = (plan.into == last)[:, None]  # what moves is what it has just become
        keys, values = torch.where(again, merged[0], keys), torch.where(again, merged[1], values)
    _write_later(layer, group, goes, keys, values)
    new, columns = group.bounds._replace(length=last, evicted=int(group.bounds.evicted) + 1), group.exact.shape[1]
    if new.exact_pages < columns:
        assert layer.bank.change is not None
        layer.bank.exact.drop(layer.bank.change, group.flat, columns - 1, 1, columns)
        group.touched_exact()
    layer.set(group, new)
    at = goes[:, None]
    group.held = replace(
        held,
        positions=held.positions.scatter(1, at, held.positions[:, -1:])[:, :-1],
        scores=held.scores.scatter(1, at, held.scores[:, -1:])[:, :-1],
        extra=held.extra if plan.extra is None else plan.extra,
        final=held.seen,
    )


def _write_later(layer: Layer, group: RowGroup, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Tokens `[rows, head_dim]` for exact slots `[rows]` that hold others now. The last slot is about to go."""
    if slots.is_meta:
        return
    index, bank = slots.cpu().numpy(), layer.bank
    assert bank.change is not None
    some = np.flatnonzero(index < int(group.bounds.length) - 1)
    index, rows, column = index[some], group.flat[some], index[some] // PAGE
    bank.exact.unshare(bank.change, rows, column)
    if bank.exact.shared:
        group.touched_exact()
    pages = bank.exact.table[rows, column]
    which = None if len(some) == len(slots) else torch.from_numpy(some).to(keys.device)
    for name, x in zip(KV, (keys, values)):
        if len(some):
            bank.write_later(name, pages, index % PAGE, x if which is None else x[which])


def _evict_packed(layer: Layer, group: RowGroup, plan: EvictPacked, held: Held) -> None:
    stop, due, known = int(group.bounds.packed_stop), plan.goes.shape[1], [held.positions, held.scores]
    if not plan.goes.is_meta:
        known = _replace_packed(layer, group, plan, held)
    group.touched_packed()
    layer.drop_oldest_exact(group, due)
    known = [torch.cat([x[:, :stop], x[:, stop + due :]], 1) for x in known]
    group.held = replace(held, positions=known[0], scores=known[1], final=held.seen)


def _replace_packed(layer: Layer, group: RowGroup, plan: EvictPacked, held: Held) -> list[torch.Tensor]:
    """Pages in which nothing changes are left alone; the others are written anew. Returns positions and scores, what
    came in where what goes was."""
    bank, packing, bounds = layer.bank, layer.packing, group.bounds
    assert packing is not None and bank.packed is not None and bank.change is not None
    stop, due, page, width = int(bounds.packed_stop), plan.goes.shape[1], packing.page, group.packed.shape[1]
    # Each row: as many tokens of the group stay as packed ones go; they are matched in order.
    goes = np.sort(plan.goes.cpu().numpy(), 1)
    stays = np.ones((len(goes), due), dtype=bool)
    row, slot = np.nonzero(goes < stop)[0], goes[goes < stop]
    stays[np.nonzero(goes >= stop)[0], goes[goes >= stop] - stop] = False
    pages_at, place = row * width + slot // page, np.nonzero(stays)[1]
    columns, which = np.unique(pages_at, return_inverse=True)
    rows_at, slots_at, places, inside = sent(held.scores.device, row, slot, place, slot % page)
    new = [torch.cat(group.exact_parts(name), 1)[rows_at, places] for name in KV]
    moved = []
    for x in (held.positions, held.scores):
        x = x.clone()
        x[rows_at, slots_at] = x[rows_at, places + stop]
        moved.append(x)
    after = replace(held, positions=moved[0])
    opened = columns % width >= stop // page
    most = max(1, NUMBERS // (page * layer.spec.head_dim))
    for pages in (x for some in (~opened, opened) for x in _pieces(np.flatnonzero(some), most)):
        r, c = np.divmod(columns[pages], width)
        filled = page if not opened[pages[0]] else stop % page
        slots = torch.from_numpy(c * page)[:, None] + torch.arange(page)
        tokens = [x[:, :filled] for x in group.codec_at(slots, r).decode(group.fields_at(r, c))]
        mine = np.isin(which, pages)
        target, source = sent(held.scores.device, np.searchsorted(pages, which[mine]), np.flatnonzero(mine))
        for x, y in zip(tokens, new):
            x[target, inside[source]] = y[source].to(x.dtype)
        codec = group.codec_at(slots[:, :filled], r, after)
        made = whole(codec, codec.encode(tokens[0], tokens[1], 0, None))
        bank.packed.unshare(bank.change, group.flat[r], c)
        bank.packed.keep(bank.change, group.flat[r], c)
        bank.packed.write(group.flat[r], c, made)
    return moved


def _pieces(x: np.ndarray, most: int) -> list[np.ndarray]:
    return [x[start : start + most] for start in range(0, len(x), most)]
