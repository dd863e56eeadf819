"""The page of a plan: complete, harmless whatever the names hold, and really drawn in a browser without a network."""

import copy
import json
import re
import sys

import pytest

from fivefold import page as shared
from fivefold.errors import InputError
from fivefold.plan import charts, html
from pages import DARK, NASTY, Tags, browser, contrast, harmless, probing, visit

pytest.importorskip("vl_convert")
GIB = 2**30
TOKEN = 2**17
"""Bytes that a token of Llama-3.1-8B takes in an exact cache."""
USABLE, WEIGHTS, WORKING = int(23.1 * GIB), 16_060_522_496, int(0.85 * GIB)
CONTEXT = 65536
CONTEXTS = tuple(2**power for power in range(12, 19))
LONG = "duo(keep=0.34) + tidal(select=2, keep=0.125) + rotatekv(bits=4)"
RECIPES = {
    # of the exact cache's bytes, of which codes and scales; of its bytes read by a step; KL
    "full()": (1.0, 0.0, 0.0, 1.0, 0.0),
    "kivi(bits=8)": (0.542, 0.5, 0.031, 0.542, 0.0004),
    "kivi(bits=4)": (0.293, 0.25, 0.031, 0.293, 0.0031),
    "kivi(bits=2)": (0.168, 0.125, 0.031, 0.168, 0.0472),
    "gear(bits=2)": (0.214, 0.125, 0.04, None, 0.0129),
    "snapkv(keep=0.2)": (0.203, 0.0, 0.0, 0.203, 0.0618),
    LONG: (0.131, 0.08, 0.012, 0.05, None),
    "streaming(sink=4, recent=1020)": (0.0157, 0.0, 0.0, 0.0157, 0.412),
}
TITLES = ("bytes a user", "most users", "step, 2 users", "first token", "KL (95% interval)", "meets the target")


def step_ms(read, context, users):
    """16 GB of weights and the caches over 0.93 TB/s, and two milliseconds for all else."""
    return None if read is None else (WEIGHTS + read * context * TOKEN * users) / 0.93e12 * 1000 + 2.1


