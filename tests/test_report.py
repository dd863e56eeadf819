"""The HTML report: complete, harmless whatever the texts hold, and really drawn in a browser without a network."""

import json
import re

import pytest

from fivefold.evaluate import charts, html
from fivefold.evaluate.summary import EXACT, FIDELITY, OWN, summarise
from pages import DARK, NASTY, Tags, browser, contrast, harmless, probing, visit

pytest.importorskip("vl_convert")
RECIPES = ("full()", "kivi(bits=4)", "kivi(bits=2)", "streaming(sink=0, recent=8)")
FILE = "jsonl:/data/my questions.jsonl"


def fidelity_row(place, sample):
    bins = [
        {"kl": place * 0.1 * (at + 1), "top1": 1 - place * 0.1, "top5": 1.0, "perplexity": 9.0, "exact_perplexity": 9.0}
        for at in range(4)
    ]
    layers = [{"own": place * 0.05 * at, "carried": place * 0.1 * at, "lens": place * 0.01 * at} for at in range(6)]
    return {
        **bins[0], "top1": 1 - place * (0.1 + sample * 0.01), "diverges": 32 - place, "bins": bins, "layers": layers,
        "decode_ms": 10 + place, "prefill_s": 1.0, "ratio": 1 / (1 + place), "bytes": 1000, "seconds": 2.0,
    }  # fmt: skip


def question_row(place, said):
    questions = [
        {
            "question": "Which number opens the vault?",
            "answer": "12345",
            "said": said,
            "score": float(place < 3),
            "chance": 0.0,
        }
        for _ in range(4)
    ]
    return {"questions": questions, "prefill_s": 1.0, "ratio": 1 / (1 + place), "bytes": 1000, "seconds": 2.0}


@pytest.fixture(scope="module")
def result():
    found = {}
    every = list(enumerate((EXACT, *RECIPES)))
    for context in (1024, 2048):
        found[context, FIDELITY] = {
            recipe: [fidelity_row(place, sample) for sample in range(2)] for place, recipe in every
        }
        found[context, "passkey"] = {
            recipe: [question_row(place, "12345" if place < 3 else NASTY)] * 2 for place, recipe in every
        }
    found[2048, "graph"] = {EXACT: [question_row(9, "wrong")]}  # the exact cache is at chance
    found[OWN, FILE] = {recipe: [question_row(place, NASTY)] for place, recipe in every}
    about = {"line": "what it is", "kind": "generate", "source": "somebody"}
    return {
        "environment": {"model": f"model {NASTY}", "dtype": "float32", "machine": "a machine", "code": "abc"},
        "plan": {
            "recipes": list(RECIPES), "suites": [FIDELITY, "passkey", "graph", FILE], "contexts": [1024, 2048],
            "samples": 2, "seed": 7, "lens": True, "everything": False,
        },
        "suites": dict.fromkeys((FIDELITY, "passkey", "graph", FILE), about),
        **summarise(found, RECIPES),
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(result):
    return html.render(result)


def test_everything_is_in_it(page, result):
    tags = Tags(page)
    assert set(tags.sections) == {"ranking", "front", "heat", "positions", "layers", "answers", "words", "run"}
    for text in (*RECIPES, EXACT, "a machine", "my questions.jsonl", "12345", "somebody", "1,024 tokens", "abc", NASTY):
        assert text in tags.text, text
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S)[1])
    assert set(figures) == {"bytes", "time", "positions", "layers"}
    assert len(page) < 2_000_000


def test_texts_are_texts_and_nothing_is_loaded(page):
    harmless(page)


def test_plots_name_their_points_by_their_rank(page, result):
    """Names of recipes would lie over each other, and over the axis."""
    for name in ("bytes", "time"):
        figure = charts.figures_of(result)[name]
        assert "numbers are those of the ranking" in figure.caption
        texts = [layer["encoding"]["text"] for layer in figure.spec["layer"] if layer["mark"]["type"] == "text"]
        assert texts == [{"field": "rank"}]


def test_a_sweep_of_one_suite_without_fidelity_is_shown_too(result):
    found = {(512, "passkey"): {EXACT: [question_row(0, "12345")], "full()": [question_row(0, "12345")]}}
    part = {**result, **summarise(found, ("full()",))}
    tags = Tags(html.render(part))
    assert "front" in tags.sections and not {"positions", "layers"} & set(tags.sections)


# -- in a browser -----------------------------------------------------------------------------------------

PROBE = probing("""
  Object.assign(seen, {
    points: marks("bytes", "mark-symbol"),
    lines: marks("positions", "mark-line"),
    cells: marks("layers", "mark-rect"),
    times: marks("time", "mark-symbol"),
    label: getComputedStyle(document.querySelector("#plot-bytes svg .mark-text text")).fill,
  });
  const axis = () => document.querySelector("#plot-positions svg").getAttribute("aria-label") +
    document.querySelector("#plot-positions svg").textContent;
  const before = axis();
  const metric = document.querySelector('select[data-signal="metric"]');
  metric.value = "top1";
  metric.dispatchEvent(new Event("change"));
  const at = document.querySelector('#front select[data-signal="context"]');
  at.value = "2048";
  at.dispatchEvent(new Event("change"));
  const measure = document.querySelector('select[data-signal="measure"]');
  measure.value = "passkey";
  measure.dispatchEvent(new Event("change"));
  await new Promise((done) => setTimeout(done, 500));
  seen.changed = before !== axis();
  seen.still = marks("bytes", "mark-symbol");
  const first = () => document.querySelector("table.sortable tbody tr code").textContent;
  const button = document.querySelectorAll("table.sortable thead button")[3];
  button.click();
  seen.smallest = first();
  button.click();
  seen.largest = first();
  seen.sort = button.parentElement.getAttribute("aria-sort");
""")


@browser
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (500, False)])
def test_a_browser_draws_it_and_asks_for_nothing(page, tmp_path, width, dark):
    options = [DARK] if dark else []
    seen, console, asked = visit(page, tmp_path, PROBE, *options, width=width)
    assert console == [] and asked == set()
    assert seen["title"].startswith("Fivefold: model </script>")
    assert (seen["points"], seen["times"], seen["lines"], seen["cells"]) == (5, 5, 4, 24)
    assert seen["changed"] and seen["still"] == 5
    assert (seen["smallest"], seen["largest"], seen["sort"]) == (RECIPES[-1], EXACT, "descending")
    assert seen["wide"] <= 0  # tables scroll in themselves
    light = contrast(seen["paper"], seen["label"])
    assert (light[0] < light[1]) is dark and abs(light[0] - light[1]) > 400


@browser
@pytest.mark.timeout(180)
def test_the_browser_test_can_fail(page, tmp_path):
    broken = (
        page.replace("default-src 'none'; ", "")
        .replace("img-src data:", "")
        .replace("<main>", '<main><img src="http://127.0.0.1:9/x.png" alt="">')
    )
    _, console, asked = visit(
        broken.replace("const figures =", 'console.error("planted"); const figures ='), tmp_path, PROBE
    )
    assert any("planted" in line for line in console)
    assert any("127.0.0.1:9" in one for one in asked)
