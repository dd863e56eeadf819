"""A layer's part of a forward: attention over what is stored and the chunk, which is stored then."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from itertools import accumulate, pairwise

import numpy as np
import torch

from fivefold.attention import attend_chunk, attend_observed, attend_picked, attend_step, pick
from fivefold.attention.merge import with_sinks
from fivefold.engine.arrivals import Arrival
from fivefold.engine.session import Session
from fivefold.errors import NonFiniteError
from fivefold.interrupts import uninterrupted
from fivefold.kernels.peak import peaks
from fivefold.store.codec import FLOAT16_MAX, beyond
from fivefold.store.group import RowGroup
from fivefold.store.layer_cache import LayerCache
from fivefold.store.transaction import Transaction

Share = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Queries, keys, values, sinks and room for the output of some rows: see `_over_groups`."""


@uninterrupted
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
    sinks: torch.Tensor | None = None,
    cap: float | None = None,
    stored: bool = False,
) -> torch.Tensor:
    """Attention of a chunk over all that is stored and itself; then it is stored.

    query `[batch, query_head, tokens, head_dim]`, key and value `[batch, kv_head, tokens, head_dim]`; mask: bool
    `[batch, all tokens]` padding mask or None. positions, inputs: what the layer was called with, for codecs that want
    to know it. sinks: `[query_head]`, one more term of each head's softmax. cap: what scores are held within. stored:
    another layer has brought the same keys and values here in this forward, and stores them; the queries may then be
    those of the last tokens alone. Returns `[batch, queries, query_head, head_dim]`.
    """
    (batch, query_heads, asked, dim), (_, kv_heads, chunk, _) = query.shape, key.shape
    if asked < chunk:
        query = torch.nn.functional.pad(query, (0, 0, chunk - asked, 0))
    if index == session.first and not session.captured and not stored:
        session.admit(batch, chunk, mask, positions)
    group, rows = query_heads // kv_heads, batch * kv_heads
    if sinks is not None:
        sinks = sinks.float().view(kv_heads, group).repeat(batch, 1)
    if index in session.stepping:
        if not (stored or key.is_cuda):  # there the host would wait for every layer: only what is packed is checked
            _check_finite(index, key, value)
        store = session.stores[index]
        newest = (None, None) if stored else (key.reshape(rows, dim), value.reshape(rows, dim))
        tables = store.bank.mirror
        whole = tables.listed or session.reads.roles.get(index, "full") == "full"
        given = store, query.reshape(rows, group, dim), *newest, scaling, sinks
        out = tables.attend(*given) if whole else _pick_or_read(session, *given)
        return out.view(batch, 1, query_heads, dim)
    if stored:
        store = session.stores[index]
    else:
        shape = {"kv_heads": kv_heads, "query_heads": query_heads, "head_dim": dim, "cap": cap}
        store = session.deliver(index, {**shape, "dtype": key.dtype, "device": key.device})
    queries = query.reshape(rows, group, chunk, dim)
    keys, values = key.reshape(rows, chunk, dim), value.reshape(rows, chunk, dim)
    if chunk > 1 and store.codec is not None and not stored:
        if keys.is_cuda and store.codec.form is not None and session.change is not None:
            _check_later(session.change, keys, values)  # or the host would wait for every layer
        else:
            store.codec.check(keys, values)
    out = _over_groups(session, store, queries, keys, values, scaling, inputs, sinks, stored)
    out = out.reshape(batch, query_heads, chunk, dim)
    return (out if asked == chunk else out[:, :, chunk - asked :]).transpose(1, 2).contiguous()


def _over_groups(
    session: Session,
    store: LayerCache,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    inputs: torch.Tensor | None,
    sinks: torch.Tensor | None,
    stored: bool,
) -> torch.Tensor:
    """The rows that stand alike, one group after the other: the shape of queries `[rows, query_heads per kv head,
    tokens, head_dim]`; of one sequence, in the memory of `[tokens, rows, query_heads per kv head, head_dim]`."""
    chunk, parts = keys.shape[1], store.split_by(session.tokens)
    even = all(tokens == chunk for _, tokens in parts)
    alone = len(parts) == 1 and even
    order = None
    if even and not alone:
        order = store.order_on([group for group, _ in parts], queries.device)
    if order is not None:
        queries, keys, values = (x.index_select(0, order[0]) for x in (queries, keys, values))
        sinks = None if sinks is None else sinks.index_select(0, order[0])
    single = queries.shape[0] == store.spec.kv_heads
    out = None if alone and (chunk == 1 or not single) else _room(queries, single, even)
    shares: Iterable[Share] = [(queries, keys, values, sinks, out)]
    if even and not alone:  # groups are runs of rows, one behind the other
        counts, nothing = [len(group.rows) for group, _ in parts], [None] * len(parts)
        ends = list(accumulate(counts, initial=0))
        rooms = nothing if out is None else [out[first:last] for first, last in pairwise(ends)]
        s = nothing if sinks is None else sinks.split(counts)
        shares = zip(queries.split(counts), keys.split(counts), values.split(counts), s, rooms)
    elif not alone:
        shares = (_share(queries, keys, values, sinks, out, group, chunk - tokens) for group, tokens in parts)
    for (group, tokens), (q, k, v, s, target) in zip(parts, shares):
        if tokens == 0:
            continue
        if not stored and (group.held is not None or not k.is_cuda):  # see `attend`
            _check_finite(store.spec.layer, k, v)
        if store.codec is not None and group.bounds.seen == 0 and not stored:
            sequences = group.rows // store.spec.kv_heads
            at = slice(None) if alone else torch.from_numpy(np.unique(sequences))
            store.learn(group, session.offsets[sequences], partial(_first, q, k, v, inputs, at))
        part = _attend_group(session, store, group, q, k, v, scaling, chunk == 1, s, stored, target)
        if out is None:
            out = part
        elif target is None:
            out[group.index_on(out.device), :, chunk - tokens :] = part
        elif part is not target:
            target.copy_(part)
    assert out is not None
    if order is None:
        return out
    if single:
        return out.permute(2, 0, 1, 3).index_select(1, order[1]).permute(1, 2, 0, 3)
    return out.index_select(0, order[1])


