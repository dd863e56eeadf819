"""What TidalDecode costs over how many tokens it reads: KL and top-1 agreement with the exact cache.

    python benchmarks/tidal_agreement.py --context 4096

The prefix is a real document; its own next tokens are fed one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

import fivefold
from fivefold.evaluate.demo import make_task
from fivefold.models import embedded
from fivefold.tables import Table

RECIPES = (
    *(f"tidal(top={top})" for top in (32, 64, 128, 256, 512, 1024)),
    "tidal(top=256) + kivi(bits=4)",
    "kivi(bits=4)",
)


def main(
    context: int = 4096,
    tokens: int = 256,
    recipe: Annotated[list[str] | None, typer.Option()] = None,
    out: Path | None = None,
) -> None:
    model, tokenizer = embedded.load()
    task = make_task(tokenizer, context, continuation=tokens)
    exact, rows = None, []
    with torch.inference_mode():
        for name in track(("full()", *(recipe or RECIPES))):
            cache = fivefold.compress(model, name)
            model(task.prefix, past_key_values=cache, logits_to_keep=1)
            steps = [
                model(t, past_key_values=cache).logits[0, -1].log_softmax(-1) for t in task.continuation.split(1, 1)
            ]
            logs = torch.stack(steps)
            exact = logs if exact is None else exact
            kl = float((exact.exp() * (exact - logs)).sum(-1).mean())
            agreement = float((exact.argmax(-1) == logs.argmax(-1)).float().mean())
            rows.append({"recipe": name, "kl": max(0.0, kl), "agreement": agreement})
    table = Table("recipe", ">KL", ">top-1 agreement", title=f"SmolLM2-135M, float32, {tokens} tokens after {context}")
    for row in rows:
        table.add_row(row["recipe"], f"{row['kl']:.4f}", f"{row['agreement']:.3f}")
    Console().print(table, crop=False)
    if out is not None:
        out.write_text(json.dumps({"context": context, "tokens": tokens, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
