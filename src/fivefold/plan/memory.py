"""What a cache takes, to the byte, without any of it: the store itself at work on tensors that hold nothing.

A *rehearsal* is a session whose pages lie on torch's meta device. It is fed chunks and steps of the shape that a model
would feed it; the tables, the pages, their slabs and what the policies remember are then those of a real cache, since
the same code made them, and `report` counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fivefold.attention.fused import why_not
from fivefold.attention.tables import tables_of
from fivefold.engine import decoding
from fivefold.engine.arrivals import Arrival
from fivefold.engine.build import build
from fivefold.errors import ProfileError
from fivefold.kernels.choice import Choice, planned
from fivefold.methods import ReadPolicy
from fivefold.plan.shape import ModelShape
from fivefold.plan.time import Read, chunks, pairs
from fivefold.recipe import Recipe
from fivefold.report import Report, measure
from fivefold.store.context import Rope
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.spec import LayerSpec, Pools

NOWHERE = torch.device("meta")
GPU = Choice("cuda", "a GPU is planned for")
STATE = 4
"""Bytes of a number of a linear layer's recurrent state, which transformers keeps in float32."""


def specs_of(shape: ModelShape, dtype: torch.dtype, sliding: bool = False) -> list[LayerSpec]:
    """The layers of a model that a recipe compresses, on the meta device."""
    return [
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
            rope=Rope(torch.ones(layer.head_dim // 2), layer.head_dim),  # its angles take no bytes of a cache
            cap=layer.cap,
            window=layer.window if layer.kind == "sliding" else None,
        )
        for index, layer in enumerate(shape.layers)
        if layer.kind == "full" or (sliding and layer.kind == "sliding" and not layer.chunked)
    ]


class Rehearsal:
    """A cache of a recipe for a model, of which only the sizes exist.

    specs: those of `specs_of` that have a cache; absent: those whose attention is left out. hidden: the width of the
    model's residual stream, which some codecs look at. path: which kernels the device has for which this is planned.
    """

    def __init__(
        self,
        recipe: Recipe,
        specs: Sequence[LayerSpec],
        hidden: int = 1,
        path: Choice = GPU,
        absent: Sequence[LayerSpec] = (),
    ) -> None:
        self.recipe, self.hidden, self.path = recipe, hidden, path
        self.session = build(recipe, specs, Pools(), absent=absent)
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

    def read(self, context: int, batch: int, chunk: int | None = None, generated: int = 0) -> None:
        """Feed `context` tokens of each sequence, in chunks, the last `generated` of them one by one."""
        for tokens in (*chunks(context - generated, chunk), *[1] * generated):
            self.feed(batch, tokens)

    def _take(self, store: LayerCache, group: RowGroup, tokens: int) -> None:
        spec, policy, rows = store.spec, store.policy, len(group.rows)

        def nothing(*shape: int, dtype: torch.dtype = spec.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=NOWHERE)

        keys, values = (nothing(rows, tokens, spec.head_dim) for _ in range(2))
        if store.codec is not None and group.bounds.seen == 0:
            sequences = group.rows // spec.kv_heads
            queries = nothing(rows, spec.query_heads // spec.kv_heads, tokens, spec.head_dim)
            inputs = nothing(len(np.unique(sequences)), tokens, self.hidden)
            store.learn(group, self.session.offsets[sequences], lambda: (queries, keys, values, inputs))
        observed = None
        if tokens > 1 and group.held is not None and policy is not None and policy.first_counted(tokens) < tokens:
            observed = nothing(rows, group.held.slots + tokens, dtype=torch.float32)
        if tokens > 1:
            self.session.arrivals.take(Arrival(store, group, keys, values, observed), self.session.revocable)
        else:
            store.append(group, keys, values, advance=False)
        watched = group.held is not None and policy is not None and policy.watching(group.held)
        alone = tokens == 1 and not watched and self.session.reads.roles.get(spec.layer) != "select"
        if alone and why_not(store, NOWHERE, spec.query_heads // spec.kv_heads) is None:
            tables_of(store.bank).sync()  # a kernel reads these rows

    def _choose_together(self) -> None:
        """Layers that share a budget by their attention: nobody knows it yet, and each gets an even share."""
        session = self.session
        policy: Any = session.stores[session.first].policy
        if policy is not None and policy.together:
            for store in session.stores.values():
                store.after_layers(dict.fromkeys(range(store.batch), 1.0))
                session.pools.budget.trim()

    def report(self) -> Report:
        """What a cache that was fed the same would report."""
        self.session.tidy()
        with planned(self.path):
            return measure(self.session, str(self.recipe), decoding=decoding.describe(self.session))

    def why_no_kernel(self) -> str | None:
        """Why a decoding step is not all kernels whose rate is known, in a few words; None if it is."""
        with planned(self.path):
            why = next((why for why in self.session.why_not_fused().values() if why is not None), None)
        codecs = [store.codec for store in self.session.stores.values() if store.codec is not None]
        if why is None and any(codec.form is None for codec in codecs):
            return "how fast the kernel of its pages is has not been measured"
        return why

    def reads(self) -> tuple[Read, ...]:
        """What the next decoding step reads of the cache, by kind of page."""
        found: dict[tuple[Any, int], list[int]] = {}
        for bank in self.session.banks:
            bounds, spec, count = bank.bounds, bank.layers[0].spec, len(bank.layers)
            token = 2 * spec.head_dim * spec.dtype.itemsize
            kinds: list[tuple[Any, int, int]] = [
                ("exact", 8 * spec.dtype.itemsize, int(bounds.exact_tokens.sum()) * token)
            ]
            packed = int(bounds.packed_tokens.sum())
            if packed:
                codec = bank.layers[0].codec
                assert codec is not None
                bits = codec.form.bits if codec.form is not None else 16
                kinds.append(("packed", bits, packed * codec.layout.nbytes // codec.layout.tokens))
            for kind, bits, nbytes in kinds:
                so_far = found.setdefault((kind, bits), [0, 0])
                so_far[0], so_far[1] = so_far[0] + nbytes, so_far[1] + count
        return tuple(Read(kind, bits, nbytes, count) for (kind, bits), (nbytes, count) in found.items())


def reach_of(
    recipe: Recipe, shape: ModelShape, context: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[float, bool]:
    """The share of the pairs of a query and a key before it that the heads of full layers compute of such a prompt, and
    whether heads of one layer differ in that. Layers whose attention is left out do not count."""
    shares, split = [], False
    for spec in recipe.divided(specs_of(shape, dtype))[0]:
        extents = recipe.extents(spec)
        split = split or len(set(extents)) > 1
        # A window of the text is for what comes after a prompt.
        windows = [None if one.recent is None or one.share is not None else one.sink + one.recent for one in extents]
        shares += [pairs(context, window) / pairs(context, None) for window in windows]
    return (sum(shares) / len(shares) if shares else 1.0), split


def rehearse(
    recipe: Recipe,
    shape: ModelShape,
    context: int,
    batch: int = 1,
    *,
    dtype: torch.dtype = torch.bfloat16,
    chunk: int | None = None,
    generated: int = 0,
    sliding: bool = False,
    path: Choice = GPU,
) -> Rehearsal:
    """A cache of `batch` sequences that were read in chunks, `context` tokens of each in all, the last `generated` of
    them one by one."""
    kept, absent = recipe.divided(specs_of(shape, dtype, sliding))
    cache = Rehearsal(recipe, kept, shape.hidden, path, absent)
    cache.read(context, batch, chunk, generated)
    return cache


def running(recipe: Recipe, shape: ModelShape, dtype: torch.dtype, sliding: bool = False) -> ModelShape:
    """The model as a forward reads it: without the attention modules that the recipe leaves out, whose weights are
    there all the same (biases of theirs, which are next to nothing, count as read)."""
    gone = {spec.layer: spec for spec in recipe.divided(specs_of(shape, dtype, sliding))[1]}
    if not gone:
        return shape
    heads = sum(2 * (spec.query_heads + spec.kv_heads) * spec.head_dim for spec in gone.values())
    parameters = shape.parameters - shape.hidden * heads
    dense = shape.parameters - shape.routed
    weight_bytes = shape.weight_bytes - round((shape.weight_bytes - shape.routed_bytes) * shape.hidden * heads / dense)
    layers = tuple(
        replace(layer, kind="linear") if index in gone else layer for index, layer in enumerate(shape.layers)
    )
    return replace(shape, layers=layers, parameters=parameters, weight_bytes=weight_bytes)


def beside(shape: ModelShape, context: int, batch: int, dtype: torch.dtype, sliding: bool = False) -> int:
    """Bytes of what transformers itself keeps in layers that no recipe compresses: windows, latents and states."""
    own = {spec.layer for spec in specs_of(shape, dtype, sliding)}
    total = 0
    for index, layer in enumerate(shape.layers):
        if index not in own:
            total += layer.tokens(context) * layer.numbers * dtype.itemsize
        total += layer.state * STATE
    return total * batch


def report_of(
    recipe: Recipe, shape: ModelShape, context: int, batch: int = 1, *, sliding: bool = False, **settings: Any
) -> Report:
    """The report of such a cache, the layers that are not compressed included."""
    dtype = settings.get("dtype", torch.bfloat16)
    others = beside(shape, context, batch, dtype, sliding)
    if not specs_of(shape, dtype, sliding):
        nothing = {part.name: 0 for part in fields(Report)}
        given = {"recipe": str(recipe), "tokens": context * batch, "kept_tokens": 1.0, "bits": 8.0 * dtype.itemsize}
        return Report(**{**nothing, **given, "decoding": "", "sliding": others, "exact_equivalent": others})
    report = rehearse(recipe, shape, context, batch, sliding=sliding, **settings).report()
    return replace(report, sliding=others, exact_equivalent=report.exact_equivalent + others)


def assumptions(recipe: Recipe, shape: ModelShape) -> list[str]:
    """What a plan takes for granted that a cache would refuse: one sentence for each profile that is not there."""
    out, reads = [], recipe.get("reads")
    here = [replace(spec, device=torch.device("cpu")) for spec in specs_of(shape, torch.bfloat16)]
    if not here:
        return []
    try:
        mine = recipe.of_layer(here[0])
    except ProfileError as error:
        return [str(error)]
    asked: list[Callable[[], object]] = [partial(mine.divided, here), partial(mine.extents, here[0])]
    if mine.packer is not None:
        asked.append(partial(mine.packer.codec, here[0]))
    if isinstance(reads, ReadPolicy):
        asked.append(partial(reads.roles, here))
    for ask in asked:
        try:
            ask()
        except ProfileError as error:
            out.append(str(error))
    return out
