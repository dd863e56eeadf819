"""Fewer KV heads in the model itself: `convert`, and the arithmetic of merging heads.

Source: Khan et al., Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention (arXiv:2408.08454). Heads are
mean-pooled as in Ainslie et al., GQA (arXiv:2305.13245).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from fivefold.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

By = Literal["uniform", "norm", "alike", "proportional"]
TOKENS = 16_384
_ROUNDS = 50
_SETTLED = 1e-12


def convert(
    model: PreTrainedModel,
    kv_heads: int,
    by: By = "norm",
    align: bool = True,
    tokenizer: Any = None,
    ids: torch.Tensor | None = None,
) -> PreTrainedModel:
    """Rewrite `model` in place to `kv_heads` KV heads a layer, and return it.

    A start for uptraining, nothing more: without it the model is damaged badly (docs/methods.md has the figures). What
    comes out is an ordinary model of its family, smaller by its weights and its cache: any cache works with it,
    `compress` too, and it can be trained, saved and loaded. Convert first and compress then: caches and profiles of the
    model as it was do not fit any more.

    **Which query heads read which KV head.** A KV head of the new model stands for a *group*: a number of query heads,
    and the old KV heads that they read, merged into one: `K = sum_h w_h T_h K_h`, w_h the share of the group's query
    heads that read h before; values likewise.

    - `by="uniform"`: consecutive KV heads, as evenly as possible (GQA).
    - `by="norm"`: the groups whose keys are smallest (root of the sum of squares over the text, as in the paper; of a
      group the sum) are merged, two at a time, so that large keys stay by themselves.
    - `by="alike"`: the KV heads (then groups) whose keys and values differ least are merged, two at a time (Ward).
    - `by="proportional"`: the allotment of the paper (KDGQA), repaired. The KV heads with the largest keys are kept,
      and query heads are allotted to them in proportion to those norms, by largest remainder (`allot`). Each keeps its
      own, those of the heads that are not kept go where there is room, and bring along their share of keys and values.

    What the paper's rule lacks here: its code makes norms min-max, so that the smallest head gets no query head at all,
    divides by zero where norms are equal, cuts query heads by their order, so that they read heads that they were not
    trained with, and does so anew for every batch. And a larger share for larger keys is a plan for training: in a
    model that is only converted, query heads need the keys that they were trained with. Splitting the query heads of
    one KV head over several groups costs more there than merging whole ones, and merging small keys ("norm") less.

    **Unequal groups** are padded: transformers gives every KV head equally many query heads, so smaller groups get
    query heads with zeros in q_proj and o_proj, which add nothing. They cost computation, no cache: SmolLM2's 9 query
    heads over 3 KV heads become 12 over 2. `num_attention_heads` grows by them, and `head_dim` stays as it was.

    **align** (T_h; without it 1). Two heads may hold the same in other coordinates. So they are turned to each other
    before they are merged: keys by one unit complex number for each pair of channels that RoPE turns, which commutes
    with RoPE (channels that it leaves alone by an orthogonal matrix), values by an orthogonal matrix (Procrustes), each
    the one that brings a head nearest to the mean of the others of its group, over the text. The turns are folded into
    k_proj and v_proj, biases too, and into q_proj and o_proj of the query heads: heads that are equal up to such turns
    merge without loss.

    Args:
        model: a model of transformers whose attention has q_proj, k_proj, v_proj and o_proj (Llama, Mistral, Qwen2,
            SmolLM2, ...; Qwen3 with align=False, for its norm of keys does not commute with the turns).
        kv_heads: of the new model, fewer than it has.
        tokenizer: of the model; 16,384 tokens of `fivefold.calibrate.reading.default_texts` are read.
        ids: int64 [texts, tokens], to be read instead. by="uniform" with align=False reads nothing.

    Raises:
        InputError: numbers that do not fit, or no text where it is needed.
        UnsupportedModelError: an attention that is built otherwise. The model is as it was.
    """
    from fivefold.models import conversion

    if by not in get_args(By):
        raise InputError(f"convert(by={by!r}) is not possible: use one of {', '.join(get_args(By))}.")
    shape = conversion.shape_of(model, align)
    if isinstance(kv_heads, bool) or not isinstance(kv_heads, int) or not 1 <= kv_heads < shape.kv_heads:
        most = {1: "another model: it has one KV head", 2: "1"}.get(shape.kv_heads, f"1 to {shape.kv_heads - 1}")
        raise InputError(f"convert(kv_heads={kv_heads!r}) does not make fewer of {shape.kv_heads}: use {most}.")
    moments = None
    if align or by != "uniform":
        if ids is None and tokenizer is None:
            raise InputError(
                f"convert(by={by!r}, align={align}) looks at keys and values of text: give tokenizer=..., or ids=..."
            )
        moments = conversion.moments(model, tokenizer, ids, TOKENS)
    return conversion.rewrite(model, shape, conversion.groups_of(shape, moments, kv_heads, by, align))


@dataclass(frozen=True)
class Group:
    """A KV head of the new model. queries: the query heads that read it. share: of each old KV head in it, adds up to
    1. turns: of each such head, the orthogonal matrices `[head_dim, head_dim]` that its keys and values are multiplied
    with before they are added up, float64."""

    queries: tuple[int, ...]
    share: dict[int, float]
    turns: dict[int, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Heads:
    """The heads of a layer. pairs: int64 `[pairs, 2]`, the channels that RoPE turns together."""

    query_heads: int
    kv_heads: int
    head_dim: int
    pairs: torch.Tensor
    align: bool

    def groups(self, count: int, by: By, keys: torch.Tensor | None, values: torch.Tensor | None) -> list[Group]:
        """The groups, `count` of them. keys, values: second moments of all heads' keys before RoPE and values,
        float64 `[n, n]`, n = kv_heads * head_dim."""
        return [self._group(queries, keys, values) for queries in self._queries(count, by, keys, values)]

    def _queries(
        self, count: int, by: By, keys: torch.Tensor | None, values: torch.Tensor | None
    ) -> list[tuple[int, ...]]:
        """The query heads of each group."""
        each = self.query_heads // self.kv_heads
        own = [list(range(head * each, (head + 1) * each)) for head in range(self.kv_heads)]
        if by == "proportional":
            assert keys is not None
            return self._proportional(count, own, _norms(self._blocks(keys)))
        if by == "uniform":
            sizes = [self.kv_heads // count + (one < self.kv_heads % count) for one in range(count)]
            starts = [sum(sizes[:one]) for one in range(count)]
            parts = [list(range(start, start + size)) for start, size in zip(starts, sizes)]
        elif by == "norm":
            assert keys is not None
            parts = smallest(_norms(self._blocks(keys)), count)
        else:
            assert keys is not None and values is not None
            parts = merged(self._apart(keys, values), count)
        return [tuple(query for head in part for query in own[head]) for part in parts]

    def _proportional(self, count: int, own: list[list[int]], norms: list[float]) -> list[tuple[int, ...]]:
        kept = sorted(sorted(range(self.kv_heads), key=lambda head: (-norms[head], head))[:count])
        sizes = allot([norms[head] for head in kept], self.query_heads, least=len(own[0]))
        groups = [list(own[head]) for head in kept]
        for query in (query for head in range(self.kv_heads) if head not in kept for query in own[head]):
            room = max(range(count), key=lambda one: (sizes[one] - len(groups[one]), -one))
            groups[room].append(query)
        return [tuple(group) for group in groups]

    def _blocks(self, moments: torch.Tensor) -> torch.Tensor:
        """`[n, n]` as `[kv_head, kv_head, head_dim, head_dim]`."""
        return moments.unflatten(0, (self.kv_heads, -1)).unflatten(2, (self.kv_heads, -1)).transpose(1, 2)

    def _apart(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """How much each two heads differ when turned to each other: mean squares of the difference of keys and of
        values, each over those of all heads, `[kv_head, kv_head]`."""
        out = torch.zeros(self.kv_heads, self.kv_heads, dtype=torch.float64)
        for moments, pairs in ((keys, self.pairs), (values, None)):
            blocks = self._blocks(moments)
            squares = blocks.diagonal(dim1=2, dim2=3).sum(2)  # inner products of heads as they are
            size = squares.diagonal()
            for one in range(self.kv_heads):
                for two in range(one):
                    same = squares[one, two]
                    if self.align:
                        same = (nearest(blocks[one, two], pairs) * blocks[one, two]).sum()
                    out[one, two] += (size[one] + size[two] - 2 * same) / size.mean().clamp(min=1e-30)
        return out + out.T

    def _group(self, queries: tuple[int, ...], keys: torch.Tensor | None, values: torch.Tensor | None) -> Group:
        reads = [query * self.kv_heads // self.query_heads for query in queries]
        share = {head: reads.count(head) / len(reads) for head in sorted(set(reads))}
        heads = list(share)
        if self.align and len(heads) > 1:
            assert keys is not None and values is not None
            weights = [share[head] for head in heads]
            pick = torch.tensor(heads)
            turned = [
                aligned(self._blocks(moments)[pick][:, pick], weights, pairs)
                for moments, pairs in ((keys, self.pairs), (values, None))
            ]
        else:
            turned = [torch.eye(self.head_dim, dtype=torch.float64).expand(len(heads), -1, -1)] * 2
        return Group(queries, share, dict(zip(heads, zip(*turned))))


def _norms(keys: torch.Tensor) -> list[float]:
    """Roots of the sums of squares of each head's keys, from blocks of second moments."""
    return [math.sqrt(max(0.0, float(keys[head, head].trace()))) for head in range(len(keys))]


