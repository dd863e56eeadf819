"""Attention of a decoding step over pages of rotated keys and values (see `Rotated`), in Triton.

Two kernels, with the work lists and parts of `packed_decode`. `_scores` makes keys again, 32 tokens of the heads that
were rotated together at a time: channels are loaded from where they were sorted to, so that no tile is permuted; the
Hadamard matrix over heads is additions, that over channels a product with entries +-1; RoPE turns what comes out, by
the angle of the first token (in float64, reduced) and that of a token in its plane added up. It leaves scores, float32.
`_values` reads them, and undoes the values' rotation once, on the weighted sum.

Attention sinks, which are exact, are among the slots: a page says which, and their scores and values are put in the
others' places.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fivefold.kernels.packed_decode.reader import Packed
from fivefold.kernels.packed_decode.schedule import SPAN
from fivefold.kernels.packed_decode.triton import _code_planes, _leave, _row, _share
from fivefold.kernels.planar_decode.triton import _code, _rest, _spread
from fivefold.kernels.rotated_decode.reference import Rotated


@triton.constexpr_function
def _field_asm(bits):
    mask = (2 ** int(bits) - 1) * 0x10001
    return (
        f"{{ .reg .b32 t, u; shr.u32 t, $1, $2; and.b32 t, t, 0x{mask:08X}; or.b32 t, t, 0x64006400; "
        "mov.b32 u, 0x64006400; sub.rn.f16x2 $0, t, u; }"
    )


@triton.jit
def _field(words, shift, BITS: tl.constexpr, ASM: tl.constexpr):
    """The codes that stand `shift` bits up in words, as float16. (1024 and a code is a float16 with the code as its
    last bits.)"""
    if ASM:
        # Two words at a time in one register; the shift, which is the same for both, in two.
        return tl.inline_asm_elementwise(
            _field_asm(BITS), "=r,r,r,r", [words, shift], dtype=tl.float16, is_pure=True, pack=2
        )
    return ((words.to(tl.int32) >> shift) & (2**BITS - 1)).to(tl.float16)


@triton.jit
def _address(table, row, columns, page, field, FIELDS: tl.constexpr):
    return tl.load(table + (row.to(tl.int64) * columns + page) * FIELDS + field) * 2


@triton.jit(do_not_specialize=("rows", "columns", "heads", "slots"))
def _scores(
    queries, table, spans, starts, places, turns, small, matrices, sink_keys, scores, scale, rows, columns, heads,
    slots,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, CHANNELS: tl.constexpr, KV_HEADS: tl.constexpr,
    TEAM: tl.constexpr, SPLIT: tl.constexpr, NEIGHBOURS: tl.constexpr, SINKS: tl.constexpr, S: tl.constexpr,
    FIELDS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scores, to the base 2, of one share of the pages of TEAM rows: float32 `[rows, heads, slots]`. Grid:
    (programs,). S: room for the sinks."""
    row = _row(starts, rows, R)
    if row >= rows:
        return
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    G: tl.constexpr = D // CHANNELS
    HALF: tl.constexpr = D // 2
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    h = tl.arange(0, N)
    i = tl.arange(0, HALF)
    k = tl.arange(0, S)
    first_row = row // KV_HEADS * KV_HEADS
    even = 2 * i if NEIGHBOURS else i
    odd = 2 * i + 1 if NEIGHBOURS else i + HALF
    # Where the rotated channels of each head of the team stand.
    heads_of = ()
    inside = ()
    for g in tl.static_range(TEAM):
        place = tl.load(places + (row - first_row + g) * D + d)
        heads_of = heads_of + (first_row + place // D,)
        inside = inside + (place % D,)
    query_even = ()
    query_odd = ()
    factors = ()
    exact = ()
    for g in tl.static_range(TEAM):
        at = queries + (row + g) * heads * D + h[None, :] * D
        a = tl.load(at + even[:, None], mask=h[None, :] < heads, other=0.0).to(tl.float32)
        b = tl.load(at + odd[:, None], mask=h[None, :] < heads, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0)), 1e-30)
        a = a / largest[None, :]
        b = b / largest[None, :]
        query_even = query_even + (a.to(tl.float16),)
        query_odd = query_odd + (b.to(tl.float16),)
        factors = factors + (scale * largest,)
        if SINKS > 0:
            at = sink_keys + ((row + g) * SINKS + k[:, None]) * D
            x = tl.load(at + even[None, :], mask=k[:, None] < SINKS, other=0.0).to(tl.float32)
            y = tl.load(at + odd[None, :], mask=k[:, None] < SINKS, other=0.0).to(tl.float32)
            both = tl.dot(x, a, input_precision="ieee")
            exact = exact + (tl.dot(y, b, both, input_precision="ieee"),)  # [S, N]
    if SPLIT:
        undo_even = tl.load(matrices + d[:, None] * HALF + i[None, :])
        undo_odd = tl.load(matrices + D * HALF + d[:, None] * HALF + i[None, :])
    revolutions = tl.load(turns + i)
    small_cos = small + r[:, None] * HALF + i[None, :]
    norm = (TEAM * D) ** -0.5

    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    base = tl.load(spans + row * SPAN + 7)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    first += low // TOKENS
    last += low // TOKENS
    for page in range(first, last):
        word_at = ()
        scale_at = ()
        zero_at = ()
        for g in tl.static_range(TEAM):
            at = table + (heads_of[g].to(tl.int64) * columns + page) * FIELDS
            words = (tl.load(at) * 2).to(tl.pointer_type(tl.int16)) + inside[g] * 32
            steps = (tl.load(at + 1) * 2).to(tl.pointer_type(tl.float16)) + inside[g] // CHANNELS * 32
            zeros = (tl.load(at + 2) * 2).to(tl.pointer_type(tl.float16)) + inside[g] // CHANNELS * 32
            word_at = word_at + (words,)
            scale_at = scale_at + (steps,)
            zero_at = zero_at + (zeros,)
        marks = ()
        for g in tl.static_range(TEAM):
            if SINKS > 0:
                at = _address(table, row + g, columns, page, 6, FIELDS).to(tl.pointer_type(tl.int16))
                mark = tl.load(at + k, mask=k < SINKS, other=-1).to(tl.int32)
                marks = marks + (mark,)
                token = page * TOKENS + mark
                there = (mark >= 0) & (token >= low) & (token < high)
                target = scores + ((row + g) * heads + h[None, :]).to(tl.int64) * slots + token[:, None]
                tl.store(target, exact[g] * factors[g][None, :], mask=there[:, None] & (h[None, :] < heads))
        for j in range(PLANES):
            x = ()
            for g in tl.static_range(TEAM):
                words = tl.load(tl.multiple_of(word_at[g], 16)[:, None] + r[None, :])
                steps = tl.load(tl.multiple_of(scale_at[g] + j * 32 * G, 16)[:, None] + r[None, :])
                zeros = tl.load(tl.multiple_of(zero_at[g] + j * 32 * G, 16)[:, None] + r[None, :])
                x = x + (_field(words, j * BITS, BITS, ASM) * steps + zeros,)
            rev = revolutions * (base + page * TOKENS + j * 32).to(tl.float64)
            angle = ((rev - tl.floor(rev + 0.5)) * 6.283185307179586).to(tl.float32)
            cos_base = (tl.cos(angle) * norm)[None, :]
            sin_base = (tl.sin(angle) * norm)[None, :]
            cos_small = tl.load(small_cos)
            sin_small = tl.load(small_cos + 32 * HALF)
            cosine = cos_base * cos_small - sin_base * sin_small
            sine = sin_base * cos_small + cos_base * sin_small
            if SPLIT and TEAM == 2:
                x = (x[0] + x[1], x[0] - x[1])
            if SPLIT and TEAM == 4:
                a = x[0] + x[1]
                b = x[0] - x[1]
                c = x[2] + x[3]
                e = x[2] - x[3]
                x = (a + c, b + e, a - c, b - e)
            token = page * TOKENS + j * 32 + r
            seen = (token >= low) & (token < high)
            for g in tl.static_range(TEAM):
                if SPLIT:
                    k_even = tl.dot(tl.trans(x[g]), undo_even)
                    k_odd = tl.dot(tl.trans(x[g]), undo_odd)
                else:
                    k_even = tl.zeros([32, HALF], tl.float32)
                    k_odd = tl.zeros([32, HALF], tl.float32)
                    for f in tl.static_range(TEAM):
                        at = matrices + (g * TEAM + f) * 2 * D * HALF + d[:, None] * HALF + i[None, :]
                        k_even = tl.dot(tl.trans(x[f]), tl.load(at), k_even)
                        k_odd = tl.dot(tl.trans(x[f]), tl.load(at + D * HALF), k_odd)
                turned_even = (k_even * cosine - k_odd * sine).to(tl.float16)
                turned_odd = (k_odd * cosine + k_even * sine).to(tl.float16)
                s = tl.dot(turned_even, query_even[g])
                s = tl.dot(turned_odd, query_odd[g], s) * factors[g][None, :]
                mine = seen
                if SINKS > 0:
                    mine = mine & (tl.max((marks[g][None, :] == (j * 32 + r)[:, None]).to(tl.int32), 1) == 0)
                target = scores + ((row + g) * heads + h[None, :]).to(tl.int64) * slots + token[:, None]
                tl.store(target, s, mask=mine[:, None] & (h[None, :] < heads))


