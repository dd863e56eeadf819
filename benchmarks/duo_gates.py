"""DuoAttention's trained gates beside the shipped scores (echo + induction) and random heads, on the embedded model.

    python benchmarks/duo_gates.py --json benchmarks/results/duo_gates_cpu.json

Of texts of `--context` tokens that are read with the cache: the KL of the next-token distributions from the exact
cache's over the 128 tokens that follow, fed 32 at a time (the mean of three texts), and how many of ten passkeys are
found. Of a text of `--long` tokens: how many of the demo's three facts. `--heads` measures other profiles. A row that
is in the file already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.calibrate.profile import load_profile, signature
from fivefold.evaluate.demo import make_task
from fivefold.evaluate.fidelity import continued
from fivefold.evaluate.score import answer, twin
from fivefold.evaluate.tasks.base import Question, Sample
from fivefold.evaluate.tasks.passkey import Passkey
from fivefold.models import embedded

TEXTS, FOLLOWING, PASSKEYS, SEED = 3, 128, 10, 0


class Bench:
    def __init__(self, context: int, long: int) -> None:
        self.model, self.tokenizer = embedded.load()
        self.context, self.long = context, long
        self.exact: list[torch.Tensor] = []

    def read(self, recipe: str, prefix: torch.Tensor) -> Any:
        cache = fivefold.compress(self.model, recipe)
        with torch.inference_mode():
            self.model(prefix, past_key_values=cache, logits_to_keep=1)
        return cache

    def found(self, recipe: str, sample: Sample) -> int:
        cache = self.read(recipe, torch.tensor([sample.prefix]))
        asked = sample.questions
        return sum(bool(answer(self.model, self.tokenizer, cache, one, "generate").right) for one in asked)

    def short(self, recipe: str) -> dict[str, Any]:
        """KL, top-1 agreement and passkeys; of "full()", which comes first, what the others are compared with."""
        kl, same = [], []
        for seed in range(TEXTS):
            task = make_task(self.tokenizer, self.context, seed, FOLLOWING)
            cache = self.read(recipe, task.prefix)
            with torch.inference_mode():
                logs = continued(self.model, twin(cache), task.continuation)
            if len(self.exact) <= seed:
                self.exact.append(logs)
            exact = self.exact[seed]
            kl.append(float((exact.exp() * (exact - logs)).sum(-1).clamp_min(0).mean()))
            same.append(float((exact.argmax(-1) == logs.argmax(-1)).float().mean()))
        passkeys = [Passkey().make(self.tokenizer, self.context, random.Random(f"{SEED} {n}")) for n in range(PASSKEYS)]
        right = sum(self.found(recipe, sample) for sample in passkeys)
        return {"kl": sum(kl) / TEXTS, "kls": kl, "top1": sum(same) / TEXTS, "passkeys": right, "of": PASSKEYS}

    def far(self, recipe: str) -> dict[str, Any]:
        task = make_task(self.tokenizer, self.long, SEED)
        facts = Sample(task.prefix[0].tolist(), tuple(Question(fact.question, fact.answer) for fact in task.facts))
        return {"facts": self.found(recipe, facts), "of_facts": len(facts.questions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--long", type=int, default=7000, help="0 to leave it out")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.3, 0.15, 0.08])
    parser.add_argument(
        "--heads", nargs="+", metavar="NAME=PROFILE", help="instead of those that ship, and random ones"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args.context, args.long)
    shape = signature(bench.model.config)
    given = args.heads or [f"gates=duo-gates-{shape}", f"shipped=duo-{shape}", "random="]
    profiles = dict(one.split("=", 1) for one in given)
    scores = {
        name: load_profile(where, "duo", shape).tensors["scores"]
        if where
        else torch.rand((bench.model.config.num_hidden_layers, bench.model.config.num_key_value_heads),
                        generator=torch.Generator().manual_seed(SEED))
        for name, where in profiles.items()
    }  # fmt: skip
    out: dict[str, Any] = {"model": shape, "dtype": "float32", "context": args.context, "long": args.long, "rows": []}
    if args.json and args.json.is_file():
        out["rows"] = json.loads(args.json.read_text())["rows"]

    def best(name: str, keep: float) -> set[int]:
        order = scores[name].flatten().argsort(descending=True, stable=True).tolist()
        return set(order[: round(keep * len(order))])

    out["overlap"] = {
        f"{one}, {two}, {keep}": len(best(one, keep) & best(two, keep))
        for n, one in enumerate(scores) for two in list(scores)[n + 1 :] for keep in args.keep
    }  # fmt: skip

    def row(kind: str, name: str, keep: float | None, beside: str = "") -> None:
        key = {"kind": kind, "heads": name, "keep": keep, "beside": beside}
        if any(all(one[part] == value for part, value in key.items()) for one in out["rows"]) and name != "full":
            return
        heads = sorted(divmod(i, scores[name].shape[1]) for i in best(name, keep)) if keep is not None else []
        recipe = f"duo(retrieval={[list(pair) for pair in heads]}){beside}" if keep is not None else "full()"
        measured = bench.short(recipe) if kind == "short" else bench.far(recipe)
        out["rows"] = [one for one in out["rows"] if any(one[part] != value for part, value in key.items())]
        out["rows"].append({**key, **measured})
        print(*key.values(), {name: value for name, value in measured.items() if name != "kls"}, flush=True)
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")

    row("short", "full", None)
    for keep in args.keep:
        for name in scores:
            row("short", name, keep)
    if args.long:
        for beside in ("", " + kivi(bits=4)"):
            for name in [name for name, where in profiles.items() if where]:
                row("long", name, 0.15, beside)


if __name__ == "__main__":
    main()
