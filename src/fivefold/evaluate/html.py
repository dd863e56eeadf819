"""The report of `fivefold eval --html`: one file with everything in it, which nothing is ever loaded into."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fivefold.evaluate.charts import figures_of
from fivefold.evaluate.summary import EXACT, FIDELITY
from fivefold.evaluate.tables import at_context, context_name, contexts_of, number, recipes_of, suite_name, texts
from fivefold.page import Figure, check, document, plots, sortable, sorting, table

__all__ = ["check", "render"]

_WORDS = {
    "quality": "What is left of the exact cache's score above chance, over all suites that the exact cache can do "
    "(fidelity counts by top-1 agreement); a suite weighs as much as there is to lose in it. 1 is as good as exact, "
    "0 is chance.",
    "interval": "95%, over other texts of the same kind. Shares: Wilson; means: Student's t; questions about one text "
    "count as correlated. Few texts give wide intervals.",
    "bytes": "All bytes that torch allocated for the cache behind the prefix, tables and unfilled pages included, as a "
    "share of the exact cache's.",
    "decode": "Median time of a decoding step, as a share of the exact cache's in this run.",
    "KL": "Of the next-token distribution from the exact cache's, over a real text that goes on after the prefix was "
    "compressed.",
    "front": "No other recipe is better at no more bytes (or in no more time).",
    "at chance": "The exact cache is not clearly better than chance (95% interval): that says nothing about "
    "compression, and does not count.",
}


def render(result: dict[str, Any]) -> str:
    """The page for what `fivefold.evaluate.engine.run` returned: HTML that needs no network."""
    figures = figures_of(result)
    body = (
        *_header(result),
        "<main>",
        *_ranking(result),
        *_section("front", "Quality against bytes and against time", figures, ("bytes", "time")),
        *_heat(result),
        *_ruler(result),
        *_section("positions", "Fidelity by position", figures, ("positions",)),
        *_section("layers", "Which layer breaks first", figures, ("layers",)),
        *_answers(result),
        *_words(),
        *_run(result),
        "</main>",
    )
    return document(result["environment"]["model"], ("ranking", "ranking"), body, figures)


def _header(result: dict[str, Any]) -> Iterator[str]:
    environment, plan = result["environment"], result["plan"]
    contexts = ", ".join(context_name(context).lower() for context in contexts_of(result))
    yield "<header><h1>Where each recipe breaks</h1>"
    yield (
        f"<p>{escape(environment['model'])} in {escape(environment['dtype'])}, {contexts}, "
        f"{texts(plan['samples'])} per suite, seed {plan['seed']}.</p>"
    )
    said = list(_findings(result))
    if said:
        yield f"<ul>{''.join(f'<li>{one}</li>' for one in said)}</ul>"
    yield "</header>"


def _findings(result: dict[str, Any]) -> Iterator[str]:
    """What the numbers say, in sentences."""
    for context in contexts_of(result):
        known = [entry for entry in at_context(result["ranking"], context) if entry["quality"] is not None]
        close = [entry for entry in known if entry["recipe"] != EXACT and entry["quality"] >= 0.95]
        if close:
            best = min(close, key=lambda entry: entry["ratio"])
            yield (
                f"At {context_name(context).lower()}, the smallest cache with 95% of the exact cache's quality is "
                f"<code>{escape(best['recipe'])}</code>: {number(best['ratio'], 3)} of its bytes, quality "
                f"{_interval(best, 'quality')}."
            )
        elif known:
            yield f"At {context_name(context).lower()}, no recipe keeps 95% of the exact cache's quality."
    failing = sorted({cell["suite"] for cell in result["cells"] if cell["exact_fails"]})
    if failing:
        names = escape(", ".join(map(suite_name, failing)))
        yield f"With its exact cache this model is not clearly better than chance in {names}: not counted."


def _interval(of: dict[str, Any], name: str, digits: int = 2) -> str:
    if of["low"] is None:
        return number(of[name], digits)
    value, low, high = (number(of[one], digits) for one in (name, "low", "high"))
    return f"{value} <small>({low} to {high})</small>"


def _ranking(result: dict[str, Any]) -> Iterator[str]:
    yield '<section id="ranking"><h2>Ranking</h2>'
    columns = ("#", "recipe", "quality (95% interval)", "bytes", "decode", "prefill s", "KL", "top-1", "front")
    head = sorting(columns)
    for context in contexts_of(result):
        entries = at_context(result["ranking"], context)
        exact = next(entry for entry in entries if entry["recipe"] == EXACT)
        rows = []
        for rank, entry in enumerate(entries):
            time = None if entry["decode_ms"] is None else entry["decode_ms"] / exact["decode_ms"]
            marks = [name for name in ("bytes", "time") if entry[f"{name}_front"]]
            cells = [
                sortable(rank, str(rank)),
                f'<th scope="row"><code>{escape(entry["recipe"])}</code></th>',
                sortable(entry["quality"], _bar(entry) + _interval(entry, "quality")),
                *(
                    sortable(value, number(value, digits))
                    for value, digits in (
                        (entry["ratio"], 3), (time, 2), (entry["prefill_s"], 2), (entry["kl"], 4), (entry["top1"], 3),
                    )
                ),
                sortable(-len(marks), ", ".join(marks)),
            ]  # fmt: skip
            rows.append(f"<tr>{''.join(cells)}</tr>")
        yield f"<h3>{context_name(context)}</h3>"
        yield table(f"Ranking at {context_name(context)}", head, rows, "sortable")
    yield "</section>"


def _bar(entry: dict[str, Any]) -> str:
    """The quality with its interval, to be seen at a glance."""
    if entry["quality"] is None:
        return ""
    low, high = (entry["quality"] if entry[name] is None else entry[name] for name in ("low", "high"))
    at = [100 * min(1.0, max(0.0, value)) for value in (entry["quality"], low, high)]
    return (
        f'<span class="bar" aria-hidden="true"><i style="width:{at[0]:.1f}%"></i>'
        f'<b style="left:{at[1]:.1f}%;width:{at[2] - at[1]:.1f}%"></b></span>'
    )


def _heat(result: dict[str, Any]) -> Iterator[str]:
    """Recipes by suites, and within a suite by context length."""
    place = {(cell["suite"], cell["context"], cell["recipe"]): cell for cell in result["cells"]}
    columns = list(dict.fromkeys((suite, context) for suite, context, _ in place))
    columns.sort(key=lambda column: (result["plan"]["suites"].index(column[0]), column[1]))
    suites = list(dict.fromkeys(suite for suite, _ in columns))
    top = "".join(
        f'<th scope="colgroup" colspan="{sum(one == suite for one, _ in columns)}" '
        f'title="{escape(result["suites"][suite]["line"])}">{escape(suite_name(suite))}</th>'
        for suite in suites
    )
    under = "".join(f'<th scope="col">{context_name(context)}</th>' for _, context in columns)
    rows = []
    for recipe in recipes_of(result):
        cells = [
            _heat_cell(place.get((suite, context, recipe)), place[suite, context, EXACT]) for suite, context in columns
        ]
        rows.append(f'<tr><th scope="row"><code>{escape(recipe)}</code></th>{"".join(cells)}</tr>')
    chance = [number(place[suite, context, EXACT]["chance"]) if suite != FIDELITY else "" for suite, context in columns]
    rows.append(f'<tr><th scope="row">chance</th>{"".join(f"<td>{one}</td>" for one in chance)}</tr>')
    yield '<section id="heat"><h2>Recipe by task and context length</h2>'
    yield (
        "<p>Scores with their 95% intervals: share of right answers; biography: bits recovered of each fact; fidelity: "
        "top-1 agreement. Blue is the exact cache's score, orange is chance. Hatched: the exact cache is at chance.</p>"
    )
    head = f'<tr><th rowspan="2" scope="col">recipe</th>{top}</tr><tr>{under}</tr>'
    yield table("Scores of each recipe by task and context length", head, rows, "heat sticky")
    yield "</section>"


def _ruler(result: dict[str, Any]) -> Iterator[str]:
    """The mean over RULER's kinds, where all of them were run."""
    if not result["ruler"]:
        return
    place = {(entry["recipe"], entry["context"]): entry for entry in result["ruler"]}
    contexts = list(dict.fromkeys(context for _, context in place))
    head = "".join(f'<th scope="col">{context_name(context)}</th>' for context in contexts)
    rows = []
    for recipe in recipes_of(result):
        cells = "".join(f"<td>{_interval(_percent(place[recipe, context]), 'score', 1)}</td>" for context in contexts)
        rows.append(f'<tr><th scope="row"><code>{escape(recipe)}</code></th>{cells}</tr>')
    yield '<section id="ruler"><h2>RULER average</h2>'
    yield (
        "<p>The mean score of RULER's thirteen kinds in percent, with its 95% interval. The cache is compressed before "
        "the question is read.</p>"
    )
    yield table("RULER average by context length", f'<tr><th scope="col">recipe</th>{head}</tr>', rows)
    yield "</section>"


