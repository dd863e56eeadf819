// Attention on planar pages, as `reference.py` has it, a page at a time: its numbers are unpacked once, in the
// processor's first cache. BITS, PLANES (of a page), GROUPS (of a page's tokens for keys per channel, of channels for
// numbers per token), D (head_dim), QUERIES.
#include "../cpu.h"

static const uint16_t* line(const uint16_t* words, int plane, int r) {
  return words + (plane / FIELDS * ROWS + r) * D;
}

// queries: [rows, QUERIES, D]; scale, zero: [GROUPS, D]; out: [rows, QUERIES, pages * PLANES * ROWS].
extern "C" void channel_scores(const float* queries, Field words, Field scale, Field zero, float* out, int rows,
                               int pages, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows * pages; unit++) {
    const int row = unit / pages, page = unit % pages;
    const uint16_t* own = words.of(row, page);
    float scaled[QUERIES][D], offset[QUERIES];
    for (int plane = 0, last = -1; plane < PLANES; plane++) {
      const int group = plane * GROUPS / PLANES;
      if (group != last) {  // the channel's scale goes into the query
        float steps[D], lows[D];
        halves(scale.of(row, page) + group * D, steps, D);
        halves(zero.of(row, page) + group * D, lows, D);
        for (int q = 0; q < QUERIES; q++) {
          const float* query = queries + (row * QUERIES + q) * D;
          float sum = 0;
          for (int c = 0; c < D; c++) scaled[q][c] = query[c] * steps[c], sum += query[c] * lows[c];
          offset[q] = sum;
        }
        last = group;
      }
      for (int r = 0; r < ROWS; r++) {
        const uint16_t* word = line(own, plane, r);
        float x[D];
        for (int c = 0; c < D; c++) x[c] = code(word[c], plane);
        for (int q = 0; q < QUERIES; q++) {
          float sum = 0;
          for (int c = 0; c < D; c++) sum += x[c] * scaled[q][c];
          out[(((int64_t)row * QUERIES + q) * pages + page) * PLANES * ROWS + plane * ROWS + r] = sum + offset[q];
        }
      }
    }
  }
}

// The same for keys quantised per token: scale, zero: [PLANES, GROUPS, ROWS].
extern "C" void token_scores(const float* queries, Field words, Field scale, Field zero, float* out, int rows,
                             int pages, int threads) {
  constexpr int CHANNELS = D / GROUPS;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows * pages; unit++) {
    const int row = unit / pages, page = unit % pages;
    const uint16_t* own = words.of(row, page);
    float sums[QUERIES][GROUPS];
    for (int q = 0; q < QUERIES; q++)
      for (int g = 0; g < GROUPS; g++) {
        sums[q][g] = 0;
        for (int c = 0; c < CHANNELS; c++) sums[q][g] += queries[(row * QUERIES + q) * D + g * CHANNELS + c];
      }
    for (int plane = 0; plane < PLANES; plane++) {
      float steps[GROUPS * ROWS], lows[GROUPS * ROWS];
      halves(scale.of(row, page) + plane * GROUPS * ROWS, steps, GROUPS * ROWS);
      halves(zero.of(row, page) + plane * GROUPS * ROWS, lows, GROUPS * ROWS);
      for (int r = 0; r < ROWS; r++) {
        const uint16_t* word = line(own, plane, r);
        float x[D];
        for (int g = 0; g < GROUPS; g++)
          for (int c = g * CHANNELS; c < (g + 1) * CHANNELS; c++) x[c] = code(word[c], plane) * steps[g * ROWS + r];
        for (int q = 0; q < QUERIES; q++) {
          const float* query = queries + (row * QUERIES + q) * D;
          float sum = 0, low = 0;
          for (int c = 0; c < D; c++) sum += x[c] * query[c];
          for (int g = 0; g < GROUPS; g++) low += sums[q][g] * lows[g * ROWS + r];
          out[(((int64_t)row * QUERIES + q) * pages + page) * PLANES * ROWS + plane * ROWS + r] = sum + low;
        }
      }
    }
  }
}

// Values quantised per token, weighted: weights: [rows, QUERIES, pages * PLANES * ROWS], rows and queries `row_stride`
// and `query_stride` apart; out: [rows, pages, QUERIES, D], the sums of every page.
extern "C" void output(const float* weights, int64_t row_stride, int64_t query_stride, Field words, Field scale,
                       Field zero, float* out, int rows, int pages, int threads) {
  constexpr int CHANNELS = D / GROUPS;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows * pages; unit++) {
    const int row = unit / pages, page = unit % pages;
    const uint16_t* own = words.of(row, page);
    float total[QUERIES][D] = {};
    for (int plane = 0; plane < PLANES; plane++) {
      const float* weight = weights + row * row_stride + (int64_t)(page * PLANES + plane) * ROWS;
      float steps[GROUPS * ROWS], lows[GROUPS * ROWS];
      halves(scale.of(row, page) + plane * GROUPS * ROWS, steps, GROUPS * ROWS);
      halves(zero.of(row, page) + plane * GROUPS * ROWS, lows, GROUPS * ROWS);
      for (int r = 0; r < ROWS; r++) {
        const uint16_t* word = line(own, plane, r);
        float x[D];
        for (int g = 0; g < GROUPS; g++)
          for (int c = g * CHANNELS; c < (g + 1) * CHANNELS; c++)
            x[c] = code(word[c], plane) * steps[g * ROWS + r] + lows[g * ROWS + r];
        for (int q = 0; q < QUERIES; q++)
          for (int c = 0; c < D; c++) total[q][c] += weight[q * query_stride + r] * x[c];
      }
    }
    memcpy(out + (int64_t)unit * QUERIES * D, total, sizeof total);
  }
}
