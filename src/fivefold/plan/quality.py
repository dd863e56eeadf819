"""What a recipe is known to cost: from a file of `fivefold eval` or `fivefold sweep`. Never guessed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fivefold.errors import FivefoldError, InputError
from fivefold.recipe import Recipe


@dataclass(frozen=True)
class Quality:
    """KL divergence from the exact cache's next token, nats, at `context` tokens, with its 95% interval (None: one text
    alone); answers: what is left of the exact cache's score over all suites, 1 is as good, if more was measured than
    fidelity. source: the file."""

    kl: float
    low: float | None
    high: float | None
    context: int
    answers: float | None
    source: str

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {}


def read(source: str, wanted: int) -> tuple[dict[Recipe, Quality], str]:
    """What a file of results says of recipes, at its context that is nearest to `wanted`; the model that it is about.

    Raises `InputError` where it is no such file, or has no fidelity in it.
    """
    try:
        found = json.loads(Path(source).read_text(encoding="utf-8"))
        model, cells, ranking = found["environment"]["model"], found["cells"], found["ranking"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no result of fivefold eval or fivefold sweep"
        raise InputError(f"--quality {source!r} cannot be read ({why}): make one with fivefold eval --json.") from None
    return of_result(found, source, wanted), str(model) if cells or ranking else ""


def of_result(found: Mapping[str, Any], source: str, wanted: int) -> dict[Recipe, Quality]:
    """The same of a result that is at hand."""
    try:
        fidelity = [cell for cell in found["cells"] if cell["suite"] == "fidelity"]
        if not fidelity:
            raise InputError(f"--quality {source!r} has no fidelity in it: run fivefold eval --suite fidelity --json.")
        context = min({cell["context"] for cell in fidelity}, key=lambda one: abs(one - wanted))
        suites = {cell["suite"] for cell in found["cells"]}
        ranked = {one["recipe"]: one["quality"] for one in found["ranking"] if one["context"] == context}
        out = {}
        for cell in fidelity:
            if cell["context"] != context:
                continue
            try:
                recipe = Recipe.parse(cell["recipe"])
            except FivefoldError:  # the exact cache, or a method that is gone
                continue
            low, high = cell.get("kl_low"), cell.get("kl_high")
            answers = ranked.get(cell["recipe"]) if len(suites) > 1 else None
            out[recipe] = Quality(cell["kl"], low, high, context, answers, source)
        return out
    except (KeyError, TypeError, AttributeError):
        raise InputError(f"--quality {source!r} is damaged: make it anew with fivefold eval --json.") from None
