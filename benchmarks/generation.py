"""Many requests by continuous batching, against a static batch of them, and against one at a time.

    python benchmarks/generation.py benchmarks/results/generation_h100.json
    python benchmarks/generation.py /tmp/generation.json --model tiny

A model of Llama-3-8B's shape with random weights in bfloat16 reads 64 prompts of 2k to 16k random tokens and generates
128 tokens for each, steps as a CUDA graph. Tokens a second are new tokens over all the time from the first prompt's
beginning to the last token's end, prompts included.

- many: `generate_many`'s scheduler, all requests submitted at once.
- static: the same prompts read one after another, in the same chunks, joined, and decoded together. It takes turns with
  `many`, after a round that is not counted.
- prefix: 16 requests, one after another, whose prompts of 8k tokens differ in the last 256 only, with a `PrefixStore`:
  the time to the first token.
- alone: `model.generate` with transformers' `DynamicCache`, one request at a time. Only a few are measured; the time of
  all of them is extrapolated by a straight line over the length of the prompt.

`tiny` is a small model on any device, which shows that all of this works, and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import fivefold
from fivefold import PrefixStore, Request
from fivefold.benchmark import decode, machine
from fivefold.generation import Scheduler


@dataclass(frozen=True)
class Setting:
    """What is asked of a model: prompts from `shortest` to `longest` tokens, `new` tokens each.

    prefix, own: tokens that prompts share, and that they do not.
    """

    shape: str
    requests: int
    shortest: int
    longest: int
    new: int
    chunk: int
    prefix: int
    own: int


SETTINGS = {
    "llama-3-8b": Setting("llama-3-8b", 64, 2048, 16384, 128, 2048, 8192, 256),
    "tiny": Setting("small", 8, 32, 200, 12, 64, 1024, 32),
}
READS = 4
"""Chunks between two decoding steps: the default of `generate_many`."""
RECIPES = ("kivi(bits=4)", "kivi(bits=2)")


def make_requests(setting: Setting, vocabulary: int) -> list[Request]:
    """Each prompt a constant factor longer than the one before, in mixed order, of random tokens."""
    count, factor = setting.requests, setting.longest / setting.shortest
    lengths = [round(setting.shortest * factor ** (i / max(1, count - 1))) for i in range(count)]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=generator).tolist()
    return [Request(torch.randint(vocabulary, (lengths[i],), generator=generator), setting.new, stop=()) for i in order]


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def many(model: Any, recipe: str, requests: list[Request], setting: Setting, max_batch: int) -> dict[str, Any]:
    """Continuous batching. next_chunk: milliseconds, and in steps, from a request's end to the next chunk of a prompt,
    as long as there are prompts to be read."""
    chunks: list[tuple[float, int]] = []
    graph = torch.cuda.is_available()
    with Scheduler(model, recipe, max_batch, cuda_graph=graph, chunk=setting.chunk, reads=READS) as scheduler:

        def noted(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            if args[0].shape[1] > 1:
                chunks.append((time.perf_counter(), scheduler.steps))

        hook = model.register_forward_pre_hook(noted, with_kwargs=True)
        wait()
        start, ends, sizes = time.perf_counter(), [], []
        handles = [scheduler.submit(request) for request in requests]
        while not scheduler.idle:
            events = scheduler.step()
            sizes.append(len(scheduler.batch.sequences))
            ends += [(time.perf_counter(), scheduler.steps)] * sum(event.result is not None for event in events)
        wait()
        seconds = time.perf_counter() - start
        hook.remove()
        step = scheduler.batch.cache.step
        captures = 0 if step is None else step.captures
        failed = None if step is None else step.failed
    results = [handle.result for handle in handles if handle.result is not None]
    assert all(len(result.tokens) == setting.new for result in results), [result.error for result in results]
    gaps = [
        next(((at - end) * 1e3, number - step) for at, number in chunks if at > end)
        for end, step in ends
        if end < chunks[-1][0]
    ]
    first = sorted(result.first_token or 0.0 for result in results)
    row = {
        "seconds": seconds,
        "tokens_per_second": len(requests) * setting.new / seconds,
        "steps": scheduler.steps,
        "mean_batch": float(np.mean(sizes)),
        "captures": captures,
        "why_no_graph": failed,
        "median_first_token_seconds": first[len(first) // 2],
        "preemptions": sum(result.preemptions for result in results),
        "ends_while_prompts_waited": len(gaps),
    }
    if gaps:
        row["next_chunk_ms"] = {"median": float(np.median([ms for ms, _ in gaps])), "most": max(ms for ms, _ in gaps)}
        row["next_chunk_steps_most"] = max(steps for _, steps in gaps)
    return row


@torch.inference_mode()
def static(model: Any, recipe: str, requests: list[Request], setting: Setting) -> dict[str, Any]:
    """All prompts first, then all steps."""
    graph, device = torch.cuda.is_available(), model.device
    root = fivefold.compress(model, recipe, cuda_graph=graph)
    batch, tokens = root.new(), []
    batch.reserve(setting.longest + setting.new)
    wait()
    start = time.perf_counter()
    for request in requests:
        cache = root.new(cuda_graph=False)
        for piece in torch.tensor([request.prompt], device=device).split(setting.chunk, 1):
            logits = model(piece, past_key_values=cache, logits_to_keep=1).logits
        tokens.append(logits[:, -1].argmax(-1))
        batch.join(cache)
    wait()
    read = time.perf_counter() - start
    ids = torch.cat(tokens)[:, None]
    for _ in range(setting.new - 1):
        ids = model(ids, past_key_values=batch, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        ids.tolist()  # somebody wants to see them
    wait()
    seconds = time.perf_counter() - start
    captures = 0 if batch.step is None else batch.step.captures
    batch.free()
    return {
        "seconds": seconds,
        "tokens_per_second": len(requests) * setting.new / seconds,
        "prefill_seconds": read,
        "decode_seconds": seconds - read,
        "captures": captures,
    }


def alone(model: Any, requests: list[Request], setting: Setting, count: int) -> dict[str, Any]:
    """`model.generate` with `DynamicCache`: some requests from the shortest to the longest, after one that is not
    counted."""
    fivefold.restore(model)
    by_length = sorted(requests, key=lambda request: len(request.prompt))
    picked = [by_length[round(i * (len(by_length) - 1) / max(1, count - 1))] for i in range(count)]
    times = []
    for request in (picked[0], *picked):
        wait()
        start = time.perf_counter()
        out = model.generate(
            torch.tensor([request.prompt], device=model.device),
            past_key_values=DynamicCache(config=model.config),
            max_new_tokens=setting.new,
            do_sample=False,
            pad_token_id=0,
        )
        wait()
        times.append(time.perf_counter() - start)
        assert out.shape[1] == len(request.prompt) + setting.new
        tidy()
    lengths = [len(request.prompt) for request in picked]
    line = np.polyfit(lengths, times[1:], 1) if count > 1 else np.array([0.0, times[1]])
    seconds = float(sum(np.polyval(line, len(request.prompt)) for request in requests))
    return {
        "measured": [{"prompt": length, "seconds": taken} for length, taken in zip(lengths, times[1:])],
        "extrapolated_seconds": seconds,
        "tokens_per_second": len(requests) * setting.new / seconds,
    }


def prefix(model: Any, recipe: str, setting: Setting, count: int = 16) -> dict[str, Any]:
    """Seconds to the first token of requests that share most of their prompts, one after another."""
    generator, store, times = torch.Generator().manual_seed(1), PrefixStore(), []
    vocabulary = model.config.vocab_size
    common = torch.randint(vocabulary, (setting.prefix,), generator=generator)
    # One of another text first, which is not counted.
    texts = [torch.randint(vocabulary, (setting.prefix,), generator=generator), *[common] * count]
    with Scheduler(model, recipe, prefix=store, chunk=setting.chunk) as scheduler:
        for text in texts:
            own = torch.randint(vocabulary, (setting.own,), generator=generator)
            handle = scheduler.submit(Request(torch.cat([text, own]), 2, stop=()))
            while not scheduler.idle:
                scheduler.step()
            assert handle.result is not None and handle.result.first_token is not None
            times.append((handle.result.first_token, handle.result.shared))
    store.clear()
    (first, _), later = times[1], times[2:]
    return {
        "prefix": setting.prefix,
        "own": setting.own,
        "first_seconds": first,
        "later_seconds": [seconds for seconds, _ in later],
        "shared": [shared for _, shared in later],
        "most_over_first": max(seconds for seconds, _ in later) / first,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=SETTINGS, default="llama-3-8b")
    parser.add_argument("--recipe", "-r", action="append", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--requests", type=int)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--max-batch", type=int, help="default: all of them")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", type=int, default=3, help="how many requests are measured one at a time; 0: none")
    given = parser.parse_args()
    base = SETTINGS[given.model]
    setting = replace(base, requests=given.requests or base.requests, chunk=given.chunk or base.chunk)
    max_batch = given.max_batch or setting.requests
    model = decode.build(setting.shape, machine.device())
    model.generation_config.eos_token_id = None  # random weights say anything
    requests = make_requests(setting, model.config.vocab_size)
    rows = []
    for recipe in given.recipe or RECIPES:
        # Kernels are compiled here, for every size of a batch.
        many(model, recipe, requests, setting, max_batch)
        tidy()
        rounds: dict[str, list[dict[str, Any]]] = {"many": [], "static": []}
        for _ in range(given.rounds):
            rounds["many"].append(many(model, recipe, requests, setting, max_batch))
            tidy()
            rounds["static"].append(static(model, recipe, requests, setting))
            tidy()
        shared = prefix(model, recipe, setting)
        tidy()
        rate = {name: float(np.mean([one["tokens_per_second"] for one in found])) for name, found in rounds.items()}
        rows.append({"recipe": recipe, **rounds, "many_over_static": rate["many"] / rate["static"], "prefix": shared})
        print(recipe, {name: round(value, 1) for name, value in rate.items()}, rows[-1]["many"][-1], shared, flush=True)
    result: dict[str, Any] = {
        **machine.stamp(),
        "model": given.model,
        "lengths": [len(request.prompt) for request in requests],
        "new_tokens": setting.new,
        "chunk": setting.chunk,
        "max_batch": max_batch,
        "rows": rows,
    }
    if given.alone:
        result["alone"] = one = alone(model, requests, setting, given.alone)
        for row in rows:
            rates = [found["tokens_per_second"] for found in row["many"]]
            row["many_over_alone"] = float(np.mean(rates)) / one["tokens_per_second"]
        print({"alone": round(one["tokens_per_second"], 1)}, [row["many_over_alone"] for row in rows], flush=True)
    given.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
