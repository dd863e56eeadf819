"""A model reads text, chunk by chunk, and a learner sees what a method asks for."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fivefold.calibrate.learner import Capture, Learner, Progress, Subject, Work
from fivefold.errors import InputError, NonFiniteError

LENGTH = 2_048
"""Tokens of a chunk; each is read from position 0 on."""
_SHORTEST = 64
# Modules of the standard library whose text is read by default: long ones, with much prose in them, and none that
# the stress tasks quote.
_MODULES = (
    "_pydatetime", "_pydecimal", "email.message", "enum", "http.cookiejar", "imaplib", "logging", "mailbox", "optparse",
    "pdb", "pickletools", "platform", "plistlib", "smtplib", "socket", "ssl", "subprocess", "tarfile",
    "threading", "turtle", "typing", "unittest.case", "unittest.mock", "urllib.request", "xml.dom.minidom", "zipfile",
)  # fmt: skip


def default_texts() -> list[str]:
    """Prose and code that every Python carries: the last two fifths of its language reference (pieces of fidelity
    begin in its first half), and modules of its standard library.

    What keys and values look like depends on the text only a little: channels that are large are large everywhere. For
    a model that does something else, give text of its own.
    """
    from fivefold.evaluate.demo import document

    prose = document()
    texts = [prose[prose.index("\n", 3 * len(prose) // 5) :]]
    for name in _MODULES:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            continue
        if found is not None and found.origin is not None and Path(found.origin).suffix == ".py":
            texts.append(Path(found.origin).read_text(encoding="utf-8"))
    return texts


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that a tokenizer begins a text with."""
    prefix = tokenizer("").input_ids
    if tokenizer.eos_token_id in prefix and tokenizer.eos_token_id != tokenizer.bos_token_id:
        prefix = prefix[: prefix.index(tokenizer.eos_token_id)]
    return prefix


def chunks(
    tokenizer: Any, texts: Sequence[str], tokens: int, seed: int, longest: int | None, each: int | None = None
) -> list[torch.Tensor]:
    """Pieces of the texts, int64 `[1, at most each]` (left out: LENGTH), drawn without replacement: `tokens` in all, or
    fewer if the texts have fewer. The tokens that the tokenizer begins a text with begin each of them."""
    prefix = beginning(tokenizer)
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False).input_ids]
    length = min(each or LENGTH, tokens, longest or tokens) - len(prefix)
    if min(length, len(ids)) < _SHORTEST:
        raise InputError(
            f"{min(max(length, 0), len(ids))} tokens of text are too few to learn from: use at least "
            f"{_SHORTEST + len(prefix)}."
        )
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    if len(pieces) > 1 and len(pieces[-1]) < length:
        del pieces[-1]
    generator = torch.Generator().manual_seed(seed)
    out, left = [], tokens
    for number in torch.randperm(len(pieces), generator=generator).tolist():
        piece = (prefix + pieces[number])[:left]
        if len(piece) <= len(prefix):
            break
        out.append(torch.tensor([piece]))
        left -= len(piece)
    return out


class Reading(Work):
    """Every step is a chunk, in every pass."""

    def __init__(self, learner: Learner, captures: Collection[Capture], subject: Subject) -> None:
        from fivefold.models.capture import capturing  # late, since it imports transformers

        self.learner, self.model = learner, subject.model
        longest = getattr(subject.model.config, "max_position_embeddings", None)
        own = learner.pieces(subject)
        text = subject.texts, subject.tokens, subject.seed
        self.pieces = own or chunks(subject.tokenizer, *text, longest, learner.length)
        self.tokens = sum(piece.shape[1] for piece in self.pieces)
        self.total = learner.passes * len(self.pieces)
        self._layers = {spec.layer for spec in subject.specs}
        self._open = ExitStack()
        self._open.enter_context(capturing(subject.model, captures, self._see))

    @property
    def sums(self) -> dict[str, torch.Tensor]:
        return self.learner.sums

    @sums.setter
    def sums(self, value: dict[str, torch.Tensor]) -> None:
        self.learner.sums = value

    def _see(self, layer: int, captured: dict[Capture, torch.Tensor]) -> None:
        if layer not in self._layers:
            return
        for what, tensor in captured.items():
            if not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"the {what} of layer {layer} hold infinities or NaN: load the model in float32 or bfloat16."
                )
        self.learner.see(layer, captured)

    def step(self, number: int) -> None:
        self.learner.number, index = divmod(number, len(self.pieces))
        with torch.inference_mode():
            self.model(input_ids=self.pieces[index].to(self.model.device), use_cache=False, logits_to_keep=1)
            if (number + 1) % len(self.pieces) == 0 and number + 1 < self.total:
                self.learner.next_pass()

    def finish(self, progress: Progress) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        with torch.inference_mode():
            return self.learner.finish(progress)

    def close(self) -> None:
        self._open.close()
