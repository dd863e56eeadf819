"""A budget shared out: one option for each item, the least sum of costs within it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

UNITS = 1 << 16
"""The budget is counted in so many units at most; what an option takes is rounded up to whole ones."""

Option = tuple[int, float]
"""What it takes, and what it costs."""


def share_out(items: Sequence[Sequence[Option]], budget: int) -> list[int] | None:
    """The option of each item that together take at most `budget` and cost least; None if nothing fits.

    Exact, by dynamic programming over what has been spent, where `budget` is at most `UNITS`. Of equals the earlier
    option wins.
    """
    unit = max(1, -(-budget // UNITS))
    room = budget // unit
    if budget < 0:
        return None
    best = np.zeros(room + 1)  # the least cost of what came so far in at most so many units
    picks = []
    for options in items:
        new, pick = np.full(room + 1, np.inf), np.full(room + 1, -1, dtype=np.int32)
        for index, (takes, cost) in enumerate(options):
            units = -(-takes // unit)
            if units > room:
                continue
            sums = best[: room + 1 - units] + cost
            better = sums < new[units:]
            new[units:][better] = sums[better]
            pick[units:][better] = index
        best = new
        picks.append(pick)
    if not np.isfinite(best[room]):
        return None
    out, left = [], room
    for pick, options in zip(reversed(picks), reversed(items)):
        index = int(pick[left])
        out.append(index)
        left -= -(-options[index][0] // unit)
    return out[::-1]
