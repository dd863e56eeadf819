"""Hadamard matrices and the products with them, in plain PyTorch.

A Hadamard matrix of order n has entries +-1 and orthogonal rows; here it is divided by sqrt(n). Orders are m * 2^k: a
core of order m after Paley (1933), and Sylvester's doubling, `H_2n = [[H_n, H_n], [H_n, -H_n]]`. For powers of two that
is the Walsh-Hadamard matrix in natural order, as in the fast-hadamard-transform package.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from fivefold.kernels.shared import shared


def _prime(q: int) -> bool:
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))


@lru_cache(maxsize=256)
def _core(n: int) -> int | None:
    """The order m of the smallest core with which n is m * 2^k; None if there is none."""
    m, doubled = n, []
    while True:
        doubled.append(m)
        if m % 2 or m < 2:
            break
        m //= 2
    for m in reversed(doubled):
        if m == 1 or (m % 4 == 0 and (_prime(m - 1) or (_prime(m // 2 - 1) and m // 2 % 4 == 2))):
            return m
    return None


def _paley(m: int) -> torch.Tensor:
    """Entries +-1 `[m, m]`: Paley's first construction if m - 1 is a prime, else his second."""
    first = _prime(m - 1)
    q = m - 1 if first else m // 2 - 1
    residue = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in residue else -1 for i in range(1, q)])
    jacobsthal = character[(torch.arange(q)[:, None] - torch.arange(q)) % q]
    border = torch.zeros(q + 1, q + 1, dtype=torch.int64)
    border[0, 1:], border[1:, 1:] = 1, jacobsthal
    border[1:, 0] = -1 if first else 1
    if first:
        return torch.eye(m, dtype=torch.int64) + border
    one, other = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(border, one) + torch.kron(torch.eye(q + 1, dtype=torch.int64), other)


@shared(64)
def hadamard(n: int) -> torch.Tensor:
    """The matrix of order n, float32 `[n, n]`, H H^T = 1. Raises `ValueError` if none is known here."""
    m = _core(n)
    if m is None:
        raise ValueError(f"no Hadamard matrix of order {n} is known here")
    matrix = _paley(m) if m > 1 else torch.ones(1, 1, dtype=torch.int64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.float() / n**0.5


@shared(64)
def _placed(n: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return hadamard(n).to(device, dtype)


def _like(x: torch.Tensor, n: int) -> torch.Tensor:
    """The matrix of order n, where x is and in its dtype."""
    return _placed(n, x.device, x.dtype)


@shared(64)
def core(n: int) -> torch.Tensor:
    """The core of the matrix of order n, entries +-1: float32 `[m, m]`."""
    m = _core(n)
    assert m is not None
    return hadamard(m) * m**0.5


def exists(n: int) -> bool:
    return _core(n) is not None


@lru_cache(maxsize=64)
def split(n: int) -> tuple[int, int]:
    """(a, b) with `H_n = H_a (x) H_b`, a * b = n, a a power of two, and a + b as small as can be."""
    m = _core(n)
    assert m is not None
    powers = [2**k for k in range((n // m).bit_length())]
    return min(((a, n // a) for a in powers), key=lambda pair: (sum(pair), pair))


def fwht(x: torch.Tensor, back: bool = False) -> torch.Tensor:
    """`x @ H` over the last axis (`back`: `x @ H^T`) by butterflies: n (log2(n / m) + m) additions."""
    n = x.shape[-1]
    m = _core(n)
    assert m is not None
    core = _like(x, m)
    x = x.unflatten(-1, (n // m, m)) @ (core.T if back else core)
    step = n // m
    while step > 1:
        pairs = x.unflatten(-2, (-1, 2, step // 2))
        low, high = pairs[..., 0, :, :], pairs[..., 1, :, :]
        x = torch.stack([low + high, low - high], -3).flatten(-4, -2)
        step //= 2
    return x.flatten(-2) / (n // m) ** 0.5


def transform(x: torch.Tensor, back: bool = False) -> torch.Tensor:
    """The same product by two small dense ones, n (a + b) multiplications (see `split`); by one up to n = 64.

    In PyTorch the fastest on a CPU (`benchmarks/hadamard_cpu.py`): butterflies are many small passes.
    """
    n = x.shape[-1]
    a, b = split(n) if n > 64 else (1, n)
    inner = _like(x, b)
    x = x.unflatten(-1, (a, b)) @ (inner.T if back else inner)
    return (x if a == 1 else _like(x, a) @ x).flatten(-2)


def transform_columns(
    x: torch.Tensor, back: bool = False, spare: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`transform` of what stands in the columns of x `[rows, n, m]`: a long axis m makes two large products of it.

    Overwrites x and spare, memory of the same shape. Returns the result, which is one of them, and the other.
    """
    n = x.shape[1]
    a, b = split(n) if n > 64 else (1, n)
    inner = _like(x, b)
    spare = torch.empty_like(x) if spare is None else spare
    parts = x.view(-1, b, x.shape[2])
    torch.bmm((inner if back else inner.T).expand(len(parts), b, b), parts, out=spare.view(parts.shape))
    if a == 1:
        return spare, x
    whole = spare.view(len(x), a, -1)
    torch.bmm(_like(x, a).expand(len(x), a, a), whole, out=x.view(whole.shape))
    return x, spare
