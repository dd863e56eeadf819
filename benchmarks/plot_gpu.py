"""The picture of README and docs/benchmarks.md, from benchmarks/results, and one for narrow screens.

    python benchmarks/plot_gpu.py docs/gpu.svg docs/gpu-narrow.svg

Nothing depends on the width of a font: a label stands above its bar, with room for the widest of the common fonts
(`room`), and a picture in which one would not fit is not written.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MARGIN, WIDTH, GAP = 20, 460, 44
"""Around the picture, of a panel, and between two panels."""
HEAD, PITCH, BAR = 50, 35, 10
"""Heights: a panel's title and unit, a row, its bar."""
COLOURS = {"exact": "#94a3b8", "full": "#475569", "smaller": "#0d9488"}
EM = {"title": 0.72, "unit": 0.66, "name": 0.62, "value": 0.72}
"""The mean width of a letter, of the size of its font, in the widest of the common ones."""
FONT = {
    "title": "bold 17px sans-serif",
    "unit": "13px sans-serif",
    "name": "14px monospace",
    "value": "bold 14px sans-serif",
}


@dataclass(frozen=True)
class Row:
    name: str
    value: float
    shown: str


@dataclass(frozen=True)
class Panel:
    title: str
    unit: str
    rows: list[Row]

    @property
    def height(self) -> int:
        return HEAD + PITCH * len(self.rows)


def room(text: str, kind: str) -> float:
    """How wide a text can become in a wide font, such as Verdana or DejaVu Sans."""
    return EM[kind] * int(FONT[kind].split("px")[0].split()[-1]) * len(text)


def rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


def panels() -> list[Panel]:
    long = {(row["recipe"], row["graph"]): row for row in rows("decode_h100.json") if row["context"] == 131072}
    sizes = ("DynamicCache", "full()", "kivi(bits=4)", "kivi(bits=2)")
    held = [(name, long[name, False]["cache_bytes"] / 2**30) for name in sizes]
    taken = [(name, long[name, graph]["ms"]) for name, graph in (("DynamicCache", False), ("StaticCache", True))]
    fused = {row["recipe"]: row for row in rows("steps_h100.json") if row["context"] == 131072}
    taken += [(name, fused[name]["ms"]) for name in ("full()", "kivi(bits=4)", "tidal()", "kivi(bits=2)")]
    vllm = json.loads((RESULTS / "vllm_h100.json").read_text())
    kinds = {"auto": "KV cache, bfloat16", "fp8": "KV cache, fp8", "kivi(bits=4)": "kivi(bits=4)"}
    kinds |= {"kivi(bits=2)": "kivi(bits=2)"}
    loads = {row["cache"]: row for row in vllm["times"] if row["batch"] > 1}
    room_of = {row["cache"]: row["tokens"] for row in vllm["engines"]}
    most = rows("capacity_h100.json")
    batches = [row for row in most if row["what"] == "batch"]
    contexts = [row for row in most if row["what"] == "context"]
    return [
        Panel("A cache of 131,072 tokens", "GiB, less is better", [Row(name, gib, f"{gib:.1f}") for name, gib in held]),
        Panel(
            "A decoding step after 131,072 tokens",
            "milliseconds, less is better",
            [Row(name, ms, f"{ms:.1f}") for name, ms in taken],
        ),
        Panel(
            "The largest batch of 32,768 tokens",
            "tokens a second (sequences)",
            [Row(row["recipe"], row["tokens_s"], f"{row['tokens_s']:,.0f} ({row['batch']})") for row in batches],
        ),
        Panel(
            "The longest context",
            "million tokens",
            [Row(row["recipe"], row["context"] / 1e6, f"{row['context'] / 1e6:.2f}") for row in contexts],
        ),
        Panel(
            "Inside vLLM: 32,768-token requests",
            "tokens a second (requests at a time)",
            [
                Row(name, loads[key]["tokens_per_s"], f"{loads[key]['tokens_per_s']:,.0f} ({loads[key]['batch']})")
                for key, name in kinds.items()
            ],
        ),
        Panel(
            "Inside vLLM: room for",
            "million tokens",
            [Row(name, room_of[key] / 1e6, f"{room_of[key] / 1e6:.2f}") for key, name in kinds.items()],
        ),
    ]


def drawn(panel: Panel, left: int, top: int) -> list[str]:
    """A panel's elements. Raises `ValueError` where a text might not fit."""
    most = max(row.value for row in panel.rows)
    texts = [("title", panel.title, left, top + 17, "start"), ("unit", panel.unit, left, top + 37, "start")]
    made = []
    for number, row in enumerate(panel.rows):
        y = top + HEAD + PITCH * number
        if room(row.name, "name") + room(row.shown, "value") + 14 > WIDTH:
            raise ValueError(f"{row.name!r} and {row.shown!r} do not fit side by side.")
        texts += [("name", row.name, left, y + 13, "start"), ("value", row.shown, left + WIDTH, y + 13, "end")]
        kind = "exact" if "ache" in row.name else "full" if row.name.startswith("full") else "smaller"
        width = max(2.0, WIDTH * row.value / most)
        made.append(f'<rect x="{left}" y="{y + 18}" width="{width:.1f}" height="{BAR}" fill="{COLOURS[kind]}"/>')
    for kind, text, x, y, anchor in texts:
        if room(text, kind) > WIDTH:
            raise ValueError(f"{text!r} does not fit.")
        made.append(f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>')
    return made


def picture(columns: int) -> str:
    """All panels, so many side by side."""
    found, elements, top = panels(), [], MARGIN
    for first in range(0, len(found), columns):
        line = found[first : first + columns]
        for number, panel in enumerate(line):
            elements += drawn(panel, MARGIN + number * (WIDTH + GAP), top)
        top += max(panel.height for panel in line) + GAP // 2
    width, height = 2 * MARGIN + columns * WIDTH + (columns - 1) * GAP, top - GAP // 2 + MARGIN
    said = "; ".join(
        f"{panel.title}, {panel.unit}: " + ", ".join(f"{row.name} {row.shown}" for row in panel.rows) for panel in found
    )
    fills = {kind: "#475569" if kind == "unit" else "#0f172a" for kind in FONT}
    styles = "\n".join(f".{kind}{{font:{font};fill:{fills[kind]}}}" for kind, font in FONT.items())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" role="img">',
            "<title>One H100, a model of Llama-3-8B's shape</title>",
            f"<desc>{escape(said)}</desc>",
            f"<style>\n{styles}\n</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            *elements,
            "</svg>",
        ]
    )


def main(wide: str, narrow: str) -> None:
    Path(wide).write_text(picture(2) + "\n")
    Path(narrow).write_text(picture(1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
