"""Attention over one block of dense keys with its log-sum-exp, and the merge of such parts.

Softmax attention over disjoint token sets A and B, with outputs o and log-sum-exps l, is over their union
`(exp(l_A) o_A + exp(l_B) o_B) / (exp(l_A) + exp(l_B))`, with log-sum-exp `log(exp(l_A) + exp(l_B))`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend

from fivefold.blocks import CUDNN_OPERATIONS, RECURRING_OPERATIONS
from fivefold.kernels.choice import choose, loaded
from fivefold.kernels.merge import Part, merge_reference

CAPPED_NUMBERS = 1 << 24
"""Scores that are made at a time where they are capped, which no fused call does."""

MASKED = -1e30
"""Added to scores that must not count. Finite: a fully masked row has weight 0 in a merge, and not NaN."""


def attend(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    cap: float | None = None,
    recurs: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over dense keys.

    queries: `[rows, head, query, head_dim]`; keys, values: `[rows, head, key, head_dim]` (expanded views are
    fine); bias: float32 `[query, key]`, added to the scores. `causal` needs as many queries as keys. cap: as in
    `capped`; recurs: as in `is_large`. Returns the output (dtype and shape of the queries) and the log-sum-exp, float32
    `[rows, head, query]`.
    """
    if cap is not None:
        return _attend_capped(queries, keys, values, scaling, bias, causal, cap)
    if queries.device.type == "cpu":
        out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, causal, attn_mask=None if bias is None else bias[None, None], scale=scaling
        )
        return out[0], out[1]
    if queries.device.type == "cuda" and bias is None and queries.dtype in (torch.float16, torch.bfloat16):
        if _takes_cudnn(queries, keys, values, causal, recurs):
            out = torch.ops.aten._scaled_dot_product_cudnn_attention(
                queries, keys, values, None, True, 0.0, causal, scale=scaling
            )
            return out[0], out[1].view(queries.shape[:3])
        out = torch.ops.aten._scaled_dot_product_flash_attention(
            queries, keys, values, 0.0, causal, return_debug_mask=False, scale=scaling
        )
        return out[0], out[1]
    if queries.device.type == "cuda" and queries.shape[3] % 8 == 0:
        if bias is not None:  # finite in float16 too; a row begins where the kernel may load 16 bytes
            bias = torch.nn.functional.pad(bias.clamp(min=-5e4).to(queries.dtype), (0, -bias.shape[1] % 8))
            bias = bias[:, : keys.shape[2]].expand(*queries.shape[:2], -1, -1)
        out = torch.ops.aten._scaled_dot_product_efficient_attention(
            queries, keys, values, bias, True, 0.0, causal, scale=scaling
        )
        return out[0], out[1][..., : queries.shape[2]]  # it fills log-sum-exps up to blocks
    return attend_reference(queries, keys, values, scaling, bias, causal)


