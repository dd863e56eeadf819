"""The page of `fivefold plan --html`: what fits, how fast, at what quality, and how each number was made."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fivefold.page import Figure, check, document, plots, sortable, sorting, table
from fivefold.plan.charts import figures_of, legend, places_of

__all__ = ["check", "render"]

UNKNOWN = '<small class="unknown">unknown</small>'
_WEIGHTS, _WORKING, _CACHE, _EMPTY = "weights", "working memory", "cache", "unused"
_PARTS = {
    "exact": ("exact pages", "#0f7fc4"),
    "codes": ("codes", "#2b9c5a"),
    "scales": ("scales", "#b08a1e"),
    "other": ("other fields", "#8a63d2"),
    "sliding": ("sliding layers", "#17939a"),
    "learned": ("learned bases", "#c2447a"),
    "statistics": ("statistics", "#d9662b"),
    "tables": ("page tables", "#9a6a4a"),
    "slack": ("unfilled slots", "#5aa9d6"),
    "free": ("free pages", "#a9cbe0"),
    "graph": ("captured steps", "#7aa86f"),
    "forks": ("forks", "#b7b03a"),
    "host": ("host memory", "#b58ac9"),
}
"""Name and colour of each part of a cache, in the order of the bar."""
_OTHERS = ("#c43d3d", "#e0a3a3")
_TERMS = {"terms": "decoding step", "first_terms": "first token", "switch_terms": "change of sessions"}
_WANTED = {
    "ms": "a decoding step in at most {:g} ms",
    "tokens_s": "at least {:,g} tokens a second",
    "users": "at least {:g} users",
    "first_s": "the first token in at most {:g} s",
    "kl": "a KL of at most {:g} nats",
}
"""What a target asks for, by its name."""
_NOBODY = '0 <small class="no">does not fit</small>'
_RUNS = {"python": "In Python", "generate": "On the command line", "vllm": "With vLLM"}


def render(result: dict[str, Any]) -> str:
    """The page for the result of a plan, a dict as `fivefold plan --json` writes it: HTML that needs no network."""
    figures = figures_of(result)
    body = (
        *_header(result),
        "<main>",
        *_chosen(result),
        *_pictures(result, figures),
        *_memory(result),
        *_quality(result, figures),
        *_rows(result),
        *_made(result),
        "</main>",
    )
    return document(f"a plan for {result['model']['name']}", ("rows", "table"), body, figures)


# -- numbers ----------------------------------------------------------------------------------------------


def _digits(value: float) -> str:
    """Three digits that count, and every whole one."""
    places = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value + 0.0:,.{places}f}"


def size(nbytes: float) -> str:
    """Bytes as GiB; as MiB where that would be nearly nothing."""
    return f"{_digits(nbytes / 2**30)} GiB" if abs(nbytes) >= 0.1 * 2**30 else f"{_digits(nbytes / 2**20)} MiB"


def milliseconds(value: float) -> str:
    return f"{_digits(value)} ms"


def seconds(value: float) -> str:
    """As seconds; as milliseconds where that would be nearly nothing."""
    return f"{_digits(value)} s" if value >= 0.1 else milliseconds(1000 * value)


def rate(value: float, unit: str) -> str:
    """So many of a unit a second, with a power of 1000."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{_digits(value / power)} {letter}{unit}/s"
    return f"{_digits(value)} {unit}/s"


def people(users: int) -> str:
    return f"{users:,} user{'' if users == 1 else 's'}"


# -- the sections, from the top ---------------------------------------------------------------------------


def _header(result: dict[str, Any]) -> Iterator[str]:
    model, machine = result["model"], result["machine"]
    asked = f"{model['name']} ({model['dtype']}, {size(model['weight_bytes'])} of weights) on "
    asked += f"{machine['name']}" if result["gpus"] == 1 else f"{result['gpus']} GPUs {machine['name']}"
    if result["replicas"] > 1:
        asked += f" as {result['replicas']} replicas"
    asked += f", {result['context']:,} tokens of context"
    if result["users"] is not None:
        asked += f" for {people(result['users'])}"
    target = result["target"] or {}
    wanted = [form.format(target[name]) for name, form in _WANTED.items() if target.get(name) is not None]
    if wanted:
        asked += ", with " + " and ".join(wanted)
    yield "<header><h1>What fits, how fast, and at what quality</h1>"
    yield f"<p>Asked: {escape(asked)}.</p>"
    yield f'<p class="said"><strong>{escape(result["said"])}</strong></p>'
    yield "</header>"


