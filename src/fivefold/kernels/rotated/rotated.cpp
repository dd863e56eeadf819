// Scores of rotated keys, as `reference.py` has it, a plane at a time: keys never leave the processor's first caches.
// BITS, PLANES, D (head_dim), GROUP (channels that share a scale), HEADS (rows that are together), N (order of the
// Hadamard matrix), CORE (order of its core), PAIRS (that RoPE turns), QUERIES.
#include "../lanes.h"

constexpr int CHANNELS = HEADS * D, GROUPS = D / GROUP;
using Columns = float[CHANNELS][ROWS];  // a channel's tokens side by side

constexpr int at_a_time(int count) { return count % 3 == 0 ? 3 : count % 2 == 0 ? 2 : 1; }

// Every CORE channels of x times the core, into y.
static void times_core(const Columns& x, Columns& y, const float* core) {
  for (int first = 0; first < CHANNELS; first += CORE)
    for (int i = 0; i < CORE; i += at_a_time(CORE))
      weighted<at_a_time(CORE)>(core + i * CORE, CORE, x + first, y[first + i], ROWS);
}

// Sylvester's doublings of every N channels, from blocks of `step` on.
static void butterflies(Columns& x, int step) {
  for (; 4 * step <= N; step *= 4)
    for (int first = 0; first < CHANNELS; first += 4 * step)
      for (int i = first; i < first + step; i++)
        for (int t = 0; t < ROWS; t++) {
          const float a = x[i][t], b = x[i + step][t], c = x[i + 2 * step][t], d = x[i + 3 * step][t];
          const float e = a + b, f = a - b, g = c + d, h = c - d;
          x[i][t] = e + g, x[i + step][t] = f + h, x[i + 2 * step][t] = e - g, x[i + 3 * step][t] = f - h;
        }
  for (; 2 * step <= N; step *= 2)
    for (int first = 0; first < CHANNELS; first += 2 * step)
      for (int i = first; i < first + step; i++)
        for (int t = 0; t < ROWS; t++) {
          const float a = x[i][t], b = x[i + step][t];
          x[i][t] = a + b, x[i + step][t] = a - b;
        }
}

// queries: [rows, QUERIES, D], times N^-1/2; order: which channel every sorted one is, [teams, CHANNELS], teams
// `order_team` apart; cosine, sine: [teams, PAIRS, PLANES, pages, ROWS], teams `wave_team` apart;
// out: [rows, QUERIES, pages, PLANES * ROWS].
extern "C" void scores(const float* queries, Field words, Field scale, Field zero, const int64_t* order,
                       int64_t order_team, const float* core, const float* cosine, const float* sine,
                       int64_t wave_team, float* out, int rows, int pages, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int unit = 0; unit < rows / HEADS * pages; unit++) {
    const int team = unit / pages, page = unit % pages;
    const int64_t* place = order + team * order_team;
    alignas(64) Columns x, y;
    for (int plane = 0; plane < PLANES; plane++) {
      for (int head = 0; head < HEADS; head++) {
        const int row = team * HEADS + head;
        const uint16_t* word = words.of(row, page);
        for (int group = 0; group < GROUPS; group++) {
          float steps[ROWS], lows[ROWS];
          halves(scale.of(row, page) + (plane * GROUPS + group) * ROWS, steps, ROWS);
          halves(zero.of(row, page) + (plane * GROUPS + group) * ROWS, lows, ROWS);
          for (int c = group * GROUP; c < (group + 1) * GROUP; c++) {
            float* to = x[place[head * D + c]];
            for (int t = 0; t < ROWS; t++) to[t] = code(word[c * ROWS + t], plane) * steps[t] + lows[t];
          }
        }
      }
      times_core(x, y, core);
      butterflies(y, CORE);
      const int64_t phase = team * wave_team + ((int64_t)plane * pages + page) * ROWS, next = (int64_t)PLANES * pages * ROWS;
      for (int pair = 0; pair < PAIRS; pair++) {
        const float *c = cosine + phase + pair * next, *s = sine + phase + pair * next;
        for (int head = 0; head < HEADS; head++) {
          float *even = y[head * D + 2 * pair], *odd = y[head * D + 2 * pair + 1];
          for (int t = 0; t < ROWS; t++) {
            const float a = even[t], b = odd[t];
            even[t] = a * c[t] - b * s[t], odd[t] = b * c[t] + a * s[t];
          }
        }
      }
      for (int row = team * HEADS; row < (team + 1) * HEADS; row++)
        for (int q = 0; q < QUERIES; q += at_a_time(QUERIES))
          weighted<at_a_time(QUERIES)>(queries + (row * QUERIES + q) * D, D, y + row % HEADS * D,
                                       out + ((((int64_t)row * QUERIES + q) * pages + page) * PLANES + plane) * ROWS,
                                       (int64_t)pages * PLANES * ROWS);
    }
  }
}