def row(recipe, ratio, codes, scales, read, kl):
    def cache(context):
        held = min(ratio * context, 1024) if "streaming" in recipe else ratio * context
        return int(TOKEN * held) + 3_000_000

    def most(context):
        return int((USABLE - WEIGHTS - WORKING) // cache(context))

    whole, users = CONTEXT * TOKEN, most(CONTEXT)
    parts = {
        "exact": int(whole * (ratio - codes - scales) * 0.9), "codes": int(whole * codes),
        "scales": int(whole * scales), "other": 0, "learned": 1_900_000 if "rotatekv" in recipe else 0,
        "statistics": 90_000, "slack": int(whole * (ratio - codes - scales) * 0.1), "free": 0, "sliding": 0,
        "tables": 300_000,
    }  # fmt: skip
    step = step_ms(read, CONTEXT, 2) if users else None
    full = step_ms(read, CONTEXT, users) if users else None
    notes = ["No kernel attends to its pages: a step is not predicted."] if read is None else []
    if not users:
        notes.append("One user's cache is larger than what the weights leave.")
    return {
        "recipe": recipe, "bytes": cache(CONTEXT), "parts": parts, "ratio": cache(CONTEXT) / whole, "users": users,
        "longest": int((USABLE - WEIGHTS - WORKING) / 2 / ratio / TOKEN), "step_ms": step, "step_ms_most": full,
        "tokens_s": users * 1000 / full if full else None, "first_s": None if read is None else 9.84,
        "switch_s": None if read is None else cache(CONTEXT) / 22e9, "bound": None if read is None else "bandwidth",
        "quality": None if kl is None else {"kl": kl, "low": kl * 0.8, "high": kl * 1.3, "source": "results.json"},
        "notes": notes, "on_front": recipe not in ("gear(bits=2)", "snapkv(keep=0.2)", LONG),
        "meets": None if read is None else bool(users >= 2 and step <= 25),
        "terms": [] if step is None else [
            {"name": "weights", "seconds": WEIGHTS / 0.93e12, "formula": "14.96 GiB / 0.93 TB/s", "bound": "bandwidth"},
            {"name": "attention, exact", "seconds": 2 * read * whole / 0.93e12,
             "formula": f"{2 * read * whole / GIB:.2f} GiB / (0.92 of 1.01 TB/s)", "bound": "bandwidth"},
            {"name": "host and gaps", "seconds": 0.0021, "formula": "1.7 ms + 2 sequences x 0.2 ms",
             "bound": "launches"},
        ],
        "first_terms": [{"name": "products", "seconds": 9.84, "formula": "2 x 8e9 weights", "bound": "compute"}],
        "by_context": [
            {"context": context, "users": most(context), "step_ms": step_ms(read, context, 1), "bytes": cache(context)}
            for context in CONTEXTS
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def result():
    return {
        "model": {
            "name": "meta-llama/Llama-3.1-8B", "family": "llama", "layers": {"full": 32, "sliding": 0},
            "parameters": 8_030_261_248, "weight_bytes": WEIGHTS, "dtype": "bfloat16", "context": 131072,
            "measured": True, "counted": True, "why_not": None,
        },
        "machine": {
            "name": "RTX 4090 24GB", "memory": 24 * GIB, "usable": USABLE, "bandwidth": 0.93e12, "products": 165e12,
            "date": "2025-02-01", "source": "data sheet; efficiencies as measured on an H100 80GB", "measured": False,
        },
        "gpus": 1, "replicas": 1, "context": CONTEXT, "users": 2,
        "target": {"ms": 25.0, "tokens_s": None, "users": 2, "first_s": None, "kl": 0.01},
        "memory": {"usable": USABLE, "weights": WEIGHTS, "working": WORKING},
        "rows": [row(recipe, *numbers) for recipe, numbers in RECIPES.items()],
        "chosen": "kivi(bits=4)",
        "said": "kivi(bits=4) keeps 2 users of 65,536 tokens on this GPU, where the exact cache has room for none.",
        "run": {
            "python": "import fivefold\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-3.1-8B", dtype="bfloat16")\n'
            'cache = fivefold.cache(model, "kivi(bits=4)")',
            "generate": 'fivefold generate --model meta-llama/Llama-3.1-8B --recipe "kivi(bits=4)" "Once upon a time"',
            "vllm": None,
        },
    }  # fmt: skip


@pytest.fixture(scope="module")
def page(result):
    return html.render(result)


@pytest.fixture(scope="module")
def nasty(result):
    """The same with texts that would break a page wherever a text may stand."""
    found = copy.deepcopy(result)
    for name in ("name", "family", "dtype"):
        found["model"][name] += NASTY
    found["model"].update(why_not=NASTY, counted=False, measured=False, context=None, layers={NASTY: 2})
    for name in ("name", "date", "source"):
        found["machine"][name] += NASTY
    found["said"] += NASTY
    found["run"] = dict.fromkeys(("python", "generate", "vllm", NASTY), NASTY)
    for one in found["rows"]:
        one["recipe"] += NASTY
        one["notes"] = [NASTY]
        one["bound"] = NASTY
        one["parts"][NASTY] = 10**9
        if one["quality"] is not None:
            one["quality"]["source"] = NASTY
        for term in (*one["terms"], *one["first_terms"]):
            term.update(name=NASTY, formula=NASTY, bound=NASTY)
    found["chosen"] = found["rows"][2]["recipe"]
    return found


def drawn(page):
    return json.loads(re.search(r'id="figures">(.*?)</script>', page, re.S)[1])


def test_everything_is_in_it(page, result):
    tags = Tags(page)
    assert tags.sections == ["chosen", "context", "memory", "quality", "rows", "made"]
    texts = (
        *RECIPES, *TITLES, result["said"], *filter(None, result["run"].values()),
        "65,536 tokens of context for 2 users",
        "with a decoding step in at most 25 ms and at least 2 users and a KL of at most 0.01 nats",
        "930 GB/s", "165 TFLOP/s", "2025-02-01", result["machine"]["source"],
        "not measured: from a data sheet", "32 full", "14.96 GiB / 0.93 TB/s", "No kernel attends to its pages",
        "as its files say", "results.json", "0 does not fit",
    )  # fmt: skip
    for text in texts:
        assert text in tags.text.replace("0.93 TB/s", "930 GB/s") or text in tags.text, text
    assert set(drawn(page)) == {"users", "times", "quality"}
    assert len(page) < 2_000_000


def test_texts_are_texts_and_nothing_is_loaded(page, nasty):
    harmless(page)
    broken = html.render(nasty)
    harmless(broken)
    assert Tags(broken).text.count("nowhere.invalid") > 100


def test_what_is_not_known_is_said_so(page, result):
    cells = dict(re.findall(r'<tr(?: class="chosen")?><td data-value="(\d)">\d</td>(.*?)</tr>', page))
    assert len(cells) == len(RECIPES)
    unknown = {place: text.count(">unknown<") for place, text in cells.items()}
    # What does not fit has no time of a step; a recipe without kernels no time at all; the seventh no quality.
    assert unknown == {"1": 3, "2": 0, "3": 0, "4": 0, "5": 7, "6": 0, "7": 1, "8": 0}
    figures = charts.figures_of(result)
    assert "Not predicted: 5 gear(bits=2)." in figures["times"].caption
    assert f"or no user fits: 1 full(); 7 {LONG}." in figures["quality"].caption
    assert [charts.places_of(figures[name]) for name in ("times", "quality")] == [
        [0, 1, 2, 3, 5, 6, 7], [1, 2, 3, 4, 5, 7],
    ]  # fmt: skip


def test_a_point_looks_as_its_recipe_does_in_the_legend(result):
    for figure in charts.figures_of(result).values():
        points = figure.spec["data"]["values"]
        assert points
        for point in points:
            assert (point["color"], point["shape"]) == charts.look(point["place"] - 1)


def test_a_bar_says_what_memory_holds(page):
    bars = re.findall(r"<li><p>\d <code>.*?</li>", page, re.S)
    assert len(bars) == len(RECIPES)
    assert "does not fit: 8.7" in bars[0] and 'class="empty"' not in bars[0]
    parts = re.search(r'aria-label="(.*?)"', bars[2])[1].split(", ")
    assert [part.rsplit(" ", 2)[0] for part in parts] == [
        "weights", "working memory", "exact pages", "codes", "scales", "statistics", "page tables", "unfilled slots",
    ]  # fmt: skip
    total = sum(float(width) for width in re.findall(r"width:([\d.]+)%", bars[2]))
    end = float(re.search(r'<b style="left:([\d.]+)%', bars[2])[1])
    assert total == pytest.approx(end, abs=0.01)  # with what is unused, the bar ends at the usable memory


def test_what_needs_far_too_much_leaves_the_others_their_size(result):
    result = {**result, "users": 200}
    bars = re.findall(r"<li><p>\d <code>.*?</li>", html.render(result), re.S)
    ends = {float(re.search(r'<b style="left:([\d.]+)%', bar)[1]) for bar in bars}
    assert len(ends) == 1 and ends.pop() > 60


def test_without_users_target_quality_or_choice(result):
    rows = [{**row, "quality": None, "meets": None} for row in result["rows"]]
    none = {"users": None, "target": None, "chosen": None, "run": {"python": None, "generate": None, "vllm": None}}
    page = html.render({**result, **none, "rows": rows, "said": "Nothing fits."})
    tags = Tags(page)
    assert tags.sections == ["chosen", "context", "memory", "rows", "made"]
    assert (
        "No recipe is chosen" in tags.text
        and "meets the target" not in tags.text
        and "pre" not in {tag for tag, _ in tags.found}
    )
    assert "the caches of the most users that fit at 65,536 tokens" in tags.text


def test_on_several_gpus_a_bar_is_of_each_and_free_pages_are_shared(result):
    parts = {"exact": GIB, "free": 2 * GIB}
    row = {**result["rows"][2], "parts": parts, "users": 10}
    memory = {"usable": 10 * GIB, "weights": GIB, "working": GIB}
    several = {**result, "rows": [row], "users": None, "gpus": 2, "memory": memory}
    text = Tags(html.render(several)).text
    assert "on each of the 2 GPUs" in text and "10 users, 8.00 GiB; 2.00 GiB unused" in text
    text = Tags(html.render({**several, "memory": {**memory, "share": 1.0}})).text
    assert "10 users, 14.0 GiB; 0.00 MiB unused" in text  # the planner knows best what fits


def test_the_exact_cache_alone_is_no_picture_of_quality(result):
    rows = [{**row, "quality": row["quality"] if row["recipe"] == "full()" else None} for row in result["rows"]]
    rows[0] = {**rows[0], "users": 3}
    page = html.render({**result, "rows": rows})
    assert "quality" not in Tags(page).sections and "Quality is measured" not in page


def test_what_a_target_lacks_is_in_the_notes(result):
    rows = [{**row, "why_not": ["a step takes 30 ms, not 25", "KL 0.05"]} for row in result["rows"]]
    text = Tags(html.render({**result, "rows": rows})).text
    # A note of many recipes is there once.
    assert text.count("Misses the target: a step takes 30 ms, not 25; KL 0.05.") == 1
    assert ", ".join(f"{place} {recipe}" for place, recipe in enumerate(RECIPES, 1)) + ": Misses" in text


def test_nothing_is_predicted_and_one_recipe(result):
    rows = [{**result["rows"][4], "by_context": [], "notes": []}]
    page = html.render({**result, "rows": rows, "chosen": rows[0]["recipe"]})
    assert set(drawn(page)) == {"quality"}
    assert Tags(page).sections == ["chosen", "memory", "quality", "rows", "made"]


def test_the_plotting_library_may_be_missing(monkeypatch):
    shared.check()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(InputError, match=r"fivefold\[report\]"):
        shared.check()


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (9.0, 14.0, [8, 10, 12, 14]), (1, 1, [1, 1.05]), (20, 20, [20, 21]), (9.1, 9.8, [9, 9.5, 10]),
        (3, 450, [2, 5, 10, 20, 50, 100, 200, 500]),
        (18.5, 57, [15, 20, 30, 40, 60]),
        (1, 30000, [1, 10, 100, 1000, 10000, 100000]), (0.0004, 0.003, [0.0002, 0.0005, 0.001, 0.002, 0.005]),
    ],
)  # fmt: skip
def test_ticks(low, high, wanted):
    assert charts.ticks(low, high) == wanted
    people = charts.ticks(max(1, low), max(1, high), whole=True)
    assert all(one == int(one) for one in people) and people[0] <= max(1, low) and people[-1] >= max(1, high)


