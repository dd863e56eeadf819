"""Whole decoding steps of a model of random weights, for recipes and for transformers' DynamicCache.

The caches are filled with random tokens, not by a prefill; the steps are the model's own. Steps are timed on the host
clock around a synchronised call, so that launch gaps count, as they do for a user.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

import fivefold
from fivefold.benchmark.kernels import fill
from fivefold.benchmark.machine import captured, dtype, tidy
from fivefold.calibrate.profile import Profile, config_hash, save_profile, signature
from fivefold.methods.bits.rotatekv import RotateKV
from fivefold.methods.channels.cskv import Cskv
from fivefold.methods.channels.kv_heads import KvHeads
from fivefold.methods.heads.duo_attention import DuoAttention
from fivefold.models.cache import FivefoldCache
from fivefold.recipe import Recipe

BASELINE = "DynamicCache"
STATIC = "StaticCache"
SPARE = 256  # tokens that a static cache has room for beyond the context
WARM_UP = 40  # steps that are not timed: by then every recipe of groups of 32 has packed one
RECIPES = ("full()", "kivi(bits=4)", "kivi(bits=2)")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0, "tie_word_embeddings": True,
    },
    "small": {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
}  # fmt: skip


def build(shape: str | Mapping[str, Any], device: torch.device) -> Any:
    """A Llama with random weights, bfloat16 on a GPU and float32 on a CPU. shape: a name of `SHAPES`, or such a one."""
    given = SHAPES[shape] if isinstance(shape, str) else shape
    config = LlamaConfig(**{"max_position_embeddings": 1 << 24, "tie_word_embeddings": False, **given})
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype(device))
    try:
        with device:
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def for_random_weights(recipe: Recipe, config: Any) -> Recipe:
    """What methods have not learned of a model of random weights: `duo(keep=...)` takes the first heads of each layer,
    `rotatekv()` sorts channels at random, `cskv()` and `kv_heads()` have features of random directions."""
    method = recipe.get("heads")
    if isinstance(method, DuoAttention) and method.retrieval is None:
        count = round(method.keep * config.num_key_value_heads)
        pairs = tuple((layer, head) for layer in range(config.num_hidden_layers) for head in range(count))
        recipe = _with(recipe, method, replace(method, retrieval=pairs))
    for method in recipe.methods:
        if isinstance(method, RotateKV | Cskv | KvHeads) and method.profile is None:
            recipe = _with(recipe, method, replace(method, profile=_random_profile(method.name, config)))
    return recipe


def _with(recipe: Recipe, old: Any, new: Any) -> Recipe:
    return Recipe((*(other for other in recipe.methods if other is not old), new))


def _random_profile(name: str, config: Any) -> str:
    """A folder with a profile of a method that says nothing of the model."""
    layers, model, random = config.num_hidden_layers, signature(config), torch.Generator().manual_seed(0)
    folder = Path(_folder().name) / f"{name}-{model}-{config_hash(config)[:16]}"
    channels = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    settings: dict[str, Any] = {"layers": list(range(layers))}
    if name == "rotatekv":
        tensors = {"key_mean": torch.randn((layers, channels), generator=random)}
    else:
        settings["rank"] = channels // (4 if name == "cskv" else 2)
        shape = layers, channels, settings["rank"]
        tensors = {f"{side}_factor": torch.randn(shape, generator=random).half() for side in ("key", "value")}
        if name == "cskv":
            tensors["key_weight"] = torch.ones(layers, channels)
    if not folder.exists():
        save_profile(folder, Profile(name, model, settings, tensors, config_hash(config)))
    return str(folder)


@cache
def _folder() -> Any:
    """Where such profiles are kept, until this process ends."""
    return tempfile.TemporaryDirectory(prefix="fivefold-profiles-")


def measure(
    shape: str,
    device: torch.device,
    context: int,
    batch: int,
    recipes: list[str],
    steps: int = 40,
    others: Sequence[Any] = (),
) -> Iterator[dict[str, Any]]:
    """Rows: recipe, whether its steps are replayed as a graph, median milliseconds a step, tokens a second, bytes of
    the cache and of the device's peak, of which version. On a GPU each recipe is measured launch by launch and as a
    graph. others: what `benchmark.peers` measures beside."""
    from fivefold.benchmark import peers

    model = build(shape, device)
    base = None
    for name, graph in [*names(device, recipes), *((peer, False) for peer in others)]:
        shown = getattr(name, "name", name)
        row: dict[str, Any] = {"shape": shape, "context": context, "batch": batch, "recipe": shown, "graph": graph}
        try:
            if isinstance(name, peers.Peer):
                row.update(peers.measure(model, name, context, batch, steps))
            else:
                stock = name in (BASELINE, STATIC)
                row["version"] = (
                    f"transformers {metadata.version('transformers')}" if stock else f"fivefold {fivefold.__version__}"
                )
                row.update(_steps(model, name, context, batch, steps, graph))
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        tidy(device)
        if "error" not in row:
            base = row["ms"] if name == BASELINE else base
            row["gain"] = base / row["ms"] if base else None
        yield row


def names(device: torch.device, recipes: list[str]) -> list[tuple[str, bool]]:
    """What is measured on a device: (recipe or cache of transformers, whether as a graph)."""
    cuda = device.type == "cuda"
    stock = [(BASELINE, False), *([(STATIC, True)] if cuda else [])]
    return stock + [(recipe, graph) for recipe in recipes for graph in ((False, True) if cuda else (False,))]


def fill_stock(model: Any, cache: Any, context: int, batch: int) -> None:
    """Give random keys and values of so many tokens to a cache of transformers."""
    config = model.config
    shape = (batch, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        cache.update(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)), layer)


def filled(model: Any, name: str | Recipe, context: int, batch: int, graph: bool, spare: int = SPARE) -> Any:
    """A cache that holds `context` random tokens of `batch` sequences. spare: see `SPARE`."""
    config, device = model.config, model.device
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    if name == BASELINE:
        fivefold.restore(model)
        dynamic = DynamicCache(config=config)
        fill_stock(model, dynamic, context, batch)
        return dynamic
    if name == STATIC:
        fivefold.restore(model)
        static = StaticCache(config=config, max_cache_len=context + max(spare, SPARE))
        one = torch.empty(batch, heads, 1, dim, device=device, dtype=model.dtype)
        for part in static.layers:
            part.lazy_initialization(one, one)
            part.keys.normal_()
            part.values.normal_()
            part.cumulative_length.fill_(context)
        return static
    recipe = Recipe.parse(name) if isinstance(name, str) else name
    cache = fivefold.compress(model, for_random_weights(recipe, config), cuda_graph=graph)
    cache.session.put(batch, context, partial(fill, context=context, piece=1 << 25))
    return cache


def held_bytes(cache: Any) -> int:
    if isinstance(cache, FivefoldCache):
        return cache.report().total
    from fivefold.benchmark import peers

    return peers.alive(cache)


def _static_step(model: Any, cache: Any, token: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A step with a StaticCache as a CUDA graph; the tokens that it takes on the way there count too."""
    positions = cache.layers[0].cumulative_length.clone().view(1, 1).expand(len(token), 1).contiguous()

    def step() -> torch.Tensor:
        logits = model(token, position_ids=positions, past_key_values=cache).logits
        token.copy_(logits[:, -1:].argmax(-1))
        positions.add_(1)
        return token

    graph = captured(step, 2)

    def replay() -> torch.Tensor:
        graph.replay()
        return token

    return replay


