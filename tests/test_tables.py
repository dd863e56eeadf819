"""Tables: in a pipe a row is a line; on a terminal of 80 columns numbers are whole and recipes break at " + "."""

from __future__ import annotations

import re

import pytest
from rich.console import Console
from rich.text import Text

from fivefold.cli import bench, demo
from fivefold.evaluate import tables as evaluated
from fivefold.tables import Facts, Table, parts, wrap

LONG = "duo(keep=0.25) + h2o(keep=0.2) + kivi(bits=2, group=128, residual=128)"


def shown(table, width: int | None = 80) -> list[str]:
    """The lines of a table on a terminal of `width` columns; in a pipe if that is None."""
    console = Console(
        force_terminal=width is not None, width=width or 80, highlight=False, markup=False, color_system=None
    )
    with console.capture() as capture:
        console.print(table, crop=False)
    return capture.get().splitlines()


def kernels(monkeypatch: pytest.MonkeyPatch, width: int | None) -> list[str]:
    """What `fivefold bench kernels` prints where figures are as wide as they get."""
    console = Console(force_terminal=width is not None, width=width or 80, color_system=None)
    monkeypatch.setattr(bench, "out", console)
    rows = [
        ["524,288", "1", "SDPA flash bf16", "torch", "0.7257", "1.00", "2,048.0", "2.959", "98%"],
        ["524,288", "16", "pack kivi(bits=2, group=128)", "reference", "5921.1734", "", "12,584.0", "0.001", "2%"],
        ["524,288", "16", "tidal, 512 tokens picked of kivi(bits=4)", "triton", "0.0380", "19.09", "4.6", "0.1", "4%"],
    ]
    with console.capture() as capture:
        bench._print_table("a GPU", "context, batch, kernel, path", "ms, x SDPA, MiB, TB/s, of copy", rows)
    return capture.get().splitlines()


def test_a_row_is_a_line_in_a_pipe(monkeypatch: pytest.MonkeyPatch):
    lines = kernels(monkeypatch, None)
    assert [" ".join(line.split()) for line in (lines[2], *lines[5:])] == [
        "context batch kernel path ms x SDPA MiB TB/s of copy",
        "524,288 16 pack kivi(bits=2, group=128) reference 5921.1734 12,584.0 0.001 2%",
        "524,288 16 tidal, 512 tokens picked of kivi(bits=4) triton 0.0380 19.09 4.6 0.1 4%",
    ]
    assert len(lines) == 7


def test_80_columns_cut_no_number_and_no_word(monkeypatch: pytest.MonkeyPatch):
    lines = kernels(monkeypatch, 80)
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)
    words = set(" ".join(lines).split())
    assert {"524,288", "5921.1734", "12,584.0", "kivi(bits=2,", "group=128)", "kivi(bits=4)", "reference"} <= words
    # A narrower terminal gets whole numbers too, in lines that are longer than it.
    narrow = set(" ".join(kernels(monkeypatch, 40)).split())
    assert {"524,288", "5921.1734", "12,584.0", "kivi(bits=2,", "reference"} <= narrow


@pytest.mark.parametrize("width", [None, 80, 60])
def test_the_demo_shows_whole_recipes(width: int | None):
    run = {
        "recipe": LONG, "cache_bytes": 2**37, "ratio": 0.1, "prefill_s": 1234.5, "decode_ms_per_token": 51234.5,
        "kl": 0.1, "agreement": 0.9, "answers_right": 0, "answers": ["Leopold. Remember that the"], "right": [False],
    }  # fmt: skip
    lines = shown(demo._table([run]), width)
    text = " ".join(lines)
    assert {"131072.0", "1234.50", "51234.5", "0.1000"} <= set(text.split())
    if width is None:
        assert lines[2].startswith(LONG) and len(lines) == 3
    else:
        firsts = [line[: line.index("  ") if "  " in line else None].rstrip() for line in lines]
        assert "duo(keep=0.25)" in " ".join(firsts) and "+ h2o(keep=0.2)" in " ".join(firsts)
        assert max(map(len, lines)) <= 80
    answers = shown(demo._facts([{"question": "Who?\nHe is", "answer": "Leopold"}], [run]), width)
    assert (f"  wrong  {LONG}  Leopold. Remember that the" in answers) == (width is None)
    assert all(line.startswith(("Who", "  wrong", "         ")) for line in answers if line)


