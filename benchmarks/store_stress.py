"""Operations in random order on caches and on plain models of them, compared after every one.

    python benchmarks/store_stress.py [OPERATIONS] [--seed N] [--run N] [--out FILE]

The operations and the models are those of tests/properties; hypothesis is not needed. A difference is printed with the
operations that led to it, and `--run` repeats them. For several processes give each a seed of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch

from fivefold.benchmark.machine import stamp

sys.path.extend(str(Path(__file__).resolve().parent.parent / name) for name in ("tests", "tests/properties"))
from store_model import OPERATIONS, WEIGHTS, Setup, System

OPERATIONS_PER_RUN = 200
# References are counted, and free pages poisoned, after every so many operations; contents are compared after each.
ACCOUNTS = 8
NAMES, SHARES = list(WEIGHTS), list(WEIGHTS.values())


def run(seed: int, number: int, operations: int, done: Counter[str], failed: Counter[str], every: int) -> None:
    """One set of caches, from their making until every byte is given back."""
    rng = random.Random(f"{seed} {number}")
    setup = Setup.draw(rng)
    system = System(setup, every)
    steps = []
    try:
        for _ in range(operations):
            (name,) = rng.choices(NAMES, SHARES)
            arguments = [rng.randint(*bounds) for bounds in OPERATIONS[name]]
            steps.append(f"{name}{tuple(arguments)}")
            system.operate(name, arguments)
            system.check()
            done[name] += 1
        system.finish()
    except Exception:
        traceback.print_exc()
        sys.exit(f"seed {seed}, run {number}: {setup}\n" + "\n".join(steps))
    failed.update(system.failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=int, help="only this run of the seed, with everything compared after each one")
    parser.add_argument("--out", type=Path, help="a JSON file for the results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    done: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    if arguments.run is not None:
        run(arguments.seed, arguments.run, OPERATIONS_PER_RUN, done, failed, 1)
        return
    start, cpu = time.perf_counter(), time.process_time()
    shown = start
    while (total := done.total()) < arguments.operations:
        count = min(OPERATIONS_PER_RUN, arguments.operations - total)
        run(arguments.seed, total // OPERATIONS_PER_RUN, count, done, failed, ACCOUNTS)
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{done.total():,} operations, {done.total() / (shown - start):.0f} a second", flush=True)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    if arguments.out is not None:
        results = {
            **stamp(), "seed": arguments.seed, "operations": done.total(), "differences": 0,
            "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "accounts_every": ACCOUNTS,
            "done": {name: done[name] for name in NAMES}, "failed_on_purpose": {name: failed[name] for name in NAMES},
        }  # fmt: skip
        arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    kinds = ", ".join(f"{name} {done[name]:,} ({failed[name]:,})" for name in NAMES)
    print(
        f"{done.total():,} operations in {seconds:.0f} s ({done.total() / seconds:.0f} a second, "
        f"{done.total() / cpu:.0f} a second of the processor's time), seed {arguments.seed}: no difference; "
        f"{failed.total():,} changes failed on purpose; {kinds}"
    )


if __name__ == "__main__":
    main()
