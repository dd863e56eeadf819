"""What is written about the project is true: links, commands, code and tables of the documents, and the API pages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
import types
import unicodedata
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest
import typer

import fivefold
from families import MULTIMODAL, TAKEN
from fivefold.cli.app import app
from fivefold.evaluate.sweep import recipes as recipes_of
from fivefold.methods import registered
from fivefold.recipe import Recipe

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = sorted((ROOT / "docs").glob("*.svg"))
SHELL = {"|", "||", "&&", ";", ">", ">>", "<", "&"}

documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def load(script: str) -> types.ModuleType:
    """A script of the project as a module."""
    name = script.replace("/", "_").removesuffix(".py")
    spec = importlib.util.spec_from_file_location(name, ROOT / script)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(document: Path, language: str | None = None) -> list[str]:
    """The fenced code of a document; language: what stands behind the fence."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", document.read_text(encoding="utf-8"), re.M | re.S)
    return [text for name, text in found if language is None or name == language]


def prose(document: Path) -> str:
    return re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)


# -- links ------------------------------------------------------------------------------------------------


@cache
def anchors(document: Path) -> set[str]:
    """As GitHub makes them of headings."""
    made: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose(document), re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        kept = "".join(c for c in plain if c in "-_ " or unicodedata.category(c)[0] in "LN").replace(" ", "-")
        number = 0
        while (name := f"{kept}-{number}" if number else kept) in made:
            number += 1
        made.add(name)
    return made


def links(document: Path) -> list[str]:
    text = re.sub(r"`[^`]*`", "", prose(document))
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)


@documents
def test_links_lead_somewhere(document: Path):
    for link in links(document):
        parts = urlsplit(link)
        if parts.scheme:
            assert parts.scheme == "https" and parts.netloc, link
            continue
        target = document.parent / unquote(parts.path) if parts.path else document
        assert target.exists(), link
        assert not parts.fragment or parts.fragment in anchors(target), link


def test_every_page_can_be_reached():
    seen, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop().resolve()
        if page not in seen:
            seen.add(page)
            if page.suffix == ".md":
                left += [page.parent / urlsplit(link).path for link in links(page) if not urlsplit(link).scheme]
    assert {*DOCUMENTS, *PICTURES} <= seen


@documents
def test_files_that_are_named_are_there(document: Path):
    text = document.read_text(encoding="utf-8")
    for name in re.findall(r"\b(?:benchmarks|scripts|tests|docs|src)/[\w./-]*\w", text):
        new = "methods/bits/float8.py", "methods/tokens/tova.py"  # what CONTRIBUTING shows how to write
        assert (ROOT / name).exists() or name.endswith(new), name
    for name in re.findall(r"(?<![/\w])\w+_(?:h100|cpu|aware)\.json", text):
        assert (ROOT / "benchmarks" / "results" / name).exists(), name
    for name in re.findall(r"`((?:models|engine|store|attention|kernels|methods|generation)/\w[\w/]*\.py)`", text):
        assert (ROOT / "src" / "fivefold" / name).exists(), name


# -- commands ---------------------------------------------------------------------------------------------


def commands(document: Path) -> Iterator[list[str]]:
    """What is to be typed, a command at a time, from code in lines and in texts."""
    spans = re.findall(r"`([^`]+)`", prose(document))
    lines = [line for block in blocks(document) for line in block.replace("\\\n", " ").splitlines()]
    for text in (*lines, *spans):
        if not re.search(r"\bfivefold [a-z]|\bpython (?:benchmarks|scripts)/", text):
            continue
        # [--option VALUE]... is --option VALUE, if it is given.
        plain = " ".join(re.sub(r"(?<!\w)\[(-.*?)\](\.\.\.)?", r"\1", text).split())
        words = split(plain)
        part: list[str] = []
        for word in (*words, ";"):
            if word in SHELL:
                if part:
                    yield part
                part = []
            else:
                part.append(word)


def split(text: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return list(lexer)
    except ValueError:  # a quote that is closed in another line
        return text.split()


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]


