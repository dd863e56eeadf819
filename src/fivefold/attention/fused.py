"""A decoding step by the kernels of `kernels/packed_decode`: every tier of some rows in one go."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fivefold.attention.compensate import Part, beside
from fivefold.attention.divided import readers_of
from fivefold.attention.merge import with_sinks
from fivefold.attention.tables import kernels, tables_of
from fivefold.attention.watch import why_not_watched
from fivefold.kernels.choice import choose, loaded, possible, runs_cpp
from fivefold.kernels.packed_decode import Form, cpu, schedule
from fivefold.store.bank import Bank
from fivefold.store.group import RowGroup
from fivefold.store.interfaces import Layer
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Span


def attend_fused(
    group: RowGroup, queries: torch.Tensor, scaling: float, sinks: torch.Tensor | None = None, left: Part | None = None
) -> torch.Tensor | None:
    """`attend_step` by kernels, merged with `left` (see `left_of`); None where they do not run (see `why_not`).

    Packed numbers that are too large for their kernel are attended on as if each token had been picked.
    """
    layer = group.layer
    if why_not(layer, queries.device, queries.shape[1], large=True) is not None:
        return None
    packed_form = layer.codec is not None and isinstance(layer.codec.reader, Form) and choose(queries.device).triton
    if packed_form and group.bounds.packed_tokens and layer.bank.peak[group.flat].max() > schedule.LIMIT:
        seen = group.bounds.span()
        every = torch.arange(seen.packed_first, seen.packed_stop, dtype=torch.int32, device=queries.device)
        slots = every.repeat(len(group.rows), 1)
        return None if left is not None else attend_picked_fused(group, queries, scaling, slots, sinks)
    tables = tables_of(layer.bank)
    tables.sync()
    packed, exact = tables.pages(group, tables.joined)
    reader, programs = tables.division.reader(group), tables.programs
    if programs is not None and reader is not None and reader is not tables.readers[layer.index]:
        programs = tables.programs_of(len(group.rows), reader)._replace(exact=programs.exact)
    span, starts = _work(group, group.bounds.span(), tables.page, programs, 1 if reader is None else reader.team)
    with_lse = sinks is not None or left is not None
    settings = {"starts": starts, "programs": programs, "with_lse": with_lse}
    out, lse = kernels(queries.device).decode(queries.contiguous(), scaling, span, packed, exact, **settings)
    out, lse = beside(out, lse, left)
    return with_sinks(out, lse, sinks)


def attend_scored_fused(
    group: RowGroup, queries: torch.Tensor, scaling: float, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`attend_step` with the weights of every slot, of rows without a window; None where no kernel gives them."""
    layer = group.layer
    if why_not(layer, queries.device, queries.shape[1]) is not None or not runs_cpp(queries.device):
        return None
    tables = tables_of(layer.bank)
    tables.sync()
    packed, exact = tables.pages(group)
    span, _ = _work(group, group.bounds.span(), tables.page, None)
    scores = torch.empty((len(group.rows), queries.shape[1], int(group.bounds.length)), dtype=torch.float32)
    out, lse = cpu.decode(queries.contiguous(), scaling, span, packed, exact, with_lse=True, scores=scores)
    assert lse is not None
    weights = scores.sub_(lse[..., None]).exp_()
    return with_sinks(out, lse, sinks), with_sinks(weights, lse, sinks)


