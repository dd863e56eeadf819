"""What fits on GPUs: how many users at a context, how long a context for some users."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from fivefold.errors import InputError
from fivefold.methods import PairMethod
from fivefold.plan import memory
from fivefold.plan.machine import Machine
from fivefold.plan.shape import ModelShape
from fivefold.recipe import Recipe
from fivefold.report import Report
from fivefold.store.spec import LayerSpec

PAGES = 1 << 22
"""Pages that a rehearsal goes through at most: beyond that, users are reckoned from a few."""
STEP = 256
"""Tokens by which a longest context is found."""
DECODED = 1
"""So many tokens of each user have come one by one: what a prompt alone would not show (pages that are free again,
tables that kernels read)."""
GRAPH = 640 << 20
"""Bytes that a captured step and the libraries' workspaces hold, at most, on an H100 (`benchmarks/plan_gpu.py`)."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def dtype_of(shape: ModelShape, given: str | None = None) -> torch.dtype:
    """What keys and values are in. Raises `InputError`."""
    name = given or (shape.dtype if shape.dtype in DTYPES else "bfloat16")
    if name not in DTYPES:
        raise InputError(f"--dtype {name!r} is not possible: use {', '.join(DTYPES)}.")
    return DTYPES[name]


@dataclass(frozen=True)
class Place:
    """Where a model is to run: `gpus` GPUs of a kind that share weights and heads (tensor parallel)."""

    shape: ModelShape
    machine: Machine
    gpus: int = 1
    dtype: torch.dtype = torch.bfloat16
    sliding: bool = False
    chunk: int = 2048

    @property
    def weights(self) -> int:
        """Bytes of weights on each GPU."""
        stored = {"float32": 4}.get(self.shape.dtype, 2)
        packed = self.shape.weight_bytes < 0.95 * stored * self.shape.parameters
        changed = 1.0 if packed or self.shape.dtype not in DTYPES else self.dtype.itemsize / stored
        return round(self.shape.weight_bytes * changed / self.gpus)

    @property
    def loaded(self) -> ModelShape:
        """The model as it is here: in another dtype than its files, if that was asked for."""
        stored, name = self.shape.weight_bytes, str(self.dtype).removeprefix("torch.")
        whole = self.weights * self.gpus
        routed = round(self.shape.routed_bytes * whole / stored)
        return replace(self.shape, dtype=name, weight_bytes=whole, routed_bytes=routed)

    @property
    def working(self) -> int:
        """Bytes of what a chunk of a prompt computes with: the residual stream twice, queries, keys and values, the
        three products of an MLP, and the last logits in float32; and what a step as a graph holds."""
        heads = max((layer.query_heads * layer.head_dim for layer in self.shape.layers), default=0)
        keys = max((2 * layer.kv_heads * layer.head_dim for layer in self.shape.layers), default=0)
        token = 2 * self.shape.hidden + (2 * heads + keys + 3 * self.shape.intermediate) / self.gpus
        return round(self.chunk * token * self.dtype.itemsize) + 4 * self.shape.vocabulary + GRAPH

    @property
    def each(self) -> int:
        """Bytes of what a step computes with for one user: the logits, also in float32, and the products of an MLP. The
        first step in fused kernels has most, where its logits are compared with those of the model's own code
        (`models/fused.py`): both and zeros, in float32 too, and a difference."""
        item, compared = self.dtype.itemsize, self.shape.fused and self.gpus == 1
        return (3 * item + 16 if compared else item + 4) * self.shape.vocabulary + 3 * item * (
            self.shape.intermediate // self.gpus
        )

    @property
    def room(self) -> int:
        """Bytes that caches may take on each GPU; negative where not even the weights fit."""
        return self.machine.usable - self.weights - self.working

    @property
    def share(self) -> float:
        """How much of a cache each GPU holds: KV heads are not split, so there is at least one on each."""
        return self.shape.share(self.gpus)


@lru_cache(maxsize=1024)
def cache_report(recipe: Recipe, place: Place, context: int, users: int) -> Report:
    """What the caches of so many users hold, all GPUs together."""
    settings = {"dtype": place.dtype, "sliding": place.sliding, "generated": min(DECODED, context - 1)}
    return memory.report_of(recipe, place.shape, context, users, **settings)  # type: ignore[arg-type]


