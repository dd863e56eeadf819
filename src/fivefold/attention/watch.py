"""What a decoding step does on the device where a policy chooses tokens, or layers read what others picked.

**Tokens that are held.** While steps are a kernel's, what a policy knows of the tokens is the device's (`Watch`): a
step reads positions and scores, and writes new scores, the slot of the token that goes, and the newest token's key and
value elsewhere, so that nothing is changed that is committed. What it chose becomes so once it is committed, before
anything is read (`Bank.flush`). The host knows counts alone, which are the same whatever goes. Whoever else asks for a
layer's `held` gets it as ever (`Bank.settle`).

**Picks.** A layer that picks ranks its slots by what they received, and its `topk` is what later layers read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fivefold.kernels.packed_decode import schedule
from fivefold.kernels.packed_decode.reference import Form
from fivefold.store.bank import Bank
from fivefold.store.held import Held
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import PAGE, Bounds, run_of
from fivefold.store.scattered import Copies

NUMBERS = 4
"""Of each row and step, see `kernels/watched/triton.py`."""
GROWS, GIVES = 1, 2


def why_not_watched(layer: LayerCache, role: str) -> str | None:
    """Why a GPU's kernels do not watch this layer's tokens in a step, or pick of them, in a few words; None if they
    do."""
    if role != "full" and any(layer.head_chosen):
        return "what is picked are tokens that are chosen"
    if role != "full" and 0 < sum(extent.recent is None for extent in layer.extents) < len(layer.extents):
        return "heads with a window stand beside those that pick"
    reader = None if layer.codec is None else layer.codec.reader
    if reader is not None and not isinstance(reader, Form):
        if role != "full":
            return "no kernel picks of such pages"
        if any(layer.head_chosen) and not reader.scores:
            return "no kernel says what this codec's tokens receive"
    if any(layer.head_chosen):
        policy: Any = layer.policy
        why: str | None = policy.why_not_step(layer.codec is not None)
        return why
    return None


def unsteady(layers: Mapping[int, LayerCache], revocable: int) -> bool:
    """Whether the host has to plan the next step of tokens that are chosen, as things stand just now."""
    held = [(layer.policy, one) for layer in layers.values() for one in layer.known]
    return any(revocable > 0 or (policy is not None and policy.collects(one)) for policy, one in held)


Known = tuple[tuple[Held, np.ndarray], ...]
Kind = tuple[Any, Held, int, np.ndarray]
"""Rows of which a policy is asked together: a layer and a `Held` of theirs, their first row in it, and which of
`[layers * rows]` of the device tables they are."""


@dataclass(frozen=True)
class Live:
    """What a policy knows of the tokens of a bank's rows is in `watch`: of each layer the `Held`s without it, and their
    rows. kinds: all rows, those together of which a policy is asked the same where layers stand alike. final int64
    `[layers * rows]`: how many tokens had been seen when one last went. opened: whether `Bank.open` has made room for a
    token that is not known yet. pending: the last step's choice has yet to become so."""

    watch: Watch
    known: tuple[Known, ...]
    kinds: tuple[Kind, ...]
    final: np.ndarray
    opened: bool = False
    pending: bool = False