def test_words_for_numbers():
    assert [html.size(value) for value in (0, 5 * 2**20, GIB / 2, 23.1 * GIB, 2048 * GIB)] == [
        "0.00 MiB", "5.00 MiB", "0.50 GiB", "23.1 GiB", "2,048 GiB",
    ]  # fmt: skip
    assert [html.seconds(value) for value in (2e-6, 0.0123, 0.25, 12.34)] == ["0.00 ms", "12.3 ms", "0.25 s", "12.3 s"]
    assert [html.rate(value, "B") for value in (3.35e12, 64e9, 5e6, 10)] == [
        "3.35 TB/s", "64.0 GB/s", "5.00 MB/s", "10.0 B/s",
    ]  # fmt: skip
    assert [charts.context_name(tokens) for tokens in (4096, 1 << 20, 3 << 19, 100_000)] == [
        "4K",
        "1M",
        "1,536K",
        "100,000",
    ]


def test_colours_can_be_told_from_both_papers():
    def light(color):
        parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), linear))

    for color in charts.COLORS:
        assert 1.05 / (light(color) + 0.05) > 3 and (light(color) + 0.05) / (light("#14171b") + 0.05) > 3, color
    assert len({charts.look(place) for place in range(70)}) == 70


# -- in a browser -----------------------------------------------------------------------------------------

