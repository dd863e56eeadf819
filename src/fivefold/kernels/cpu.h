// What the CPU kernels share. Every one is compiled for the numbers it is used with (`compiled.py`).
#pragma once
#include <cstdint>
#include <cstring>

constexpr int ROWS = 32;              // tokens of a plane
#if BITS                              // of a code; 0 where nothing is packed
constexpr int FIELDS = 16 / BITS;     // planes of a sheet of words
constexpr int MASK = (1 << BITS) - 1;
#endif

// A page field of 16-bit numbers: pages lie `row` and `page` numbers apart, every page's own numbers are one run.
struct Field {
  const uint16_t* at;
  int64_t row, page;
  const uint16_t* of(int64_t r, int64_t p) const { return at + r * row + p * page; }
};

// A float16 number that is finite.
inline float half(uint16_t bits) {
  const uint32_t shifted = (uint32_t)(bits & 0x7fff) << 13 | (uint32_t)(bits & 0x8000) << 16;
  float x;
  memcpy(&x, &shifted, sizeof x);
  return x * 0x1p112f;
}

inline void halves(const uint16_t* bits, float* out, int count) {
  for (int i = 0; i < count; i++) out[i] = half(bits[i]);
}

#if BITS
// The code of a plane in a word.
inline float code(uint16_t word, int plane) { return (float)((word >> BITS * (plane % FIELDS)) & MASK); }
#endif