def _steps(model: Any, name: str, context: int, batch: int, steps: int, graph: bool) -> dict[str, Any]:
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        cache = filled(model, name, context, batch, graph, steps + WARM_UP + 4)
        return timed(model, cache, batch, steps, warm_up(cache))


def warm_up(cache: Any) -> int:
    """Steps before those that are timed: until a group has been packed in every layer, and what that wants is made."""
    stores = cache.session.stores.values() if isinstance(cache, FivefoldCache) else ()
    return max([WARM_UP, *(store.codec.group + 8 for store in stores if store.codec is not None)])


def timed(
    model: Any,
    cache: Any,
    batch: int,
    steps: int,
    before: int = 8,
    step: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, Any]:
    """Decode greedily and time it; the cache is given back. Called in inference mode. before: steps that are not timed.
    step: takes tokens to the next ones; that of the model if not given."""
    cuda = model.device.type == "cuda"
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)
    static = _static_step(model, cache, token) if isinstance(cache, StaticCache) and step is None else None
    times = []
    for _ in range(before + steps):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        if static is not None:
            token = static()
        elif step is not None:
            token = step(token)
        else:
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1000)
    times = times[before:]
    held, way, step = held_bytes(cache), getattr(cache, "decoding", None), getattr(cache, "step", None)
    more = {"decoding": way, "no_graph": getattr(step, "failed", None), "own_code": getattr(step, "own", None)}
    if hasattr(cache, "free"):
        cache.free()
    # Every 32nd step packs a group: the mean has it, the median does not.
    ms, mean = statistics.median(times), statistics.fmean(times)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    row = {"ms": ms, "mean_ms": mean, "tokens_s": 1000 * batch / mean, "cache_bytes": held, "peak_bytes": peak}
    row |= {"steps": steps, "warm_up": before}
    return row | {name: said for name, said in more.items() if said}
