"""What this machine is, which kernels run on it and why, and how its time is measured."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from fivefold.engine import decoding as steps
from fivefold.engine.build import build
from fivefold.errors import FivefoldError
from fivefold.kernels.choice import choose
from fivefold.kernels.device import SETTINGS, no_garbage
from fivefold.methods import registered
from fivefold.recipe import Recipe
from fivefold.serving.vllm import state
from fivefold.store.spec import LayerSpec, Pools

PACKAGES = ("fivefold", "torch", "transformers", "triton", "numpy")
FLUSHED = 1 << 28
"""Bytes written between two timed calls on a GPU: more than any L2 cache holds."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict[str, Any]:
    """Versions, devices, and the path of the kernels on each."""
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    found["vllm"] = state().said
    found["cuda"] = torch.version.cuda
    found["FIVEFOLD_KERNELS"] = os.environ.get("FIVEFOLD_KERNELS", "auto")
    if torch.cuda.is_available():
        asked = next((os.environ[name] for name in SETTINGS if name in os.environ), None)
        found["allocator"] = asked or "as torch's is, until compress() has it map memory page by page"
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    found["devices"] = [{"device": str(d), **_hardware(d), **choose(d)._asdict()} for d in devices]
    return found


def decoding(device: torch.device) -> dict[str, str]:
    """Which way decoding steps would go on a device, by method (without those that need a profile): in 32 layers of 8
    KV heads with 128 numbers, four query heads each, in bfloat16, as a CUDA graph where they can be one."""
    specs = [LayerSpec(i, 32, 8, 32, 128, torch.bfloat16, device) for i in range(32)]
    found = {}
    for recipe in (Recipe(), *(Recipe((kind(),)) for kind in registered().values())):
        with suppress(FivefoldError):
            session = build(recipe, recipe.divided(specs)[0], Pools())
            graph = ""
            if device.type == "cuda":
                from fivefold.models.graph import Step  # imports transformers, which takes seconds

                graph = "" if Step.why_not(session) else "as a CUDA graph"
            found[str(recipe)] = steps.describe(session, graph)
    return found


def _hardware(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }


def name() -> str:
    """The last device, the GPU where there is one."""
    return str(describe()["devices"][-1]["name"])


def stamp() -> dict[str, Any]:
    """The head of a file of results."""
    return {"date": time.strftime("%Y-%m-%d"), "machine": describe()}


def tidy(device: torch.device) -> None:
    """Give back what nobody holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clocked(device: torch.device, call: Callable[[], Any]) -> float:
    """Seconds of one call, on the host's clock."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def dtype(device: torch.device) -> torch.dtype:
    """Of models that are measured."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random(device: torch.device, *shape: int) -> torch.Tensor:
    """Numbers to measure with: power, and with it the clock, depends on them, and zeros would be too fast."""
    return torch.randn(shape, device=device, dtype=dtype(device))


def elapsed_ms(call: Callable[[], Any]) -> float:
    """Milliseconds of a call on the device, gaps included."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def captured(call: Callable[[], Any], times: int = 3) -> torch.cuda.CUDAGraph:
    """A call as a graph, after it has been called so many times."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with no_garbage(), torch.cuda.graph(graph):
        call()
    return graph


def median_ms(call: Callable[[], Any], device: torch.device, repeats: int = 25) -> float:
    """Median time of a call, milliseconds. On a GPU: of a captured graph, by events, with nothing of it in L2."""
    if device.type == "cpu":
        call()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times) * 1000
    flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)
    graph = captured(call)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for before, after in pairs:
        flush.zero_()
        before.record()
        graph.replay()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def sustained_ms(call: Callable[[], Any], device: torch.device, least: float = 0.25) -> float:
    """Time of a call, milliseconds, among others of its kind for `least` seconds or more: on a GPU a captured graph's,
    at the clock that power allows then. What it reads must be more than L2 holds."""
    if device.type == "cpu":
        return median_ms(call, device, 5)
    graph = captured(call)

    def replay(count: int) -> None:
        for _ in range(count):
            graph.replay()

    count = max(3, round(least * 3000 / elapsed_ms(partial(replay, 3))))
    return min(elapsed_ms(partial(replay, count)) for _ in range(2)) / count


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a large copy by a kernel (a captured `copy_` takes the copy engine)."""
    size = 1 << (32 if device.type == "cuda" else 27)
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    return 2 * size / median_ms(lambda: torch.bitwise_not(source, out=target), device, 9) * 1000
