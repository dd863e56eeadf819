"""Who may import whom. The table is the architecture: a layer knows what is in its row, and itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import fivefold

LAYERS = {
    "errors": (),
    "blocks": (),
    "interrupts": (),
    "paths": (),
    "page": ("errors",),
    "signature": (),
    "sizes": ("errors",),
    "kernels": ("errors", "paths"),
    "store": ("errors", "interrupts", "kernels"),
    "attention": ("errors", "blocks", "interrupts", "kernels", "store"),
    "methods": (
        "errors",
        "kernels",
        "store",
        "calibrate.learner",
        "calibrate.profile",
        "calibrate.budget",
        "calibrate.gates",
    ),
    "calibrate.learner": ("errors", "kernels", "store"),
    "calibrate.profile": ("errors", "paths", "kernels", "signature"),
    "recipe": ("errors", "store", "methods"),
    "engine": ("errors", "interrupts", "sizes", "kernels", "store", "attention", "methods", "recipe"),
    "serving": ("errors", "kernels", "store", "attention", "methods", "models", "recipe", "signature"),
    "report": ("errors", "store", "engine", "kernels"),
    "plan": (
        "errors",
        "blocks",
        "paths",
        "page",
        "signature",
        "kernels",
        "store",
        "attention",
        "methods",
        "recipe",
        "engine",
        "report",
    ),
    "plan.reading": ("attention", "benchmark", "plan"),
    "plan.measure": ("paths", "kernels", "store", "attention", "recipe", "benchmark", "plan"),
}
"""Imports of any kind count: at the top of a module, in a function, or for types only."""
KNOW_TRANSFORMERS = ("models", "generation", "cli", "evaluate", "benchmark", "calibrate")
KNOW_ITS_TYPES = ("api", "merging")
LONGEST = 500
MAY_BE_LONGER = ("kernels",)

SOURCE = Path(fivefold.__file__).parent


class Import(NamedTuple):
    """module: what is imported, "fivefold.store.pages" or "torch.nn". kind: "top", "types" or "function"."""

    module: str
    kind: str
    line: int


@cache
def modules() -> dict[str, Path]:
    """All modules of the package by name, packages under their own."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(("fivefold", *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def imports(module: str) -> tuple[Import, ...]:
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return tuple(_walk(ast.parse(path.read_text(encoding="utf-8")), package, "top"))


def _walk(node: ast.AST, package: str, kind: str) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(name.name, kind, child.lineno) for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - child.level + 1] if child.level else []
            origin = ".".join([*above, *([child.module] if child.module else [])])
            for name in child.names:
                whole = f"{origin}.{name.name}"
                yield Import(whole if whole in modules() else origin, kind, child.lineno)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _walk(child, package, "function")
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for part in child.body:
                yield from _walk(ast.Module([part], []), package, "types" if kind == "top" else kind)
            for part in child.orelse:
                yield from _walk(ast.Module([part], []), package, kind)
        else:
            yield from _walk(child, package, kind)


def within(module: str, *layers: str) -> bool:
    """Whether a module is one of these layers, or in one: layers are named without "fivefold."."""
    return any(module == f"fivefold.{layer}" or module.startswith(f"fivefold.{layer}.") for layer in layers)


def layer_of(module: str) -> str | None:
    """The row of the table that a module belongs to, the longest name first."""
    return next((layer for layer in sorted(LAYERS, key=len, reverse=True) if within(module, layer)), None)


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_looks_up(layer: str) -> None:
    wrong = {
        f"{module} line {found.line} imports {found.module} ({found.kind})"
        for module in modules()
        if layer_of(module) == layer
        for found in imports(module)
        if found.module.split(".")[0] == "fivefold" and not within(found.module, layer, *LAYERS[layer])
    }
    assert not wrong, f"{layer} may know {', '.join(LAYERS[layer]) or 'nothing'}:\n" + "\n".join(sorted(wrong))


def test_who_knows_transformers() -> None:
    wrong = [
        f"{module} line {found.line} imports {found.module} ({found.kind})"
        for module in modules()
        if not within(module, *KNOW_TRANSFORMERS)
        for found in imports(module)
        if found.module.split(".")[0] == "transformers"
        if not (found.kind == "types" and within(module, *KNOW_ITS_TYPES))
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_plans() -> None:
    wrong = [
        f"{module} line {found.line} imports {found.module}"
        for module in modules()
        if not within(module, "plan", "cli")
        for found in imports(module)
        if within(found.module, "plan")
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_each_other() -> None:
    """No circle of imports at the top of modules, those for types included."""
    edges = {
        module: {found.module for found in imports(module) if found.kind != "function"} & modules().keys() - {module}
        for module in modules()
    }
    circles = [sorted(circle) for circle in components(edges) if len(circle) > 1]
    said = []
    for circle in circles:
        inside = [f"  {one} -> {', '.join(sorted(edges[one] & set(circle)))}" for one in circle]
        said.append("\n".join(["a circle:", *inside]))
    assert not circles, "\n".join(said)


def components(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of modules that all reach each other."""

    def reached(first: str) -> set[str]:
        seen: set[str] = set()
        queue = [first]
        while queue:
            new = edges[queue.pop()] - seen
            seen |= new
            queue += new
        return seen

    reach = {module: reached(module) for module in edges}
    out, done = [], set()
    for module in edges:
        if module not in done:
            circle = {other for other in reach[module] if module in reach[other]} | {module}
            done |= circle
            out.append(circle)
    return out


def test_no_file_is_long() -> None:
    sizes = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in modules().items()}
    long = [
        f"{module}: {size} lines"
        for module, size in sizes.items()
        if size > LONGEST and not within(module, *MAY_BE_LONGER)
    ]
    assert not long, f"more than {LONGEST} lines:\n" + "\n".join(long)


def test_the_table_is_about_what_there_is() -> None:
    """Each layer exists (`engine` from its first module on), and nobody is in it under a name that is gone."""
    names = {layer for layers in LAYERS.values() for layer in layers} | set(LAYERS) | set(KNOW_TRANSFORMERS)
    missing = [name for name in names if not any(within(module, name) for module in modules())]
    assert not missing, missing
    assert len(modules()) > 50
    assert any(found.kind == "types" for module in modules() for found in imports(module))
