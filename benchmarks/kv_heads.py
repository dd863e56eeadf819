"""`kv_heads` at a half and a quarter of the channels, of the whole layer and of each head, beside `cskv`: the table of
docs/methods.md.

    python benchmarks/kv_heads.py --json benchmarks/results/kv_heads_cpu.json

The embedded model in float32, 3 texts of 1,024 tokens (KL over what follows) and 5 passkeys. The bytes are those of the
same cache in bfloat16, where a stored number takes 2 bytes in all of them. What does not ship is calibrated first
(minutes; kept under --work): each head's own basis, and that of `cskv` for a half. A run that was broken off goes on
where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fivefold.calibrate.run import calibrate
from fivefold.evaluate import engine
from fivefold.models import embedded
from fivefold.plan.memory import report_of
from fivefold.plan.read import read_model
from fivefold.recipe import Recipe

CONTEXT = 1024
# What is shown, the recipe, and the recipe and tokens of the calibration if no profile ships.
ROWS: tuple[tuple[str, str, tuple[str, int] | None], ...] = (
    ("all heads of a layer", "kv_heads(keep=0.5{})", None),
    ("all heads of a layer", "kv_heads(keep=0.25{})", None),
    ("each head alone", "kv_heads(keep=0.5, group=1{})", ("kv_heads(group=1)", 65_536)),
    ("each head alone", "kv_heads(keep=0.25, group=1{})", ("kv_heads(group=1)", 65_536)),
    ("weighted by what attention makes of it", "cskv(keep=0.5{})", ("cskv(keep=0.5)", 16_384)),
    ("weighted by what attention makes of it", "cskv(keep=0.4{})", None),
    ("weighted by what attention makes of it", "cskv(keep=0.25{})", None),
)


def progress(done: int, total: int, what: str) -> None:
    print(f"\r{done}/{total} {what:60.60}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache/fivefold/kv_heads")
    options = parser.parse_args()
    model, tokenizer = embedded.load()
    recipes: dict[str, tuple[str, str]] = {}
    for basis, pattern, learned in ROWS:
        given = ""
        if learned is not None:
            folder = options.work / learned[0].translate(str.maketrans("(=,) ", "-----"))
            calibrate(model, tokenizer, learned[0], folder, tokens=learned[1], progress=progress)
            given = f', profile="{folder}"'
        recipes[str(Recipe.parse(pattern.format(given)))] = basis, pattern.format("")
    out: dict[str, Any] = {"model": embedded.MODEL_NAME, "torch": torch.__version__, "rows": []}
    found: dict[str, dict[str, Any]] = {}
    for suite, samples in (("fidelity", 3), ("passkey", 5)):
        plan = engine.Plan(recipes=tuple(recipes), suites=(suite,), contexts=(CONTEXT,), samples=samples)
        for cell in engine.run(model, tokenizer, plan, options.work / "kv_heads.jsonl", progress)["cells"]:
            found.setdefault(cell["recipe"], {})[suite] = cell
    print(file=sys.stderr)
    shape = read_model("smollm2-135m")
    for recipe, (basis, shown) in recipes.items():
        report = report_of(Recipe.parse(recipe), shape, CONTEXT)
        fidelity, passkey = found[recipe]["fidelity"], found[recipe]["passkey"]
        out["rows"].append(
            {
                "recipe": shown, "basis": basis, "bytes": (report.total - report.learned) / report.exact_equivalent,
                "kl": fidelity["kl"], "top1": fidelity["top1"], "passkey": passkey["score"],
                "texts": 3, "questions": 5, "context": CONTEXT,
            }
        )  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(out, indent=1) + "\n")
    print("| recipe | basis | bytes | KL | top-1 | passkey |\n|---|---|---|---|---|---|")
    for row in out["rows"]:
        print(
            f"| `{row['recipe']}` | {row['basis']} | {row['bytes']:.3f} | {row['kl']:.3f} | {row['top1']:.0%} | "
            f"{row['passkey'] * row['questions']:.0f} of {row['questions']} |"
        )


if __name__ == "__main__":
    main()
