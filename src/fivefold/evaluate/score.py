"""Asks a question of a cache and scores what comes back. The one place where scores are decided.

A question follows the prefix that the cache holds; the cache itself is never changed, every answer works on a fork.
Any cache of transformers serves, `DynamicCache` as well as ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Kind, Question, holds
from fivefold.evaluate.together import eager, grouped, rows_of, steps_at_once, twin

__all__ = ["Answer", "Asked", "answer", "answers", "bits", "generate", "likelihoods", "matched", "printable", "twin"]

ANSWER_TOKENS = 16
WORTH_A_GRAPH = 48
"""Answers that may be as long as this many tokens are written with a CUDA graph, where there is one."""


@dataclass(frozen=True)
class Answer:
    """score: what the task's kind gives. right: whether the answer is right, None if the kind knows no right or wrong
    (bits). said: the first generated line, or the winning choice, without space around it. detail: log-likelihood of
    each choice in nats, in the order of the question; empty for generated answers."""

    score: float
    right: bool | None
    said: str
    detail: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """A question that is asked of sequence `row` of a cache."""

    row: int
    question: Question
    kind: Kind


def answer(model: Any, tokenizer: Any, cache: Any, question: Question, kind: Kind) -> Answer:
    """Ask `question` after what `cache` holds, one sequence: see `answers`."""
    return answers(model, tokenizer, cache, [Asked(0, question, kind)])[0]


def answers(
    model: Any, tokenizer: Any, cache: Any, asked: Sequence[Asked], batch: int = 1, most: int = 1
) -> list[Answer]:
    """Ask each of the questions after its sequence of the `batch` that `cache` holds, at most `most` of them, or of
    their choices, at once. The cache is left as it is, and every answer is the one that is given alone.

    generate: 1 if the first line of greedy text holds the answer. choices: 1 if the answer is the most likely choice,
    0 if another one is or if it only ties. bits: `log2(n) + log2 p(answer | the n choices)`, at most log2(n).
    match_all, match_part: see `matched`; the text is as long as the question allows.
    Raises `InputError` for a question that cannot be asked this way.
    """
    found: dict[int, Answer] = {}
    kinds = [one.kind for one in asked]
    with torch.inference_mode():
        lines = [place for place, kind in enumerate(kinds) if kind == "generate"]
        texts = [(asked[place].row, asked[place].question.text) for place in lines]
        for place, said in zip(lines, _lines(model, tokenizer, cache, texts, ANSWER_TOKENS, batch, most)):
            right = holds(said, asked[place].question.answer)
            found[place] = Answer(float(right), right, said)
        written = [place for place, kind in enumerate(kinds) if kind in ("match_all", "match_part")]
        for place, said in zip(written, _written(model, tokenizer, cache, [asked[i] for i in written], batch, most)):
            said = printable(said)
            score = matched(said, asked[place].question.references, part=kinds[place] == "match_part")
            found[place] = Answer(score, score == 1, said)
        chosen = [place for place, kind in enumerate(kinds) if kind in ("choices", "bits")]
        given = [(asked[i].row, asked[i].question.text, _checked(asked[i].question)) for i in chosen]
        for place, logs in zip(chosen, _likelihoods(model, tokenizer, cache, given, batch, most)):
            found[place] = _chosen(asked[place].question, kinds[place], logs)
    return [found[place] for place in range(len(asked))]


def _checked(question: Question) -> tuple[str, ...]:
    """The choices of a question."""
    if question.answer not in question.choices or len(set(question.choices)) < len(question.choices):
        raise InputError(
            f"the choices {question.choices!r} must be different and hold the answer {question.answer!r} once."
        )
    return question.choices


def _chosen(question: Question, kind: Kind, logs: list[float]) -> Answer:
    detail = dict(zip(question.choices, logs))
    best = max(detail, key=lambda choice: detail[choice])
    if kind == "bits":
        return Answer(bits(logs, question.choices.index(question.answer)), None, best.strip(), detail)
    rivals = [log for choice, log in detail.items() if choice != question.answer]
    right = all(detail[question.answer] > log for log in rivals)
    return Answer(float(right), right, best.strip(), detail)


def bits(logs: list[float], right: int) -> float:
    """`log2(n) + log2 p(right)`, where p is the softmax of the log-likelihoods `logs` (nats) of n choices."""
    top = max(logs)
    total = top + math.log(sum(math.exp(log - top) for log in logs))
    return math.log2(len(logs)) + (logs[right] - total) / math.log(2)


def generate(model: Any, tokenizer: Any, cache: Any, text: str, limit: int = ANSWER_TOKENS) -> str:
    """The first non-empty line of at most `limit` greedy tokens after `text`."""
    return _lines(model, tokenizer, cache, [(0, text)], limit)[0]


def _lines(
    model: Any, tokenizer: Any, cache: Any, asked: Sequence[tuple[int, str]], limit: int, batch: int = 1, most: int = 1
) -> list[str]:
    """`generate` for (row, text) each."""

    def line_ends(said: list[int]) -> bool:
        return "\n" in tokenizer.decode(said, skip_special_tokens=True).lstrip()

    given = [(row, _ids(tokenizer, text)) for row, text in asked]
    found = _greedy(model, cache, given, [limit] * len(given), {tokenizer.eos_token_id}, batch, most, line_ends)
    return [tokenizer.decode(said, skip_special_tokens=True).strip().split("\n")[0].strip() for said in found]


def _written(
    model: Any, tokenizer: Any, cache: Any, asked: Sequence[Asked], batch: int = 1, most: int = 1
) -> list[str]:
    """Up to `question.limit` greedy tokens after each question, less where the model ends its answer before."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    given = [(one.row, list(one.question.ids) or _ids(tokenizer, one.question.text)) for one in asked]
    found = _greedy(model, cache, given, [one.question.limit for one in asked], stops, batch, most)
    return [tokenizer.decode(said, skip_special_tokens=True) for said in found]


