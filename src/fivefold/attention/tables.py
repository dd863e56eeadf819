"""Page tables and spans as kernels read them, at fixed places on the device.

There is one of them for a `Bank`. It shows what the bank's own tables say once `sync` or `update` has run; these send
only what has changed, and a captured graph of a step stays right.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import torch

from fivefold.attention.compensate import Left, beside, compensates, left_of_all
from fivefold.attention.divided import Division
from fivefold.attention.merge import with_sinks
from fivefold.attention.picks import Picked, Shares
from fivefold.attention.sending import Sending, send_pages
from fivefold.attention.watch import NUMBERS, Aside, Watch, bank_chooses
from fivefold.kernels.choice import choose
from fivefold.kernels.device import sent
from fivefold.kernels.packed_decode import Reader, schedule
from fivefold.store.bank import Bank
from fivefold.store.group import KV, RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rounded import SIDES
from fivefold.store.rows import PAGE, Bounds, Span


def kernels(device: torch.device) -> ModuleType:
    """The decoding kernels for tensors on a device: C++ on a CPU, else Triton's module, which needs Triton."""
    if device.type == "cpu" and not choose(device).triton:
        from fivefold.kernels.packed_decode import cpu

        return cpu
    from fivefold.kernels.packed_decode import triton

    return triton


def tables_of(bank: Bank) -> DeviceTables:
    """The device tables of a bank, made anew where those that are there are too small."""
    old: DeviceTables | None = bank.mirror
    if old is not None and not old.fit():
        unknown = [tier.changed for tier in old._tiers]
        new = DeviceTables(bank, *old.wanted)
        if new._tiers == old._tiers and bank.batch == new.sequences == old.sequences:  # the device has most of it
            for tier, some, mine, known in zip(new._tiers, unknown, new.tables, old.tables):
                mine[:, : known.shape[1]] = known
                tier.changed = some
    return bank.mirror or DeviceTables(bank)