def _chosen(result: dict[str, Any]) -> Iterator[str]:
    """The recipe to take, what it gives, and the lines that run it."""
    chosen, run = result["chosen"], result.get("run") or {}
    yield '<section id="chosen">'
    if chosen is None:
        yield "<h2>No recipe is chosen</h2>"
    else:
        yield f"<h2>Chosen: <code>{escape(chosen)}</code></h2>"
    row = next((row for row in result["rows"] if row["recipe"] == chosen), None)
    if row is not None:
        facts = {
            "cache of a user": f"{size(row['bytes'])}, {row['ratio']:.3f} of the exact cache's",
            "most users": f"{row['users']:,} at {result['context']:,} tokens",
            "longest context": f"{row['longest']:,} tokens for {people(result['users'] or 1)}",
            "decoding step": _or_unknown(row["step_ms"], milliseconds) + f" for {people(result['users'] or 1)}",
            "tokens a second": _or_unknown(row["tokens_s"], _digits) + f" for {people(row['users'])}",
            "quality": _damage(row["quality"]) if row["quality"] is None else "KL " + _damage(row["quality"]),
        }
        yield '<dl class="facts">'
        for name, value in facts.items():
            yield f"<dt>{name}</dt><dd>{value}</dd>"
        yield "</dl>"
    for name, lines in run.items():
        if lines is not None:
            yield f"<h3>{escape(_RUNS.get(name, name))}</h3>"
            yield f'<div class="copied"><pre class="copy" tabindex="0">{escape(lines)}</pre></div>'
    yield "</section>"


def _or_unknown(value: float | None, shown: Any) -> str:
    return UNKNOWN if value is None else str(shown(value))


