"""The CPU kernels, C++ that is compiled where it runs, against the plain steps: random shapes, pages inside records."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from fivefold.kernels import compiled
from fivefold.kernels.choice import MAX_QUERIES, choose
from fivefold.kernels.hadamard import exists
from fivefold.kernels.planar import PLANES, planar_output, planar_scores, planar_token_scores, reference, sheets_of
from fivefold.kernels.rotated import rotated_columns, rotated_scores
from fivefold.store import Rope

pytestmark = pytest.mark.skipif(choose(torch.device("cpu")).path != "cpp", reason="no C++ compiler")


def in_records(rows: int, pages: int, *shape: int) -> torch.Tensor:
    """Random words of pages that lie apart from each other: int16 `[rows, pages, *shape]`."""
    record = torch.randint(-(2**15), 2**15, (rows, pages, shape[0] * shape[1] + 7), dtype=torch.int16)
    return record[:, :, : shape[0] * shape[1]].unflatten(2, shape)


def plain(
    queries: torch.Tensor,
    words: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    order: torch.Tensor,
    n: int,
    rope: Rope,
    cos_sin: tuple[torch.Tensor, torch.Tensor],
    bits: int,
) -> torch.Tensor:
    rows, _, dim, _ = words.shape
    together = order.shape[1] // dim
    teams = rows // together
    joined = words.unflatten(0, (teams, together)).transpose(2, 3).flatten(1, 2)
    grouped = [x.unflatten(0, (teams, together)).permute(0, 1, 4, 3, 2, 5).flatten(0, 2).float() for x in (scale, zero)]
    places = order.argsort(1).expand(teams, -1) + torch.arange(teams)[:, None] * order.shape[1]
    columns = rotated_columns(joined, *grouped, places.flatten(), n, bits)[0].unflatten(1, (together, dim))
    keys = rope.rotate_columns(columns, cos_sin).transpose(3, 4).flatten(3).flatten(0, 1)
    return queries.double() @ keys.double()


@pytest.mark.parametrize("seed", range(16))
def test_scores_of_random_shapes(seed: int) -> None:
    torch.manual_seed(seed)
    pick = random.Random(seed)
    bits, group = pick.choice([2, 3, 4]), pick.choice([16, 32])
    dim = pick.choice([32, 64, 80, 96, 128]) if group == 16 else pick.choice([32, 64, 96, 128])
    pairs = pick.choice([dim // 2, dim // 4, dim // 2 - 1])
    together, teams, pages, query = (pick.randint(1, 4) for _ in range(4))
    n = max(b * dim for b in range(1, together + 1) if together % b == 0 and exists(b * dim))
    planes, rows, channels = PLANES[bits], together * teams, together * dim
    words = in_records(rows, pages, dim, 32)  # 3-bit words have a bit that nobody reads
    shape = (rows, pages, planes, dim // group, 32)
    scale, zero = torch.rand(shape).half() * 1e-3, torch.randn(shape).half()  # subnormal numbers among them
    scale[:, :, ::2] *= 1e3
    order = torch.stack([torch.randperm(channels) for _ in range(pick.choice([1, teams]))])
    rope = Rope(torch.rand(pairs), dim)
    angles = torch.rand(pick.choice([1, teams]), 1, pairs, planes, pages, 32) * 6.3
    cos_sin = angles.cos(), angles.sin()
    queries, threads = torch.randn(rows, query, dim), torch.get_num_threads()
    expected = plain(queries, words, scale, zero, order, n, rope, cos_sin, bits)
    got = rotated_scores(queries, words, scale, zero, order, n, cos_sin, bits)
    assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("seed", range(16))
def test_planar_pages_of_random_shapes(seed: int) -> None:
    torch.manual_seed(seed)
    pick = random.Random(seed)
    bits, rows, pages, query = pick.choice([2, 3, 4, 8]), pick.randint(1, 5), pick.randint(1, 4), pick.randint(1, 7)
    channels = pick.choice([16, 32, 64])
    groups = pick.randint(1, 3)
    dim = groups * channels
    planes = pick.choice([PLANES[bits], PLANES[bits] * 2 - 1])
    words = in_records(rows, pages, sheets_of(bits, planes) * 32, dim)
    scale, zero = (
        torch.rand(rows, pages, planes, groups, 32).half(),
        torch.randn(rows, pages, planes, groups, 32).half(),
    )
    queries, tokens = torch.randn(rows, query, dim), pages * planes * 32
    weights = torch.rand(rows, query, tokens + 9)[:, :, 5:-4]  # what another tier has of a softmax lies beside it

    def check(got: torch.Tensor, expected: torch.Tensor) -> None:
        assert got.shape == expected.shape and (got - expected).abs().max() < 1e-5 * expected.abs().max()

    check(planar_output(weights, words, scale, zero, bits), reference.planar_output(weights, words, scale, zero, bits))
    spread = torch.rand(rows, tokens, query).transpose(1, 2)
    check(planar_output(spread, words, scale, zero, bits), reference.planar_output(spread, words, scale, zero, bits))
    if planes == PLANES[bits]:
        pages_of = words, scale, zero, bits
        check(planar_token_scores(queries, *pages_of), reference.planar_token_scores(queries, *pages_of))
    for each in (n for n in range(1, planes + 1) if planes % n == 0):
        scale, zero = torch.rand(rows, pages, each, dim).half(), torch.randn(rows, pages, each, dim).half()
        pages_of = words, scale, zero, bits, planes
        check(planar_scores(queries, *pages_of), reference.planar_scores(queries, *pages_of))


def test_many_queries_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", None)
    words, scale, zero = in_records(1, 1, 32, 16), torch.rand(1, 1, 4, 16).half(), torch.rand(1, 1, 4, 16).half()
    assert planar_scores(torch.randn(1, MAX_QUERIES + 1, 16), words, scale, zero, 2).isfinite().all()


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its source is copied to; other numbers, or another source, are another library."""
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path))
    copy = tmp_path / compiled._PROBE.name
    copy.write_bytes(compiled._PROBE.read_bytes())

    def there() -> list[tuple[Path, int]]:
        return [(path, path.stat().st_mtime_ns) for path in (tmp_path / "kernels").iterdir()]

    made = compiled.library.__wrapped__(compiled._PROBE, N=1)
    assert made.threads() == torch.get_num_threads()
    first = there()
    for source in (compiled._PROBE, copy):
        compiled.library.__wrapped__(source, N=1)
        assert there() == first and len(first) == 1
    compiled.library.__wrapped__(compiled._PROBE, N=2)
    copy.write_text(f"{copy.read_text()}\n")
    compiled.library.__wrapped__(copy, N=1)
    assert len(there()) == 3


def test_a_compiler_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes its place, or, where the kernels were asked for, one sentence says what it said."""
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no OpenMP here >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("FIVEFOLD_CACHE", str(tmp_path / "cache"))
    compiled.compiler.cache_clear(), compiled.library.cache_clear(), compiled._machine.cache_clear()
    try:
        why = compiled.lacking.__wrapped__()
    finally:
        compiled.compiler.cache_clear(), compiled.library.cache_clear(), compiled._machine.cache_clear()
    assert why == "probe.cpp does not compile here (FIVEFOLD_KERNELS=reference does without it): no OpenMP here"
    assert not list((tmp_path / "cache/kernels").iterdir())


def test_torch_keeps_its_threads() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        test_scores_of_random_shapes(0)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
