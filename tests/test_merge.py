"""Parts of an attention merged, and the largest of its numbers found, by kernels as in plain PyTorch."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch

import fivefold
from conftest import DEVICES, VOCAB
from fivefold.attention import merge as merge_module
from fivefold.attention.merge import MASKED, merge
from fivefold.engine import layer
from fivefold.kernels.merge import merge_reference
from fivefold.kernels.peak import peaks_reference

pytest.importorskip("triton", reason="needs Triton")
kernel = importlib.import_module("fivefold.kernels.merge.triton")
peak = importlib.import_module("fivefold.kernels.peak.triton")
pytestmark = pytest.mark.usefixtures("one_thread")
HALVES = (torch.float16, torch.bfloat16)


def parts_of(count: int, dim: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Parts as attention leaves them: heads behind tokens, or whole, or a slice, of several dtypes; one of the same
    output for every query; log-sum-exps far apart, and of parts in which nothing is seen."""
    rows, heads, tokens = 2, 3, 37
    made = []
    for number in range(count):
        dtype = (torch.bfloat16, torch.float32, torch.float16)[number % 3]
        out = torch.randn(rows, tokens + 5, heads, dim).to(dtype)[:, 5:].transpose(1, 2)
        if number % 4 == 1:
            out = out.contiguous()
        elif number % 4 == 3:
            out = torch.randn(rows, 1, 1, dim)
        lse = torch.randn(rows, heads, tokens + 1)[..., :tokens] * 10
        lse[:, :, number::7] = MASKED
        lse[:, 1, number + 1 :: 11] = -math.inf
        made.append((out.to(device), lse.to(device)))
    return made


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dim", [16, 80])
@pytest.mark.parametrize("count", [2, 3, 4, 9])
def test_the_kernel_merges(device: str, dim: int, count: int) -> None:
    torch.manual_seed(count)
    parts = parts_of(count, dim, device)
    wanted, total = merge_reference(parts)
    for dtype in (torch.float32, *HALVES):
        room = torch.full((37, 2, 3, dim), math.nan, dtype=dtype, device=device)
        for out in (room.permute(1, 2, 0, 3), torch.empty(wanted.shape, dtype=dtype, device=device)):
            found = kernel.merge_parts(parts, out)
            torch.testing.assert_close(found, total, atol=1e-5, rtol=1e-6)
            torch.testing.assert_close(out, wanted.to(dtype), atol=1e-5, rtol=0.0 if dtype is torch.float32 else 8e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_seen_and_no_number(device: str) -> None:
    """Parts in all of which nothing is seen, and log-sum-exps that are none: as the reference has it."""
    kinds = (0.5, MASKED, -math.inf, math.inf, math.nan)
    lses = [torch.tensor([a, b, c], device=device) for a in kinds for b in kinds for c in kinds]
    each = [torch.stack(x)[:, None] for x in zip(*(lse.unbind() for lse in lses))]
    parts = [(torch.randn(len(lses), 1, 16, device=device), lse) for lse in each]
    wanted, total = merge_reference(parts)
    out = torch.empty_like(wanted)
    found = kernel.merge_parts(parts, out)
    torch.testing.assert_close(found, total, equal_nan=True)
    torch.testing.assert_close(out, wanted, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert bool(total.isfinite().any()) and bool((found == MASKED).any())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("by_kernel", [False, True])
def test_what_a_merge_gives(device: str, by_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part or several; in a dtype, and to a place, that was asked for."""
    monkeypatch.setattr(merge_module, "_by_kernel", lambda parts: by_kernel)
    for count in (1, 2, 5):
        parts = parts_of(count, 32, device)
        wanted = parts[0][0].float() if count == 1 else merge_reference(parts)[0]
        for dtype in (None, torch.bfloat16):
            out, _ = merge(parts, dtype)
            assert out.dtype == (dtype or (parts[0][0].dtype if count == 1 else torch.float32))
            torch.testing.assert_close(out.float(), wanted, atol=1e-5, rtol=8e-3)
        room = torch.full((37, 2, 3, 32), math.nan, dtype=torch.bfloat16, device=device).permute(1, 2, 0, 3)
        assert merge(parts, out=room)[0] is room
        torch.testing.assert_close(room.float(), wanted, atol=1e-5, rtol=8e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 64), (33, 80), (200, 128), (300, 16)])
def test_the_kernel_finds_the_largest(
    device: str, dtype: torch.dtype, tokens: int, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads behind tokens; the largest is anywhere, of either sign, infinite or no number."""
    monkeypatch.setattr(peak, "PROGRAMS", 3)
    for number, value in enumerate((9.5, -9.5, math.inf, -math.inf, math.nan)):
        pair = torch.rand(2, 3, tokens, dim).to(dtype).to(device)
        pair[1, number % 3, tokens // 2 if number % 2 else tokens - 1, number % dim] = value
        values = pair[1].transpose(0, 1).contiguous().transpose(0, 1)
        found, wanted = peak.peaks(pair[0], values), peaks_reference(pair[0], values)
        most = torch.where(found.isnan().any(1), torch.nan, found.amax(1))
        assert found.dtype == torch.float32 and torch.allclose(most, wanted[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("held", [[0, 1, 2, 3], [0, 1], [0, 2], [3]], ids=str)
def test_heads_of_two_kinds(tiny: Any, held: list[int], batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of a kind that lie together, or not, give what windows that nothing leaves give; and where there is one
    sequence, in the order in which the model goes on with it."""
    model = tiny("llama", num_attention_heads=8, num_key_value_heads=4)
    ids = torch.randint(3, VOCAB - 3, (batch, 90), generator=torch.Generator().manual_seed(batch))
    real, seen = layer._over_groups, []

    def over_groups(*given: Any) -> torch.Tensor:
        out = real(*given)
        seen.append((len(given[1].groups), out))
        return out

    monkeypatch.setattr(layer, "_over_groups", over_groups)
    pairs = [[number, head] for number in range(model.config.num_hidden_layers) for head in held]
    caches = [fivefold.compress(model, recipe) for recipe in (f"duo(retrieval={pairs}, sink=4, recent=200)", "full()")]
    with torch.no_grad():
        for chunk in ids.split((50, 40), 1):
            found, wanted = (model(chunk, past_key_values=cache).logits for cache in caches)
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    kinds = {count for count, _ in seen}
    assert kinds == {1, 1 + (len(held) < 4)}
    for _, out in seen:
        assert batch > 1 or out.flatten(0, 1).transpose(0, 1).is_contiguous()
