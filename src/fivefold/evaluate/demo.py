"""The main job, once per recipe: a long real document with planted facts is read once, then continued and asked about.

The document is Python's own language reference (`pydoc_data.topics`, in every Python). For each recipe the prefix is
prefilled once; from forks of that one cache, (1) the document's own next tokens are fed one by one and the model's
distributions are compared with those of the exact cache, and (2) each planted fact is asked for.
The exact cache is transformers' `DynamicCache` with its own attention, in the same run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fivefold.api import compress, restore
from fivefold.errors import InputError
from fivefold.evaluate.score import twin
from fivefold.recipe import Recipe

DEFAULT_RECIPES = (
    "full()",
    "kivi(bits=4)",
    "kivi(bits=2)",
    "streaming()",
    "duo(keep=0.34) + kivi(bits=4)",
)
DEFAULT_CONTEXT = 4096
BASELINE = "DynamicCache"
CONTINUATION = 64
_ANSWER_TOKENS = 12
# (what is planted, how it is asked for, possible answers): facts of different kinds, so that one is not taken for
# another by a model of this size.
_FACTS = (
    (
        "The vault opens with the number {0}. Remember that the number {0} opens the vault.",
        "Which number opens the vault?\nThe vault opens with the number",
        tuple(str(number) for number in range(10000, 100000)),
    ),
    (
        "The captain of the white ship is called {0}. Remember that the captain of the white ship is {0}.",
        "Who is the captain of the white ship?\nThe captain of the white ship is called",
        ("Marlow", "Benedict", "Katherine", "Octavia", "Leopold", "Rosalind", "Winston", "Penelope"),
    ),
    (
        "The secret meeting takes place in {0}. Remember that the secret meeting is in {0}.",
        "Where does the secret meeting take place?\nThe secret meeting takes place in",
        ("Lisbon", "Helsinki", "Nairobi", "Toronto", "Santiago", "Prague", "Melbourne", "Istanbul"),
    ),
)

Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Fact:
    """A sentence planted in the document, the question for it, and the text that a right answer holds."""

    sentence: str
    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """prefix, continuation: int64 `[1, tokens]`; questions: int64 `[1, tokens]` each."""

    prefix: torch.Tensor
    continuation: torch.Tensor
    questions: list[torch.Tensor]
    facts: list[Fact]


def document() -> str:
    """Python's language reference as one text, about 700 KB, in a fixed order."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def make_task(tokenizer: Any, context: int, seed: int = 0, continuation: int = CONTINUATION) -> Task:
    """A prefix of exactly `context` tokens of the document with three facts planted in it, and what follows it.

    The same seed gives the same task. Raises `InputError` if the context is too short for the facts.
    """
    pick = random.Random(seed)
    planted = []
    for sentence, question, answers in pick.sample(_FACTS, len(_FACTS)):
        answer = pick.choice(answers)
        planted.append(Fact(f"\n\n{sentence.format(answer)}\n\n", f"\n\n{question}", answer))
    facts = len(planted)
    encoded = [tokenizer(fact.sentence, add_special_tokens=False).input_ids for fact in planted]
    planted_tokens, least = sum(map(len, encoded)), 32 * (facts + 1)
    body = context - planted_tokens
    if body < least:
        raise InputError(
            f"a context of {context} tokens is too short for {facts} planted facts: use at least "
            f"{planted_tokens + least}."
        )
    text = document()
    start = text.index("\n", pick.randrange(len(text) // 2))
    # About six characters a token at most: cut before encoding, so that nothing of the rest is paid for.
    ids = tokenizer(text[start : start + 8 * (body + continuation) + 400], add_special_tokens=False).input_ids
    if len(ids) < body + continuation:
        raise InputError(f"a context of {context} tokens is longer than the document: use at most 100000.")
    prefix: list[int] = []
    for number, sentence in enumerate(encoded):
        prefix += ids[number * body // (facts + 1) : (number + 1) * body // (facts + 1)] + sentence
    prefix += ids[facts * body // (facts + 1) : body]
    asked = [tokenizer(fact.question, add_special_tokens=False, return_tensors="pt").input_ids for fact in planted]
    return Task(torch.tensor([prefix]), torch.tensor([ids[body : body + continuation]]), asked, planted)


def run(
    model: Any,
    tokenizer: Any,
    recipes: Sequence[str] = DEFAULT_RECIPES,
    context: int = DEFAULT_CONTEXT,
    seed: int = 0,
    progress: Progress | None = None,
    on_run: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure each recipe against the exact cache.

    `progress(recipe, stage, done, total)` is called as work goes on, `on_run` with each finished run, the baseline's
    first. Returns what `fivefold demo --json` writes: `kl` is the mean KL divergence in nats of the next-token
    distribution from the exact one's, `agreement` the share of positions with the same most likely token, times are
    wall-clock (decode: median of a step). Raises `InputError` for a context that the model cannot take.
    """
    parsed = [Recipe.parse(recipe) for recipe in recipes]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and context + CONTINUATION > longest:
        raise InputError(
            f"a context of {context} tokens is too long for this model: use at most {longest - CONTINUATION}."
        )
    task = make_task(tokenizer, context, seed)
    report = progress or (lambda recipe, stage, done, total: None)
    with torch.inference_mode():
        baseline, exact = _measure(model, tokenizer, task, None, None, report)
        if on_run is not None:
            on_run(baseline)
        runs = []
        for recipe in parsed:
            result, _ = _measure(model, tokenizer, task, recipe, exact, report)
            runs.append(result)
            if on_run is not None:
                on_run(result)
    return {
        "model": getattr(model.config, "name_or_path", "") or type(model).__name__,
        "context_tokens": context,
        "seed": seed,
        "dtype": str(model.dtype).removeprefix("torch."),
        "questions": [{"question": fact.question.strip(), "answer": fact.answer} for fact in task.facts],
        "baseline": baseline,
        "runs": runs,
    }


def _measure(
    model: Any,
    tokenizer: Any,
    task: Task,
    recipe: Recipe | None,
    exact: torch.Tensor | None,
    progress: Progress,
) -> tuple[dict[str, Any], torch.Tensor]:
    """One run, and its log-probabilities over the continuation: float32 `[CONTINUATION, vocabulary]`."""
    name = BASELINE if recipe is None else str(recipe)
    device = model.device
    restore(model)
    if recipe is None:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=model.config)
    else:
        cache = compress(model, recipe)
    progress(name, "prefill", 0, 1)
    start = time.perf_counter()
    model(task.prefix.to(device), past_key_values=cache, logits_to_keep=1)
    prefill = _clock(device) - start
    progress(name, "prefill", 1, 1)
    if recipe is None:
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        equivalent = size
    else:
        report = cache.report()
        size, equivalent = report.total, report.exact_equivalent

    fork = twin(cache)
    steps, rows = [], []
    for position in range(task.continuation.shape[1]):
        progress(name, "decode", position, task.continuation.shape[1])
        token = task.continuation[:, position : position + 1].to(device)
        start = time.perf_counter()
        logits = model(token, past_key_values=fork).logits
        steps.append(_clock(device) - start)
        rows.append(logits[0, -1].float().log_softmax(-1).cpu())
    progress(name, "decode", task.continuation.shape[1], task.continuation.shape[1])
    logs = torch.stack(rows)
    reference = logs if exact is None else exact

    answers = []
    for number, question in enumerate(task.questions):
        progress(name, "answers", number, len(task.questions))
        answers.append(_answer(model, tokenizer, question.to(device), twin(cache)))
    progress(name, "answers", len(task.questions), len(task.questions))
    right = [fact.answer in answer for fact, answer in zip(task.facts, answers)]
    return {
        "recipe": name,
        "cache_bytes": size,
        "decoding": None if recipe is None else fork.decoding,
        "ratio": size / equivalent,
        "prefill_s": prefill,
        "decode_ms_per_token": sorted(steps)[len(steps) // 2] * 1e3,
        "kl": max(0.0, float((reference.exp() * (reference - logs)).sum(-1).mean())),
        "agreement": float((reference.argmax(-1) == logs.argmax(-1)).float().mean()),
        "answers": answers,
        "right": right,
        "answers_right": sum(right),
    }, logs


def _answer(model: Any, tokenizer: Any, question: torch.Tensor, cache: Any) -> str:
    """The model's greedy answer, up to the end of its line."""
    said: list[int] = []
    tokens = question
    for _ in range(_ANSWER_TOKENS):
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        tokens = logits[:, -1].argmax(-1, keepdim=True)
        said.append(int(tokens))
        text = tokenizer.decode(said, skip_special_tokens=True)
        if "\n" in text.lstrip() or int(tokens) == tokenizer.eos_token_id:
            break
    return tokenizer.decode(said, skip_special_tokens=True).strip().split("\n")[0]


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
