// Attention on pages of low-rank features, as `cpu.py` says, 32 tokens at a time: keys never leave the processor's first
// caches, and of values only sums are made. KIND (0 float32, 1 bfloat16, 2 float16; with BITS planar codes), TOKENS (of
// a page), RANK (features of a row), HEADS (rows that are together), D (head_dim), PAIRS (that RoPE turns), QUERIES.
#include "../lanes.h"

constexpr int FEATURES = HEADS * RANK, STEPS = TOKENS / ROWS;

constexpr int PADDED = (FEATURES + WIDE - 1) / WIDE * WIDE;

static inline float number(const uint16_t* at, int i) {
#if KIND == 0
  return ((const float*)at)[i];
#elif KIND == 1
  const uint32_t bits = (uint32_t)at[i] << 16;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
#else
  return half(at[i]);
#endif
}

struct Side {  // a page's features of keys or of values: numbers; or words, scale and zero
  Field numbers, scale, zero;
};

// The features of 32 tokens of a row, token by token.
static void unpacked(const Side& side, int row, int page, int step, float (*out)[RANK]) {
  const uint16_t* own = side.numbers.of(row, page);
#if BITS
  float steps[RANK], lows[RANK];
  halves(side.scale.of(row, page) + step * RANK, steps, RANK);
  halves(side.zero.of(row, page) + step * RANK, lows, RANK);
  for (int t = 0; t < ROWS; t++)
    for (int f = 0; f < RANK; f++) out[t][f] = code(own[t * RANK + f], step) * steps[f] + lows[f];
#else
  float* flat = out[0];
  own += (KIND == 0 ? 2 : 1) * step * ROWS * RANK;
  for (int i = 0; i < ROWS * RANK; i++) flat[i] = number(own, i);
#endif
}

// queries: [rows, QUERIES, D]; up: [teams or 1, HEADS * D, FEATURES], `up_team` apart; both in the paired order; cosine,
// sine: [teams or 1, PAIRS, pages, TOKENS], `wave_team` apart; out: [rows, QUERIES, pages * TOKENS].
extern "C" void scores(const float* queries, Field numbers, Field scale, Field zero, const float* up, int64_t up_team,
                       const float* cosine, const float* sine, int64_t wave_team, float* out, int rows, int pages,
                       int threads) {
  const Side side = {numbers, scale, zero};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows / HEADS * pages; unit++) {
    const int team = unit / pages, page = unit % pages;
    alignas(64) float x[FEATURES][ROWS], y[D][ROWS], token[ROWS][RANK];
    for (int step = 0; step < STEPS; step++) {
      for (int head = 0; head < HEADS; head++) {
        unpacked(side, team * HEADS + head, page, step, token);
        for (int f = 0; f < RANK; f++)
          for (int t = 0; t < ROWS; t++) x[head * RANK + f][t] = token[t][f];
      }
      const int64_t phase = team * wave_team + (int64_t)page * TOKENS + step * ROWS, next = (int64_t)pages * TOKENS;
      for (int head = 0; head < HEADS; head++) {
        const float* mine = up + team * up_team + head * D * FEATURES;
        all_weighted<D>(mine, FEATURES, x, y[0], ROWS);
        for (int pair = 0; pair < PAIRS; pair++) {
          const float *c = cosine + phase + pair * next, *s = sine + phase + pair * next;
          for (int t = 0; t < ROWS; t++) {
            const float a = y[2 * pair][t], b = y[2 * pair + 1][t];
            y[2 * pair][t] = a * c[t] - b * s[t], y[2 * pair + 1][t] = b * c[t] + a * s[t];
          }
        }
        const int64_t row = team * HEADS + head;
        all_weighted<QUERIES>(queries + row * QUERIES * D, D, y,
                              out + (row * QUERIES * pages + page) * TOKENS + step * ROWS, (int64_t)pages * TOKENS);
      }
    }
  }
}

// Features of values, weighted: weights: [rows, QUERIES, pages * TOKENS], rows and queries `row_stride` and
// `query_stride` apart; out: [teams, pages, HEADS * QUERIES, FEATURES], the sums of every page.
extern "C" void sums(const float* weights, int64_t row_stride, int64_t query_stride, Field numbers, Field scale,
                     Field zero, float* out, int rows, int pages, int threads) {
  const Side side = {numbers, scale, zero};
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows / HEADS * pages; unit++) {
    const int team = unit / pages, page = unit % pages;
    alignas(64) float token[ROWS][PADDED] = {}, total[HEADS * QUERIES][PADDED] = {};
    float own[ROWS][RANK];
    for (int step = 0; step < STEPS; step++) {
      for (int source = 0; source < HEADS; source++) {
        unpacked(side, team * HEADS + source, page, step, own);
        for (int t = 0; t < ROWS; t++) memcpy(token[t] + source * RANK, own[t], sizeof own[t]);
      }
      for (int head = 0; head < HEADS; head++)
        for (int q = 0; q < QUERIES; q++) {
          const float* weight = weights + (team * HEADS + head) * row_stride + q * query_stride;
          weight += (int64_t)page * TOKENS + step * ROWS;
          Lanes* sums = (Lanes*)total[head * QUERIES + q];
          for (int t = 0; t < ROWS; t++)
            for (int i = 0; i < PADDED / WIDE; i++) sums[i] += weight[t] * ((const Lanes*)token[t])[i];
        }
    }
    for (int i = 0; i < HEADS * QUERIES; i++)
      memcpy(out + ((int64_t)unit * HEADS * QUERIES + i) * FEATURES, total[i], FEATURES * sizeof(float));
  }
}
