"""DuoAttention's trained gates beside the shipped scores (echo + induction) and random heads, on the embedded model.

    python benchmarks/duo_gates.py --json benchmarks/results/duo_gates_cpu.json

Of texts of `--context` tokens that are read with the cache: the KL of the next-token distributions from the exact
cache's over the 128 tokens that follow, fed 32 at a time (three texts), and how many of ten passkeys are found. Of a
text of `--long` tokens: how many of the demo's three facts. `--heads` measures other profiles. Every text and passkey
is kept when it is measured, and a run that was broken off goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fivefold
from fivefold.calibrate.profile import load_profile, signature
from fivefold.evaluate.demo import make_task
from fivefold.evaluate.fidelity import continued
from fivefold.evaluate.score import answer
from fivefold.evaluate.tasks.base import Question, Sample
from fivefold.evaluate.tasks.passkey import Passkey
from fivefold.models import embedded
from fivefold.tables import Table

TEXTS, FOLLOWING, PASSKEYS, SEED, LONG_KEEP = 3, 128, 10, 0, 0.15


class Bench:
    def __init__(self, context: int, long: int) -> None:
        self.model, self.tokenizer = embedded.load()
        self.context, self.long = context, long
        self.exact: dict[int, torch.Tensor] = {}

    def measure(self, kind: str, recipe: str, sample: int) -> dict[str, Any]:
        if kind == "text":
            logs = self.logs(recipe, sample)
            if sample not in self.exact:
                self.exact[sample] = self.logs("full()", sample)
            exact = self.exact[sample]
            kl = (exact.exp() * (exact - logs)).sum(-1).clamp_min(0).mean()
            return {"kl": float(kl), "top1": float((exact.argmax(-1) == logs.argmax(-1)).float().mean())}
        if kind == "passkey":
            return self.found(recipe, Passkey().make(self.tokenizer, self.context, random.Random(f"{SEED} {sample}")))
        task = make_task(self.tokenizer, self.long, sample)
        questions = tuple(Question(fact.question, fact.answer) for fact in task.facts)
        return self.found(recipe, Sample(task.prefix[0].tolist(), questions))

    def logs(self, recipe: str, seed: int) -> torch.Tensor:
        task = make_task(self.tokenizer, self.context, seed, FOLLOWING)
        with torch.inference_mode():
            return continued(self.model, self.read(recipe, task.prefix), task.continuation)

    def read(self, recipe: str, prefix: torch.Tensor) -> Any:
        cache = fivefold.compress(self.model, recipe)
        with torch.inference_mode():
            self.model(prefix, past_key_values=cache, logits_to_keep=1)
        return cache

    def found(self, recipe: str, sample: Sample) -> dict[str, Any]:
        held = self.read(recipe, torch.tensor([sample.prefix]))
        said = [answer(self.model, self.tokenizer, held, question, "generate") for question in sample.questions]
        return {"right": sum(bool(one.right) for one in said), "of": len(said)}


def pieces(heads: list[str], keeps: list[float], long: int) -> Iterator[dict[str, Any]]:
    for keep in keeps:
        for name in heads:
            for kind, count in (("text", TEXTS), ("passkey", PASSKEYS)):
                for n in range(count):
                    yield {"kind": kind, "heads": name, "keep": keep, "beside": "", "sample": n}
    for beside in ("", " + kivi(bits=4)") if long else ():
        for name in heads:
            if name != "random":
                yield {"kind": "facts", "heads": name, "keep": LONG_KEEP, "beside": beside, "sample": SEED}


def table(rows: list[dict[str, Any]]) -> Table:
    out = Table("keep", "heads", ">KL", ">of each text", ">top-1", ">passkeys", ">facts", ">with kivi(bits=4)")
    for keep, name in dict.fromkeys((row["keep"], row["heads"]) for row in rows):

        def of(kind: str, beside: str = "", keep: float = keep, name: str = name) -> list[dict[str, Any]]:
            key = {"kind": kind, "heads": name, "keep": keep, "beside": beside}
            return [row for row in rows if all(row[part] == value for part, value in key.items())]

        def found(kind: str, beside: str = "", of: Any = of) -> str:
            asked = of(kind, beside)
            return f"{sum(r['right'] for r in asked)} of {sum(r['of'] for r in asked)}" if asked else ""

        kls, same = ([row[part] for row in of("text")] for part in ("kl", "top1"))
        each = [f"{sum(kls) / len(kls):.4f}", ", ".join(f"{kl:.4f}" for kl in kls)] if kls else ["", ""]
        agreed = f"{sum(same) / len(same):.3f}" if same else ""
        out.add_row(
            str(keep), name, *each, agreed, *map(found, ("passkey", "facts")), found("facts", " + kivi(bits=4)")
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--long", type=int, default=7000, help="0 to leave it out")
    parser.add_argument("--keep", type=float, nargs="*", default=[0.3, 0.15, 0.08])
    parser.add_argument("--heads", nargs="+", metavar="NAME=PROFILE", help="instead of the shipped and the random ones")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bench = Bench(args.context, args.long)
    config = bench.model.config
    shape = signature(config)
    given = args.heads or [f"gates=duo-gates-{shape}", f"shipped=duo-{shape}", "random="]
    scores = {}
    for name, where in (one.split("=", 1) for one in given):
        if where:
            scores[name] = load_profile(where, "duo", shape).tensors["scores"]
        else:
            size, generator = (
                (config.num_hidden_layers, config.num_key_value_heads),
                torch.Generator().manual_seed(SEED),
            )
            scores[name] = torch.rand(size, generator=generator)

    def best(name: str, keep: float) -> list[int]:
        order = scores[name].flatten().argsort(descending=True, stable=True).tolist()
        return sorted(order[: round(keep * len(order))])

    out: dict[str, Any] = {"model": shape, "dtype": "float32", "context": args.context, "long": args.long}
    if args.json and args.json.is_file():
        out = json.loads(args.json.read_text())
    out["heads"] = {**out.get("heads", {}), **{f"{n} {k}": best(n, k) for n in scores for k in args.keep}}
    rows = out.setdefault("rows", [])
    for piece in pieces(list(scores), args.keep, args.long):
        name, keep = piece["heads"], piece["keep"]
        if any(all(row[part] == value for part, value in piece.items()) for row in rows):
            continue
        named = [list(divmod(i, scores[name].shape[1])) for i in best(name, keep)]
        rows.append(
            {**piece, **bench.measure(piece["kind"], f"duo(retrieval={named}){piece['beside']}", piece["sample"])}
        )
        print(*rows[-1].values(), flush=True)
        if args.json:
            args.json.write_text(json.dumps(out, indent=1) + "\n")
    Console(width=120).print(table(rows), crop=False)


if __name__ == "__main__":
    main()
