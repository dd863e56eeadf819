"""How next tokens are chosen from logits: by transformers' own processors, for each sequence by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fivefold.generation.request import Request


class Picker:
    """Chooses the tokens of one sequence, as `model.generate` would, in its order of processors."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.processors = LogitsProcessorList()
        if request.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(request.repetition_penalty))
        self.samples = request.temperature > 0
        if self.samples:
            if request.temperature != 1:
                self.processors.append(TemperatureLogitsWarper(request.temperature))
            if request.top_k is not None:
                self.processors.append(TopKLogitsWarper(request.top_k))
            if request.top_p is not None and request.top_p < 1:
                self.processors.append(TopPLogitsWarper(request.top_p))
        self._ids: torch.Tensor | None = None
        """All tokens so far, int64 `[1, tokens]`, on the logits' device."""
        self._generator: torch.Generator | None = None

    @classmethod
    def of(cls, request: Request) -> Picker | None:
        """None where the most likely token is simply taken."""
        return cls(request) if request.temperature > 0 or request.repetition_penalty != 1 else None

    def __call__(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of logits `[1, vocabulary]`, int64 `[1]`, and bool `[1]`, whether it means anything: False
        where logits are not finite. Nothing waits for the device."""
        if self._ids is None:
            self._ids = torch.tensor([self.request.prompt], dtype=torch.int64, device=logits.device)
            if self.samples:
                self._generator = torch.Generator(logits.device)
                seed = self.request.seed
                self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        scores = self.processors(self._ids, logits.float())
        if self.samples:
            chances = scores.softmax(-1)
            good = chances.isfinite().all(-1)
            # Of what is not finite a GPU could not draw without an error that it never recovers from.
            token = torch.multinomial(chances.masked_fill(~good[:, None], 1.0), 1, generator=self._generator)[:, 0]
        else:
            token = scores.argmax(-1)
            good = scores.gather(1, token[:, None])[:, 0].isfinite()
        if self.request.repetition_penalty != 1:
            self._ids = torch.cat([self._ids, token[:, None]], 1)
        return token, good


def pick(logits: torch.Tensor, pickers: Sequence[Picker | None]) -> list[int]:
    """The next token of each sequence from logits `[sequences, vocabulary]`; -1 where they are not finite.

    Those that take the most likely token are served together, and all of them reach the host in one transfer.
    """
    tokens = logits.argmax(-1)
    good = logits.gather(1, tokens[:, None])[:, 0].isfinite()  # NaN and infinity are where argmax looks
    for row, picker in enumerate(pickers):
        if picker is not None:
            tokens[row : row + 1], picked = picker(logits[row : row + 1])
            good[row : row + 1] &= picked
    return torch.where(good, tokens, -1).tolist()