class DeviceTables:
    """The page tables and spans of all rows of a bank, with room to grow.

    sequences: for how many at least there is room; those that are not there hold one token, which is nobody's. tokens:
    how long these may become at least.

    Addresses of exact pages int64 `[rows, columns, 2]` (keys, values), in units of 16 bytes, and of packed pages
    `[rows, columns]` or `[rows, columns, fields]`, as their `Reader` wants them; spans int32 `[rows, SPAN]`, and of
    each layer the work lists int32 `[2, rows of a layer + 1]` (see `kernels/packed_decode/schedule.py`).
    """

    def __init__(self, bank: Bank, sequences: int = 0, tokens: int = 0) -> None:
        self.device, self.kind = bank.device, bank.kind
        self.bank: Any = None
        first, packing = bank.layers[0], bank.packing
        self.wanted, self.sequences = (sequences, tokens), max(bank.batch, sequences)
        self.rows, self.layers = self.sequences * bank.heads, len(bank.layers)
        rows, bounds = self.rows * self.layers, bank.bounds
        # Where tokens are packed the exact tier stays as it is; else it grows, as the packed one does.
        grows = packing is None
        self.exact_columns = _ample(int(bounds.exact_pages.max(initial=0)), 64 if grows else 8)
        self.packed_columns = 0 if grows else _ample(int(bounds.packed_pages(packing).max(initial=0)), 32)
        if tokens:
            waiting = tokens if packing is None else min(tokens, int(packing.residual) + packing.group)
            pinned = max(extent.pinned for layer in bank.layers for extent in layer.extents)
            self.exact_columns = max(self.exact_columns, waiting // PAGE + 2 + pinned)
            if packing is not None:
                self.packed_columns = max(self.packed_columns, tokens // packing.page + 1)
        self._spec, reader = first.spec, first.codec.reader if first.codec else None
        self._learned: dict[str, torch.Tensor] = {}
        self._copied: dict[tuple[int, str], torch.Tensor] = {}
        self.page = packing.page if packing else schedule.TILE
        self.listed = choose(self.device).triton
        """Whether kernels want work lists."""
        self.watches = self.listed and bank_chooses(bank.layers)
        self.division = Division(self, bank.layers)
        self.readers = self.division.readers
        """What reads the packed pages of layers. A captured graph needs it, and its tensors, as they are."""
        self.constants = self.division.constants if self.listed else []
        fields = self._fields = KV if first.exact_pool.layout.holds is None else SIDES
        self._share_out(fields is KV)
        self._pages: np.ndarray | None = None
        self._ahead: int | None = None
        """The bounds (`Standing.version`) after which spans are written already for one more token of every row."""
        self.sent = False  # after `update`, whether what was sent is what the bank says
        self.watch: Watch | None = None
        """What is known of tokens that a policy chooses, once a step is a kernel's."""
        self.aside: Aside | None = None
        """Where that is brought up to date in a captured step."""
        self.picked: Picked | None = None
        """Of the step that is under way, where layers read what others pick."""
        self.shares: Shares | None = None
        self.left = Left(self, bank) if self.listed and any(compensates(layer) for layer in bank.layers) else None
        width = self.rows * schedule.SPAN + (2 * (self.rows + 1) if self.listed else 0)
        self._watched = slice(width, width + (self.rows * NUMBERS if self.watches else 0))
        self._divided = slice(self._watched.stop, None)
        width = self._watched.stop + self.division.width
        with torch.inference_mode(False):
            self._exact = torch.zeros((rows, self.exact_columns, len(fields)), dtype=torch.int64, device=self.device)
            several = (len(reader.fields),) if reader and len(reader.fields) > 1 else ()
            self._packed = torch.zeros((rows, self.packed_columns, *several), dtype=torch.int64, device=self.device)
            self.tables = self._exact, self._packed
            # A layer's spans, then its work lists.
            self._numbers = torch.zeros((self.layers, width), dtype=torch.int32, device=self.device)
            self._sending = Sending(self._numbers)
            shape = (len(fields), PAGE, first.spec.head_dim) if sequences else (0,)
            self._padding = torch.zeros(shape, dtype=first.spec.dtype, device=self.device)
        self.bind(bank)

    def bind(self, bank: Bank) -> bool:
        """Show the rows of this bank from now on, and be its device tables; False where they are of another kind, or
        there is no room for them."""
        if bank.kind != self.kind or not self._room(bank):
            return False
        self._show(bank)
        for tier in self._tiers:
            tier.track()
        return True

    def follow(self, kept: np.ndarray) -> None:
        """The bank has other sequences: number i is what was number `kept[i]`, -1 a new one. Only what is new has to be
        sent, where there is room for all; these are its device tables no more where there is not."""
        bank, seen = self.bank, len(self._tiers)
        if not self._room(bank):
            return
        moved, new = np.flatnonzero((kept >= 0) & (kept != np.arange(len(kept)))), np.flatnonzero(kept < 0)
        rows_of = self.division.rows_of
        old, here = rows_of(kept[moved], self.rows), rows_of(moved, self.rows)
        for table in (self._exact, self._packed)[:seen]:
            if len(moved):
                if table is self._packed:
                    old, here = self.division.standing(old), self.division.standing(here)
                before, after = sent(self.device, old, here)
                table.index_copy_(0, after, table.index_select(0, before))
        self._show(bank)
        for tier in self._tiers:
            tier.known()
            if len(new):
                tier.change(rows_of(new, bank.rows)[:, None], np.arange(tier.capacity))

    def _share_out(self, joins: bool) -> None:
        """How many programs work for these rows. joins: whether one kernel may attend over packed and exact pages,
        which then knows of no picks."""
        given = self.rows, self.readers[0], self._spec.dtype if joins else None
        self.programs = self.programs_of(*given) if self.listed else None
        self.joined = self.programs is not None and self.programs[1] == 0

    def _show(self, bank: Bank) -> None:
        if self.bank is not None:
            if self.bank is not bank and self.bank.live is not None and self.bank.live.watch is self.watch:
                self.bank.settle()
            self.bank.mirror = None  # they show one bank at a time
        if self.left is not None:
            self.left.forget()
        self.bank, bank.mirror, self._pages, self._ahead = bank, self, None, None
        self.synced: Any = None
        """The change in which a forward has brought these up to date (see `rows_of`)."""
        self._copied = {}
        self._tiers = [tier for tier in (bank.exact, bank.packed) if tier is not None]
        if bank.batch < self.sequences:
            page = torch.tensor([x.data_ptr() >> 4 for x in self._padding], device=self.device)
            self._exact.unflatten(0, (self.layers, -1))[:, bank.rows :, 0] = page

    @property
    def nbytes(self) -> int:
        """Bytes on the device and of what is sent there."""
        tables = self._exact.nbytes + self._packed.nbytes + self._sending.nbytes + self._padding.nbytes
        others = self.watch, self.left, self.shares, self.division, *self._learned.values()
        return tables + sum(x.nbytes for x in others if x is not None)

    def fit(self) -> bool:
        """Whether these are the bank's rows, and there is still room for what they hold."""
        bank = self.bank
        same = self._tiers == [tier for tier in (bank.exact, bank.packed) if tier is not None]
        room = zip(self._tiers, (self.exact_columns, self.packed_columns))
        # What has not changed since the device knows it had room then.
        known = all(tier.reach <= most for tier, most in room)
        return same and (known or self._room(bank))

    def _room(self, bank: Bank) -> bool:
        if bank.batch > self.sequences or (bank.batch < self.sequences and not self._padding.numel()):
            return False
        bounds = bank.bounds
        exact, packed = bounds.exact_pages.max(initial=0), bounds.packed_pages(bank.packing).max(initial=0)
        return bool(exact <= self.exact_columns and packed <= self.packed_columns)

    # -- what the device knows ----------------------------------------------------------------------------

    def sync(self, bounds: Bounds | None = None) -> None:
        """Make the page tables those of the bank. bounds: of its exact pages, as in `send_pages`."""
        bank, reader = self.bank, self.readers[0]
        send_pages(bank, bank.exact, self._fields, self._exact, 16, self.rows, bounds=bounds)
        if bank.packed is not None and reader is not None:
            standing = self.division.standing if self.division.width else None
            send_pages(bank, bank.packed, reader.fields, self._packed, reader.unit, self.rows, standing)
            for layer in bank.layers if reader.learned else ():
                self._copy(layer, reader.learned)

    def _copy(self, layer: LayerCache, names: tuple[str, ...]) -> None:
        """What a codec remembers of a layer's rows, to where kernels look for it."""
        for name in names:
            new = layer.learned.get(name)
            if new is None or self._copied.get((layer.index, name)) is new:
                continue
            if name not in self._learned:
                with torch.inference_mode(False):
                    shape = (self.layers, self.rows, *new.shape[1:])
                    self._learned[name] = torch.zeros(shape, dtype=new.dtype, device=self.device)
            (at,) = sent(self.device, self.division.place[layer.index, : len(new)])
            self._learned[name][layer.index].index_copy_(0, at, new)
            self._copied[layer.index, name] = new

    def update(self) -> None:
        """Page tables and spans, as the bank has them now: before a step of all rows."""
        known = not any(tier.changed for tier in self._tiers)
        self.sync()
        if self.left is not None:
            self.left.sync(self.bank)
        if self._ahead != self.bank.standing.grown:
            self._fill(self.bank.standing.of_layers())
            self.sent = False
        if not self.sent:
            self._sending.send()
        self.sent, self._ahead = self.sent and known, None

    def prepare(self) -> None:
        """Work out what the next step of all rows will want to know, while a GPU is still busy with this one."""
        self.sent = False
        if self.listed and self.device.type != "meta" and self.fit():
            self._fill(self.bank.standing.of_layers().appended(1))
            self._ahead = self.bank.standing.version

    @property
    def foreseen(self) -> bool:
        """Whether all that a step needs from here is there, its new pages too, and none is somebody else's."""
        bank, live, ahead = self.bank, self.bank.live, self.bank.ahead
        mine = bank.mirror is self and (live is None or not live.pending)
        version, foreign = bank.standing.version, any(tier.changed or tier.shared for tier in self._tiers)
        there = not bank.standing.full.any() if ahead is None else ahead.version == version
        return bool(mine and there and not foreign and self.left is None and self._ahead == version)

    def send_ahead(self) -> None:
        """Send what `prepare` wrote, where it is `foreseen`, before a step is begun. `update` looks whether it was."""
        bank, ahead = self.bank, self.bank.ahead
        if ahead is not None and not ahead.known:
            bank.exact.change(ahead.rows, ahead.columns)
            self.sync(bank.standing.of_layers().appended(1))
            bank.ahead = replace(ahead, known=True)
        if not self.sent:
            self._sending.send()
            self.sent = True

    def _fill(self, bounds: Bounds) -> None:
        """Write spans and work lists for bounds (see `Standing.of_layers`) where nobody reads just now."""
        span, reader, width = bounds.span(), self.readers[0], self.rows * schedule.SPAN
        alike = len(span.stop) == 1 and not (self.watches or self.division.width)
        numbers = self._sending.writable(alike)
        seen = np.zeros((len(span.stop), self.rows, schedule.SPAN), dtype=np.int32)  # of one layer if all are alike
        seen[:, self.bank.rows :, Span._fields.index("stop")] = 1
        for number, x in enumerate(span):
            seen[:, : self.bank.rows, number] = x
        if reader is not None and reader.positional:
            offset = self.bank.offset.reshape(self.layers, -1)[: len(seen)]
            seen[:, : self.bank.rows, len(span)] = bounds.packed_base + offset
        numbers[:, :width] = seen.reshape(len(seen), -1)
        if self.listed:
            pages = schedule.pages_of(seen, self.page, reader.team if reader else 1, self.joined)
            if self._pages is None or not np.array_equal(pages, self._pages):
                assert self.programs is not None
                self._pages, self._starts = pages, schedule.starts_of(pages, self.programs)
            numbers[:, width : self._watched.start] = self._starts.reshape(len(seen), -1)
        self.division.fill(numbers[:, self._divided], seen)
        live = self.bank.live
        if live is not None and live.watch is self.watch:
            numbers[:, self._watched] = self.watch.numbers(self.bank, bounds).reshape(self.layers, -1)

    # -- reading ------------------------------------------------------------------------------------------

    def pages(self, group: RowGroup, always: bool = False) -> tuple[Any, Any]:
        """Packed pages (None if there are none, unless `always`) and exact pages of a group's rows, for the kernels."""
        there, packed = self.division.places(group, self.device)
        exact, reader = schedule.Exact(self._exact[there], self._spec.dtype), self.division.reader(group)
        if reader is None or not (always or group.bounds.packed_tokens):
            return None, exact
        return self._pages_of(packed, reader), exact

    def programs_of(self, rows: int, reader: Reader | None, dtype: torch.dtype | None = None) -> schedule.Programs:
        """How many programs read packed and exact pages of so many rows; dtype: see `programs_for`."""
        if self.device.type == "meta":
            return schedule.Programs(1, 1, 1)
        given = rows, self.device, reader, self._spec.query_heads // self._spec.kv_heads, dtype
        found: schedule.Programs = kernels(self.device).programs_for(*given)
        return found

    def _pages_of(self, index: slice | torch.Tensor, reader: Reader) -> schedule.Packed:
        """The packed pages that stand there."""
        learned = (self._learned[name].flatten(0, 1)[index] for name in reader.learned)
        return schedule.Packed(self._packed[index], reader, tuple(learned))

    def attend(
        self,
        layer: LayerCache,
        queries: torch.Tensor,
        keys: torch.Tensor | None,
        values: torch.Tensor | None,
        scaling: float,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the newest token of each row of a layer, and attend over everything: the shape of `queries`.

        queries: `[rows, query_heads per kv head, head_dim]`; keys, values: `[rows, head_dim]`, None if the tokens are
        stored already; sinks: `[rows, query_heads per kv head]`, see `with_sinks`. `update` has run since `Bank.open`
        made room for the tokens.
        """
        role = "full" if self.picked is None else self.picked.role(layer)
        watches = self.watch is not None and bool(layer.known) and self.bank.live is not None
        policy: Any = layer.policy
        scores = role == "select" or (watches and policy.counts_steps)
        if scores:
            self.join(1)  # whose scores are no longer held
        if keys is not None and values is not None:
            self.append(layer, keys, values)
        kernel, (_, span, exact) = kernels(self.device), self._place(layer)
        starts, queries, numbers = self.starts(layer), queries.contiguous(), self._numbers[layer.index, self._divided]
        packed: Any = self.division.packed(layer.index, numbers, self._pages_of)
        if role == "sparse" and self.picked is not None and self.picked.there(layer):
            return self._attend_picked(layer, queries, scaling, span, packed, exact, sinks)
        scored = self._scores(queries, packed) if scores else {}
        left = None if self.listed else left_of_all(layer, queries, scaling)
        with_lse = bool(sinks is not None or left is not None or scored or self.left is not None)
        settings = {"starts": starts, "programs": self.programs, "with_lse": with_lse}
        if scored and keys is not None and self.device.type == "cuda":
            settings["follows"] = True
        out, lse = kernel.decode(queries, scaling, span, packed, exact, **settings, **scored)
        if self.left is not None and compensates(layer):
            self.left.merge(layer, queries, scaling, out, lse)
        out, lse = beside(out, lse, left)
        if role == "select" or (watches and self.aside is None):
            self._watch_step(layer, role, queries, scaling, lse, sinks, scored, packed)
        elif watches and self.aside is not None:
            with self.aside.reading(queries, lse, scored):
                self._watch_step(layer, role, queries, scaling, lse, sinks, scored, packed)
        return with_sinks(out, lse, sinks)

    def join(self, most: int = 0) -> None:
        """Wait for what the watch makes of the attention of all layers of a captured step but the last `most`."""
        if self.aside is not None:
            self.aside.join(most)

    def _scores(self, queries: torch.Tensor, packed: schedule.Packed | None) -> dict[str, torch.Tensor]:
        """Where kernels leave the scores of a step: of exact slots, and of packed ones that are not KIVI's."""
        slots = {"scores": self.exact_columns * PAGE}
        if packed is not None and packed.form.scores:
            slots["packed_scores"] = self.packed_columns * self.page
        return {
            name: torch.empty((*queries.shape[:2], count), dtype=torch.float32, device=self.device)
            for name, count in slots.items()
        }

    def _watch_step(
        self,
        layer: LayerCache,
        role: str,
        queries: torch.Tensor,
        scaling: float,
        lse: torch.Tensor | None,
        sinks: torch.Tensor | None,
        scored: dict[str, torch.Tensor],
        packed: schedule.Packed | None,
    ) -> None:
        """What a step's attention means for the tokens that are held, or picked."""
        from fivefold.kernels.watched import triton

        total: Any = lse if sinks is None or lse is None else torch.logaddexp(lse, sinks)
        spans, given, scores = self.spans(layer), None, scored.get("scores")
        width = self.exact_columns * PAGE + (0 if packed is None else self.packed_columns * self.page)
        if "packed_scores" in scored:
            given = scored["packed_scores"]
        elif scores is not None and packed is not None:
            given = triton.packed_received(queries, scaling, total, spans, packed, width)
        if role == "select":
            assert self.picked is not None and scores is not None
            reads = self.picked.reads
            self.picked.put(layer, triton.rank(scores, total, given, spans, width, reads.sink, reads.recent), spans)
        else:
            assert self.watch is not None
            self.watch.observe(layer, self.watched(layer), spans, self._place(layer)[2], scores, total, given)

    def _attend_picked(
        self,
        layer: LayerCache,
        queries: torch.Tensor,
        scaling: float,
        span: torch.Tensor,
        packed: schedule.Packed | None,
        exact: schedule.Exact,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention over what an earlier layer of this step picked, and the newest token; beside the whole exact tier
        where anything is packed."""
        assert self.picked is not None
        shares = self._shared()
        picks = self.picked.of(shares.near(self.picked, layer))
        spans, starts, programs = shares.spread(picks.shape[1])
        settings: dict[str, Any] = {"picks": picks, "with_lse": sinks is not None}
        if packed is None:
            settings |= {"starts": (starts, starts), "programs": (programs, programs)}
            span = spans
        else:
            assert self.programs is not None
            exact_starts = self.starts(layer)
            assert exact_starts is not None
            settings |= {"starts": (starts, exact_starts[1]), "programs": (programs, self.programs[1]), "within": True}
        out, lse = kernels(self.device).decode(queries, scaling, span, packed, exact, **settings)
        return with_sinks(out, lse, sinks)

    def _shared(self) -> Shares:
        if self.shares is None:
            tile = schedule.PICKS if self.packed_columns else schedule.TILE
            programs = kernels(self.device).programs_for(self.rows, self.device)[0]
            self.shares = Shares(self.rows, self.device, tile, programs)
        return self.shares

    # -- what a step looks at -----------------------------------------------------------------------------

    def starts(self, layer: LayerCache) -> torch.Tensor | None:
        """A layer's work lists, where kernels want them: int32 `[2, rows + 1]`."""
        if not self.listed:
            return None
        return self._numbers[layer.index][self.rows * schedule.SPAN : self._watched.start].view(2, -1)

    def spans(self, layer: LayerCache) -> torch.Tensor:
        """int32 `[rows, SPAN]`."""
        return self._numbers[layer.index][: self.rows * schedule.SPAN].view(self.rows, -1)

    def watched(self, layer: LayerCache) -> torch.Tensor:
        """Of a layer whose tokens are chosen, int32 `[rows, NUMBERS]` (see `Watch`)."""
        return self._numbers[layer.index][self._watched].view(self.rows, -1)

    def overwrite(self) -> None:
        """What the last step chose becomes so (see `Watch.overwrite`)."""
        assert self.watch is not None
        spans = self._numbers[:, : self.rows * schedule.SPAN].view(self.layers, self.rows, -1)
        numbers = self._numbers[:, self._watched].view(self.layers, self.rows, -1)
        exact = schedule.Exact(self._exact, self.bank.layers[0].spec.dtype)
        self.watch.overwrite(spans, numbers, exact)

    def follow_step(self, picked: Picked | None, watches: bool) -> None:
        """Before `update`: whether the step that comes watches tokens that are held, and where layers leave what others
        are to read."""
        self.picked = picked if self.listed else None
        if self.aside is not None:
            self.aside.forget()
        if self.joined and self.picked is not None:
            self._share_out(False)
            self._pages = self._ahead = None
        for layer in self.bank.layers:
            if self.picked is not None and self.picked.role(layer) == "sparse":  # not while a graph is captured
                self._shared().spread(self.picked.reads.top + 1)
                self._shared().near(self.picked, layer)
        if self.watches and watches:
            if self.watch is None:
                self.watch = Watch(self, self.bank)
                self.aside = Aside(self.device) if self.device.type == "cuda" else None
            if self.watch.adopt(self.bank):
                self._ahead = None  # it was worked out without

    def append(self, layer: LayerCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the newest token of each row of a layer, `[rows, head_dim]`: see `attend`."""
        kernels(self.device).append(keys.contiguous(), values.contiguous(), *self.newest(layer))

    def newest(self, layer: LayerCache) -> tuple[torch.Tensor, Any]:
        """A layer's spans and exact pages, for a kernel that stores the newest token of each row itself."""
        return self._place(layer)[1:]

    def _place(self, layer: LayerCache) -> tuple[slice, torch.Tensor, Any]:
        """A layer's rows, their spans and their exact pages."""
        rows = slice(layer.index * self.rows, (layer.index + 1) * self.rows)
        return rows, self.spans(layer), schedule.Exact(self._exact[rows], layer.spec.dtype)


def _ample(columns: int, least: int) -> int:
    """Room for half as much again."""
    return columns + max(least, columns // 2)
