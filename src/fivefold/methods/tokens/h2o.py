"""H2O: the tokens that received most attention so far, and the recent ones."""

from __future__ import annotations

from dataclasses import dataclass

from fivefold.methods import RecentPolicy, floor_param, keep_param, param, register


@register(
    slot="tokens",
    name="h2o",
    paper="Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, "
    "NeurIPS 2023 (arXiv:2306.14048)",
)
@dataclass(frozen=True)
class H2O(RecentPolicy):
    """Every KV head holds `keep` of the prompt's tokens: the `recent` share of them is the newest ones, the rest those
    that received most attention, summed over all queries so far (Algorithm 1).

    Prefill attends to everything, then all but the budget go; from then on each step adds its attention to the scores,
    and one token goes. The paper's models have no groups: here the query heads of a KV head add up. Followed is the
    official code that really drops (its simulation by a mask lets a token out of the window for one step and back in).

    Bytes per head: max(floor, round(keep * prompt)) tokens in pages, and 8 bytes for each of them (position, score).
    """

    default_keep = 0.2
    keep: float | None = keep_param(default_keep)
    floor: int | None = floor_param()
    recent: float = param(0.5, "fraction of those that are the most recent tokens", low=0, high=1)

    joins = True
