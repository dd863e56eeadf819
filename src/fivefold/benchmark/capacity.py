"""What fits: the most sequences of a context, and the longest context, that are really held and decoded.

Caches are filled with random tokens, packed as ever, not by a prefill; the decoding steps are the model's own. On a GPU
all of its memory but `MARGIN` is used; on a CPU as much as is given.
"""

from __future__ import annotations

import gc
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

import fivefold
from fivefold.benchmark import decode
from fivefold.benchmark.kernels import fill
from fivefold.recipe import Recipe

MARGIN = 3 << 29
"""Bytes of a GPU that are left for what a step computes with, and for making random tokens."""
CPU_BYTES = 1 << 22
PIECE = 1 << 26  # numbers of keys that are made and stored at a time


BATCHES = ("full()", "kivi(bits=4)", "kivi(bits=2)")
CONTEXTS = (
    "full()", "kivi(bits=2)", "duo(keep=0.5) + kivi(bits=2)", "duo(keep=0.5) + kivi(bits=2, group=128)",
    "duo(keep=0.25) + kivi(bits=2, group=128)",
)  # fmt: skip
GOAL = 10**7
"""Tokens that the last of CONTEXTS is to hold."""


def room(device: torch.device, limit: int | None) -> int:
    """Bytes that a cache may take now."""
    if device.type != "cuda":
        return CPU_BYTES if limit is None else limit
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - MARGIN
    return free if limit is None else min(free, limit)


def _width(config: Any) -> int:
    """Channels of a token's keys in a layer."""
    return config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)


def likely_batch(model: Any, name: str | Recipe, context: int, most: int) -> int:
    """How many sequences, `most` at best, fit on a GPU, as two smaller batches say: one that does not fit takes as long
    to fill as one that does. What a step takes for each sequence counts, and what it takes however many there are."""
    if model.device.type != "cuda" or most < 16:
        return most
    start, few, peaks = room(model.device, None), (most // 16, most // 8), []
    base = torch.cuda.memory_allocated()
    for batch in few:
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            decode.timed(model, decode.filled(model, name, context, batch, True), batch, 1)
        peaks.append(torch.cuda.max_memory_allocated() - base)
        room(model.device, None)
    each = (peaks[1] - peaks[0]) / (few[1] - few[0])
    return max(1, min(most, int(few[0] + (start - peaks[0]) / each)))


def largest_batch(
    model: Any, recipe: Recipe | None, context: int, steps: int, limit: int | None = None
) -> dict[str, Any]:
    """The most sequences of `context` tokens that fit, and their decoding; None is DynamicCache."""
    device, config = model.device, model.config
    graph = device.type == "cuda" and recipe is not None
    name = decode.BASELINE if recipe is None else decode.for_random_weights(recipe, config)
    with torch.inference_mode():
        if recipe is None:
            layer = 2 * _width(config) * context * model.dtype.itemsize
            # One layer is there twice while a token is appended.
            one = layer * (config.num_hidden_layers + 1)
        else:
            cache = decode.filled(model, name, context, 1, False)
            report = cache.report()
            one = report.total - report.free
            cache.free()
            del cache
    batch = room(device, limit) // one
    if recipe is not None and limit is None:
        batch = likely_batch(model, name, context, batch)
    while batch > 0:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with suppress(torch.OutOfMemoryError), torch.inference_mode():
            cache = decode.filled(model, name, context, batch, graph)
            return {"context": context, "batch": batch, **decode.timed(model, cache, batch, steps)}
        # Only here nobody holds what the error came from, and with it what had been made.
        cache = None
        room(device, limit)
        batch -= max(1, batch // 25)
    return {"context": context, "error": "not one fits"}


def longest_context(
    model: Any, recipe: Recipe, steps: int, goal: int | None = None, limit: int | None = None
) -> dict[str, Any]:
    """Fill one sequence until memory is, or until it holds `goal` tokens; then decode."""
    device, config = model.device, model.config
    with torch.inference_mode():
        cache = fivefold.compress(model, decode.for_random_weights(recipe, config), cuda_graph=device.type == "cuda")
        pools = cache.session.pools
        start = room(device, limit)

        def left() -> int:
            if device.type != "cuda":
                return start - sum(pool.allocated_bytes for pool in pools)
            # What the allocator has taken from the device and not given to anybody is there too, but in pieces.
            torch.cuda.empty_cache()
            return min(torch.cuda.mem_get_info()[0] - MARGIN, start if limit is None else limit)

        tokens, before = 0, start
        step = PIECE // _width(config)
        step = min(step, max(1024, start >> 18)) // 1024 * 1024
        while goal is None or tokens < goal:
            new = step if goal is None else min(step, goal - tokens)
            cache.session.put(1, new, partial(fill, context=new, piece=PIECE))
            tokens += new
            now = left()
            if now < 1.25 * (before - now):
                break
            before = now
        return {"batch": 1, "context": tokens, "goal": goal, **decode.timed(model, cache, 1, steps)}


def longest_dynamic(model: Any, steps: int, limit: int | None = None) -> dict[str, Any]:
    """The same for transformers' DynamicCache."""
    config = model.config
    one = 2 * _width(config) * model.dtype.itemsize * (config.num_hidden_layers + 2)
    context = room(model.device, limit) // one // 32 * 32
    with torch.inference_mode():
        cache: DynamicCache = decode.filled(model, decode.BASELINE, context, 1, False)
        return {"batch": 1, "context": context, "goal": None, **decode.timed(model, cache, 1, steps)}