def capped(scores: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Scores held within `-cap .. cap` by `cap * tanh(score / cap)`, in place; None leaves them as they are."""
    return scores if cap is None else scores.div_(cap).tanh_().mul_(cap)


def with_sinks(out: torch.Tensor, lse: torch.Tensor | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """An output whose softmax has one more term, `exp(sink)`, for no token: times `1 / (1 + exp(sink - lse))`.

    out `[..., head_dim]`, lse float32 `[...]`, sinks float32, as `lse` (broadcast). Nothing changes for None.
    """
    if sinks is None:
        return out
    assert lse is not None
    return (out * torch.sigmoid(lse - sinks)[..., None]).to(out.dtype)


def _attend_capped(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None,
    causal: bool,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend_reference`, for as many queries at a time as make `CAPPED_NUMBERS` scores."""
    (rows, heads, count, _), held = queries.shape, keys.shape[2]
    step, parts = max(1, CAPPED_NUMBERS // (rows * heads * held)), []
    for first in range(0, count, step):
        block = queries[:, :, first : first + step]
        seen = None if bias is None else bias[first : first + step]
        if causal:
            places = torch.arange(held, device=keys.device)
            later = places[None] > places[first : first + block.shape[2], None]
            seen = torch.where(later, MASKED, 0.0 if seen is None else seen)
        parts.append(attend_reference(block, keys, values, scaling, seen, cap=cap))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def is_large(numbers: int, keys: int, recurs: bool = False) -> bool:
    """Whether attention of queries of so many numbers over so many keys is worth a plan of cuDNN. recurs: the same
    shape comes again and again."""
    return 4 * numbers * keys >= (RECURRING_OPERATIONS if recurs else CUDNN_OPERATIONS)


def _takes_cudnn(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, recurs: bool = False
) -> bool:
    """Whether torch would take cuDNN for this attention, and it is large enough to be worth a plan."""
    if not is_large(queries.numel(), keys.shape[2] // (1 + causal), recurs):
        return False
    chosen = torch.ops.aten._fused_sdp_choice(queries, keys, values, None, 0.0, causal)
    return bool(chosen == SDPBackend.CUDNN_ATTENTION.value)


def takes_windows(queries: torch.Tensor) -> bool:
    """Whether `attend_window` takes such queries."""
    return queries.is_cuda and queries.dtype in (torch.float16, torch.bfloat16) and queries.shape[3] in range(8, 257, 8)


def attend_window(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, shift: int, recent: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` where query i sees no keys but j with `i + shift - recent < j <= i + shift`: each must see one, since
    an empty row's log-sum-exp is infinite. Where `takes_windows`."""
    count = queries.shape[2]
    keys, values = (x[:, :, : shift + count] for x in (keys, values))  # none comes after the last query
    held = keys.shape[2]
    if count > held:
        # The kernel cuts such windows short. Queries between these two see every key.
        low = max(0, held - 1 - shift)
        high = max(low, recent - shift)
        parts = [
            attend(queries[:, :, first:stop], keys, values, scaling)
            if (first, stop) == (low, high)
            else attend_window(queries[:, :, first:stop], keys, values, scaling, shift + first, recent)
            for first, stop in ((0, low), (low, high), (high, count))
            if first < stop
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    ahead = held - count  # the kernel's window is about the diagonal of the last query and key
    out = torch.ops.aten._flash_attention_forward(
        *(x.transpose(1, 2) for x in (queries, keys, values)), None, None, count, held, 0.0, False, False,
        scale=scaling, window_size_left=ahead - shift + recent - 1, window_size_right=shift - ahead,
    )  # fmt: skip
    return out[0].transpose(1, 2), out[1]


def attend_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    cap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attend` in its plainest form, in float32: what the fused calls are tested against."""
    scores = capped((queries.float() * scaling) @ keys.float().transpose(-1, -2), cap)
    if bias is not None:
        scores += bias
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores.masked_fill_(above, MASKED)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return (weights @ values.float()).to(queries.dtype), lse


def merge(
    parts: Sequence[Part], dtype: torch.dtype | None = None, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The union of parts (output `[..., head_dim]`, log-sum-exp float32 `[...]`). The output is of `dtype`; None is
    float32 if there are several, else the one part's. It is written to `out`, if that is given."""
    if len(parts) == 1:
        whole, total = parts[0]
        return (whole if dtype is None else whole.to(dtype)) if out is None else out.copy_(whole), total
    if _by_kernel(parts):
        if out is None:
            out = torch.empty_like(parts[0][0], dtype=dtype or torch.float32)
        return out, loaded("merge.triton").merge_parts(parts, out)
    whole, total = merge_reference(parts)
    return (whole if dtype is None else whole.to(dtype)) if out is None else out.copy_(whole), total


def _by_kernel(parts: Sequence[Part]) -> bool:
    """Whether a kernel merges such parts: on a GPU."""
    if not parts[0][1].is_cuda or parts[0][0].ndim not in (3, 4) or not choose(parts[0][1].device).triton:
        return False
    types = loaded("merge.triton").TYPES
    return all(x.dtype in types and lse.dtype is torch.float32 for x, lse in parts)
