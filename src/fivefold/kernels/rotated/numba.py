"""The same on a CPU, compiled by numba: a page's keys never leave the processor's first cache."""

from __future__ import annotations

import numba
import numpy as np

from fivefold.kernels.compiled import halves, kernel, part

LANES = 32
"""Tokens of a plane: what stands in a row of memory, and what is computed side by side."""


@part
def decode_plane(words, scale, zero, order, x, shift, mask, plane, dim, group):
    """Codes times scales of a plane, sorted channels to where they stand before that: x `[channels, LANES]`."""
    for channel in range(len(order)):
        head, inside, to = channel // dim, channel % dim // group, order[channel]
        for t in range(LANES):
            code = np.float32(np.int32(words[channel, t] >> shift & mask))
            x[to, t] = code * scale[head, plane, inside, t] + zero[head, plane, inside, t]


@part
def times_core(x, y, core):
    """Every m rows of x times the core, `[m, m]`, into y."""
    m = len(core)
    for first in range(0, len(x), m):
        for row in range(m):
            to = first + row
            if m < 4:
                for t in range(LANES):
                    y[to, t] = 0
                for k in range(m):
                    for t in range(LANES):
                        y[to, t] += core[row, k] * x[first + k, t]
            else:
                h0, h1, h2, h3 = core[row, 0], core[row, 1], core[row, 2], core[row, 3]
                for t in range(LANES):
                    y[to, t] = h0 * x[first, t] + h1 * x[first + 1, t] + h2 * x[first + 2, t] + h3 * x[first + 3, t]
                for k in range(first + 4, first + m, 4):
                    i = k - first
                    h0, h1, h2, h3 = core[row, i], core[row, i + 1], core[row, i + 2], core[row, i + 3]
                    for t in range(LANES):
                        y[to, t] += h0 * x[k, t] + h1 * x[k + 1, t] + h2 * x[k + 2, t] + h3 * x[k + 3, t]


@part
def butterflies(x, step, n):
    """Sylvester's doublings of every n rows of x, from blocks of `step` rows on, two at a time."""
    while 4 * step <= n:
        for first in range(0, len(x), 4 * step):
            for row in range(first, first + step):
                for t in range(LANES):
                    a, b, c, d = x[row, t], x[row + step, t], x[row + 2 * step, t], x[row + 3 * step, t]
                    e, f, g, h = a + b, a - b, c + d, c - d
                    x[row, t], x[row + step, t], x[row + 2 * step, t], x[row + 3 * step, t] = e + g, f + h, e - g, f - h
        step *= 4
    if step < n:
        for first in range(0, len(x), 2 * step):
            for row in range(first, first + step):
                for t in range(LANES):
                    a, b = x[row, t], x[row + step, t]
                    x[row, t], x[row + step, t] = a + b, a - b


@part
def turn(x, cosine, sine, plane, page, dim):
    """Pairs of channels in neighbouring rows of x, turned."""
    for first in range(0, len(x), dim):
        for i in range(len(cosine)):
            row = first + 2 * i
            for t in range(LANES):
                a, b = x[row, t], x[row + 1, t]
                c, s = cosine[i, plane, page, t], sine[i, plane, page, t]
                x[row, t], x[row + 1, t] = a * c - b * s, b * c + a * s


@part
def products(x, first, query, out):
    """Inner products of a query with the columns of x, from row `first` on: out `[LANES]`."""
    for t in range(LANES):
        out[t] = 0
    whole = len(query) // 8 * 8
    for i in range(0, whole, 8):
        q0, q1, q2, q3 = query[i], query[i + 1], query[i + 2], query[i + 3]
        q4, q5, q6, q7 = query[i + 4], query[i + 5], query[i + 6], query[i + 7]
        k = first + i
        for t in range(LANES):
            low = q0 * x[k, t] + q1 * x[k + 1, t] + q2 * x[k + 2, t] + q3 * x[k + 3, t]
            out[t] += low + q4 * x[k + 4, t] + q5 * x[k + 5, t] + q6 * x[k + 6, t] + q7 * x[k + 7, t]
    for i in range(whole, len(query)):
        for t in range(LANES):
            out[t] += query[i] * x[first + i, t]


@kernel(
    "void(int16[::1], int64, int64, int16[::1], int64, int64, int16[::1], int64, int64, int64[:, ::1], "
    "float32[:, ::1], int64, float32[:, :, :, :, ::1], float32[:, :, :, :, ::1], float32[:, :, ::1], "
    "float32[:, :, :, :, ::1], int64, int64)"
)
def scores(
    words, word_row, word_page, scale, scale_row, scale_page, zero, zero_row, zero_page, order, core, n, cosine, sine,
    queries, out, bits, group,
):  # fmt: skip
    rows, heads, dim = queries.shape
    pages, planes = out.shape[2:4]
    channels = order.shape[1]
    together, groups = channels // dim, dim // group
    for unit in numba.prange(rows // together * pages):
        team, page = unit // pages, unit % pages
        wide = np.empty((channels, LANES), np.int32)
        by_row = wide.reshape(together, dim * LANES)
        scales = np.empty((together, planes, groups, LANES), np.float32)
        zeros = np.empty((together, planes, groups, LANES), np.float32)
        size = planes * groups * LANES
        for head in range(together):
            row = team * together + head
            own = words[row * word_row + page * word_page :][: dim * LANES]
            for i in range(dim * LANES):
                by_row[head, i] = own[i]
            halves(scale[row * scale_row + page * scale_page :][:size], scales[head].reshape(size))
            halves(zero[row * zero_row + page * zero_page :][:size], zeros[head].reshape(size))
        x = np.empty((channels, LANES), np.float32)
        y = np.empty((channels, LANES), np.float32)
        places = order[team % len(order)]
        phase = team % len(cosine)
        for plane in range(planes):
            decode_plane(wide, scales, zeros, places, x, bits * plane, (1 << bits) - 1, plane, dim, group)
            times_core(x, y, core)
            butterflies(y, len(core), n)
            turn(y, cosine[phase], sine[phase], plane, page, dim)
            for head in range(together):
                for query in range(heads):
                    row = team * together + head
                    products(y, head * dim, queries[row, query], out[row, query, page, plane])
