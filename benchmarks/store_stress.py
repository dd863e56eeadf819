"""Operations in random order on the store and on a plain model of it, compared after every one.

    python benchmarks/store_stress.py [OPERATIONS] [--seed N] [--run N]

The operations and the model are those of tests/properties; hypothesis is not needed. A difference is printed
with the operations that led to it, and `--run` repeats them.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.extend(str(Path(__file__).resolve().parent.parent / name) for name in ("tests", "tests/properties"))
from store_model import OPERATIONS, WEIGHTS, Setup, System

OPERATIONS_PER_RUN = 200


def run(seed: int, run: int, operations: int) -> None:
    """One set of caches, from their making until every byte is given back."""
    rng = random.Random(f"{seed} {run}")
    setup = Setup.draw(rng)
    system = System(setup)
    steps = []
    try:
        for _ in range(operations):
            (name,) = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
            arguments = [rng.randint(*bounds) for bounds in OPERATIONS[name]]
            steps.append(f"{name}{tuple(arguments)}")
            system.operate(name, arguments)
            system.check()
        system.finish()
    except Exception:
        traceback.print_exc()
        sys.exit(f"seed {seed}, run {run}: {setup}\n" + "\n".join(steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operations", type=int, nargs="?", default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=int, help="only this run of the seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.run is not None:
        run(arguments.seed, arguments.run, OPERATIONS_PER_RUN)
        return
    done, start = 0, time.perf_counter()
    shown = start
    while done < arguments.operations:
        count = min(OPERATIONS_PER_RUN, arguments.operations - done)
        run(arguments.seed, done // OPERATIONS_PER_RUN, count)
        done += count
        if time.perf_counter() - shown > 10:
            shown = time.perf_counter()
            print(f"{done:,} operations, {done / (shown - start):.0f} a second", flush=True)
    seconds = time.perf_counter() - start
    print(f"{done:,} operations in {seconds:.0f} s ({done / seconds:.0f} a second): no difference")


if __name__ == "__main__":
    main()
