"""The kernels of a decoding step over `rotatekv`'s pages alone, of Llama-3-8B's shape, and how far they are from the
reference.

    python benchmarks/rotated_gpu.py OUT.json

Random codes in the packed pages of 8 KV heads with 4 query heads each, one sequence; microseconds of a layer, the least
of 20 replays of a CUDA graph over as many layers as the L2 cache does not hold. `decode` is all kernels of the packed
tier and the merging of parts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fivefold.benchmark import machine
from fivefold.kernels.hadamard import hadamard
from fivefold.kernels.packed_decode import schedule
from fivefold.kernels.packed_decode import triton as kernel
from fivefold.kernels.rotated_decode import Rotated, attend_rotated, cuda

ROWS, HEADS, DIM, TEAM, SINKS = 8, 4, 128, 4, 4
CONTEXTS = {131072: 2, 32768: 6, 4096: 32}
"""Tokens, and over how many layers their pages are more than the cache holds."""


class Layer:
    """Pages of random codes."""

    def __init__(self, tokens: int, bits: int, dtype: torch.dtype, seed: int) -> None:
        device = torch.device("cuda")
        made = torch.Generator(device).manual_seed(seed)
        places = torch.randperm(ROWS * DIM, generator=made, device=device).to(torch.int32)
        inv_freq = 5e5 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        self.form = Rotated(bits, 32, DIM, ROWS, TEAM, SINKS, places, inv_freq)
        columns = -(-tokens // self.form.tokens)
        count, scales = ROWS * columns, (self.form.planes, DIM // 32, 32)

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(count, *shape, generator=made, device=device)

        def words(*shape: int) -> torch.Tensor:
            given = {"generator": made, "dtype": torch.int16, "device": device}
            return torch.randint(-(1 << 15), (1 << 15) - 1, (count, *shape), **given)

        self.fields = {}
        for side, shape in (("key", (DIM, 32)), ("value", (32, DIM))):
            self.fields[f"{side}_words"] = words(*shape)
            self.fields[f"{side}_scale"] = (uniform(*scales) * 0.3 + 0.05).half()
            self.fields[f"{side}_zero"] = (uniform(*scales) * -0.5 - 0.1).half()
        self.fields["sinks"] = torch.full((count, SINKS), -1, dtype=torch.int16, device=device)
        self.order = torch.randperm(count, generator=made, device=device).view(ROWS, columns)
        self.fields["sinks"][self.order[:, 0]] = torch.tensor([0, 3, 70, 127], dtype=torch.int16, device=device)
        parts = [self.fields[x].data_ptr() + self.order * self.fields[x][0].nbytes for x in self.form.fields]
        learned = tuple(
            torch.randn(ROWS, SINKS, DIM, generator=made, device=device).to(dtype) * 3 for _ in self.form.learned
        )
        self.packed = schedule.Packed(torch.stack(parts, 2) // self.form.unit, self.form, learned)
        self.queries = torch.randn(ROWS, HEADS, DIM, generator=made, device=device).to(dtype)
        self.spans = torch.zeros(ROWS, schedule.SPAN, dtype=torch.int32, device=device)
        self.spans[:, 1], self.spans[:, 7] = tokens, 1000
        self.programs = kernel.programs_for(ROWS, device, self.form, HEADS, dtype)
        pages = schedule.pages_of(self.spans.cpu().numpy(), self.form.tokens, TEAM)
        self.starts = torch.from_numpy(schedule.starts_of(pages, self.programs)).to(device)

    def decode(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        given: dict[str, Any] = {"programs": self.programs, "starts": self.starts, "with_lse": True}
        return kernel.decode(self.queries, DIM**-0.5, self.spans, self.packed, **given)

    def error(self) -> float:
        fields = tuple(self.fields[x][self.order] for x in self.form.fields)
        exact = tuple(x.double() for x in self.packed.learned)
        wanted, _ = attend_rotated(self.form, self.queries.double(), DIM**-0.5, self.spans, fields, exact)
        return float((self.decode()[0].double() - wanted).norm() / wanted.norm())


def microseconds(call: Callable[[], Any]) -> float:
    """The least of 20 replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        call()
    for _ in range(20):
        begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, action="append", choices=(2, 3, 4))
    given, rows = parser.parse_args(), []
    hadamard(TEAM * DIM)
    real = cuda.supports
    for bits in given.bits or (2, 4):
        for way in ("cuda", "triton"):
            cuda.supports = real if way == "cuda" else lambda *_: False  # type: ignore[assignment]
            row: dict[str, Any] = {"bits": bits, "way": way}
            for dtype in (torch.float32, torch.bfloat16):
                row[f"error_{dtype}".replace("torch.", "")] = Layer(1500, bits, dtype, 1).error()
            for tokens, count in CONTEXTS.items():
                layers = [Layer(tokens, bits, torch.bfloat16, seed) for seed in range(count)]
                row[f"us_{tokens}"] = microseconds(lambda layers=layers: [x.decode() for x in layers]) / count  # type: ignore[misc]
            rows.append(row)
            print(row, flush=True)
            given.out.write_text(json.dumps({**machine.stamp(), "rows": rows}, indent=1) + "\n")
    cuda.supports = real


if __name__ == "__main__":
    main()
