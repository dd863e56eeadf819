// What `rotated.cu` wants besides (see `cuda_on_cpu.h`).

#include "cuda_on_cpu.h"

static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  return pair(fmaf(low(a), low(b), low(c)), fmaf(high(a), high(b), high(c)));
}
static Dim gridDim;
static float cos_(float x) { return cosf(x); }
static float sin_(float x) { return sinf(x); }
static float rsqrtf(float x) { return 1 / sqrtf(x); }
static unsigned atomicOr(unsigned* at, unsigned x) { const unsigned old = *at; return *at |= x, old; }
