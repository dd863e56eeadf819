"""One decoding step's attention of one layer, of every recipe, against SDPA over the same tokens in the same run.

The layer is a real one: random keys and values (a few channels 20 times as large) go through its codec into pages of
a pool, and the step is the engine's own `attend_step`, all tiers and their merge included. Packing is timed too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fivefold.attention import attend_picked, attend_step
from fivefold.attention.fused import why_not
from fivefold.attention.tables import kernels, tables_of
from fivefold.benchmark.machine import median_ms
from fivefold.kernels.choice import choose
from fivefold.kernels.pack import pack_pages
from fivefold.kernels.packed_decode import Form
from fivefold.recipe import Recipe
from fivefold.store.layer_cache import LayerCache
from fivefold.store.spec import LayerSpec, Pools

RECIPES = (
    "full()", "kivi(bits=8)", "kivi(bits=4, group=128)", "kivi(bits=4)", "kivi(bits=3)", "kivi(bits=2, group=128)",
    "kivi(bits=2)",
)  # fmt: skip
SIZES = {"cuda": ((8192, 1), (32768, 1), (131072, 4), (524288, 1)), "cpu": ((4096, 1), (16384, 1))}
KV_HEADS, GROUP, HEAD_DIM = 8, 4, 128
Call = Callable[[], Any]
TOP = 512  # tokens that a sparse layer reads
PACKED = 1 << 20  # tokens that are packed to time it
PIECE = 1 << 24  # numbers that are made and stored at a time


def measure(device: torch.device, context: int, batch: int, recipes: list[str]) -> Iterator[dict[str, Any]]:
    """Rows: kernel, milliseconds, bytes read, bytes a second, and how many times faster than the best SDPA."""
    dtype = torch.bfloat16
    rows = KV_HEADS * batch
    queries = torch.randn(rows, GROUP, HEAD_DIM, device=device, dtype=dtype)
    size = {"context": context, "batch": batch}

    def row(kernel: str, path: str, ms: float, nbytes: int, best: float) -> dict[str, Any]:
        rate = nbytes / ms * 1000
        return {**size, "kernel": kernel, "path": path, "ms": ms, "bytes": nbytes, "rate": rate, "gain": best / ms}

    timed, nbytes = _sdpa(queries, context)
    best = min(ms for _, ms in timed)
    for name, ms in timed:
        yield row(name, "torch", ms, nbytes, best)
    for recipe in recipes:
        layer = filled(Recipe.parse(recipe), device, context, batch, dtype)
        (group,) = layer.groups
        read = sum(read_bytes(layer))
        path = _path(layer, device)
        ms = median_ms(partial(attend_step, group, queries, HEAD_DIM**-0.5), device)
        yield row(recipe, path, ms, read, best)
        layer.free()
        if layer.codec is not None and layer.codec.form is not None:
            ms, moved = pack(layer.codec.form, rows * context, device, dtype)
            path = "triton" if choose(device).triton else "reference"
            yield {**row(f"pack {recipe}", path, ms, moved, best), "gain": None}

    if choose(device).triton and not why_not(layer, device, GROUP):
        for name, nbytes, call in (
            _streaming(device, context, batch, queries),
            _picked(device, context, batch, queries, "full()"),
            _picked(device, context, batch, queries, "kivi(bits=4)"),
            _picked(device, context, batch, queries, "kivi(bits=2)"),
        ):
            yield row(name, "triton", median_ms(call, device), nbytes, best)


def read_bytes(layer: LayerCache) -> tuple[int, int]:
    """What a step of a layer whose heads are all alike reads: exact tokens, and whole packed pages."""
    (group,) = layer.groups
    spec = layer.spec
    exact = len(group.rows) * int(group.bounds.exact_tokens) * 2 * spec.head_dim * spec.dtype.itemsize
    return exact, group.packed.size * layer.packed_pools[0].layout.nbytes if layer.packed_pools else 0


def _path(layer: LayerCache, device: torch.device) -> str:
    reader = None if layer.codec is None else layer.codec.reader
    if choose(device).path == "cpp":
        return "cpp"
    if why_not(layer, device, GROUP):
        return "reference"
    return "cuda" if reader is not None and kernels(device).by_cuda(reader, GROUP, device) else "triton"


def _streaming(device: torch.device, context: int, batch: int, queries: torch.Tensor) -> tuple[str, int, Call]:
    """A step of a layer half of whose heads hold a window only, by the tables that a graph of steps reads; the newest
    token is stored by it too."""
    text = f"duo(retrieval={[[0, head] for head in range(KV_HEADS // 2)]})"
    layer = filled(Recipe.parse(text), device, context, batch, queries.dtype)
    tables = tables_of(layer.bank)
    tables.update()
    newest = torch.randn(2, len(queries), HEAD_DIM, device=device, dtype=queries.dtype)
    tokens = int(layer.bounds.exact_tokens.sum())
    call = partial(tables.attend, layer, queries, newest[0], newest[1], HEAD_DIM**-0.5)
    return "duo, 1/2 of the heads", tokens * 2 * HEAD_DIM * queries.dtype.itemsize, call


def _picked(
    device: torch.device, context: int, batch: int, queries: torch.Tensor, recipe: str
) -> tuple[str, int, Call]:
    """A step of a layer that reads the tokens that another one picked, all exact or, beside the exact tier, packed."""
    layer = filled(Recipe.parse(recipe), device, context, batch, queries.dtype)
    (group,) = layer.groups
    top = min(TOP, int(group.bounds.packed_stop) or context)
    positions = torch.stack([torch.randperm(context, device=device)[:top] for _ in range(len(queries))])
    call = partial(attend_picked, group, queries, HEAD_DIM**-0.5, positions)
    exact = 2 * HEAD_DIM * queries.dtype.itemsize
    read = (top + 1) * exact
    if layer.codec is not None and layer.codec.form is not None:
        # Whole words, and the scales of all channels.
        form = layer.codec.form
        read = top * (8 * HEAD_DIM + 4 * HEAD_DIM // form.channels) + int(group.bounds.exact_tokens) * exact
    name = f"tidal, {top} tokens picked"
    return name if recipe == "full()" else f"{name} of {recipe}", len(queries) * read, call


def _sdpa(queries: torch.Tensor, context: int) -> tuple[list[tuple[str, float]], int]:
    """Name and milliseconds of every SDPA backend there is, the heads of a group as rows, and the bytes each reads."""
    shape = (len(queries), 1, context, HEAD_DIM)
    keys, values = (torch.randn(shape, device=queries.device, dtype=queries.dtype) for _ in range(2))
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    timed = []
    for name, backend in backends.items():
        try:
            with sdpa_kernel(backend):
                call = partial(F.scaled_dot_product_attention, queries[:, None], keys, values)
                timed.append((f"SDPA {name} bf16", median_ms(call, queries.device)))
        except RuntimeError:  # no such backend for these shapes here
            continue
    return timed, keys.nbytes + values.nbytes


def pack(form: Form, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Milliseconds to quantise and pack that many tokens (rounded up to pages, at most `PACKED`), and bytes moved."""
    shape = (-(-min(tokens, PACKED) // form.tokens), form.tokens, form.head_dim)
    keys, values = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
    ms = median_ms(partial(pack_pages, form, keys, values, 0, None), device, 9)
    return ms, keys.nbytes + values.nbytes + shape[0] * form.nbytes


def filled(
    recipe: Recipe, device: torch.device, context: int, batch: int, dtype: torch.dtype, head_dim: int = HEAD_DIM
) -> LayerCache:
    """A layer that holds `context` random tokens of `batch` sequences, put there piece by piece."""
    spec = LayerSpec(0, 1, KV_HEADS, KV_HEADS * GROUP, head_dim, dtype, device)
    recipe = recipe.of_layer(spec)
    owner = recipe.packer
    codec = owner.codec(spec) if owner else None
    layer = LayerCache(spec, Pools(), recipe.extents(spec), codec, owner.exact_tokens if owner else 0)
    layer.start(batch)
    scale = torch.where(torch.rand(head_dim, device=device) < 0.05, 20.0, 1.0).to(dtype)
    fill(layer, context, scale)
    if not layer.bounds.exact_tokens.all():
        fill(layer, 1)  # a step's newest token is exact
    return layer


def fill(layer: LayerCache, context: int, scale: torch.Tensor | float = 1.0, piece: int = PIECE) -> None:
    """Append `context` random tokens to every sequence of a layer. scale: of the channels; piece: numbers at a time."""
    spec = layer.spec
    step = max(1024, piece // (layer.batch * spec.kv_heads * spec.head_dim) // 1024 * 1024)
    for first in range(0, context, step):
        tokens = min(step, context - first)
        for group in layer.groups:
            shape = (len(group.rows), tokens, spec.head_dim)
            keys, values = (torch.randn(shape, device=spec.device, dtype=spec.dtype) for _ in range(2))
            if layer.codec is not None and group.bounds.seen == 0:
                layer.learn(group, layer.offsets[group.rows], partial(_first, layer, keys, values))
            layer.append(group, keys * scale, values)


def _first(layer: LayerCache, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What a codec is shown of the first tokens of some rows, with queries and inputs as random as they are."""
    rows, tokens, dim = keys.shape
    queries = keys.new_empty((rows, layer.spec.query_heads // layer.spec.kv_heads, tokens, dim)).normal_()
    inputs = keys.new_empty((layer.batch, tokens, 8)).normal_()
    return queries, keys, values, inputs
