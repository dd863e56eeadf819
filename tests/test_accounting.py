"""`report()` counts every byte: its total is that of all memory that can be reached from a cache.

The count knows nothing of the engine. It walks from the cache through attributes, slots, dictionaries and sequences,
and adds up every distinct stretch of memory that a tensor or an array holds. What is the model's (modules, their
configurations, weights) is not the cache's, nor what functions keep for the process, which the report lists apart.

Not counted here, since no object of Python holds it: what a captured CUDA graph keeps for itself.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedConfig

import fivefold
from conversations import Conversation
from fivefold.engine import arrivals
from fivefold.errors import CacheFullError
from fivefold.kernels import shared
from recipes import RECIPES, SHAPE, written

pytestmark = pytest.mark.usefixtures("one_thread")

TOLERANCE = 0.005
SMALL = 2048  # bytes that need not be counted, such as the constants of a rotary embedding
SIZES = (1500, 1, 1, 100, *[1] * 34)
_NOT_THE_CACHE_S = (
    torch.nn.Module, PreTrainedConfig, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType,
    weakref.ref, weakref.WeakKeyDictionary, weakref.WeakValueDictionary, str, bytes, int, float, complex, bool,
    type(None), torch.dtype, torch.device, np.generic, np.dtype,
)  # fmt: skip


def memory(root: Any, leave: Iterable[torch.Tensor] = ()) -> dict[int, tuple[int, str]]:
    """All memory that can be reached from `root`, by address: bytes, and by what way it was found. leave: tensors
    whose memory is somebody else's."""
    others = {x.untyped_storage().data_ptr() for x in leave}
    found: dict[int, tuple[int, str]] = {}
    seen: set[int] = set()
    kept: list[Any] = []  # so that no address is used twice
    queue: list[tuple[Any, str]] = [(root, "cache")]
    while queue:
        one, way = queue.pop()
        if isinstance(one, _NOT_THE_CACHE_S) or id(one) in seen:
            continue
        seen.add(id(one))
        kept.append(one)
        if isinstance(one, torch.Tensor):
            storage = one.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in others:
                found[storage.data_ptr()] = max(found.get(storage.data_ptr(), (0, "")), (storage.nbytes(), way))
            continue
        if isinstance(one, np.ndarray):
            while isinstance(one.base, np.ndarray):  # a view
                one = one.base
            if one.nbytes:
                address = one.__array_interface__["data"][0]
                found[address] = max(found.get(address, (0, "")), (one.nbytes, way))
            queue.append((one.base, way))  # an array on a tensor's memory
            continue
        queue += _parts(one, way)
    return found


def _parts(one: Any, way: str) -> Iterator[tuple[Any, str]]:
    """What an object holds: (thing, by what way it was found)."""
    if isinstance(one, dict):
        for key, value in one.items():
            yield key, f"{way} key"
            yield value, f"{way}[{key if isinstance(key, str | int) else ''}]"
    elif isinstance(one, list | tuple | set | frozenset):
        for value in one:
            yield value, f"{way}[]"
    elif isinstance(one, types.MethodType):
        yield one.__self__, way
    elif isinstance(one, functools.partial):
        yield from ((part, way) for part in (one.func, one.args, one.keywords))
    for name, value in getattr(one, "__dict__", {}).items():
        yield value, f"{way}.{name}"
    for kind in type(one).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(one, name):
                yield getattr(one, name), f"{way}.{name}"


def counted(model: Any, cache: Any) -> tuple[int, str]:
    """All bytes of a cache, and where the most are, for a message."""
    found = memory(cache, [*model.parameters(), *model.buffers(), *shared.tensors()])
    ways: dict[str, int] = defaultdict(int)
    for size, way in found.values():
        ways[way] += size
    most = sorted(ways.items(), key=lambda item: -item[1])[:12]
    return sum(size for size, _ in found.values()), "".join(f"\n  {size:>10,} {way}" for way, size in most)


def check(model: Any, cache: Any, most: int, when: str) -> int:
    """The report's total is what is counted, within a share of `most` bytes (or of what there is, if that is more)."""
    total, (count, ways) = cache.report().total, counted(model, cache)
    assert abs(total - count) <= SMALL + TOLERANCE * max(most, count), (
        f"{when}: the report has {total:,} bytes, and there are {count:,} ({total - count:+,}):{ways}\n{cache.report()}"
    )
    return count


