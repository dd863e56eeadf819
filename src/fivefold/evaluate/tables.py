"""The results of `fivefold eval` and `fivefold sweep` on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from fivefold.evaluate.ruler import PREFIX
from fivefold.evaluate.summary import EXACT, FIDELITY, OWN
from fivefold.tables import Facts, Table

_LEGEND = (
    "quality: what is left of the exact cache's score above chance, all suites together (fidelity: top-1 agreement): "
    "1 is exact, 0 is chance; ± its 95% interval. bytes, decode: of the exact cache's (below 1: less memory or time). "
    "KL (nats), top-1: against the exact cache's next token. front: no other recipe is better at no more bytes (b), in "
    "no more time per token (t)."
)
_GRID_LEGEND = (
    "Scores in percent: right answers (biography: bits of each fact, not percent; fidelity: top-1). Columns are the "
    "ranks above. Red: the exact cache's score is above the recipe's 95% interval. (*): the exact cache is not "
    "clearly better than chance (95% interval): that says nothing about compression and does not count, and recipes "
    "only run there with --all."
)
_RULER_LEGEND = (
    "RULER: the share of each answer that is found, as its own scorers do it; the cache is compressed before the "
    "question is read. Recipes run on all its kinds, (*) or not."
)
_AVERAGE_LEGEND = " RULER average: the mean of all thirteen."
_ACROSS = 9
"""Recipes side by side in 80 columns."""


def show(result: dict[str, Any]) -> Iterator[RenderableType]:
    """Everything that is printed, in order."""
    environment, plan = result["environment"], result["plan"]
    yield Text(
        f"{environment['model']} in {environment['dtype']} on {environment['machine']}; {texts(plan['samples'])} per "
        f"suite and context, seed {plan['seed']}"
    )
    for context in contexts_of(result):
        ranking, cells = at_context(result["ranking"], context), at_context(result["cells"], context)
        yield Text(f"\n{context_name(context)}", style="bold")
        yield _ranked(ranking)
        yield _ways(ranking)
        for first in range(0, len(ranking), _ACROSS):
            yield ""
            ranks = range(first, min(first + _ACROSS, len(ranking)))
            yield _grid(ranks, ranking, cells, at_context(result["ruler"], context))
    legends = [_LEGEND, _GRID_LEGEND]
    if any(suite.startswith(PREFIX) for suite in plan["suites"]):
        legends.append(_RULER_LEGEND + _AVERAGE_LEGEND * bool(result["ruler"]))
    yield Text("\n" + "\n".join(legends), style="dim")


def _ways(ranking: list[dict[str, Any]]) -> Facts:
    """Which way each recipe's decoding steps went."""
    table = Facts()
    for entry in ranking:
        if entry.get("decoding"):
            table.add_row(Text(entry["recipe"]), Text(entry["decoding"]))
    return table


def contexts_of(result: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(entry["context"] for entry in result["ranking"]))


def at_context(entries: list[dict[str, Any]], context: int) -> list[dict[str, Any]]:
    return [entry for entry in entries if entry["context"] == context]


def recipes_of(result: dict[str, Any]) -> list[str]:
    """The recipes, in the order of the ranking."""
    return list(dict.fromkeys(entry["recipe"] for entry in result["ranking"]))


def suite_name(suite: str) -> str:
    """A file by its name alone, the tasks as words that can be broken."""
    if suite.startswith(PREFIX):
        return f"RULER {suite.removeprefix(PREFIX)}".replace("_", " ")
    kind, _, file = suite.partition(":")
    return Path(file).name if file else kind.replace("_", " ")


def texts(count: int) -> str:
    return "1 text" if count == 1 else f"{count:,} texts"


def context_name(context: int) -> str:
    return "Your own texts" if context == OWN else f"{context:,} tokens"


def number(value: float | None, digits: int = 2) -> str:
    """A figure as it is shown everywhere; a dash where there is none. Rounding leaves no -0.00."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _ranked(ranking: list[dict[str, Any]]) -> Table:
    table = Table("#", "recipe", ">quality", ">bytes", ">decode", ">KL", ">top-1", "front")
    exact = next(entry for entry in ranking if entry["recipe"] == EXACT)
    for rank, entry in enumerate(ranking):
        time = None if entry["decode_ms"] is None else entry["decode_ms"] / exact["decode_ms"]
        spread = "" if entry["low"] is None else f" ±{number(entry['high'] - entry['quality'])}"
        front = " ".join(mark for mark, name in (("b", "bytes_front"), ("t", "time_front")) if entry[name])
        table.add_row(
            str(rank), Text(entry["recipe"], "bold"), number(entry["quality"]) + spread, number(entry["ratio"], 3),
            number(time), number(entry["kl"], 4), number(entry["top1"]), front,
        )  # fmt: skip
    return table


def _grid(
    ranks: range, ranking: list[dict[str, Any]], cells: list[dict[str, Any]], averages: list[dict[str, Any]]
) -> Table:
    """Suites down, recipes by rank across."""
    table = Table("suite", ">chance", *(f">{rank:>3}" for rank in ranks))
    place = {(cell["suite"], cell["recipe"]): cell for cell in cells}
    for suite in dict.fromkeys(cell["suite"] for cell in cells):
        exact = place[suite, EXACT]
        shown = [_score(place.get((suite, ranking[rank]["recipe"])), exact) for rank in ranks]
        name = Text(suite + (" (*)" if exact["exact_fails"] else ""))
        table.add_row(name, "" if suite == FIDELITY else _percent(suite, exact["chance"]), *shown)
    of = {entry["recipe"]: number(100 * entry["score"], 1).replace("100.0", "100") for entry in averages}
    if of:
        average = ["RULER average", "", *(of[ranking[rank]["recipe"]] for rank in ranks)]
        table.add_row(*(Text(cell, "bold") for cell in average))
    return table


def _score(cell: dict[str, Any] | None, exact: dict[str, Any]) -> Text:
    if cell is None:
        return Text("–", style="dim")
    worse = not cell["exact_fails"] and cell["high"] is not None and cell["high"] < exact["score"]
    return Text(_percent(cell["suite"], cell["score"]), style="red" if worse else "")


def _percent(suite: str, score: float) -> str:
    return number(score, 1) if suite == "biography" else number(100 * score, 0)
