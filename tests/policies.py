"""Runs token policies on given queries, keys and values, layer by layer, as a model would; and a second, plain
implementation of what they choose: whole attention matrices, lists and loops, in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from fivefold.engine.layer import attend
from fivefold.engine.picks import Reads
from fivefold.engine.session import Session
from fivefold.methods import Codec, ReadPolicy, TokenPolicy
from fivefold.methods.tokens.keyformer import _DRAWS, _draws
from fivefold.store.layer_cache import LayerCache
from fivefold.store.rows import Extent
from fivefold.store.spec import LayerSpec, Pools

CPU = torch.device("cpu")


class Run:
    """Layers without a model around them."""

    def __init__(
        self,
        policy: TokenPolicy | None,
        kv_heads: int,
        query_heads: int,
        dim: int,
        layers: int = 1,
        codec: Codec | None = None,
        residual: int = 0,
        extents: list[Extent] | None = None,
        max_bytes: int | None = None,
        reads: ReadPolicy | None = None,
    ) -> None:
        self.pools = Pools(max_bytes)
        specs = [LayerSpec(index, layers, kv_heads, query_heads, dim, torch.float32, CPU) for index in range(layers)]
        heads = extents or [Extent()] * kv_heads
        self.session = Session(
            specs,
            lambda spec: LayerCache(spec, self.pools, heads, codec, residual, policy),
            self.pools,
            reads=Reads.of(reads, specs),
        )

    def take(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        inputs: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """One forward: `[layer, batch, head, tokens, dim]`. Returns the outputs `[batch, tokens, head, dim]`.

        positions, inputs: what every layer is called with, for codecs that want to know it.
        """
        with torch.inference_mode(), self.session.atomic():
            scaling = q.shape[-1] ** -0.5
            return [
                attend(self.session, index, q[index], k[index], v[index], mask, scaling, positions, inputs)
                for index in self.session.stores
            ]

    def kept(self, layer: int = 0) -> dict[int, list[int]]:
        """Positions that each row (sequence * kv_heads + head) holds, ascending."""
        out = {}
        for group in self.session.stores[layer].groups:
            assert group.held is not None
            for row, positions in zip(group.rows.tolist(), group.held.positions.tolist()):
                out[row] = sorted(positions)
        return out

    def tokens(self, layer: int = 0) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values that each row holds, by position: `[kept, dim]`."""
        out = {}
        store = self.session.stores[layer]
        for group in store.groups:
            assert group.held is not None
            keys, values = group.dense()
            order = group.held.positions.argsort(1)
            for at, row in enumerate(group.rows.tolist()):
                out[row] = (keys[at, order[at]], values[at, order[at]])
        return out


class NearTie(Exception):
    """Two scores at the edge of a choice are so close that rounding decides."""


