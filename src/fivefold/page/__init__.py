"""What the HTML pages share: one file with everything in it, which nothing is ever loaded into."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fivefold.errors import InputError

_ASSETS = Path(__file__).parent / "assets"
_CONTENT = "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:"
# Text and lines take the page's colour, so that dark, light and print need no second drawing.
_CONFIG = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "axis": {
        "labelColor": "currentColor", "titleColor": "currentColor", "domainColor": "currentColor",
        "tickColor": "currentColor", "gridColor": "currentColor", "gridOpacity": 0.15, "labelFontSize": 12,
        "titleFontSize": 12, "titleFontWeight": "normal", "labelLimit": 170,
    },
    "legend": {"labelColor": "currentColor", "titleColor": "currentColor", "labelFontSize": 12, "labelLimit": 260},
    "view": {"stroke": None},
}  # fmt: skip
SIZE = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
"""Of a plot: as wide as its place on the page."""


@dataclass(frozen=True)
class Figure:
    """A plot: what it shows, its Vega-Lite specification, and the choices that steer it: by name of the parameter, a
    label and (value, label) of each option."""

    caption: str
    spec: dict[str, Any]
    choices: dict[str, tuple[str, list[tuple[Any, str]]]]

    def __post_init__(self) -> None:
        steered = [{"name": name, "value": options[0][0]} for name, (_, options) in self.choices.items()]
        self.spec.setdefault("params", []).extend(steered)
        self.spec["config"] = _CONFIG


def check() -> None:
    """Raise `InputError` if the plotting library is not installed."""
    try:
        import vl_convert  # noqa: F401
    except ImportError:
        raise InputError("the report needs the package vl-convert-python: pip install 'fivefold[report]'.") from None


def document(title: str, skip: tuple[str, str], body: Iterable[str], figures: Mapping[str, Figure]) -> str:
    """The whole page. title: text. skip: the section that a reader without a mouse may go to at once, and its name.
    body: HTML."""
    import vl_convert

    # Nothing in the data may end the script that it stands in.
    data = json.dumps({name: figure.spec for name, figure in figures.items()}, allow_nan=False).replace("<", r"\u003c")
    library = vl_convert.javascript_bundle().replace("</script", "<\\/script")  # type: ignore[call-arg]
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_CONTENT}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>Fivefold: {escape(title)}</title>",
        f"<style>{(_ASSETS / 'page.css').read_text(encoding='utf-8')}</style></head><body>",
        f'<a class="skip" href="#{skip[0]}">Skip to the {skip[1]}</a>',
        *body,
        f'<script type="application/json" id="figures">{data}</script>',
        f"<script>{library}</script><script>{script}</script></body></html>",
    ]
    return "\n".join(parts) + "\n"


def table(label: str, head: str, rows: Sequence[str], kind: str = "") -> str:
    """A table that scrolls in itself. head, rows: HTML."""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="{kind}">'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def sorting(columns: Iterable[str]) -> str:
    """The head of a table that can be sorted by each column."""
    names = "".join(f'<th scope="col"><button type="button">{escape(name)}</button></th>' for name in columns)
    return f"<tr>{names}</tr>"


def sortable(value: float | None, shown: str) -> str:
    """A cell of such a table. shown: HTML."""
    return f'<td data-value="{"" if value is None else value}">{shown}</td>'


def plots(figures: Mapping[str, Figure], which: Iterable[str]) -> Iterator[str]:
    """Those of the figures that there are, with the choices that steer them."""
    present = [one for one in which if one in figures]
    choices = {key: choice for one in present for key, choice in figures[one].choices.items() if len(choice[1]) > 1}
    if choices:
        yield '<p class="choices">'
        for key, (label, values) in choices.items():
            options = "".join(
                f'<option value="{escape(str(value))}">{escape(shown)}</option>' for value, shown in values
            )
            yield f'<label>{label} <select data-signal="{key}">{options}</select></label>'
        yield "</p>"
    if present:
        yield '<div class="plots">'
        for one in present:
            caption = escape(figures[one].caption)
            yield (
                f'<figure><div class="plot" id="plot-{one}" role="img" aria-label="{caption}"></div>'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        yield "</div>"
