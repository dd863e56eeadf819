"""TidalDecode: a few layers look at everything and pick, the others read what was picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.calibrate.profile import load_profile
from fivefold.errors import ProfileError, RecipeError
from fivefold.methods import ReadPolicy, param, register
from fivefold.store import LayerSpec

# Where the paper selects again in Llama-3-8B: layer 13 of 32.
_AGAIN = 13 / 32


@register(
    slot="reads",
    name="tidal",
    paper="Yang et al., TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention, "
    "ICLR 2025 (arXiv:2410.05076)",
)
@dataclass(frozen=True)
class Tidal(ReadPolicy):
    """In a decoding step the first `full_layers` read everything; the next one and one further on read everything and
    pick, for each KV head, the `top` tokens with most attention; every other layer reads only what was picked last
    (section 3). Prompts, and several tokens at once, are read whole. Memory stays what it is.

    The paper picks for every query head; here the query heads of a KV head pick together, since they share what is
    read. The newest token is always read, as in the official kernels, and so is the whole exact tier where there is a
    packed one. A head with a window reads its window. `select_layers` are the layers that pick, the first of them
    right behind the full ones; a text is the folder of a profile, and "auto" takes the one that ships with Fivefold for
    the model, and else the paper's place, 13/32 of the way. Layers are counted among those that hold the whole context.

    `fivefold calibrate` finds the second one: where the tokens that it and the first would pick have most of the
    attention of the sparse layers behind each, on average.

    `sink` and `recent` are ours: how many of the first and last tokens are picked whatever their attention.

    Bytes: none. A sparse layer reads min(top, slots) + 1 tokens of each head.
    """

    top: int = param(256, "tokens that each head of a sparse layer reads", low=1)
    full_layers: int = param(2, "first layers, which read everything", low=0)
    select_layers: tuple | str = param("auto", "layers that pick: a list, a profile, or auto")
    sink: int = param(0, "first tokens that are always among those", low=0)
    recent: int = param(0, "most recent tokens that always are", low=0)

    captures: ClassVar[tuple[Capture, ...]] = ("attention",)

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        return _Again([spec.layer for spec in specs], specs[0].kv_heads, self.top, self.full_layers)

    def check(self) -> None:
        super().check()
        chosen = self.select_layers
        if isinstance(chosen, str):
            return
        if not chosen or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in chosen):
            raise RecipeError(
                f"tidal(select_layers={list(chosen)}) is not possible: name layers, counted from 0, like [2, 13]."
            )

    def selecting(self, specs: Sequence[LayerSpec]) -> tuple[int, ...]:
        """The layers that pick, counted among `specs`."""
        if not isinstance(self.select_layers, str):
            return self.within("select_layers", self.select_layers, specs)
        auto, spec = self.select_layers == "auto", specs[0]
        try:
            where = f"tidal-{spec.model}" if auto else self.select_layers
            again = int(load_profile(where, "tidal", spec.model, spec.config).tensors["layer"])
        except ProfileError:
            if not auto:
                raise
            again = round(_AGAIN * len(specs))
        return (self.full_layers, *((again,) if self.full_layers < again < len(specs) else ()))

    def roles(self, specs: Sequence[LayerSpec]) -> list[Literal["full", "select", "sparse"]]:
        chosen = self.selecting(specs)
        first = min(chosen)
        return [
            "select" if i in chosen else "full" if i < max(self.full_layers, first) else "sparse"
            for i in range(len(specs))
        ]


class _Again(Learner):
    """For every layer that could pick again: the share of the sparse layers' attention that what is picked then has."""

    def __init__(self, layers: list[int], kv_heads: int, top: int, full_layers: int) -> None:
        super().__init__()
        self.layers, self.kv_heads, self.top, self.full = layers, kv_heads, top, full_layers
        self._chunk: list[torch.Tensor] = []
        if not self.full + 1 < len(layers):
            raise RecipeError(f"tidal(full_layers={full_layers}) leaves no layer to choose among {len(layers)}.")

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        # The query heads of a kv head pick together.
        self._chunk.append(captured["attention"][0].unflatten(0, (self.kv_heads, -1)).mean(1))
        if layer != self.layers[-1]:
            return
        weights = torch.stack(self._chunk)  # [layer, kv_head, query, token]
        self._chunk = []
        picked = weights.topk(min(self.top, weights.shape[3]), -1).indices
        # Row i: of each layer's attention, what falls on the tokens that layer i picks.
        share = torch.stack([weights.gather(3, p.expand(len(weights), -1, -1, -1)).sum(3).mean((1, 2)) for p in picked])
        recall, first = share.new_zeros(len(weights)), self.full
        for again in range(first + 1, len(weights)):
            recall[again] = torch.cat([share[first, first + 1 : again], share[again, again + 1 :]]).mean()
        self.add("recall", recall.nan_to_num(0).double())
        self.add("chunks", torch.ones((), dtype=torch.float64))

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        recall = (self.sums["recall"] / self.sums["chunks"]).float()
        return {"top": self.top, "full_layers": self.full}, {"layer": recall.argmax(), "recall": recall}
