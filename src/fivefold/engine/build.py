"""A recipe and the layers of a model make a session."""

from __future__ import annotations

from collections.abc import Sequence

from fivefold.engine.companions import Companions
from fivefold.engine.picks import Reads
from fivefold.engine.session import Session
from fivefold.errors import RecipeError
from fivefold.methods import PairMethod, TokenPolicy
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
    absent: Sequence[LayerSpec] = (),
) -> Session:
    """The session that a cache works on. specs: the layers that are compressed; the rest are as in `Session`."""
    sharing = recipe.get("layers")
    pairs: dict[int, tuple[int, int]] = {}
    if isinstance(sharing, PairMethod):
        pairs = pairs_of(recipe, sharing, [spec for spec in specs if spec.layer not in sources])

    def store(spec: LayerSpec) -> LayerCache:
        mine = recipe.of_layer(spec)
        packer, policy = mine.packer, next((one for one in mine.methods if isinstance(one, TokenPolicy)), None)
        codec = None if packer is None else packer.codec(spec)
        residual = packer.exact_tokens if packer else 0
        if spec.layer in pairs and isinstance(sharing, PairMethod):
            codec = sharing.pair_codec(spec, pairs[spec.layer], codec)
            residual = max(residual, sharing.exact_tokens)
        return LayerCache(spec, pools, mine.extents(spec), codec, residual, policy)

    reads = Reads.of(recipe.get("reads"), specs)
    return Session(specs, store, pools, companions, reads, None, sources, entry, absent)


def pairs_of(recipe: Recipe, method: PairMethod, specs: Sequence[LayerSpec]) -> dict[int, tuple[int, int]]:
    """Of the layers that share pages: which two they are. Raises `RecipeError` where they hold different tokens."""
    by_layer = {spec.layer: spec for spec in specs}
    out: dict[int, tuple[int, int]] = {}
    for pair in method.layer_pairs(specs):
        one, other = ((recipe.of_layer(by_layer[layer]), by_layer[layer]) for layer in pair)
        if one[0].packer != other[0].packer or one[0].extents(one[1]) != other[0].extents(other[1]):
            raise RecipeError(
                f"{method.name} cannot merge layers {pair[0]} and {pair[1]}, whose KV heads hold different tokens, or "
                "pack them in different ways, by the other methods of the recipe: let both layers hold the same, or "
                "name other pairs."
            )
        out |= dict.fromkeys(pair, pair)
    return out
