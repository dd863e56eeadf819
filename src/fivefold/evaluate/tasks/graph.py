"""Graph connectivity: which node is joined to which, through others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, passage, shuffled


@task(
    "graph",
    kind="choices",
    line="roads between cities stand in random order in a long text; which city can be reached from here?",
    source="Saparov et al., Transformers Struggle to Learn to Search, 2025",
)
@dataclass(frozen=True)
class Graph(Task):
    """`paths` separate paths of `edges` edges each. Asked for is the end of each path, given its start; the choices
    are all ends, which look alike but for the path that leads to them."""

    paths: int = 3
    edges: int = 2
    deep: float = 0.6

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        nodes = self.paths * (self.edges + 1)
        if self.paths < 2 or self.edges < 1 or nodes > len(CITIES):
            raise InputError(
                f"paths={self.paths} of edges={self.edges} need {nodes} cities: use at least 2 paths, "
                f"at least 1 edge and at most {len(CITIES)} cities."
            )
        drawn = rng.sample(CITIES, nodes)
        paths = [drawn[at :: self.paths] for at in range(self.paths)]
        edges = [(one, other) for path in paths for one, other in pairwise(path)]
        rng.shuffle(edges)
        lines = "\n".join(f"A road leads from {one} to {other}." for one, other in edges)
        prefix = fill(tokenizer, context, [(rng.uniform(0, self.deep), f"\n\n{lines}\n\n")], passage(rng))
        ends = [path[-1] for path in paths]
        return Sample(
            prefix,
            tuple(
                Question(
                    f"\n\nStarting in {path[0]} and following the roads, one arrives in the end in",
                    f" {path[-1]}",
                    shuffled(rng, ends),
                )
                for path in paths
            ),
        )
