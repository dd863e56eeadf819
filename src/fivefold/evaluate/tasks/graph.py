"""Graph connectivity: which node is joined to which, through others."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Question, Sample, Task, fill, task
from fivefold.evaluate.tasks.text import CITIES, passage

# For the worked example in the question; none is in the text.
_ELSEWHERE = ("Geneva", "Naples", "Zurich", "Milan", "Munich", "Hamburg")


@task(
    "graph",
    kind="generate",
    line="roads between cities stand in random order in a long text; the model walks from a start to the end",
    source="Saparov et al., Transformers Struggle to Learn to Search, 2025",
)
@dataclass(frozen=True)
class Graph(Task):
    """`paths` separate paths of `edges` edges each, the edges in random order in one list at a random depth up to
    `deep`. Given the start of each, the model writes the way; right if it comes to the end of this path. The ends look
    alike but for the edges that lead to them. Asked for the end alone, without the way, SmolLM2-135M is at chance."""

    paths: int = 3
    edges: int = 2
    deep: float = 0.6

    def make(self, tokenizer: Any, context: int, rng: random.Random) -> Sample:
        nodes = self.paths * (self.edges + 1)
        if self.paths < 2 or not 1 <= self.edges < len(_ELSEWHERE) or nodes > len(CITIES):
            raise InputError(
                f"paths={self.paths} of edges={self.edges} cannot be used: use at least 2 paths, "
                f"1 to {len(_ELSEWHERE) - 1} edges and at most {len(CITIES)} cities in all."
            )
        drawn = rng.sample(CITIES, nodes)
        paths = [drawn[at :: self.paths] for at in range(self.paths)]
        edges = [(one, other) for path in paths for one, other in pairwise(path)]
        rng.shuffle(edges)
        lines = "\n".join(f"{one} -> {other}" for one, other in edges)
        planted = (rng.uniform(0, self.deep), f"\n\nRoads:\n{lines}\n\n")
        example = " -> ".join(_ELSEWHERE[: self.edges + 1])
        questions = tuple(Question(f"\n\nWays along these roads:\n{example}\n{path[0]} ->", path[-1]) for path in paths)
        return Sample(fill(tokenizer, context, [planted], passage(rng)), questions)
