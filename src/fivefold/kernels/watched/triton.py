"""What a decoding step does besides attending, in Triton: what tokens received, what is picked, which token goes.

Lengths, counts and choices are on the device, and every shape is fixed while a text grows, so that a captured graph
stays right. Slots are a row's packed tokens, then its exact ones. Beside each there is the same in plain PyTorch
(`reference.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, power_of_2, processors
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import SPAN, Exact, Packed
from fivefold.kernels.packed_decode.triton import _TYPES, _code_planes, _queries, _tokens
from fivefold.kernels.watched import Noise

TILE = 512
"""Slots that are one piece of work."""
KEYS = 64
"""Keys that are one piece of work."""
PARTS = 2
"""Programs that look through the keys of a row, at least."""
NUMBERS = 4
"""Of each row: 0 where no token is watched, 1 where the newest one stays in its slot, 2 where one goes and the newest
takes its slot; the newest token's position; how many of the newest tokens never go; and how many were generated."""


@triton.jit
def _received(scores, lse, row, slot, high, stop, width, HEADS: tl.constexpr):
    """The weights of exact slots, the query heads of a row together."""
    at = slot - high
    inside = (at >= 0) & (at < stop)
    total = tl.zeros(slot.shape, tl.float32)
    for head in tl.static_range(HEADS):
        s = tl.load(scores + (row * HEADS + head) * width + at, mask=inside, other=-1e30)
        total += tl.where(inside, tl.exp(s - tl.load(lse + row * HEADS + head)), 0.0)
    return total


@triton.jit
def _received_packed(scores, lse, row, slot, low, high, width, HEADS: tl.constexpr):
    """The weights of packed slots whose scores a kernel has left (`Reader.attend`)."""
    inside = (slot >= low) & (slot < high)
    total = tl.zeros(slot.shape, tl.float32)
    for head in tl.static_range(HEADS):
        s = tl.load(scores + (row * HEADS + head) * width + slot, mask=inside, other=0.0)
        whole = tl.load(lse + row * HEADS + head) * 1.4426950408889634
        total += tl.where(inside, tl.exp2(s - whole), 0.0)
    return total


