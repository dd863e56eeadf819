"""Layers of a bank whose rows stand alike, and whose policy chooses in all of them alike: what is due after a step
moves in all of them at once.

The host has to plan a step where tokens are packed. Layer by layer that is some hundred small operations, and waiting
for a device, for each of them; and what is due in one is due in the others, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fivefold.store.bank import Bank
from fivefold.store.group import Stacked
from fivefold.store.held import Held
from fivefold.store.layer_cache import LayerCache
from fivefold.store.plan import NUMBERS, Demote, EvictPacked, Stored, execute
from fivefold.store.rows import Bounds
from fivefold.store.scattered import Copies


class Joined(Stacked):
    """All rows of some layers, and what their policy knows of them."""

    def __init__(self, layers: Sequence[LayerCache], bounds: Bounds, held: Held) -> None:
        super().__init__(layers, np.arange(layers[0].rows), bounds)
        self._held = held

    @property
    def held(self) -> Held | None:
        return self._held

    @held.setter
    def held(self, held: Held) -> None:
        self._held = held

    @property
    def together(self) -> int:
        return 1


def advance(bank: Bank, revocable: int) -> list[LayerCache]:
    """After a step: let the policy of a bank's layers pack what is due, or evict for it. Returns the layers in which it
    has: all of them, or none where they do not stand alike, or nothing is packed."""
    layers: Any = bank.layers
    first = layers[0]
    policy, packing = first.policy, bank.packing
    if len(layers) < 2 or revocable or policy is None or not policy.joins or packing is None or bank.paired:
        return []
    if bank.live is not None or not _alike(bank, layers):
        return []
    held, bounds = [layer.held[0] for layer in layers], bank.standing.one(0)
    if policy.step(held[0], bounds, first.packing_of(held[0])) is not None:
        return []
    at_once = NUMBERS // (bank.rows * held[0].slots)
    done: list[LayerCache] = []
    for start in range(0, len(layers), at_once) if at_once > 1 else ():
        some = layers[start : start + at_once]
        group = Joined(some, bounds, _joint(held[start : start + at_once]))
        assert group.held is not None
        stored = Stored(bounds, some[0].packing_of(group.held), partial(group.exact_parts, "keys"), group.token)
        plan = policy.after_step(group.held, stored, 0)
        if not isinstance(plan, Demote | EvictPacked):
            break
        with bank.atomic():
            execute(some[0], group, plan, group.held)
            _apart(some, group.held)
        done += some
    return done


def _alike(bank: Bank, layers: Sequence[Any]) -> bool:
    """Whether all rows have the same bounds, and layers differ in nothing but in what is known of their tokens, and
    learned of their rows."""
    first, codec = layers[0], layers[0].codec
    # Of a policy that brings its codec layers with the same policy have the same one, but for what it has learned.
    if codec is None or (codec.form is None and first.policy.evicts):
        return False
    for layer in layers:
        if layer.policy != first.policy or len(layer.known) != 1 or not all(layer.head_chosen):
            return False
        other = layer.codec
        if other is None or type(other) is not type(codec) or other.form != codec.form:
            return False
        if other.layout != codec.layout or layer.learned.keys() != first.learned.keys():
            return False
    kinds = {
        (one.rows, one.slots, one.prompt, one.seen, one.share, tuple(one.extra))
        for layer in layers
        for one in layer.known
    }
    return len(kinds) == 1 and next(iter(kinds))[0] == bank.rows and bank.standing.level


def _joint(parts: Sequence[Held]) -> Held:
    """What is known of all rows of several layers. The layer that it names is the first one."""
    extra = {name: torch.cat([one.extra[name] for one in parts]) for name in parts[0].extra}
    places, positions, scores = (torch.cat([getattr(x, name) for x in parts]) for name in _BY_ROW)
    return replace(parts[0], places=places, positions=positions, scores=scores, extra=extra)


_BY_ROW = ("places", "positions", "scores")


def _apart(layers: Sequence[LayerCache], held: Held | None) -> None:
    """What is known of each layer's rows, in tensors of its own."""
    assert held is not None
    rows, copied = layers[0].rows, Copies()
    for number, layer in enumerate(layers):
        at, before = slice(number * rows, (number + 1) * rows), layer.held[0]
        extra = {name: copied.of(x[at]) for name, x in held.extra.items()}
        own = replace(before, positions=copied.of(held.positions[at]), scores=copied.of(held.scores[at]), extra=extra)
        layer.held[0] = replace(own, prompt=held.prompt, seen=held.seen, share=held.share, final=held.final)
        layer.regroup()
    copied.now()