def _percent(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: 100 * entry[name] for name in ("score", "low", "high")}


def _heat_cell(cell: dict[str, Any] | None, exact: dict[str, Any]) -> str:
    if cell is None:
        return '<td class="skipped">not run</td>'
    interval = "" if cell["low"] is None else f"<small>{number(cell['low'])} to {number(cell['high'])}</small>"
    if cell["exact_fails"]:
        return f'<td class="chance">{number(cell["score"])}{interval}</td>'
    left = (cell["score"] - cell["chance"]) / (exact["score"] - cell["chance"])
    return f'<td style="--left:{100 * min(1.0, max(0.0, left)):.0f}%">{number(cell["score"])}{interval}</td>'


def _section(name: str, title: str, figures: dict[str, Figure], which: tuple[str, ...]) -> Iterator[str]:
    """A section of plots, if there are any."""
    shown = list(plots(figures, which))
    if shown:
        yield f'<section id="{name}"><h2>{title}</h2>'
        yield from shown
        yield "</section>"


def _answers(result: dict[str, Any]) -> Iterator[str]:
    """Questions that the exact cache or a recipe got wrong, all answers side by side."""
    groups: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for cell in result["cells"]:
        if cell["suite"] != FIDELITY:
            groups.setdefault((cell["suite"], cell["context"]), {})[cell["recipe"]] = cell
    if not groups:
        return
    order = recipes_of(result)
    yield '<section id="answers"><h2>The answers themselves</h2>'
    yield "<p>Every question that was not answered rightly with all caches, with what was said with each.</p>"
    for (suite, context), of in groups.items():
        recipes = [recipe for recipe in order if recipe in of]
        cards = []
        for rows in zip(*(of[recipe]["rows"] for recipe in recipes)):
            for questions in zip(*(row["questions"] for row in rows)):
                right = [_right(question, result["suites"][suite]["kind"]) for question in questions]
                if all(right):
                    continue
                lines = "".join(
                    f'<tr class="{"right" if good else "wrong"}"><td>{"right" if good else "wrong"}</td>'
                    f"<th scope='row'><code>{escape(recipe)}</code></th>"
                    f"<td>{escape(question['said']) or '<em>nothing</em>'}</td></tr>"
                    for recipe, question, good in zip(recipes, questions, right)
                )
                asked = escape(questions[0]["question"]).replace("\n", "<br>")
                cards.append(
                    f"<article><p>{asked} <b>{escape(questions[0]['answer'].strip())}</b></p>"
                    f"<table>{lines}</table></article>"
                )
        if cards:
            many = "1 question" if len(cards) == 1 else f"{len(cards)} questions"
            name = f"{suite_name(suite)}, {context_name(context).lower()}"
            yield f"<details><summary>{escape(name)}: {many}</summary>"
            yield f'<div class="cards">{"".join(cards)}</div></details>'
    yield "</section>"


def _right(question: dict[str, Any], kind: str) -> bool:
    return question["said"] == question["answer"].strip() if kind == "bits" else question["score"] == 1


def _words() -> Iterator[str]:
    yield '<section id="words"><h2>How to read it</h2><dl>'
    for word, meaning in _WORDS.items():
        yield f"<dt>{word}</dt><dd>{meaning}</dd>"
    yield "</dl></section>"


def _run(result: dict[str, Any]) -> Iterator[str]:
    environment, plan = result["environment"], result["plan"]
    facts = {
        **environment,
        "seed": plan["seed"],
        "texts per suite and context": plan["samples"],
        "contexts": ", ".join(map(str, plan["contexts"])),
        "recipes": "; ".join(plan["recipes"]),
    }
    yield '<section id="run"><h2>What was run</h2><dl class="facts">'
    for name, value in facts.items():
        yield f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
    yield "</dl><h3>Suites</h3><dl>"
    for suite, about in result["suites"].items():
        source = f"<br><small>{escape(about['source'])}</small>" if about["source"] else ""
        yield f"<dt>{escape(suite_name(suite))}</dt><dd>{escape(about['line'])}{source}</dd>"
    yield "</dl></section>"
