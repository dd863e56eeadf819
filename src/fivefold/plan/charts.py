"""The plots of a plan's page: what they show, as Vega-Lite specifications."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, log10
from typing import Any

from fivefold.page import SIZE, Figure

# Each can be told from a white and from a black page; neighbours differ in more than hue.
COLORS = (
    "#0f7fc4", "#d9662b", "#2b9c5a", "#c2447a", "#8a63d2", "#b08a1e", "#17939a", "#c43d3d", "#7d848f", "#9a6a4a",
)  # fmt: skip
SHAPES = {
    "circle": "M4.5 0A4.5 4.5 0 1 1-4.5 0A4.5 4.5 0 1 1 4.5 0Z",
    "square": "M-4-4H4V4H-4Z",
    "triangle-up": "M0-5 5 4H-5Z",
    "diamond": "M0-6 5 0 0 6-5 0Z",
    "cross": "M-5-1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",
    "triangle-down": "M0 5-5-4H5Z",
    "triangle-right": "M5 0-4 5V-5Z",
}
"""Vega's names of them, and the same as paths for the legend."""
_HEIGHT = 320
_ASKED = {"color": "currentColor", "strokeDash": [5, 4], "opacity": 0.75}
_WORDS = {"fill": "currentColor", "fontSize": 12, "opacity": 0.9}


def look(place: int) -> tuple[str, str]:
    """Colour and shape of the recipe in a row of the table, the first one being 0: 70 can be told apart."""
    return COLORS[place % len(COLORS)], tuple(SHAPES)[place % len(SHAPES)]


