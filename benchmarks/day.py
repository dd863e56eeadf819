"""A day in the life of a small server: many conversations, and room for a tenth of them.

    python benchmarks/day.py benchmarks/results/day_smollm2_cpu.json [--conversations 200] [--recipe "kivi(bits=4)"]

Each conversation has 1 to 12 turns of real text, answered greedily. First each is held alone, in a cache of its own;
that says what every answer must be, and how much they hold in the end. Then all are held at once, turns arriving
at random, by one `Scheduler` under a cap of a tenth of that, with a third of it all in host memory and the rest on the
disk.

Answers that differ from those alone are listed, each with the place of its first other token and by how much that
token's logit was above the second best one alone: steps of a batch round otherwise than steps of one sequence, which is
seen where two tokens are nearly as likely. With `--max-batch 1` nothing is left but what moving about does.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import fivefold
from fivefold.benchmark import machine
from fivefold.cli.models import load_model
from fivefold.generation import Conversations, Request, Scheduler

TURNS, WORDS, ANSWER = (1, 12), (15, 60), (6, 16)
Talk = list[tuple[list[int], int]]
APART = 60  # steps between an answer and the next turn, at most


def talks(tokenizer: Any, count: int, words: tuple[int, int], answer: tuple[int, int]) -> list[Talk]:
    """Of each conversation: what is said in each turn, and how many tokens the answer has."""
    rng = random.Random(0)
    ids = tokenizer("\n".join(pydoc_data.topics.topics.values()))["input_ids"]
    out = []
    for _ in range(count):
        turns = []
        for _ in range(rng.randint(*TURNS)):
            first, size = rng.randrange(len(ids) - words[1]), rng.randint(*words)
            turns.append((ids[first : first + size], rng.randint(*answer)))
        out.append(turns)
    return out


@torch.inference_mode()
def alone(
    model: Any, recipe: str, turns: list[tuple[list[int], int]]
) -> tuple[list[list[int]], list[list[float]], int]:
    """The answers of one conversation, by how much the logit of each token is above the second best, and the bytes that
    it holds at its end."""
    cache, answers, gaps, unread = fivefold.compress(model, recipe), [], [], []
    for said, count in turns:
        given, answer, gap = torch.tensor([unread + said], device=model.device), [], []
        for _ in range(count):
            logits = model(given, past_key_values=cache, logits_to_keep=1).logits
            best = logits[0, -1].float().topk(2)
            answer.append(int(best.indices[0]))
            gap.append(float(best.values[0] - best.values[1]))
            given = torch.tensor([answer[-1:]], device=model.device)
        answers.append(answer)
        gaps.append(gap)
        unread = answer[-1:]
    report = cache.report()
    cache.free()
    return answers, gaps, report.total - report.free


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--recipe", default="kivi(bits=4)")
    parser.add_argument("--model")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--words", type=int, nargs=2, default=WORDS, help="tokens of what is said: least, most")
    parser.add_argument("--answer", type=int, nargs=2, default=ANSWER, help="tokens of an answer: least, most")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, arguments.dtype, "auto")
    recipe, rng = arguments.recipe, random.Random(1)
    said = talks(tokenizer, arguments.conversations, tuple(arguments.words), tuple(arguments.answer))
    start = time.perf_counter()
    expected, gaps, sizes = zip(*(alone(model, recipe, turns) for turns in said), strict=True)
    alone_s, held = time.perf_counter() - start, sum(sizes)
    print(f"alone: {alone_s:.0f} s, {held / 2**20:.1f} MiB in the end", flush=True)

    cap, turn = held // 10, [0] * len(said)
    due = {index: rng.randrange(APART) for index in range(len(said))}
    given: dict[Any, int] = {}
    differing, failed, answered, preempted, seen, charged = [], [], 0, 0, [], 0
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        waiting = Conversations(folder, host_bytes=held // 3)
        with Scheduler(model, recipe, arguments.max_batch, cap, conversations=waiting) as scheduler:
            budget, step = scheduler.root.session.pools.budget, 0
            while due or not scheduler.idle:
                for index in [index for index, at in due.items() if at <= step]:
                    del due[index]
                    tokens, count = said[index][turn[index]]
                    given[scheduler.submit(Request(tokens, count, stop=[], conversation=str(index)))] = index
                step += 1
                for event in scheduler.step():
                    if event.result is None:
                        continue
                    index = given.pop(event.handle)
                    if event.result.error:
                        failed.append(event.result.error)
                    answered += 1
                    preempted += event.result.preemptions
                    if not event.result.error:
                        tokens, wanted = event.result.tokens, expected[index][turn[index]]
                        at = next((i for i, (a, b) in enumerate(zip(tokens, wanted)) if a != b), None)
                        if at is not None:
                            gap = gaps[index][turn[index]][at]
                            place = {"conversation": index, "turn": turn[index], "token": at}
                            differing.append({**place, "gap_alone": gap})
                    turn[index] += 1
                    if turn[index] < len(said[index]):
                        due[index] = step + rng.randrange(1, APART)
                charged = max(charged, budget.used + sum(budget.charged.values()))
                if step % 20 == 0:
                    seen.append(waiting.counts())
            seconds, counts = time.perf_counter() - start, waiting.counts()
        disk = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        waiting.clear()
    resumed = {
        where: {"times": len(times), "median_ms": 1e3 * statistics.median(times), "longest_ms": 1e3 * max(times)}
        for where, times in waiting.resumed.items()
        if times
    }
    every = [gap for turns in gaps for turn in turns for gap in turn]
    row = {
        "recipe": recipe, "max_batch": arguments.max_batch, "words": list(arguments.words),
        "answer": list(arguments.answer), "tokens": len(every),
        "conversations": len(said), "turns": sum(map(len, said)), "answered": answered,
        "errors": failed, "answers_other_than_alone": differing,
        "median_gap_alone": statistics.median(every), "held_alone_bytes": held, "cap_bytes": cap,
        "most_bytes": charged, "preemptions": preempted, "steps": step, "seconds": seconds, "alone_seconds": alone_s,
        "resumed": resumed, "waiting_at_the_end": counts, "disk_bytes_at_the_end": disk,
        "waiting_on_average": {key: statistics.fmean(one[key] for one in seen) for key in seen[0]},
    }  # fmt: skip
    print(json.dumps(row, indent=1))
    arguments.out.write_text(json.dumps({**machine.stamp(), "rows": [row]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
