"""Reading a prompt with a model of random weights: time and memory, for recipes and for transformers' DynamicCache."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import fivefold
from fivefold.benchmark.decode import BASELINE, build, for_random_weights, held_bytes
from fivefold.benchmark.machine import tidy
from fivefold.models.chunks import by_own_code
from fivefold.recipe import Recipe

RECIPES = ("full()", "kivi(bits=4)", "duo(keep=0.5) + kivi(bits=2)", "streaming()", "snapkv()", "h2o()", "d2o()")


def measure(
    shape: str, device: torch.device, context: int, batch: int, recipes: list[str], chunk: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows: recipe, seconds until the last token's logits are there, as a share of DynamicCache's, bytes of the cache,
    and on a GPU of the largest allocation beyond the weights. chunk: how many tokens are fed at a time; None: all."""
    model = build(shape, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (batch, context), generator=generator).to(device)
    base = None
    for name in (BASELINE, *recipes):
        row: dict[str, Any] = {"shape": shape, "context": context, "batch": batch, "chunk": chunk, "recipe": name}
        tidy(ids.device)
        try:
            # Compiles and plans what there is to compile and plan: on a GPU for these very shapes, which cuDNN wants.
            if ids.is_cuda:
                read(model, name, ids, chunk)
            else:
                read(model, name, ids[:, : 512 + min(chunk or 0, 512)], 512)
            row.update(read(model, name, ids, chunk))
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
        else:
            base = row["seconds"] if name == BASELINE else base
            row["times"] = row["seconds"] / base if base else None
        yield row


def read(model: Any, name: str, ids: torch.Tensor, chunk: int | None, own: bool = False) -> dict[str, Any]:
    """Read `[batch, tokens]` with a new cache, and time it; as a row of `measure`. own: by the model's own code. What
    torch's allocator holds of prompts before stays there, as in a process that serves many."""
    cuda = ids.is_cuda
    if name == BASELINE:
        fivefold.restore(model)
        cache: Any = DynamicCache(config=model.config)
    else:
        cache = fivefold.compress(model, for_random_weights(Recipe.parse(name), model.config))
    if cuda:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with torch.inference_mode(), by_own_code() if own else nullcontext():
        for part in ids.split(chunk or ids.shape[1], 1):
            model(part, past_key_values=cache, logits_to_keep=1)
    if cuda:
        torch.cuda.synchronize()
    found = {"seconds": time.perf_counter() - start, "cache_bytes": held_bytes(cache)}
    if cuda:
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    return found