@triton.jit(do_not_specialize=("rows", "columns", "heads", "width"))
def _packed_received(
    queries, table, spans, lse, out, scale, rows, columns, heads, width,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The weights of the slots of one packed page, the query heads of a row together. Grid: (rows, columns)."""
    row = tl.program_id(0).to(tl.int64)
    page = tl.program_id(1)
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    KEY_SCALE: tl.constexpr = 32 * D
    KEY_ZERO: tl.constexpr = KEY_SCALE + TOKENS // GROUP * D
    high = tl.load(spans + row * SPAN + 1)
    if page * TOKENS >= high:
        return
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    h = tl.arange(0, N)
    q = _queries(queries, row, heads, N, D).to(tl.float16)
    address = tl.load(table + row * columns + page) * 16
    record = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16)
    half = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
    words = tl.load(record + r[:, None] * D + d[None, :]).to(tl.int32)
    total = tl.load(lse + row * heads + h, mask=h < heads, other=0.0)
    for j in tl.static_range(PLANES):
        at = j * 32 // GROUP * D + d
        scales = tl.load(half + KEY_SCALE + at).to(tl.float32)
        zeros = tl.load(half + KEY_ZERO + at).to(tl.float32)
        codes = ((words >> (j * BITS)) & (2**BITS - 1)).to(tl.float32)
        k = (codes * scales[None, :] + zeros[None, :]).to(tl.float16)
        weights = tl.exp(tl.dot(k, q) * scale - total[None, :])
        received = tl.sum(tl.where(h[None, :] < heads, weights, 0.0), 1)
        slot = page * TOKENS + j * 32 + r
        tl.store(out + row * width + slot, tl.where(slot < high, received, 0.0))


@triton.jit(do_not_specialize=("sink", "recent", "columns", "width"))
def _rank(
    scores, lse, packed, spans, out, sink, recent, columns, width,
    T: tl.constexpr, SPAN: tl.constexpr, PACKED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """What each slot received: -1 behind the last, infinity where it is picked anyway. Grid: (rows, tiles)."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * T + tl.arange(0, T)
    high = tl.load(spans + row * SPAN + 1)
    stop = tl.load(spans + row * SPAN + 4)
    total = high + stop
    got = tl.zeros([T], tl.float32)
    if tl.program_id(1) * T < total:
        got = _received(scores, lse, row, slot, high, stop, columns, HEADS)
        if PACKED:
            got += tl.load(packed + row * width + slot, mask=slot < high, other=0.0)
    got = tl.where((slot < sink) | (slot >= total - recent), float("inf"), got)
    tl.store(out + row * width + slot, tl.where(slot < total, got, -1.0), mask=slot < width)


@triton.jit(do_not_specialize=("count", "top"))
def _picks(values, indices, spans, out, count, top, T: tl.constexpr, SPAN: tl.constexpr):
    """The slots that are picked, -1 for none, and the newest one behind them. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T)
    newest = tl.load(spans + row * SPAN + 1) + tl.load(spans + row * SPAN + 4) - 1
    value = tl.load(values + row * count + t, mask=t < count, other=-1.0)
    slot = tl.load(indices + row * count + t, mask=t < count, other=0).to(tl.int32)
    slot = tl.where((value >= 0) & (slot != newest), slot, -1)
    slot = tl.where(t == top, newest, slot)
    tl.store(out + row * (top + 1) + t, slot, mask=t <= top)


@triton.jit
def _noised(scores, lse, row, slot, position, inside, table, newest, generated, columns, draws, seed, layer, kv_heads,
            first, last, steps, HEADS: tl.constexpr, H: tl.constexpr):  # fmt: skip
    """The query heads' weights of some slots with noise and temperature (see `Noise`), `[H, slots]`, 0 outside."""
    head = tl.arange(0, H)
    where = newest.to(tl.int64) * 1000003 + head
    where = where * 1000003 + row % kv_heads
    where = ((where * 1000003 + layer) * 1000003 + seed) % draws
    where = tl.where(where < 0, where + draws, where).to(tl.int32)
    # In 32 bits: a remainder in 64 takes long, and these are many.
    at = where[:, None] + (position % draws)[None, :]
    inside = inside[None, :] & (head < HEADS)[:, None]
    noise = tl.load(table + tl.where(at >= draws, at - draws, at), mask=inside, other=1.0)
    s = tl.load(scores + (row * HEADS + head)[:, None] * columns + slot[None, :], mask=inside, other=0.0)
    whole = tl.load(lse + row * HEADS + head, mask=head < HEADS, other=0.0)
    share = tl.minimum(tl.maximum(generated.to(tl.float32), 0.0), steps) / steps
    tau = first + (last - first) * share
    x = ((s - whole[:, None]) * 1.4426950408889634 + tl.log2(noise)) / tau
    return tl.where(inside, tl.exp2(x), 0.0)


@triton.jit(do_not_specialize=("columns", "slots", "draws", "seed", "layer", "kv_heads"))
def _noise_sums(
    scores, lse, positions, numbers, spans, out, table, columns, slots, draws, seed, layer, kv_heads, first, last,
    steps, T: tl.constexpr, SPAN: tl.constexpr, NUMBERS: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """A tile's noised weights in the place of its scores, and their sums, of each query head. Grid: (rows, tiles)."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    stop = tl.load(spans + row * SPAN + 4)
    newest = tl.load(numbers + row * NUMBERS + 1)
    generated = tl.load(numbers + row * NUMBERS + 3)
    slot = tile * T + tl.arange(0, T)
    inside = slot < stop
    position = tl.load(positions + row * slots + slot, mask=slot < stop - 1, other=0)
    position = tl.where(slot < stop - 1, position, newest)
    head = tl.arange(0, H)
    total = tl.zeros([H], tl.float32)
    if tile * T < stop:
        x = _noised(scores, lse, row, slot, position, inside, table, newest, generated, columns, draws, seed, layer,
                    kv_heads, first, last, steps, HEADS, H)  # fmt: skip
        at = (row * HEADS + head)[:, None] * columns + slot[None, :]
        tl.store(scores + at, x, mask=inside[None, :] & (head < HEADS)[:, None])
        total = tl.sum(x, 1)
    tl.store(out + (row * HEADS + head) * tl.num_programs(1) + tile, total, mask=head < HEADS)


@triton.jit(do_not_specialize=("columns", "width", "slots", "seed", "layer", "kv_heads"))
def _tally(
    scores, lse, given, sums, old, positions, low, numbers, spans, new, least, place,
    columns, width, slots, seed, layer, kv_heads,
    T: tl.constexpr, SPAN: tl.constexpr, NUMBERS: tl.constexpr, HEADS: tl.constexpr, H: tl.constexpr,
    TILES: tl.constexpr, GAIN: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    """A tile of a row's statistic with what its slots received, and which of them goes first. Grid: (rows, tiles).

    GAIN: 0 nothing, 1 what `scores` say, 2 that and what is `given`, 3 what `_noise_sums` left there, 4 as 2, but what
    is given are scores of packed slots. ORDER: what goes is 0
    the least of the statistic, 1 the oldest, 2 the least draw.
    """
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    tiles = tl.num_programs(1)
    high = tl.load(spans + row * SPAN + 1)
    stop = tl.load(spans + row * SPAN + 4)
    total = high + stop
    if (tile * T >= total) | (tl.load(numbers + row * NUMBERS) == 0):
        tl.store(least + row * tiles + tile, float("inf"))
        tl.store(place + row * tiles + tile, tile * T)
        return
    slot = tile * T + tl.arange(0, T)
    before = slot < total - 1
    newest = tl.load(numbers + row * NUMBERS + 1)
    recent = tl.load(numbers + row * NUMBERS + 2)
    position = tl.load(positions + row * slots + slot, mask=before, other=0)
    position = tl.where(before, position, newest)
    sum = tl.load(old + row * slots + slot, mask=before, other=0.0)
    if GAIN == 1 or GAIN == 2 or GAIN == 4:
        sum += _received(scores, lse, row, slot, high, stop, columns, HEADS)
    if GAIN == 2:
        sum += tl.load(given + row * width + slot, mask=slot < high, other=0.0)
    if GAIN == 4:
        sum += _received_packed(given, lse, row, slot, tl.load(spans + row * SPAN), high, width, HEADS)
    if GAIN == 3:
        each = tl.arange(0, TILES)
        head = tl.arange(0, H)
        at = (row * HEADS + head)[:, None] * tiles + each[None, :]
        there = (head < HEADS)[:, None] & (each < tiles)[None, :]
        whole = tl.maximum(tl.sum(tl.load(sums + at, mask=there, other=0.0), 1), 1e-38)
        at = (row * HEADS + head)[:, None] * columns + slot[None, :]
        x = tl.load(scores + at, mask=(slot < total)[None, :] & (head < HEADS)[:, None], other=0.0)
        sum += tl.sum(x / whole[:, None], 0)
    tl.store(new + row * slots + slot, sum, mask=slot < total)
    if ORDER == 1:
        sum = position.to(tl.float32)
    if ORDER == 2:
        draw = (
            position.to(tl.int64) + 1 + 1000003 * (layer * kv_heads + row % kv_heads) + 15485863 * seed
        ) % 2147483647
        draw = draw * 48271 % 2147483647
        sum = (draw * draw % 2147483647).to(tl.float32)
    stays = (position <= tl.load(low + row)) | (position > newest - recent) | (slot >= total)
    value, index = tl.min(tl.where(stays, float("inf"), sum), 0, return_indices=True)
    tl.store(least + row * tiles + tile, value)
    tl.store(place + row * tiles + tile, tile * T + index)


@triton.jit(do_not_specialize=("columns", "tiles"))
def _choose(
    least, place, numbers, spans, table, goes, stash, columns, tiles,
    DTYPE: tl.constexpr, D: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr, NUMBERS: tl.constexpr,
    ROUNDED: tl.constexpr,
):  # fmt: skip
    """The slot of each row that goes, and the newest token's key and value out of its page. ROUNDED: that stays where
    it is. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, T)
    d = tl.arange(0, D)
    value = tl.load(least + row * tiles + t, mask=t < tiles, other=float("inf"))
    _, index = tl.min(value, 0, return_indices=True)
    stop = tl.load(spans + row * SPAN + 4)
    total = tl.load(spans + row * SPAN + 1) + stop
    kind = tl.load(numbers + row * NUMBERS)
    slot = tl.load(place + row * tiles + index)
    slot = tl.where((kind == 2) & (slot < total), slot, total - 1)
    tl.store(goes + row, tl.where(kind == 0, -1, slot))
    if not ROUNDED:
        for side in tl.static_range(2):
            address = tl.load(table + (row * columns + (stop - 1) // 32) * 2 + side)
            page = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
            tl.store(stash + (row * 2 + side) * D + d, tl.load(page + ((stop - 1) % 32) * D + d))


@triton.jit(do_not_specialize=("columns", "parts"))
def _alike(
    goes, numbers, spans, table, best, place, columns, parts,
    DTYPE: tl.constexpr, D: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """Which of a part of a row's exact keys is most like the key of the token that goes. Grid: (rows, parts).

    Few programs, which take a tile after the other: this runs beside the products of the layers, and those of more
    programs than the device holds would keep the kernels that come next from beginning.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    at = row * parts + part
    stop = tl.load(spans + row * SPAN + 4)
    each = tl.cdiv(tl.cdiv(stop, T), parts)
    first = part * each
    last = tl.minimum(first + each, tl.cdiv(stop, T))
    if (first >= last) | (tl.load(numbers + row * NUMBERS) != 2):
        tl.store(best + at, float("-inf"))
        tl.store(place + at, 0)
        return
    d = tl.arange(0, D)
    t = tl.arange(0, T)
    slot_gone = tl.load(goes + row)
    slot = first * T + t
    inside = slot < stop
    ahead = _tokens(table + (row * columns + slot // 32) * 2, slot % 32, inside, inside, 0, DTYPE, D, 2)
    address = tl.load(table + (row * columns + slot_gone // 32) * 2)
    page = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
    gone = tl.load(page + (slot_gone % 32) * D + d).to(tl.float32)
    unit = gone / tl.maximum(tl.sqrt(tl.sum(gone * gone, 0)), 1e-12)
    most = tl.full([T], float("-inf"), tl.float32)
    where = slot
    for tile in range(first, last):
        slot = tile * T + t
        keys = ahead.to(tl.float32)
        then = slot + T
        inside = (then < stop) & (tile + 1 < last)
        ahead = _tokens(table + (row * columns + then // 32) * 2, then % 32, inside, inside, 0, DTYPE, D, 2)
        like = tl.sum(keys * unit[None, :], 1) / tl.maximum(tl.sqrt(tl.sum(keys * keys, 1)), 1e-12)
        like = tl.where((slot < stop) & (slot != slot_gone), like, float("-inf"))
        more = like > most
        most = tl.where(more, like, most)
        where = tl.where(more, slot, where)
    value = tl.max(most, 0)
    tl.store(best + at, value)
    tl.store(place + at, tl.min(tl.where(most == value, where, 2147483647), 0))  # of equal ones the first


@triton.jit(do_not_specialize=("columns", "parts"))
def _absorb(
    best, place, goes, numbers, spans, table, threshold, new_threshold, stash, into, merged, alpha, beta, columns,
    parts, DTYPE: tl.constexpr, D: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr, NUMBERS: tl.constexpr,
):  # fmt: skip
    """What the token of each row becomes that the one that goes is merged into. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    before = tl.load(threshold + row)
    if tl.load(numbers + row * NUMBERS) != 2:
        tl.store(new_threshold + row, before)
        tl.store(into + row, -1)
        return
    t = tl.arange(0, T)
    d = tl.arange(0, D)
    value = tl.load(best + row * parts + t, mask=t < parts, other=float("-inf"))
    like, index = tl.max(value, 0, return_indices=True)
    slot = tl.load(place + row * parts + index)
    slot_gone = tl.load(goes + row)
    last = tl.load(spans + row * SPAN + 4) - 1
    least = tl.where(before == before, alpha * before + beta * like, like)
    joins = like >= least
    own = tl.where(joins, 0.5, 1.0)
    other = tl.where(joins, like * 0.5, 0.0)
    tl.store(new_threshold + row, least)
    tl.store(into + row, tl.where(joins & (slot != last), slot, -1))
    for side in tl.static_range(2):
        address = tl.load(table + (row * columns + slot // 32) * 2 + side)
        page = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
        stays = tl.load(page + (slot % 32) * D + d).to(tl.float32)
        address = tl.load(table + (row * columns + slot_gone // 32) * 2 + side)
        page = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
        gone = tl.load(page + (slot_gone % 32) * D + d).to(tl.float32)
        x = (own * stays + other * gone).to(DTYPE)
        tl.store(merged + (row * 2 + side) * D + d, x)
        if slot == last:  # what takes the place of the one that goes is what it has just become
            tl.store(stash + (row * 2 + side) * D + d, x)


@triton.jit(do_not_specialize=("columns", "slots", "rows", "row_spans", "row_numbers"))
def _overwrite(
    goes, stash, new, into, merged, threshold, new_threshold, numbers, spans, table, positions, scores,
    columns, slots, rows, row_spans, row_numbers,
    DTYPE: tl.constexpr, D: tl.constexpr, T: tl.constexpr, SPAN: tl.constexpr, NUMBERS: tl.constexpr,
    MERGES: tl.constexpr,
):  # fmt: skip
    """What a step has chosen becomes so: of a tile of a row's slots. Grid: (layers * rows, tiles)."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    layer = row // rows
    spans += layer * row_spans + row % rows * SPAN
    numbers += layer * row_numbers + row % rows * NUMBERS
    slot = tl.load(goes + row)
    if slot < 0:
        return
    high = tl.load(spans + 1)
    total = high + tl.load(spans + 4)
    newest = tl.load(numbers + 1)
    if tile * T < total:
        t = tile * T + tl.arange(0, T)
        last = tl.load(new + row * slots + total - 1)
        sum = tl.load(new + row * slots + t, mask=t < total, other=0.0)
        tl.store(scores + row * slots + t, tl.where(t == slot, last, sum), mask=t < total)
    if tile == 0:
        tl.store(positions + row * slots + slot, newest)
        d = tl.arange(0, D)
        if MERGES:
            tl.store(threshold + row, tl.load(new_threshold + row))
            inside = tl.load(into + row)
            if inside >= 0:
                for side in tl.static_range(2):
                    address = tl.load(table + (row * columns + inside // 32) * 2 + side)
                    page = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
                    tl.store(page + (inside % 32) * D + d, tl.load(merged + (row * 2 + side) * D + d))
        if slot >= high and slot < total - 1:
            inside = slot - high
            for side in tl.static_range(2):
                address = tl.load(table + (row * columns + inside // 32) * 2 + side)
                page = tl.multiple_of((address * 16).to(tl.pointer_type(DTYPE)), 16)
                tl.store(page + (inside % 32) * D + d, tl.load(stash + (row * 2 + side) * D + d))


@triton.jit
def _beside(queries, keys, values, logs, out, lse, scale, heads, D: tl.constexpr):
    """One more part of a row's softmax, a token that counts as exp(log) of them. Grid: (rows, heads)."""
    row = tl.program_id(0).to(tl.int64)
    at = row * heads + tl.program_id(1)
    d = tl.arange(0, D)
    q = tl.load(queries + at * D + d).to(tl.float32)
    o = tl.load(out + at * D + d).to(tl.float32)
    score = tl.sum(q * tl.load(keys + row * D + d), 0) * scale + tl.load(logs + row)
    own = tl.load(lse + at)
    top = tl.maximum(own, score)
    a = tl.exp(own - top)
    b = tl.exp(score - top)
    merged = (o * a + tl.load(values + row * D + d) * b) / (a + b)
    tl.store(out + at * D + d, merged.to(out.dtype.element_ty))
    tl.store(lse + at, top + tl.log(a + b))


def packed_received(
    queries: torch.Tensor, scaling: float, lse: torch.Tensor, spans: torch.Tensor, packed: Packed, width: int
) -> torch.Tensor:
    """What packed slots receive, float32 `[rows, width]`, undefined behind them. lse: natural, float32 `[rows, heads]`;
    the others as `decode` takes them."""
    rows, heads, dim = queries.shape
    assert isinstance(packed.form, Form)
    out = torch.empty((rows, width), dtype=torch.float32, device=queries.device)
    with on(queries.device):
        _packed_received[(rows, packed.table.shape[1])](
            queries, packed.table, spans, lse, out, scaling, rows, packed.table.shape[1], heads, width,
            N=8 if heads <= 8 else 16, D=dim, BITS=packed.form.bits, GROUP=packed.form.group, SPAN=SPAN, num_warps=2,
        )  # fmt: skip
    return out


def rank(
    scores: torch.Tensor,
    lse: torch.Tensor,
    packed: torch.Tensor | None,
    spans: torch.Tensor,
    width: int,
    sink: int = 0,
    recent: int = 0,
) -> torch.Tensor:
    """What slots received, float32 `[rows, width]`: -1 behind the last one, infinity of the first `sink` and the last
    `recent` slots. scores: of exact slots `[rows, heads, some]`; packed: as `packed_received` gives it."""
    rows, heads, columns = scores.shape
    out = torch.empty((rows, width), dtype=torch.float32, device=scores.device)
    with on(scores.device):
        _rank[(rows, -(-width // TILE))](
            scores, lse, scores if packed is None else packed, spans, out, sink, recent, columns, width,
            T=TILE, SPAN=SPAN, PACKED=packed is not None, HEADS=heads,
        )  # fmt: skip
    return out


def picks(values: torch.Tensor, indices: torch.Tensor, spans: torch.Tensor, top: int) -> torch.Tensor:
    """int32 `[rows, top + 1]` from the `topk` of `rank`: the slots that are picked, -1 for none, then the newest."""
    rows, count = values.shape
    out = torch.empty((rows, top + 1), dtype=torch.int32, device=values.device)
    with on(values.device):
        _picks[(rows,)](values, indices, spans, out, count, top, T=power_of_2(top + 1), SPAN=SPAN, num_warps=4)
    return out


def tally(
    scores: torch.Tensor | None,
    lse: torch.Tensor | None,
    given: torch.Tensor | None,
    noise: Noise | None,
    by: str | int,
    layer: int,
    kv_heads: int,
    old: torch.Tensor,
    positions: torch.Tensor,
    low: torch.Tensor,
    numbers: torch.Tensor,
    spans: torch.Tensor,
    new: torch.Tensor,
    goes: torch.Tensor,
    stash: torch.Tensor,
    exact: Exact,
) -> None:
    """After a step's attention: the statistic `new [rows, slots]` from `old` and what tokens received, and in `goes`
    int32 `[rows]` the slot of each row that the newest token shall have (its own where none goes, -1 of rows that
    `numbers` leaves out); ties go to the lowest slot. stash `[rows, 2, head_dim]`: the newest token's key and value.

    scores `[rows, heads, some]`, lse `[rows, heads]`: of exact slots, None where nothing is added; given: what packed
    slots received `[rows, some]`, or their scores as `Reader.attend` leaves them `[rows, heads, some]`; noise: where
    nothing is packed; weights with it then take the place of the scores. by: what goes is the "least" of the statistic,
    the "oldest", or the least of `draws` of a seed. positions int32 `[rows, slots]`; low int32 `[rows]`: the tokens up
    to this position never go; numbers: int32 `[rows, NUMBERS]`.
    """
    rows, slots = old.shape
    gain = 0 if scores is None else 3 if noise is not None else 1 if given is None else 2 * (given.ndim - 1)
    heads, columns = (1, 1) if scores is None else scores.shape[1:]
    tiles, device = -(-slots // TILE), old.device
    least = torch.empty((rows, tiles), dtype=torch.float32, device=device)
    place = torch.empty((rows, tiles), dtype=torch.int32, device=device)
    scores, lse, sums = (old if x is None else x for x in (scores, lse, None))
    seed = by if isinstance(by, int) else 0
    settings = {"T": TILE, "SPAN": SPAN, "NUMBERS": NUMBERS, "HEADS": heads, "H": power_of_2(heads)}
    with on(device):
        if noise is not None:
            sums = torch.empty((rows, heads, tiles), dtype=torch.float32, device=device)
            _noise_sums[(rows, tiles)](
                scores, lse, positions, numbers, spans, sums, noise.table, columns, slots, len(noise.table), noise.seed,
                layer, kv_heads, noise.first, noise.last, float(noise.steps), **settings,
            )  # fmt: skip
        _tally[(rows, tiles)](
            scores, lse, old if given is None else given, sums, old, positions, low, numbers, spans, new, least, place,
            columns, 1 if given is None else given.shape[-1], slots, seed, layer, kv_heads,
            TILES=power_of_2(tiles), GAIN=gain,
            ORDER=2 if isinstance(by, int) else int(by == "oldest"), **settings,
        )  # fmt: skip
        _choose[(rows,)](
            least, place, numbers, spans, exact.table, goes, stash, exact.table.shape[1], tiles,
            DTYPE=_TYPES[exact.dtype], D=stash.shape[2], T=power_of_2(tiles), SPAN=SPAN, NUMBERS=NUMBERS,
            ROUNDED=exact.rounded, num_warps=4,
        )  # fmt: skip


def absorb(
    goes: torch.Tensor,
    numbers: torch.Tensor,
    spans: torch.Tensor,
    exact: Exact,
    threshold: torch.Tensor,
    alpha: float,
    beta: float,
    new_threshold: torch.Tensor,
    stash: torch.Tensor,
    into: torch.Tensor,
    merged: torch.Tensor,
) -> None:
    """D2O's merge of the token that goes (see `tally`; nothing is packed) into the one whose key is most like its own,
    by cosine similarity u; of equal ones the first. Its key and value become `(own + u * gone) / 2` where u is at least
    the threshold, `alpha * threshold + beta * u` of the one before (nan: there is none, and it is u), float32 `[rows]`.

    into int32 `[rows]`: the slot that changes, -1 of none, or where the newest token does, which is then changed in
    `stash`; merged `[rows, 2, head_dim]`: what it becomes.
    """
    rows, columns = exact.table.shape[:2]
    parts = max(1, min(-(-columns * 32 // KEYS), max(PARTS, 2 * processors(goes.device) // rows)))
    best = torch.empty((rows, parts), dtype=torch.float32, device=goes.device)
    place = torch.empty((rows, parts), dtype=torch.int32, device=goes.device)
    settings = {"DTYPE": _TYPES[exact.dtype], "D": stash.shape[2], "SPAN": SPAN, "NUMBERS": NUMBERS}
    with on(goes.device):
        _alike[(rows, parts)](goes, numbers, spans, exact.table, best, place, columns, parts, T=KEYS, **settings)
        _absorb[(rows,)](
            best, place, goes, numbers, spans, exact.table, threshold, new_threshold, stash, into, merged, alpha, beta,
            columns, parts, T=power_of_2(parts), num_warps=4, **settings,
        )  # fmt: skip


def overwrite(
    goes: torch.Tensor,
    stash: torch.Tensor,
    new: torch.Tensor,
    merges: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None,
    numbers: torch.Tensor,
    spans: torch.Tensor,
    positions: torch.Tensor,
    scores: torch.Tensor,
    exact: Exact,
) -> None:
    """What `tally` chose becomes so, of all layers: `[layers, rows, ...]` each, table `[layers * rows, columns, 2]`.
    Doing so twice does no harm. merges: `into`, `merged`, `threshold`, `new_threshold` of `absorb`."""
    layers, rows, slots = scores.shape
    into, merged, threshold, new_threshold = merges or (goes, stash, scores, new)
    with on(scores.device):
        _overwrite[(layers * rows, -(-slots // TILE))](
            goes, stash, new, into, merged, threshold, new_threshold, numbers, spans, exact.table, positions, scores,
            exact.table.shape[1], slots, rows, spans.stride(0), numbers.stride(0),
            DTYPE=_TYPES[exact.dtype], D=stash.shape[3], T=TILE, SPAN=SPAN, NUMBERS=NUMBERS, MERGES=merges is not None,
        )  # fmt: skip


def beside(
    queries: torch.Tensor,
    scaling: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    logs: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Merge one more part into `out [rows, heads, head_dim]` and `lse [rows, heads]`: a token of each row, key and
    value float32 `[rows, head_dim]`, that counts as `exp(logs [rows])` of them; -1e30 is none."""
    rows, heads, dim = queries.shape
    with on(queries.device):
        _beside[(rows, heads)](queries, keys, values, logs, out, lse, scaling, heads, D=dim, num_warps=1)
