"""Kascade: a few anchor layers look at everything and pick, the layers between read what the head most like each of
theirs picked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from fivefold.calibrate.learner import Capture, Learner, Progress
from fivefold.errors import InputError, ProfileError, RecipeError
from fivefold.methods import ReadPolicy, param, register
from fivefold.store import LayerSpec

_LENGTH = 8_192


@register(
    slot="reads",
    name="anchors",
    paper="Deshmukh et al., Kascade: A Practical Sparse Attention Method for Long-Context LLM Inference "
    "(arXiv:2512.16391)",
)
@dataclass(frozen=True)
class Anchors(ReadPolicy):
    """In a decoding step the anchor layers read everything, and pick for each KV head the `top` tokens with most
    attention; the layers between two anchors read only what the first of them picked, each KV head what the anchor's
    head most like it did (section 3). Prompts, and several tokens at once, are read whole. Memory stays what it is.

    How alike: with P_j,h the attention of a query in layer j, summed over the query heads of KV head h, and I_i,g the
    `top` tokens of layer i's head g,

        sim(i, g; j, h) = mean over texts of min over queries of P_j,h[I_i,g] / P_j,h[I_j,h]

        sim(i, j) = mean over h of max over g of sim(i, g; j, h)

    The anchors a_1 = 0 < a_2 < ... < a_n maximise the sum over all layers j of sim(a, j), a being the last anchor at or
    before j (dynamic programming, `choose`). Head h of layer j reads what head argmax_g sim(a, g; j, h) picked.
    `fivefold calibrate` finds the similarities, over the last 32 queries of texts of 8,192 tokens; the choice is made
    from them when a cache is made, so that another number of `anchors` needs no other profile.

    Of `top`, the first `sink` and the last `recent` tokens are always part (ours; 0 as in the paper): where heads are
    not mapped, what an anchor's head did not look at would else be lost to one that does. The paper weighs layers by
    1 - cos(x, x + attention(x)) in the sum, which changed next to nothing on the embedded model and is left out, and
    its code compares what 32 queries together pick, as its prefill does. In the official code anchors attend on what
    they picked alone (but layer 0); here on everything, which they have read anyway. `top` is a number of tokens
    (there: a tenth of the context, 128 at least). The paper's sparse prefill is left out.

    `anchors` is how many layers read everything, the first included, or a list of them; layers are counted among those
    that hold the whole context. With a list and no profile, heads read what the head of the same number picked. A head
    with a window reads its window, and is not read from; where no head of an anchor has picked, all is read. The newest
    token is always read, and so is the whole exact tier where there is a packed one.

    Bytes: none. A sparse layer reads at most top + 1 tokens of each head.
    """

    top: int = param(512, "tokens that each head of a sparse layer reads", low=1)
    anchors: int | tuple = param(9, "how many layers read everything, the first included; or a list of them")
    sink: int = param(4, "first tokens that are always among those", low=0)
    recent: int = param(32, "most recent tokens that always are", low=0)
    profile: str | None = param(None, "folder of a profile; left out: the one that ships for the model")

    captures: ClassVar[tuple[Capture, ...]] = ("attention",)

    def check(self) -> None:
        some = self.anchors if isinstance(self.anchors, tuple) else (self.anchors - 1,)
        if not some or any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in some):
            raise RecipeError(
                f"anchors(anchors={list(some) if isinstance(self.anchors, tuple) else self.anchors}) is not possible: "
                "give a number from 1 on, or name layers, counted from 0, like [0, 1, 12]."
            )
        super().check()

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        _heads(specs)
        return _Likeness([spec.layer for spec in specs], specs[0].kv_heads, self.top)

    def similarity(self, specs: Sequence[LayerSpec]) -> torch.Tensor | None:
        """sim(i, g; j, h), float32 `[layer, kv_head, layer, kv_head]`, 0 where i > j; None if nothing is known and
        `anchors` is a list. Raises `ProfileError`."""
        spec, heads = specs[0], _heads(specs)
        missing = (
            f"anchors() knows nothing of this model ({spec.model}): let it learn (fivefold calibrate -r 'anchors()'), "
            "or name the layers that read everything, as anchors(anchors=[0, 1, 12])."
        )

        def blank() -> dict[str, Any]:
            """Layers are the more alike the nearer they are."""
            each = torch.arange(len(specs), dtype=torch.float32)
            near = (1 / (1 + (each - each[:, None]))).triu()
            return {"similarity": near[:, None, :, None].expand(-1, heads, -1, heads).contiguous()}

        try:
            found = self.profile_for(spec, self.profile, missing, blank).tensors["similarity"]
        except ProfileError:
            if self.profile is not None or not isinstance(self.anchors, tuple):
                raise
            return None
        if found.shape != (len(specs), heads, len(specs), heads):
            raise ProfileError(
                f"the profile of anchors() is of {found.shape[0]} layers with {found.shape[1]} KV heads, and the cache "
                f"has {len(specs)} with {heads}: make it anew."
            )
        return found

    def layers(self, specs: Sequence[LayerSpec]) -> tuple[int, ...]:
        """The anchors, counted among `specs`."""
        if isinstance(self.anchors, tuple):
            return tuple(sorted(set(self.within("anchors", self.anchors, specs))))
        similarity = self.similarity(specs)
        assert similarity is not None
        between = similarity.amax(1).mean(2)
        return _choose(between.numpy().tobytes(), len(specs), min(self.anchors, len(specs)))

    def roles(self, specs: Sequence[LayerSpec]) -> list[Literal["full", "select", "sparse"]]:
        anchors = {*self.layers(specs)}
        reads_all = [i in anchors or i < min(anchors) for i in range(len(specs))]
        return [
            "sparse" if not whole else "select" if not all(reads_all[i + 1 : i + 2]) else "full"
            for i, whole in enumerate(reads_all)
        ]

    def nearest(self, specs: Sequence[LayerSpec]) -> dict[int, list[list[int]]]:
        similarity = self.similarity(specs)
        if similarity is None:
            return {}
        found, anchor = {}, 0
        for i, role in enumerate(self.roles(specs)):
            if role == "sparse":
                order = similarity[anchor, :, i].argsort(dim=0, descending=True, stable=True)
                found[i] = order.T.tolist()
            else:
                anchor = i
        return found


def _heads(specs: Sequence[LayerSpec]) -> int:
    """KV heads of a layer. Raises `RecipeError` if layers differ."""
    some = {spec.kv_heads for spec in specs}
    if len(some) > 1:
        raise RecipeError(f"anchors() needs layers with equally many KV heads, and this model has some of {some}.")
    return some.pop()


def choose(between: np.ndarray, count: int) -> tuple[int, ...]:
    """The `count` anchors, the first being layer 0, that make the sum over layers j of `between[a, j]` largest, a being
    the last anchor at or before j. between: float `[layer, layer]`; what is below the diagonal does not matter."""
    layers = len(between)
    # gain[i, j]: of layers i to j - 1, all served by anchor i.
    gain = np.full((layers, layers + 1), -np.inf)
    for i in range(layers):
        gain[i, i + 1 :] = between[i, i:].astype(np.float64).cumsum()
    best = np.full(layers + 1, -np.inf)
    best[0] = 0.0
    back = []
    for _ in range(count):
        total = best[:layers, None] + gain
        back.append(total.argmax(0))
        best = total.max(0)
    chosen, stop = [], layers
    for last in reversed(back):
        stop = int(last[stop])
        chosen.append(stop)
    return tuple(reversed(chosen))


@lru_cache(8)
def _choose(between: bytes, layers: int, count: int) -> tuple[int, ...]:
    """For all layers of a model, and all caches."""
    return choose(np.frombuffer(between, dtype=np.float32).reshape(layers, layers), count)


class _Likeness(Learner):
    """Sums of the similarities over texts, each the least over a text's last queries."""

    length = _LENGTH

    def __init__(self, layers: list[int], kv_heads: int, top: int) -> None:
        super().__init__()
        self.layers, self.kv_heads, self.top = layers, kv_heads, top
        self._text: list[torch.Tensor] = []

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        # The query heads of a kv head pick together.
        self._text.append(captured["attention"][0].unflatten(0, (self.kv_heads, -1)).sum(1))
        if layer != self.layers[-1]:
            return
        weights = torch.stack(self._text)  # [layer, kv_head, query, token]
        self._text = []
        if weights.shape[3] <= self.top:
            return
        picked = weights.topk(self.top, -1).indices
        most = weights.gather(3, picked).sum(3)
        similarity = weights.new_zeros(len(weights), self.kv_heads, *weights.shape[:2])
        for i, heads in enumerate(picked):
            for head, tokens in enumerate(heads):
                mass = weights[i:].gather(3, tokens.expand(len(weights) - i, self.kv_heads, -1, -1)).sum(3)
                similarity[i, head, i:] = (mass / most[i:]).amin(2)
        self.add("similarity", similarity.double())
        self.add("texts", torch.ones((), dtype=torch.float64))

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if "texts" not in self.sums:
            raise InputError(
                f"anchors(top={self.top}) would pick every token of these texts: give longer ones (--tokens), or a "
                "smaller top."
            )
        return {"top": self.top}, {"similarity": (self.sums["similarity"] / self.sums["texts"]).float()}
