"""LLM-Drop: the attention of layers that change the residual stream least does not run at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.errors import RecipeError
from fivefold.methods import Method, param, register
from fivefold.store import LayerSpec


@register(
    slot="layers",
    name="drop",
    paper="He et al., What Matters in Transformers? Not All Attention is Needed (arXiv:2406.15786)",
)
@dataclass(frozen=True)
class LLMDrop(Method):
    """The attention modules that matter least, as many as `layers` says, are left out, in prompts and steps alike: no
    projections, no keys and values, no cache, no pages (section 3, "attention drop").

    How little a module matters is the similarity of what enters it and what leaves it, over the tokens of a text:

        S = cos(X, Y),  Y = X + Attention(Norm(X)),

    X being the residual stream before the norm, `[tokens, hidden]`. The modules with the highest mean S go, in one
    shot: S is that of the whole model. A layer without its attention is X + MLP(Norm(X)); where attention and MLP stand
    side by side, the MLP alone is added. A list names the layers by hand, counted from 0, of those that can be
    compressed.

    As the official code with `drop_norm=True`, its scripts' default; with False it compares Norm(X) with
    Attention(Norm(X)), which says something else. The norm goes with the module, as there, unless something else is
    given what it makes (an MLP side by side with attention). What a family does to its attention's output before it
    adds it (a norm, a factor) is part of Attention here.

    Bytes: those of the layers that are left, 0 for the others. A step reads hidden * head_dim * 2 * (query_heads +
    kv_heads) weights less for each.
    """

    layers: int | tuple = param(4, "how many modules go, those that change least; or a list of layers", low=0)
    profile: str | None = param(None, "folder of a profile; left out: the one that ships for the model")

    captures: ClassVar[tuple[Capture, ...]] = ("residual", "added")

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        return _Similarity([spec.layer for spec in specs])

    def check(self) -> None:
        chosen = self.layers
        if isinstance(chosen, int):
            return
        if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in chosen):
            raise RecipeError(
                f"drop(layers={list(chosen)}) is not possible: name layers, counted from 0, like [7, 25], or say how "
                "many."
            )
        if len(set(chosen)) < len(chosen):
            raise RecipeError(f"drop(layers={list(chosen)}) names a layer twice: name each once.")

    def order(self, specs: Sequence[LayerSpec]) -> list[int]:
        """The layers, that whose attention changes the residual stream least first. Raises `ProfileError`."""
        spec, names = specs[0], [spec.layer for spec in specs]
        missing = (
            f"drop() does not know which attention modules of this model ({spec.model}) matter least: name layers as "
            'drop(layers=[...]), or make a profile with fivefold calibrate -r "drop()" and give its folder as '
            "profile=..."
        )

        def blank() -> dict[str, Any]:
            """The last ones first."""
            return {"layers": torch.tensor(names), "similarity": torch.tensor(names, dtype=torch.float32)}

        found = self.profile_for(spec, self.profile, missing, blank).tensors
        order = found["similarity"].argsort(descending=True, stable=True)
        return [layer for layer in found["layers"][order].tolist() if layer in names]

    def absent(self, specs: Sequence[LayerSpec]) -> frozenset[int]:
        names = [spec.layer for spec in specs]
        if isinstance(self.layers, int):
            if not (self.layers and specs):
                return frozenset()
            if self.layers >= len(names):
                raise RecipeError(
                    f"drop(layers={self.layers}) leaves no attention in a model with {len(names)} layers that can be "
                    f"compressed: leave out at most {len(names) - 1}."
                )
            return frozenset(self.order(specs)[: self.layers])
        for layer in self.layers:
            if layer not in names:
                raise RecipeError(
                    f"drop(layers=...) names layer {layer}, and the layers of this model that can be compressed are "
                    f"{', '.join(map(str, names))}."
                )
        return frozenset(self.layers)


class _Similarity(Learner):
    """The mean over all tokens of the cosine of the residual stream before and behind each layer's attention."""

    def __init__(self, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        before = captured["residual"].flatten(0, 1)
        cosines = torch.nn.functional.cosine_similarity(before, before + captured["added"].flatten(0, 1), dim=-1)
        here = torch.tensor(self.layers) == layer
        self.add("similarity", here * cosines.double().sum().cpu())
        self.add("tokens", here * torch.tensor(len(cosines), dtype=torch.float64))

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        similarity = (self.sums["similarity"] / self.sums["tokens"]).float()
        return {}, {"layers": torch.tensor(self.layers), "similarity": similarity}