def printable(said: str) -> str:
    """A generated text as RULER's scorer reads it: no space around it, control characters as line breaks."""
    return re.sub(r"[\x00-\x1f]", "\n", said.strip()).strip()


def matched(said: str, references: tuple[str, ...], part: bool = False) -> float:
    """The share of the references that are somewhere in a text, in any case; with `part`, 1 if at least one is.

    RULER's `string_match_all` and `string_match_part` for one answer (`scripts/eval/synthetic/constants.py` of
    NVIDIA/RULER at commit c3f5e3b4f87f97e048793bb510a3a6b19a46bf3a).
    """
    found = [reference.lower() in said.lower() for reference in references]
    return float(any(found)) if part else sum(found) / len(found)


def _greedy(
    model: Any,
    cache: Any,
    asked: Sequence[tuple[int, list[int]]],
    limits: Sequence[int],
    stops: set[int | None],
    batch: int = 1,
    most: int = 1,
    done: Callable[[list[int]], bool] = lambda said: False,
) -> list[list[int]]:
    """For (row, ids) each, at most its limit of the most likely tokens after `ids`: up to one of `stops`, left out, or
    until `done`."""
    said: list[list[int]] = [[] for _ in asked]
    for group in grouped([len(ids) for _, ids in asked], most):
        fork = rows_of(cache, [asked[place][0] for place in group], batch)
        if max(limits[place] for place in group) < WORTH_A_GRAPH:
            eager(fork)
        tokens = torch.tensor([asked[place][1] for place in group], device=model.device)
        going, here = [place for place in group if limits[place] > 0], list(group)
        while going:
            logits = model(tokens, past_key_values=fork, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            for place, token in zip(here, tokens[:, 0].tolist()):
                if place not in going:
                    continue
                if token not in stops:
                    said[place].append(token)
                if token in stops or done(said[place]) or len(said[place]) == limits[place]:
                    going.remove(place)
            if 0 < 2 * len(going) <= len(here):  # those that have ended are fed on, until they are many
                kept = torch.tensor([at for at, place in enumerate(here) if place in going])
                fork.batch_select_indices(kept)
                tokens, here = tokens[kept.to(tokens.device)], list(going)
    return said


def likelihoods(model: Any, tokenizer: Any, cache: Any, text: str, choices: tuple[str, ...]) -> list[float]:
    """Log-likelihood in nats of each choice after `text`: the sum over its tokens, not their mean, so that it is the
    probability of the choice as a whole and the choices can be compared with each other as alternatives.

    `text + choice` is tokenised as one string, as the model has seen text in training, and nothing is put between
    them: a choice that begins a word has its own leading space. A tokenizer may merge the end of `text` with the
    beginning of a choice. So the tokens that `text` and all of `text + choice` begin with are fed once, and every
    choice is scored on its tokens behind these: the same boundary for all, and no token of any choice goes unscored.
    """
    return _likelihoods(model, tokenizer, cache, [(0, text, choices)])[0]


def _likelihoods(
    model: Any,
    tokenizer: Any,
    cache: Any,
    asked: Sequence[tuple[int, str, tuple[str, ...]]],
    batch: int = 1,
    most: int = 1,
) -> list[list[float]]:
    """`likelihoods` for (row, text, choices) each."""
    split = [_split(tokenizer, text, choices) for _, text, choices in asked]
    found = [[0.0] * len(rests) for _, rests in split]
    tails = _Tails(model, found, most)
    for group in grouped([len(start) for start, _ in split], most):
        fork = eager(rows_of(cache, [asked[place][0] for place in group], batch))
        start = torch.tensor([split[place][0] for place in group], device=model.device)
        first = model(start, past_key_values=fork, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        each = [
            _Tail(row, place, choice, rest)
            for row, place in enumerate(group)
            for choice, rest in enumerate(split[place][1])
        ]
        logs = first[[one.row for one in each], [one.tokens[0] for one in each]].tolist()
        for one, log in zip(each, logs):
            found[one.question][one.choice] = log
        tails.add(fork, len(group), [one for one in each if len(one.tokens) > 1])
    tails.finish()
    return found


class _Tail(NamedTuple):
    """What is left of a choice behind the tokens that are fed once, and which row of their cache it follows."""

    row: int
    question: int
    choice: int
    tokens: list[int]


class _Tails:
    """Feeds choices, and adds their log-likelihoods to `found`.

    A cache of ours is given them token by token, as when they were written: so methods do what they do in decoding, and
    sequences of any length may be one batch, `most` of them. The exact cache, to which it makes no difference, is
    given those of equal length as chunks.
    """

    def __init__(self, model: Any, found: list[list[float]], most: int) -> None:
        self.model, self.found, self.most = model, found, most
        self.cache: Any = None
        self.waiting: list[_Tail] = []

    def add(self, cache: Any, batch: int, tails: list[_Tail]) -> None:
        """Those that follow the `batch` sequences of a cache, which is left as it is."""
        if not hasattr(cache, "join"):
            for places in grouped([len(tail.tokens) for tail in tails], self.most):
                self._chunk(cache, batch, [tails[place] for place in places])
            return
        for start in range(0, len(tails), self.most):
            part = tails[start : start + self.most]
            fork = eager(rows_of(cache, [tail.row for tail in part], batch))
            if self.cache is not None and (len(self.waiting) + len(part) > self.most or not steps_at_once(fork)):
                self.finish()
            if self.cache is None:
                self.cache = fork
            else:
                self.cache.join(fork)
            self.waiting += part

    def _chunk(self, cache: Any, batch: int, tails: list[_Tail]) -> None:
        ids = torch.tensor([tail.tokens for tail in tails], device=self.model.device)
        fork = rows_of(cache, [tail.row for tail in tails], batch)
        rows = self.model(ids[:, :-1], past_key_values=fork).logits.float().log_softmax(-1)
        for tail, logs in zip(tails, rows.gather(2, ids[:, 1:, None])[:, :, 0].tolist()):
            self.found[tail.question][tail.choice] += sum(logs)

    def finish(self) -> None:
        """Feed those that wait."""
        cache, here, at = self.cache, self.waiting, 0
        self.cache, self.waiting = None, []
        while here:
            left = [row for row, tail in enumerate(here) if len(tail.tokens) > at + 1]
            if 0 < len(left) < len(here):
                cache.batch_select_indices(torch.tensor(left))
            here = [here[row] for row in left]
            if here:
                ids = torch.tensor([tail.tokens[at : at + 2] for tail in here], device=self.model.device)
                rows = self.model(ids[:, :1], past_key_values=cache).logits[:, -1].float().log_softmax(-1)
                for tail, log in zip(here, rows.gather(1, ids[:, 1:])[:, 0].tolist()):
                    self.found[tail.question][tail.choice] += log
            at += 1


def _split(tokenizer: Any, text: str, choices: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
    """What is fed once, and the tokens of each choice behind it: see `likelihoods`."""
    whole = [_ids(tokenizer, text + choice) for choice in choices]
    shared = 0
    for column in zip(_ids(tokenizer, text), *whole):
        if len(set(column)) > 1:
            break
        shared += 1
    if shared == 0 or any(len(ids) == shared for ids in whole):
        raise InputError(f"the question {text!r} shares no first token with its choices, or a choice is empty.")
    return whole[0][:shared], [ids[shared:] for ids in whole]


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
