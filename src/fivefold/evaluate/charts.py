"""The plots of the report: what they show, as Vega-Lite specifications."""

from __future__ import annotations

from math import sqrt
from typing import Any

from fivefold.evaluate.fidelity import BINS
from fivefold.evaluate.summary import EXACT, FIDELITY
from fivefold.evaluate.sweep import front
from fivefold.evaluate.tables import at_context, context_name, contexts_of, recipes_of, suite_name
from fivefold.page import SIZE, Figure

_ALL = "quality, all suites"
_METRICS = {"kl": "KL, nats", "top1": "top-1 agreement", "top5": "top-5 agreement", "perplexity": "perplexity"}
_ERRORS = {
    "own": "attention error of the layer's own cache",
    "carried": "attention error, those of earlier layers included",
    "lens": "KL of what the layer says (logit lens), nats",
}
# From nearly the page's colour on, so that it serves light and dark.
_HEAT = ["rgba(128, 128, 128, 0.12)", "#f0a868", "#cf4520", "#6d0f24"]


def figures_of(result: dict[str, Any]) -> dict[str, Figure]:
    """Each plot that there is data for, by name."""
    found: dict[str, Figure] = {}
    points = _points(result)
    for name, title, words in (
        ("bytes", "bytes, of the exact cache's", "Quality against the cache's bytes, of the exact cache's."),
        ("time", "time of a decoding step, of the exact cache's", "Quality against the time of a decoding step."),
    ):
        mine = [{**point, "x": point[name], "front": point[f"{name}_front"]} for point in points if point[name]]
        if mine:
            middle = sqrt(min(point["x"] for point in mine) * max(point["x"] for point in mine))
            for point in mine:  # names go towards the middle of the plot
                point["align"] = "right" if point["x"] > middle else "left"
            caption = (
                f"{words} Up and left is better; the line is the Pareto front, bars are 95% intervals, numbers are "
                "those of the ranking."
            )
            measures = [(one, one if one == _ALL else suite_name(one)) for one in _each(mine, "measure")]
            choices = {"measure": ("Measured by", measures), "context": ("at", _named_contexts(mine))}
            found[name] = Figure(caption, _pareto(mine, title), choices)
    cells = [cell for cell in result["cells"] if cell["suite"] == FIDELITY]
    compressed = [cell for cell in cells if cell["recipe"] != EXACT]
    if compressed:
        at = ("at", _named_contexts(compressed))
        found["positions"] = Figure(
            "Figures over parts of the text that goes on behind the prefix: does the damage grow or heal?",
            _positions(result, compressed),
            {"metric": ("Figure", list(_METRICS.items())), "context": at},
        )
        kinds = [(name, label) for name, label in _ERRORS.items() if name in compressed[0]["layers"][0]]
        found["layers"] = Figure(
            "Relative error of each layer's attention output against the exact cache's, in the text behind the prefix.",
            _layers(result, compressed),
            {"kind": ("Figure", kinds), "context": at},
        )
    return found


def _each(entries: list[dict[str, Any]], name: str) -> list[Any]:
    return list(dict.fromkeys(entry[name] for entry in entries))


def _named_contexts(entries: list[dict[str, Any]]) -> list[tuple[Any, str]]:
    return [(context, context_name(context)) for context in _each(entries, "context")]


