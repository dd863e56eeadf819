"""A step over exact pages, by how many programs share them: what `ALONE` in `kernels/packed_decode/triton.py` and
`WORTH` in `schedule.py` rest on.

    python benchmarks/exact_programs.py benchmarks/results/exact_programs.json

`rows`: attention alone, of two layers one after the other, in terabytes a second of keys and values. `steps`: whole
steps of Llama-3-8B's shape as a CUDA graph, in milliseconds, which may want another number. Needs a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from fivefold.attention import attend_step
from fivefold.attention.tables import tables_of
from fivefold.benchmark import decode, kernels, machine
from fivefold.kernels.packed_decode import triton
from fivefold.kernels.packed_decode.schedule import Programs
from fivefold.recipe import Recipe

LAYERS = 2
SIZES = {
    (524288, 1): (528, 1056, 2112), (131072, 2): (528, 1056, 2112, 4224), (16384, 2): (528, 1056),
    (131072, 4): (528, 1056, 2112, 4224), (32768, 8): (448, 528, 576, 704, 1056, 2112, 4224),
    (4096, 8): (528, 1056, 2112), (5120, 8): (528, 640, 2112), (32768, 16): (512, 640, 2112, 4224),
    (4096, 16): (512, 1024, 2048, 4224), (32768, 30): (480, 960, 2112, 4224), (1024, 64): (512, 1056, 2112, 4224),
    (1024, 80): (640, 2112, 4224), (4096, 80): (640, 1280, 2112, 4224), (1024, 256): (2048, 4096, 4224),
}  # fmt: skip
"""Tokens and sequences: numbers of programs."""
STEPS = ((131072, 2), (32768, 2), (131072, 4), (32768, 8), (16384, 16))
COUNTS = (528, 1056, 2112, 4224)


@torch.inference_mode()
def measured(context: int, batch: int, counts: tuple[int, ...], dim: int = kernels.HEAD_DIM) -> dict[str, Any]:
    device = machine.device()
    number, recipe = machine.dtype(device), Recipe.parse("full()")
    layers = [kernels.filled(recipe, device, context, batch, number, dim) for _ in range(LAYERS)]
    rows = sum(len(group.rows) for group in layers[0].groups)
    nbytes = sum(kernels.read_bytes(layers[0]))
    queries = machine.random(device, rows, kernels.GROUP, dim)

    def call() -> None:
        for layer in layers:
            for group in layer.groups:
                attend_step(group, queries[: len(group.rows)], dim**-0.5)

    def rate(programs: Programs) -> float:
        for layer in layers:
            tables_of(layer.bank).programs = programs
        return nbytes / machine.sustained_ms(call, device, 0.15) * LAYERS * 1000 / 1e12

    chosen = triton.programs_for(rows, device)
    rates = {count: [rate(chosen._replace(exact=count, alone=False))] for count in counts}
    now = rate(chosen)
    for layer in layers:
        layer.free()
    machine.tidy(device)
    size = {"context": context, "batch": batch, "head_dim": dim, "rows": rows, "bytes": nbytes}
    return {**size, "tb_s": rates, "as_shared_out": now}


@torch.inference_mode()
def whole_steps(model: Any, context: int, batch: int) -> dict[str, Any]:
    def ms(programs_for: Any) -> float:
        triton.programs_for = programs_for
        cache = decode.filled(model, "full()", context, batch, True)
        cache.reserve(context + 128)
        found: float = decode.timed(model, cache, batch, 40)["ms"]
        cache.free()
        machine.tidy(machine.device())
        return found

    real = triton.programs_for
    by_count = {
        count: ms(lambda *given, count=count: real(*given)._replace(exact=count, alone=False)) for count in COUNTS
    }
    return {"context": context, "batch": batch, "ms": by_count, "as_shared_out": ms(real)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path)
    given = parser.parse_args()
    rows, steps = [], []
    for (context, batch), counts in SIZES.items():
        rows.append(measured(context, batch, counts))
        print(rows[-1], flush=True)
    model = decode.build("llama-3-8b", machine.device())
    for context, batch in STEPS:
        steps.append(whole_steps(model, context, batch))
        print(steps[-1], flush=True)
    given.file.write_text(json.dumps({**machine.stamp(), "rows": rows, "steps": steps}, indent=1) + "\n")


if __name__ == "__main__":
    main()