def refused(words: list[str]) -> str | None:
    """Why a command line cannot be; None if all its names exist."""
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # variables of the environment
    if words[:1] == ["python"] and len(words) > 1 and words[1].startswith(("benchmarks/", "scripts/")):
        source = (ROOT / words[1]).read_text(encoding="utf-8") if (ROOT / words[1]).exists() else ""
        for name in options(words[2:]):
            declared = f'"{name}"' in source or f"{name.removeprefix('--').replace('-', '_')}: " in source
            if not declared:
                return f"{words[1]} has no {name}"
        return None if source else f"there is no {words[1]}"
    if words[:1] != ["fivefold"]:
        return None
    command: Any = typer.main.get_command(app)
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"there is no command {rest[0]!r}" if re.fullmatch(r"[a-z]+", rest[0]) else None
        command, rest = command.commands[rest[0]], rest[1:]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help", "-h"}
    return next((f"{command.name} has no {name}" for name in options(rest) if name not in known), None)


@documents
def test_commands_can_be_typed(document: Path):
    assert [why for words in commands(document) if (why := refused(words))] == []


def test_commands_are_found_and_wrong_ones_refused(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "Do `fivefold demo [--context N] [--recipe R]...` or `FIVEFOLD_KERNELS=cpp fivefold evil -s x`.\n\n"
        "```\nfivefold fetch && fivefold bench kernels --sise 3 \\\n  -r 'kivi(bits=2)' | cat\n"
        "python benchmarks/nothing.py --x\npython benchmarks/sessions.py out --rounds 3 --turns 4\n```\n"
    )
    found = list(commands(page))
    assert ["fivefold", "demo", "--context", "N", "--recipe", "R"] in found
    assert ["fivefold", "bench", "kernels", "--sise", "3", "-r", "kivi(bits=2)"] in found
    assert sorted(why for words in found if (why := refused(words))) == [
        "benchmarks/nothing.py has no --x", "benchmarks/sessions.py has no --turns", "kernels has no --sise",
        "there is no command 'evil'",
    ]  # fmt: skip


# -- code -------------------------------------------------------------------------------------------------


def imported(code: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name) of what is imported from fivefold, and (module, name) of `fivefold.name`."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            yield from ((name.name, None) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", name.name) for name in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fivefold":
            yield "fivefold", node.attr


@documents
def test_python_compiles_and_its_names_exist(document: Path):
    for block in blocks(document, "python"):
        for module, name in imported(ast.parse(block)):
            if module.split(".")[0] == "fivefold":
                found = importlib.import_module(module)
                assert name is None or hasattr(found, name), f"{module}.{name}"
    for module, name in re.findall(r"`(fivefold(?:\.[a-z_]+)*)\.([A-Za-z_]\w*)`", prose(document)):
        there = importlib.util.find_spec(module) and hasattr(importlib.import_module(module), name)
        assert there or importlib.util.find_spec(f"{module}.{name}"), f"{module}.{name}"


@documents
def test_recipes_can_be_written_so(document: Path):
    """Methods, parameters and values; but for placeholders, and methods that CONTRIBUTING shows how to write."""
    text = document.read_text(encoding="utf-8")
    for found in re.findall(r"""[`"']((?:[a-z]\w*\([^()`]*\)(?: \+ )?)+)["'`]""", text):
        names = re.findall(r"(\w+)\(", found)
        if {"full", *registered()}.issuperset(names) and not re.search(r"\.\.\.|=[A-Z]+\)", found):
            for recipe in recipes_of([found], True):
                Recipe.parse(recipe)


# -- what is counted up -----------------------------------------------------------------------------------