def _points(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every recipe by every measure: the quality over all suites, and each suite's score."""
    points = []
    for context in contexts_of(result):
        entries = at_context(result["ranking"], context)
        exact = next(entry for entry in entries if entry["recipe"] == EXACT)
        measures: dict[str, list[tuple[dict[str, Any], dict[str, Any], float | None]]] = {
            _ALL: [(entry, entry, entry["quality"]) for entry in entries]
        }
        of = {entry["recipe"]: entry for entry in entries}
        for cell in at_context(result["cells"], context):
            if not cell["exact_fails"]:
                measures.setdefault(cell["suite"], []).append((of[cell["recipe"]], cell, cell["score"]))
        for measure, listed in measures.items():
            known = [(entry, source, value) for entry, source, value in listed if value is not None]
            time = exact["decode_ms"]
            found = [
                {
                    "context": context,
                    "measure": measure,
                    "recipe": entry["recipe"],
                    "rank": entries.index(entry),
                    "value": value,
                    "low": source["low"],
                    "high": source["high"],
                    "bytes": entry["ratio"],
                    "time": entry["decode_ms"] / time if time else None,
                }
                for entry, source, value in known
            ]
            for name in ("bytes", "time"):
                placed = [point for point in found if point[name] is not None]
                for point, on in zip(placed, front([(point[name], point["value"]) for point in placed])):
                    point[f"{name}_front"] = on
            points += found
    return points


def _pareto(points: list[dict[str, Any]], title: str) -> dict[str, Any]:
    x = {"field": "x", "type": "quantitative", "title": title, "scale": {"type": "log", "nice": False, "padding": 24},
         "axis": {"format": "~r", "tickCount": 6}}  # fmt: skip
    y = {"field": "value", "type": "quantitative", "title": "quality, or a suite's score",
         "scale": {"zero": False, "padding": 8}}  # fmt: skip
    named = {
        "align": {"expr": "datum.align"},
        "dx": {"expr": "datum.align == 'left' ? 8 : -8"},
        "dy": -8,
        "fill": "currentColor",
        "fontSize": 12,
    }
    color = {"condition": {"test": "datum.front", "value": "#0f7fc4"}, "value": "#8a8f98"}
    tooltip = [
        {"field": "recipe", "title": "recipe"},
        {"field": "value", "title": "quality", "format": ".3f"},
        {"field": "low", "title": "from", "format": ".3f"},
        {"field": "high", "title": "to", "format": ".3f"},
        {"field": "bytes", "title": "bytes", "format": ".3f"},
        {"field": "time", "title": "decode", "format": ".2f"},
    ]
    return {
        **SIZE,
        "height": 340,
        "data": {"values": points},
        "transform": [{"filter": "datum.measure == measure && datum.context == context"}],
        "encoding": {"x": x},
        "layer": [
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "line", "interpolate": "step-after", "color": "#0f7fc4", "opacity": 0.6},
                "encoding": {"y": y, "order": {"field": "x"}},
            },
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "opacity": 0.55, "strokeWidth": 1.5},
                "encoding": {"y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": color},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {"y": y, "color": color, "tooltip": tooltip},
            },
            {
                "mark": {"type": "text", **named},
                "encoding": {
                    "y": y,
                    "text": {"field": "rank"},
                    "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.75},
                },
            },
        ],
    }


def _positions(result: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    from fivefold.evaluate.engine import CONTINUATION

    step = CONTINUATION // BINS
    rows = [
        {"context": cell["context"], "recipe": cell["recipe"], "at": f"{at * step + 1} to {(at + 1) * step}",
         "place": at, **{name: part[name] for name in _METRICS}}
        for cell in cells
        for at, part in enumerate(cell["bins"])
    ]  # fmt: skip
    recipes = [recipe for recipe in recipes_of(result) if recipe != EXACT]
    return {
        **SIZE,
        "height": 300,
        "data": {"values": rows},
        "params": [{"name": "picked", "select": {"type": "point", "fields": ["recipe"]}, "bind": "legend"}],
        "transform": [{"filter": "datum.context == context"}, {"calculate": "datum[metric]", "as": "shown"}],
        "mark": {"type": "line", "point": True, "strokeWidth": 2},
        "encoding": {
            "x": {"field": "at", "type": "ordinal", "title": "tokens behind the prefix", "sort": {"field": "place"},
                  "axis": {"labelAngle": 0}},
            "y": {"field": "shown", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "color": {"field": "recipe", "type": "nominal", "sort": recipes, "scale": {"scheme": "tableau20"},
                      "legend": {"orient": "bottom", "columns": {"expr": "width > 480 ? 2 : 1"}, "title": None}},
            "opacity": {"condition": {"param": "picked", "value": 1}, "value": 0.12},
            "tooltip": [{"field": "recipe"}, {"field": "at", "title": "tokens"},
                        {"field": "shown", "title": "figure", "format": ".4f"}],
        },
    }  # fmt: skip


def _layers(result: dict[str, Any], cells: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        {"context": cell["context"], "recipe": cell["recipe"], "layer": at, **layer}
        for cell in cells
        for at, layer in enumerate(cell["layers"])
    ]  # fmt: skip
    recipes = [recipe for recipe in recipes_of(result) if recipe != EXACT]
    return {
        **SIZE,
        "height": 26 * len(recipes),
        "data": {"values": rows},
        "transform": [{"filter": "datum.context == context"}, {"calculate": "datum[kind]", "as": "shown"}],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {"field": "layer", "type": "ordinal", "title": "layer",
                  "axis": {"labelAngle": 0, "labelOverlap": True, "domain": False, "ticks": False}},
            "y": {"field": "recipe", "type": "nominal", "title": None, "sort": recipes,
                  "axis": {"domain": False, "ticks": False}},
            "color": {"field": "shown", "type": "quantitative", "scale": {"type": "sqrt", "range": _HEAT,
                      "domainMin": 0}, "legend": {"orient": "bottom", "title": None,
                      "gradientLength": 200, "tickCount": 4}},
            "tooltip": [{"field": "recipe"}, {"field": "layer"},
                        *({"field": name, "format": ".4f"} for name in _ERRORS if name in rows[0])],
        },
    }  # fmt: skip
