"""The pictures of README "Speed on a GPU", from what `fivefold bench` wrote.

python benchmarks/plot_gpu.py docs/gpu.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import vl_convert

RESULTS = Path(__file__).parent / "results"
ORDER = [
    "full()", "kivi(bits=8)", "kivi(bits=4)", "kivi(bits=4, group=128)", "kivi(bits=3)", "kivi(bits=2)",
    "kivi(bits=2, group=128)", "duo, 1/2 of the heads",
]  # fmt: skip


def rows(name: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / name).read_text())["rows"]


def bars(values: list[dict[str, Any]], title: str, axis: str, order: list[str], colour: str) -> dict[str, Any]:
    y = {"field": "name", "type": "nominal", "sort": order, "title": None, "axis": {"labelLimit": 320}}
    x = {"field": "value", "type": "quantitative", "title": axis}
    return {
        "title": title,
        "data": {"values": values},
        "width": 330,
        "height": {"step": 19},
        "layer": [
            {"mark": {"type": "bar", "color": colour}, "encoding": {"y": y, "x": x}},
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "color": "#333"},
                "encoding": {"y": y, "x": x, "text": {"field": "label", "type": "nominal"}},
            },
        ],
    }


def main(target: str) -> None:
    kernels = [
        {"name": row["kernel"], "value": row["gain"], "label": f"{row['gain']:.2f}x"}
        for row in rows("kernels_h100.json")
        if row["context"] == 131072 and row["batch"] == 4 and row["kernel"] in ORDER
    ]
    steps = [
        {"name": f"{row['recipe']}{', graph' if row['graph'] else ''}", "value": row["ms"], "label": f"{row['ms']:.1f}"}
        for row in rows("decode_h100.json")
        if row["context"] == 131072
    ]
    capacity = rows("capacity_h100.json")
    batches = [
        {
            "name": row["recipe"],
            "value": row["tokens_s"],
            "label": f"{row['tokens_s']:,.0f} ({row['batch']} sequences)",
        }
        for row in capacity
        if row["what"] == "batch"
    ]
    contexts = {
        row["recipe"]: {
            "name": row["recipe"],
            "value": row["context"] / 1e6,
            "label": f"{row['context'] / 1e6:.2f}, {row['ms']:.0f} ms a step",
        }
        for row in capacity
        if row["what"] == "context"
    }
    panels = [
        bars(
            kernels,
            "Attention of a step, 131,072 tokens x 4",
            "times as fast as SDPA flash, bfloat16",
            ORDER,
            "#3a7ca5",
        ),
        bars(steps, "A whole step, 131,072 tokens", "milliseconds", [row["name"] for row in steps], "#8d99ae"),
        bars(batches, "Largest batch of 32,768 tokens", "tokens a second", [row["name"] for row in batches], "#81a263"),
        bars(list(contexts.values()), "Longest context", "million tokens", list(contexts), "#c97b63"),
    ]
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "concat": panels,
        "columns": 2,
        "spacing": 40,
        "config": {"view": {"stroke": None}, "axis": {"grid": False}, "background": "white"},
    }
    if target.endswith(".png"):
        Path(target).write_bytes(vl_convert.vegalite_to_png(spec, scale=1.5))
    else:
        Path(target).write_text(vl_convert.vegalite_to_svg(spec))


if __name__ == "__main__":
    main(sys.argv[1])
