"""RULER: thirteen kinds of questions about texts of any length, and their average.

Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models?, arXiv:2404.06654; the kinds are
those of `scripts/synthetic.yaml` of NVIDIA/RULER at commit c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a. What differs from
there is in docs/evaluate.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.ruler.base import RulerTask
from fivefold.evaluate.ruler.chains import Chains
from fivefold.evaluate.ruler.counts import CommonWords, FrequentWords
from fivefold.evaluate.ruler.data import HOTPOTQA, SQUAD, Data
from fivefold.evaluate.ruler.niah import Niah
from fivefold.evaluate.ruler.qa import Qa

__all__ = ["ALL", "KINDS", "PREFIX", "SOURCE", "Data", "RulerTask", "expand", "kind", "lines", "settings"]

ALL, PREFIX = "ruler", "ruler:"
SOURCE = "Hsieh et al., RULER, 2024"
LINE = "the thirteen kinds of RULER and their average; a context counts everything, the answer too; ruler:KIND for one"

KINDS: dict[str, RulerTask] = {
    task.variant: task
    for task in (
        Niah("niah_single_1"),
        Niah("niah_single_2", haystack="essay"),
        Niah("niah_single_3", haystack="essay", value="uuids"),
        Niah("niah_multikey_1", haystack="essay", keys=4),
        Niah("niah_multikey_2", haystack="needle"),
        Niah("niah_multikey_3", haystack="needle", key="uuids", value="uuids"),
        Niah("niah_multivalue", haystack="essay", values=4),
        Niah("niah_multiquery", haystack="essay", queries=4),
        Chains("vt"),
        CommonWords("cwe"),
        FrequentWords("fwe"),
        Qa("qa_1", library=SQUAD),
        Qa("qa_2", library=HOTPOTQA),
    )
}


def expand(suites: Iterable[str]) -> tuple[str, ...]:
    """The suites, "ruler" replaced by its kinds, each once. Raises `InputError` for a kind that there is not."""
    listed: dict[str, None] = {}
    for suite in suites:
        name = suite.removeprefix(PREFIX)
        if name != suite and name not in KINDS:
            raise InputError(f"RULER has no kind {name!r}: use {PREFIX}{{{','.join(KINDS)}}}, or {ALL} for all.")
        listed |= dict.fromkeys([f"{PREFIX}{one}" for one in KINDS] if suite == ALL else [suite])
    return tuple(listed)


def kind(suite: str, data: Data, number: int = 0) -> RulerTask:
    """The task of a suite "ruler:KIND", made from `data`, for the sample `number`."""
    return dataclasses.replace(KINDS[suite.removeprefix(PREFIX)], data=data, number=number)


def settings(task: RulerTask) -> dict[str, Any]:
    """What a sample depends on beside context, seed and number: for keys of stored results."""
    own = {name: value for name, value in dataclasses.asdict(task).items() if name not in ("data", "number")}
    return own | {"sources": task.sources()}


def lines() -> dict[str, str]:
    """What "ruler" and each of its kinds ask, in a line, with the data that is always there."""
    return {ALL: LINE} | {f"{PREFIX}{name}": task.about() for name, task in KINDS.items()}