def attend_picked_fused(
    group: RowGroup, queries: torch.Tensor, scaling: float, slots: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Attention over what `slots [rows, n]` name alone, negative ones left out: packed slots, beside the whole exact
    tier, if anything is packed, else exact ones. None where the kernels do not run."""
    layer = group.layer
    if why_not(layer, queries.device, queries.shape[1], large=True) is not None:
        return None
    tables = tables_of(layer.bank)
    tables.sync()
    packed, exact = tables.pages(group)
    if packed is not None and not isinstance(packed.form, Form):
        return None
    rows, count = slots.shape
    # Picks of packed slots are shared out as pages of that many tokens would be.
    span = Span(0, 0, 0, 0, count, 0, 0)
    if packed is not None:
        span = group.bounds.span()._replace(packed_first=0, packed_stop=count)
    # Exact ones are as few as packed ones would be, or stand beside them.
    programs = kernels(queries.device).programs_for(rows, queries.device)[:1] * 2 if tables.listed else None
    page = schedule.TILE if packed is None else schedule.PICKS
    table, starts = _work(group, span, page, programs)
    picks = slots.to(torch.int32).contiguous()
    settings = {"starts": starts, "programs": programs, "picks": picks, "with_lse": sinks is not None}
    out, lse = kernels(queries.device).decode(queries.contiguous(), scaling, table, packed, exact, **settings)
    return with_sinks(out, lse, sinks)


def unpack_fused(
    group: RowGroup, first: int, tokens: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Keys and values of so many packed tokens from a column on, `[rows, tokens, head_dim]`; None where the kernel does
    not run."""
    layer = group.layer
    codec = layer.codec
    if codec is None or codec.form is None or len(layer.packed_pools) > 1 or not choose(layer.spec.device).triton:
        return None
    if schedule.supports(codec.form, 1, layer.spec.head_dim) is not None:
        return None
    table, at = rows_of(group, True)
    pair: tuple[torch.Tensor, torch.Tensor] = loaded("pack.triton").unpack_pages(
        codec.form, table, dtype, at, first, tokens
    )
    return pair


def gathers(layer: Layer) -> bool:
    """Whether a kernel makes exact pages dense, wherever they lie: on a GPU."""
    spec = layer.spec
    plain = layer.exact_pool.layout.holds is None and spec.dtype.itemsize in (2, 4)
    power = spec.head_dim >= 16 and not spec.head_dim & (spec.head_dim - 1)
    return spec.device.type == "cuda" and plain and power and choose(spec.device).triton


def gather_fused(group: RowGroup, first: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many exact tokens from a column on, `[rows, tokens, head_dim]`, where it `gathers`."""
    layer = group.layer
    table, at = rows_of(group, False)
    pair: tuple[torch.Tensor, torch.Tensor] = loaded("gather.triton").gather_pages(
        table, tokens, layer.spec.head_dim, layer.spec.dtype, at, first
    )
    return pair


def rows_of(group: RowGroup, packed: bool) -> tuple[torch.Tensor, slice | torch.Tensor]:
    """A table of packed or exact pages, and which of its rows are the group's. It is brought up to date once in a
    forward: these rows attend to what was there before they take their chunk."""
    bank: Any = group.layer.bank
    tables: Any = bank.mirror
    if tables is None or bank.change is None or tables.synced is not bank.change:
        tables = tables_of(bank)
        tables.sync()
        tables.synced = bank.change
    return tables.tables[packed], tables.division.places(group, tables.device)[packed]


def why_not(layer: Layer, device: torch.device, heads: int, large: bool = False) -> str | None:
    """Why the kernels do not decode this layer, in a few words; None if they do. large: numbers beyond the `LIMIT` of
    the kernel for packed pages do not matter.

    Raises `CacheStateError` if they were asked for and this machine cannot run them.
    """
    choice = possible(device)
    if choice.path == "reference":
        return choice.why
    if layer.spec.cap is not None:
        return "scores are capped, which no kernel does"
    if layer.exact_pool.layout.holds is not None and not choice.triton:
        return "exact pages hold eight bits a number"
    codec = layer.codec
    if codec is not None:
        reader = codec.reader
        if reader is None:
            return "no kernel reads this codec's pages"
        # One token at a time, large numbers are no trouble (`attend_fused`).
        peak = 0.0 if large and isinstance(reader, Form) else float(layer.bank.peaks()[layer.index])
        if choice.triton and peak > reader.limit:
            return f"keys or values reach {peak:.0f}, more than the kernels' {reader.limit:.0f}"
        if reader.positional and any(layer.head_chosen):
            return "packed pages do not say where in the text the tokens that were chosen stand"
    supports, readers = schedule.supports if choice.triton else cpu.supports, readers_of(layer)
    if codec is not None and None in readers:
        return "heads that are packed together hold different tokens"
    return next((why for one in readers if (why := supports(one, heads, layer.spec.head_dim)) is not None), None)


class Alike:
    """Layers of a session, as far as they may differ in why their steps are a kernel's or not: by the numbers that they
    have seen alone where they are of one kind. roles: what they read in a step (see `ReadPolicy`)."""

    def __init__(self, layers: Mapping[int, LayerCache], roles: Mapping[int, str]) -> None:
        self._layers, self._roles = dict(layers), roles
        self._banks = [weakref.ref(layer.bank) for layer in layers.values()]
        kinds: dict[tuple[object, ...], list[int]] = {}
        for index, layer in layers.items():
            # Layers of a bank are alike, but for the largest number that they have seen, what is read and held, by what
            # angles keys are turned, and caps.
            role = roles.get(index, "full")
            windows = role == "full" or tuple(extent.recent for extent in layer.extents)
            policy = id(layer.policy) if any(layer.head_chosen) else None
            kind = layer.bank, role, windows, policy, layer.sets, id(layer.spec.rope), layer.spec.cap
            kinds.setdefault(kind, []).append(index)
        self._kinds = list(kinds.values())

    def stands(self, layers: Mapping[int, LayerCache]) -> bool:
        """Whether it is still so."""
        return self._layers == layers and [bank() for bank in self._banks] == [one.bank for one in layers.values()]

    def whys(self) -> dict[int, str | None]:
        """Why a layer's decoding step is not one call of a kernel, in a few words, of each layer; None if it is."""
        layers, peaks = self._layers, dict[Bank, np.ndarray]()
        out: dict[int, str | None] = dict.fromkeys(layers)
        for kind in self._kinds:
            first = layers[kind[0]]
            reader = None if first.codec is None else first.codec.reader
            if first.bank not in peaks:
                peaks[first.bank] = first.bank.peaks()
            sizes, parts = peaks[first.bank], [kind]
            if reader is not None and sizes.max(initial=0) > reader.limit:
                large = [index for index in kind if sizes[layers[index].index] > reader.limit]
                parts = [large, [index for index in kind if index not in large]]
            for part in filter(None, parts):
                why = _why_not_step(layers[part[0]], self._roles.get(part[0], "full"))
                if why is not None:
                    out.update(dict.fromkeys(part, why))
        return _picking_together(out, self._roles, layers)


def _picking_together(
    whys: dict[int, str | None], roles: Mapping[int, str], layers: Mapping[int, LayerCache]
) -> dict[int, str | None]:
    """What a GPU's kernels pick is on the device, what plain PyTorch picks on the host: one of the two does all of a
    step's picking, and all reading of what is picked."""
    picking = [index for index in whys if roles.get(index, "full") != "full"] if roles else []
    why = next((whys[index] for index in picking if whys[index] is not None), None)
    if why is not None and choose(layers[picking[0]].spec.device).triton:
        whys |= {index: whys[index] or why for index in picking}
    return whys


def _why_not_step(layer: LayerCache, role: str) -> str | None:
    """Why a layer's step is not a kernel's; role: what it reads."""
    path = choose(layer.spec.device).path
    if role != "full" and path == "reference":
        return "what is read is picked anew in every step"
    if any(layer.head_chosen) and path in ("cpp", "reference"):
        return "the tokens that are held are chosen in every step"
    why = None if path == "cpp" else why_not_watched(layer, role)
    return why or why_not(layer, layer.spec.device, layer.spec.query_heads // layer.spec.kv_heads)


def _work(
    group: RowGroup, span: Span, page: int, programs: tuple[int, ...] | None, team: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A table of the same span for all rows of a group, int32 `[rows, SPAN]`, and the work lists
    (`schedule.starts_of`); the same for all layers of a step. team: see `Reader`."""
    layer = group.layer
    device, rows = layer.spec.device, len(group.rows)
    reader, first = None if layer.codec is None else layer.codec.reader, None
    if reader is not None and reader.positional:
        first = (layer.offsets[group.rows] + group.bounds.packed_base).tolist()

    def make() -> tuple[torch.Tensor, torch.Tensor | None]:
        table = np.zeros((rows, schedule.SPAN), dtype=np.int32)
        table[:, : len(span)] = span
        if first is not None:
            table[:, len(span)] = first
        if programs is None:
            return torch.from_numpy(table), None
        joined = programs[1] == 0
        starts = schedule.starts_of(schedule.pages_of(table, page, team, joined), programs)
        return torch.from_numpy(table).to(device), torch.from_numpy(starts).to(device)

    return layer.bank.memo.get((span, rows, page, programs, team, tuple(first or ())), make)