def test_the_ranking_shows_whole_recipes():
    entry = {
        "recipe": LONG, "quality": 0.5, "low": 0.3, "high": 0.7, "ratio": 0.25, "decode_ms": 50.0, "kl": 0.1,
        "top1": 0.9, "bytes_front": True, "time_front": True,
    }  # fmt: skip
    exact = {**entry, "recipe": "DynamicCache"}
    assert [line for line in shown(evaluated._ranked([exact, entry]), None) if LONG in line]
    lines = shown(evaluated._ranked([exact, entry]))
    assert max(map(len, lines)) <= 80
    assert [line.strip() for line in lines[4:]] == ["+ kivi(bits=2, group=128,", "residual=128)"]
    assert lines[3].startswith("1 duo(keep=0.25) + h2o(keep=0.2) ") and "0.50 ±0.20" in lines[3]


def test_texts_break_between_methods_first():
    assert parts(LONG) == ["duo(keep=0.25)", "+ h2o(keep=0.2)", "+ kivi(bits=2, group=128, residual=128)"]
    assert wrap("duo(keep=0.5) + kivi(bits=2, group=128)", 30) == ["duo(keep=0.5)", "+ kivi(bits=2, group=128)"]
    assert wrap("duo(keep=0.5) + kivi(bits=2, group=128)", 20) == ["duo(keep=0.5)", "+ kivi(bits=2,", "group=128)"]
    assert wrap("duo() + kivi(bits=2, group=64)", 14) == ["duo()", "+ kivi(bits=2,", "group=64)"]
    assert wrap("kivi(bits=2)", 5) == ["kivi(bits=2)"] and wrap("", 5) == [""] and wrap("a b", None) == ["a b"]
    assert wrap("out of memory (tried 3 GB", 10) == ["out of", "memory", "(tried 3", "GB"]


def test_the_last_cell_of_a_short_row_takes_the_rest():
    table = Table("cache", ">ms", ">MiB")
    table.add_row("full()", "1.0", "2.0")
    table.add_row("kivi(bits=2)", "the device ran out of memory")
    lines = shown(table, None)
    assert lines[3] == "kivi(bits=2)  the device ran out of memory"
    assert re.fullmatch(r"full\(\) +1\.0 +2\.0", lines[2])
    assert max(map(len, shown(table, 30))) <= 30
    assert [line.split() for line in shown(Table("cache", ">ms"))[:1]] == [["cache", "ms"]]


def test_facts():
    facts = Facts()
    facts.add_row("recipe", Text(LONG))
    facts.add_row("", "131,072 tokens")
    assert shown(facts, None) == [f"recipe  {LONG}", "        131,072 tokens"]
    assert shown(facts, 40) == [
        "recipe duo(keep=0.25) + h2o(keep=0.2)",
        "       + kivi(bits=2, group=128,",
        "       residual=128)",
        "       131,072 tokens",
    ]


def test_other_widths_and_encodings():
    table = Table("名前", ">ms", title="a title that is longer than its table is wide")
    table.add_row("数字", "1,234.5")
    assert shown(table, 20)[:3] == ["a title that is", "longer than its", "table is wide"]
    assert shown(table, None)[-1] == "数字  1,234.5"
    console = Console(width=80, color_system=None)
    options = console.options.update()
    options.encoding = "ascii"
    lines = [line.plain for line in table.__rich_console__(console, options)]
    assert set(lines[3]) == {"-"}
