"""Budgets shared out, beside the best recipe made by hand within the same bytes: the table of docs/methods.md.

python benchmarks/budget.py --json benchmarks/results/budget_cpu.json

Recipes come from the profile that ships for the embedded model, or from `--profile DIR`; those made by hand are the
rows of docs/results.md with the lowest KL within each budget, measured again in the same run. Texts and seeds are those
of `fivefold eval`, which no calibration has seen. A run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fivefold.calibrate import load_profile, signature
from fivefold.evaluate import engine
from fivefold.models import embedded

SUITES = ("fidelity", "passkey")
BY_HAND = {
    0.15: "duo(keep=0.34) + rotatekv(bits=4)",
    0.1: "duo(keep=0.34) + rotatekv(bits=2)",
    0.07: "cskv(keep=0.2, bits=4)",
}
"""By budget, as docs/results.md has them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="folder of a budget profile, if not the one that ships")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=float, nargs="+", default=None, help="those of the profile if not given")
    parser.add_argument("--more", nargs="*", default=[], help="further recipes, beside them")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--store", type=Path, default=Path.home() / ".cache/fivefold/budget.jsonl")
    options = parser.parse_args()
    model, tokenizer = embedded.load()
    name = signature(model.config)
    profile = load_profile(options.profile or f"budget-{name}", "budget", name)
    found = {float(budget): made["recipe"] for budget, made in profile.settings["recipes"].items()}
    pairs = {budget: (BY_HAND[budget], found[budget]) for budget in options.budget or found}
    recipes = [*dict.fromkeys(recipe for pair in pairs.values() for recipe in pair), *options.more]
    plan = engine.Plan(tuple(recipes), SUITES, (options.context,), options.samples, options.seed)
    result = engine.run(
        model,
        tokenizer,
        plan,
        options.store,
        lambda done, total, what: print(f"\r{done}/{total} {what:60.60}", end="", file=sys.stderr, flush=True),
    )
    print(file=sys.stderr)
    cells = {(cell["recipe"], cell["suite"]): cell for cell in result["cells"]}

    def row(recipe: str) -> dict[str, Any]:
        fidelity, passkey = (cells[recipe, suite] for suite in SUITES)
        return {
            "recipe": recipe, "bytes": fidelity["ratio"], "kl": fidelity["kl"], "kl_low": fidelity["kl_low"],
            "kl_high": fidelity["kl_high"], "top1": fidelity["top1"], "passkey": passkey["score"],
        }  # fmt: skip

    out = {
        "torch": torch.__version__, "context": options.context, "samples": options.samples, "seed": options.seed,
        "calibrated": profile.made, "budgets": [
            {"budget": budget, "by_hand": row(hand), "shared_out": row(ours)} for budget, (hand, ours) in pairs.items()
        ],
        "more": [row(recipe) for recipe in options.more],
    }  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    print("| budget | recipe | bytes | KL | of it | top-1 | passkeys |\n|---|---|---|---|---|---|---|")
    for one in out["budgets"]:
        for who in ("by_hand", "shared_out"):
            made = one[who]
            part = "" if who == "by_hand" else f"{made['kl'] / one['by_hand']['kl']:.2f}"
            told = f"`{made['recipe']}`" if who == "by_hand" else f"`budget(bytes={one['budget']})`"
            print(
                f"| {one['budget']} | {told} | {made['bytes']:.3f} | {made['kl']:.4f} | {part} | {made['top1']:.3f} | "
                f"{made['passkey']:.2f} |"
            )
    for made in out["more"]:
        figures = f"{made['bytes']:.3f} | {made['kl']:.4f} | | {made['top1']:.3f} | {made['passkey']:.2f}"
        print(f"| | `{made['recipe']}` | {figures} |")


if __name__ == "__main__":
    main()
