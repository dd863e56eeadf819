"""A conversation that comes back: loaded from disk, or from host memory, against reading its text again.

    python benchmarks/sessions.py benchmarks/results/sessions_cpu.json
    python benchmarks/sessions.py benchmarks/results/sessions_h100.json --model llama-3-8b

One sequence of `tokens` tokens of real text (random tokens for a shape with random weights) is read, in one piece, as
`model.generate` does. Then it is saved and loaded, and moved to host memory and back, in turns; the first turn is not
counted. What was loaded must predict the same next token, to the bit. All seconds are medians of `rounds`.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.benchmark import decode, machine
from fivefold.cli.models import load_model

RECIPES = ("kivi(bits=2)", "kivi(bits=4)", "full()")


def timed(device: torch.device, call: Callable[[], Any]) -> tuple[float, Any]:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


@torch.inference_mode()
def measure(model: Any, recipe: str, ids: torch.Tensor, rounds: int) -> dict[str, Any]:
    device, ask = model.device, ids[:, :1]
    times: dict[str, list[float]] = {key: [] for key in ("read", "save", "load", "offload", "restore")}
    for turn in range(rounds + 1):
        cache = fivefold.compress(model, recipe)
        taken = {}
        taken["read"], _ = timed(device, partial(model, ids, past_key_values=cache, logits_to_keep=1))
        held = cache.report()
        with tempfile.TemporaryDirectory() as folder:
            where = Path(folder) / "session"
            taken["save"], _ = timed(device, partial(cache.save, where))
            on_disk = sum(path.stat().st_size for path in where.rglob("*") if path.is_file())
            taken["load"], loaded = timed(device, partial(fivefold.load_cache, model, where))
            shutil.rmtree(where)
        taken["offload"], _ = timed(device, cache.offload)
        taken["restore"], _ = timed(device, cache.restore)
        wanted = model(ask, past_key_values=cache).logits
        assert torch.equal(model(ask, past_key_values=loaded).logits, wanted), "what was loaded is not what was saved"
        cache.free()
        loaded.free()
        if turn:
            for name, seconds in taken.items():
                times[name].append(seconds)
    row: dict[str, Any] = {f"{name}_s": statistics.median(found) for name, found in times.items()}
    row["read_over_save_and_load"] = row["read_s"] / (row["save_s"] + row["load_s"])
    row["read_over_load"] = row["read_s"] / row["load_s"]
    row["read_over_restore"] = row["read_s"] / row["restore_s"]
    return {"recipe": recipe, "tokens": ids.shape[1], "bytes": held.total - held.free, "disk_bytes": on_disk, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", choices=("embedded", *decode.SHAPES), default="embedded")
    parser.add_argument("--recipe", "-r", action="append", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--tokens", type=int, action="append", help="default: 4096")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    device = machine.device()
    if given.model == "embedded":
        model, tokenizer = load_model(None, "bfloat16" if device.type == "cuda" else "float32", "auto")
        text = tokenizer("\n".join(pydoc_data.topics.topics.values()), return_tensors="pt")["input_ids"]
    else:
        model = decode.build(given.model, device)
        text = torch.randint(model.config.vocab_size, (1, 1 << 17), generator=torch.Generator().manual_seed(0))
    rows = []
    for tokens in given.tokens or [4096]:
        for recipe in given.recipe or RECIPES:
            rows.append(measure(model, recipe, text[:, :tokens].to(model.device), given.rounds))
            print({key: value if isinstance(value, str) else round(value, 4) for key, value in rows[-1].items()})
            given.out.write_text(json.dumps({**machine.stamp(), "model": given.model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
