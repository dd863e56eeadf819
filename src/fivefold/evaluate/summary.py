"""From rows to figures: a cell per recipe and suite, a ranking of the recipes, and the Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from fivefold.evaluate.intervals import (
    Groups,
    effective,
    lost_variance,
    mean_interval,
    mean_of_parts,
    mean_variance,
    share_interval,
    spread_of_sum,
)
from fivefold.evaluate.ruler import KINDS, PREFIX
from fivefold.evaluate.sweep import front
from fivefold.recipe import Recipe

EXACT = "DynamicCache"
FIDELITY = "fidelity"
OWN = 0
"""The context of texts that are as long as they are: a user's own file."""

Row = dict[str, Any]
_MEANS = ("kl", "top1", "top5", "perplexity", "exact_perplexity", "diverges")


def summarise(found: dict[tuple[int, str], dict[str, list[Row]]], recipes: Sequence[str]) -> dict[str, Any]:
    """`{cells, ranking, ruler}` from rows by (context, suite) and recipe.

    cells: one for each (recipe, suite, context) that was run: score with a 95% interval, chance, bytes and times, and
    the rows themselves. `exact_fails` marks tasks that the exact cache does no better than chance (recipes may then be
    missing): they say nothing about compression.

    ranking: for each context the exact cache, then the recipes, best first. quality is what is left of the exact
    cache's score above chance, `1 - sum(exact - score) / sum(exact - chance)` over the suites that the exact cache can
    do (fidelity: top-1 agreement): 1 is as good as exact, 0 is chance, and a suite weighs as much as there is to lose
    in it. bytes_front, time_front: whether no other recipe is better at no more bytes, or at no longer a decoding step.

    ruler: the mean score of RULER's thirteen kinds with its interval, for each recipe and context that all were run at.
    """
    cells, ranking = [], []
    for (context, suite), of in found.items():
        fails = suite != FIDELITY and exact_fails(of[EXACT])
        cells += [_cell(recipe, suite, context, rows, fails) for recipe, rows in of.items()]
    for context in dict.fromkeys(context for context, _ in found):
        suites = {suite: of for (at, suite), of in found.items() if at == context}
        ranking += _rank([_entry(context, recipe, suites) for recipe in (EXACT, *recipes)])
    return {"cells": cells, "ranking": ranking, "ruler": _ruler(cells)}


