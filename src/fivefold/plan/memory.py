"""What a cache takes, to the byte, without any of it: the store itself at work on tensors that hold nothing.

A *rehearsal* is a session whose pages lie on torch's meta device. It is fed chunks and steps of the shape that a model
would feed it; the tables, the pages, their slabs and what the policies remember are then those of a real cache, since
the same code made them, and `report` counts them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from fivefold.attention.fused import why_not
from fivefold.attention.tables import tables_of
from fivefold.engine.build import build
from fivefold.kernels.choice import Choice, planned
from fivefold.plan.shape import ModelShape
from fivefold.recipe import Recipe
from fivefold.report import Report, measure
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.spec import LayerSpec, Pools

NOWHERE = torch.device("meta")
GPU = Choice("cuda", "a GPU is planned for")


def specs_of(shape: ModelShape, dtype: torch.dtype, sliding: bool = False) -> list[LayerSpec]:
    """The layers of a model that a recipe compresses, on the meta device."""
    out = []
    for index, layer in enumerate(shape.layers):
        if layer.kind == "full" or (sliding and layer.kind == "sliding"):
            out.append(
                LayerSpec(
                    layer=index,
                    layers=len(shape.layers),
                    kv_heads=layer.kv_heads,
                    query_heads=layer.query_heads,
                    head_dim=layer.head_dim,
                    dtype=dtype,
                    device=NOWHERE,
                    model=shape.signature,
                    config=shape.config,
                    window=layer.window if layer.kind == "sliding" else None,
                )
            )
    return out


class Rehearsal:
    """A cache of a recipe for a model, of which only the sizes exist.

    specs: as `specs_of` makes them. hidden: the width of the model's residual stream, which some codecs look at. path:
    which kernels the device has for which this is planned.
    """

    def __init__(self, recipe: Recipe, specs: Sequence[LayerSpec], hidden: int = 1, path: Choice = GPU) -> None:
        self.recipe, self.hidden, self.path = recipe, hidden, path
        self.session = build(recipe, specs, Pools())
        self.session.choose_together = self._choose_together  # type: ignore[method-assign]

    def feed(self, batch: int, tokens: int) -> None:
        """A forward of so many tokens of each of `batch` sequences."""
        session = self.session
        with planned(self.path), session.atomic():
            session.admit(batch, tokens, None, None)
            for index, store in session.stores.items():
                if not store.batch:
                    store.start(batch)
                if index not in session.stepping:
                    for group in store.groups:
                        self._take(store, group, tokens)

    def _take(self, store: LayerCache, group: RowGroup, tokens: int) -> None:
        spec, policy, rows = store.spec, store.policy, len(group.rows)

        def nothing(*shape: int, dtype: torch.dtype = spec.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=NOWHERE)

        keys, values = (nothing(rows, tokens, spec.head_dim) for _ in range(2))
        if store.codec is not None and store.codec.contextual and group.bounds.seen == 0:
            sequences = group.rows // spec.kv_heads
            queries = nothing(rows, spec.query_heads // spec.kv_heads, tokens, spec.head_dim)
            inputs = nothing(len(np.unique(sequences)), tokens, self.hidden)
            store.learn(group, self.session.offsets[sequences], queries, keys, values, inputs)
        observed = None
        if tokens > 1 and group.held is not None and policy is not None and policy.chooses and policy.observes != 0:
            observed = nothing(rows, group.held.slots + tokens, dtype=torch.float32)
        store.append(group, keys, values, advance=tokens > 1, observed=observed)
        watched = group.held is not None and policy is not None and policy.watching(group.held)
        selects = self.session.roles.get(spec.layer) == "select"
        if tokens == 1 and not (watched or selects):
            if why_not(store, NOWHERE, spec.query_heads // spec.kv_heads) is None:
                tables_of(store.bank).sync()

    def _choose_together(self) -> None:
        """Layers that share a budget by their attention: nobody knows it, and each gets an even share."""
        session = self.session
        if session.stores[session.first].policy is not None and session.stores[session.first].policy.together:
            for store in session.stores.values():
                store.after_layers(dict.fromkeys(range(store.batch), 1.0))
                session.pools.budget.trim()

    def report(self) -> Report:
        """What a cache that was fed the same would report."""
        self.session.tidy()
        return measure(self.session, str(self.recipe))


def chunks(tokens: int, chunk: int) -> Iterator[int]:
    """The sizes of the forwards that read a prompt."""
    for first in range(0, tokens, chunk):
        yield min(chunk, tokens - first)


def rehearse(
    recipe: Recipe,
    shape: ModelShape,
    context: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int | None = None,
    generated: int = 0,
    sliding: bool = False,
) -> Report:
    """The report of a cache of `batch` sequences that were read in chunks, `context` tokens of each in all, the last
    `generated` of them one by one."""
    cache = Rehearsal(recipe, specs_of(shape, dtype, sliding), shape.hidden)
    for tokens in chunks(context - generated, chunk or context):
        cache.feed(batch, tokens)
    for _ in range(generated):
        cache.feed(batch, 1)
    return cache.report()
