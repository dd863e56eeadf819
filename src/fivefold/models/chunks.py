"""Chunks of a prompt of a Llama's kind with fused kernels between the products (`kernels/step/chunk.py`).

A layer by the model's own code is some thirty launches around its seven products and its attention; here it is four. On
a GPU that is a quarter of the time of a prompt of an 8B model, and more where the host is what a small model waits for.

Such a model is known as for steps (`models/fused.py`), and seen by trying: a few tokens go through the model's own code
once, and every layer and the head are held to it. Whatever is of another kind, or asks for more, runs as its own code
says. Attention is the engine's in either case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from fivefold.engine.admission import positional
from fivefold.engine.layer import attend
from fivefold.engine.session import Session
from fivefold.kernels.choice import choose, loaded
from fivefold.kernels.step.reference import Turn
from fivefold.models.cache import FivefoldCache
from fivefold.models.fused import Layer, Parts, Unlike, apart, differing, fits, parts_of, untouched, watched
from fivefold.models.graph import why_not_now

PROBE = 16
"""Tokens that go through both."""

DEVICES = {"cuda"}
"""Where kernels are worth it: not in Triton's interpreter."""


@dataclass(frozen=True)
class Chunk:
    """The forward of a chunk `[batch, tokens]`, without and with attention to a cache."""

    parts: Parts

    def __call__(self, cache: FivefoldCache, ids: torch.Tensor, given: dict[str, Any]) -> torch.Tensor:
        """Logits `[batch, kept, vocabulary]`; the forward is begun. given: the other arguments of the call."""
        session, (batch, tokens) = cache.session, ids.shape
        if not session.batch:  # `fits` has said what layers are given: they need not wait for that
            session.unite(session.change)
            for bank in session.banks:
                bank.start(batch)
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if positions is None:
            positions = torch.arange(session.length, session.length + tokens, device=ids.device)[None]
        hidden: Any = nn.functional.embedding(ids, self.parts.embedding).flatten(0, 1)
        turn = self.turn(hidden, positions, batch)
        added: Any = None
        mask = None if mask is None else mask.to(ids.device, torch.bool)
        wanted = positional(session.stores) is not None
        for layer in self.parts.layers:
            store = session.stores.get(layer.index)
            if store is not None:  # else its attention is left out
                hidden, normed = self.normed(hidden, added, layer.before)
                q, k, v = self.heads(layer, normed, turn, batch)
                del normed
                session.arrive(layer.index)
                mine = cache.layers[layer.index]
                if not mine.is_initialized:
                    mine.lazy_initialization(k, v)
                places = positions if wanted and layer.index == session.first else None
                inputs = hidden.view(batch, tokens, -1)
                added = attend(session, layer.index, q, k, v, mask, layer.scaling, places, inputs)
                del q, k, v
                session.done(layer.index)
                added = nn.functional.linear(added.view(batch * tokens, -1), layer.out.weight, layer.out.bias)
            hidden, added = self.mlp(layer, hidden, added)
        kept = given.get("logits_to_keep") or tokens
        last = (x.view(batch, tokens, -1)[:, -kept:].flatten(0, 1).contiguous() for x in (hidden, added))
        return self.head(*last).view(batch, -1, len(self.parts.head.weight))

    def turn(self, hidden: torch.Tensor, positions: torch.Tensor, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin `[batch * tokens, head_dim]`, as the model's own module makes them."""
        made = self.parts.rotary(hidden[None, :1], positions)
        cos, sin = (x.expand(batch, *x.shape[1:]).reshape(len(hidden), -1) for x in made)
        return cos, sin

    @staticmethod
    def normed(hidden: torch.Tensor, added: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream with what is yet to be added to it, and its norm. `added` is no more after that."""
        if added is None:
            return hidden, loaded("step.triton").normed(hidden, norm)
        pair: tuple[torch.Tensor, torch.Tensor] = loaded("step.chunk").added_normed(added, hidden, norm)
        return pair

    def heads(
        self, layer: Layer, normed: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], batch: int
    ) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of a layer, `[batch, head, tokens, head_dim]`."""
        q, k, v = (nn.functional.linear(normed, one.weight, one.bias) for one in layer.qkv)
        found: tuple[torch.Tensor, ...] = loaded("step.chunk").spread(q, k, v, Turn(*turn, layer.norms), batch)
        return found

    def mlp(self, layer: Layer, hidden: torch.Tensor, added: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual stream before a layer's MLP, and what that adds to it."""
        hidden, normed = self.normed(hidden, added, layer.behind)
        gate, up = (nn.functional.linear(normed, one.weight, one.bias) for one in (layer.gate, layer.up))
        del normed
        inner = loaded("step.triton").gate_times(gate, up, layer.act, out=gate)
        del gate, up
        return hidden, nn.functional.linear(inner, layer.down.weight, layer.down.bias)

    def head(self, hidden: torch.Tensor, added: Any) -> torch.Tensor:
        """Logits of tokens `[tokens, hidden]`."""
        _, normed = self.normed(hidden, added, self.parts.norm)
        return nn.functional.linear(normed, self.parts.head.weight, self.parts.head.bias)


@contextmanager
def by_own_code() -> Iterator[None]:
    """Within it every chunk goes through the model's own code, as those of other kinds of models do."""
    before = set(DEVICES)
    DEVICES.clear()
    try:
        yield
    finally:
        DEVICES.update(before)


class Chunks:
    """A model's chunks: found out once how they may be read, and looked at anew where its modules have changed."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.own: str | None = None
        """Why chunks run the model's own code, in a few words; None if none does."""
        self._known: object = None
        self._found: Chunk | str = ""
        self._fits: object = None
        """Layers that are made for it: those that are left out, and the others."""

    def __call__(self, cache: FivefoldCache, given: dict[str, Any]) -> CausalLMOutputWithPast | None:
        """A chunk of several tokens; None if it has to go through the model."""
        ids, session = given.get("input_ids"), cache.session
        if ids is None or ids.ndim != 2 or ids.shape[1] < 2:
            return None
        found = self._why_not(session, given, ids)
        if isinstance(found, str):
            self.own = found
            return None
        self.own = None
        with session.atomic():
            logits = found(cache, ids, given)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _why_not(self, session: Session, given: dict[str, Any], ids: torch.Tensor) -> Chunk | str:
        device = session.devices[0]
        if len(session.devices) > 1 or device.type not in DEVICES or not choose(device).triton:
            return "it is not one GPU's"
        if session.companions is not None:
            return "layers with a sliding window are transformers' own"
        if (why := why_not_now(self.model, given, ids, device)) is not None:
            return why
        mask = given.get("attention_mask")
        if mask is not None and mask.shape[1] != session.length + ids.shape[1]:
            return "the mask is not over all tokens so far"
        if torch.is_autocast_enabled(device.type):
            return "the model is called under autocast"
        try:
            # The parts are the modules' own weights, wherever these are moved.
            weights, weight = untouched(self.model), next(self.model.parameters())
            if (stamp := (weights, weight.dtype, weight.device)) != self._known:
                self._found = verified(self.model)
                self._known, self._fits = stamp, None
            if isinstance(self._found, str):
                return self._found
            if weight.device != device:
                return f"weights are on {weight.device}, and the cache is on {device}"
            specs = list(session.absent), [store.spec for store in session.stores.values()]
            if specs != self._fits:
                for layer in self._found.parts.layers:
                    fits(session, layer)
                self._fits = specs
        except Unlike as why:
            return str(why)
        return self._found


def verified(model: PreTrainedModel) -> Chunk | str:
    """A model's chunks, or in a few words why they run its own code."""
    try:
        chunk, seen = Chunk(parts_of(model)), dict[int, tuple[torch.Tensor, torch.Tensor]]()
    except Unlike as why:
        return str(why)
    weight = chunk.parts.embedding
    ids = (torch.arange(1, PROBE + 1, device=weight.device) * 7919 % len(weight))[None]
    with watched(model, seen):
        logits = type(model).forward(model, input_ids=ids, use_cache=False).logits[0]
    return differing(lambda: _apart(chunk, ids, seen, logits), weight.dtype) or chunk


def _apart(
    chunk: Chunk, ids: torch.Tensor, seen: Mapping[int, tuple[torch.Tensor, ...]], logits: torch.Tensor
) -> dict[str, torch.Tensor]:
    """How far each part is from the model's own code, whose layers have `seen` and left this."""
    parts = chunk.parts
    hidden = nn.functional.embedding(ids[0], parts.embedding)
    turn = chunk.turn(hidden, torch.arange(PROBE, device=ids.device)[None], 1)
    far = {"the embedding": apart(hidden, seen[0][0], 0 * hidden)}
    for number, layer in enumerate(parts.layers):
        given, wanted = seen[number]
        q, k, v = chunk.heads(layer, chunk.normed(given, None, layer.before)[1], turn, 1)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=layer.scaling)
        out = out.transpose(1, 2).reshape(PROBE, -1)
        rest, added = chunk.mlp(layer, given, nn.functional.linear(out, layer.out.weight, layer.out.bias))
        far[f"layer {layer.index}"] = apart(rest + added, wanted, given)
    far["the head"] = apart(chunk.head(seen[len(parts.layers) - 1][1], None), logits, 0 * logits)
    return far
