"""Asks a question of a cache and scores what comes back. The one place where scores are decided.

A question follows the prefix that the cache holds; the cache itself is never changed, every answer works on a fork.
Any cache of transformers serves, `DynamicCache` as well as ours.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fivefold.errors import InputError
from fivefold.evaluate.tasks.base import Kind, Question, holds

ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Answer:
    """score: what the task's kind gives. right: whether the answer is right, None if the kind knows no right or wrong
    (bits). said: the first generated line, or the winning choice, without space around it. detail: log-likelihood of
    each choice in nats, in the order of the question; empty for generated answers."""

    score: float
    right: bool | None
    said: str
    detail: dict[str, float] = field(default_factory=dict)


def twin(cache: Any) -> Any:
    """The same tokens in a cache of its own: shared pages where the cache is ours, a copy where it is not."""
    return cache.fork() if hasattr(cache, "fork") else copy.deepcopy(cache)


def answer(model: Any, tokenizer: Any, cache: Any, question: Question, kind: Kind) -> Answer:
    """Ask `question` after what `cache` holds. The cache is left as it is.

    generate: 1 if the first line of greedy text holds the answer. choices: 1 if the answer is the most likely choice,
    0 if another one is or if it only ties. bits: `log2(n) + log2 p(answer | the n choices)`, at most log2(n).
    match_all, match_part: see `matched`; the text is as long as the question allows.
    Raises `InputError` for a question that cannot be asked this way.
    """
    with torch.inference_mode():
        if kind == "generate":
            said = generate(model, tokenizer, cache, question.text)
            right = holds(said, question.answer)
            return Answer(float(right), right, said)
        if kind in ("match_all", "match_part"):
            said = printable(write(model, tokenizer, cache, question))
            score = matched(said, question.references, part=kind == "match_part")
            return Answer(score, score == 1, said)
        if question.answer not in question.choices or len(set(question.choices)) < len(question.choices):
            raise InputError(
                f"the choices {question.choices!r} must be different and hold the answer {question.answer!r} once."
            )
        logs = likelihoods(model, tokenizer, cache, question.text, question.choices)
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

    def line_ends(said: list[int]) -> bool:
        return "\n" in tokenizer.decode(said, skip_special_tokens=True).lstrip()

    said = _greedy(model, cache, _ids(tokenizer, text), limit, {tokenizer.eos_token_id}, line_ends)
    return tokenizer.decode(said, skip_special_tokens=True).strip().split("\n")[0].strip()


def write(model: Any, tokenizer: Any, cache: Any, question: Question) -> str:
    """Up to `question.limit` greedy tokens after the question, less if the model ends its answer before."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    ids = list(question.ids) or _ids(tokenizer, question.text)
    return tokenizer.decode(_greedy(model, cache, ids, question.limit, stops), skip_special_tokens=True)


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
    ids: list[int],
    limit: int,
    stops: set[int | None],
    done: Callable[[list[int]], bool] = lambda said: False,
) -> list[int]:
    """At most `limit` of the most likely tokens after `ids`: up to one of `stops`, left out, or until `done`."""
    fork = twin(cache)
    tokens = torch.tensor([ids], device=model.device)
    said: list[int] = []
    for _ in range(limit):
        logits = model(tokens, past_key_values=fork, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        if int(tokens) in stops:
            break
        said.append(int(tokens))
        if done(said):
            break
    return said


def likelihoods(model: Any, tokenizer: Any, cache: Any, text: str, choices: tuple[str, ...]) -> list[float]:
    """Log-likelihood in nats of each choice after `text`: the sum over its tokens, not their mean, so that it is the
    probability of the choice as a whole and the choices can be compared with each other as alternatives.

    `text + choice` is tokenised as one string, as the model has seen text in training, and nothing is put between
    them: a choice that begins a word has its own leading space. A tokenizer may merge the end of `text` with the
    beginning of a choice. So the tokens that `text` and all of `text + choice` begin with are fed once, and every
    choice is scored on its tokens behind these: the same boundary for all, and no token of any choice goes unscored.
    """
    whole = [_ids(tokenizer, text + choice) for choice in choices]
    shared = 0
    for column in zip(_ids(tokenizer, text), *whole):
        if len(set(column)) > 1:
            break
        shared += 1
    if shared == 0 or any(len(ids) == shared for ids in whole):
        raise InputError(f"the question {text!r} shares no first token with its choices, or a choice is empty.")
    fork = twin(cache)
    start = torch.tensor([whole[0][:shared]], device=model.device)
    first = model(start, past_key_values=fork, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
    logs = []
    for ids in whole:
        rest = ids[shared:]
        total = float(first[rest[0]])
        if len(rest) > 1:
            fed = torch.tensor([rest[:-1]], device=model.device)
            rows = model(fed, past_key_values=twin(fork)).logits[0].float().log_softmax(-1)
            total += sum(float(rows[at, token]) for at, token in enumerate(rest[1:]))
        logs.append(total)
    return logs


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids
