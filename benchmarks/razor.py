"""RazorAttention with small windows, with and without the compensation token: the table of docs/methods.md.

    python benchmarks/razor.py --json benchmarks/results/razor_cpu.json

The embedded model in float32, 1,024 tokens each: three texts of Python's language reference, whose next 128 tokens are
fed one by one, and ten passkeys, each asked for afterwards. Figures are against the exact cache: KL divergence of the
next token (nats, the mean over the tokens fed; of passkeys over the tokens of the right answer), the share of equal
most likely tokens, and passkeys that greedy decoding finds. As `razor` compresses a prompt after it was read, what
`full()` holds of a prompt is put into each of its caches; other methods read the prompt themselves. Recipes that are in
the file already are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold import Recipe
from fivefold.evaluate.demo import document
from fivefold.evaluate.fidelity import continued
from fivefold.evaluate.tasks import holds, tasks
from fivefold.models import embedded
from fivefold.store.layer_cache import LayerCache

CONTEXT, FED, TEXTS, PASSKEYS, ANSWER = 1024, 128, 3, 10, 8
RECIPES = (
    *(
        f"razor(sink={sink}, least={least}, share=0{plain})"
        for sink, least in ((64, 256), (4, 100), (16, 64))
        for plain in ("", ", compensate=False")
    ),
    "razor(sink=64, least=256, share=0) + kivi(bits=4)",
    "duo(keep=0.256, sink=64, recent=256)",
)


class Exact:
    """What the model says with a whole cache after some `prefix`, and what it holds of it then."""

    def __init__(self, model: Any, prefix: torch.Tensor) -> None:
        self.model, self.prefix = model, prefix
        self.cache = fivefold.compress(model, "full()")
        model(prefix, past_key_values=self.cache, logits_to_keep=1)
        stores = self.cache.session.stores
        self.held = {index: [x.clone() for x in store.groups[0].dense()] for index, store in stores.items()}

    def with_recipe(self, recipe: str) -> Any:
        """A cache that has read the prefix."""
        cache = fivefold.compress(self.model, recipe)
        if not recipe.startswith("razor"):
            self.model(self.prefix, past_key_values=cache, logits_to_keep=1)
            return cache

        def write(store: LayerCache) -> None:
            keys, values = self.held[store.spec.layer]
            for group, _ in store.split_by(store.lengths() * 0 + self.prefix.shape[1]):
                store.append(group, keys[group.rows_tensor], values[group.rows_tensor])

        cache.session.put(1, self.prefix.shape[1], write)
        return cache


def divergence(exact: torch.Tensor, logs: torch.Tensor) -> float:
    return float((exact.exp() * (exact - logs)).sum(-1).clamp_min(0).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=list(RECIPES))
    parser.add_argument("--texts", type=int, default=TEXTS)
    parser.add_argument("--passkeys", type=int, default=PASSKEYS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    known: list[dict[str, Any]] = []
    if options.json and options.json.is_file():
        known = json.loads(options.json.read_text())["runs"]
    recipes = [recipe for recipe in options.recipe if recipe not in {run["recipe"] for run in known}]
    model, tokenizer = embedded.load()
    ids = tokenizer(document(), return_tensors="pt").input_ids
    found: dict[str, dict[str, list[float]]] = {recipe: {} for recipe in recipes}

    def add(recipe: str, **figures: float) -> None:
        for name, figure in figures.items():
            found[recipe].setdefault(name, []).append(figure)

    with torch.inference_mode():
        for number in range(options.texts):
            text = ids[:, (first := number * ids.shape[1] // (2 * options.texts)) : first + CONTEXT + FED]
            exact = Exact(model, text[:, :CONTEXT])
            logs = continued(model, exact.cache, text[:, CONTEXT:], 1)
            for recipe in recipes:
                cache = exact.with_recipe(recipe)
                mine = continued(model, cache, text[:, CONTEXT:], 1)
                report = cache.report()
                add(
                    recipe, kl=divergence(logs, mine), top1=float((logs.argmax(-1) == mine.argmax(-1)).float().mean()),
                    kept_tokens=report.kept_tokens, ratio=report.ratio,
                )  # fmt: skip
        for number in range(options.passkeys):
            sample = tasks()["passkey"]().make(tokenizer, CONTEXT, random.Random(number))
            (question,) = sample.questions
            asked = tokenizer(question.text, add_special_tokens=False).input_ids
            answer = tokenizer(f" {question.answer}", add_special_tokens=False).input_ids
            exact = Exact(model, torch.tensor([sample.prefix]))
            right = torch.tensor([asked + answer[:-1]])
            logs = continued(model, exact.cache, right, right.shape[1])[-len(answer) :]
            for recipe in recipes:
                cache = exact.with_recipe(recipe)
                mine = continued(model, cache.fork(), right, right.shape[1])[-len(answer) :]
                token, said = torch.tensor([asked]), []
                for _ in range(ANSWER):
                    token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
                    said.append(int(token))
                add(recipe, answer_kl=divergence(logs, mine), passkeys=holds(tokenizer.decode(said), question.answer))
    spec = next(iter(fivefold.compress(model, "full()").session.stores.values())).spec
    for recipe, figures in found.items():
        mean = {name: sum(x) / len(x) for name, x in figures.items() if x}
        whole = sum(e.recent is None for layer in range(spec.layers) for e in extents(recipe, spec, layer))
        known.append({
            "recipe": recipe, "whole_kv_heads": whole, **mean, "passkeys": sum(figures.get("passkeys", [])),
            "asked": options.passkeys, "texts": options.texts,
        })  # fmt: skip
    out = {"torch": torch.__version__, "model": "SmolLM2-135M-Instruct float32", "context": CONTEXT, "runs": known}
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    print("| recipe | text KL | top-1 | answer's KL | passkeys | tokens kept |\n|---|---|---|---|---|---|")
    for run in known:
        print(
            f"| `{run['recipe']}` | {run['kl']:.4f} | {run['top1']:.0%} | {run['answer_kl']:.4f} | "
            f"{run['passkeys']:.0f}/{run['asked']} | {run['kept_tokens']:.0%} |"
        )


def extents(recipe: str, spec: Any, layer: int) -> Any:
    from dataclasses import replace

    return Recipe.parse(recipe).extents(replace(spec, layer=layer))


if __name__ == "__main__":
    main()
