"""Make the profiles that ship for the embedded model: of every method that learns, as `ASKED` says or by its defaults.
`duo`'s trained gates are `duo-gates-...`.

    python scripts/smollm2_profiles.py [METHOD ...]

What is there is made anew; a run that is broken off goes on where it stopped. The scores that `duo()` itself uses
are made by `smollm2_retrieval_heads.py`.
"""

import shutil
import sys
from pathlib import Path

import torch

import fivefold
from fivefold.calibrate import signature
from fivefold.calibrate.run import TOKENS, calibrate
from fivefold.cli.terminal import work_bar
from fivefold.methods import registered
from fivefold.models import embedded

ASKED = {"budget": "budget(bytes=[0.15, 0.1, 0.07], tries=5)", "duo": "duo(keep=0.15)"}
"""What is asked for where that is more than the defaults."""
TEXT = {"anchors": 4_096, "duo": 1_048_576}
"""Tokens to read, where a long text teaches more than many short ones."""
NAMES = {"duo": "duo-gates"}


def main() -> None:
    model, tokenizer = embedded.load()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    profiles = Path(fivefold.__file__).parent / "profiles"
    for method in sys.argv[1:] or [name for name, cls in registered().items() if cls.learns()]:
        work = Path(__file__).parents[1] / "build" / f"profile-{method}"
        with work_bar() as progress:
            asked, tokens = ASKED.get(method, f"{method}()"), TEXT.get(method, TOKENS)
            calibrate(model, tokenizer, asked, work, tokens=tokens, progress=progress)
        folder = profiles / f"{NAMES.get(method, method)}-{signature(model.config)}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(work, folder)
        print(folder)


if __name__ == "__main__":
    main()