class Watch:
    """Positions, scores and choices of all rows of device tables, `[layers, rows, slots]`; nothing that is committed is
    written by a step.

    positions int32, scores float32: as in `Held`, slot by slot. new: the scores after a step. goes int32 `[layers,
    rows]`, stash `[layers, rows, 2, head_dim]`: see `tally`. low int32 `[layers, rows]`: no token up to this position
    ever goes. merges: `into`, `merged`, and the threshold before and after a step (see `absorb`); None where nothing is
    merged.
    """

    def __init__(self, tables: Any, bank: Bank) -> None:
        spec, packing = bank.layers[0].spec, bank.packing
        self.rows = tables.rows
        self.slots = tables.exact_columns * PAGE + (0 if packing is None else tables.packed_columns * packing.page)
        self.noise: dict[int, Any] = {}
        """What layers' policies draw from. A captured graph needs it where it is."""
        shape, device = (tables.layers, tables.rows), tables.device
        with torch.inference_mode(False):
            self.positions = torch.zeros((*shape, self.slots), dtype=torch.int32, device=device)
            self.scores, self.new = (torch.zeros((*shape, self.slots), device=device) for _ in range(2))
            self.low, self.goes = (torch.full(shape, -1, dtype=torch.int32, device=device) for _ in range(2))
            self.stash = torch.zeros((*shape, 2, spec.head_dim), dtype=spec.dtype, device=device)
            self.merges: tuple[torch.Tensor, ...] | None = None
            if any(layer.policy is not None and layer.policy.absorbs for layer in bank.layers):
                into, (old, new) = torch.full_like(self.goes, -1), torch.full((2, *shape), torch.nan, device=device)
                self.merges = into, torch.zeros_like(self.stash), old, new

    @property
    def nbytes(self) -> int:
        tensors = self.positions, self.scores, self.new, self.low, self.goes, self.stash
        return sum(x.nbytes for x in (*tensors, *(self.merges or ())))

    # -- whose it is --------------------------------------------------------------------------------------

    def adopt(self, bank: Bank) -> bool:
        """From now on what is known of the rows' tokens is here; False if it was already."""
        if bank.live is not None and bank.live.watch is self:
            return False
        known, copied = list[Known](), Copies()
        for index, layer in enumerate(bank.layers):
            mine = []
            for held in layer.held:
                # They go up, so nobody has to ask a device which these are.
                rows = np.arange(bank.rows) if held.rows == bank.rows else held.places.cpu().numpy()
                at = run_of(rows) or torch.from_numpy(rows).to(self.positions.device)
                for there, x in ((self.positions, held.positions), (self.scores, held.scores)):
                    if isinstance(at, slice):
                        copied.add(there[index, at, : held.slots], x)
                    else:
                        there[index, at, : held.slots] = x
                self.low[index, at] = layer.policy.guards(held)[0]
                if self.merges is not None:
                    self.merges[2][index, at] = held.extra.get("threshold", torch.nan)
                none = held.positions.new_empty((held.rows, 0))
                bare = replace(held, positions=none, scores=none.float())
                mine.append((bare, rows))
            known.append(tuple(mine))
        copied.now()
        for layer, some in zip(bank.layers, known):
            layer.known = [held for held, _ in some]
        bank.live = Live(self, tuple(known), self._kinds(bank, known), np.zeros(bank.standing.rows, dtype=np.int64))
        return True

    def _each(self, bank: Bank, known: Sequence[Known]) -> Iterator[Kind]:
        """All rows, layer by layer."""
        for layer, some in zip(bank.layers, known):
            for held, rows in some:
                yield layer, held, int(rows[0]), layer.index * self.rows + rows

    def _kinds(self, bank: Bank, known: Sequence[Known]) -> tuple[Kind, ...]:
        """See `Live`."""
        kinds: dict[tuple[object, ...], list[Kind]] = {}
        for layer, held, row, rows in self._each(bank, known):
            kinds.setdefault((layer.policy, held.prompt, held.share, row), []).append((layer, held, row, rows))
        return tuple((*some[0][:3], np.concatenate([kind[3] for kind in some])) for some in kinds.values())

    def held(self, bank: Bank, stepped: bool = False) -> list[list[Held]]:
        """What the policy knows, of each layer. stepped: after a step that the host is yet to plan, as if its attention
        had just been observed."""
        live, out, copied, newest = bank.live, [], Copies(), dict[int, list[torch.Tensor]]()
        assert live is not None and not live.pending
        more = int(live.opened and not stepped)
        for index, (layer, known) in enumerate(zip(bank.layers, live.known)):
            mine = []
            for held, rows in known:
                bounds = bank.standing.one(layer.base + int(rows[0]))
                slots, seen = int(bounds.length) - more, int(bounds.seen) - more
                at = run_of(rows) or torch.from_numpy(rows).to(self.positions.device)
                scores = copied.of((self.new if stepped else self.scores)[index, at, :slots])
                positions = copied.of(self.positions[index, at, :slots])
                if stepped:
                    newest.setdefault(seen - 1, []).append(positions[:, -1])
                final = max(held.final, int(live.final[layer.base + rows[0]]))
                extra = held.extra
                if self.merges is not None:
                    threshold = self.merges[2][index, at].clone()
                    if "threshold" in extra or not (threshold.is_meta or bool(threshold.isnan().any())):
                        extra = {**extra, "threshold": threshold}
                mine.append(replace(held, positions=positions, scores=scores, extra=extra, seen=seen, final=final))
            out.append(mine)
        copied.now()
        for position, some in newest.items():
            torch._foreach_zero_(some)
            torch._foreach_add_(some, position)
        return out

    # -- a step -------------------------------------------------------------------------------------------

    def numbers(self, bank: Bank, bounds: Bounds) -> np.ndarray:
        """What a step that ends at these bounds (see `Standing.of_layers`) has to know of each row: int32 `[layers,
        rows, NUMBERS]`."""
        return self._planned(bank, bounds)[0]

    def _planned(self, bank: Bank, bounds: Bounds) -> tuple[np.ndarray, bool]:
        """`numbers`, and whether the host has to plan what follows."""
        out, asks = np.zeros((len(bank.layers) * self.rows, NUMBERS), dtype=np.int32), False
        live, found = bank.live, dict[tuple[object, ...], tuple[tuple[int, ...], bool]]()
        assert live is not None
        alike = len(bounds.length) == 1
        for layer, held, row, rows in live.kinds if alike else self._each(bank, live.known):
            at = Bounds(*(int(x[0 if alike else layer.index, row]) for x in bounds))
            key = layer.policy, held.prompt, held.share, at
            if key not in found:
                now = replace(held, seen=int(at.seen))
                gives = layer.policy.step(now, at, layer.packing_of(now))
                recent = layer.policy.guards(now)[1]
                found[key] = (GIVES if gives else GROWS, now.seen - 1, recent, now.seen - now.basis), gives is None
            out[rows], ask = found[key]
            asks = asks or ask
        return out.reshape(len(bank.layers), self.rows, NUMBERS), asks

    def observe(
        self,
        layer: LayerCache,
        numbers: torch.Tensor,
        spans: torch.Tensor,
        exact: schedule.Exact,
        scores: torch.Tensor | None,
        lse: torch.Tensor | None,
        given: torch.Tensor | None,
    ) -> None:
        """A step's attention has come: the statistic and the choice, all on the device (see `tally`)."""
        policy: Any = layer.policy
        spec, index = layer.spec, layer.index
        noise = self.noise[index] = None if scores is None else policy.noise(self.positions.device)
        _kernels().tally(
            scores, lse, given, noise, "least" if policy.loses is None else policy.loses, spec.layer, spec.kv_heads,
            self.scores[index], self.positions[index], self.low[index], numbers, spans, self.new[index],
            self.goes[index], self.stash[index], exact,
        )  # fmt: skip
        if self.merges is not None and policy.absorbs:
            into, merged, old, new = (x[index] for x in self.merges)
            stash = self.stash[index]
            _kernels().absorb(self.goes[index], numbers, spans, exact, old, *policy.absorbs, new, stash, into, merged)

    def advance(self, bank: Bank) -> bool:
        """After a step: what the host knows of it becomes so; False where it has to plan what follows."""
        numbers, asks = self._planned(bank, bank.standing.of_layers())
        live = bank.live
        assert live is not None and bank.change is not None
        if asks:
            return False
        rows = np.flatnonzero(numbers[:, : bank.rows, 0].reshape(-1) == GIVES)
        if len(rows):
            if bank.exact.shared:
                self._unshare(bank, rows)
            bank.give(rows)
        final = live.final.copy()
        final[rows] = bank.standing.seen(rows)
        bank.live = replace(live, final=final, opened=False, pending=True)
        return True

    def _unshare(self, bank: Bank, rows: np.ndarray) -> None:
        """Somebody else may hold the pages that a token is about to be written into: the host has to know which."""
        assert bank.change is not None
        exact, bounds = bank.exact, bank.bounds
        if not (exact.pool.references(exact.held(bounds.exact_pages)) > 1).any():
            exact.shared = False
            return
        if self.goes.is_meta:
            return
        bounds = bank.at(rows)
        for which in (self.goes, *(self.merges or ())[:1]):
            slots = which.cpu().numpy()[:, : bank.rows].reshape(-1)[rows] - bounds.packed_tokens
            some = (slots >= 0) & (slots < bounds.exact_tokens - 1)
            exact.unshare(bank.change, rows[some], slots[some] // PAGE)

    def overwrite(self, spans: torch.Tensor, numbers: torch.Tensor, exact: schedule.Exact) -> None:
        """The last step's choice becomes so, on the device: spans and numbers of all layers, as they were then."""
        if not self.goes.is_meta:
            given = self.goes, self.stash, self.new, self.merges, numbers, spans
            _kernels().overwrite(*given, self.positions, self.scores, exact)


def _kernels() -> Any:
    from fivefold.kernels.watched import triton

    return triton


class Aside:
    """What a captured step makes of its attention. No later layer of it wants to know, so it runs on a stream of its
    own, beside the products of the layers; what it reads is held until these have waited for it (`join`)."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._under_way: list[tuple[torch.cuda.Event, tuple[Any, ...]]] = []

    @contextmanager
    def reading(self, *held: Any) -> Iterator[None]:
        """Within it, what is launched goes there, behind what the layers have come to."""
        main = torch.cuda.current_stream(self._stream.device)
        if not torch.cuda.is_current_stream_capturing():
            yield
            return
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream):
            yield
        self._under_way.append((self._stream.record_event(), held))

    def forget(self) -> None:
        """Before a step: what one that failed left."""
        self._under_way.clear()

    def join(self, most: int = 0) -> None:
        """Wait until all but the latest `most` are done."""
        while len(self._under_way) > most:
            event, _ = self._under_way.pop(0)
            torch.cuda.current_stream(self._stream.device).wait_event(event)


def bank_chooses(layers: Sequence[Any]) -> bool:
    """Whether a policy chooses tokens of some rows."""
    return any(any(layer.head_chosen) for layer in layers)
