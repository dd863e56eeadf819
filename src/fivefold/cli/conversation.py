"""A conversation in a compressed cache. Each turn reads only what the cache has not seen.

The whole conversation is written in the model's chat template, and what follows the tokens that are held is read. A
template may change what it wrote before (many leave out how an answer was reasoned about, or the space around it). Then
what is the same stays, and the rest is read anew: after taking tokens back, where the recipe can. Where it cannot, all
is read from the start, and from then on the state before each answer is kept too, to go on from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from fivefold.cli.generating import end_tokens, in_template, longest
from fivefold.errors import CacheFullError, FivefoldError, InputError, NonFiniteError

if TYPE_CHECKING:
    from fivefold.models.cache import FivefoldCache

Message = dict[str, str]


class Forgotten(FivefoldError):
    """A turn was stopped before there was anything to keep of it."""


@dataclass(frozen=True)
class Settings:
    """How answers are written. drawing: temperature, top_k, top_p, repetition_penalty, as in `fivefold.Request`."""

    max_new_tokens: int
    drawing: dict[str, Any]
    seed: int
    chunk: int


@dataclass(frozen=True)
class Turn:
    """What a turn took. anew: tokens that had been read before."""

    read: int
    anew: int
    written: int
    seconds_reading: float
    seconds_writing: float


@dataclass(frozen=True)
class _Point:
    """A state to go back to. ids: tokens of the conversation, of which the cache may lack the last."""

    messages: tuple[Message, ...]
    ids: list[int]
    cache: FivefoldCache


class Conversation:
    """messages: all that was said. ids: the tokens that say it, as they were read and written; the last one may still
    have to be read. cache: holds the others."""

    def __init__(
        self, model: Any, tokenizer: Any, cache: FivefoldCache, settings: Settings, messages: tuple[Message, ...] = (),
        ids: list[int] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.cache, self.settings = model, tokenizer, cache, settings
        self.messages, self.ids = messages, ids or []
        self._before: _Point | None = None
        """The state before the last turn, if it is known."""
        self._asked: _Point | None = None
        """The state before the last answer, where it has been of use."""
        self._changes = False
        """Whether the template has changed what the recipe cannot take back."""
        # Where what is held is chosen by the whole message, it is read at once.
        self._chunk = settings.chunk if cache.recipe.chooser is None else None
        self._ends = end_tokens(model, tokenizer)

    @property
    def turns(self) -> int:
        return sum(message["role"] == "user" for message in self.messages)

    def say(self, text: str, show: Callable[[int], None], stopped: Callable[[], bool]) -> Turn:
        """One turn: read a message, and write an answer, each token of which is shown. A stop that is asked for ends
        the answer. Whatever is raised, the conversation is as it was."""
        point = _Point(self.messages, self.ids, self.cache.fork())
        try:
            turn = self._say(text, show, stopped)
        except BaseException:
            self._go_to(point)
            raise
        self._before = point
        return turn

    def _say(self, text: str, show: Callable[[int], None], stopped: Callable[[], bool]) -> Turn:
        import torch

        from fivefold.generation.request import Request
        from fivefold.generation.sampling import Picker, pick

        asked = (*self.messages, {"role": "user", "content": text})
        held = self.cache.get_seq_length()
        new = self._align(in_template(self.tokenizer, list(asked)))
        self._forget()
        known = self.cache.get_seq_length()
        pending = self.ids[known:] + new
        prompt = self.ids + new
        room = self._room(len(prompt))
        if not pending:
            raise InputError("the model's chat template adds nothing for this message: write another one.")
        picker = Picker(Request(prompt, seed=(self.settings.seed + self.turns) % 2**63, **self.settings.drawing))
        answer: list[int] = []
        start = time.perf_counter()
        with torch.inference_mode():
            given = torch.tensor([pending], dtype=torch.int64, device=self.model.device)
            for piece in given.split(min(self._chunk or len(pending), len(pending)), 1):
                if stopped():
                    raise Forgotten("the message was not read to its end: it is forgotten.")
                logits = self._forward(piece)
            token = pick(logits, [picker])[0]  # also waits for the device, so that the clock is right
            middle = time.perf_counter()
            if self._changes:
                self._asked = _Point(asked, prompt, self.cache.fork())
            while token not in self._ends:
                if token < 0:
                    raise NonFiniteError(
                        "the model's logits are not finite: look for the layer that overflows, or use another --dtype."
                    )
                answer.append(token)
                show(token)
                if len(answer) == room or stopped():
                    break
                token = pick(self._forward(torch.tensor([[token]], device=self.model.device)), [picker])[0]
        said = self._decode(answer, skip=True)
        self.messages = (*asked, {"role": "assistant", "content": said})
        self.ids = prompt + answer
        return Turn(len(pending), held - known, len(answer), middle - start, time.perf_counter() - middle)

    def _forward(self, ids: Any) -> Any:
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def _room(self, tokens: int) -> int:
        """How many tokens may be written after so many."""
        positions = longest(self.model)
        if positions is not None and tokens >= positions:
            raise InputError(
                f"with this message the conversation has {tokens:,} tokens, and the model was made for {positions:,}: "
                "/undo a turn, /reset, or write less."
            )
        return min(self.settings.max_new_tokens, (positions or tokens + self.settings.max_new_tokens) - tokens)

    # -- what is held already -----------------------------------------------------------------------------

    def _align(self, text: str) -> list[int]:
        """Tokens to be read for the conversation to be this text; what is held goes back to where that is possible."""
        want = self._encode(text)
        if want[: len(self.ids)] == self.ids:
            return want[len(self.ids) :]
        # A model may write a text in other tokens than a tokenizer would.
        said = self._decode(self.ids)
        if text.startswith(said):
            return self._encode(text[len(said) :])
        asked = self._asked
        if not self._back_to(_common(self.ids, want)):
            self._changes = True
            if asked is not None and want[: len(asked.ids)] == asked.ids:
                self._replace(asked.cache.fork(), asked.ids)
            else:
                self._replace(self.cache.new(), [])
        return want[len(self.ids) :]

    def _back_to(self, tokens: int) -> bool:
        """Forget all tokens but the first so many; False, and nothing has changed, if the recipe cannot."""
        beyond = self.cache.get_seq_length() - tokens
        if tokens == 0:
            self._replace(self.cache.new(), [])
        elif beyond > 0:
            try:
                self.cache.crop(-beyond)
            except (CacheFullError, RuntimeError):  # CacheStateError, and what sliding layers of transformers raise
                return False
        self.ids = self.ids[:tokens]
        return True

    def _replace(self, cache: FivefoldCache, ids: list[int]) -> None:
        self.cache.free()
        self.cache, self.ids = cache, ids

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int], skip: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    # -- back ---------------------------------------------------------------------------------------------

    def undo(self) -> None:
        """Forget the last turn."""
        if not self.turns:
            raise InputError("there is no turn to undo: write a message first.")
        point, self._before = self._before, None
        if point is not None:
            self._go_to(point)
            return
        self.messages = self.messages[:-2]
        try:
            want = self._encode(in_template(self.tokenizer, list(self.messages), answering=False))
        except InputError:  # a template that wants a question
            want = []
        if not (self.turns and self._back_to(_common(self.ids, want))):
            # The next message reads all of it.
            self._replace(self.cache.new(), [])

    def reset(self) -> None:
        """Forget everything but the system's message."""
        self._forget()
        self.messages = tuple(message for message in self.messages if message["role"] == "system")
        self._replace(self.cache.new(), [])

    def _go_to(self, point: _Point) -> None:
        self._replace(point.cache, point.ids)
        self.messages = point.messages

    def _forget(self) -> None:
        """Give back what earlier states alone hold."""
        for point in (self._before, self._asked):
            if point is not None:
                point.cache.free()
        self._before = self._asked = None


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
