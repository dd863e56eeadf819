"""What the planner knows of a model: its layers, and how many weights it has."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

Kind = Literal["full", "sliding", "shared", "latent", "linear"]
FUSED = {"llama", "mistral", "qwen2", "qwen3"}
"""Families whose decoding steps run in fused kernels (`models/fused.py`), where they are dense and not quantised."""


@dataclass(frozen=True)
class LayerShape:
    """One layer, by what it keeps of a text.

    kind: "full" keeps keys and values of all tokens; "sliding" those of the last `window - 1` tokens beside the newest;
    "shared" nothing, it reads those of layer `source`; "latent" (MLA) `latent` numbers a token for all heads; "linear"
    (linear attention, convolutions) `state` numbers a sequence, however long, which a layer may keep beside its keys
    too. head_dim: of keys and values. cap: what scores are held within, if they are. chunked: its window is a chunk of
    fixed places, which Fivefold never compresses.
    """

    kind: Kind
    query_heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    source: int | None = None
    latent: int = 0
    state: int = 0
    chunked: bool = False
    cap: float | None = None

    @property
    def numbers(self) -> int:
        """Numbers that a token takes in an exact cache, while the layer keeps it."""
        if self.kind == "latent":
            return self.latent
        return 2 * self.kv_heads * self.head_dim if self.kind in ("full", "sliding") else 0

    def tokens(self, context: int) -> int:
        """How many tokens of a text an exact cache keeps."""
        if self.kind == "sliding" and self.window is not None:
            return min(context, self.window - 1)
        return context if self.kind in ("full", "latent") else 0


@dataclass(frozen=True)
class ModelShape:
    """A decoder.

    name: as it was given. family: its `model_type`. layers: all of them, those without attention too. hidden: width of
    the residual stream, intermediate: of the widest MLP. parameters: all weights, each counted once. embedding: those
    of them that a step only looks up, one row a token (0 where the output layer is the same matrix). routed: those of
    the experts that a router chooses from, routed_bytes as they are stored, `experts` in each layer of which a token
    takes `chosen`. weight_bytes: all weights as they are stored. dtype: of weights, and of keys and values. context:
    the longest text that the model is made for. measured: whether parameters and weight_bytes were read from the
    headers of its files; else they were worked out from the configuration. counted: whether all numbers are right for
    the family; else the weights are those of a Llama of this size, or without what is for pictures, or states are left
    out. signature, config: what a profile is matched with (`fivefold.signature`); config is empty, and not compared,
    where that takes transformers. why_not: why no recipe but `full()` can be used with it; None if they can.
    """

    name: str
    family: str
    layers: tuple[LayerShape, ...]
    hidden: int
    vocabulary: int
    parameters: int
    embedding: int
    weight_bytes: int
    dtype: str = "bfloat16"
    routed: int = 0
    routed_bytes: int = 0
    experts: int = 0
    chosen: int = 0
    context: int | None = None
    intermediate: int = 0
    measured: bool = False
    counted: bool = True
    signature: str = ""
    config: str = ""
    why_not: str | None = None

    @property
    def kinds(self) -> Counter[str]:
        """How many layers there are of each kind."""
        return Counter(layer.kind for layer in self.layers)

    def share(self, gpus: int) -> float:
        """How much of a cache each of so many GPUs holds, where heads are shared out: KV heads are not split, so there
        is at least one on each, and a latent cache is whole on each."""
        heads = {layer.kv_heads for layer in self.layers if layer.kind in ("full", "sliding")}
        return max((-(-count // gpus) / count for count in heads if count), default=1.0)

    def active(self, tokens: int = 1) -> float:
        """Weights that a step over so many tokens reads: of experts, those that at least one token is expected to
        choose."""
        dense = self.parameters - self.embedding - self.routed
        if not self.routed:
            return float(dense)
        missed = (1 - self.chosen / self.experts) ** tokens
        return dense + self.routed * (1 - missed)

    def read(self, tokens: int = 1) -> float:
        """Bytes of the weights that such a step reads. Experts may be packed where nothing else is."""
        if not self.routed:
            return self.active(tokens) * self.weight_bytes / self.parameters
        dense = (self.weight_bytes - self.routed_bytes) * self.active(0) / (self.parameters - self.routed)
        return dense + self.routed_bytes * (1 - (1 - self.chosen / self.experts) ** tokens)

    @property
    def fused(self) -> bool:
        """Whether its decoding steps run in fused kernels."""
        plain = not self.routed and self.weight_bytes >= 2 * self.parameters
        # A layer whose attention is left out is "linear" (`memory.running`); these families have no others.
        return self.family in FUSED and plain and set(self.kinds) <= {"full", "linear"}

    @property
    def multiplied(self) -> float:
        """Weights that each token is multiplied with."""
        dense = self.parameters - self.embedding - self.routed
        return dense + (self.routed * self.chosen / self.experts if self.routed else 0.0)
