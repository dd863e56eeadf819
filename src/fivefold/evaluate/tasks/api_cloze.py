"""API-name cloze: which function of the source code above does this?"""

from __future__ import annotations

import ast
import importlib
import inspect
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import shuffled

_MODULES = (
    "argparse", "ast", "base64", "bisect", "calendar", "collections", "colorsys", "configparser", "contextlib", "copy",
    "csv", "dataclasses", "difflib", "fileinput", "fnmatch", "fractions", "functools", "gettext", "glob", "gzip",
    "heapq", "inspect", "ipaddress", "json", "keyword", "locale", "mimetypes", "numbers", "operator", "pathlib",
    "posixpath", "pprint", "quopri", "random", "re", "sched", "shelve", "shlex", "shutil", "statistics", "string",
    "tempfile", "textwrap", "tokenize", "traceback", "types", "uuid", "warnings", "weakref",
)  # fmt: skip
_FILLERS = ("argparse", "configparser", "dataclasses", "ipaddress", "pathlib", "difflib", "inspect", "pickle")
_LONGEST = 320


@dataclass(frozen=True)
class _Function:
    name: str
    summary: str
    code: str


@cache
def _functions() -> tuple[_Function, ...]:
    """Short public functions of the standard library with their summary, in a fixed order, names and summaries unique.

    The docstring is taken out of the code: it would repeat the summary.
    """
    found: dict[str, _Function] = {}
    summaries = set()
    for module in _MODULES:
        source = inspect.getsource(importlib.import_module(module))
        lines = source.splitlines()
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or node.decorator_list:
                continue
            said = (ast.get_docstring(node) or "").split("\n")[0].strip()
            if len(node.body) < 2 or not 20 <= len(said) <= 90 or len(node.name) < 3:
                continue
            doc = node.body[0]
            kept = lines[node.lineno - 1 : doc.lineno - 1] + lines[doc.end_lineno or doc.lineno : node.end_lineno]
            code = "\n".join(line for line in kept if line.strip())
            if len(code) <= _LONGEST and node.name not in found and said not in summaries:
                found[node.name] = _Function(node.name, said, code)
                summaries.add(said)
    return tuple(found.values())


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@task(
    "api_cloze",
    kind="choices",
    line="real source code of Python's library; which of its functions does what a comment says?",
    source="Zhuo et al., Pop Quiz! Do Pre-trained Code Models Possess Knowledge of Correct API Names?, 2023",
)
@dataclass(frozen=True)
class ApiCloze(Task):
    """`functions` short functions of the standard library, each below its summary as a comment, in a long module's
    source. Their real names are dealt anew at random among them, so that a model that knows the library by heart, or
    guesses from the summary, is at chance. Each is asked for by its summary; the choices are all of these names, and
    none stands anywhere else in the text."""

    functions: int = 4

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        pool = _functions()
        if not 2 <= self.functions <= 12:
            raise InputError(f"functions={self.functions} cannot be planted: use 2 to 12.")
        module = importlib.import_module(rng.choice(_FILLERS))
        filler = inspect.getsource(module)
        start = filler.index("\n", rng.randrange(len(filler) // 2))
        filler = filler[start:]
        taken = _words(filler)
        chosen: list[_Function] = []
        for function in rng.sample(pool, len(pool)):
            others = _words(" ".join(other.code + " " + other.summary for other in chosen))
            mine = _words(function.code.split("(", 1)[1]) | _words(function.summary)
            if function.name in taken | others | mine or any(other.name in mine for other in chosen):
                continue
            chosen.append(function)
            if len(chosen) == self.functions:
                break
        else:
            raise InputError(f"functions={self.functions} are more than this Python's library has to offer.")
        names = rng.sample([function.name for function in chosen], len(chosen))
        planted, questions = [], []
        for function, name in zip(chosen, names):
            code = function.code.replace(f"def {function.name}(", f"def {name}(", 1)
            planted.append((rng.random(), f"\n\n# {function.summary}\n{code}\n\n"))
            questions.append(Question(f"\n\n# {function.summary}\ndef", f" {name}", shuffled(rng, names)))
        return Sample(fill(tokenizer, context, planted, filler), tuple(questions))
