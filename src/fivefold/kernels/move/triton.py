"""`reference.py` on a GPU, in one launch each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, power_of_2

BLOCK = 1024


@triton.jit
def _move(addresses, dense, numbers, AWAY: tl.constexpr, BLOCK: tl.constexpr):
    """int32 numbers of one place. Grid: (places, numbers / BLOCK)."""
    item = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < numbers
    there = tl.multiple_of((tl.load(addresses + item) * 16).to(tl.pointer_type(tl.int32)), 16) + at
    here = dense + item * numbers + at
    if AWAY:
        tl.store(there, tl.load(here, mask=live), mask=live)
    else:
        tl.store(here, tl.load(there, mask=live), mask=live)


def _launch(addresses: torch.Tensor, dense: torch.Tensor, away: bool) -> None:
    places, numbers = dense.shape
    block = min(BLOCK, power_of_2(numbers))
    with on(dense.device):
        _move[(places, -(-numbers // block))](addresses, dense, numbers, AWAY=away, BLOCK=block, num_warps=4)


def gather(addresses: torch.Tensor, nbytes: int) -> torch.Tensor:
    """See `reference.gather`; a multiple of 16 bytes."""
    out = torch.empty((len(addresses), nbytes // 4), dtype=torch.int32, device=addresses.device)
    _launch(addresses, out, False)
    return out


def scatter(addresses: torch.Tensor, values: torch.Tensor) -> None:
    """See `reference.scatter`; a multiple of 16 bytes each."""
    _launch(addresses, values.flatten(1).view(torch.int32), True)
