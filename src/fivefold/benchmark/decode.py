"""Whole decoding steps of a model of random weights, for recipes and for transformers' DynamicCache.

The caches are filled with random tokens, not by a prefill; the steps are the model's own. Steps are timed on the host
clock around a synchronised call, so that launch gaps count, as they do for a user.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

import fivefold
from fivefold.benchmark.kernels import fill

BASELINE = "DynamicCache"
RECIPES = ("full()", "kivi(bits=4)", "kivi(bits=2)")
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
    },
    "small": {
        "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2,
    },
}  # fmt: skip


def build(shape: str, device: torch.device) -> Any:
    """A Llama of a shape with random weights, bfloat16 on a GPU and float32 on a CPU."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=1 << 24, tie_word_embeddings=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if device.type == "cuda" else torch.float32)
    try:
        with device:
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure(
    shape: str,
    device: torch.device,
    context: int,
    batch: int,
    recipes: list[str],
    steps: int = 40,
) -> Iterator[dict[str, Any]]:
    """Rows: recipe, median milliseconds a step, tokens a second, bytes of the cache and of the device's peak."""
    model = build(shape, device)
    base = None
    for name in [BASELINE, *recipes]:
        row: dict[str, Any] = {"shape": shape, "context": context, "batch": batch, "recipe": name}
        try:
            row.update(_steps(model, name, context, batch, steps))
        except torch.OutOfMemoryError:
            row["error"] = "out of memory"
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield row
            continue
        base = row["ms"] if name == BASELINE else base
        row["gain"] = base / row["ms"] if base else None
        yield row


def _steps(model: Any, name: str, context: int, batch: int, steps: int) -> dict[str, Any]:
    device = model.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    config = model.config
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    with torch.inference_mode():
        if name == BASELINE:
            fivefold.restore(model)
            cache: Any = DynamicCache(config=config)
            for layer in range(config.num_hidden_layers):
                keys, values = (
                    torch.randn(batch, heads, context, dim, device=device, dtype=model.dtype) for _ in range(2)
                )
                cache.update(keys, values, layer)
        else:
            cache = fivefold.compress(model, name)
            for index, store in cache.state.stores.items():
                store.start(batch)
                fill(store, context)
                cache.state.logical[index] += context
        token = torch.ones(batch, 1, dtype=torch.long, device=device)
        times = []
        for _ in range(steps + 8):
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            if cuda:
                torch.cuda.synchronize()
            times.append((time.perf_counter() - start) * 1000)
        times = times[8:]
        ms = statistics.median(times)
        if name == BASELINE:
            held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        else:
            held = cache.report().total
            cache.free()
    # Every 32nd step packs a group: the mean has it, the median does not.
    mean = statistics.fmean(times)
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"ms": ms, "mean_ms": mean, "tokens_s": 1000 * batch / mean, "cache_bytes": held, "peak_bytes": peak}
