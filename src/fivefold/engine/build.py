"""A recipe and the layers of a model make a session."""

from __future__ import annotations

from collections.abc import Sequence

from fivefold.engine.companions import Companions
from fivefold.engine.picks import Reads
from fivefold.engine.session import Session
from fivefold.methods import TokenPolicy
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
    packer, policy = recipe.packer, next((one for one in recipe.methods if isinstance(one, TokenPolicy)), None)

    def store(spec: LayerSpec) -> LayerCache:
        codec = None if packer is None else packer.codec(spec)
        return LayerCache(spec, pools, recipe.extents(spec), codec, packer.exact_tokens if packer else 0, policy)

    return Session(specs, store, pools, companions, Reads.of(recipe.get("reads"), specs), None, sources, entry)
