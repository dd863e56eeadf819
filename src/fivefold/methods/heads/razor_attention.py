"""RazorAttention: heads that retrieve are kept whole, the others keep a window that grows, and a mean of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress, Subject
from fivefold.errors import InputError
from fivefold.methods import Method, TokenPolicy, param, register
from fivefold.store import Extent, LayerSpec

COPIES = 4
_TOKENS = 2_500
"""Random tokens of a copy, as in the paper; fewer where the model's context, or what may be read, is no four copies."""
# Attention weights that are made at a time, which bounds the memory of a calibration.
_WEIGHTS = 1 << 22


@register(
    slot="heads",
    name="razor",
    paper="Tang et al., RazorAttention: Efficient KV Cache Compression Through Retrieval Heads (arXiv:2407.15891)",
)
@dataclass(frozen=True)
class RazorAttention(Method):
    """Heads that retrieve are kept whole; every other head keeps the first `sink` and the last
    `max(least, share * N)` of N tokens, and one compensation token for all the others.

    Which (section 3.2): random tokens x_1..x_n, repeated 4 times, are read. A query head's *echo* score is how much
    attention a token pays to its earlier copies, its *induction* score how much it pays to the tokens right behind
    these, on average over all tokens but the first copy's. The top `induction` of all query heads by the one and the
    top `echo` by the other retrieve. A KV head is kept whole if one of its query heads retrieves. `profile` is the
    folder of a profile with both scores, float32 [layer, query_head]; without it, the one that ships with Fivefold for
    the model is used, if there is one. Layers with a sliding window of their own stay as they are.

    The N_d tokens D that a head has dropped become one (section 3.3), keys being as they attend (after RoPE):

        k = 1/N_d * sum_{m in D} K_m,    v = 1/N_d * sum_{m in D} V_m,

        Attn(q) = (N_d exp(q k) v + sum_{n not in D} exp(q K_n) V_n) / (N_d exp(q k) + sum_{n not in D} exp(q K_n)).

    As in the paper, prompts are compressed after they were read: a query sees what has not been dropped when its chunk
    comes, all of the chunk before it, and the compensation token. So of a prompt that is read in chunks the later ones
    see what is left of the earlier ones, and with `least` tokens or fewer nothing happens at all. Tokens leave a page
    of 32 at a time, so up to 31 more are kept (and seen): a step hardly ever moves anything. What was packed before it
    is dropped counts as it was packed.

    Bytes: as without this method for the heads that are kept whole; the others (sink + max(least, share * N)) tokens,
    in pages, and 8 * head_dim for the compensation token (of every head of a layer that has one).
    """

    induction: float = param(0.14, "fraction of query heads that retrieve by induction score", low=0, high=1)
    echo: float = param(0.01, "fraction of query heads that retrieve by echo score", low=0, high=1)
    sink: int = param(4, "first tokens that other heads hold", low=0)
    least: int = param(4000, "most recent tokens that other heads hold at least", low=1)
    share: float = param(0.2, "fraction of the text that they hold at least, its newest part", low=0, high=1)
    compensate: bool = param(True, "whether what other heads drop becomes one compensation token")
    profile: str | None = param(None, "folder of a profile; left out: the one that ships for the model")

    captures: ClassVar[tuple[Capture, ...]] = ("attending_queries", "attending_keys")
    by_step = True

    def learner(self, specs: Sequence[LayerSpec]) -> Learner:
        return _Scores([spec.layer for spec in specs])

    def excludes(self, other: Method) -> str | None:
        if other.slot == "tokens" and not isinstance(other, TokenPolicy):
            return "both give heads a window: keep one of them in the recipe."
        return None

    def scores(self, spec: LayerSpec) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Layers, and of these the echo and the induction scores `[layer, query_head]`. Raises `ProfileError`."""
        missing = (
            f"razor() knows no retrieval heads of this model ({spec.model}): run fivefold calibrate, and give the "
            "folder as razor(profile=...)."
        )

        def blank() -> dict[str, Any]:
            """As many in one layer as in another, and of each KV head."""
            heads, each = torch.arange(spec.query_heads), spec.query_heads // spec.kv_heads
            even = -(heads % each * spec.kv_heads + heads // each).float().expand(spec.layers, -1).contiguous()
            return {"layers": list(range(spec.layers)), "echo": even, "induction": even}

        profile = self.profile_for(spec, self.profile, missing, blank)
        return profile.settings["layers"], profile.tensors["echo"], profile.tensors["induction"]

    def retrieval_heads(self, spec: LayerSpec) -> frozenset[tuple[int, int]]:
        """All query heads of the model that retrieve, as (layer, query_head). Raises `ProfileError`."""
        layers, echo, induction = self.scores(spec)
        found = set()
        for scores, share in ((induction, self.induction), (echo, self.echo)):
            order = scores.flatten().argsort(descending=True, stable=True)
            for index in order[: round(share * scores.numel())].tolist():
                found.add((layers[index // scores.shape[1]], index % scores.shape[1]))
        return frozenset(found)

    def extents(self, spec: LayerSpec) -> list[Extent]:
        if spec.window is not None:
            return [Extent()] * spec.kv_heads
        each = spec.query_heads // spec.kv_heads
        kept = {head // each for layer, head in self.retrieval_heads(spec) if layer == spec.layer}
        other = Extent(self.sink, self.least, share=self.share, compensate=self.compensate)
        return [Extent() if head in kept else other for head in range(spec.kv_heads)]


class _Scores(Learner):
    """Echo and induction scores of all query heads, from one text of repeated random tokens."""

    def __init__(self, layers: list[int]) -> None:
        super().__init__()
        self.layers = layers
        self.copy = _TOKENS

    def pieces(self, subject: Subject) -> list[torch.Tensor]:
        config = subject.model.config.get_text_config()
        longest = getattr(config, "max_position_embeddings", None) or COPIES * _TOKENS
        longest = min(longest, subject.tokens)
        self.copy = min(_TOKENS, longest // COPIES)
        if self.copy < 2:
            raise InputError(f"{longest} tokens cannot hold {COPIES} copies of a text: razor needs {2 * COPIES}.")
        generator = torch.Generator().manual_seed(subject.seed)
        known = config.vocab_size
        # Each token once where there are enough: a copy is then told from everything else.
        ids = torch.randperm(known, generator=generator)[: self.copy]
        if known < self.copy:
            ids = torch.randint(known, (self.copy,), generator=generator)
        return [ids.repeat(COPIES)[None]]

    def see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        queries, keys = captured["attending_queries"][0], captured["attending_keys"][0]
        echo, induction = attention_to_copies(queries, keys, self.copy)
        self.add(f"echo.{layer}", echo.double())
        self.add(f"induction.{layer}", induction.double())

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        settings = {"layers": self.layers, "tokens": self.copy, "copies": COPIES}
        names = ("echo", "induction")
        return settings, {n: torch.stack([self.sums[f"{n}.{i}"] for i in self.layers]).float() for n in names}


def attention_to_copies(queries: torch.Tensor, keys: torch.Tensor, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to earlier copies of the same token, and to the tokens behind these: float32 `[query_head]` each, the
    mean over all tokens but the first `copy`.

    queries: `[query_head, tokens, head_dim]`, keys: `[kv_head, tokens, head_dim]`, as they meet (the scaling included),
    of a text that repeats its first `copy` tokens. Made for some queries of one KV head at a time.
    """
    heads, tokens, _ = queries.shape
    each = heads // len(keys)
    sums = queries.new_zeros(2, heads)
    step = max(1, _WEIGHTS // (each * tokens))
    for kv_head, key in enumerate(keys):
        mine = slice(kv_head * each, (kv_head + 1) * each)
        for first in range(copy, tokens, step):
            at = torch.arange(first, min(first + step, tokens), device=keys.device)
            scores = queries[mine, at] @ key[: int(at[-1]) + 1].T  # [query_head, query, token]
            later = torch.arange(scores.shape[2], device=keys.device) > at[:, None]
            weights = scores.masked_fill_(later, float("-inf")).softmax(-1)
            earlier = at[:, None] - copy * torch.arange(1, -(-tokens // copy), device=keys.device)
            for number, place in enumerate((earlier, earlier + 1)):
                found = weights.gather(2, place.clamp(min=0).expand(each, -1, -1))
                sums[number, mine] += found.masked_fill_(earlier < 0, 0).sum((1, 2))
    echo, induction = sums / (tokens - copy)
    return echo, induction
