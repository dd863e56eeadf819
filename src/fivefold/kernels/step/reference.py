"""What surrounds attention in a decoding step of a Llama's kind, in torch's operations, rounded as transformers does.

Tokens are rows: x is contiguous `[tokens, K]`, one token of each sequence; weights are `[N, K]`, as `nn.Linear` has
them, biases `[N]` or None. All are of one dtype (float32, float16, bfloat16); sums are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from fivefold.kernels.packed_decode.schedule import Exact

ACTS = ("silu", "gelu", "gelu_tanh")
Biases = Sequence[torch.Tensor | None]


@dataclass(frozen=True)
class Norm:
    """RMSNorm: `gain [K]`, and what is added to the mean square."""

    gain: torch.Tensor
    eps: float


@dataclass(frozen=True)
class Turn:
    """RoPE: cos and sin `[tokens, head_dim]`, and what norms each head of queries and of keys before (both or none)."""

    cos: torch.Tensor
    sin: torch.Tensor
    norms: tuple[Norm | None, Norm | None] = (None, None)


@dataclass(frozen=True)
class Pages:
    """Where the newest keys and values of a layer go: its spans and exact pages, a row of each for every sequence and
    KV head (see `packed_decode`)."""

    spans: torch.Tensor
    exact: Exact


Heads = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def acted(x: torch.Tensor, act: str) -> torch.Tensor:
    """An activation, one of `ACTS`."""
    if act == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """RMSNorm over the last axis, rounded before it is multiplied by the gain; x as it is without one."""
    if norm is None:
        return x
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return norm.gain * wide.to(x.dtype)


def products(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases, norm: Norm | None) -> list[torch.Tensor]:
    """`norm(x)` times each of at most three weights: `[tokens, N]` each."""
    h = normed(x, norm)
    return [functional.linear(h, weight, bias) for weight, bias in zip(weights, biases)]


def added(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    """`residual [tokens, N]` plus the product of x and a weight."""
    return residual + functional.linear(x, weight, bias)


def gated(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, biases: Biases, norm: Norm | None, act: str
) -> torch.Tensor:
    """`act(gate norm(x)) * (up norm(x))`, `[tokens, N]`."""
    first, second = products(x, (gate, up), biases, norm)
    return acted(first, act) * second


def gate_times(gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
    """`act(gate) * up`."""
    return acted(gate, act) * up


def turned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn) -> Heads:
    """Queries, keys and values `[tokens, heads * head_dim]` as heads `[tokens, head, head_dim]`; of the first two each
    head normed, and turned by RoPE: halves of a head turn together."""
    dim = turn.cos.shape[1]
    heads = [x.reshape(len(x), -1, dim) for x in (q, k, v)]
    for number, norm in enumerate(turn.norms):
        x = normed(heads[number], norm)
        other = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        heads[number] = x * turn.cos[:, None] + other * turn.sin[:, None]
    return heads[0], heads[1], heads[2]


def heads(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Biases, norm: Norm | None, turn: Turn) -> Heads:
    """Queries, keys and values of tokens: products with three weights, and `turned`."""
    q, k, v = products(x, weights, biases, norm)
    return turned(q, k, v, turn)


def added_normed(x: torch.Tensor, residual: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual + x`, and its norm: `[tokens, K]` each."""
    total = residual + x
    return total, normed(total, norm)


def spread(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, turn: Turn, batch: int) -> tuple[torch.Tensor, ...]:
    """`turned`, for a chunk of each of `batch` sequences, one behind the other: contiguous `[batch, head, tokens,
    head_dim]`, as attention to a chunk wants them."""
    heads = turned(q, k, v, turn)
    return tuple(x.unflatten(0, (batch, -1)).transpose(1, 2).contiguous() for x in heads if x is not None)
