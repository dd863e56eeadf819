"""Hadamard matrices of many orders, and the fast products with them."""

from __future__ import annotations

import pytest
import torch

from fivefold.kernels.hadamard import exists, fwht, hadamard, split, transform

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 64, 72, 80, 96, 112, 128, 160, 192, 256, 320, 384, 448, 512]


@pytest.mark.parametrize("n", ORDERS)
def test_matrices_and_fast_products(n: int) -> None:
    matrix = hadamard(n).double()
    assert (matrix.abs() * n**0.5 - 1).abs().max() < 1e-6
    assert (matrix @ matrix.T - torch.eye(n)).abs().max() < 1e-6
    a, b = split(n)
    assert a * b == n and (torch.kron(hadamard(a), hadamard(b)) - matrix).abs().max() < 1e-6
    x = torch.randn(3, 5, n, dtype=torch.float64)
    for product in (fwht, transform):
        assert (product(x) - x @ matrix).abs().max() < 1e-5
        assert (product(x, back=True) - x @ matrix.T).abs().max() < 1e-5
        assert (product(product(x), back=True) - x).abs().max() < 1e-5


def test_powers_of_two_are_walsh_hadamard() -> None:
    signs = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(32)] for i in range(32)])
    assert (hadamard(32) * 32**0.5 - signs).abs().max() < 1e-5


def test_orders_that_have_none() -> None:
    for n in (3, 6, 10, 14, 18):
        assert not exists(n)
    with pytest.raises(ValueError, match="order 6"):
        hadamard(6)
