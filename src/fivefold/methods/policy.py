"""Methods that choose which tokens a head holds, by the attention that they receive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from fivefold.kernels.watched import Noise
from fivefold.methods.method import Method, param
from fivefold.store.held import Held
from fivefold.store.layout import PageLayout
from fivefold.store.plan import Append, Demote, EvictOne, EvictPacked, Keep, Plan, Stored
from fivefold.store.rows import Bounds, Extent, Packing
from fivefold.store.spec import LayerSpec, exact_layout


def keep_param(default: float, what: str = "fraction of the prompt's tokens that a head holds") -> Any:
    """The parameter `keep` of a method whose `default_keep` is this."""
    return param(None, f"{what}; left out: {default}, but no less than the floor", low=0.001, high=1, by_layer=True)


def floor_param(default: int = 512) -> Any:
    """The parameter `floor` of a method whose `default_floor` is this."""
    return param(None, f"tokens below which none goes; left out: {default}, or 0 beside a keep", low=0, by_layer=True)


class TokenPolicy(Method):
    """A method that chooses which tokens a KV head holds by the attention that they receive.

    Each row (one KV head of one sequence) holds `budget` tokens of its own choice. What is not chosen is freed, or
    merged into what stays; positions remain those of the text. Shapes: `[rows, slots]`, a slot being the place of a
    token (see `fivefold.store.held.Held`).

    How many: a `keep` that is written is obeyed; left out, it is `default_keep` and never takes a row below `floor`
    tokens. What always stays (`always`) stays in either case. `keep` is a share of what had come with the last chunk
    of several tokens. What comes token by token after that counts as generated; a text that comes token by token from
    its beginning is all prompt.
    """

    keep: float | None
    """Fraction of the prompt's tokens that a row holds; None is `default_keep`, with a floor."""
    floor: int | None = None
    """Tokens of a row below which none goes; None is `default_floor` where `keep` is None, else 0."""
    default_keep: float = 1.0
    default_floor: int = 512

    observes: int | None = None
    """How many of a chunk's newest queries it must see: None is all, 0 none."""
    accumulates: bool = True
    """Whether a chunk's statistics are added to those of earlier chunks; else they take their place, and a text that
    comes token by token is taken as chunks of `observes` tokens."""
    watches: bool = True
    """Whether decoding steps are observed too."""
    trims: bool = True
    """Whether the budget is kept while generating; else everything generated is held."""
    waits: bool = False
    """Whether tokens go only when all layers have seen the chunk: their budgets depend on each other (`shares`)."""
    joins: bool = False
    """Whether what it says of a row comes from what is known of that row's tokens alone: it may then be shown the rows
    of several layers at once."""
    by_step = True
    loses: str | int | None = None
    """What goes in a decoding step, of the tokens that `guards` leaves: that with the "least" score, the "oldest", or
    that with the least of `fivefold.kernels.watched.draws` of this seed: what `victims` says of one token. None: its
    own code alone knows, and the host waits for it in every step."""

    @property
    def fraction(self) -> float:
        """`keep`, or what it is where it was left out."""
        return self.default_keep if self.keep is None else self.keep

    @property
    def least(self) -> int:
        """`floor`, or what it is where it was left out."""
        if self.floor is not None:
            return self.floor
        return self.default_floor if self.keep is None else 0

    @property
    def always(self) -> int:
        """How many tokens of a row stay whatever the budget: windows and sinks."""
        return 1

    @property
    def evicts(self) -> bool:
        """Whether anything ever goes."""
        return isinstance(self.keep, tuple) or self.fraction < 1  # a tuple: of all layers

    @property
    def chooses(self) -> bool:
        """Whether its choice matters at all."""
        return self.evicts

    @property
    def counts_steps(self) -> bool:
        """Whether the attention of every decoding step counts."""
        return self.chooses and self.watches

    @property
    def commits(self) -> bool:
        """Whether tokens cannot be taken back: their attention has counted, or others went for them."""
        return self.chooses and (self.watches or self.trims)

    def first_counted(self, chunk: int) -> int:
        """From which query of a chunk on their attention counts; `chunk` if that of none does."""
        if not self.chooses:
            return chunk
        return 0 if self.observes is None else max(0, chunk - self.observes)

    @property
    def sums(self) -> bool:
        """Whether all that it wants to know of a chunk is how much attention each token received."""
        return type(self).observe is TokenPolicy.observe

    def budget(self, held: Held) -> int:
        """How many tokens a row may hold. Here: `keep` of the prompt, while generating too, and the floor."""
        return max(self.always, self.least, min(held.basis, round(self.fraction * held.share * held.basis)))

    @property
    def _pace(self) -> int:
        """Of a text that comes token by token: after how many tokens it is time to choose."""
        return 1 if self.accumulates else self.observes or 1

    def collects(self, held: Held) -> bool:
        """Whether a text comes token by token, and is yet to be taken as a chunk."""
        return not held.prompt and not self.accumulates

    def watching(self, held: Held) -> bool:
        """Whether it observes the step that has just come."""
        return self.counts_steps or (self.chooses and self.collects(held) and self.observes != 0)

    @property
    def together(self) -> bool:
        """Whether its layers choose together, once all of them have seen a chunk."""
        return self.evicts and self.waits

    def observe(self, weights: torch.Tensor, held: Held, first: int) -> torch.Tensor:
        """What the attention of some queries adds to the scores: float32 `[rows, slots]`.

        weights: float32 `[rows, query_heads per kv head, query, slots]`, after the softmax, 0 where a query does not
        see; may be overwritten. held: the rows without the queries' own tokens. first: the first query's position.
        """
        return weights.flatten(1, 2).sum(1)

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        """`[rows, slots]`: the highest are held. Infinity: whatever happens. Here: the scores alone."""
        return held.scores

    def victims(self, held: Held, budget: int, count: int, among: torch.Tensor | None = None) -> torch.Tensor:
        """While generating: `count` slots of each row to be given up, of those in the mask `among`: int64."""
        order = self.priority(held, budget)
        if among is not None:
            order = order.masked_fill(~among, float("inf"))
        if count == 1:
            return order.argmin(1, keepdim=True)
        return order.topk(count, 1, largest=False).indices

    def shares(self, statistics: torch.Tensor) -> torch.Tensor:
        """With `waits`: shares of an even budget, from `statistic` of every layer: `[layer, sequence]`, mean 1."""
        return torch.ones_like(statistics)

    def statistic(self, held: Held) -> torch.Tensor:
        """With `waits`: what `shares` wants to know of a layer, one number for each row, `[rows]`."""
        raise NotImplementedError

    merges: bool = False
    """Whether what goes when a chunk has come is merged into what stays."""
    merges_steps: bool = False
    """Whether what goes while generating is (see `merge_step`)."""

    def merge(
        self, held: Held, keys: torch.Tensor, values: torch.Tensor, kept: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """What the tokens that stay become when the others go: keys and values `[rows, kept, head_dim]`, and `extra`.

        keys, values: float32 `[rows, slots, head_dim]`; kept: int64 `[rows, kept]`, by position.
        """
        raise NotImplementedError

    def merge_step(
        self, held: Held, keys: Sequence[torch.Tensor], goes: torch.Tensor, gone: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """`merge` for one token of each row, slot `goes [rows]`, whose key is `gone [rows, head_dim]`.

        keys: those of all slots, in pieces, `[rows, some slots, head_dim]` each.

        Returns the slot it goes into, int64 `[rows]`, the weights with which what stands there and what goes are then
        added up, float32 `[rows, 2]`, for keys and values alike, and `extra`. Must not write into its arguments.
        """
        raise NotImplementedError

    # -- steps that the host knows by their counts alone --------------------------------------------------

    def guards(self, held: Held) -> tuple[torch.Tensor | int, int]:
        """What never goes in a step: tokens up to a position, int32 `[rows]` or one for all (-1 is none; it is asked
        when a chunk has been chosen from), and how many of the newest ones."""
        return -1, 0

    def noise(self, device: torch.device) -> Noise | None:
        """What else `observe` makes of a step's attention, where it is no sum of weights."""
        return None

    def why_not_step(self, packs: bool) -> str | None:
        """Why a step is not known by its counts alone, in a few words; None if it is."""
        own = type(self).noise is TokenPolicy.noise
        if not self.chooses:
            return None
        if self.watches and not self.sums and (own or packs):
            return f"what {self.name} makes of a step's attention is not summed by a kernel"
        if self.evicts and self.trims and self.loses is None:
            return f"which token goes only {self.name} itself knows, in every step"
        if self.evicts and self.trims and self.merges_steps and self.absorbs is None:
            return "what goes is merged into what stays, in every step"
        return None

    def step(self, held: Held, bounds: Bounds, packing: Packing | None) -> bool | None:
        """What `after_step` comes to, from the numbers of tokens alone: whether one goes, or the newest stays beside
        the others; None where the host has to plan it. held: without positions and scores."""
        if packing is not None and bounds.advanced(packing) != bounds:
            return None
        excess = self._excess(held, bounds)
        if excess <= 0:
            return False
        if self.collects(held):
            return False if held.seen % self._pace else None
        if int(bounds.packed_stop):
            return False
        known = self.loses is not None and (not self.merges_steps or self.absorbs is not None)
        return True if excess == 1 and known else None

    @property
    def absorbs(self) -> tuple[float, float] | None:
        """With `merges_steps`: what the threshold of the token that goes is made of, where it is merged as in D2O (see
        `absorb` of the kernels): the weights of the one before, `extra["threshold"]`, and of its own similarity."""
        return None

    # -- plans: what the declarations above come to -------------------------------------------------------

    def exact_layout(self, spec: LayerSpec) -> PageLayout:
        """What a page of the exact tier looks like: keys and values `[PAGE, head_dim]`."""
        return exact_layout(spec.head_dim, spec.dtype)

    def residual_of(self, held: Held, residual: int) -> int:
        """How many tokens of a row that it chooses for stay exact, where a recipe says `residual`."""
        return residual

    def residual_in(self, extent: Extent, residual: int) -> int:
        """The same of a row with a window."""
        return residual

    def observed(self, held: Held, weights: torch.Tensor) -> Held:
        """After a decoding step's attention, `[rows, query_heads per kv head, slots]`."""
        scores = held.scores
        if self.collects(held) and (held.seen - 1) % self._pace == 0:
            scores = torch.zeros_like(scores)  # the first of what is taken as a chunk
        return replace(held, scores=scores + self.observe(weights[:, :, None], held, held.seen - 1))

    def after_chunk(
        self, held: Held, observed: torch.Tensor | None, bounds: Bounds, revocable: int
    ) -> tuple[Held, Plan]:
        """What to do with a chunk of several tokens, which `held` has slots for already, and what stood before it.

        observed: what it made of the chunk's attention, float32 `[rows, slots]`; bounds: before the chunk.
        """
        held = self._counted(held, observed)
        if not self.evicts or self.waits or self.budget(held) + revocable >= held.slots:
            return held, Append(advance=not self.together)
        return held, self._choice(held, revocable)

    def _counted(self, held: Held, observed: torch.Tensor | None) -> Held:
        """With a chunk's attention."""
        scores = held.scores if self.accumulates else torch.zeros_like(held.scores)
        # Beside longer sequences one may come with a single token, which is what its first step would have brought.
        prompt = held.seen if held.seen > 1 else 0
        return replace(held, scores=scores if observed is None else scores + observed, prompt=prompt)

    def _excess(self, held: Held, bounds: Bounds) -> int:
        """How many tokens are beyond the budget in a step."""
        return int(bounds.length) - self.budget(held) if self.evicts and (self.trims or not held.prompt) else 0

    def after_layers(self, held: Held) -> Plan:
        """With `waits`: the same once all layers have seen the chunk, and `held.share` says what is this layer's."""
        return self._choice(held, 0) if self.budget(held) < held.slots else Append()

    def after_step(self, held: Held, stored: Stored, revocable: int) -> Plan:
        """After decoding steps: back to the budget, and pack what is due."""
        bounds, stop = stored.bounds, int(stored.bounds.packed_stop)
        excess = self._excess(held, bounds) - revocable
        if excess <= 0:
            return Append()
        if self.collects(held):
            return Append() if held.seen % self._pace else self._choice(held, revocable)
        if stop:
            due = int(bounds.advanced(stored.packing, revocable).packed_stop) - stop
            if not due or excess < due:
                return Append()
            if self.merges_steps:
                return self._choice(held, revocable)
            among = torch.zeros_like(held.scores, dtype=torch.bool)
            among[:, : stop + due] = True
            return EvictPacked(self.victims(held, self.budget(held), due, among))
        if excess > 1 or revocable:
            return self._choice(held, revocable)
        goes = self.victims(held, self.budget(held), 1)[:, 0]
        if not self.merges_steps:
            return EvictOne(goes)
        return EvictOne(goes, *self.merge_step(held, stored.keys(), goes, stored.token(goes)[0]))

    def _choice(self, held: Held, revocable: int) -> Keep:
        """The tokens with the highest priority, by position."""
        count = min(held.slots, self.budget(held) + revocable)
        kept, _ = self._best(held, count - revocable, count, revocable)
        kept = kept.gather(1, held.positions.gather(1, kept).argsort(1))
        if not (self.merges if held.prompt == held.seen else self.merges_steps):
            return Keep(kept)
        return Keep(kept, lambda keys, values: self.merge(held, keys, values, kept))

    def _best(
        self, held: Held, budget: int, count: int, revocable: int, first: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the slots from `first` on the `count` with the highest priority, the revocable tokens before all; and the
        priorities."""
        priority = self.priority(held, budget)[:, first:]
        if revocable:
            priority = priority.masked_fill(held.newest(revocable)[:, first:], float("inf"))
        return torch.sort(priority, dim=1, descending=True, stable=True).indices[:, :count], priority

    def why_not_revoke(self, held: Held, tokens: int) -> str | None:
        """Why the last tokens cannot be taken back, in a few words; None if they can."""
        counted = self.commits or self.watching(held) or held.seen - tokens < held.final
        if not counted or tokens >= held.seen:
            return None
        return (
            f"{self.name} has counted their attention and may have given up others for them; fork() the cache before "
            "the tokens that may be taken back."
        )


class RecentPolicy(TokenPolicy):
    """A policy that always holds the first `sink` tokens and the newest ones, the `recent` share of the budget; of the
    others those that come first by `worth`."""

    recent: float
    sink: int = 0
    loses: str | int | None = "least"
    """The token with the least score goes."""

    @property
    def always(self) -> int:
        return self.sink + 1

    def newest(self, budget: int) -> int:
        """How many of the newest tokens stay."""
        return max(0, min(int(self.recent * budget), budget - self.sink))

    def guards(self, held: Held) -> tuple[torch.Tensor | int, int]:
        return self.sink - 1, self.newest(self.budget(held))

    def worth(self, held: Held) -> torch.Tensor:
        """What tokens are chosen by, `[rows, slots]`: the scores."""
        return held.scores

    def priority(self, held: Held, budget: int) -> torch.Tensor:
        stays = held.newest(self.newest(budget))
        if self.sink:
            stays |= held.positions < self.sink
        return self.worth(held).masked_fill(stays, float("inf"))


class DemotingPolicy(TokenPolicy):
    """A policy whose heads hold all tokens: what it does not choose is packed. It brings the codec, too.

    Its budget is how many tokens of a row are exact.
    """

    keep = 1.0
    """All tokens are held."""

    @property
    def evicts(self) -> bool:
        """Nothing ever goes."""
        return False

    @property
    def chooses(self) -> bool:
        """What is packed is always a choice."""
        return True

    def residual(self, extent: Extent) -> int:
        """How many of the newest tokens of a head with a window are exact."""
        raise NotImplementedError

    def residual_of(self, held: Held, residual: int) -> int:
        return self.budget(held)

    def residual_in(self, extent: Extent, residual: int) -> int:
        return self.residual(extent)

    def after_chunk(
        self, held: Held, observed: torch.Tensor | None, bounds: Bounds, revocable: int
    ) -> tuple[Held, Plan]:
        held = self._counted(held, observed)
        return held, self._demotion(held, int(bounds.packed_stop), revocable)

    def after_step(self, held: Held, stored: Stored, revocable: int) -> Plan:
        bounds = stored.bounds
        if bounds.advanced(stored.packing, revocable) == bounds:
            return Append(advance=False)
        return self._demotion(held, int(bounds.packed_stop), revocable)

    def _demotion(self, held: Held, stop: int, revocable: int) -> Demote:
        """Of what is not packed, what matters most behind the rest, both by position."""
        count = min(held.slots - stop, self.budget(held) + revocable)
        best, priority = self._best(held, count, count, revocable, stop)
        stays = torch.zeros_like(priority, dtype=torch.int64).scatter_(1, best, 1)
        return Demote((held.positions[:, stop:] + stays * (1 << 32)).argsort(1))