def follow(model: Any, cache: Any, talk: Conversation) -> None:
    """A prompt, steps, a second turn and more steps, counted on the way; then everything is freed."""
    most = 0
    for number in range(len(talk)):
        talk.give(number, model, cache)
        if talk.sizes[number] > 1 or number in (1, len(talk) - 1):
            most = max(most, check(model, cache, most, f"after chunk {number}"))
    cache.free()
    check(model, cache, most, "after free()")


@pytest.mark.parametrize("name", RECIPES)
def test_the_total_is_what_there_is(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    follow(model, fivefold.compress(model, written(name, model)), Conversation.of(*SIZES))


@pytest.mark.parametrize("name", ["full", "kivi-residual", "h2o+kivi", "mikv", "cskv"])
def test_the_total_of_a_ragged_batch(tiny: Any, name: str) -> None:
    model = tiny(**SHAPE)
    follow(model, fivefold.compress(model, written(name, model)), Conversation.of(*SIZES, lengths=(1500, 1263, 777)))


@pytest.mark.parametrize("name", ["full", "streaming+kivi", "h2o"])
def test_sliding_layers_are_counted(tiny: Any, name: str) -> None:
    """Layers that stay transformers' own hold memory too, here most of it."""
    model = tiny("gemma3_text", sliding_window=512)
    follow(model, fivefold.compress(model, RECIPES[name]), Conversation.of(600, 1, 1, 100, *[1] * 10))


@pytest.mark.parametrize("name", ["full", "kivi4", "streaming+kivi", "h2o+kivi", "mikv", "cskv", "tidal"])
def test_each_side_of_a_fork_counts_its_own(tiny: Any, name: str) -> None:
    """And the pages of the pool that both have, those that only the other one holds among them."""
    model = tiny(**SHAPE)
    first, talk = fivefold.compress(model, written(name, model)), Conversation.of(1500, 1, 40, 1)
    talk.give(0, model, first)
    other = first.fork()
    for number in range(1, len(talk)):
        talk.give(number, model, other)
    for side, cache in (("first", first), ("fork", other)):
        check(model, cache, 0, side)
    del first, cache
    check(model, other, 0, "when the other side is gone")


@pytest.mark.parametrize("name", RECIPES)
def test_the_cap_holds_for_everything(tiny: Any, name: str) -> None:
    """`max_bytes` is a cap on all that is counted, whatever it is for."""
    model = tiny(**SHAPE)
    recipe, talk = written(name, model), Conversation.of(300, 300, 300, 300, 1, 1)
    free = fivefold.compress(model, recipe)
    for number in range(len(talk)):
        talk.give(number, model, free)
    most = counted(model, free)[0]
    for cap in (int(most * share) for share in (0.4, 0.8, 1.2)):
        cache, full, number = fivefold.compress(model, recipe, max_bytes=cap), False, 0
        while number < len(talk) and not full:
            try:
                talk.give(number, model, cache)
            except CacheFullError:
                full = True
            count, ways = counted(model, cache)
            assert count <= cap + SMALL, f"{count:,} bytes under a cap of {cap:,} after chunk {number}:{ways}"
            assert cache.report().total <= cap + SMALL
            number += 1
    ample = fivefold.compress(model, recipe, max_bytes=4 * most)
    for number in range(len(talk)):
        talk.give(number, model, ample)


@pytest.mark.parametrize("name", RECIPES)
def test_nobody_holds_a_chunk_until_the_forward_ends(name: str, tiny: Any, monkeypatch: Any) -> None:
    """What a layer is given is gone when the head runs, but for what waits to be stored: a prompt in one forward takes
    no more memory than a layer's keys and values beside the cache."""
    model = tiny(**SHAPE)
    cache = fivefold.compress(model, written(name, model))
    monkeypatch.setattr(arrivals, "MOST", 1)
    take, given = arrivals.Arrivals.take, []

    def noting(self: Any, one: Any, revocable: int) -> None:
        given.extend(weakref.ref(x.untyped_storage()) for x in (one.keys, one.values))
        take(self, one, revocable)

    monkeypatch.setattr(arrivals.Arrivals, "take", noting)
    alive = []
    hook = model.lm_head.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in given)))
    try:
        with torch.inference_mode():
            model(torch.randint(1, 131, (2, 300)), past_key_values=cache)
            model(torch.randint(1, 131, (2, 150)), past_key_values=cache)
    finally:
        hook.remove()
    assert len(given) >= 4 and len(alive) == 2 and not any(alive)