def _pages(place: Place, context: int, users: int) -> int:
    return users * sum(layer.kv_heads for layer in place.shape.layers if layer.kind == "full") * -(-context // 32)


def cache_bytes(recipe: Recipe, place: Place, context: int, users: int) -> int:
    """Bytes of these caches on each GPU. Of more users than can be rehearsed in a moment: as many times those of a few,
    beside which they have no free pages."""
    if users < 5 or _pages(place, context, users) <= PAGES:
        return round(_total(recipe, place, context, users) * place.share)
    few = max(2, min(users // 2, PAGES // max(1, _pages(place, context, 1))))
    one, two = (_total(recipe, place, context, count) for count in (few // 2, few))
    return round((two + (two - one) * (users - few) / (few - few // 2)) * place.share)


def _total(recipe: Recipe, place: Place, context: int, users: int) -> int:
    """Bytes of caches on all GPUs together. Of layers that are alike one tells of all: what another one adds; where
    layers share pages, all are rehearsed."""
    if isinstance(recipe.get("layers"), PairMethod):
        return cache_report(recipe, place, context, users).total
    kinds = _kinds(recipe, place)
    if len(kinds) * (len(kinds) + 2) >= sum(map(len, kinds)):
        return cache_report(recipe, place, context, users).total
    first = tuple(kind[0] for kind in kinds)
    base = _some(recipe, place, context, users, first)
    total = base + memory.beside(place.shape, context, users, place.dtype, place.sliding)
    for kind in kinds:
        if len(kind) > 1:
            total += (len(kind) - 1) * (_some(recipe, place, context, users, (*first, kind[1])) - base)
    return total


@lru_cache(maxsize=2048)
def _some(recipe: Recipe, place: Place, context: int, users: int, layers: tuple[int, ...]) -> int:
    """Bytes of the caches of some layers alone; what a step reads of them changes nothing."""
    specs = list(_specs(place).values())
    recipe = Recipe(tuple(one for one in recipe.methods if one.slot != "reads" and not one.absent(specs)))
    cache = memory.Rehearsal(recipe, [_specs(place)[index] for index in layers], place.shape.hidden)
    cache.read(context, users, generated=min(DECODED, context - 1))
    return cache.report().total


@lru_cache(maxsize=64)
def _specs(place: Place) -> dict[int, LayerSpec]:
    return {spec.layer: spec for spec in memory.specs_of(place.shape, place.dtype, place.sliding)}


@lru_cache(maxsize=256)
def _kinds(recipe: Recipe, place: Place) -> list[list[int]]:
    """The layers that are compressed, those together of which a recipe holds the same."""
    found: dict[object, list[int]] = {}
    for spec in recipe.divided(list(_specs(place).values()))[0]:
        index = spec.layer
        held = sorted(map(repr, recipe.extents(spec)))
        packed = [str(method) for method in recipe.of_layer(spec).methods if method.slot != "heads"]
        found.setdefault((place.shape.layers[index], *held, *packed), []).append(index)
    return list(found.values())


def needed(recipe: Recipe, place: Place, context: int, users: int) -> int:
    """Bytes that so many users take on each GPU: their caches, and what a step computes with for them."""
    return cache_bytes(recipe, place, context, users) + users * place.each


def most_users(recipe: Recipe, place: Place, context: int) -> int:
    """How many users with `context` tokens each fit; 0 if not one does."""
    if place.room <= 0:
        return 0
    if needed(recipe, place, context, 1) > place.room:
        return 0
    low, high = 1, 2
    each = needed(recipe, place, context, 2) - needed(recipe, place, context, 1)
    guess = max(1, int(place.room // max(1, each)))
    if needed(recipe, place, context, guess) <= place.room:
        low, high = guess, guess + 1
    else:
        high = guess
    while needed(recipe, place, context, high) <= place.room:
        low, high = high, high + max(1, high // 64)
    while high - low > 1:
        middle = max(low + 1, high - max(1, (high - low) // 2))
        if needed(recipe, place, context, middle) <= place.room:
            low = middle
        else:
            high = middle
    return low


def longest_context(recipe: Recipe, place: Place, users: int, most: int) -> int:
    """The longest text, in steps of `STEP` tokens up to `most`, that fits for so many users; 0 if none does."""

    if place.room <= 0:
        return 0

    def fits(context: int) -> bool:
        return needed(recipe, place, context, users) <= place.room

    # Bytes are nearly a straight line: a guess by it, and then a search about the guess.
    one, two = (needed(recipe, place, tokens, users) for tokens in (2048, 4096))
    slope, low, high = (two - one) / 2048, 0, -(-most // STEP)
    guess = high if slope <= 0 else int((2048 + (place.room - one) / slope) / STEP)
    if guess > high // 2 and fits(most):
        return most
    for width in (1, 8, 64, 512):
        if low < guess - width < high and fits((guess - width) * STEP):
            low = guess - width
        if low < guess + width < high and not fits((guess + width) * STEP):
            high = guess + width
        if high - low <= 2 * width:
            break
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * STEP):
            low = middle
        else:
            high = middle
    return most if low == -(-most // STEP) - 1 and fits(most) else low * STEP
