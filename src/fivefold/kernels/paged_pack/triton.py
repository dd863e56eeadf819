"""KIVI's pages in the blocks of a serving engine, in Triton: see `reference.py` for what each kernel computes.

Nothing here waits for the host. `step` (a token of every request: written, and packed where it makes a group full) runs
in a layer of a CUDA graph, whose sizes alone its grid depends on; `tables` once in a step, before the graph; `gather`,
`pack` and `store` in the layers of a chunk of prompts. The arithmetic of packing is that of
`kernels/pack`, bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.device import on, power_of_2
from fivefold.kernels.pack.triton import _codes, _ends, _most, _step
from fivefold.kernels.packed_decode.reference import Form
from fivefold.kernels.packed_decode.schedule import PAGE, SPAN, TILE
from fivefold.kernels.paged_pack.reference import Blocks, Place, Tables

COLUMNS = 128
"""Columns of a table that a program fills."""
_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _at(memory, table, row, page, head, table_stride, block, head_stride, state, STATES: tl.constexpr):
    """Address of a page of a request, in bytes; strides in units of 16."""
    number = tl.load(table + row * table_stride + page // STATES).to(tl.int64)
    return memory.to(tl.int64) + (number * block + head * head_stride + page % STATES * state) * 16


@triton.jit
def _tokens(new, stride, begin, known, first, page, r, d, DTYPE: tl.constexpr, D: tl.constexpr):
    """Tokens first + r, float32 `[rows, channels]`: new ones from this step's, older ones from their exact page, an
    address in bytes."""
    fresh = first + r >= known
    source = new + (begin + first + r - known)[:, None].to(tl.int64) * stride + d[None, :]
    x = tl.load(source, mask=fresh[:, None], other=0.0)
    if first < known:
        held = tl.multiple_of(page.to(tl.pointer_type(DTYPE)), 16) + r[:, None] * D + d[None, :]
        x = tl.where(fresh[:, None], x, tl.load(held, mask=(first + r < known)[:, None], other=0.0))
    return x.to(tl.float32)


@triton.jit
def _keys(
    keys, stride, begin, known, page, held, record, peak, plane, end, part,
    D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Planes [plane, end) of some channels of the keys of a page."""
    STEPS: tl.constexpr = 2**BITS - 1
    PLANES: tl.constexpr = TOKENS // 32
    r = tl.arange(0, 32)
    d = part * W + tl.arange(0, W)
    inside = r[:, None] * D + d[None, :]
    scales = record.to(tl.pointer_type(tl.float16)) + 32 * D + d
    zeros = scales + PLANES * D
    words = tl.load(record + inside, mask=plane > 0, other=0).to(tl.int32) & ((1 << (BITS * plane)) - 1)
    most = tl.zeros([32, W], tl.float32)
    for j in range(plane, end):
        x = _tokens(keys, stride, begin, known, page * TOKENS + j * 32, held, r, d, DTYPE, D)
        scale, zero = _ends(tl.min(x, 0), tl.max(x, 0), STEPS)
        tl.store(scales + j * D, scale)
        tl.store(zeros + j * D, zero)
        step, inverse = _step(scale)
        most = _most(most, x)
        codes = _codes(x, zero.to(tl.float32)[None, :], step[None, :], inverse[None, :], STEPS, FUSED)
        words |= codes << (BITS * j)
    for j in range(end, PLANES):
        tl.store(scales + j * D, tl.zeros([W], tl.float16))
        tl.store(zeros + j * D, tl.zeros([W], tl.float16))
    tl.store(record + inside, words.to(tl.int16))
    tl.atomic_max(peak, tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True))