PROBE = probing("""
  Object.assign(seen, {
    users: marks("users", "mark-symbol"),
    lines: marks("users", "mark-line"),
    times: marks("times", "mark-symbol"),
    quality: marks("quality", "mark-symbol"),
    label: getComputedStyle(document.querySelector("#plot-users svg .mark-text text")).fill,
    cut: [],
    scrolls: [],
  });
  for (const plot of document.querySelectorAll(".plot svg")) {
    const frame = plot.getBoundingClientRect();
    for (const text of plot.querySelectorAll("text")) {
      const at = text.getBoundingClientRect();
      if (!text.textContent || getComputedStyle(text).opacity === "0") continue;
      if (at.left < frame.left - 1 || at.right > frame.right + 1 || at.top < frame.top - 1 ||
          at.bottom > frame.bottom + 1 || text.textContent.includes("…")) seen.cut.push(text.textContent);
    }
  }
  for (const one of document.querySelectorAll(".legend li, .memory p, pre, dd, summary, figcaption, select")) {
    const at = one.getBoundingClientRect();
    const out = one.clientWidth && one.scrollWidth > one.clientWidth + 1;
    if (out || at.right > document.documentElement.clientWidth + 0.5)
      seen.cut.push(one.textContent.slice(0, 60));
  }
  for (const one of document.querySelectorAll("details")) one.open = true;
  for (const one of document.querySelectorAll(".inside .scroll")) {
    if (one.scrollWidth > one.clientWidth) seen.scrolls.push(one.getAttribute("aria-label"));
  }
  const dim = () => document.querySelectorAll('#plot-users svg .mark-symbol path[opacity="0.12"]').length;
  const pick = document.querySelector('select[data-signal="picked"]');
  seen.options = pick.options.length;
  const before = dim();
  pick.value = "3";
  pick.dispatchEvent(new Event("change"));
  await new Promise((done) => setTimeout(done, 500));
  seen.dimmed = [before, dim()];
  seen.buttons = document.querySelectorAll(".copied button").length;
  document.querySelector(".copied button").click();
  seen.selected = getSelection().toString();
  const first = () => document.querySelector("table.sortable tbody tr code").textContent;
  document.querySelectorAll("table.sortable thead button")[6].click();
  seen.fastest = first();
  document.querySelectorAll("table.sortable thead button")[2].click();
  seen.smallest = first();
""")


