"""`fivefold plan --measure`: the constants of `plan.machine.Machine`, measured on the device at hand.

Rates are of the pieces: copies, products, our kernels, torch's attention, the host's link. What a step takes besides
comes from whole steps: graphs of a Llama of two numbers of layers, alone and in batches, exact and packed; and what a
prompt takes besides, from whole prompts of the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fivefold.attention import attend_step
from fivefold.attention.fused import unpack_fused
from fivefold.benchmark import decode, kernels
from fivefold.benchmark import machine as device_of
from fivefold.benchmark.machine import clocked, dtype, random, tidy
from fivefold.kernels.choice import choose
from fivefold.plan.fit import Prompt, Row, fit_prompts, fit_steps
from fivefold.plan.machine import Machine, measured_file
from fivefold.plan.reading import host_chunk, launches, prompts, reading
from fivefold.plan.sizes import BITS, DIMS, Sizes, sizes_for
from fivefold.plan.time import Read
from fivefold.recipe import Recipe

Progress = Callable[[str], None]
LARGER = 8
"""How much more than L2 holds is read before anything is read again."""
PROMPT_POINTWISE = 120.0
"""Where no prompts were timed: of an H100."""


@torch.inference_mode()
def measure(device: torch.device | None = None, progress: Progress | None = None) -> tuple[Machine, dict[str, Any]]:
    """The constants of a device, and the measurements behind them, for JSON. progress: is told what comes next."""
    device = device_of.device() if device is None else device
    sizes = sizes_for(device)
    raw: dict[str, Any] = {}
    parts: dict[str, Callable[..., Mapping[str, Any]]] = {
        "copies": _copies, "products": _products, "weights": weights, "attention": attention, "prompts": prompts,
        "packing": _packing, "launches": launches, "own launches": partial(launches, own=True),
        "host steps": host_steps, "link": _link, "steps": _steps, "reading": reading,
    }  # fmt: skip
    for name, part in parts.items():
        if progress is not None:
            progress(name)
        raw[name] = part(device, sizes)
        tidy(device)
    return constants(raw), raw


def constants(raw: Mapping[str, Any], name: str | None = None, date: str | None = None) -> Machine:
    """The constants that follow from measurements, of this machine or of another one that was measured then."""
    copy, link = raw["copies"], raw["link"]
    base = Machine(
        name=name or device_of.name(),
        memory=copy["memory"],
        usable=copy["usable"],
        bandwidth=copy["rate"],
        products=raw["products"]["rate"],
        streaming=raw["weights"]["rates"],
        fused=raw["weights"].get("fused", {}),
        attention=raw["attention"]["points"],
        prompt=raw["prompts"]["rates"],
        pack={bits: rate / copy["rate"] for bits, rate in raw["packing"]["pack"].items()},
        unpack={bits: rate / copy["rate"] for bits, rate in raw["packing"]["unpack"].items()},
        pointwise=0.0,
        prompt_pointwise=PROMPT_POINTWISE,
        step=0.0,
        word=0.0,
        layer=0.0,
        packed_layer=0.0,
        packed_row=0.0,
        host_chunk=host_chunk(raw["launches"]),
        own_prompt_pointwise=PROMPT_POINTWISE if "own launches" in raw else None,
        own_host_chunk=host_chunk(raw.get("own launches", {})),
        host_step=raw.get("host steps", {}),
        to_host=link["to_host"],
        from_host=link["from_host"],
        put_start=link["put_start"],
        bring_start=link["bring_start"],
        pinned_to=link["pinned_to"],
        pinned_from=link["pinned_from"],
        link=link["all_reduce"],
        link_start=link["all_reduce_start"],
        date=date or device_of.stamp()["date"],
        source="fivefold plan --measure",
        measured=True,
    )
    # Two numbers of layers, three batches, exact and packed: these tell all of `FITTED` apart. What a sequence adds to
    # a layer (`pointwise`, `packed_row`) and to a step (`word`) shows in the largest batch alone; where that does not
    # fit, steps of many sequences are predicted badly.
    found = fit_steps([Row.from_dict(row) for row in raw["steps"]["rows"]], base)
    prompts = [Prompt.from_dict(row) for row in raw.get("reading", {}).get("rows", ())]
    return fit_prompts(prompts, found)


def save(machine: Machine, raw: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write constants, and what they come from, where `--gpu auto` looks for them."""
    path = measured_file() if path is None else path
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {**device_of.stamp(), "machine": machine.as_dict(), "measured": raw}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def _copies(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        usable = free + torch.cuda.memory_reserved(device)
        return {"rate": device_of.copy_rate(device), "memory": total, "usable": usable}
    source = torch.ones(sizes.copied // 4, dtype=torch.int32)
    target = torch.empty_like(source)
    ms = device_of.median_ms(lambda: torch.bitwise_not(source, out=target), device, 5)
    return {"rate": 2 * sizes.copied / ms * 1000, "memory": 1 << 33, "usable": 1 << 33}


def _products(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    rows, inner, wide = sizes.products
    x, there, back = random(device, rows, inner), random(device, wide, inner), random(device, inner, wide)

    def call() -> None:
        for _ in range(8):  # long enough that the clock settles where a prompt has it
            F.linear(F.linear(x, there), back)

    ms = device_of.median_ms(call, device, 9)
    return {"rate": 8 * 2 * 2 * rows * inner * wide / ms * 1000}


@torch.inference_mode()
def weights(device: torch.device, sizes: Sizes | None = None) -> dict[str, Any]:
    """Bytes a second by rows, of torch's products and of our fused kernels, and seconds that a small product takes
    beyond its bytes."""
    sizes = sizes or sizes_for(device)
    rates: dict[str, float] = {}
    starts: dict[str, float] = {}
    for (out, inner), large in zip(sizes.matrix, (False, True)):
        each = out * inner * dtype(device).itemsize
        count = max(4, sizes.weights // (1 if large else 8) // each)
        matrices = [random(device, *((out, inner) if i % 2 or not large else (inner, out))) for i in range(count)]
        for rows in sizes.rows:
            given = {width: random(device, rows, width) for width in (out, inner)}

            def call(given: dict[int, torch.Tensor] = given, matrices: list[torch.Tensor] = matrices) -> None:
                for matrix in matrices:
                    F.linear(given[matrix.shape[1]], matrix)

            seconds = device_of.median_ms(call, device, 7) / 1000 / count
            if large:
                rates[str(rows)] = each / seconds
                starts[str(rows)] -= each / rates[str(rows)] * sizes.matrix[0][0] * sizes.matrix[0][1] / out / inner
            else:
                starts[str(rows)] = seconds
        del matrices
        tidy(device)
    return {"rates": rates, "starts": starts, "fused": _fused(device, sizes)}


def _fused(device: torch.device, sizes: Sizes) -> dict[str, float]:
    """Bytes a second of weights that our fused kernels of a step read, by rows: what a larger MLP takes longer than a
    small one, of many that come one after the other."""
    if not choose(device).triton:
        return {}
    from fivefold.kernels.step import triton
    from fivefold.kernels.step.reference import Norm

    found: dict[str, list[tuple[float, float]]] = {}
    for wide, hidden in sizes.mlps:
        each = 3 * wide * hidden * dtype(device).itemsize
        shapes = ((wide, hidden), (wide, hidden), (hidden, wide))
        layers = [[random(device, *shape) for shape in shapes] for _ in range(max(2, sizes.weights // each))]
        norm = Norm(torch.ones(hidden, device=device, dtype=dtype(device)), 1e-5)
        for rows in (rows for rows in sizes.rows if rows <= triton.COLUMNS):
            given = random(device, rows, hidden)

            def call(x: torch.Tensor = given, layers: Any = layers, norm: Norm = norm) -> None:
                for gate, up, down in layers:
                    x = triton.added(triton.gated(x, gate, up, (None, None), norm, "silu"), down, None, x)

            seconds = device_of.sustained_ms(call, device) / 1000 / len(layers)
            found.setdefault(str(rows), []).append((each, seconds))
        del layers
        tidy(device)
    return {rows: _line(points)[1] for rows, points in found.items()}


@torch.inference_mode()
def attention(device: torch.device, sizes: Sizes | None = None) -> dict[str, Any]:
    """What a layer's attention takes in a step by kind of page and head_dim, `[bytes, seconds]` of small and large
    caches: as in a step, one layer after the other, none of which L2 has."""
    sizes = sizes or sizes_for(device)
    points: dict[str, list[list[float]]] = {}
    for dim, kind in itertools.product(DIMS, ("exact", *map(str, BITS))):
        recipe = Recipe.parse("full()" if kind == "exact" else f"kivi(bits={kind})")
        for context, batch in sizes.attention:
            with contextlib.suppress(torch.OutOfMemoryError):
                found = _attention(recipe, device, context, batch, dim)
                points.setdefault(Machine.attention_key(kind, dim), []).append(found)
            tidy(device)
    return {"points": points}


def _attention(recipe: Recipe, device: torch.device, context: int, batch: int, dim: int) -> list[float]:
    """Bytes and seconds of the attention of one of some layers alike."""
    layers = [kernels.filled(recipe, device, context, batch, dtype(device), dim)]
    nbytes = sum(kernels.read_bytes(layers[0]))
    count = 1
    if device.type == "cuda":
        count = min(24, max(2, -(-LARGER * torch.cuda.get_device_properties(device).L2_cache_size // nbytes)))
    layers += [kernels.filled(recipe, device, context, batch, dtype(device), dim) for _ in range(count - 1)]
    groups = [group for layer in layers for group in layer.groups]
    queries = [random(device, len(group.rows), kernels.GROUP, dim) for group in groups]

    def call() -> None:
        for group, given in zip(groups, queries):
            attend_step(group, given, dim**-0.5)

    seconds = device_of.sustained_ms(call, device) / 1000 / count
    for layer in layers:
        layer.free()
    return [nbytes, seconds]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """What a call takes besides, and bytes a second, of (bytes, seconds) of a small and a large one."""
    (few, short), (many, long) = points
    if long <= short:
        return 0.0, many / long
    rate = min((many - few) / (long - short), 4 * many / long)
    return max(0.0, short - few / rate), rate


def _eager(device: torch.device, call: Callable[[], Any], repeats: int = 5) -> float:
    """Median seconds of a call of some milliseconds, without a graph: cuDNN plans when it is first called."""
    call()
    return statistics.median(clocked(device, call) for _ in range(repeats))


def _packing(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    number = dtype(device)
    packed, unpacked = {}, {}
    for bits in BITS:
        layer = kernels.filled(Recipe.parse(f"kivi(bits={bits})"), device, sizes.unpacked, 1, number)
        (group,) = layer.groups
        assert layer.codec is not None and layer.codec.form is not None
        ms, moved = kernels.pack(layer.codec.form, len(group.rows) * sizes.unpacked, device, number)
        packed[str(bits)] = moved / ms * 1000
        tokens, form = int(group.bounds.packed_tokens), layer.codec.form
        moved = group.packed.size * (form.nbytes + 2 * form.tokens * form.head_dim * number.itemsize)

        def call(layer: Any = layer, group: Any = group, tokens: int = tokens) -> Any:
            pair = unpack_fused(group, 0, tokens, layer.spec.dtype)
            if pair is None:
                pair = group.decoded(0, group.packed.shape[1])
            return pair

        unpacked[str(bits)] = moved / _eager(device, call)
        layer.free()
    return {"pack": packed, "unpack": unpacked}


@torch.inference_mode()
def host_steps(device: torch.device, sizes: Sizes | None = None) -> dict[str, float]:
    """Seconds of a step of a model so narrow that the device waits for the host: of any such step, and of a layer."""
    sizes = sizes or sizes_for(device)
    if device.type != "cuda":
        return {}  # the host is the device
    counts, recipes = (sizes.layers[1], 3 * sizes.layers[1]), ("full()", "kivi(bits=4)")
    shapes = [{**sizes.narrow, "num_hidden_layers": layers} for layers in counts]
    models, rounds = [decode.build(shape, device) for shape in shapes], []
    for _ in range(3):  # the least counts: see `reading.TURNS`
        for model, shape in zip(models, shapes):
            rows = [timed_step(model, shape, recipe, sizes.context, 1, sizes.steps) for recipe in recipes]
            rounds.append([row["seconds"] for row in rows])
    found = [statistics.fmean(map(min, zip(*rounds[kind::2]))) for kind in range(2)]
    each = max(0.0, found[1] - found[0]) / (counts[1] - counts[0])
    return {"step": max(0.0, found[0] - counts[0] * each), "layer": each}


def _link(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Bytes a second between device and host: of plain copies, and as a cache is put away and brought back."""
    cuda = device.type == "cuda"
    host = torch.ones(sizes.copied // 4, dtype=torch.int32, pin_memory=cuda)
    own = torch.ones_like(host, device=device)
    to = _eager(device, partial(host.copy_, own, non_blocking=True))
    back = _eager(device, partial(own.copy_, host, non_blocking=True))
    del host, own
    model = decode.build({**sizes.step, "num_hidden_layers": sizes.layers[1]}, device)
    rows = [switched(model, recipe, context) for recipe in ("full()", "kivi(bits=4)") for context in sizes.switched]
    exact, packed = rows[:2], rows[2:]
    found: dict[str, Any] = {"pinned_to": sizes.copied / to, "pinned_from": sizes.copied / back, "rows": rows}
    for rate, start, name in (("to_host", "put_start", "offload_s"), ("from_host", "bring_start", "restore_s")):
        begins, found[rate] = _line([(row["bytes"], row[name]) for row in exact])
        more = statistics.fmean(row[name] - row["bytes"] / found[rate] for row in packed)
        found[start] = {"exact": begins, "packed": max(0.0, more)}
    # An all-reduce takes more than one GPU and is not measured: 0.8 of what NVLink 4 has each way.
    return {**found, "all_reduce": 3.6e11, "all_reduce_start": 1.2e-5}


def switched(model: Any, recipe: str, context: int, turns: int = 4) -> dict[str, Any]:
    """A cache that is put away and brought back: its bytes, and the seconds of each turn and their medians."""
    cache = decode.filled(model, recipe, context, 1, False)
    report = cache.report()
    pairs = [(clocked(model.device, cache.offload), clocked(model.device, cache.restore)) for _ in range(turns)]
    cache.free()
    tidy(model.device)
    put, brought = ([pair[side] for pair in pairs] for side in (0, 1))
    return {
        "recipe": recipe, "context": context, "bytes": report.total - report.free, "offload": put, "restore": brought,
        # The first turn asks for the host's memory.
        "offload_s": statistics.median(put[1:]), "restore_s": statistics.median(brought[1:]),
    }  # fmt: skip


def _steps(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Steps of two numbers of layers, as graphs where there are graphs."""
    rows = []
    for layers in sizes.layers:
        shape = {**sizes.step, "num_hidden_layers": layers}
        model = decode.build(shape, device)
        for batch, own in [*((batch, False) for batch in sizes.batches), (1, True), (sizes.batches[-1], True)]:
            for recipe in ("full()", "kivi(bits=4)"):
                with contextlib.suppress(torch.OutOfMemoryError):
                    rows.append(timed_step(model, shape, recipe, sizes.context, batch, sizes.steps, own))
                tidy(device)
        del model
        tidy(device)
    return {"rows": rows}


def timed_step(
    model: Any, shape: Mapping[str, Any], recipe: str, context: int, batch: int, steps: int, own: bool = False
) -> dict[str, Any]:
    """A row of `benchmark.decode` with what a step reads, and the memory that it takes. own: by its own code."""
    graph = model.device.type == "cuda"
    began = time.perf_counter()
    cache = decode.filled(model, recipe, context, batch, graph)
    if cache.step is not None:
        cache.step.fuses = not own
    report = cache.report().as_dict()
    row: dict[str, Any] = {"shape": dict(shape), "recipe": recipe, "context": context, "batch": batch, "graph": graph}
    row["filled_in"] = time.perf_counter() - began
    row["reads"] = [vars(read) for read in reads_of(report, recipe, len(model.model.layers))]
    row["report"] = {name: x for name, x in report.items() if x}
    if graph:
        torch.cuda.reset_peak_memory_stats()
        row["after_fill"] = memory()
    row.update(decode.timed(model, cache, batch, steps, decode.warm_up(cache)))
    row["seconds"] = row["ms"] / 1000
    if graph:
        row["after_steps"] = memory()
    return row


def memory() -> dict[str, int]:
    """Bytes of the device: in use by anybody, and of torch's, in tensors and held, now and at most."""
    free, total = torch.cuda.mem_get_info()
    return {
        "used": total - free, "allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved(),
        "most_allocated": torch.cuda.max_memory_allocated(), "most_reserved": torch.cuda.max_memory_reserved(),
    }  # fmt: skip


def reads_of(report: Mapping[str, int], recipe: str, layers: int) -> list[Read]:
    """What a step reads of a cache that `report` is of."""
    bits = getattr(Recipe.parse(recipe).get("bits"), "bits", 16)
    packed = report["codes"] + report["scales"] + report["other"]
    reads = [Read("exact", 16, report["exact"], layers)]
    return reads + ([Read("packed", bits, packed, layers)] if packed else [])
