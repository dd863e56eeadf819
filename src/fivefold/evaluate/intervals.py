"""Confidence intervals for scores."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a share `right / total` (95% for the default z); (0, 1) without any trial.

    Wilson, 1927; unlike the normal interval it holds for shares near 0 and 1 and for few trials.
    """
    if total == 0:
        return 0.0, 1.0
    share = right / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def bootstrap(
    groups: Sequence[Sequence[float]], level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over all values, drawing whole groups (questions of one sample are not
    independent: they share a prefix). (nan, nan) without any value."""
    groups = [group for group in groups if group]
    if not groups:
        return math.nan, math.nan
    pick = random.Random(seed)
    sums = [(sum(group), len(group)) for group in groups]
    means = []
    for _ in range(rounds):
        drawn = [sums[pick.randrange(len(sums))] for _ in sums]
        means.append(sum(s for s, _ in drawn) / sum(n for _, n in drawn))
    means.sort()
    tail = (1 - level) / 2
    return means[int(tail * rounds)], means[min(rounds - 1, int((1 - tail) * rounds))]
