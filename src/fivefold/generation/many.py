"""`generate_many`: prompts in, results out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from transformers import PreTrainedModel

from fivefold.engine.prefix import PrefixStore
from fivefold.errors import InputError
from fivefold.generation.batch import Handle
from fivefold.generation.request import Cancel, Request, Result
from fivefold.generation.scheduler import Scheduler
from fivefold.recipe import Recipe

_PAUSE = 0.001
"""Seconds to wait for a request where there is nothing else to do."""


def generate_many(
    model: PreTrainedModel,
    recipe: str | Recipe,
    requests: Iterable[Request | None],
    max_batch: int = 32,
    max_bytes: int | str | None = None,
    on_token: Callable[[Request, int], object] | None = None,
    on_result: Callable[[Result], object] | None = None,
    prefix: PrefixStore | None = None,
    cuda_graph: bool = False,
    chunk: int = 2048,
    reads: int = 4,
) -> list[Result]:
    """Generate for many requests at once, by continuous batching; what came of each, in their order.

        results = fivefold.generate_many(model, "kivi(bits=4)", [fivefold.Request(ids, max_new_tokens=100), ...])

    Sequences come into the batch as soon as their prompts have been read, and leave as they end. Each request gets the
    tokens that it gets alone (see `fivefold.generation.Scheduler`, which this is a loop around).

    Args:
        model, recipe, max_bytes, cuda_graph: as for `fivefold.compress`; the cap holds for all sequences together.
        requests: a list or tuple is taken as a whole. Anything else is asked for the next request whenever one could
            start, so that a generator may hand out requests as they arrive; `None` from it means that there is none
            just now. While it waits, everything waits.
        max_batch: how many sequences are decoded together at most.
        on_token: called with a request and each of its tokens as they come. It ends that request by raising
            `fivefold.generation.Cancel`; anything else that it raises ends everything.
        on_result: called with each result as soon as there is one.
        prefix: prompts that begin alike are read once.
        chunk, reads: tokens of a prompt that are read at a time, and how many such chunks at most between two decoding
            steps: with more of them all requests end sooner, and each waits longer for its next token.

    What is wrong with one request ends it with an error (`Result.error`), and the others go on. Raises `InputError` for
    numbers that are not possible, and what `fivefold.compress` raises. Whatever is raised, Ctrl-C too, all memory has
    been given back, but for what `prefix` keeps.
    """
    if isinstance(requests, Request):
        raise InputError("requests is one fivefold.Request: give a list of them, [request].")
    with Scheduler(model, recipe, max_batch, max_bytes, prefix, cuda_graph, chunk, reads=reads) as scheduler:
        everything = isinstance(requests, list | tuple)
        source: Iterator[Request | None] = iter(requests)
        handles: list[Handle] = []
        open_ended = True
        while True:
            while open_ended and (everything or scheduler.unfinished < max_batch):
                try:
                    request = next(source)
                except StopIteration:
                    open_ended = False
                    break
                if request is None:
                    break
                handles.append(scheduler.submit(request))
            if scheduler.idle:
                if not open_ended:
                    break
                time.sleep(_PAUSE)
                continue
            for event in scheduler.step():
                if event.token is not None and on_token is not None:
                    try:
                        on_token(event.handle.request, event.token)
                    except Cancel:
                        scheduler.cancel(event.handle)
                if event.result is not None and on_result is not None:
                    on_result(event.result)
        results = [handle.result for handle in handles]
    return [result for result in results if result is not None]
