"""Weighted values on a CPU, compiled by numba: every number is unpacked once, in the processor's first cache."""

from __future__ import annotations

import numba
import numpy as np

from fivefold.kernels.compiled import halves, kernel

ROWS = 32


@kernel(
    "void(float32[:, :, :], int16[::1], int64, int64, int16[::1], int64, int64, int16[::1], int64, int64, "
    "float32[:, :, :, ::1], int64, int64, int64, int64)"
)
def output(
    weights, words, word_row, word_page, scale, scale_row, scale_page, zero, zero_row, zero_page, out, bits, sheets,
    planes, groups,
):  # fmt: skip
    """`planar_output` of every page by itself: out `[rows, pages, query, head_dim]`."""
    rows, pages, query, dim = out.shape
    size, fields, mask, channels = planes * groups * ROWS, 16 // bits, (1 << bits) - 1, dim // groups
    for unit in numba.prange(rows * pages):
        row, page = unit // pages, unit % pages
        wide = np.empty((sheets * ROWS, dim), np.int32)
        by_number = wide.reshape(sheets * ROWS * dim)
        own = words[row * word_row + page * word_page :][: len(by_number)]
        for i in range(len(by_number)):
            by_number[i] = own[i]
        scales = np.empty((planes, groups, ROWS), np.float32)
        zeros = np.empty((planes, groups, ROWS), np.float32)
        halves(scale[row * scale_row + page * scale_page :][:size], scales.reshape(size))
        halves(zero[row * zero_row + page * zero_page :][:size], zeros.reshape(size))
        some = np.zeros((4, dim), np.float32)  # values of four tokens
        total = np.zeros((query, dim), np.float32)
        for r in range(ROWS):
            for first in range(0, planes, 4):
                for k in range(min(4, planes - first)):
                    plane = first + k
                    line, shift = plane // fields * ROWS + r, plane % fields * bits
                    for group in range(groups):
                        step, low, start = scales[plane, group, r], zeros[plane, group, r], group * channels
                        for c in range(start, start + channels):
                            some[k, c] = np.float32(np.int32(wide[line, c] >> shift & mask)) * step + low
                token = (page * planes + first) * ROWS + r
                for q in range(query):
                    w0 = weights[row, q, token]
                    w1 = weights[row, q, token + ROWS] if first + 1 < planes else np.float32(0)
                    w2 = weights[row, q, token + 2 * ROWS] if first + 2 < planes else np.float32(0)
                    w3 = weights[row, q, token + 3 * ROWS] if first + 3 < planes else np.float32(0)
                    for c in range(dim):
                        total[q, c] += w0 * some[0, c] + w1 * some[1, c] + w2 * some[2, c] + w3 * some[3, c]
        for q in range(query):
            for c in range(dim):
                out[row, page, q, c] = total[q, c]