def _share(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    sinks: torch.Tensor | None,
    out: torch.Tensor | None,
    group: RowGroup,
    first: int,
) -> Share:
    """What is a group's, from a token on; None of an output that it cannot write to."""
    rows = group.index_on(queries.device)
    room = out[rows, :, first:] if out is not None and isinstance(rows, slice) else None
    s = None if sinks is None else sinks[rows]
    return queries[rows][:, :, first:], keys[rows][:, first:], values[rows][:, first:], s, room


def _room(queries: torch.Tensor, single: bool, even: bool) -> torch.Tensor:
    """For the output of these queries; of a `single` sequence in the order in which a model goes on with it. Zeros
    where it is not `even`: some rows have fewer tokens."""
    rows, heads, chunk, dim = queries.shape
    make = queries.new_empty if even else queries.new_zeros
    return make((chunk, rows, heads, dim)).permute(1, 2, 0, 3) if single else make(queries.shape)


def _first(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inputs: torch.Tensor | None,
    sequences: slice | torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The arguments of `Codec.learn`; inputs: of all sequences."""
    assert inputs is not None
    return queries, keys, values, inputs[sequences, -keys.shape[1] :].to(keys.device)


def _check_later(change: Transaction, keys: torch.Tensor, values: torch.Tensor) -> None:
    """`Codec.check` of a codec whose pages kernels read, once the device has come so far."""
    found = peaks(keys, values)

    def look(ends: list[float]) -> None:
        each = len(ends) // 2
        for name, some in (("keys", ends[:each]), ("values", ends[each:])):
            peak = next((x for x in some if x != x), max(some))
            if not peak <= FLOAT16_MAX:  # also when it is NaN
                raise beyond(name, peak)

    change.check(found, look, last=True)


def _pick_or_read(
    session: Session,
    store: LayerCache,
    queries: torch.Tensor,
    keys: torch.Tensor | None,
    values: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`DeviceTables.attend` of a layer that picks, or reads what was picked."""
    if keys is not None and values is not None:
        store.bank.mirror.append(store, keys, values)
    groups = store.groups
    if len(groups) == 1:
        return _step(session, store, groups[0], queries, scaling, True, sinks, False)
    out = torch.empty_like(queries)
    for group in groups:
        rows = group.rows_tensor
        s = None if sinks is None else sinks[rows]
        out[rows] = _step(session, store, group, queries[rows], scaling, True, s, False)
    return out


def _check_finite(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Raise `NonFiniteError` where there is no number to choose tokens or to attend by."""
    for name, x in (("keys", keys), ("values", values)):
        low, high = torch.stack(x.aminmax()).tolist()  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NonFiniteError(
                f"the {name} of layer {layer} are not finite, they reach {_peak(low, high)}, beyond all that can be "
                "stored: look for the layer that overflows, or load the model in bfloat16 or float32."
            )


def _peak(low: float, high: float) -> float:
    """The largest magnitude of numbers between these two; not a number if one of them is none."""
    return max(-low, high) if low == low else low


def _attend_group(
    session: Session,
    store: LayerCache,
    group: RowGroup,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    decoding: bool,
    sinks: torch.Tensor | None,
    stored: bool,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """out: where a chunk's output may go; it is what is returned if it does."""
    revocable, shared = session.revocable, store.spec.layer in session.sources
    if keys.shape[1] == 1 and (decoding or (group.held is None and not shared)):
        if not stored:
            store.append(group, keys, values, advance=False)
        part = _step(session, store, group, queries[:, :, 0], scaling, decoding, sinks, stored)[:, :, None]
        if not decoding:
            store.append(group, None, None, revocable=revocable)
        return part
    observed, each = None, None if sinks is None else sinks[:, :, None]
    if group.held is None or stored:
        part, lse = attend_chunk(group, queries, keys, values, scaling, out if sinks is None else None)
        part = with_sinks(part, lse, each)
    else:
        part, observed = attend_observed(group, queries, keys, values, scaling, each)
    if not stored:
        session.arrivals.take(Arrival(store, group, keys, values, observed), revocable)
    return part


def _step(
    session: Session,
    store: LayerCache,
    group: RowGroup,
    queries: torch.Tensor,
    scaling: float,
    decoding: bool,
    sinks: torch.Tensor | None,
    stored: bool,
) -> torch.Tensor:
    """Attention of the newest token of each row; the policies are told of it."""
    policy = store.policy
    watch = group.held is not None and policy is not None and policy.watching(group.held) and not stored
    reads, whole = session.reads, group.bounds.extent.recent is None
    role = reads.roles.get(store.spec.layer, "full") if decoding and whole else "full"
    picks = session.picks.of(group) if role == "sparse" else None
    if picks is not None:
        out, weights = attend_picked(group, queries, scaling, picks, watch, sinks)
    else:
        out, weights = attend_step(group, queries, scaling, watch or role == "select", sinks)
    if weights is not None and role == "select":
        session.picks.put(group, pick(group, weights, reads.top, reads.sink, reads.recent))
    if weights is not None and watch:
        store.observe(group, weights)
    return out