def allot(norms: Sequence[float], query_heads: int, least: int = 1) -> list[int]:
    """How many query heads each KV head gets: in proportion to the norms of keys, by largest remainder, and at least
    `least`; what that takes is taken from the others, in proportion again. Ties go to the first.

    Raises `InputError` if there are too few query heads for that.
    """
    count, total = len(norms), sum(norms)
    if query_heads < least * count:
        raise InputError(f"{query_heads} query heads are too few for {count} KV heads with at least {least}: use more.")
    weights = [norm / total for norm in norms] if total > 0 else [1 / count] * count
    fixed: set[int] = set()
    while True:
        free = [one for one in range(count) if one not in fixed]
        room, whole = query_heads - least * len(fixed), sum(weights[one] for one in free)
        quotas = {one: room * weights[one] / whole if whole > 0 else room / len(free) for one in free}
        short = {one for one in free if quotas[one] < least}
        if not short:
            break
        fixed |= short
    sizes = [least if one in fixed else math.floor(quotas[one]) for one in range(count)]
    by_remainder = sorted(free, key=lambda one: (sizes[one] - quotas[one], one))
    for one in by_remainder[: query_heads - sum(sizes)]:
        sizes[one] += 1
    return sizes


def smallest(norms: Sequence[float], count: int) -> list[list[int]]:
    """Heads in `count` groups: the two whose norms sum up to least are joined next; ties go to the first."""
    groups = [[head] for head in range(len(norms))]
    while len(groups) > count:
        one, two = sorted(range(len(groups)), key=lambda group: (sum(norms[head] for head in groups[group]), group))[:2]
        one, two = min(one, two), max(one, two)
        groups[one] = sorted(groups[one] + groups.pop(two))
    return groups


