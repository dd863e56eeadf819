"""What leaving attention modules out costs on the embedded model, beside windows on the same layers: the table of
docs/methods.md.

    python benchmarks/drop_quality.py benchmarks/results/drop_quality_cpu.json

KL divergence (nats, mean over tokens) of the next-token distributions from those of the exact cache, and how often the
most likely token is the same: over 128 tokens, a chunk, that follow 1,024 tokens of Python's language reference, three
texts from its first half (calibration reads none of that), float32. Passkeys: found of so many, in texts of 384 tokens.
Each row is written as soon as it is measured, and what the file holds already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fivefold
from fivefold.benchmark import machine
from fivefold.evaluate.demo import document
from fivefold.evaluate.score import generate
from fivefold.evaluate.tasks import holds, tasks
from fivefold.models import embedded
from fivefold.models.huggingface import make_cache
from fivefold.recipe import Recipe
from fivefold.tables import Table

COUNTS = (1, 2, 4, 8, 15)
CONTEXT, FOLLOWING, TEXTS = 1024, 128, 3
PASSKEY, ASKED = 384, 8
SINK, RECENT = 64, 256


def recipes(model: Any) -> dict[str, str]:
    """By name: modules left out, and windows on the same layers. Windows alone tell what is far away in them."""
    specs = [store.spec for store in make_cache(model, Recipe()).session.stores.values()]
    order = Recipe.parse("drop()").methods[0].order(specs)  # type: ignore[attr-defined]
    out = {"full()": "full()"}
    out |= {f"drop(layers={count})": f"drop(layers={count})" for count in COUNTS}
    for count in COUNTS:
        heads = [[s.layer, head] for s in specs if s.layer not in order[:count] for head in range(s.kv_heads)]
        out[f"windows {count}"] = f"duo(retrieval={heads}, sink={SINK}, recent={RECENT})"
    for name in ("kivi(bits=4)", "drop(layers=4) + kivi(bits=4)", "drop(layers=[25, 26, 7, 28])"):
        out[name] = name  # the last one: the order on the language reference itself
    return out


@torch.inference_mode()
def told(model: Any, recipe: str, ids: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The log-probabilities behind the last tokens, and the cache's bytes by those of the exact one."""
    cache = fivefold.compress(model, recipe)
    first = model(ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1).logits
    rest = model(ids[:, CONTEXT:], past_key_values=cache).logits
    ratio = cache.report().ratio
    cache.free()
    return torch.cat([first, rest[:, :-1]], 1)[0].float().log_softmax(-1), ratio


@torch.inference_mode()
def passkeys(model: Any, tokenizer: Any, recipe: str) -> int:
    """How many are found; the question is asked when the text has been read."""
    found, task = 0, tasks()["passkey"]()
    for seed in range(ASKED):
        sample = task.make(tokenizer, PASSKEY, random.Random(f"drop {seed}"))
        cache = fivefold.compress(model, recipe)
        model(torch.tensor([sample.prefix]), past_key_values=cache, logits_to_keep=1)
        (question,) = sample.questions
        found += holds(generate(model, tokenizer, cache, question.text), question.answer)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    model, tokenizer = embedded.load()
    ids = torch.tensor([tokenizer(document(), add_special_tokens=False).input_ids])
    starts = [number * ids.shape[1] // 2 // TEXTS for number in range(TEXTS)]
    texts = [ids[:, start : start + CONTEXT + FOLLOWING] for start in starts]
    kept = json.loads(given.out.read_text()) if given.out.is_file() else {"rows": []}
    rows: list[dict[str, Any]] = kept["rows"]
    exact: list[torch.Tensor] = []
    for name, recipe in recipes(model).items():
        if any(row["recipe"] == recipe for row in rows):
            continue
        exact = exact or [told(model, "full()", text)[0] for text in texts]
        kls, same, ratio = [], [], 0.0
        for text, wanted in zip(texts, exact):
            logs, ratio = told(model, recipe, text)
            kls.append(float((wanted.exp() * (wanted - logs)).sum(-1).mean()))
            same.append(float((wanted.argmax(-1) == logs.argmax(-1)).float().mean()))
        rows.append(
            {
                "name": name, "recipe": recipe, "kl": sum(kls) / TEXTS, "kl_by_text": kls, "top1": sum(same) / TEXTS,
                "passkeys": passkeys(model, tokenizer, recipe), "asked": ASKED, "ratio": ratio,
            }
        )  # fmt: skip
        print(rows[-1]["name"], rows[-1]["kl"], rows[-1]["passkeys"], flush=True)
        text = {"context": CONTEXT, "following": FOLLOWING, "texts": TEXTS, "passkey": PASSKEY, **machine.stamp()}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps({**text, "rows": rows}, indent=1) + "\n")
    table = Table("", ">KL", ">same token", ">passkeys", ">bytes x", title="SmolLM2-135M, float32")
    for row in rows:
        table.add_row(
            row["name"], f"{row['kl']:.4f}", f"{row['top1']:.3f}", f"{row['passkeys']}/{ASKED}", f"{row['ratio']:.3f}"
        )
    Console().print(table, crop=False)


if __name__ == "__main__":
    main()