class Plain:
    """One KV head (row) of one layer: what it holds, and its scores, in the plainest way."""

    def __init__(self, policy: Any, place: int, kv_heads: int, layer: int = 0) -> None:
        self.policy, self.place, self.kv_heads, self.layer = policy, place, kv_heads, layer
        self.positions: list[int] = []
        self.keys: list[np.ndarray] = []
        self.values: list[np.ndarray] = []
        self.scores: list[float] = []
        self.seen = self.prompt = 0
        self.share = 1.0
        self.threshold: float | None = None

    def attend(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """q `[group, new, dim]`, k and v `[new, dim]`. Returns output `[group, new, dim]` and the whole attention
        matrix
        `[group, new, held + new]`. The new tokens are held from now on."""
        first = len(self.positions)
        new = len(k)
        self.keys += list(k)
        self.values += list(v)
        self.positions += range(self.seen, self.seen + new)
        self.scores += [0.0] * new
        logits = q @ np.stack(self.keys).T / math.sqrt(q.shape[-1])
        for row in range(new):
            logits[:, row, first + row + 1 :] = -np.inf
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return weights @ np.stack(self.values), weights

    # -- scores -------------------------------------------------------------------------------------------

    def score(self, weights: np.ndarray, step: bool) -> None:
        name, first = self.policy.name, self.seen
        group, new, slots = weights.shape
        if name == "snapkv":
            if step and self.prompt:
                return
            if not step or self.seen % self.policy.window == 0:
                self.scores = [0.0] * slots
            weights = weights[:, max(0, new - self.policy.window) :].mean(0, keepdims=True)
        elif name == "elastic" and step:
            return
        elif name == "keyformer":
            generated = first + 1 - self.prompt if step and self.prompt else 0
            tau = self.policy.tau_init + (self.policy.tau_end - self.policy.tau_init) * min(
                1.0, generated / self.policy.steps
            )
            draws = _draws(self.policy.seed, CPU).double().numpy()
            noisy = np.zeros_like(weights)
            for g in range(group):
                for i in range(new):
                    at = ((first + i) * 1_000_003 + g) * 1_000_003 + self.place % self.kv_heads
                    at = ((at * 1_000_003 + self.layer) * 1_000_003 + self.policy.seed + 2**63) % 2**64 - 2**63
                    noise = draws[(at % _DRAWS + np.array(self.positions)) % _DRAWS]
                    noisy[g, i] = (weights[g, i] * noise) ** (1 / tau)
            weights = noisy / noisy.sum(-1, keepdims=True)
        added = weights.sum((0, 1))
        self.scores = [old + float(x) for old, x in zip(self.scores, added)]

    # -- choices ------------------------------------------------------------------------------------------

    @property
    def basis(self) -> int:
        """What a budget is a share of: a text that comes token by token is all prompt."""
        return self.prompt or self.seen

    @property
    def budget(self) -> int:
        policy = self.policy
        always = policy.window if policy.name == "snapkv" else getattr(policy, "sink", 0) + 1
        return max(always, policy.floor or 0, self.share_of(self.seen if policy.name == "elastic" else self.basis))

    def share_of(self, tokens: int) -> int:
        if self.policy.name == "elastic":
            return math.ceil(self.policy.keep * tokens)
        return min(tokens, round(self.policy.keep * self.share * tokens))

    def certain(self, budget: int) -> set[int]:
        """Slots that stay whatever their score."""
        policy, last = self.policy, self.seen - 1
        if policy.name == "snapkv":
            return set(range(max(0, len(self.positions) - min(policy.window, budget)), len(self.positions)))
        recent = 1 if policy.name == "elastic" else int(policy.recent * budget)
        sink = getattr(policy, "sink", 0)
        recent = max(0, min(recent, budget - sink))
        return {slot for slot, p in enumerate(self.positions) if p > last - recent or p < sink}

    def ranked(self, budget: int, scores: list[float]) -> list[int]:
        """All slots, the ones to be held first."""
        certain = self.certain(budget)
        if self.policy.name == "snapkv":
            half, prefix = self.policy.kernel // 2, len(scores) - len(certain)
            around = [scores[max(0, j - half) : min(prefix, j + half + 1)] for j in range(prefix)]
            pool = (lambda x: sum(x) / self.policy.kernel) if self.policy.pooling == "mean" else max
            scores = [pool(x) for x in around] + scores[prefix:]
        order = sorted((s for s in range(len(scores)) if s not in certain), key=lambda s: -scores[s])
        edge = budget - len(certain)
        if 0 < edge < len(order) and scores[order[edge - 1]] - scores[order[edge]] < 1e-4 * abs(scores[order[edge]]):
            raise NearTie
        return [*sorted(certain), *order]

    def choose(self, scores: list[float], merges: bool) -> None:
        budget = self.budget
        if budget >= len(self.positions):
            return
        kept = sorted(self.ranked(budget, scores)[:budget], key=lambda slot: self.positions[slot])
        gone = [slot for slot in range(len(self.positions)) if slot not in set(kept)]
        keys, values = [self.keys[s] for s in kept], [self.values[s] for s in kept]
        if merges and self.policy.name == "elastic":
            self._merge_by_position(kept, gone, keys, values)
        elif merges and self.policy.name == "d2o":
            self._merge_by_likeness(kept, gone, keys, values)
        self.keys, self.values = keys, values
        self.positions, self.scores = [self.positions[s] for s in kept], [self.scores[s] for s in kept]

    def _merge_by_position(self, kept: list[int], gone: list[int], keys: list[Any], values: list[Any]) -> None:
        last = self.seen - 1
        anchors = [i for i, s in enumerate(kept) if self.policy.sink <= self.positions[s] < last]
        into: dict[int, list[int]] = {i: [] for i in anchors}
        for slot in gone if anchors else []:
            distance = [(abs(self.positions[kept[i]] - self.positions[slot]), i) for i in anchors]
            into[min(distance)[1]].append(slot)
        for i, slots in into.items():
            keys[i] = np.mean([keys[i], *(self.keys[s] for s in slots)], 0)
            values[i] = np.mean([values[i], *(self.values[s] for s in slots)], 0)

    def _merge_by_likeness(self, kept: list[int], gone: list[int], keys: list[Any], values: list[Any]) -> None:
        def cosine(a: np.ndarray, b: np.ndarray) -> float:
            return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

        best = []
        for slot in gone:
            like = [cosine(self.keys[slot], self.keys[s]) for s in kept]
            best.append((max(like), like.index(max(like))))
        mean = float(np.mean([u for u, _ in best]))
        old = self.threshold
        self.threshold = mean if old is None else self.policy.alpha * old + self.policy.beta * mean
        into: dict[int, list[tuple[float, int]]] = {}
        for slot, (u, i) in zip(gone, best):
            if abs(u - self.threshold) < 1e-6:
                raise NearTie
            if u >= self.threshold:
                into.setdefault(i, []).append((u, slot))
        for i, parts in into.items():
            keys[i] = np.mean([keys[i], *(u * self.keys[s] for u, s in parts)], 0)
            values[i] = np.mean([values[i], *(u * self.values[s] for u, s in parts)], 0)

    def drop_by_offset(self) -> None:
        """Elastic Cache while generating."""
        while len(self.positions) > self.budget:
            of_prompt = min(self.basis, max(self.policy.floor or 0, self.share_of(self.basis)))
            cut = max(self.policy.sink, of_prompt - self.policy.offset)
            slot = sorted(range(len(self.positions)), key=lambda s: self.positions[s])[
                min(cut, len(self.positions) - 1)
            ]
            for held in (self.positions, self.keys, self.values, self.scores):
                del held[slot]  # type: ignore[attr-defined]


class PlainCache:
    """All rows of all layers."""

    def __init__(self, policy: Any, batch: int, kv_heads: int, layers: int = 1) -> None:
        self.policy, self.kv_heads, self.batch = policy, kv_heads, batch
        self.rows = [
            [Plain(policy, place, kv_heads, layer) for place in range(batch * kv_heads)] for layer in range(layers)
        ]

    def take(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: list[int]) -> list[torch.Tensor]:
        """As `Run.take`; the last `tokens[i]` of sequence i are real."""
        chunk, group = q.shape[3], q.shape[2] // k.shape[2]
        outs = []
        for layer, rows in enumerate(self.rows):
            out = torch.zeros(self.batch, chunk, q.shape[2], q.shape[4])
            for place, row in enumerate(rows):
                sequence, head = divmod(place, self.kv_heads)
                new = slice(chunk - tokens[sequence], chunk)
                if not tokens[sequence]:
                    continue
                heads = slice(head * group, (head + 1) * group)
                mine = (q[layer, sequence, heads, new], k[layer, sequence, head, new], v[layer, sequence, head, new])
                part, weights = row.attend(*(x.double().numpy() for x in mine))
                row.score(weights, chunk == 1)
                row.seen += tokens[sequence]
                if chunk > 1 and row.seen > 1:
                    row.prompt = row.seen
                out[sequence, new, heads] = torch.from_numpy(part).float().transpose(0, 1)
            outs.append(out)
            if not (self.policy.name == "d2o" and self.policy.layers and chunk > 1):
                self._settle(rows, chunk > 1)
        if self.policy.name == "d2o" and self.policy.layers and chunk > 1:
            self._share_out()
            for rows in self.rows:
                self._settle(rows, True)
        return outs

    def _settle(self, rows: list[Plain], prompt: bool) -> None:
        pooled = [row.scores for row in rows]
        if self.policy.name == "elastic":
            pooled = []
            for row in rows:
                first = row.place // self.kv_heads * self.kv_heads
                pooled.append(np.mean([rows[first + h].scores for h in range(self.kv_heads)], 0).tolist())
        for row, scores in zip(rows, pooled):
            if not row.seen:
                continue
            if prompt:
                row.choose(scores, merges=True)
            elif self.policy.name == "elastic":
                row.drop_by_offset()
            elif self.policy.name != "snapkv" or (not row.prompt and row.seen % self.policy.window == 0):
                row.choose(scores, merges=True)

    def _share_out(self) -> None:
        for sequence in range(self.batch):
            spread = []
            for rows in self.rows:
                mine = [r for r in rows if r.place // self.kv_heads == sequence]
                variance = [np.var(r.scores, ddof=1) if len(r.scores) > 1 else 0.0 for r in mine]
                low, high = min(variance), max(variance)
                spread.append(float(np.mean([(x - low) / (high - low + 1e-6) for x in variance])))
            shares = np.exp(-np.array(spread))
            shares = shares / shares.sum() * len(shares)
            for rows, share in zip(self.rows, shares):
                for row in rows:
                    if row.place // self.kv_heads == sequence:
                        row.share = float(share)
                        if abs(self.policy.keep * share * row.basis % 1 - 0.5) < 1e-3:
                            raise NearTie
