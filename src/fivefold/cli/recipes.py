"""`fivefold recipes`: every method, and what cannot be combined."""

from __future__ import annotations

import json
import re
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fivefold.cli.app import PrintJsonOption
from fivefold.cli.terminal import out


def recipes(as_json: PrintJsonOption = False) -> None:
    """List every method: what it does, its parameters, and what it cannot be combined with."""
    from fivefold.recipe import describe

    methods = describe()
    if as_json:
        print(json.dumps(methods, indent=2))
        return
    intro = Text.assemble(
        "A recipe is one method, or several joined by '+', at most one per slot: ",
        ("duo(keep=0.5) + kivi(bits=2)", "bold"),
    )
    out.print(Padding(intro, (0, 1)))
    for method in methods:
        out.print(_method_panel(method))
    out.print(_refusals(methods))


def _method_panel(method: dict[str, Any]) -> Panel:
    # What is `quoted` in the docstring is bold here.
    words = re.split("`([^`]*)`", method["summary"])
    summary = Text.assemble(*((word, "bold" if number % 2 else "") for number, word in enumerate(words)))
    parts: list[Any] = [summary]
    if method["paper"]:
        parts.append(Text(method["paper"], style="dim"))
    if method["parameters"]:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=True)
        table.add_column("parameter", style="bold", no_wrap=True)
        table.add_column("default", no_wrap=True)
        table.add_column("possible", no_wrap=True)
        table.add_column("meaning", ratio=1)
        for part in method["parameters"]:
            table.add_row(part["name"], Text(repr(part["default"])), _possible(part), Text(part["help"]))
        parts += ["", table]
    slot = f"  slot {method['slot']}" if method["slot"] else ""
    title = Text.assemble((f"{method['name']}()", "bold"), slot)
    return Panel(Group(*parts), title=title, title_align="left", padding=(0, 1))


def _possible(part: dict[str, Any]) -> str:
    choices, low, high = part["choices"], part["low"], part["high"]
    if choices is not None:
        known = ", ".join(map(str, choices))
    elif low is not None:
        known = f"{low} to {high}" if high is not None else f"{low} or more"
    else:
        known = f"up to {high}" if high is not None else "see meaning"
    if part["by_layer"]:
        known += "; by layer" + ("" if part["exact"] is None else f" ({part['exact']}: exact)")
    return known


def _refusals(methods: list[dict[str, Any]]) -> Padding:
    """Which combinations are refused and why; methods of one slot once, not pair by pair."""
    lines = [Text("Refused together", style="bold")]
    slots: dict[str, list[str]] = {}
    for method in methods:
        if method["slot"]:
            slots.setdefault(method["slot"], []).append(method["name"])
    for slot, names in slots.items():
        if len(names) > 1:
            lines.append(Text(f"  {', '.join(names)}: only one can fill the slot {slot}."))
    slot_of = {method["name"]: method["slot"] for method in methods}
    told = set()
    for method in methods:
        for other in method["excludes"]:
            pair = frozenset((method["name"], other["method"]))
            if pair not in told and slot_of[method["name"]] != slot_of[other["method"]]:
                told.add(pair)
                lines.append(Text(f"  {method['name']} and {other['method']}: {other['why']}"))
    if len(lines) == 1:
        lines = [Text("Every combination of these methods is possible.")]
    return Padding(Group(*lines), (0, 1))