def merged(apart: torch.Tensor, count: int) -> list[list[int]]:
    """Heads in `count` groups: those two are joined next that raise the sum of squares within groups least (Ward).

    apart: the mean squares of the differences of each two heads, `[head, head]`.
    """
    groups = [[head] for head in range(len(apart))]

    def within(group: list[int]) -> float:
        return float(sum(apart[a, b] for a in group for b in group)) / (2 * len(group))

    while len(groups) > count:
        costs = {
            within(groups[a] + groups[b]) - within(groups[a]) - within(groups[b]): (a, b)
            for b in range(len(groups))
            for a in range(b)
        }
        one, two = costs[min(costs)]
        groups[one] = sorted(groups[one] + groups.pop(two))
    return groups


def nearest(cross: torch.Tensor, pairs: torch.Tensor | None) -> torch.Tensor:
    """The orthogonal T `[head_dim, head_dim]` with which `T y` is nearest to x, given `cross = sum x y^T`: it makes
    `trace(T^T cross)` largest.

    With pairs, int64 `[pairs, 2]`, channels of a pair are turned together, as by a unit complex number, and the rest by
    any orthogonal matrix.
    """
    if pairs is None:
        u, _, v = torch.linalg.svd(cross)
        return u @ v
    out = torch.zeros_like(cross)
    a, b = pairs.T
    real, imaginary = cross[a, a] + cross[b, b], cross[b, a] - cross[a, b]
    phase = torch.polar(torch.ones_like(real), torch.atan2(imaginary, real))
    out[a, a] = out[b, b] = phase.real
    out[b, a], out[a, b] = phase.imag, -phase.imag
    rest = torch.ones(len(cross), dtype=torch.bool)
    rest[pairs.flatten()] = False
    if rest.any():
        left = rest.nonzero()[:, 0]
        out[left[:, None], left] = nearest(cross[left[:, None], left], None)
    return out


def aligned(blocks: torch.Tensor, weights: Sequence[float], pairs: torch.Tensor | None) -> torch.Tensor:
    """T `[head, head_dim, head_dim]` that turn heads to each other: each to the weighted mean of the others, in turn,
    until none of them moves.

    blocks: second moments `[head, head, head_dim, head_dim]` of each two heads.
    """
    turns = torch.eye(blocks.shape[2], dtype=blocks.dtype).expand(len(blocks), -1, -1).clone()
    # The largest stays as it is in the first round, and the others are turned to those that were turned before.
    order = sorted(range(len(blocks)), key=lambda head: (-float(blocks[head, head].trace()), head))
    for number in range(_ROUNDS):
        before = turns.clone()
        for place, head in enumerate(order):
            others = order[:place] if number == 0 else [other for other in order if other != head]
            if others:
                cross = sum((weights[o] * turns[o] @ blocks[o, head] for o in others), torch.zeros_like(turns[0]))
                turns[head] = nearest(cross, pairs)
        if (turns - before).abs().max() < _SETTLED:
            break
    return turns
