"""The public face: `compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fivefold.recipe import Recipe
from fivefold.sizes import parse_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fivefold.models.cache import FivefoldCache


def compress(
    model: PreTrainedModel,
    recipe: str | Recipe = "full()",
    max_bytes: int | str | None = None,
    cuda_graph: bool = False,
    sliding: bool = False,
) -> FivefoldCache:
    """A KV cache for `model` that keeps what `recipe` says.

    Pass it on as `model.generate(..., past_key_values=cache)`. One cache serves one conversation (or batch); make as
    many as you like for one model. The model is prepared in place and stays usable with any other cache;
    `fivefold.restore(model)` undoes that.

    Args:
        model: a decoder-only model of transformers, or a wrapper around one (PEFT). It is taken if what its attention
            does is something that Fivefold computes, and refused by what it does otherwise.
        recipe: for example `"duo(keep=0.5) + kivi(bits=2)"`; `fivefold recipes` lists all methods.
        max_bytes: a hard cap on what the cache may allocate, a number or a text such as "2GB"; a call that would pass
            it raises `CacheFullError` and leaves the cache as it was.
        cuda_graph: replay each decoding step of the whole model as one CUDA graph, so that no time goes by between
            kernels. The model's `forward` does that for this cache from the second token on; what cannot be replayed
            (see `fivefold.models.graph`) runs as without, with one warning that says why. Hooks on modules do not run
            in a replay.
        sliding: compress layers with a sliding window too: they hold their window as the recipe says. Otherwise they
            stay transformers' own, which is exact.

    Raises:
        RecipeError: the recipe cannot be read or does not fit the model.
        ProfileError: a method lacks a profile for the model.
        UnsupportedModelError: the model's attention does what Fivefold does not compute.
        InputError: `max_bytes` is no size.
        CacheStateError: FIVEFOLD_KERNELS asks for kernels that no device of this machine can run.

    Warns with `fivefold.SlowPathWarning` where steps will be slower than this machine could make them.
    """
    from fivefold.models import huggingface

    parsed = recipe if isinstance(recipe, Recipe) else Recipe.parse(recipe)
    cache = huggingface.make_cache(model, parsed, parse_bytes(max_bytes), cuda_graph, sliding)
    huggingface.prepare(model, cache.absent)
    cache.warn(2)
    return cache


def load_cache(
    model: PreTrainedModel, folder: str | Path, max_bytes: int | str | None = None, cuda_graph: bool = False
) -> FivefoldCache:
    """The cache that `cache.save(folder)` wrote, as it was, to the bit. The other arguments are those of `compress`.

    Raises:
        SavedCacheError: there is none, or it is damaged, of a newer format, or of another model or profile.
        CacheFullError: it does not fit under `max_bytes`.
    """
    from fivefold.engine import persist

    text = persist.describe(Path(folder))
    cache = compress(model, text["recipe"], max_bytes, cuda_graph, text.get("sliding", False))
    cache.load(folder)
    return cache


def restore(model: PreTrainedModel) -> None:
    """Undo what `compress` did to a model: its attention implementation and hooks are as they were before."""
    from fivefold.models import huggingface

    huggingface.restore(model)
