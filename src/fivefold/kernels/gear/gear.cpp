// What GEAR adds to the scores and outputs of its quantised base, as `reference.py` has it, a page at a time. T (tokens of
// a page), D (head_dim), R (rank), OUTLIERS (of a channel of keys, or of a token of values), QUERIES.
#include "../cpu.h"

struct Bytes {  // a page field of bytes
  Field field;
  const uint8_t* of(int64_t r, int64_t p) const { return (const uint8_t*)field.at + r * field.row + p * field.page; }
};

// out: [rows, QUERIES, pages * T], to which it is added; queries: [rows, QUERIES, D]; left [T, R], right [R, D],
// outliers and places [D, OUTLIERS] of a page.
extern "C" void add_scores(const float* queries, Field left, Field right, Field outliers, Bytes places, float* out,
                           int rows, int pages, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows * pages; unit++) {
    const int row = unit / pages, page = unit % pages;
    const float* query = queries + (int64_t)row * QUERIES * D;
    float* to = out + ((int64_t)row * QUERIES * pages + page) * T;
#if R
    float turned[QUERIES][R], own[T * R];
    for (int k = 0; k < R; k++) {
      float x[D];
      halves(right.of(row, page) + k * D, x, D);
      for (int q = 0; q < QUERIES; q++) {
        float sum = 0;
        for (int c = 0; c < D; c++) sum += query[q * D + c] * x[c];
        turned[q][k] = sum;
      }
    }
    halves(left.of(row, page), own, T * R);
    for (int q = 0; q < QUERIES; q++)
      for (int t = 0; t < T; t++) {
        float sum = 0;
        for (int k = 0; k < R; k++) sum += own[t * R + k] * turned[q][k];
        to[(int64_t)q * pages * T + t] += sum;
      }
#endif
#if OUTLIERS
    float values[D * OUTLIERS];
    halves(outliers.of(row, page), values, D * OUTLIERS);
    const uint8_t* place = places.of(row, page);
    for (int q = 0; q < QUERIES; q++) {
      float* scores = to + (int64_t)q * pages * T;
      for (int c = 0; c < D; c++)
        for (int i = 0; i < OUTLIERS; i++) scores[place[c * OUTLIERS + i]] += values[c * OUTLIERS + i] * query[q * D + c];
    }
#endif
  }
}

// weights: [rows, QUERIES, pages * T], rows and queries `row_stride` and `query_stride` apart; left [T, R], right [R, D],
// outliers and places [T, OUTLIERS] of a page; out: [rows, pages, QUERIES, D], the sums of every page.
extern "C" void output(const float* weights, int64_t row_stride, int64_t query_stride, Field left, Field right,
                       Field outliers, Bytes places, float* out, int rows, int pages, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows * pages; unit++) {
    const int row = unit / pages, page = unit % pages;
    const float* weight = weights + row * row_stride + (int64_t)page * T;
    float total[QUERIES][D] = {};
#if R
    float own[T * R], x[R][D];
    halves(left.of(row, page), own, T * R);
    halves(right.of(row, page), x[0], R * D);
    for (int q = 0; q < QUERIES; q++) {
      float sums[R] = {};
      for (int t = 0; t < T; t++)
        for (int k = 0; k < R; k++) sums[k] += weight[q * query_stride + t] * own[t * R + k];
      for (int k = 0; k < R; k++)
        for (int c = 0; c < D; c++) total[q][c] += sums[k] * x[k][c];
    }
#endif
#if OUTLIERS
    float values[T * OUTLIERS];
    halves(outliers.of(row, page), values, T * OUTLIERS);
    const uint8_t* place = places.of(row, page);
    for (int q = 0; q < QUERIES; q++)
      for (int t = 0; t < T; t++)
        for (int i = 0; i < OUTLIERS; i++)
          total[q][place[t * OUTLIERS + i]] += values[t * OUTLIERS + i] * weight[q * query_stride + t];
#endif
    memcpy(out + (int64_t)unit * QUERIES * D, total, sizeof total);
  }
}
