"""A recipe and the layers of a model make a session."""

from __future__ import annotations

from collections.abc import Sequence

from fivefold.engine.companions import Companions
from fivefold.engine.session import Session
from fivefold.methods import ReadPolicy, TokenPolicy
from fivefold.recipe import Recipe
from fivefold.store.layer_cache import LayerCache
from fivefold.store.spec import LayerSpec, Pools


def build(
    recipe: Recipe,
    specs: Sequence[LayerSpec],
    pools: Pools,
    companions: Companions | None = None,
    sources: frozenset[int] = frozenset(),
    entry: int = 0,
) -> Session:
    """The session that a cache works on. specs: the layers that are compressed; the others are as in `Session`."""

    def store(spec: LayerSpec) -> LayerCache:
        mine = recipe.of_layer(spec)
        packer, policy = mine.packer, next((one for one in mine.methods if isinstance(one, TokenPolicy)), None)
        codec = None if packer is None else packer.codec(spec)
        return LayerCache(spec, pools, mine.extents(spec), codec, packer.exact_tokens if packer else 0, policy)

    reads = recipe.get("reads")
    roles: dict[int, str] = {}
    if isinstance(reads, ReadPolicy):
        roles |= zip((spec.layer for spec in specs), reads.roles(specs))
    return Session(specs, store, pools, companions, roles, getattr(reads, "top", 0), None, sources, entry)
