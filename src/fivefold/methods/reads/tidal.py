"""TidalDecode: a few layers look at everything and pick, the others read what was picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    right behind the full ones; "auto" takes them from the profile that ships with Fivefold for the model, and else
    the paper's place, 13/32 of the way. Layers are counted among those that hold the whole context.

    Bytes: none. A sparse layer reads min(top, slots) + 1 tokens of each head.
    """

    top: int = param(256, "tokens that each head of a sparse layer reads", low=1)
    full_layers: int = param(2, "first layers, which read everything", low=0)
    select_layers: tuple | str = param("auto", "layers that pick: a list, or auto")

    def check(self) -> None:
        chosen = self.select_layers
        if isinstance(chosen, str):
            if chosen != "auto":
                raise RecipeError(f"tidal(select_layers={chosen!r}) is not possible: give a list of layers, or 'auto'.")
        elif not chosen or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in chosen):
            raise RecipeError(
                f"tidal(select_layers={list(chosen)}) is not possible: name layers, counted from 0, like [2, 13]."
            )

    def selecting(self, specs: Sequence[LayerSpec]) -> tuple[int, ...]:
        """The layers that pick, counted among `specs`."""
        if not isinstance(self.select_layers, str):
            for layer in self.select_layers:
                if layer >= len(specs):
                    raise RecipeError(
                        f"tidal(select_layers=...) names layer {layer}, and the model has {len(specs)} with the whole "
                        "context, counted from 0."
                    )
            return self.select_layers
        try:
            profile = load_profile(f"tidal-{specs[0].model}", "tidal", specs[0].model)
            again = int(profile.tensors["layer"])
        except ProfileError:
            again = round(_AGAIN * len(specs))
        return (self.full_layers, *((again,) if self.full_layers < again < len(specs) else ()))

    def roles(self, specs: Sequence[LayerSpec]) -> list[Literal["full", "select", "sparse"]]:
        chosen = self.selecting(specs)
        first = min(chosen)
        return [
            "select" if i in chosen else "full" if i < max(self.full_layers, first) else "sparse"
            for i in range(len(specs))
        ]
