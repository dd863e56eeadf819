"""Confidence intervals for scores, made for few texts.

Questions about one text are not independent: they count as if their correlation were `CORRELATION`, so that four
questions of one text weigh about as much as two of two texts. A bootstrap over two or three texts would not cover.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964
CORRELATION = 0.3
Interval = tuple[float, float] | tuple[None, None]
Groups = Sequence[Sequence[float]]
"""Scores of questions, those of one text together."""

# Student's t for 95%, by degrees of freedom from 1 on.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def wilson(right: float, total: float, z: float = Z) -> tuple[float, float]:
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


def effective(groups: Groups) -> float:
    """How many independent questions the questions of `groups` are worth (Kish's design effect)."""
    total = sum(map(len, groups))
    if total == 0:
        return 0.0
    return total / (1 + (sum(len(group) ** 2 for group in groups) / total - 1) * CORRELATION)


def share_interval(groups: Groups) -> tuple[float, float]:
    """95% interval of the share of right answers; scores are 0 or 1, or between where an answer is right in part: those
    vary less than right and wrong ones of the same mean, so that the interval holds for them."""
    flat = [score for group in groups for score in group]
    count = effective(groups)
    return wilson(sum(flat) / len(flat) * count if flat else 0.0, count)


def mean_interval(groups: Groups) -> Interval:
    """95% interval (Student's t) of a mean of anything; (None, None) if one question is all there is."""
    flat = [score for group in groups for score in group]
    found = mean_variance(groups)
    if found is None:
        return None, None
    variance, freedom = found
    mean, spread = sum(flat) / len(flat), t_quantile(freedom) * math.sqrt(variance)
    return mean - spread, mean + spread


def mean_variance(groups: Groups) -> tuple[float, float] | None:
    """(variance of the mean, degrees of freedom), None if one question is all there is."""
    flat = [score for group in groups for score in group]
    count = effective(groups)
    if len(flat) < 2 or count <= 1:
        return None
    mean = sum(flat) / len(flat)
    return sum((score - mean) ** 2 for score in flat) / (len(flat) - 1) / count, count - 1


def lost_variance(exact: Groups, other: Groups) -> float:
    """Variance of the difference between two shares of right answers to the same questions.

    Bonett and Price, 2012: one lost and one gained answer are added, so that it is not zero where none was lost. An
    answer may be right in part (scores from 0 to 1): what is lost and gained of it counts, which is never too narrow.
    """
    count = effective(exact)
    total = sum(map(len, exact))
    pairs = [(a, b) for one, two in zip(exact, other) for a, b in zip(one, two)]
    lost = (sum(max(0.0, a - b) for a, b in pairs) / total * count + 1) / (count + 2)
    gained = (sum(max(0.0, b - a) for a, b in pairs) / total * count + 1) / (count + 2)
    return (lost + gained - (lost - gained) ** 2) / (count + 2)


def mean_of_parts(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """(mean, low, high) of the mean of independent figures, each (value, low, high) with its 95% interval.

    Zou and Donner, 2008 (MOVER): the distances to the bounds add up in squares, each side by itself.
    """
    mean = sum(value for value, _, _ in parts) / len(parts)
    below = math.sqrt(sum((value - low) ** 2 for value, low, _ in parts)) / len(parts)
    above = math.sqrt(sum((high - value) ** 2 for value, _, high in parts)) / len(parts)
    return mean, mean - below, mean + above


def spread_of_sum(parts: Sequence[tuple[float, float]]) -> float:
    """Half the width of the 95% interval of a sum of independent parts, each (variance, degrees of freedom).

    Degrees of freedom together as of Satterthwaite, 1946; `math.inf` where a variance is not estimated from a spread.
    """
    total = sum(variance for variance, _ in parts)
    uncertain = sum(variance**2 / freedom for variance, freedom in parts)
    freedom = total**2 / uncertain if uncertain else math.inf
    return t_quantile(freedom) * math.sqrt(total)


def t_quantile(freedom: float) -> float:
    """Student's t for a two-sided 95% interval; between whole degrees of freedom, the wider."""
    if freedom > len(_T):
        return Z + 2.4 / freedom
    return _T[max(1, int(freedom)) - 1]
