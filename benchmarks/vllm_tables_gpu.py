"""Fivefold's kernels over a serving engine's blocks beside our own layout, on a GPU, without vLLM.

    python benchmarks/vllm_tables_gpu.py benchmarks/results/vllm_tables_h100.json

Llama-3-8B's shape: 32 layers of 8 KV heads of 128 numbers, 4 query heads each. `own_ms` is a graph of 32 layers that
append a token and attend, pages of a row one behind the other; `blocks_ms` the same over blocks of `[kv_heads, pages]`
in random order with vLLM's tables, exact tokens in blocks of their own (residual 128). `packing_ms` is a step that
fills every group, `tables_ms` the kernel before a step, `fill_ms` the host's part of it. Replays alternate, medians by
events. Of a chunk of 8192 tokens of a layer: `pack_ms`, `store_ms`, and `gather_ms` of as many tokens before it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fivefold.benchmark import machine
from fivefold.kernels.pack import triton as packing
from fivefold.kernels.packed_decode import Form, schedule
from fivefold.kernels.packed_decode import triton as attention
from fivefold.kernels.paged_pack import Blocks, Tables, exact_columns
from fivefold.kernels.paged_pack import triton as kernel

LAYERS, HEADS, QUERIES, DIM, RESIDUAL = 32, 8, 4, 128, 128
DTYPE = torch.bfloat16
CASES = [
    (2, 1, 131072), (2, 1, 32768), (2, 1, 4096), (4, 1, 131072), (4, 1, 32768), (2, 24, 32768), (4, 12, 32768),
    (8, 1, 32768),
]  # fmt: skip
CHUNK = 8192
DEVICE = torch.device("cuda")


def times(*calls: Callable[[], Any], repeats: int = 20) -> list[float]:
    """Median ms of each, in turns."""
    found: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 3):
        for call, mine in zip(calls, found):
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            call()
            after.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                mine.append(before.elapsed_time(after))
    return [statistics.median(mine) for mine in found]


def records(form: Form, count: int) -> torch.Tensor:
    """Pages of random tokens, int8 `[count, nbytes]`."""
    some = min(count, 64)
    keys, values = (torch.randn(some, form.tokens, DIM, device=DEVICE, dtype=DTYPE) for _ in range(2))
    fields = packing.pack_pages(form, keys, values, 0, None)
    whole = torch.cat([x.reshape(some, -1).view(torch.int8) for x in fields], 1)
    return whole[torch.arange(count, device=DEVICE) % some]


def case(bits: int, batch: int, context: int) -> dict[str, Any]:
    form = Form(bits, 32, 32, DIM)
    rows, columns = batch * HEADS, -(-(context + 64) // form.tokens)
    length = context + 20  # one token beyond whole groups, and more
    start = (length - 1 - RESIDUAL) // 32 * 32
    count = exact_columns(RESIDUAL)
    queries = torch.randn(LAYERS, rows, QUERIES, DIM, device=DEVICE, dtype=DTYPE)
    new = torch.randn(2, LAYERS, batch, HEADS, DIM, device=DEVICE, dtype=DTYPE)

    # Our own layout.
    own = records(form, LAYERS * rows * columns).view(LAYERS, rows, columns, -1)
    exact = torch.randn(LAYERS, rows, count, 2, 32, DIM, device=DEVICE).to(DTYPE)
    spans = torch.zeros(rows, schedule.SPAN, dtype=torch.int32, device=DEVICE)
    spans[:, 1], spans[:, 4] = start, length - start
    programs = attention.programs_for(rows, DEVICE, form, QUERIES, DTYPE)
    page = schedule.pages_of(spans.cpu().numpy(), form.tokens, 1, programs[1] == 0)
    starts = torch.from_numpy(schedule.starts_of(page, programs)).to(DEVICE)
    places = torch.arange(rows * columns, device=DEVICE).view(rows, columns) * (form.nbytes // 16)
    slots = torch.arange(rows * count * 2, device=DEVICE).view(rows, count, 2) * (32 * DIM * 2 // 16)
    tables = [places + own[i].data_ptr() // 16 for i in range(LAYERS)]
    exacts = [schedule.Exact(slots + exact[i].data_ptr() // 16, DTYPE) for i in range(LAYERS)]
    found = torch.empty_like(queries)

    def in_own() -> None:
        for i in range(LAYERS):
            attention.append(new[0, i].view(rows, DIM), new[1, i].view(rows, DIM), spans, exacts[i])
            settings = {"starts": starts, "programs": programs, "out": found[i]}
            attention.decode(queries[i], 0.08, spans, schedule.Packed(tables[i], form), exacts[i], **settings)

    # An engine's blocks: of every layer one behind the other, requests' blocks scattered, null block first.
    blocks = batch * columns + 1
    memory = torch.empty(LAYERS, blocks, HEADS, 1, form.nbytes, dtype=torch.int8, device=DEVICE)
    block_table = (torch.randperm(blocks - 1, device=DEVICE) + 1).to(torch.int32).view(batch, columns)
    for i in range(LAYERS):
        pages = own[i].view(batch, HEADS, columns, -1).transpose(1, 2).flatten(0, 1)
        memory[i, block_table.flatten().long(), :, 0] = pages
    recent = -(-length // 32)
    exact_blocks = batch * count + 1
    exact_memory = torch.zeros(LAYERS, exact_blocks, HEADS, 1, 64 * DIM * 2, dtype=torch.int8, device=DEVICE)
    exact_table = torch.zeros(batch, recent + 4, dtype=torch.int32, device=DEVICE)
    shuffled = (torch.randperm(exact_blocks - 1, device=DEVICE) + 1).to(torch.int32).view(batch, count)
    exact_table[:, start // 32 : start // 32 + count] = shuffled
    for i in range(LAYERS):
        pages = exact[i].view(batch, HEADS, count, -1).view(torch.int8).transpose(1, 2)
        exact_memory[i, shuffled.flatten().long(), :, 0] = pages.flatten(0, 1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    newest = exact_table.gather(1, ((lengths - 1) // 32)[:, None].long())[:, 0].long() * 32 + (lengths - 1) % 32
    out = Tables(
        torch.zeros(rows, columns, dtype=torch.int64, device=DEVICE),
        torch.zeros(rows, count, 2, dtype=torch.int64, device=DEVICE),
        torch.zeros_like(spans), torch.zeros(2, rows + 1, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    layers = [(Blocks(memory[i], block_table), Blocks(exact_memory[i], exact_table)) for i in range(LAYERS)]
    bases = [(a.place.base, b.place.base) for a, b in layers]
    peak = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    other = torch.empty_like(queries)

    def fill() -> None:
        (a, b) = layers[0]
        kernel.tables(form, a.place, block_table, b.place, exact_table, HEADS, DTYPE, lengths, RESIDUAL, programs,
                      length, out, 256)  # fmt: skip

    def in_blocks() -> None:
        for i, ((a, b), (base, exact_base)) in enumerate(zip(layers, bases)):
            kernel.step(form, new[0, i], new[1, i], a, b, lengths, newest, peak)
            attention.decode(
                queries[i], 0.08, out.spans, schedule.Packed(out.packed, form, base=base),
                schedule.Exact(out.exact, DTYPE, base=exact_base), starts=out.starts, programs=programs, out=other[i],
            )  # fmt: skip

    fill()
    assert torch.equal(out.spans, spans)
    assert (out.packed >= 0).all()
    graphs = machine.captured(in_own, 1), machine.captured(in_blocks, 1)
    mine, theirs = times(*[x.replay for x in graphs])
    graphs[0].replay(), graphs[1].replay()
    torch.cuda.synchronize()
    assert found.isfinite().all()
    error = float((found.float() - other.float()).norm() / found.float().norm())
    row = {"bits": bits, "batch": batch, "context": context, "own_ms": mine, "blocks_ms": theirs,
           "ratio": theirs / mine, "error": error}  # fmt: skip
    (row["tables_ms"],) = times(fill)
    before = time.perf_counter()
    for _ in range(50):
        fill()
    row["fill_ms"] = (time.perf_counter() - before) * 20
    torch.cuda.synchronize()
    lengths.fill_(length // 32 * 32 + 32)
    lengths.clamp_(max=recent * 32)
    (row["packing_ms"],) = times(graphs[1].replay)
    return row


def chunk(bits: int) -> dict[str, Any]:
    """Of one layer."""
    form = Form(bits, 32, 32, DIM)
    columns = 2 * CHUNK // form.tokens
    sets = 8  # beyond the L2
    memory = torch.empty(sets, columns + 1, HEADS, 1, form.nbytes, dtype=torch.int8, device=DEVICE)
    memory.copy_(records(form, sets * (columns + 1) * HEADS).view_as(memory))
    exact = torch.randn(sets, 3 * CHUNK // 32, HEADS, 1, 64 * DIM, device=DEVICE).to(DTYPE).view(torch.int8)
    table = (torch.randperm(columns, device=DEVICE) + 1).to(torch.int32)[None]
    exact_table = (torch.randperm(2 * CHUNK // 32, device=DEVICE) + 1).to(torch.int32)[None]
    qkv = torch.randn(sets, CHUNK, (QUERIES + 2) * HEADS, DIM, device=DEVICE, dtype=DTYPE)
    peak = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    pages = [[0, page, 0, CHUNK, 2 * CHUNK] for page in range(CHUNK // form.tokens, columns)]
    listed = torch.tensor(pages, dtype=torch.int32, device=DEVICE)
    at = torch.arange(CHUNK, 2 * CHUNK, device=DEVICE)
    slots = exact_table[0].long()[at // 32] * 32 + at % 32
    both = torch.empty(2, CHUNK, HEADS, DIM, device=DEVICE, dtype=DTYPE)
    turn = [0]

    def each(call: Callable[[int], None]) -> Callable[[], None]:
        def run() -> None:
            turn[0] = (turn[0] + 1) % sets
            call(turn[0])

        return run

    def of(i: int) -> tuple[torch.Tensor, torch.Tensor, Blocks, Blocks]:
        keys, values = qkv[i, :, QUERIES * HEADS : -HEADS], qkv[i, :, -HEADS:]
        return keys, values, Blocks(memory[i], table), Blocks(exact[i], exact_table)

    def own(i: int) -> None:
        tokens = qkv[i].view(-1, form.tokens, DIM)[: 2 * CHUNK * HEADS // form.tokens]
        packing.pack_pages(form, tokens[0::2], tokens[1::2], 0, None)

    def pack(i: int) -> None:
        keys, values, packed, there = of(i)
        kernel.pack(form, keys, values, packed, there, listed, peak)

    def store(i: int) -> None:
        keys, values, _, there = of(i)
        kernel.store(keys, values, there, slots)

    def gather(i: int) -> None:
        _, _, packed, there = of(i)
        kernel.gather(form, packed, there, 0, 0, CHUNK, CHUNK, *both)

    names = "own_pack_ms", "pack_ms", "store_ms", "gather_ms"
    return {"bits": bits, "chunk": CHUNK, **dict(zip(names, times(*map(each, (own, pack, store, gather)))))}


def main() -> None:
    out = Path(sys.argv[1])
    rows: list[dict[str, Any]] = []
    tasks: list[Callable[[], dict[str, Any]]] = [lambda one=one: case(*one) for one in CASES]  # type: ignore[misc]
    tasks[3:3] = [lambda: chunk(2), lambda: chunk(4)]
    with torch.inference_mode():
        for task in tasks:
            try:
                rows.append(task())
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            except Exception as error:
                traceback.print_exc(limit=-3)
                print("FAILED", repr(error)[:300], flush=True)
            torch.cuda.empty_cache()
            out.write_text(json.dumps({"machine": machine.describe(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
