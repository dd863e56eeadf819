// Vectors of the CPU kernels: W numbers, as many as the machine has in one register and as go into D (head_dim) and
// WHOLE, which whoever includes this defines before.
#pragma once
#include "cpu.h"

#include <algorithm>
#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int NATIVE = 16;
#elif defined(__AVX__)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif

constexpr int width(int most) { return D % most == 0 && WHOLE % most == 0 ? most : width(most / 2); }
constexpr int W = width(NATIVE);  // numbers of a vector
constexpr int N = D / W;          // vectors of a token

typedef float vec __attribute__((vector_size(4 * W)));
typedef int32_t ints __attribute__((vector_size(4 * W)));
typedef uint16_t shorts __attribute__((vector_size(2 * W)));

template <class V, class X>
static inline V read(const X* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

static inline vec all(float x) { return x - vec{}; }
// Of equal ones the second, which matters for zeros.
static inline vec more(vec a, vec b) { return a > b ? a : b; }

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

static inline vec widened(shorts bits) { return (vec)(__builtin_convertvector(bits, ints) << 16); }  // from bfloat16

// A template, because what is not of this width is nothing to the compiler there.
template <class V = vec, class S>
static inline V halved(S x) {  // from float16
#if defined(__AVX512F__)
  if constexpr (W == 16) return (V)_mm512_cvtph_ps((__m256i)x);
#endif
#if defined(__F16C__)
  if constexpr (W == 8) return (V)_mm256_cvtph_ps((__m128i)x);
  if constexpr (W == 4) return (V)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)&x));
#endif
  const ints bits = __builtin_convertvector(x, ints);
  return (vec)((bits & 0x7fff) << 13 | (bits & 0x8000) << 16) * 0x1p112f;
}
