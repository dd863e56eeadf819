"""What merging adjacent layers costs on the embedded model, beside windows on the same layers: for docs/methods.md.

    python benchmarks/minicache.py --json benchmarks/results/minicache_cpu.json

Each text is read exactly (Python's language reference, three facts planted in it), merged and continued: KL is the
mean over the 128 following tokens, in nats, between the next-token distributions of the exact cache and of this one.
Each fact is asked for from a fork. Cosines are those of the profile that ships for the model. In float32. A run that
was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.calibrate import load_profile, signature
from fivefold.evaluate.demo import Task, make_task
from fivefold.models import embedded

CONTINUATION, ANSWER = 128, 12
PAIRS = [(layer, layer + 1) for layer in range(15, 29, 2)]


def windows(layers: list[int], model: Any) -> str:
    """`duo` with every head of these layers streaming, 64 sinks and 256 recent tokens."""
    heads = range(model.config.num_key_value_heads)
    kept = [[layer, head] for layer in range(model.config.num_hidden_layers) if layer not in layers for head in heads]
    return f"duo(retrieval={kept}, sink=64, recent=256)"


def measure(model: Any, tokenizer: Any, task: Task, recipe: str, exact: torch.Tensor | None, facts: bool) -> Any:
    """One recipe on one text, and its log-probabilities `[CONTINUATION, vocabulary]`."""
    cache, start = fivefold.compress(model, recipe), time.perf_counter()
    last = model(task.prefix, past_key_values=cache, logits_to_keep=1).logits[0]
    seconds, report = time.perf_counter() - start, cache.report()
    rest = model(task.continuation[:, :-1], past_key_values=cache.fork()).logits[0]
    logits = torch.cat([last, rest]).log_softmax(-1)
    exact = logits if exact is None else exact
    row = {
        "bytes": report.total, "ratio": report.ratio, "prefill_s": seconds, "process": report.process,
        "kl": float((exact.exp() * (exact - logits)).sum(-1).mean()),
        "agreement": float((exact.argmax(-1) == logits.argmax(-1)).float().mean()),
    }  # fmt: skip
    if facts:
        row["facts"] = sum(
            fact.answer in said(model, tokenizer, cache.fork(), question)
            for fact, question in zip(task.facts, task.questions)
        )
    return row, logits


def said(model: Any, tokenizer: Any, cache: Any, question: torch.Tensor) -> str:
    tokens, out = question, []
    for _ in range(ANSWER):
        out.append(int(model(tokens, past_key_values=cache, logits_to_keep=1).logits[0, -1].argmax()))
        tokens = torch.tensor([out[-1:]])
    return str(tokenizer.decode(out))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--texts", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path, default=Path.home() / ".cache/fivefold/minicache.jsonl")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # that these layers are not alike is what is measured
    options.store.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer = embedded.load()
    second, both = [b for _, b in PAIRS], sorted({layer for pair in PAIRS for layer in pair})
    recipes = {
        "full()": "full()",
        "minicache()": "minicache()",
        "minicache() + kivi(bits=4)": "minicache() + kivi(bits=4)",
        "kivi(bits=4)": "kivi(bits=4)",
        "windows on the second layers of the 7 pairs": windows(second, model),
        "windows on all 14 layers": windows(both, model),
        **{f"minicache(pairs=[[{a}, {a + 1}]])": f"minicache(pairs=[[{a}, {a + 1}]])" for a in (15, 21, 27, 28)},
        "windows on layer 29": windows([29], model),
    }
    done: dict[str, Any] = {}  # by text and recipe
    if options.store.is_file():
        done = {line["key"]: line for line in map(json.loads, options.store.read_text().splitlines())}
    with torch.inference_mode(), options.store.open("a") as store:
        for seed in range(options.texts):
            task, exact = make_task(tokenizer, options.context, seed, CONTINUATION), None
            for name, recipe in recipes.items():
                key = f"{fivefold.__version__} {options.context} {seed} {recipe}"
                if key in done:
                    continue
                if exact is None and recipe != "full()":
                    exact = measure(model, tokenizer, task, "full()", None, False)[1]
                row, logits = measure(model, tokenizer, task, recipe, exact, "pairs=" not in name)
                exact = logits if exact is None else exact
                done[key] = {"key": key, "row": row}
                store.write(json.dumps(done[key]) + "\n")
                store.flush()
                print(seed, name, {name: round(value, 4) for name, value in row.items()}, flush=True)
    rows = {
        name: [
            done[f"{fivefold.__version__} {options.context} {seed} {recipe}"]["row"] for seed in range(options.texts)
        ]
        for name, recipe in recipes.items()
    }
    profile = load_profile(f"minicache-{signature(model.config)}", "minicache", signature(model.config))
    cosines = {name: [round(float(x), 4) for x in tensor] for name, tensor in profile.tensors.items()}
    out = {
        "model": "SmolLM2-135M-Instruct", "dtype": "float32", "context": options.context, "texts": options.texts,
        "torch": torch.__version__, "transformers": version("transformers"), "fivefold": fivefold.__version__,
        "cosines": {"pairs": profile.settings["pairs"], **cosines},
        "rows": [{"name": name, "recipe": recipes[name], "texts": found} for name, found in rows.items()],
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    table(out)


def table(out: dict[str, Any]) -> None:
    """As in docs/methods.md."""
    print("| recipe | x exact | KL | top-1 | facts |\n|---|---|---|---|---|")
    for row in out["rows"]:
        texts = row["texts"]
        means = {key: sum(x[key] for x in texts) / len(texts) for key in ("ratio", "kl", "agreement")}
        facts = f"{sum(x['facts'] for x in texts)}/{3 * len(texts)}" if "facts" in texts[0] else ""
        name = f"`{row['name']}`" if "(" in row["name"] else row["name"]
        print(f"| {name} | {means['ratio']:.3f} | {abs(means['kl']):.4f} | {means['agreement']:.0%} | {facts} |")


if __name__ == "__main__":
    main()
