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
from dataclasses import replace
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
        for sink, least in ((4, 100), (64, 256), (16, 64))
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


class Text:
    """A text whose continuation is fed token by token."""

    def __init__(self, model: Any, ids: torch.Tensor, number: int, of: int) -> None:
        first = number * ids.shape[1] // (2 * of)
        self.exact = Exact(model, ids[:, first : first + CONTEXT])
        self.fed = ids[:, first + CONTEXT : first + CONTEXT + FED]
        self.logs = continued(model, self.exact.cache, self.fed, FED)

    def measure(self, recipe: str) -> dict[str, float]:
        cache = self.exact.with_recipe(recipe)
        mine = continued(self.exact.model, cache, self.fed, 1)
        report, same = cache.report(), self.logs.argmax(-1) == mine.argmax(-1)
        figures = {"kl": divergence(self.logs, mine), "top1": float(same.float().mean())}
        return {**figures, "kept_tokens": report.kept_tokens, "ratio": report.ratio}


class Passkey:
    """A text with a number in it that is asked for afterwards."""

    def __init__(self, model: Any, tokenizer: Any, number: int) -> None:
        sample = tasks()["passkey"]().make(tokenizer, CONTEXT, random.Random(number))
        (question,) = sample.questions
        asked, answer = (
            tokenizer(x, add_special_tokens=False).input_ids for x in (question.text, f" {question.answer}")
        )
        self.tokenizer, self.answer, self.tokens = tokenizer, question.answer, len(answer)
        self.asked, self.right = torch.tensor([asked]), torch.tensor([asked + answer[:-1]])
        self.exact = Exact(model, torch.tensor([sample.prefix]))
        self.logs = self._answered(self.exact.cache)

    def _answered(self, cache: Any) -> torch.Tensor:
        """Log-probabilities of the tokens of the right answer."""
        return continued(self.exact.model, cache, self.right, self.right.shape[1])[-self.tokens :]

    def measure(self, recipe: str) -> dict[str, float]:
        cache = self.exact.with_recipe(recipe)
        kl = divergence(self.logs, self._answered(cache.fork()))
        token, said = self.asked, []
        for _ in range(ANSWER):
            token = self.exact.model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
            said.append(int(token))
        return {"answer_kl": kl, "passkeys": holds(self.tokenizer.decode(said), self.answer)}


def whole(model: Any, recipe: str) -> int:
    """How many KV heads hold the whole text."""
    spec = next(iter(fivefold.compress(model, "full()").session.stores.values())).spec
    parsed = Recipe.parse(recipe)
    each = [parsed.extents(replace(spec, layer=layer)) for layer in range(spec.layers)]
    return sum(extent.recent is None for extents in each for extent in extents)


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
    with torch.inference_mode():
        texts = [Text(model, ids, number, options.texts) for number in range(options.texts)]
        asked = [Passkey(model, tokenizer, number) for number in range(options.passkeys)]
        for recipe in recipes:
            figures: dict[str, list[float]] = {}
            for one in (*texts, *asked):
                for name, figure in one.measure(recipe).items():
                    figures.setdefault(name, []).append(figure)
            mean = {name: sum(x) / len(x) for name, x in figures.items()}
            passkeys = sum(figures.get("passkeys", []))
            counts = {
                "passkeys": passkeys,
                "asked": len(asked),
                "texts": len(texts),
                "whole_kv_heads": whole(model, recipe),
            }
            known.append({"recipe": recipe, **mean, **counts})
            out = {
                "torch": torch.__version__,
                "model": "SmolLM2-135M-Instruct float32",
                "context": CONTEXT,
                "runs": known,
            }
            if options.json:
                options.json.write_text(json.dumps(out, indent=1) + "\n")
    print("| recipe | text KL | top-1 | answer's KL | passkeys | tokens kept |\n|---|---|---|---|---|---|")
    for run in known:
        print(
            f"| `{run['recipe']}` | {run['kl']:.4f} | {run['top1']:.0%} | {run.get('answer_kl', 0):.4f} | "
            f"{run['passkeys']:.0f}/{run['asked']} | {run['kept_tokens']:.0%} |"
        )


if __name__ == "__main__":
    main()
