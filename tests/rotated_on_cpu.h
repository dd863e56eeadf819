// What `rotated.cu` wants besides (see `cuda_on_cpu.h`).

#include "cuda_on_cpu.h"

static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  return pair(fmaf(low(a), low(b), low(c)), fmaf(high(a), high(b), high(c)));
}
static uint32_t add2(uint32_t a, uint32_t b) { return pair(low(a) + low(b), high(a) + high(b)); }
static uint32_t sub2(uint32_t a, uint32_t b) { return pair(low(a) - low(b), high(a) - high(b)); }
static void mma_half(uint32_t (&c)[2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  float sum[4] = {};
  mma(sum, a0, a1, a2, a3, b0, b1);
  c[0] = pair(sum[0], sum[1]), c[1] = pair(sum[2], sum[3]);
}
static Dim gridDim;
static float cos_(float x) { return cosf(x); }
static float sin_(float x) { return sinf(x); }
static float rsqrtf(float x) { return 1 / sqrtf(x); }
static unsigned atomicOr(unsigned* at, unsigned x) { const unsigned old = *at; return *at |= x, old; }