@triton.jit(do_not_specialize=("rows", "columns", "heads", "slots"))
def _values(
    scores, table, spans, starts, matrix, sink_values, out, lse, rows, columns, heads, slots,
    N: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr, CHANNELS: tl.constexpr, TEAM: tl.constexpr,
    SINKS: tl.constexpr, S: tl.constexpr, FIELDS: tl.constexpr, SPAN: tl.constexpr, R: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The values of one share of a row's pages, weighted by the scores that `_scores` left. Grid: (programs, TEAM)."""
    row = _row(starts, rows, R)
    if row >= rows:
        return
    PLANES: tl.constexpr = _code_planes(BITS)
    TOKENS: tl.constexpr = PLANES * 32
    G: tl.constexpr = D // CHANNELS
    r = tl.arange(0, 32)
    d = tl.arange(0, D)
    g = tl.arange(0, G)
    h = tl.arange(0, N)
    k = tl.arange(0, S)
    low = tl.load(spans + row * SPAN)
    high = tl.load(spans + row * SPAN + 1)
    first, last = _share(starts, row, tl.cdiv(high, TOKENS) - low // TOKENS)
    first += low // TOKENS
    last += low // TOKENS
    row += tl.program_id(1)
    score_at = scores + (row * heads + h[None, :]).to(tl.int64) * slots
    turn = tl.load(matrix + d[:, None] * D + d[None, :])
    if SINKS > 0:
        at = sink_values + (row * SINKS + k[:, None]) * D + d[None, :]
        exact = tl.load(at, mask=k[:, None] < SINKS, other=0.0).to(tl.float16)
        # As values are: times the matrix.
        exact = (tl.dot(exact, turn) * D**-0.5).to(tl.float16)  # [S, D]
    m = tl.full([N], -1e30, tl.float32)
    weight = tl.zeros([32, N], tl.float32)
    acc = tl.zeros([D, N], tl.float32)
    for page in range(first, last):
        words = _address(table, row, columns, page, 3, FIELDS).to(tl.pointer_type(tl.int16))
        words = tl.load(tl.multiple_of(words, 16) + r[:, None] * D + d[None, :])
        scale_at = tl.multiple_of(_address(table, row, columns, page, 4, FIELDS), 16).to(tl.pointer_type(tl.float16))
        zero_at = tl.multiple_of(_address(table, row, columns, page, 5, FIELDS), 16).to(tl.pointer_type(tl.float16))
        if SINKS > 0:
            marks = _address(table, row, columns, page, 6, FIELDS).to(tl.pointer_type(tl.int16))
            marks = tl.load(marks + k, mask=k < SINKS, other=-1).to(tl.int32)
        found = ()
        for j in tl.static_range(PLANES):
            token = page * TOKENS + j * 32 + r
            seen = ((token >= low) & (token < high))[:, None] & (h[None, :] < heads)
            found = found + (tl.load(score_at + token[:, None], mask=seen, other=-1e30),)
        top = found[0]
        for j in tl.static_range(1, PLANES):
            top = tl.maximum(top, found[j])
        above = tl.maximum(m, tl.max(top, 0))
        shrink = tl.exp2(m - above)
        m = above
        weight = weight * shrink[None, :]
        acc = acc * shrink[None, :]
        for j in tl.static_range(PLANES):
            p = tl.exp2(found[j] - m[None, :])
            weight += p
            if SINKS > 0:
                other = tl.max((marks[None, :] == (j * 32 + r)[:, None]).to(tl.int32), 1) == 0
                p = tl.where(other[:, None], p, 0.0)
            part = j * 32 * G + g[:, None] * 32 + r[None, :]
            REST: tl.constexpr = _rest(BITS, j)
            steps = (tl.load(scale_at + part) * REST).to(tl.float16)
            zero = tl.load(zero_at + part)
            v = tl.trans(_code(words, BITS, j, ASM))
            v = v * _spread(steps, j, G, CHANNELS) + _spread(zero, j, G, CHANNELS)
            acc = tl.dot(v, p.to(tl.float16), acc)
        if SINKS > 0:
            token = page * TOKENS + marks
            there = (marks >= 0) & (token >= low) & (token < high)
            s = tl.load(score_at + token[:, None], mask=there[:, None] & (h[None, :] < heads), other=-1e30)
            p = tl.where(there[:, None], tl.exp2(s - m[None, :]), 0.0).to(tl.float16)
            acc = tl.dot(tl.trans(exact), p, acc)
    total = tl.sum(weight, 0)
    # Undo the values' rotation, in two parts of float16 each: what is rounded off the first is the second.
    o = acc / tl.where(total > 0, total, 1.0)[None, :]
    near = o.to(tl.float16)
    o = tl.dot(turn, near) + tl.dot(turn, (o - near.to(tl.float32)).to(tl.float16))
    place = tl.program_id(0) * TEAM + tl.program_id(1)
    _leave(out, lse, place, o * (D**-0.5 * total)[None, :], m, total, heads, N, D)


def attend(
    form: Rotated,
    packed: Packed,
    queries: torch.Tensor,
    scale: float,
    spans: torch.Tensor,
    starts: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor | None = None,
    warps: tuple[int, int] = (4, 2),
) -> None:
    """See `Reader.attend`."""
    rows, heads, dim = queries.shape
    columns, (places,), (turns, small, matrices, values) = packed.table.shape[1], form.constants, form.tables
    slots = columns * form.tokens
    if scores is None:
        scores = torch.empty((rows, heads, slots), dtype=torch.float32, device=queries.device)
    sink_keys, sink_values = packed.learned if form.sinks else (queries, queries)
    common = {
        "N": 8 if heads <= 8 else 16, "D": dim, "BITS": form.bits, "CHANNELS": form.channels, "TEAM": form.team,
        "SINKS": form.sinks, "S": 16 if form.sinks <= 16 else 32, "FIELDS": len(form.fields), "SPAN": SPAN,
        "R": triton.next_power_of_2(rows), "ASM": queries.device.type == "cuda",
    }  # fmt: skip
    _scores[(len(out),)](
        queries, packed.table, spans, starts, places, turns, small, matrices, sink_keys, scores, scale, rows, columns,
        heads, slots, KV_HEADS=form.kv_heads, SPLIT=form.split, NEIGHBOURS=form.neighbours, num_warps=warps[0],
        num_stages=1, **common,
    )  # fmt: skip
    _values[(len(out), form.team)](
        scores, packed.table, spans, starts, values, sink_values, out, lse, rows, columns, heads, slots,
        num_warps=warps[1], num_stages=1, **common,
    )  # fmt: skip
