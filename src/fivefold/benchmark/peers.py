"""Other caches for transformers, for the same table and run as ours: `fivefold bench decode --peers`.

What is not installed, or does not run here, has a row that says why. Nothing of it is needed for anything else.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache

import fivefold
from fivefold.benchmark import decode

KEEP = 0.5
"""What kvpress leaves of a prompt."""
Step = Callable[[torch.Tensor], torch.Tensor]
"""One decoding step: tokens int64 `[batch, 1]` to the next ones."""


@dataclass(frozen=True)
class Peer:
    """name: as its rows say. packages: what it needs, by the name to install it and to import it. make: from a model,
    context, batch, and the steps that it shall have room for: a cache that holds so much, and its step."""

    name: str
    packages: tuple[tuple[str, str], ...]
    make: Callable[[Any, int, int, int], tuple[Any, Step]]

    @property
    def version(self) -> str:
        """Of transformers, and of what it needs beside, as far as that is installed."""
        names = ("transformers", *(name for name, _ in self.packages))
        return ", ".join(f"{name} {found}" for name in names if (found := _version(name)) is not None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(model: Any, peer: Peer, context: int, batch: int, steps: int) -> dict[str, Any]:
    """What `decode.timed` says of a peer; or `error`, and why."""
    row: dict[str, Any] = {"version": peer.version}
    fivefold.restore(model)
    for package, module in peer.packages:
        if _version(package) is None:
            return {**row, "error": f"not installed: pip install {package}"}
        try:
            importlib.import_module(module)
        except Exception as error:
            return {**row, "error": f"cannot be imported: {_short(error)}"}
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with torch.inference_mode():
            cache, step = peer.make(model, context, batch, steps + decode.WARM_UP)
            return {**row, **decode.timed(model, cache, batch, steps, decode.WARM_UP, step)}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of code that is not ours: whatever it is, the others go on
        return {**row, "error": f"does not run here: {_short(error)}"}
    finally:
        torch._dynamo.reset()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def alive(cache: Any) -> int:
    """Bytes of the memory of all tensors that a cache holds, wherever it has them; each storage counts once."""
    held: dict[tuple[str, int], int] = {}
    for tensor in _tensors(cache, set()):
        storage = tensor.untyped_storage()
        held[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if id(value) in seen or isinstance(value, type | str):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None:
            yield value
        for name in flatten()[0] if flatten else ():  # it is made of several
            yield from _tensors(getattr(value, name), seen)
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one, seen)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        yield from _tensors(vars(value), seen)


def _static(model: Any, context: int, batch: int, steps: int) -> tuple[Any, Step]:
    cache = decode.filled(model, decode.STATIC, context, batch, False, steps)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    positions = torch.full((batch, 1), context, device=model.device)

    def step(token: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        logits = compiled(token.clone(), position_ids=positions.clone(), past_key_values=cache).logits
        positions.add_(1)
        return logits[:, -1:].argmax(-1)

    return cache, step


def _quantized(backend: str, bits: int, model: Any, context: int, batch: int, steps: int) -> tuple[Any, Step]:
    """With transformers' own settings, but for the axis that HQQ can work along."""
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {}
    cache = QuantizedCache(backend, model.config, nbits=bits, **axes)
    decode.fill_stock(model, cache, context, batch)
    return cache, partial(_step, model, cache)


def _pressed(model: Any, context: int, batch: int, steps: int) -> tuple[Any, Step]:
    """SnapKV by kvpress. It works on prompts: so one is read, of random tokens."""
    kvpress = importlib.import_module("kvpress")
    cache = DynamicCache(config=model.config)
    ids = torch.randint(model.config.vocab_size, (batch, context), device=model.device)
    with kvpress.SnapKVPress(compression_ratio=1 - KEEP)(model):
        model(ids, past_key_values=cache, logits_to_keep=1)
    positions = torch.full((batch, 1), context, device=model.device)

    def step(token: torch.Tensor) -> torch.Tensor:
        out = _step(model, cache, token, position_ids=positions)
        positions.add_(1)
        return out

    return cache, step


def _step(model: Any, cache: Any, token: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(token, past_key_values=cache, **given).logits
    return logits[:, -1:].argmax(-1)


PEERS = (
    Peer("StaticCache, torch.compile(mode=reduce-overhead)", (), _static),
    *(
        Peer(f"QuantizedCache({backend}, {bits} bits)", (packages,), partial(_quantized, backend, bits))
        for backend, packages in (
            ("hqq", ("hqq", "hqq.core.quantize")),
            ("quanto", ("optimum-quanto", "optimum.quanto")),
        )
        for bits in (4, 2)
    ),
    Peer(f"kvpress SnapKVPress({1 - KEEP:g})", (("kvpress", "kvpress"),), _pressed),
)
