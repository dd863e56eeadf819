"""Decoding steps of recipes whose pages hold low-rank features or shared directions, as a graph, beside those of
transformers' DynamicCache and of full(), in one run on a GPU; and the kernels over features alone.

    python benchmarks/low_rank_gpu.py --out benchmarks/results/low_rank_gpu.json
"""

import gc
import json
import os
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer

import fivefold
from fivefold.benchmark import decode as bench
from fivefold.benchmark.machine import captured
from fivefold.kernels.low_rank import Features
from fivefold.kernels.low_rank import triton as kernel
from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN, Exact, pages_of, starts_of
from fivefold.kernels.packed_decode.triton import decode, programs_for
from fivefold.recipe import Recipe

DEVICE = torch.device("cuda")
SMALL = ("full()", "cskv()", "cskv(bits=4)", "kv_heads()", "minicache()", "minicache() + kivi(bits=4)")
LARGE = ("full()", "cskv()", "cskv(bits=4)", "kv_heads()", "kv_heads(group=8)", "minicache()",
         "minicache() + kivi(bits=4)")  # fmt: skip

SHAPES: dict[str, dict[str, Any]] = {
    "cskv()": {"rank": 26},
    "cskv(bits=4)": {"rank": 26, "bits": 4},
    "kv_heads()": {"rank": 64, "team": 2, "dtype": torch.bfloat16},
    "kv_heads(group=8)": {"rank": 64, "dtype": torch.bfloat16},
}
"""A layer of Llama-3-8B's shape: 8 kv heads, 4 query heads each, head_dim 128."""


