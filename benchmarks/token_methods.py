"""Methods that choose tokens, beside a random choice and a plain window of the same size: the table of docs/methods.md.

python benchmarks/token_methods.py --json benchmarks/results/token_methods.json

Every method reads the text once, gives up tokens, and is then asked: it does not know the question when it chooses. A
run that was broken off goes on where it stopped. With `--aware` the question is a part of the prompt, as in the papers'
own measurements, so that methods choose with it in sight; then only the passkey is asked for.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.evaluate import engine
from fivefold.evaluate.tasks import holds, tasks
from fivefold.models import embedded

SUITES = ("passkey", "multi_needle")
METHODS = ("h2o", "snapkv", "keyformer", "d2o", "elastic", "random", "streaming")


def recipe(method: str, keep: float, context: int) -> str:
    """The window of `streaming` is as long as what the others hold of the text."""
    if method == "streaming":
        return f"streaming(sink=4, recent={round(keep * context) - 4})"
    if method.endswith(")"):  # with parameters: "d2o(merging=False)"
        return f"{method[:-1]}, keep={keep})"
    return f"{method}(keep={keep})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 3, 2], help="texts, for each context")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.2])
    parser.add_argument("--method", nargs="+", default=list(METHODS))
    parser.add_argument("--aware", action="store_true", help="the question is a part of the prompt")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path, default=Path.home() / ".cache/fivefold/token_methods.jsonl")
    options = parser.parse_args()
    model, tokenizer = embedded.load()
    out: dict[str, Any] = {"torch": torch.__version__, "runs": []}
    for context, samples in zip(options.context, options.samples, strict=True):
        names = {recipe(method, keep, context): (method, keep) for keep in options.keep for method in options.method}
        if options.aware:
            out["runs"] += aware(model, tokenizer, names, context, samples)
            continue
        plan = engine.Plan(recipes=tuple(names), suites=SUITES, contexts=(context,), samples=samples)
        result = engine.run(
            model,
            tokenizer,
            plan,
            options.store,
            lambda done, total, what: print(f"\r{done}/{total} {what:60.60}", end="", file=sys.stderr, flush=True),
        )
        print(file=sys.stderr)
        for cell in result["cells"]:
            method, keep = names.get(cell["recipe"], (cell["recipe"], 1.0))
            out["runs"].append({"method": method, "keep": keep, **{k: cell[k] for k in cell if k != "failures"}})
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    table(out["runs"])


def aware(
    model: Any, tokenizer: Any, names: dict[str, tuple[str, float]], context: int, samples: int
) -> list[dict[str, Any]]:
    """Passkeys found by each recipe where text and question are one prompt."""
    task = tasks()["passkey"]()
    out = []
    for name, (method, keep) in {"full()": ("full", 1.0), **names}.items():
        right, ratio = 0, 0.0
        for seed in range(samples):
            sample = task.make(tokenizer, context, random.Random(f"aware {seed}"))
            question = sample.questions[0]
            asked = tokenizer(question.text, add_special_tokens=False).input_ids
            tokens = torch.tensor([[*sample.prefix, *asked]])
            cache = fivefold.compress(model, name)
            said: list[int] = []
            with torch.inference_mode():
                for _ in range(8):
                    tokens = (
                        model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
                    )
                    ratio = ratio or cache.report().ratio
                    said.append(int(tokens))
            right += holds(tokenizer.decode(said), question.answer)
        print(f"{context} {name}: {right} of {samples}", file=sys.stderr)
        out.append(
            {
                "method": method, "keep": keep, "suite": "passkey, asked in the prompt", "context": context,
                "score": right / samples, "samples": samples, "ratio": ratio,
            }
        )  # fmt: skip
    return out


def table(runs: list[dict[str, Any]]) -> None:
    places = list(dict.fromkeys((r["suite"], r["context"]) for r in runs))
    print("| method | keep | " + " | ".join(f"{suite} {context // 1024}k" for suite, context in places) + " | bytes |")
    print("|---|---|" + "---|" * (len(places) + 1))
    for method, keep in dict.fromkeys((r["method"], r["keep"]) for r in runs):
        mine = {(r["suite"], r["context"]): r for r in runs if (r["method"], r["keep"]) == (method, keep)}
        scores = [f"{mine[place]['score']:.2f}" if place in mine else "–" for place in places]
        largest = mine[max(mine, key=lambda place: place[1])]
        print(f"| `{method}` | {keep} | " + " | ".join(scores) + f" | {largest['ratio']:.3f} |")


if __name__ == "__main__":
    main()