def _damage(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return UNKNOWN
    low, high = quality["low"], quality["high"]
    interval = "" if low is None or high is None else f" <small>({low:.4f} to {high:.4f})</small>"
    return f"{quality['kl']:.4f}{interval}"


def _pictures(result: dict[str, Any], figures: dict[str, Figure]) -> Iterator[str]:
    shown = list(plots(figures, ("users", "times")))
    if shown:
        yield '<section id="context"><h2>Users and time, by context</h2>'
        yield from shown
        places = {place for name in ("users", "times") if name in figures for place in places_of(figures[name])}
        yield legend(result["rows"], sorted(places))
        yield "</section>"


def _memory(result: dict[str, Any]) -> Iterator[str]:
    """A bar for each recipe, of HTML: its words wrap, and it needs no script."""
    usable, asked = result["memory"]["usable"], result["users"]
    bars = [_parts(result, row, asked or row["users"] or 1) for row in result["rows"]]
    totals = [sum(nbytes for _, _, nbytes in bar) for bar in bars]
    # What needs far more than there is must not make all others too small to be seen.
    widest = min(max(totals, default=usable), 1.5 * usable)
    scale = max(usable * 1.02, widest * 1.02)
    whose = f"{people(asked)} at" if asked else "the most users that fit at"
    where = f", on each of the {result['gpus']} GPUs" if result["gpus"] > 1 else ""
    yield '<section id="memory"><h2>Memory</h2>'
    yield (
        f"<p>Weights, working memory (a chunk of a prompt, and the captured step), and the caches of {whose} "
        f"{result['context']:,} tokens, by what they hold{where}. The mark is the usable memory, {size(usable)}.</p>"
    )
    colors = {name: color for bar in bars for name, color, _ in bar}
    order = [_WEIGHTS, _WORKING, _CACHE, *(name for name, _ in _PARTS.values())]
    colors = dict(sorted(colors.items(), key=lambda one: order.index(one[0]) if one[0] in order else len(order)))
    keys = "".join(
        f'<li><span class="swatch" style="background:{color}"></span>{escape(name)}</li>'
        for name, color in colors.items()
    )
    yield f'<ul class="legend">{keys}<li><span class="swatch empty"></span>{_EMPTY}</li></ul><ul class="memory">'
    for place, (row, bar, total) in enumerate(zip(result["rows"], bars, totals), 1):
        users = asked or row["users"] or 1
        left = usable - total
        if users > row["users"]:
            more = f": {size(-left)} more than there is" if left < 0 else ""
            fits = f'<span class="no">does not fit{more}</span>'
        else:
            fits = f"{size(max(0.0, left))} unused"
        parts = ", ".join(f"{name} {size(nbytes)}" for name, _, nbytes in bar)
        pieces, at = [], 0.0
        for name, color, nbytes in bar:
            share = 100 * nbytes / scale
            said = escape(f"{name}: {size(nbytes)}")
            pieces.append(f'<i style="left:{at:.3f}%;width:{share:.3f}%;background:{color}" title="{said}"></i>')
            at += share
        end = 100 * usable / scale
        if left > 0:
            pieces.append(
                f'<i class="empty" style="left:{at:.3f}%;width:{max(0.0, end - at):.3f}%" '
                f'title="{_EMPTY}: {size(left)}"></i>'
            )
        yield (
            f"<li><p>{place} <code>{escape(row['recipe'])}</code>: {people(users)}, {size(total)}; {fits}</p>"
            f'<div class="bars" role="img" aria-label="{escape(parts)}"><span>{"".join(pieces)}</span>'
            f'<b style="left:{end:.3f}%"></b></div></li>'
        )
    yield "</ul></section>"


def _parts(result: dict[str, Any], row: dict[str, Any], users: int) -> list[tuple[str, str, float]]:
    """Name, colour and bytes of all that a recipe's memory holds on a GPU, for so many users."""
    memory, parts = result["memory"], row["parts"]
    share = memory.get("share", 1 / result["gpus"])
    bar: list[tuple[str, str, float]] = [
        (_WEIGHTS, "#6b7280", memory["weights"]),
        (_WORKING, "#a3a9b3", memory["working"]),
    ]
    if not parts:
        return [*bar, (_CACHE, _PARTS["exact"][1], share * users * row["bytes"])]
    others = [name for name in parts if name not in _PARTS]
    for name in (*_PARTS, *others):
        if parts.get(name):
            shown, color = _PARTS.get(name) or (name, _OTHERS[others.index(name) % len(_OTHERS)])
            many = 1 if name == "free" else users  # all users share the pages that are free
            bar.append((shown, color, share * many * parts[name]))
    return bar


def _quality(result: dict[str, Any], figures: dict[str, Figure]) -> Iterator[str]:
    shown = list(plots(figures, ("quality",)))
    if shown:
        yield '<section id="quality"><h2>Users against quality</h2>'
        yield from shown
        yield legend(result["rows"], places_of(figures["quality"]))
        yield "</section>"


def _rows(result: dict[str, Any]) -> Iterator[str]:
    """All rows, in the order they come in."""
    users, target = result["users"] or 1, result["target"]
    columns = [
        "#", "recipe", "bytes a user", "of exact", "most users", f"longest context, {people(users)}",
        f"step, {people(users)}", "step, most users", "tokens/s, most users", "first token", "change of sessions",
        "bound by", "KL (95% interval)", "front",
    ]  # fmt: skip
    if target:
        columns.append("meets the target")
    rows = []
    for place, row in enumerate(result["rows"], 1):
        quality = row["quality"]
        cells = [
            sortable(place, str(place)),
            f'<th scope="row"><code>{escape(row["recipe"])}</code></th>',
            sortable(row["bytes"], size(row["bytes"])),
            sortable(row["ratio"], f"{row['ratio']:.3f}"),
            sortable(row["users"], f"{row['users']:,}" if row["users"] else _NOBODY),
            sortable(row["longest"], _or_unknown(row["longest"], "{:,}".format)),
            sortable(row["step_ms"], _or_unknown(row["step_ms"], milliseconds)),
            sortable(row["step_ms_most"], _or_unknown(row["step_ms_most"], milliseconds)),
            sortable(row["tokens_s"], _or_unknown(row["tokens_s"], _digits)),
            sortable(row["first_s"], _or_unknown(row["first_s"], seconds)),
            sortable(row["switch_s"], _or_unknown(row["switch_s"], seconds)),
            f"<td>{UNKNOWN if row['bound'] is None else escape(row['bound'])}</td>",
            sortable(None if quality is None else quality["kl"], _damage(quality)),
            sortable(-int(row["on_front"]), "yes" if row["on_front"] else ""),
        ]
        if target:
            cells.append(sortable(None if row["meets"] is None else -int(row["meets"]), _meets(row["meets"])))
        mark = ' class="chosen"' if row["recipe"] == result["chosen"] else ""
        rows.append(f"<tr{mark}>{''.join(cells)}</tr>")
    yield f'<section id="rows"><h2>All recipes at {result["context"]:,} tokens</h2>'
    yield table("All recipes", sorting(columns), rows, "sortable sticky wide")
    whose: dict[str, list[str]] = {}
    for place, row in enumerate(result["rows"], 1):
        for note in _notes(row):
            whose.setdefault(note, []).append(f"{place} <code>{escape(row['recipe'])}</code>")
    notes = [f"<li>{', '.join(names)}: {escape(note)}</li>" for note, names in whose.items()]
    if notes:
        yield f'<h3>Notes</h3><ul class="notes">{"".join(notes)}</ul>'
    known = [row["quality"] for row in result["rows"] if row["quality"] is not None and row["quality"]["kl"]]
    sources = sorted({str(quality["source"]) for quality in known})
    if sources:
        yield f"<p>Quality is measured, never predicted: {escape('; '.join(sources))}.</p>"
    yield "</section>"


def _notes(row: dict[str, Any]) -> list[str]:
    missed = row.get("why_not")
    return [*row["notes"], *([f"Misses the target: {'; '.join(missed)}."] if missed else [])]


def _meets(meets: bool | None) -> str:
    if meets is None:
        return UNKNOWN
    return '<span class="yes">yes</span>' if meets else '<span class="no">no</span>'


def _made(result: dict[str, Any]) -> Iterator[str]:
    """The constants, the model, and each recipe's step, term by term."""
    machine, model, memory = result["machine"], result["model"], result["memory"]
    yield '<section id="made"><h2>How these numbers were made</h2>'
    yield (
        "<p>Bytes are those that the cache's own code takes for such a model. Times are predicted: what a step reads "
        "over how fast the machine reads it, term by term.</p>"
    )
    yield "<h3>The machine</h3>"
    yield from _facts(
        {
            "name": f"{result['gpus']} x {machine['name']}" if result["gpus"] > 1 else machine["name"],
            "memory": f"{size(machine['memory'])}, of which usable {size(machine['usable'])}",
            "bandwidth": rate(machine["bandwidth"], "B"),
            "products": rate(machine["products"], "FLOP"),
            "constants": "measured on such a machine" if machine["measured"] else "not measured: from a data sheet",
            "date": machine["date"],
            "source": machine["source"],
        }
    )
    yield "<h3>The model</h3>"
    layers = ", ".join(f"{count} {kind}" for kind, count in model["layers"].items() if count)
    facts = {
        "name": model["name"],
        "family": model["family"],
        "layers": layers,
        "parameters": f"{model['parameters']:,}",
        "weights": f"{size(model['weight_bytes'])} in {model['dtype']}",
        "longest context": "unknown" if model["context"] is None else f"{model['context']:,} tokens",
        "weights are": "as its files say" if model["measured"] else "worked out from its configuration",
        "working memory": size(memory["working"]),
    }
    if not model["counted"]:
        facts["not certain"] = "only rough: not all of its weights and states are known"
    if model["why_not"] is not None:
        facts["recipes"] = f"none but full(): {model['why_not']}"
    yield from _facts(facts)
    yield f"<h3>A decoding step of {people(result['users'] or 1)} at {result['context']:,} tokens</h3>"
    for place, row in enumerate(result["rows"], 1):
        yield from _terms(place, row)
    yield "</section>"


def _facts(facts: dict[str, Any]) -> Iterator[str]:
    yield '<dl class="facts">'
    for name, value in facts.items():
        yield f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
    yield "</dl>"


def _terms(place: int, row: dict[str, Any]) -> Iterator[str]:
    said = "not predicted" if row["step_ms"] is None else milliseconds(row["step_ms"])
    bound = f", bound by {escape(row['bound'])}" if row["bound"] is not None and row["terms"] else ""
    yield f"<details><summary>{place} <code>{escape(row['recipe'])}</code>: {said}{bound}</summary>"
    yield '<div class="inside">'
    if not row["terms"]:
        yield "<p>A decoding step is not predicted.</p>"
    for name, title in _TERMS.items():
        if row.get(name):
            lines = [
                f'<tr><th scope="row">{escape(term["name"])}</th><td>{escape(term["formula"])}</td>'
                f"<td>{seconds(term['seconds'])}</td><td>{escape(term['bound'])}</td></tr>"
                for term in row[name]
            ]
            total = seconds(sum(term["seconds"] for term in row[name]))
            lines.append(f'<tr><th scope="row"><strong>in all</strong></th><td></td><td>{total}</td><td></td></tr>')
            names = "".join(f'<th scope="col">{column}</th>' for column in (title, "formula", "time", "bound by"))
            yield table(f"{title} of {row['recipe']}", f"<tr>{names}</tr>", lines, "terms")
    for note in row["notes"]:
        yield f"<p>{escape(note)}</p>"
    yield "</div></details>"
