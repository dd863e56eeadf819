"""Prefill and decode time of recipes against DynamicCache with SDPA, in one run, on the embedded model.

Decode steps of all caches are taken in turn, so that a change in the machine's speed meets all of them alike; the
figures are medians, and ratios to DynamicCache; "attention" is the part of a step in which the cache stores, attends
and moves tokens, as a ratio to that of full(). `--large` takes a random model of 8 layers instead, with 32 query heads
and 8 kv heads of 128.

    python benchmarks/decode_cpu.py --context 4096 --steps 64 --out benchmarks/results/decode_cpu.json
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track

import fivefold
from fivefold.engine.session import Session
from fivefold.evaluate.demo import BASELINE, make_task
from fivefold.models import attention as functions
from fivefold.models import embedded, huggingface
from fivefold.tables import Table

RECIPES = (
    "full()",
    "kivi(bits=8)",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "streaming()",
    "duo(keep=0.34)",
    "duo(keep=0.34) + kivi(bits=4)",
)


def main(
    context: int = 4096,
    steps: int = 64,
    recipe: Annotated[list[str] | None, typer.Option()] = None,
    dtype: str = "float32",
    large: bool = False,
    out: Path | None = None,
) -> None:
    names = [BASELINE, *(recipe or RECIPES)]
    embedded.fetch()
    model, tokenizer = embedded.load(getattr(torch, dtype))
    task = make_task(tokenizer, context)
    if large:
        model = random_model(getattr(torch, dtype), model.config.vocab_size)
    attention = 0.0

    def timed(call: Any) -> Any:
        def run(*args: Any) -> Any:
            nonlocal attention
            begin = time.perf_counter()
            result = call(*args)
            attention += time.perf_counter() - begin
            return result

        return run

    functions.attend = timed(functions.attend)
    Session.commit = timed(Session.commit)  # type: ignore[method-assign]
    caches, prefill = {}, {}
    times: dict[str, list[float]] = {name: [] for name in names}
    parts: dict[str, list[float]] = {name: [] for name in names}

    def select(name: str) -> None:
        if name == BASELINE:
            fivefold.restore(model)
        else:
            huggingface.prepare(model, caches[name].absent if name in caches else ())

    with torch.inference_mode():
        model(task.prefix[:, :256])  # the first call pages the weights in
        for name in track(names, "prefill"):
            select(name)
            new = transformers.DynamicCache(config=model.config) if name == BASELINE else fivefold.compress(model, name)
            start = time.perf_counter()
            model(task.prefix, past_key_values=new, logits_to_keep=1)
            prefill[name], caches[name] = time.perf_counter() - start, new
        for step in track(range(steps), "decode"):
            token = task.continuation[:, step % task.continuation.shape[1]].view(1, 1)
            for name in names:
                select(name)
                start, attention = time.perf_counter(), 0.0
                model(token, past_key_values=caches[name])
                times[name].append(time.perf_counter() - start)
                parts[name].append(attention)
    rows = []
    for name in names:
        rows.append(
            {
                "recipe": name,
                "ratio": 1.0 if name == BASELINE else caches[name].report().ratio,
                "prefill_x": prefill[name] / prefill[BASELINE],
                "decode_x": statistics.median(times[name]) / statistics.median(times[BASELINE]),
                "attention_ms": statistics.median(parts[name]) * 1e3,
                "prefill_s": prefill[name],
                "decode_ms": statistics.median(times[name]) * 1e3,
            }
        )
    name = "random model, 8 layers, 32 x 8 heads of 128" if large else "SmolLM2-135M"
    whole = next((row["attention_ms"] for row in rows if row["recipe"] == "full()"), None)
    table = Table(
        "recipe",
        ">bytes x",
        ">prefill x",
        ">decode x",
        ">attention x full()",
        ">decode ms",
        title=f"{name}, {dtype}, {context} tokens, {steps} decode steps taken in turn",
    )
    for row in rows:
        table.add_row(
            row["recipe"], f"{row['ratio']:.3f}", f"{row['prefill_x']:.2f}", f"{row['decode_x']:.2f}",
            f"{row['attention_ms'] / whole:.2f}" if whole and row["attention_ms"] else "",
            f"{row['decode_ms']:.1f}",
        )  # fmt: skip
    Console().print(table, crop=False)
    if out is not None:
        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "fivefold": fivefold.__version__,
        }
        machine = {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        text = {
            "model": name,
            "context": context,
            "steps": steps,
            "dtype": dtype,
            "versions": versions,
            "machine": machine,
            "rows": rows,
        }
        out.write_text(json.dumps(text, indent=2) + "\n")


def random_model(dtype: torch.dtype, vocabulary: int) -> Any:
    """Wide heads and little else: for the speed of the cache, not for what it says."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


if __name__ == "__main__":
    typer.run(main)
