"""What numba compiles for the CPU against the plain steps: random shapes, pages inside records."""

from __future__ import annotations

import random

import pytest
import torch

from fivefold.kernels.hadamard import exists
from fivefold.kernels.planar import PLANES
from fivefold.kernels.rotated import rotated_columns, rotated_scores
from fivefold.store import Rope


def plain(
    queries: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    order: torch.Tensor,
    n: int,
    rope: Rope,
    waves: tuple[torch.Tensor, torch.Tensor],
    bits: int,
) -> torch.Tensor:
    rows, _, dim, _ = words.shape
    together = order.shape[1] // dim
    teams = rows // together
    joined = words.unflatten(0, (teams, together)).transpose(2, 3).flatten(1, 2)
    grouped = [x.unflatten(0, (teams, together)).permute(0, 1, 4, 3, 2, 5).flatten(0, 2).float() for x in (scale, zero)]
    places = order.argsort(1).expand(teams, -1) + torch.arange(teams)[:, None] * order.shape[1]
    columns = rotated_columns(joined, *grouped, places.flatten(), n, bits)[0].unflatten(1, (together, dim))
    keys = rope.turn_columns(columns, waves).transpose(3, 4).flatten(3).flatten(0, 1)
    return queries.double() @ keys.double()


@pytest.mark.parametrize("seed", range(24))
def test_scores_of_random_shapes(seed: int) -> None:
    torch.manual_seed(seed)
    pick = random.Random(seed)
    bits, group = pick.choice([2, 3, 4]), pick.choice([16, 32])
    dim = pick.choice([32, 64, 80, 96, 128]) if group == 16 else pick.choice([32, 64, 96, 128])
    pairs = pick.choice([dim // 2, dim // 4, dim // 2 - 1])
    together, teams, pages, query = (pick.randint(1, 4) for _ in range(4))
    n = max(b * dim for b in range(1, together + 1) if together % b == 0 and exists(b * dim))
    planes, rows, channels = PLANES[bits], together * teams, together * dim
    # Inside records, so that pages lie apart from each other; 3-bit words have a bit that nobody reads.
    record = torch.randint(-(2**15), 2**15, (rows, pages, dim * 32 + 7), dtype=torch.int16)
    words = record[:, :, : dim * 32].unflatten(2, (dim, 32))
    shape = (rows, pages, planes, dim // group, 32)
    scale, zero = torch.rand(shape).half() * 1e-3, torch.randn(shape).half()  # subnormal numbers among them
    scale[:, :, ::2] *= 1e3
    order = torch.stack([torch.randperm(channels) for _ in range(pick.choice([1, teams]))])
    rope = Rope(torch.rand(pairs), dim)
    angles = torch.rand(pick.choice([1, teams]), 1, pairs, planes, pages, 32) * 6.3
    waves = angles.cos(), angles.sin()
    queries, threads = torch.randn(rows, query, dim), torch.get_num_threads()
    expected = plain(queries, words, scale, zero, order, n, rope, waves, bits)
    got = rotated_scores(queries, words, scale, zero, order, n, waves, bits)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.get_num_threads() == threads


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        test_scores_of_random_shapes(0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