def test_every_method_is_in_the_readme_s_row_of_its_slot():
    rows = re.findall(r"^\| `(\w+)` \| [^|]* \| (.*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    told = {(slot, name) for slot, text in rows for name in re.findall(r"`(\w+)`", text)}
    assert told == {(kind.slot, name) for name, kind in registered().items() if name != "budget"}


def test_every_command_is_in_the_list():
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `fivefold ((?:bench )?[\w-]+)", page, re.M))
    command: Any = typer.main.get_command(app)
    subcommands = {f"bench {name}" for name in command.commands["bench"].commands}
    assert listed == {*command.commands, *subcommands} - {"bench"}


def test_every_family_that_is_tried_is_named():
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    named = re.search(r"`tests/test_families.py` for (.*?), on tiny", text, re.S)
    assert named is not None
    words = re.sub(r"\([^)]*\)", "", named[1]).replace(" and ", ", ").split(",")
    tried = {name.removesuffix("_text") for name in (*TAKEN, *MULTIMODAL)}
    assert {word.strip() for word in words} == tried


def test_versions_are_those_of_the_package():
    told = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    package = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([\w-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    for name, form in (("transformers", "transformers {} to {}"), ("torch", "torch {} or newer")):
        least = re.search(rf'"{name}>=([\d.]+)', package)
        assert least is not None and form.format(least[1], pins[name]) in told


# -- the README, tables and pictures ----------------------------------------------------------------------


def test_the_readme_is_a_screen_and_has_the_two_commands():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert blocks(ROOT / "README.md")[:2] == [
        "pip install -c constraints.txt '.[demo]' && fivefold demo\n",
        "pip install -c constraints.txt -e '.[test]' && pytest\n",
    ]
    assert f'version = "{fivefold.__version__}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results_files():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for table in load("benchmarks/tables.py").TABLES:
        assert f"\n\n{table()}\n\n" in page, f"python benchmarks/tables.py {table.__name__}"


def test_the_gpu_pictures_are_those_of_the_results_files(tmp_path: Path):
    load("benchmarks/plot_gpu.py").main(tmp_path / "wide.svg", tmp_path / "narrow.svg")
    for name, made in (("gpu.svg", "wide.svg"), ("gpu-narrow.svg", "narrow.svg")):
        assert (ROOT / "docs" / name).read_text() == (tmp_path / made).read_text(), "python benchmarks/plot_gpu.py"


@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.name)
def test_labels_fit_whatever_the_font(picture: Path):
    """A letter is 0.62 of the font's size wide on the mean, or 0.7 in bold, as in the widest of the common fonts."""
    root = ElementTree.parse(picture).getroot()
    space = "{http://www.w3.org/2000/svg}"
    style = root.findtext(f"{space}style") or ""
    fonts = {name: (bool(bold), int(size)) for name, bold, size in re.findall(r"([.\w]+)\{font:(bold )?(\d+)px", style)}
    assert fonts and root.find(f"{space}title") is not None
    boxes = [
        tuple(float(rect.get(key, 0)) for key in ("x", "y", "width", "height")) for rect in root.iter(f"{space}rect")
    ]
    for text in root.iter(f"{space}text"):
        bold, size = fonts.get(f".{text.get('class')}") or fonts["text"]
        wide, x, y = (
            size * (0.7 if bold else 0.62) * len(text.text or ""),
            float(text.get("x", 0)),
            float(text.get("y", 0)),
        )
        left = x - wide if text.get("text-anchor") == "end" else x
        around = min(
            (box for box in boxes if box[0] <= x <= box[0] + box[2] and box[1] <= y <= box[1] + box[3]),
            key=lambda box: box[2] * box[3],
        )
        assert around[0] <= left and left + wide <= around[0] + around[2], text.text


# -- the API reference ------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The ids and the links of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {str(given["id"])} if given.get("id") else set()
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))


@pytest.mark.slow
def test_the_api_reference_is_complete(tmp_path: Path):
    done = subprocess.run([sys.executable, ROOT / "scripts/api.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in tmp_path.rglob("*.html")}
    for module in load("scripts/api.py").MODULES:
        assert (tmp_path / f"{module.replace('.', '/')}.html") in pages
    assert "generate_many" in pages[tmp_path / "fivefold.html"].ids
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if not parts.scheme:
                target = (path.parent / parts.path).resolve() if parts.path else path
                assert target in pages, f"{path.name}: {link}"
                assert not parts.fragment or unquote(parts.fragment) in pages[target].ids, f"{path.name}: {link}"


def test_the_api_reference_says_what_is_missing():
    api = load("scripts/api.py")
    module = sys.modules["bare_module"] = types.ModuleType("bare_module", "A module.")
    try:
        exec(
            "def told():\n    'Told.'\ndef untold():\n    pass\nclass One:\n    'One.'\n    def part(self): pass",
            vars(module),
        )
        for name in ("told", "untold", "One"):
            vars(module)[name].__module__ = "bare_module"
        assert api.undocumented("bare_module") == [
            "bare_module.untold has no docstring", "bare_module.One.part has no docstring",
        ]  # fmt: skip
    finally:
        del sys.modules["bare_module"]