def alone(
    context: int, rank: int, bits: int | None = None, team: int = 8, dtype: torch.dtype = torch.float16, heads: int = 8,
    query: int = 4, dim: int = 128, layers: int = 4, whole: bool = False, path: str = "auto",
) -> float:  # fmt: skip
    """Microseconds of the kernels over the features of a layer, cycling over `layers` of them; whole: with a window of
    exact tokens, and all merged. path: FIVEFOLD_KERNELS."""
    os.environ["FIVEFOLD_KERNELS"] = path
    ups = tuple(torch.randn(heads // team, team * rank, team * dim, device=DEVICE) * 0.05 for _ in range(2))
    form = Features(
        ranks=(rank, rank), bits=bits, head_dim=dim, dtype=dtype, team=team, blocks=heads // team, queries=query,
        inv_freq=500000.0 ** -(torch.arange(dim // 2).double() / (dim // 2)), neighbours=False, ups=lambda: ups,
    )  # fmt: skip
    columns, bytes_ = -(-context // form.tokens), form.nbytes
    packed, memory = [], []
    for _ in range(layers):
        memory.append(torch.randn(heads * columns, bytes_ // 2, device=DEVICE).to(form.work))
        at = torch.randperm(heads * columns, device=DEVICE) * bytes_
        packed.append(Packed(((memory[-1].data_ptr() + at) >> 4).view(heads, columns), form))
    window = torch.randn(2, heads, 2, 32, dim, device=DEVICE, dtype=torch.bfloat16)
    at = torch.arange(heads * 2, device=DEVICE).view(heads, 2) * (32 * dim * 2)
    exact = Exact(torch.stack([(x.data_ptr() + at) >> 4 for x in window], 2), torch.bfloat16)
    spans = torch.zeros(heads, SPAN, dtype=torch.int32)
    spans[:, 1], spans[:, 4] = context, 50
    programs = programs_for(heads, DEVICE, form, query)
    starts = torch.from_numpy(starts_of(pages_of(spans.numpy(), form.tokens, team), programs)).to(DEVICE)
    spans = spans.to(DEVICE)
    queries = torch.randn(heads, query, dim, device=DEVICE, dtype=torch.bfloat16)
    out = torch.empty(min(programs[0], columns * heads // team), team * query, dim, device=DEVICE)
    lse = torch.empty(len(out), team * query, device=DEVICE)

    def run() -> None:
        for one in packed:
            if whole:
                decode(queries, 0.1, spans, one, exact, starts=starts, programs=programs)
            else:
                kernel.attend(form, one, queries, 0.1, spans, starts[0], out, lse, early=True)

    graph = captured(run, 1)
    times = []
    for _ in range(15):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) / layers * 1e3)
    return sorted(times)[len(times) // 2]


def product(tokens: int, features: int, channels: int, dtype: torch.dtype) -> dict[str, Any]:
    """What torch's product takes that makes the keys of `cskv()` or `kv_heads()` of a layer again."""
    x = torch.randn(tokens, features, device=DEVICE, dtype=dtype)
    up, out = torch.randn(features, channels, device=DEVICE, dtype=dtype), x.new_empty(tokens, channels)
    times = []
    for _ in range(18):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        torch.mm(x, up, out=out)
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3)
    took = sorted(times[3:])[7]
    rate = 2 * tokens * features * channels / took / 1e6
    return {"product": [tokens, features, channels], "us": took, "tflop_s": rate}


def step(model: Any, name: str, context: int, steps: int) -> dict[str, Any]:
    """A row: a step of a recipe as a graph, of a cache of transformers' launch by launch."""
    row: dict[str, Any] = {"recipe": name, "context": context}
    start = time.perf_counter()
    try:
        row |= bench._steps(model, name, context, 1, steps, name != bench.BASELINE)
        print(f"  {name} @ {context}: {row['ms']:.2f} ms (mean {row['mean_ms']:.2f}), "
              f"{row['cache_bytes'] / 1e6:.0f} MB, {row.get('no_graph', '')} [{time.perf_counter() - start:.0f} s]",
              flush=True)  # fmt: skip
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:300]
        print(f"  {name} @ {context}: {row['error']}", flush=True)
        traceback.print_exc(limit=-2)
    gc.collect()
    torch.cuda.empty_cache()
    return row


def agreement(recipe: str) -> None:
    """How far steps by kernels are from those by the reference, of a small model of random weights."""
    model = bench.build({**bench.SHAPES["small"], "num_hidden_layers": 4}, DEVICE)
    written, outs = bench.for_random_weights(Recipe.parse(recipe), model.config), []
    ids = torch.randint(1, 1000, (1, 700), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for path in ("reference", "auto"):
        os.environ["FIVEFOLD_KERNELS"] = path
        cache = fivefold.compress(model, written, cuda_graph=path == "auto")
        with torch.inference_mode():
            model(ids[:, :660], past_key_values=cache)
            outs.append(torch.cat([model(x, past_key_values=cache).logits for x in ids[:, 660:].split(1, 1)], 1))
    error = (outs[0] - outs[1]).float().norm() / outs[0].float().norm()
    print(f"  {recipe}: {error:.1e} from the reference, {cache.step.failed or 'as a graph'}", flush=True)


def write(out: Path | None, rows: list[dict[str, Any]]) -> None:
    """After each row, so that a run that is broken off leaves what it has."""
    if out is not None:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        text = {"device": torch.cuda.get_device_name(), "versions": versions, "rows": rows}
        out.write_text(json.dumps(text, indent=2) + "\n")


def main(
    out: Path | None = None,
    kernels: bool = False,
    small: Annotated[str, typer.Option(help="recipes, separated by ;")] = ";".join(SMALL),
    large: str = ";".join(LARGE),
    contexts: str = "32768,131072",
    steps: int = 12,
    seconds: float = 1e9,
) -> None:
    begin, rows = time.perf_counter(), []
    print(torch.cuda.get_device_name(), torch.__version__, transformers.__version__, flush=True)
    for recipe in small.split(";")[1:]:
        try:
            agreement(recipe)
        except Exception:
            traceback.print_exc(limit=-3)
    if small:
        from fivefold.models import embedded

        embedded.fetch()
        model = embedded.load(torch.bfloat16)[0].to(DEVICE)
        for name in (bench.BASELINE, *small.split(";")):
            if time.perf_counter() - begin < seconds:
                rows.append({"shape": "SmolLM2-135M", **step(model, name, 7000, 40)})
                write(out, rows)
    if large:
        model = bench.build("llama-3-8b", DEVICE)
        for context in map(int, contexts.split(",")):
            for name in large.split(";"):
                if time.perf_counter() - begin < seconds:
                    rows.append({"shape": "llama-3-8b", **step(model, name, context, steps)})
                    write(out, rows)
    if kernels:
        for features, dtype in ((208, torch.float16), (512, torch.bfloat16)):
            rows.append(product(131072, features, 1024, dtype))
            print(f"  torch's product {rows[-1]}", flush=True)
        for name, shape in SHAPES.items():
            for context in map(int, contexts.split(",")):
                for how, more in {"": {}, "with window": {"whole": True}, "by Triton": {"path": "triton"}}.items():
                    if time.perf_counter() - begin < seconds:
                        took = alone(context, **shape, **more)
                        rows.append({"kernels": name, "context": context, "how": how, "us": took})
                        print(f"  kernels of {name} @ {context} {how}: {took:.1f} us a layer", flush=True)
                        write(out, rows)


if __name__ == "__main__":
    typer.run(main)