def legend(rows: Sequence[dict[str, Any]], places: Iterable[int]) -> str:
    """The recipes with their numbers, colours and shapes: HTML, so that it wraps where a plot's own is cut off."""
    items = []
    for place in places:
        color, shape = look(place)
        key = (
            f'<svg viewBox="0 0 28 12" aria-hidden="true"><path d="M0 6H28" stroke="{color}" stroke-width="2"/>'
            f'<path d="{SHAPES[shape]}" transform="translate(14 6)" fill="{color}"/></svg>'
        )
        items.append(f"<li>{key}<span>{place + 1} <code>{escape(rows[place]['recipe'])}</code></span></li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def context_name(tokens: int) -> str:
    """32K, 1M; in full if it is no such number."""
    for size, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % size == 0:
            return f"{tokens // size:,}{name}"
    return f"{tokens:,}"


def figures_of(result: dict[str, Any]) -> dict[str, Figure]:
    """Each plot that there is data for, by name."""
    rows = result["rows"]
    found: dict[str, Figure] = {}
    names = [(place + 1, f"{place + 1} {row['recipe']}") for place, row in enumerate(rows)]
    choices: dict[str, tuple[str, list[tuple[Any, str]]]] = {"picked": ("Highlight", [(0, "all recipes"), *names])}
    points = [
        {**_named(place, row), "context": at["context"], "users": at["users"], "ms": at["step_ms"],
         "gib": at["bytes"] / 2**30}
        for place, row in enumerate(rows)
        for at in row["by_context"]
    ]  # fmt: skip
    users = [{**point, "y": point["users"]} for point in points if point["users"]]
    if users:
        caption = "The most users whose caches fit at once, by context. Up and right is better."
        caption += _asked_words(result) + _left_out("No user fits at any of these contexts", rows, users)
        spec = _against_context(result, users, "users", result["users"], _people(result["users"]))
        found["users"] = Figure(caption, spec, choices)
    times = [{**point, "y": point["ms"]} for point in points if point["ms"] is not None]
    if times:
        caption = "Milliseconds of a decoding step of one user, by context. Down and right is better."
        caption += _left_out("Not predicted", rows, times)
        target = result["target"] or {}
        alone = (result["users"] or 1) == 1
        most = target.get("ms") if alone else None
        spec = _against_context(result, times, "milliseconds", most, f"asked: {most:g} ms" if most else "")
        found["times"] = Figure(caption, spec, choices)
    known = [
        {**_named(place, row), "users": row["users"], **_interval(row["quality"]), "front": row["on_front"],
         "source": str(row["quality"]["source"])}
        for place, row in enumerate(rows)
        if row["quality"] is not None and row["users"]
    ]  # fmt: skip
    if any(point["kl"] for point in known):  # full() alone says nothing
        caption = (
            f"The most users that fit at {result['context']:,} tokens against the damage: KL of the next token from "
            "the exact cache's, in nats. Up and left is better; the line is the Pareto front, bars are 95% intervals, "
            "numbers are the table's."
        )
        caption += _left_out("No quality is known, or no user fits", rows, known)
        found["quality"] = Figure(caption, _quality(known), {})
    return found


def places_of(figure: Figure) -> list[int]:
    """Which rows of the table a plot shows."""
    return sorted({point["place"] - 1 for point in figure.spec["data"]["values"]})


def _named(place: int, row: dict[str, Any]) -> dict[str, Any]:
    color, shape = look(place)
    return {"place": place + 1, "recipe": row["recipe"], "color": color, "shape": shape}


def _interval(quality: dict[str, Any]) -> dict[str, Any]:
    low, high = quality["low"], quality["high"]
    return {"kl": quality["kl"], "low": None if low is None else max(0.0, low), "high": high}


def _people(users: int | None) -> str:
    return "" if users is None else f"asked: {users:,} user{'' if users == 1 else 's'}"


def _asked_words(result: dict[str, Any]) -> str:
    return " Dashed: what was asked for." if result["users"] is not None else " Dashed: the context asked for."


def _left_out(why: str, rows: Sequence[dict[str, Any]], points: Sequence[dict[str, Any]]) -> str:
    there = {point["place"] for point in points}
    names = [f"{place} {row['recipe']}" for place, row in enumerate(rows, 1) if place not in there]
    return f" {why}: {'; '.join(names)}." if names else ""


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Round numbers from the last one that is not above `low` to the first not below `high`, the fewer the wider that
    is. whole: no fractions."""
    spread = log10(high / low)
    if spread < 0.2:  # in equal steps
        rough = max((high - low) / 3, high / 20)
        step = next(each for each in _round(rough, rough, (1, 2, 5)) if each >= rough)
        step = max(1.0, step) if whole else step
        first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
        first = first if first > 0 else 1
        return [float(f"{at * step:.12g}") for at in range(first, max(last, first + 1) + 1)]
    each = (1, 1.5, 2, 3, 4, 6, 8) if spread < 0.8 else (1, 2, 5) if spread < 2.5 else (1,)
    every = [value for value in _round(low, high, each) if not whole or value == int(value)]
    start = max((at for at, value in enumerate(every) if value <= low), default=0)
    end = min(at for at, value in enumerate(every) if value >= high and at > start)
    return every[start : end + 1]


def _round(low: float, high: float, digits: Sequence[float]) -> list[float]:
    """Numbers of one digit about a range, and beyond it on both sides."""
    decades = range(int(log10(low)) - 2, int(log10(high)) + 3)
    return [float(f"{digit}e{decade}") for decade in decades for digit in digits]


_COLOR = {"field": "color", "type": "nominal", "scale": None, "legend": None}


def _logarithmic(field: str, title: str, marks: Sequence[float], padding: int) -> dict[str, Any]:
    """A logarithmic axis upwards, from the first to the last of its marks."""
    return {
        "field": field, "type": "quantitative", "title": title,
        "scale": {"type": "log", "domain": [marks[0], marks[-1]], "nice": False, "padding": padding},
        "axis": {"values": marks, "format": ",~r", "labelOverlap": False},
    }  # fmt: skip


def _against_context(
    result: dict[str, Any], points: list[dict[str, Any]], title: str, level: float | None, words: str
) -> dict[str, Any]:
    """`y` by context, both logarithmic. level: what was asked of y, if anything, and `words` for it."""
    contexts = sorted({point["context"] for point in points})
    asked = result["context"]
    ends = [min(asked, *contexts), max(asked, *contexts)]
    if ends[0] == ends[1]:
        ends = [ends[0] / 2, ends[1] * 2]
    values = [point["y"] for point in points] + ([level] if level else [])
    marks = ticks(min(values), max(values), whole=title == "users")
    names = {str(context): context_name(context) for context in contexts}
    x = {
        "field": "context", "type": "quantitative", "title": "tokens of context",
        "scale": {"type": "log", "base": 2, "domain": ends, "nice": False, "padding": 10},
        "axis": {"values": contexts, "labelExpr": f"{_literal(names)}['' + datum.value]", "labelOverlap": "greedy",
                 "labelFlush": False, "grid": False},
    }  # fmt: skip
    y = _logarithmic("y", title, marks, 8)
    dimmed = {"condition": {"test": "picked == 0 || datum.place == picked", "value": 1}, "value": 0.12}
    common = {"x": x, "y": y, "color": _COLOR, "opacity": dimmed}
    tooltip = [
        {"field": "recipe"},
        {"field": "context", "title": "tokens", "format": ","},
        {"field": "users", "title": "most users", "format": ","},
        {"field": "ms", "title": "ms, one user", "format": ".2f"},
        {"field": "gib", "title": "GiB a user", "format": ".3f"},
    ]
    left = asked <= (ends[0] * ends[1]) ** 0.5
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line", "strokeWidth": 2}, "encoding": {**common, "detail": {"field": "place"}}},
        {
            "mark": {"type": "point", "filled": True, "size": 60},
            "encoding": {**common, "shape": {"field": "shape", "scale": None, "legend": None}, "tooltip": tooltip},
        },
        _only({"x": asked}, {"mark": {"type": "rule", **_ASKED}, "encoding": {"x": {**x, "field": "x"}}}),
        _only(
            {"x": asked, "said": f"asked: {context_name(asked)}"},
            {
                "mark": {"type": "text", "align": "left" if left else "right", "dx": 5 if left else -5, "dy": -8,
                         "clip": False, **_WORDS},
                "encoding": {"x": {**x, "field": "x"}, "y": {"value": 0}, "text": {"field": "said"}},
            },
        ),
    ]  # fmt: skip
    if level:
        layers += [
            _only({"y": level}, {"mark": {"type": "rule", **_ASKED}, "encoding": {"y": y}}),
            _only(
                {"y": level, "said": words},
                {
                    "mark": {"type": "text", "align": "left", "dx": 4, "dy": -8, **_WORDS},
                    "encoding": {"x": {"value": 0}, "y": y, "text": {"field": "said"}},
                },
            ),
        ]
    return {**SIZE, "height": _HEIGHT, "data": {"values": points}, "layer": layers}


def _only(point: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """A layer of one point of its own."""
    return {"data": {"values": [point]}, **layer}


def _literal(names: dict[str, str]) -> str:
    """A lookup as Vega's expressions write it; keys and values are numbers and units."""
    return "{" + ", ".join(f"'{key}': '{value}'" for key, value in names.items()) + "}"


def _quality(points: list[dict[str, Any]]) -> dict[str, Any]:
    people = ticks(min(point["users"] for point in points), max(point["users"] for point in points), whole=True)
    damage = [value for point in points for value in (point["kl"], point["low"], point["high"]) if value]
    least = min((point["kl"] for point in points if point["kl"]), default=1e-4)
    most = max(damage, default=1e-3)
    # No damage at all has a place too, which a logarithm has not.
    shown = [0.0, *(one for one in ticks(least, max(most, 2 * least)) if least <= one <= most * 1.15)]
    x = {
        "field": "kl", "type": "quantitative", "title": "KL, nats",
        "scale": {"type": "symlog", "constant": least, "domain": [0, most * 1.15], "nice": False, "padding": 12},
        "axis": {"values": shown, "format": "~g", "labelOverlap": "greedy", "labelFlush": False},
    }  # fmt: skip
    y = _logarithmic("users", "users", people, 12)
    tooltip = [
        {"field": "recipe"},
        {"field": "users", "title": "most users", "format": ","},
        {"field": "kl", "title": "KL", "format": ".5f"},
        {"field": "low", "title": "from", "format": ".5f"},
        {"field": "high", "title": "to", "format": ".5f"},
        {"field": "source", "title": "measured in"},
    ]
    return {
        **SIZE,
        "height": _HEIGHT,
        "data": {"values": points},
        "layer": [
            {
                "transform": [{"filter": "datum.front"}],
                "mark": {"type": "line", "interpolate": "step-after", "color": "currentColor", "opacity": 0.5},
                "encoding": {"x": x, "y": y, "order": {"field": "kl"}},
            },
            {
                "transform": [{"filter": "isValid(datum.low) && isValid(datum.high)"}],
                "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.7},
                "encoding": {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": _COLOR},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "x": x, "y": y, "color": _COLOR, "tooltip": tooltip,
                    "shape": {"field": "shape", "scale": None, "legend": None},
                },
            },
            {
                "mark": {"type": "text", "dy": -13, "fill": "currentColor", "fontSize": 12},
                "encoding": {
                    "x": x, "y": y, "text": {"field": "place"},
                    "opacity": {"condition": {"test": "datum.front", "value": 1}, "value": 0.7},
                },
            },
        ],
    }  # fmt: skip