def _ruler(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    of: dict[tuple[int, str], list[tuple[float, float, float]]] = {}
    for cell in cells:
        if cell["suite"].startswith(PREFIX):
            part = (cell["score"], cell["low"], cell["high"])
            of.setdefault((cell["context"], cell["recipe"]), []).append(part)
    return [
        dict(zip(("context", "recipe", "score", "low", "high"), (*place, *mean_of_parts(parts))))
        for place, parts in of.items()
        if len(parts) == len(KINDS)
    ]


def exact_fails(rows: list[Row]) -> bool:
    """Whether the scores of the exact cache may be those of chance."""
    low = _score_interval(rows)[0]
    return low is None or low <= _mean(q["chance"] for row in rows for q in row["questions"])


def _cell(recipe: str, suite: str, context: int, rows: list[Row], fails: bool) -> dict[str, Any]:
    cell: dict[str, Any] = {"recipe": recipe, "suite": suite, "context": context, "exact_fails": fails}
    for name in ("ratio", "bytes", "prefill_s", "seconds"):
        cell[name] = _mean(row[name] for row in rows)
    if suite == FIDELITY:
        for name in _MEANS:
            cell[name] = _mean(row[name] for row in rows)
        cell["kl_low"], cell["kl_high"] = _clip(mean_interval([[row["kl"]] for row in rows]), math.inf)
        cell["decode_ms"] = median(row["decode_ms"] for row in rows)
        cell["bins"] = _average([row["bins"] for row in rows])
        cell["layers"] = _average([row["layers"] for row in rows])
        cell["score"], cell["chance"] = cell["top1"], 0.0
        cell["low"], cell["high"] = _clip(mean_interval([[row["top1"]] for row in rows]), 1.0)
    else:
        scores = _scores(rows)
        flat = [score for group in scores for score in group]
        cell["score"], cell["questions"] = _mean(flat), len(flat)
        cell["chance"] = _mean(q["chance"] for row in rows for q in row["questions"])
        cell["low"], cell["high"] = _score_interval(rows)
    return cell | {"rows": rows}


def _entry(context: int, recipe: str, suites: dict[str, dict[str, list[Row]]]) -> dict[str, Any]:
    """One recipe at one context, over all suites."""
    mine = {suite: of[recipe] for suite, of in suites.items() if recipe in of}
    every = [row for rows in mine.values() for row in rows]
    entry: dict[str, Any] = {"context": context, "recipe": recipe}
    for name in ("ratio", "bytes", "prefill_s"):
        entry[name] = _mean(row[name] for row in every) if every else None
    lost_sum, most, parts = 0.0, 0.0, []
    for suite, rows in mine.items():
        exact = suites[suite][EXACT]
        if suite == FIDELITY:
            lost: Groups = [[1 - row["top1"]] for row in rows]
            room, variance = 1.0, mean_variance(lost)
        elif exact_fails(exact):
            continue
        else:
            theirs, ours = _scores(exact), _scores(rows)
            lost = [[a - b for a, b in zip(one, two)] for one, two in zip(theirs, ours)]
            chance = _mean(q["chance"] for row in exact for q in row["questions"])
            room = _mean(score for group in theirs for score in group) - chance
            if _shares(exact) and _shares(rows):
                variance = lost_variance(theirs, ours), math.inf
            else:
                variance = mean_variance(lost)
        lost_sum += _mean(value for group in lost for value in group)
        most += room
        parts.append(variance)
    entry["quality"] = 1 - lost_sum / most if parts else None
    entry["low"] = entry["high"] = None
    known = [part for part in parts if part is not None]
    if parts and len(known) == len(parts):
        # The exact cache and the recipe that keeps everything are equal to it by construction, not by luck.
        spread = 0.0 if recipe in (EXACT, str(Recipe())) else spread_of_sum(known) / most
        entry["low"], entry["high"] = entry["quality"] - spread, entry["quality"] + spread
    fidelity = mine.get(FIDELITY)
    for name in ("kl", "top1", "perplexity"):
        entry[name] = _mean(row[name] for row in fidelity) if fidelity else None
    entry["decode_ms"] = median(row["decode_ms"] for row in fidelity) if fidelity else None
    entry["decoding"] = next((row["decoding"] for row in every if row.get("decoding")), None)
    return entry


def _rank(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exact cache, then best first, equals by bytes; with the recipes on the fronts marked."""
    known = [entry for entry in entries if entry["quality"] is not None and entry["ratio"] is not None]
    for name, cost in (("bytes_front", "ratio"), ("time_front", "decode_ms")):
        for entry in entries:
            entry[name] = False
        placed = [entry for entry in known if entry[cost] is not None]
        for entry, on in zip(placed, front([(entry[cost], entry["quality"]) for entry in placed])):
            entry[name] = on
    nothing = -math.inf
    return sorted(
        entries,
        key=lambda entry: (
            entry["recipe"] != EXACT,
            -(nothing if entry["quality"] is None else round(entry["quality"], 9)),
            math.inf if entry["ratio"] is None else entry["ratio"],
        ),
    )


def _scores(rows: list[Row]) -> Groups:
    return [[question["score"] for question in row["questions"]] for row in rows]


def _shares(rows: list[Row]) -> bool:
    """Whether the scores are right, wrong, or right in part."""
    return all(row.get("parts", False) or q["score"] in (0.0, 1.0) for row in rows for q in row["questions"])


def _score_interval(rows: list[Row]) -> tuple[float | None, float | None]:
    scores = _scores(rows)
    if _shares(rows):
        return share_interval(scores)
    return mean_interval(scores) if effective(scores) > 1 else (None, None)


def _clip(interval: tuple[Any, Any], high: float) -> tuple[Any, Any]:
    return tuple(None if bound is None else min(high, max(0.0, bound)) for bound in interval)  # type: ignore[return-value]


def _average(rows: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """Of lists of equal length of figures, place by place."""
    return [{name: _mean(part[name] for part in place) for name in place[0]} for place in zip(*rows)]


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
