"""DuoAttention's gates, trained: how much each KV head needs to see more than the first and the newest tokens.

Xiao et al., DuoAttention (arXiv:2410.10819), section 2.2; official code https://github.com/mit-han-lab/duo-attention
(`duo_attn/train.py`, commit fe93c31). The model is frozen. Every KV head (i, j) has a gate in [0, 1],

    attn_ij = gate_ij * full_attn + (1 - gate_ij) * streaming_attn

and what is learned is where the last hidden state H, behind the final norm, of questions about a text stays what it is
with all gates at 1 (the teacher), while the sum of the gates is made small:

    L = 1/N sum_i (H_full[i] - H_mixed[i])^2 + lambda * mean |gate|

over the N tokens (and all channels) behind the text: questions, answers and separators, as in the official code. Adam
(AdamW without decay, as there) with a learning rate of 0.02, warmed up and let down in a fifth of the steps each, never
below a tenth. Gates stay in [0, 1].
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fivefold.calibrate.learner import Capture, Progress, Subject, Work
from fivefold.calibrate.reading import beginning
from fivefold.calibrate.run import TOKENS
from fivefold.errors import InputError, NonFiniteError

LENGTH = 384
"""Tokens of a text, where as many are learned from as by default."""
WINDOW = 4
"""A training window, sinks included, is at most a text's length divided by this: what does not fit into it is what is
learned from."""
RATE = 0.02
BETAS = (0.9, 0.999)
RECOMPUTE = 1_024
"""From how many tokens on layers are computed again instead of remembered."""
WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliett", "kilo", "lima",
    "mike", "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "xray",
    "yankee", "zulu",
)  # fmt: skip
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_START = "This is a very long text: <text> "
_NEEDLE = "\n\nRemember this sequence of words, it is the {} passkey to the vault: {}\n\n"
_END = " </text>\n\n"
_QUESTION = "Based on the content of the text, what is the {} passkey to the vault?\nPasskey: {}\n\n"


@dataclass(frozen=True)
class Passkeys:
    """Texts with passkeys in them and questions for all of them behind, after the official
    `MultiplePasskeyRetrievalDataset`, whose sizes are 10 passkeys of 32 words: as many as take two thirds of a text at
    most, of a word for every 48 tokens of it."""

    tokenizer: Any
    texts: Sequence[str]
    length: int

    @property
    def words(self) -> int:
        return min(32, max(4, self.length // 48))

    def make(self, rng: random.Random) -> tuple[torch.Tensor, int]:
        """Token ids, int64 `[1, length]`, and where the questions begin. The same state of `rng` gives the same text.
        Raises `InputError` if the length has no room for a passkey, or there is no text."""
        start, end = beginning(self.tokenizer) + self._ids(_START), self._ids(_END)
        pairs: list[tuple[list[int], list[int]]] = []
        room = self.length - len(start) - len(end)
        for ordinal in ORDINALS:
            passkey = " ".join(rng.choice(WORDS) for _ in range(self.words))
            pair = self._ids(_NEEDLE.format(ordinal, passkey)), self._ids(_QUESTION.format(ordinal, passkey))
            needed = sum(map(len, pair))
            if pairs and room - needed < self.length // 3:
                break
            if room < needed:
                raise InputError(f"texts of {self.length} tokens have no room for a passkey: learn from more tokens.")
            pairs.append(pair)
            room -= needed
        depths = sorted(rng.uniform(0.05, 0.95) for _ in pairs)
        filler = self._filler(rng, room)
        ids, used = list(start), 0
        for depth, (needle, _) in zip(depths, pairs):
            ids += filler[used : int(depth * room)] + needle
            used = int(depth * room)
        ids += filler[used:] + end
        questions = [i for _, question in pairs for i in question]
        return torch.tensor([ids + questions]), len(ids)

    def _filler(self, rng: random.Random, room: int) -> list[int]:
        text = rng.choices(self.texts, [len(text) for text in self.texts])[0] if any(self.texts) else ""
        at = rng.randrange(max(1, len(text) - 8 * room))
        part = text[max(at, text.find("\n", at, at + 400)) :][: 8 * room + 200]
        ids = self._ids(part)
        if not ids:
            raise InputError("there is no text to learn from: give one with words in it.")
        return (ids * math.ceil(room / len(ids)))[:room]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids


class Gates(Work):
    """Every step trains on one text, which depends on the seed and the step's number alone.

    Where we differ from the official code: (1) A fixed lambda leaves 59 to 85% of the gates of the published models
    with grouped heads above 0.9, and their order says nothing. Here it is the price at which a share of `keep` of the
    gates is worth having: `lambda / gates` is the quantile `1 - keep` of what gates were worth lately (minus their
    gradients of the distillation, a running mean as in Adam). So a share of `keep` of the gates rises and the others
    fall, whatever the scale of a model's hidden states. (2) Gates start at `keep`, not at 1, where the distillation
    has no gradient and, near it, mostly noise: that few heads retrieve shows where the others are nearly closed. (3)
    A score is a gate plus what it was worth on the average of all steps, from 0 for the least to 1 for the most: so
    gates that end at the same bound are told apart. (4) Full attention in a mixed layer is that of its own queries,
    keys and values, as in the paper's equation (the official code takes the teacher's output). (5) Texts are short,
    so that a CPU can do it, and windows in proportion.

    sums: gates, benefit, worth, first, second: float32 `[layer, kv_head]` of the layers that are compressed.
    """

    what = "Training gates"

    def __init__(self, subject: Subject, keep: float, sink: int, recent: int) -> None:
        from fivefold.models.gated import check_gates  # late, since it imports transformers

        super().__init__()
        check_gates(subject.model)
        self.subject, self.keep = subject, keep
        longest = getattr(subject.model.config, "max_position_embeddings", None)
        grown = LENGTH * max(1.0, subject.tokens / TOKENS) ** 0.5
        self.length = min(int(grown) // 64 * 64, longest or int(grown))
        self.total = math.ceil(subject.tokens / (2 * self.length))
        self.tokens = self.total * 2 * self.length
        window = min(sink + recent, self.length // WINDOW)
        self.sink = sink * window // (sink + recent)
        self.recent = window - self.sink
        self.source = Passkeys(subject.tokenizer, subject.texts, self.length)
        heads = self.heads = self._heads()
        # Layers may have different numbers of heads: what is not there is never worth anything.
        self.there = torch.arange(max(heads)) < torch.tensor(heads)[:, None]
        empty = torch.zeros(self.there.shape)
        self.sums = {name: empty.clone() for name in ("benefit", "worth", "first", "second")}
        self.sums["gates"] = torch.full_like(empty, keep).masked_fill(~self.there, 0)

    def _heads(self) -> list[int]:
        """How many KV heads each of the layers has: as many as its attention is given, whatever the configuration."""
        from fivefold.models.capture import capturing

        found: dict[int, int] = {}

        def see(layer: int, captured: dict[Capture, torch.Tensor]) -> None:
            found[layer] = captured["values"].shape[1]

        wanted: tuple[Capture, ...] = ("values",)
        with torch.no_grad(), capturing(self.subject.model, wanted, see):
            ids = torch.zeros((1, 2), dtype=torch.int64, device=self.subject.model.device)
            self.subject.model(input_ids=ids, use_cache=False)
        return [found[spec.layer] for spec in self.subject.specs]

    def step(self, number: int) -> None:
        ids, start = self.source.make(random.Random(f"{self.subject.seed} {number}"))
        with torch.inference_mode(False):
            loss, gradient = self.gradient(ids, start)
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            raise NonFiniteError("the gates' gradients are infinities or NaN: load the model in float32 or bfloat16.")
        self.update(gradient, number)

    def gradient(self, ids: torch.Tensor, start: int) -> tuple[float, torch.Tensor]:
        """The distillation's loss for a text, and its gradient for all gates. ids: int64 `[1, tokens]`; start: the
        first token that is compared."""
        from fivefold.models.gated import frozen, gated, last_hidden_states

        model: Any = self.subject.model
        ids = ids.to(model.device)
        gates = self.sums["gates"].to(model.device, copy=True).requires_grad_()
        by_layer = {spec.layer: gates[row, : self.heads[row]] for row, spec in enumerate(self.subject.specs)}
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            if model.device.type == "cuda":  # the fused kernels add gradients up in any order
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            with torch.no_grad():
                wanted = last_hidden_states(model, ids)[:, start:].float()
            stack.enter_context(torch.enable_grad())
            stack.enter_context(gated(model, by_layer, self.sink, self.recent, self.length >= RECOMPUTE))
            loss = distillation(wanted, last_hidden_states(model, ids)[:, start:].float())
            (gradient,) = torch.autograd.grad(loss, gates)
        return loss.item(), gradient.cpu()

    def update(self, gradient: torch.Tensor, number: int) -> None:
        """A step of Adam on distillation and regularisation."""
        sums, share = self.sums, 1 - BETAS[0] ** (number + 1)
        sums["worth"] = sums["worth"] - gradient / self.total
        sums["benefit"] = torch.lerp(sums["benefit"], -gradient, 1 - BETAS[0])
        gradient = gradient + price(sums["benefit"][self.there] / share, self.keep)
        sums["first"] = torch.lerp(sums["first"], gradient, 1 - BETAS[0])
        sums["second"] = torch.lerp(sums["second"], gradient.square(), 1 - BETAS[1])
        root = (sums["second"] / (1 - BETAS[1] ** (number + 1))).sqrt() + 1e-8
        moved = sums["gates"] - rate(number, self.total) * sums["first"] / share / root
        sums["gates"] = moved.clamp(0, 1).masked_fill(~self.there, 0)

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        settings = {
            "score": "DuoAttention's gates, trained, plus what they were worth meanwhile (0 to 1)",
            "kind": "gates", "keep": self.keep, "length": self.length, "steps": self.total, "sink": self.sink,
            "recent": self.recent, "rate": RATE, "words": self.source.words,
            "regularisation": "L1, at the price that a share of keep of the gates is worth",
        }  # fmt: skip
        worth = self.sums["worth"][self.there]
        scale = (worth.max() - worth.min()).clamp_min(torch.finfo(torch.float32).tiny)
        scores = self.sums["gates"] + (self.sums["worth"] - worth.min()) / scale
        out = {}
        for name, found in (("scores", scores), ("gates", self.sums["gates"])):
            # Layers that are not compressed have no gates.
            whole = torch.full((self.subject.specs[0].layers, self.there.shape[1]), -1.0)
            for row, spec in enumerate(self.subject.specs):
                count = self.heads[row]
                whole[spec.layer, :count] = found[row, :count]
            out[name] = whole
        return settings, out


def distillation(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Mean square over tokens and channels, both `[batch, tokens, hidden]`."""
    return (wanted - found).pow(2).mean()


def price(benefits: torch.Tensor, keep: float) -> float:
    """What a gate has to be worth for a share of `keep` of them to be worth it: between the last of those and the
    next. benefits: `[gates]`, what a gate's rise takes off the loss."""
    ordered = benefits.sort(descending=True).values
    count = min(max(1, round(keep * len(ordered))), len(ordered) - 1)
    return max(0.0, float(ordered[count - 1 : count + 1].mean())) if len(ordered) > 1 else 0.0


def rate(number: int, steps: int) -> float:
    """The learning rate of a step: up and down in a fifth of the steps each, never below a tenth of `RATE`."""
    fifth = max(1, steps // 5)
    return RATE * min(1.0, max((number + 1) / fifth, 0.1), max((steps - number) / fifth, 0.1))