@browser
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_a_browser_draws_it_and_asks_for_nothing(page, result, tmp_path, width, dark):
    seen, console, asked = visit(page, tmp_path, PROBE, *([DARK] if dark else []), width=width)
    assert console == [] and asked == set()
    fitting = sum(bool(at["users"]) for row in result["rows"] for at in row["by_context"])
    assert (seen["users"], seen["lines"], seen["times"], seen["quality"]) == (fitting, 8, 7 * len(CONTEXTS), 6)
    assert seen["wide"] <= 0 and seen["cut"] == []
    assert seen["scrolls"] == [] and seen["options"] == 9 and seen["dimmed"] == [0, fitting - 6]
    assert seen["buttons"] == 2 and seen["selected"].startswith("import fivefold")
    assert (seen["fastest"], seen["smallest"]) == ("streaming(sink=4, recent=1020)",) * 2
    paper, label = contrast(seen["paper"], seen["label"])
    assert (paper < label) is dark and abs(paper - label) > 400


@browser
@pytest.mark.timeout(180)
def test_a_browser_takes_nasty_texts_as_texts(nasty, tmp_path):
    seen, console, asked = visit(html.render(nasty), tmp_path, PROBE, width=390)
    assert console == [] and asked == set()
    assert seen["title"].startswith("Fivefold: a plan for meta-llama/Llama-3.1-8B</script>")
    assert seen["wide"] <= 0 and seen["cut"] == []
