"""Graph connectivity: which node is joined to which, through others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, passage

_MOST = 27


@task(
    "graph",
    kind="choices",
    line="roads between cities stand in random order in a long text; which way leads on from a start?",
    source="Saparov et al., Transformers Struggle to Learn to Search, 2025",
)
@dataclass(frozen=True)
class Graph(Task):
    """`paths` separate paths of `edges` edges each, the edges in random order in one list at a random depth up to
    `deep`. Given the start of each path, the choices are all ways through one city of each step, so that every edge
    must be right. Asked for the end alone, SmolLM2-135M is at chance (4 of 12 questions at 768 tokens, 4 by
    chance)."""

    paths: int = 3
    edges: int = 2
    deep: float = 0.6

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        if self.paths < 2 or self.edges < 1 or self.paths**self.edges > _MOST:
            raise InputError(
                f"paths={self.paths} of edges={self.edges} cannot be used: use at least 2 paths of at least 1 edge, "
                f"and at most {_MOST} ways (paths to the power of edges)."
            )
        # By steps: all starts, then all second cities, ..., then all ends.
        drawn = rng.sample(CITIES, min(len(CITIES), self.paths * (self.edges + 1)))
        if len(drawn) < self.paths * (self.edges + 1):
            raise InputError(f"paths={self.paths} of edges={self.edges} need more than {len(CITIES)} cities.")
        steps = [drawn[at * self.paths : (at + 1) * self.paths] for at in range(self.edges + 1)]
        edges = [edge for one, other in itertools.pairwise(steps) for edge in zip(one, other)]
        rng.shuffle(edges)
        lines = "\n".join(f"A road leads from {one} to {other}." for one, other in edges)
        planted = (rng.uniform(0, self.deep), f"\n\n{lines}\n\n")
        questions = []
        for start, *way in zip(*steps):
            ways = [_said(cities) for cities in itertools.product(*steps[1:])]
            questions.append(
                Question(f"\n\nA road leads from {start} to", _said(way), tuple(rng.sample(ways, len(ways))))
            )
        return Sample(fill(tokenizer, context, [planted], passage(rng)), tuple(questions))


def _said(way: Sequence[str]) -> str:
    """The way from behind the first edge's start on."""
    return f" {way[0]}" + "".join(f".\nA road leads from {a} to {b}" for a, b in itertools.pairwise(way))
