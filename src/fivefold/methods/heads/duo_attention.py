"""DuoAttention: retrieval heads hold the whole context, the others sinks and a recent window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fivefold.calibrate.learner import Subject, Work
from fivefold.errors import RecipeError
from fivefold.methods import Method, param, register
from fivefold.store import Extent, LayerSpec


@register(
    slot="heads",
    name="duo",
    paper="Xiao et al., DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, "
    "ICLR 2025 (arXiv:2410.10819)",
)
@dataclass(frozen=True)
class DuoAttention(Method):
    """KV heads named as retrieval heads hold the whole context; every other one holds the first `sink` and the last
    `recent` tokens (section 2.3), during prefill as well as during decoding.

    `retrieval` is a list of [layer, kv_head] pairs, or the folder of a profile with a tensor `scores` float32
    [layer, kv_head], of which the highest `keep` fraction over all layers are the retrieval heads (negative ones are of
    layers that are not compressed, and do not count). Without it, the profile that ships with Fivefold for the model is
    used, if there is one: its settings say what the scores are. `fivefold calibrate` makes a profile of gates, trained
    as in the paper (section 2.2): see `fivefold/calibrate/gates.py`. With `even` (ours) the `keep` fraction of each
    layer's heads are chosen, the highest in it: as many in one layer as in another, which serving engines ask for.

    Bytes: `keep` of the heads as without this method; the others (sink + recent) tokens, in pages of 32.
    """

    keep: float = param(0.5, "fraction of KV heads that hold everything (with a profile)", low=0, high=1)
    retrieval: tuple | str | None = param(None, "retrieval heads: [[layer, kv_head], ...] or a profile")
    sink: int = param(64, "first tokens that streaming heads hold", low=0, by_layer=True)
    recent: int = param(256, "most recent tokens that streaming heads hold", low=1, by_layer=True)
    even: bool = param(False, "whether every layer has as many retrieval heads (with a profile; ours)")

    def check(self) -> None:
        if not isinstance(self.retrieval, tuple):
            return
        for pair in self.retrieval:
            if not (
                isinstance(pair, tuple)
                and len(pair) == 2
                and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in pair)
            ):
                raise RecipeError(f"duo(retrieval=...) holds {pair!r}: write pairs [layer, kv_head], counted from 0.")

    def work(self, subject: Subject) -> Work:
        """The gates of all KV heads, trained for `keep`, with `sink` and `recent` cut to the training texts."""
        if self.retrieval is not None:
            raise RecipeError(
                f"{self} names its retrieval heads and has nothing to learn: calibrate without retrieval."
            )
        if not 0 < self.keep < 1:
            raise RecipeError(f"{self} tells no head from another: calibrate with a keep between 0 and 1.")
        from fivefold.calibrate.gates import Gates

        return Gates(subject, self.keep, self.sink, self.recent)

    def retrieval_heads(self, spec: LayerSpec) -> frozenset[tuple[int, int]]:
        """All retrieval heads of the model as (layer, kv_head). Raises `RecipeError` or `ProfileError`."""
        if isinstance(self.retrieval, tuple):
            for layer, head in self.retrieval:
                if layer >= spec.layers or head >= spec.kv_heads:
                    raise RecipeError(
                        f"duo(retrieval=...) names layer {layer}, kv head {head}, and the model has {spec.layers} "
                        f"layers of {spec.kv_heads} kv heads."
                    )
            return frozenset(self.retrieval)
        missing = (
            f"duo() knows no retrieval heads of this model ({spec.model}): give them as "
            "duo(retrieval=[[layer, kv_head], ...]) or as the folder of a profile, which fivefold calibrate makes."
        )

        def blank() -> dict[str, Any]:
            """As many in one layer as in another."""
            return {"scores": torch.arange(spec.kv_heads).flip(0).expand(spec.layers, -1).contiguous()}

        scores = self.profile_for(spec, self.retrieval, missing, blank).tensors["scores"]
        if self.even:
            best = scores.argsort(dim=1, descending=True, stable=True)[:, : round(self.keep * scores.shape[1])]
            return frozenset((layer, head) for layer, heads in enumerate(best.tolist()) for head in heads)
        order = scores.flatten().argsort(descending=True, stable=True)
        kept = order[: round(self.keep * int((scores >= 0).sum()))].tolist()
        return frozenset(divmod(int(i), scores.shape[1]) for i in kept)

    def extents(self, spec: LayerSpec) -> list[Extent]:
        heads = self.retrieval_heads(spec)
        streaming = Extent(self.sink, self.recent)
        return [Extent() if (spec.layer, head) in heads else streaming for head in range(spec.kv_heads)]
