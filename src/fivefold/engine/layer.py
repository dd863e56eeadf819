"""A layer's part of a forward: attention over what is stored and the chunk, which is stored then."""

from __future__ import annotations

import numpy as np
import torch

from fivefold.attention import attend_chunk, attend_observed, attend_picked, attend_step, pick
from fivefold.engine.session import Session
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache


def attend(
    session: Session,
    index: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    positions: torch.Tensor | None = None,
    inputs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a chunk over all that is stored and itself; then it is stored.

    query `[batch, query_head, tokens, head_dim]`, key and value `[batch, kv_head, tokens, head_dim]`; mask: bool
    `[batch, all tokens]` padding mask or None. positions, inputs: what the layer was called with, for codecs that want
    to know it. Returns `[batch, tokens, query_head, head_dim]`.
    """
    (batch, query_heads, chunk, dim), kv_heads = query.shape, key.shape[1]
    if index == session.first and not session.captured:
        session.admit(batch, chunk, mask, positions)
    group, rows = query_heads // kv_heads, batch * kv_heads
    if index in session.stepping:
        store, newest = session.stores[index], (key.reshape(rows, dim), value.reshape(rows, dim))
        out = store.bank.mirror.attend(store, query.reshape(rows, group, dim), *newest, scaling)
        return out.view(batch, 1, query_heads, dim)
    store = session.deliver(
        index,
        {
            "kv_heads": kv_heads, "query_heads": query_heads, "head_dim": dim, "dtype": key.dtype,
            "device": key.device,
        },
    )  # fmt: skip
    queries = query.reshape(rows, group, chunk, dim)
    keys, values = key.reshape(rows, chunk, dim), value.reshape(rows, chunk, dim)
    if chunk > 1 and store.codec is not None:
        store.codec.check(keys, values)
    out = _over_groups(session, store, queries, keys, values, scaling, inputs)
    return out.reshape(batch, query_heads, chunk, dim).transpose(1, 2).contiguous()


def _over_groups(
    session: Session,
    store: LayerCache,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    inputs: torch.Tensor | None,
) -> torch.Tensor:
    """The rows that stand alike, one group after the other: the shape of queries `[rows, query_heads per kv head,
    tokens, head_dim]`."""
    chunk, parts = keys.shape[1], store.split_by(session.tokens)
    alone = len(parts) == 1 and parts[0][1] == chunk
    out = queries if alone else torch.zeros_like(queries, memory_format=torch.contiguous_format)
    for group, tokens in parts:
        if tokens == 0:
            continue
        new = slice(chunk - tokens, chunk)
        if alone:
            q, k, v = queries, keys, values
        else:
            rows = group.rows_tensor.to(queries.device)
            q, k, v = queries[rows][:, :, new], keys[rows][:, new], values[rows][:, new]
        if store.codec is not None and store.codec.contextual and group.bounds.seen == 0:
            sequences = group.rows // store.spec.kv_heads
            assert inputs is not None
            mine = inputs if alone else inputs[torch.from_numpy(np.unique(sequences)).to(inputs.device)]
            store.learn(group, session.offsets[sequences], q, k, v, mine[:, new].to(k.device))
        part = _attend_group(session, store, group, q, k, v, scaling, chunk == 1)
        if alone:
            out = part
        else:
            out[rows, :, new] = part
    return out


def _attend_group(
    session: Session,
    store: LayerCache,
    group: RowGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    decoding: bool,
) -> torch.Tensor:
    revocable = session.revocable
    if keys.shape[1] == 1 and (decoding or group.held is None):
        store.append(group, keys, values, advance=False)
        part = _step(session, store, group, queries[:, :, 0], scaling, decoding)[:, :, None]
        if not decoding:
            store.append(group, None, None, revocable=revocable)
        return part
    observed = None
    if group.held is None:
        part, _ = attend_chunk(store, group, queries, keys, values, scaling)
    else:
        part, observed = attend_observed(store, group, queries, keys, values, scaling)
    store.append(group, keys, values, revocable=revocable, observed=observed)
    return part


def _step(
    session: Session, store: LayerCache, group: RowGroup, queries: torch.Tensor, scaling: float, decoding: bool
) -> torch.Tensor:
    """Attention of the newest token of each row; the policies are told of it."""
    policy = store.policy
    watch = group.held is not None and policy is not None and policy.chooses and policy.watches
    role = session.roles.get(store.spec.layer, "full") if decoding and group.bounds.extent.recent is None else "full"
    picks = session.picks.of(group) if role == "sparse" else None
    if picks is not None:
        out, weights = attend_picked(store, group, queries, scaling, picks, watch)
    else:
        out, weights = attend_step(store, group, queries, scaling, watch or role == "select")
    if weights is not None and role == "select":
        session.picks.put(group, pick(store, group, weights, session.top))
    if weights is not None and watch:
        store.observe(group, weights)
    return out
