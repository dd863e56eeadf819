"""What is asked for, and what comes of it."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fivefold.errors import InputError

FinishReason = Literal["stop", "length", "cancelled", "error"]
_COOLEST = 1e-3
_PENALTIES = (0.01, 100.0)


class Cancel(Exception):
    """Raised by `on_token` of `generate_many`: the request that the token belongs to ends here, as "cancelled"."""


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt to be continued, and how. Two requests are never equal: each is itself.

    prompt: token ids, a list or a tensor `[tokens]`; kept as a tuple.
    max_new_tokens: how many tokens are generated at most, at least 1.
    stop: token ids that end it, a list or one; None is those of the model's generation config. As in
        `model.generate`, the token that ends it is its last one.
    temperature: 0 takes the most likely token, anything else samples.
    top_k, top_p: when sampling, only among the `top_k` most likely tokens, and among the fewest whose probabilities
        sum to `top_p`; None is all.
    repetition_penalty: scores of tokens that have been there are divided by it (multiplied, where negative).
    seed: of a random generator of its own, so that neighbours do not matter; with the same seed set by
        `torch.manual_seed`, `model.generate` samples the same tokens. None is a new one each time.
    id: anything, for whoever asks.
    conversation: the name of a conversation (`Conversations`) that this is the next turn of: the prompt is then what
        is new in it. None is a text of its own.

    Raises `InputError` for a value that is not possible. What depends on the model is checked when it is submitted.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 256
    stop: Sequence[int] | int | None = None
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    id: Any = None
    conversation: str | None = None

    def __post_init__(self) -> None:
        stop = [self.stop] if isinstance(self.stop, int | np.integer) else self.stop
        values = {
            "prompt": _ids("prompt", self.prompt),
            "max_new_tokens": _whole("max_new_tokens", self.max_new_tokens, 1),
            "stop": None if stop is None else _ids("stop", stop),
            "temperature": _number("temperature", self.temperature, 0, math.inf),
            "top_k": None if self.top_k is None else _whole("top_k", self.top_k, 1),
            "top_p": None if self.top_p is None else _number("top_p", self.top_p, 0, 1),
            "repetition_penalty": _number("repetition_penalty", self.repetition_penalty, *_PENALTIES),
            "seed": None if self.seed is None else _whole("seed", self.seed, 0, 2**63 - 1),
        }
        if 0 < values["temperature"] < _COOLEST:  # type: ignore[operator]
            raise InputError(
                f"temperature={self.temperature!r} is too small to be divided by: use 0, which takes the most likely "
                f"token, or at least {_COOLEST}."
            )
        if self.conversation is not None and not (isinstance(self.conversation, str) and self.conversation):
            raise InputError(f"conversation={self.conversation!r} is no name: give a text, or None.")
        if values["top_p"] == 0:
            raise InputError(f"top_p={self.top_p!r} leaves no token: use more than 0, or temperature=0.")
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def stop_ids(self) -> frozenset[int] | None:
        """The ids of `stop`; None where they are the model's."""
        return None if self.stop is None else frozenset(self.stop)  # type: ignore[arg-type]


def _ids(name: str, given: Any) -> tuple[int, ...]:
    if isinstance(given, torch.Tensor):
        if given.ndim != 1 or given.is_floating_point() or given.is_complex():
            raise InputError(
                f"{name} is a tensor {tuple(given.shape)} in {given.dtype}: give token ids [tokens], of one prompt."
            )
        given = given.tolist()
    try:
        if isinstance(given, str | bytes):
            raise TypeError
        return tuple(map(operator.index, given))
    except TypeError:
        shown = repr(given)
        raise InputError(
            f"{name}={shown if len(shown) < 80 else shown[:80] + '...'} are not token ids: give whole numbers, such as "
            "tokenizer(text)['input_ids']."
        ) from None


def _whole(name: str, given: Any, low: int, high: int | None = None) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise InputError(f"{name}={given!r} is not possible: give a whole number.")
    value = operator.index(given)
    if value < low or (high is not None and value > high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        raise InputError(f"{name}={given!r} is out of range: use {bounds}.")
    return value


def _number(name: str, given: Any, low: float, high: float) -> float:
    if isinstance(given, bool) or not hasattr(given, "__float__"):
        raise InputError(f"{name}={given!r} is not possible: give a number.")
    value = float(given)
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f"{low} or more" if high == math.inf else f"{low} to {high}"
        raise InputError(f"{name}={given!r} is out of range: use {bounds}.")
    return value


def why_not(request: Request, longest: int | None, vocabulary: int, held: int = 0) -> str | None:
    """Why a model cannot serve a request, in one sentence; None if it can. longest: how many positions it has;
    vocabulary: how many tokens it knows; held: tokens of the conversation so far."""
    tokens, new = len(request.prompt), request.max_new_tokens
    if not tokens:
        return "the prompt has no tokens: give at least one, such as the token that begins a text."
    if longest is not None and held + tokens + new > longest:
        before = f"{held:,} tokens of the conversation, " if held else ""
        return (
            f"{before}{tokens:,} tokens of prompt and max_new_tokens={new:,} are more than the {longest:,} positions "
            "of this model: shorten the prompt, or generate less."
        )
    wrong = next((token for token in request.prompt if not 0 <= token < vocabulary), None)
    if wrong is not None:
        return (
            f"the prompt holds token {wrong}, and this model knows those from 0 to {vocabulary - 1}: use its own "
            "tokenizer."
        )
    return None


@dataclass(frozen=True)
class Result:
    """What came of a request.

    tokens: the ids that were generated, the one that ended it included. finish_reason: "stop", a token of `stop` came;
    "length", there are `max_new_tokens`; "cancelled"; "error", and then `error` is one sentence (else None).
    queued, first_token, total: seconds from when it was submitted until its prompt began to be read, its first token
    came, and it ended; None where it did not come to that. shared: tokens of the prompt that were not read but found in
    a prefix store. preemptions: how often it was swapped to host memory for want of room. first_step, last_step: the
    calls of `Scheduler.step`, counted from 1, in which its prompt began to be read and in which it ended.
    """

    request: Request
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    error: str | None
    queued: float | None
    first_token: float | None
    total: float
    shared: int
    preemptions: int
    first_step: int | None
    last_step: int
