"""The API reference, as HTML, from the docstrings of what is public.

    python scripts/api.py FOLDER

A name that does not resolve, anything else that pdoc warns about, and a public class, function or method without a
docstring end it with exit code 1.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path

import pdoc
from pdoc.doc import Class, Function, Module

MODULES = (
    "fivefold", "fivefold.errors", "fivefold.recipe", "fivefold.report", "fivefold.models.cache", "fivefold.generation",
    "fivefold.methods", "fivefold.store", "fivefold.calibrate",
)  # fmt: skip


def undocumented(name: str) -> list[str]:
    """What is public in a module and has no docstring; of classes what they define themselves."""
    found = []
    module = Module(importlib.import_module(name))
    for member in module.members.values():
        if member.taken_from[0] != name and "__all__" not in vars(module.obj):
            continue
        inside = member.own_members if isinstance(member, Class) else []
        for one in (member, *inside):
            if isinstance(one, Class | Function) and not one.name.startswith("_") and not one.docstring:
                found.append(f"{one.fullname} has no docstring")
    return found


def build(folder: Path) -> list[str]:
    """Write all pages; returns what is wrong with them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in MODULES:
            module = importlib.import_module(name)
            for public in getattr(module, "__all__", ()):
                getattr(module, public)  # some wait until they are asked for
        # Only what pdoc itself has to say counts.
        caught.clear()
        pdoc.render.configure(docformat="google", show_source=False)
        pdoc.pdoc(*MODULES, output_directory=folder)
    missing = [one for name in MODULES for one in undocumented(name)]
    return [f"{one.filename}:{one.lineno}: {one.message}" for one in caught] + missing


if __name__ == "__main__":
    problems = build(Path(sys.argv[1]))
    print("\n".join(problems), file=sys.stderr)
    sys.exit(bool(problems))
