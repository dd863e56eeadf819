"""Column sums of a causal attention matrix from its log-sum-exps: half of the products of an attention, no matrix.

A program takes some keys and goes through the queries that see them; the earliest keys, which most queries see, start
first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on

_LOG2E = 1.4426950408889634


@triton.jit
def _received(
    queries, keys, lse, out, chunk, total, scale,
    query_row, query_head, query_token, key_row, key_token,
    HEADS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    first, row = tl.program_id(0) * KEYS, tl.program_id(1).to(tl.int64)
    stored = total - chunk
    key, query, channel = first + tl.arange(0, KEYS), tl.arange(0, QUERIES), tl.arange(0, D)
    k = tl.load(
        keys + row * key_row + key.to(tl.int64)[:, None] * key_token + channel[None, :],
        mask=key[:, None] < total,
        other=0.0,
    )
    queries += row * query_row
    lse += row * HEADS * chunk
    sums = tl.zeros([KEYS], tl.float32)
    for start in range(tl.maximum(first - stored, 0) // QUERIES * QUERIES, chunk, QUERIES):
        at = start + query
        for head in range(HEADS):
            q = tl.load(
                queries + head * query_head + at.to(tl.int64)[None, :] * query_token + channel[:, None],
                mask=at[None, :] < chunk,
                other=0.0,
            )
            base = tl.load(lse + head * chunk + at, mask=at < chunk, other=float("inf")) * 1.4426950408889634
            weights = tl.exp2(tl.dot(k, q, input_precision="ieee") * scale - base[None, :])
            sums += tl.sum(tl.where(key[:, None] <= stored + at[None, :], weights, 0.0), 1)
    tl.store(out + row * total + key, sums, mask=key < total)


def received(queries: torch.Tensor, keys: torch.Tensor, lse: torch.Tensor, scaling: float) -> torch.Tensor:
    """See `received_reference`. float16, bfloat16 or float32; head_dim a power of two from 16 to 256."""
    rows, heads, chunk, dim = queries.shape
    queries = queries if queries.stride(3) == 1 else queries.contiguous()
    keys = keys.to(queries.dtype)
    keys = keys if keys.stride(2) == 1 else keys.contiguous()
    out = torch.empty((rows, keys.shape[1]), dtype=torch.float32, device=keys.device)
    size = 128 if dim <= 128 and queries.element_size() == 2 else 64
    with on(keys.device):
        _received[-(-keys.shape[1] // size), rows](
            queries, keys, lse.contiguous(), out, chunk, keys.shape[1], scaling * _LOG2E,
            *queries.stride()[:3], *keys.stride()[:2],
            HEADS=heads, D=dim, KEYS=size, QUERIES=64, num_warps=8 if size == 128 else 4,
        )  # fmt: skip
    return out
