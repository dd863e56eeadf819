"""`kv_heads` at a half and a quarter of the channels, of the whole layer and of each head, beside `cskv`: the table of
docs/methods.md.

    python benchmarks/kv_heads.py --json benchmarks/results/kv_heads_cpu.json

The embedded model in float32 with the profiles that ship. KL: 3 texts of 1,024 tokens, over the 128 that follow, as
`fivefold eval` does it. Passkeys: 5, asked after 1,024 tokens were read and compressed. The bytes are those of the same
cache in bfloat16, where a stored number takes 2 bytes in all of them, without the bases (the same for every length). A
run that was broken off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.evaluate.demo import document
from fivefold.evaluate.fidelity import continued
from fivefold.evaluate.tasks import holds, tasks
from fivefold.models import embedded
from fivefold.plan.memory import report_of
from fivefold.plan.read import read_model
from fivefold.recipe import Recipe

CONTEXT, NEW, TEXTS, KEYS = 1024, 128, 3, 5
ROWS = {
    "kv_heads(keep=0.5)": "all heads of a layer",
    "kv_heads(keep=0.4)": "all heads of a layer",
    "kv_heads(keep=0.25)": "all heads of a layer",
    "kv_heads(keep=0.5, group=1)": "each head alone",
    "kv_heads(keep=0.25, group=1)": "each head alone",
    "cskv(keep=0.4)": "weighted by attention",
    "cskv(keep=0.25)": "weighted by attention",
}


def text(ids: torch.Tensor, number: int) -> torch.Tensor:
    start = number * ids.shape[1] // (2 * TEXTS)  # the first half of the document: the profiles saw the end of it
    return ids[:, start : start + CONTEXT + NEW]


def logs(model: Any, recipe: str, ids: torch.Tensor) -> torch.Tensor:
    cache = fivefold.compress(model, recipe)
    model(ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1)
    return continued(model, cache, ids[:, CONTEXT:])


def answered(model: Any, tokenizer: Any, recipe: str, number: int) -> bool:
    sample = tasks()["passkey"]().make(tokenizer, CONTEXT, random.Random(f"kv_heads {number}"))
    question, cache, said = sample.questions[0], fivefold.compress(model, recipe), []
    model(torch.tensor([sample.prefix]), past_key_values=cache, logits_to_keep=1)
    tokens = torch.tensor([tokenizer(question.text, add_special_tokens=False).input_ids])
    for _ in range(8):
        tokens = model(tokens, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(tokens))
    return holds(tokenizer.decode(said), question.answer)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    path: Path = parser.parse_args().json
    model, tokenizer = embedded.load()
    ids = tokenizer(document(), return_tensors="pt").input_ids
    out: dict[str, Any] = {
        "model": embedded.MODEL_NAME,
        "torch": torch.__version__,
        "kl": {},
        "top1": {},
        "passkey": {},
    }
    if path.is_file():
        out = json.loads(path.read_text())

    def keep(what: str, recipe: str, value: float) -> None:
        out[what].setdefault(recipe, []).append(value)
        path.write_text(json.dumps(out, indent=1) + "\n")

    for number in range(TEXTS):
        left = [recipe for recipe in ROWS if len(out["kl"].get(recipe, [])) <= number]
        exact = logs(model, "full()", text(ids, number)) if left else None
        for recipe in left:
            found = logs(model, recipe, text(ids, number))
            assert exact is not None
            keep("top1", recipe, float((exact.argmax(-1) == found.argmax(-1)).float().mean()))
            keep("kl", recipe, float((exact.exp() * (exact - found)).sum(-1).mean()))
    for number in range(KEYS):
        for recipe in ("full()", *ROWS):
            if len(out["passkey"].get(recipe, [])) <= number:
                keep("passkey", recipe, float(answered(model, tokenizer, recipe, number)))
    shape = read_model("smollm2-135m")
    print("| recipe | basis | bytes | KL | top-1 | passkey |\n|---|---|---|---|---|---|")
    out["bytes"] = {}
    for recipe, basis in ROWS.items():
        report = report_of(Recipe.parse(recipe), shape, CONTEXT)
        out["bytes"][recipe] = share = (report.total - report.learned) / report.exact_equivalent
        kl, top1 = (sum(out[name][recipe]) / TEXTS for name in ("kl", "top1"))
        keys = f"{sum(out['passkey'][recipe]):.0f} of {KEYS}"
        print(f"| `{recipe}` | {basis} | {share:.3f} | {kl:.3f} | {top1:.0%} | {keys} |")
    path.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