@triton.jit
def _values(
    values, stride, begin, known, page, held, record, peak, plane, end, part,
    D: tl.constexpr, W: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The same of values."""
    STEPS: tl.constexpr = 2**BITS - 1
    GROUPS: tl.constexpr = W // CHANNELS
    PLANE: tl.constexpr = 32 * (D // CHANNELS)
    ROWS: tl.constexpr = 2048 // W  # of the 32
    SHARES: tl.constexpr = 32 // ROWS
    r = part % SHARES * ROWS + tl.arange(0, ROWS)
    d = part // SHARES * W + tl.arange(0, W)
    g = part // SHARES * GROUPS + tl.arange(0, GROUPS)
    inside = r[:, None] * D + d[None, :]
    scales = record.to(tl.pointer_type(tl.float16)) + 32 * D + g[None, :] * 32 + r[:, None]
    zeros = scales + TOKENS // 32 * PLANE
    words = tl.load(record + inside, mask=plane > 0, other=0).to(tl.int32) & ((1 << (BITS * plane)) - 1)
    most = tl.zeros([ROWS, W], tl.float32)
    for j in range(plane, end):
        x = _tokens(values, stride, begin, known, page * TOKENS + j * 32, held, r, d, DTYPE, D)
        most = _most(most, x)
        x = tl.reshape(x, [ROWS, GROUPS, CHANNELS])
        scale, zero = _ends(tl.min(x, 2), tl.max(x, 2), STEPS)
        tl.store(scales + j * PLANE, scale)
        tl.store(zeros + j * PLANE, zero)
        step, inverse = _step(scale)
        shift = zero.to(tl.float32)
        codes = _codes(x, shift[:, :, None], step[:, :, None], inverse[:, :, None], STEPS, FUSED)
        words |= tl.reshape(codes, [ROWS, W]) << (BITS * j)
    for j in range(end, TOKENS // 32):
        tl.store(scales + j * PLANE, tl.zeros([ROWS, GROUPS], tl.float16))
        tl.store(zeros + j * PLANE, tl.zeros([ROWS, GROUPS], tl.float16))
    tl.store(record + inside, words.to(tl.int16))
    tl.atomic_max(peak, tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=("lengths", "slots", "pages", "table_stride", "exact_table_stride"))
def _pack_blocks(
    keys, values, key_stride, value_stride, packed, packed_table, exact, exact_table, lengths, slots,
    pages, peak, packed_block, packed_head, packed_state, table_stride, exact_block, exact_head, exact_state,
    exact_table_stride,
    D: tl.constexpr, KEY_WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr, STATES: tl.constexpr, EXACT_STATES: tl.constexpr, DTYPE: tl.constexpr, SIDE: tl.constexpr,
    STEP: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """The groups of some channels of a page that are full now. Grid: (requests or pages, kv_heads, D / KEY_WIDTH +
    D / 64).

    STEP: every request has one new token, and it is written where `slots` says first. SIDE: 16 bytes of a side of an
    exact page.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    PLANES: tl.constexpr = TOKENS // 32
    KEY_PARTS: tl.constexpr = D // KEY_WIDTH
    keys += head * D
    values += head * D
    if STEP:
        row = item
        begin = item
        length = tl.load(lengths + item)
        slot = tl.load(slots + item).to(tl.int64)
        if (slot < 0) | (length <= 0):
            return
        known = length - 1
        page = known // TOKENS
        if part == 0:
            d = tl.arange(0, D)
            number = slot // 32
            place = number // EXACT_STATES * exact_block + head * exact_head + number % EXACT_STATES * exact_state
            to = tl.multiple_of((exact.to(tl.int64) + place * 16).to(tl.pointer_type(DTYPE)), 16) + slot % 32 * D + d
            tl.store(to, tl.load(keys + item.to(tl.int64) * key_stride + d))
            tl.store(to + 32 * D, tl.load(values + item.to(tl.int64) * value_stride + d))
        if length % 32 != 0:
            return
    else:
        row = tl.load(pages + 5 * item)
        if row < 0:
            return
        page = tl.load(pages + 5 * item + 1)
        begin = tl.load(pages + 5 * item + 2)
        known = tl.load(pages + 5 * item + 3)
        length = tl.load(pages + 5 * item + 4)
    plane = tl.maximum(known // 32 - page * PLANES, 0)
    end = tl.minimum(length // 32 - page * PLANES, PLANES)
    if plane >= end:
        return
    place = _at(
        packed, packed_table, row, page, head, table_stride, packed_block, packed_head, packed_state, STATES
    )  # fmt: skip
    record = tl.multiple_of(place.to(tl.pointer_type(tl.int16)), 16)
    # Of older tokens only the open group is wanted, which is one exact page.
    held = exact.to(tl.int64)
    if known % 32 != 0:
        held = _at(
            exact, exact_table, row, known // 32, head, exact_table_stride, exact_block, exact_head, exact_state,
            EXACT_STATES,
        )  # fmt: skip
    if part < KEY_PARTS:
        _keys(
            keys, key_stride, begin, known, page, held, record, peak, plane, end, part,
            D, KEY_WIDTH, BITS, TOKENS, DTYPE, FUSED,
        )  # fmt: skip
    else:
        KEY_SIDE: tl.constexpr = 32 * D + 2 * PLANES * D
        _values(
            values, value_stride, begin, known, page, held + SIDE * 16, record + KEY_SIDE, peak, plane, end,
            part - KEY_PARTS, D, VALUE_WIDTH, BITS, TOKENS, CHANNELS, DTYPE, FUSED,
        )  # fmt: skip


@triton.jit(do_not_specialize=("slots",))
def _store(
    keys, values, key_stride, value_stride, exact, slots, block, head_stride, state,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, STATES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """New tokens into their exact pages. Grid: (tokens,)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 32 * STATES:  # the null block, too
        return
    h = tl.arange(0, HEADS)
    d = tl.arange(0, D)
    live = (h < H)[:, None]
    number = slot // 32
    place = exact.to(tl.int64) + (number // STATES * block + number % STATES * state) * 16
    to = tl.multiple_of(place.to(tl.pointer_type(DTYPE)), 16) + slot % 32 * D
    to += h[:, None] * (head_stride * (16 // (DTYPE.primitive_bitwidth // 8))) + d[None, :]
    inside = h[:, None] * D + d[None, :]
    tl.store(to, tl.load(keys + token * key_stride + inside, mask=live), mask=live)
    tl.store(to + 32 * D, tl.load(values + token * value_stride + inside, mask=live), mask=live)


@triton.jit
def _listed(pages, heads, programs, i, requests, starts, H: tl.constexpr, HEADS: tl.constexpr):
    """A work list (`starts_reference`) of pages `[requests]`."""
    total = tl.sum(pages, 0) * heads
    low = tl.maximum(1, tl.cdiv(total, tl.maximum(1, programs)))
    high = tl.maximum(low, tl.max(pages, 0))
    for _ in range(24):
        middle = (low + high) // 2
        fits = tl.sum(tl.cdiv(pages, middle), 0) * heads <= programs
        searching = low < high
        low = tl.where(searching & (fits == 0), middle + 1, low)
        high = tl.where(searching & fits, middle, high)
    shares = tl.cdiv(pages, low)
    even = tl.minimum(pages, tl.maximum(1, pages * programs // tl.maximum(1, total)))
    worse = tl.max((tl.cdiv(pages, tl.maximum(1, even)) > low).to(tl.int32), 0)
    worse = (worse > 0) | (tl.sum(even, 0) * heads > programs)
    shares = tl.where(worse, shares, even)
    before = (tl.cumsum(shares, 0) - shares) * heads
    h = tl.arange(0, HEADS)[None, :]
    to = starts + i[:, None] * heads + h
    tl.store(to, before[:, None] + h * shares[:, None], mask=(i < requests)[:, None] & (h < heads))
    tl.store(starts + requests * heads, tl.sum(shares, 0) * heads)


@triton.jit(do_not_specialize=(
    "packed_stride", "exact_stride", "columns", "starts_stride", "requests", "residual", "programs", "exact_programs",
    "packed_block", "packed_head", "packed_page", "exact_block", "exact_head", "exact_page",
))  # fmt: skip
def _tables(
    lengths, packed_blocks, exact_blocks, table, slots, spans, starts, packed_stride, exact_stride, columns,
    starts_stride, requests, residual, programs, exact_programs, packed_block, packed_head, packed_page, exact_block,
    exact_head, exact_page,
    H: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr, PAGES: tl.constexpr,
    EXACT_PAGES: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr, SIDE: tl.constexpr, SPAN: tl.constexpr,
    TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid: (requests, 1 + columns / COLUMNS): spans and exact pages, and in the first program the work lists; then
    packed pages. SIDE: 16 bytes of a side of an exact page."""
    row = tl.program_id(0)
    length = tl.load(lengths + row)
    start = tl.maximum(length - 1 - residual, 0) // 32 * 32
    # Exact pages that are none.
    c = tl.arange(0, C)
    page = start // 32 + c
    live = (c < COUNT) & (page * 32 < length)
    number = tl.load(exact_blocks + row * exact_stride + page // EXACT_PAGES, mask=live, other=0)
    left_out = tl.sum((live & (number == 0)).to(tl.int32), 0) * 32
    if tl.program_id(1) == 0:
        h = tl.arange(0, HEADS)[:, None]
        at = number.to(tl.int64) * exact_block + page % EXACT_PAGES * exact_page
        address = at[None, :] + h * exact_head
        to = slots + ((row * H + h) * COUNT + c[None, :]) * 2
        seen = live[None, :] & (h < H)
        tl.store(to, address, mask=seen)
        tl.store(to + 1, address + SIDE, mask=seen)
        s = tl.arange(0, SPAN)
        stop = tl.maximum(length - start, 0)
        span = tl.where(s == 1, start + left_out, tl.where(s == 3, left_out, tl.where(s == 4, stop, 0)))
        span_to = spans + (row * H + h) * SPAN + s[None, :]
        tl.store(span_to, tl.broadcast_to(span[None, :], [HEADS, SPAN]), mask=h < H)
        if row == 0:
            i = tl.arange(0, R)
            every = tl.load(lengths + i, mask=i < requests, other=0)
            packed = tl.cdiv(tl.maximum(every - 1, 0) // 32 * 32, TOKENS)
            exact = tl.maximum(every - tl.maximum(every - 1 - residual, 0) // 32 * 32, 0)
            if exact_programs == 0:
                _listed(packed + tl.cdiv(exact, 32), H, programs, i, requests, starts, H, HEADS)
                _listed(packed * 0, H, 0, i, requests, starts + starts_stride, H, HEADS)
            else:
                _listed(packed, H, programs, i, requests, starts, H, HEADS)
                _listed(tl.cdiv(exact, TILE), H, exact_programs, i, requests, starts + starts_stride, H, HEADS)
    else:
        column = (tl.program_id(1) - 1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < tl.cdiv(start + left_out, TOKENS)
        block = tl.load(packed_blocks + row * packed_stride + column // PAGES, mask=inside, other=0)
        first = block.to(tl.int64) * packed_block + column % PAGES * packed_page
        for head in range(H):
            tl.store(table + (row * H + head).to(tl.int64) * columns + column, first + head * packed_head, mask=inside)


@triton.jit(do_not_specialize=("packed_row", "exact_row", "first", "last", "start"))
def _gather(
    packed, packed_row, exact, exact_row, keys, values, first, last, start, packed_block, packed_head, packed_page,
    exact_block, exact_head, exact_page,
    H: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
    PAGES: tl.constexpr, EXACT_PAGES: tl.constexpr, SIDE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """32 tokens of one side of a head, `[tokens, H, D]`. Grid: (groups, H, 2). packed_row, exact_row: the request's
    tables of blocks."""
    token = first + tl.program_id(0) * 32
    head = tl.program_id(1)
    side = tl.program_id(2)
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    inside = r[:, None] * D + d[None, :]
    to = (keys if side == 0 else values) + (token - first + r).to(tl.int64)[:, None] * (H * D) + head * D + d[None, :]
    live = (token + r < last)[:, None]
    page = token // 32
    number = tl.load(exact_row + page // EXACT_PAGES).to(tl.int64)
    if (token < start) | (number == 0):
        whole = token // TOKENS
        block = tl.load(packed_row + whole // PAGES).to(tl.int64)
        address = packed.to(tl.int64) + (block * packed_block + head * packed_head + whole % PAGES * packed_page) * 16
        PLANES: tl.constexpr = TOKENS // 32
        words = tl.multiple_of(address.to(tl.pointer_type(tl.int16)), 16) + side * (32 * D + 2 * PLANES * D)
        scales = words.to(tl.pointer_type(tl.float16)) + 32 * D
        j = token % TOKENS // 32
        codes = ((tl.load(words + inside).to(tl.int32) >> (BITS * j)) & (2**BITS - 1)).to(tl.float32)
        if side == 0:
            at = (j * D + d)[None, :] + tl.zeros([32, 1], tl.int32)
            zeros = scales + PLANES * D
        else:
            at = j * 32 * (D // CHANNELS) + (d // CHANNELS * 32)[None, :] + r[:, None]
            zeros = scales + TOKENS * (D // CHANNELS)
        x = codes * tl.load(scales + at).to(tl.float32) + tl.load(zeros + at).to(tl.float32)
        tl.store(to, x.to(DTYPE), mask=live)
    else:
        place = exact.to(tl.int64) + (
            number * exact_block + head * exact_head + page % EXACT_PAGES * exact_page + side * SIDE
        ) * 16  # fmt: skip
        tl.store(to, tl.load(tl.multiple_of(place.to(tl.pointer_type(DTYPE)), 16) + inside), mask=live)


def _strides(place: Place) -> tuple[int, int, int]:
    """Of a block, a KV head, a page of it, in units of 16 bytes."""
    return place.block, place.head, place.page


def _dense(x: torch.Tensor) -> torch.Tensor:
    """`[tokens, kv_heads, head_dim]` with the numbers of a token in succession."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _launch(
    form: Form, count: int, keys: torch.Tensor, values: torch.Tensor, packed: Blocks, exact: Blocks,
    lengths: torch.Tensor, slots: torch.Tensor, pages: torch.Tensor, peak: torch.Tensor, step: bool,
) -> None:  # fmt: skip
    assert form.group == PAGE
    keys, values = _dense(keys), _dense(values)
    device, heads, dim = keys.device, keys.shape[1], form.head_dim
    value_width, places = max(64, form.channels), (packed.place, exact.place)
    with on(device):
        _pack_blocks[(count, heads, dim // 64 + dim // 64)](
            keys, values, keys.stride(0), values.stride(0), packed.memory, packed.table, exact.memory, exact.table,
            lengths, slots, pages, peak, *_strides(places[0]), packed.table.stride(0), *_strides(places[1]),
            exact.table.stride(0),
            D=dim, KEY_WIDTH=64, VALUE_WIDTH=value_width, BITS=form.bits, TOKENS=form.tokens, CHANNELS=form.channels,
            STATES=places[0].pages, EXACT_STATES=places[1].pages, DTYPE=_TYPES[keys.dtype],
            SIDE=PAGE * dim * keys.dtype.itemsize // 16, STEP=step, FUSED=device.type == "cuda", num_warps=2,
        )  # fmt: skip


def step(
    form: Form,
    keys: torch.Tensor,
    values: torch.Tensor,
    packed: Blocks,
    exact: Blocks,
    lengths: torch.Tensor,
    slots: torch.Tensor,
    peak: torch.Tensor,
) -> None:
    """Write one new token of each request, `[requests, kv_heads, head_dim]`, and pack the groups that are full now:
    `append_reference` and `pack_reference` in one launch. What is not a token has a negative slot.

    peak: int32 `[1]`, the largest absolute value that was packed so far, as the bits of a float32 (infinity for NaN).
    """
    _launch(form, len(lengths), keys, values, packed, exact, lengths, slots, lengths, peak, True)


def pack(
    form: Form,
    keys: torch.Tensor,
    values: torch.Tensor,
    packed: Blocks,
    exact: Blocks,
    pages: torch.Tensor,
    peak: torch.Tensor,
) -> None:
    """`pack_reference` in one launch; peak: see `step`. It reads the exact memory as it was before `store`, which may
    take blocks of older tokens."""
    if len(pages):
        _launch(form, len(pages), keys, values, packed, exact, pages, pages, pages, peak, False)


def store(keys: torch.Tensor, values: torch.Tensor, exact: Blocks, slots: torch.Tensor) -> None:
    """`append_reference` in one launch, except that nothing is written to the null block."""
    keys, values = _dense(keys), _dense(values)
    (tokens, heads, dim), place = keys.shape, exact.place
    if tokens:
        with on(keys.device):
            _store[(tokens,)](
                keys, values, keys.stride(0), values.stride(0), exact.memory, slots, *_strides(place), H=heads,
                HEADS=power_of_2(heads), D=dim, STATES=place.pages, DTYPE=_TYPES[keys.dtype], num_warps=4,
            )  # fmt: skip


def tables(
    form: Form,
    packed: Place,
    packed_blocks: torch.Tensor,
    exact: Place,
    exact_blocks: torch.Tensor,
    kv_heads: int,
    dtype: torch.dtype,
    lengths: torch.Tensor,
    residual: int,
    programs: tuple[int, ...],
    longest: int,
    out: Tables,
    most: int,
) -> None:
    """`tables_reference` into `out`, whose tensors have at least as many rows. packed_blocks, exact_blocks: tables of
    blocks, int32 `[requests, columns]`. longest: no request has more tokens; most: requests there may ever be, so that
    one kernel serves all batches."""
    requests, count = len(lengths), out.exact.shape[1]
    columns = min(out.packed.shape[1], -(-longest // form.tokens))
    with on(lengths.device):
        _tables[(requests, 1 + -(-columns // COLUMNS))](
            lengths, packed_blocks, exact_blocks, out.packed, out.exact, out.spans, out.starts,
            packed_blocks.stride(0), exact_blocks.stride(0), out.packed.shape[1], out.starts.stride(0), requests,
            residual, *programs[:2], *_strides(packed), *_strides(exact),
            H=kv_heads, HEADS=power_of_2(kv_heads), R=power_of_2(most), TOKENS=form.tokens,
            PAGES=packed.pages, EXACT_PAGES=exact.pages, COUNT=count, C=power_of_2(count),
            SIDE=PAGE * form.head_dim * dtype.itemsize // 16, SPAN=SPAN, TILE=TILE, COLUMNS=COLUMNS, num_warps=4,
        )  # fmt: skip


def gather(
    form: Form,
    packed: Blocks,
    exact: Blocks,
    request: int,
    first: int,
    last: int,
    start: int,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """`gather_reference` in one launch, into contiguous `[>= last - first, kv_heads, head_dim]`."""
    if last <= first:
        return
    heads, places = keys.shape[1], (packed.place, exact.place)
    with on(keys.device):
        _gather[(-(-(last - first) // PAGE), heads, 2)](
            packed.memory, packed.table[request], exact.memory, exact.table[request], keys, values, first, last, start,
            *_strides(places[0]), *_strides(places[1]),
            H=heads, D=form.head_dim, BITS=form.bits, TOKENS=form.tokens, CHANNELS=form.channels,
            PAGES=places[0].pages, EXACT_PAGES=places[1].pages, SIDE=PAGE * form.head_dim * keys.element_size() // 16,
            DTYPE=_TYPES[keys.dtype], num_warps=4,
        )  # fmt: skip
