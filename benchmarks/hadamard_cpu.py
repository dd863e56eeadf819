"""Three ways to multiply with a Hadamard matrix on this CPU: one dense product, two small ones, butterflies.

python benchmarks/hadamard_cpu.py [--tokens 4096] [--threads 2]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from fivefold.kernels.hadamard import fwht, hadamard, split, transform


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(33):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.tokens} tokens, ms, the best of 30: order, dense, two products (orders), butterflies")
    for n in (64, 128, 192, 256, 320, 512, 1024):
        x, matrix = torch.randn(args.tokens, n), hadamard(n)
        ways = (lambda: x @ matrix, lambda: transform(x), lambda: fwht(x))  # noqa: B023
        dense, two, many = (milliseconds(way) for way in ways)
        print(f"{n:5d} {dense:7.2f} {two:7.2f} {split(n)!s:>9} {many:7.2f}", flush=True)


if __name__ == "__main__":
    main()
