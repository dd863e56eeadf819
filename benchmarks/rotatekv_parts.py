"""Where the attention of a decoding step of rotatekv (or cskv) goes on the embedded model.

    python benchmarks/rotatekv_parts.py [--context 4096] [--steps 32] [--recipe "rotatekv(bits=2)"]

Every part is timed as it is called, in steps of a whole model; what a part calls that has a row of its own is not in
its row. Medians of a step, all layers together.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import typer
from rich.progress import track

import fivefold
from fivefold.evaluate.demo import make_task
from fivefold.kernels.rotated import reference
from fivefold.methods import low_rank
from fivefold.methods.before_rope import BeforeRope
from fivefold.methods.bits import rotatekv
from fivefold.models import attention, embedded
from fivefold.store import Rope

PARTS: tuple[tuple[str, Any, str], ...] = (
    ("store, softmax, merge, exact tier", attention, "attend"),
    ("scores: the product with queries", BeforeRope, "scores"),
    ("keys: codes times scales", rotatekv._Bound, "before"),
    ("keys: features times basis", low_rank.Bound, "before"),
    ("keys: rotation undone", reference, "transform_columns"),
    ("keys, turned, times queries (compiled)", rotatekv, "rotated_scores"),
    ("keys: turned by position", Rope, "rotate_columns"),
    ("values: weighted codes", rotatekv, "planar_output"),
    ("values: weighted features", low_rank.Bound, "output"),
    ("sinks, values' rotation undone", rotatekv._Bound, "output"),
)


class Clock:
    """Seconds by part; a part's time stops while one inside it runs."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.inside: list[str] = []
        self.since = 0.0

    def _note(self) -> None:
        now = time.perf_counter()
        if self.inside:
            self.spent[self.inside[-1]] = self.spent.get(self.inside[-1], 0.0) + now - self.since
        self.since = now

    def watch(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._note()
            self.inside.append(what)
            try:
                return call(*args, **kwargs)
            finally:
                self._note()
                self.inside.pop()

        return timed


def main(context: int = 4096, steps: int = 32, recipe: str = "rotatekv(bits=2)") -> None:
    model, tokenizer = embedded.load()
    task, clock = make_task(tokenizer, context), Clock()
    cache = fivefold.compress(model, recipe)
    for what, owner, name in PARTS:
        setattr(owner, name, clock.watch(what, getattr(owner, name)))
    taken: dict[str, list[float]] = {}
    with torch.inference_mode():
        model(task.prefix, past_key_values=cache, logits_to_keep=1)
        for step in track(range(steps), "decode"):
            clock.spent.clear()
            model(task.continuation[:, step % task.continuation.shape[1]].view(1, 1), past_key_values=cache)
            for what, seconds in clock.spent.items():
                taken.setdefault(what, []).append(seconds)
    medians = {what: 1e3 * statistics.median(seconds) for what, seconds in taken.items()}
    print(f"{recipe}, {context} tokens, {torch.get_num_threads()} threads: ms of a step")
    for what, ms in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"{ms:7.2f}  {what}")
    print(f"{sum(medians.values()):7.2f}  together")


if __name__ == "__main__":
    typer.run(main)
