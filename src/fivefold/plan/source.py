"""What transformers knows of a family, read from its source: to import it would bring torch, and take seconds.

Files of models leave out what their configuration class fills in. Here are those defaults, as they are in the version
that is installed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Family:
    """A configuration class of transformers.

    defaults: its fields and plain class attributes, where their value can be read. renamed: what a general name is
    called in it ("hidden_size": "n_embd"). text: the class of the text part of a multimodal model. written: names that
    its code speaks of. attends: whether its models attend through transformers' AttentionInterface.
    """

    defaults: dict[str, Any]
    renamed: dict[str, str]
    text: Family | None
    written: frozenset[str]
    attends: bool


@cache
def family(model_type: str) -> Family | None:
    """The configuration class with this `model_type`; None if transformers has none."""
    for path in _files(model_type):
        text = path.read_text(encoding="utf-8")
        if re.search(rf'^    model_type = "{re.escape(model_type)}"$', text, re.MULTILINE):
            for node in _classes(path).values():
                if _plain(node).get("model_type") == model_type:
                    return _family(node, path)
    return None


def _files(model_type: str) -> Iterator[Path]:
    """Where a class may be, the likeliest first: "gemma3_text" is in gemma3."""
    where = importlib.util.find_spec("transformers")
    if where is None or not where.submodule_search_locations:
        return
    models = Path(where.submodule_search_locations[0], "models")
    parts = model_type.replace("-", "_").split("_")
    likely = ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]
    found = [models / name / f"configuration_{name}.py" for name in likely]
    yield from (path for path in found if path.is_file())
    yield from (path for path in sorted(models.glob("*/configuration_*.py")) if path not in found)


@cache
def _classes(path: Path) -> dict[str, ast.ClassDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def _family(node: ast.ClassDef, path: Path) -> Family:
    values: dict[str, Any] = {}
    names: set[str] = set()
    text = None
    for one in reversed(_bases(node, path)):
        values |= _plain(one)
        text = _text_part(one, path) or text
        names |= {x.attr for x in ast.walk(one) if isinstance(x, ast.Attribute)}
        names |= {x.name for x in one.body if isinstance(x, ast.FunctionDef)}
    modeling = path.with_name(path.name.replace("configuration_", "modeling_"))
    # A family without a file of its own has the models of another, such as Llama's.
    attends = not modeling.is_file() or "ALL_ATTENTION_FUNCTIONS" in modeling.read_text(encoding="utf-8")
    return Family(values, values.get("attribute_map", {}), text, frozenset(names), attends)


def _bases(node: ast.ClassDef, path: Path) -> list[ast.ClassDef]:
    """A class and those that it inherits from, within transformers' models."""
    out = [node]
    for base in node.bases:
        if isinstance(base, ast.Name):
            if base.id in _classes(path):
                out += _bases(_classes(path)[base.id], path)
            elif (other := _imported(base.id, path)) is not None and base.id in _classes(other):
                out += _bases(_classes(other)[base.id], other)
    return out


def _imported(name: str, path: Path) -> Path | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.level == 2 and name in {alias.name for alias in node.names}:
            found = path.parent.parent.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            return found if found.is_file() else None
    return None


def _plain(node: ast.ClassDef) -> dict[str, Any]:
    """Values of the names that are assigned in a class, of those that are plain data."""
    out = {}
    for line in node.body:
        target = line.targets[0] if isinstance(line, ast.Assign) else getattr(line, "target", None)
        value = getattr(line, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.expr):
            with contextlib.suppress(NameError, TypeError):  # no plain data: `interval(min=0.0)(default=0.02)`
                out[target.id] = eval(compile(ast.Expression(value), "", "eval"), {"__builtins__": {}})
    return out


def _text_part(node: ast.ClassDef, path: Path) -> Family | None:
    for line in node.body:
        if not (isinstance(line, ast.Assign) and isinstance(line.value, ast.Dict)):
            continue
        if ast.unparse(line.targets[0]) != "sub_configs_defaults":
            continue
        for key, value in zip(line.value.keys, line.value.values):
            if isinstance(key, ast.Constant) and key.value == "text_config":
                if isinstance(value, ast.Name) and value.id in _classes(path):
                    return _family(_classes(path)[value.id], path)
                kinds = [x.value for x in getattr(value, "keywords", ()) if x.arg == "model_type"]
                if kinds and isinstance(kinds[0], ast.Constant):
                    return family(str(kinds[0].value))
    return None
