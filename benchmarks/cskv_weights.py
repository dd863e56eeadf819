"""What weighting its losses brings to cskv: profiles of one text for the embedded model, each with other weights.

    python benchmarks/cskv_weights.py --out /tmp/weights [--tokens 8192]

`plain` has the paper's loss: keys and values as they are. In `keys`, keys are weighted by queries. `tenth`, `half` and
`twice` are so too, and their values are fitted to what attention makes of them, with values themselves counting so
much beside it (`cskv.VALUES`; a profile that ships has `twice`). The command for `fivefold eval` that compares them is
printed; with `value_keep=1.0` only keys lose, with `keep=1.0` only values.
"""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from rich.progress import track

from fivefold.calibrate.profile import Profile, config_hash, save_profile, signature
from fivefold.calibrate.run import chunks, default_texts
from fivefold.methods.channels import cskv
from fivefold.models import smollm2
from fivefold.models.capture import capturing
from fivefold.models.huggingface import make_cache
from fivefold.recipe import Recipe

# Whether keys are weighted, and how much values count beside their weighted sums (None: they alone).
VARIANTS = {
    "plain": (False, None),
    "keys": (True, None),
    "tenth": (True, 0.1),
    "half": (True, 0.5),
    "twice": (True, 2.0),
}


def main(out: Path, tokens: int = 8192, keep: float = 0.2) -> None:
    model, tokenizer = smollm2.load()
    specs = [store.spec for store in make_cache(model, Recipe()).state.stores.values()]
    learner = cskv.CskvLearner(specs, 1.0)
    with torch.inference_mode(), capturing(model, cskv.Cskv.captures, learner.see):
        for piece in track(chunks(tokenizer, default_texts(), tokens, 0, None), "Reading"):
            model(input_ids=piece, use_cache=False, logits_to_keep=1)
    sums, recipes = learner.sums, []
    for name, (weighted, values) in VARIANTS.items():
        if values is None:
            learner.sums = {key: sums[key.replace("attended", "values")] for key in sums}
        else:
            learner.sums, cskv.VALUES = sums, values
        if not weighted:
            learner.sums = {key: torch.ones_like(x) if "queries" in key else x for key, x in learner.sums.items()}
        settings, tensors = learner.finish(lambda done, total, what: None)
        save_profile(out / name, Profile("cskv", signature(model.config), settings, tensors, config_hash(model.config)))
        recipes.append(f"-r 'cskv(keep={keep}, profile=\"{out / name}\")'")
    for part, folders in (("value_keep=1.0", ("plain", "keys")), ("keep=1.0, value_keep", ("plain", "tenth", "twice"))):
        part = f"keep={keep}, {part}" if part.startswith("value") else f"{part}={keep}"
        recipes += [f"-r 'cskv({part}, profile=\"{out / folder}\")'" for folder in folders]
    print("fivefold eval -s fidelity -c 1024 -k 3", *recipes)


if __name__ == "__main__":
    typer.run(main)
