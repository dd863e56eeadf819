// Planes of tokens side by side: what the CPU kernels for keys that are turned compute with.
#pragma once
#include "cpu.h"

// What the processor computes side by side.
#ifdef __AVX512F__
constexpr int WIDE = 16;
#else
constexpr int WIDE = 8;
#endif
typedef float Lanes __attribute__((vector_size(4 * WIDE), may_alias));

// Sums of rows of x by their weights, `outs` of them at a time so that what is loaded serves them all.
template <int outs>
static inline void weighted(const float* weights, int count, const float (*x)[ROWS], float* out, int64_t apart) {
  Lanes sums[outs][ROWS / WIDE] = {};
  for (int k = 0; k < count; k++)
    for (int o = 0; o < outs; o++)
      for (int i = 0; i < ROWS / WIDE; i++) sums[o][i] += weights[o * count + k] * ((const Lanes*)x[k])[i];
  for (int o = 0; o < outs; o++) memcpy(out + o * apart, sums[o], sizeof sums[o]);
}

// Any number of sums, as many at a time as there are registers for.
template <int outs>
static inline void all_weighted(const float* weights, int count, const float (*x)[ROWS], float* out, int64_t apart) {
  constexpr int many = WIDE == 16 ? 8 : 3, rest = outs % many;
  int o = 0;
  for (; o + many <= outs; o += many) weighted<many>(weights + o * count, count, x, out + o * apart, apart);
  if constexpr (rest > 0) weighted<rest>(weights + o * count, count, x, out + o * apart, apart);
}
