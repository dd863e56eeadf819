// Tokens into planar pages, bit for bit as `reference.py` has it: D (head_dim), EXACT (the tokens' numbers: 0 float32,
// 1 bfloat16, 2 float16), BITS, GROUP (tokens of a key's group), CHANNELS (of a value's group).
//
// Compiled without what changes the order of arithmetic. A side of a page (keys or values) is one piece of work: its
// words are put together on the stack and written once, so that planes that were there before are never seen changed.
#include "../cpu.h"

#include <utility>

constexpr int TOKENS = FIELDS * ROWS, KEY_GROUPS = TOKENS / GROUP, SHARE = GROUP / ROWS, GROUPS = D / CHANNELS;
// Numbers of 16 bits: of the scales (or zero points) of keys, and of values; of the keys' side, and of a record.
constexpr int KEY_SCALES = KEY_GROUPS * D, VALUE_SCALES = TOKENS * GROUPS;
constexpr int KEY_SIDE = ROWS * D + 2 * KEY_SCALES, RECORD = KEY_SIDE + ROWS * D + 2 * VALUE_SCALES;

constexpr int WHOLE = CHANNELS;  // channels that are worked on together
#include "../vectors.h"

template <class V, class X>
static inline void write(V v, X* to) {
  memcpy(to, &v, sizeof v);
}

// Of equal ones the second, which matters for zeros.
static inline vec less(vec a, vec b) { return a < b ? a : b; }
static inline ints larger(ints a, ints b) { return a > b ? a : b; }

// Of lanes that differ in bit S: what `of` says of them, a's where the bit is 0.
template <int S, class Of, int... I>
static inline vec fold(vec a, vec b, Of of, std::integer_sequence<int, I...>) {
  return of(SHUFFLE(a, b, (I & S ? I + W : I)...), SHUFFLE(a, b, (I & S ? I - S + W : I + S)...));
}
// Lane i of the result is what `of` says of the lanes of v[i].
template <int S = W / 2, class Of>
static inline vec across(vec* v, Of of) {
  for (int i = 0; i < S; i++) v[i] = fold<S>(v[i], v[i + S], of, std::make_integer_sequence<int, W>());
  if constexpr (S > 1) return across<S / 2>(v, of);
  return v[0];
}

template <class S = shorts, class V>
static inline S narrowed(V x) {  // to float16, half to even
#if defined(__AVX512F__)
  if constexpr (W == 16) return (S)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
#if defined(__F16C__)
  if constexpr (W == 8) return (S)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
  const ints bits = (ints)x & 0x7fffffff;
  const ints small = (ints)((vec)bits + 0.5f) - 0x3f000000;  // subnormal: adding 0.5 rounds, in the low bits
  ints out = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  out = bits < 0x38800000 ? small : out;
  out = bits >= 0x477ff000 ? ints{} + 0x7c00 : out;  // rounds to more than there is
  return __builtin_convertvector(out | ((ints)x >> 16 & 0x8000), shorts);
}

#if EXACT == 0
typedef float Number;
static inline vec load(const float* from) { return read<vec>(from); }
#elif EXACT == 1
typedef uint16_t Number;
static inline vec load(const uint16_t* from) {
  return widened(read<shorts>(from));
}
#else
typedef uint16_t Number;
static inline vec load(const uint16_t* from) { return halved(read<shorts>(from)); }
#endif

// -- groups --------------------------------------------------------------------------------------------------

// What numbers of a group are quantised with, and their ends before.
struct Group {
  vec low, high;

  void see(vec x, ints& most) {
    low = less(x, low), high = more(x, high);
    most = larger(most, (ints)x & 0x7fffffff);  // not a number is more than infinity
  }
  // Writes scale and zero point; ends become step and zero point.
  void finish(uint16_t* scale, uint16_t* zero) {
    const shorts start = narrowed(low);
    low = halved(start);
    const shorts step = narrowed(more(high - low, vec{}) / (float)MASK);
    high = halved(step);
    high = high > vec{} ? high : all(1);
    write(step, scale), write(start, zero);
  }
};

static inline void put(vec x, vec zero, vec step, int shift, uint16_t* words) {
  // Adding 1.5 * 2**23 rounds half to even, and leaves the whole number in the low bits.
  const vec y = less(more((x - zero) / step, vec{}), all(MASK)) + 12582912.0f;
  write(read<shorts>(words) | __builtin_convertvector(((ints)y & MASK) << shift, shorts), words);
}

// A group of keys: SHARE planes from `plane` on; scale, zero: [D].
static void pack_keys(const Number* const* sources, int plane, uint16_t* words, uint16_t* scale, uint16_t* zero,
                      ints& most) {
  for (int c = 0; c < D; c += W) {
    const vec first = load(sources[0] + c);
    Group group{first, first};
    for (int i = 0; i < SHARE; i++)
      for (int r = 0; r < ROWS; r++) group.see(load(sources[i] + r * D + c), most);
    group.finish(scale + c, zero + c);
    for (int i = 0; i < SHARE; i++)
      for (int r = 0; r < ROWS; r++)
        put(load(sources[i] + r * D + c), group.low, group.high, BITS * (plane + i), words + r * D + c);
  }
}

// A plane of values, W tokens at a time, whose ends then lie side by side as their scales do; scale, zero: [GROUPS, 32].
static void pack_values(const Number* source, int plane, uint16_t* words, uint16_t* scale, uint16_t* zero,
                        ints& most) {
  for (int r = 0; r < ROWS; r += W)
    for (int g = 0; g < GROUPS; g++) {
      const Number* own = source + r * D + g * CHANNELS;
      vec lows[W], highs[W];
      for (int t = 0; t < W; t++) {
        const vec first = load(own + t * D);
        Group part{first, first};
        for (int c = 0; c < CHANNELS; c += W) part.see(load(own + t * D + c), most);
        lows[t] = part.low, highs[t] = part.high;
      }
      Group group{across(lows, less), across(highs, more)};
      // Of zeros of both signs the first counts.
      const ints zeros = group.low == vec{};
      uint64_t any[W / 2], found = 0;
      memcpy(any, &zeros, sizeof any);
      for (uint64_t x : any) found |= x;
      if (found)
        for (int t = 0; t < W; t++)
          for (int c = 0; zeros[t] && c < CHANNELS; c += W) {
            const vec x = load(own + t * D + c);
            int i = 0;
            while (i < W && x[i] != 0) i++;
            if (i == W) continue;
            group.low[t] = x[i];
            break;
          }
      group.finish(scale + g * ROWS + r, zero + g * ROWS + r);
      for (int t = 0; t < W; t++)
        for (int c = 0; c < CHANNELS; c += W)
          put(load(own + t * D + c), all(group.low[t]), all(group.high[t]), BITS * plane,
              words + (r + t) * D + g * CHANNELS + c);
    }
}

// -- pages ---------------------------------------------------------------------------------------------------

// `planes` planes of pages, from a plane on; words behind them become 0, and if it is the first plane scales do too.
// Exact pages lie at sources [pages, planes, 2] and are packed into places [pages, 2] (address, plane; addresses in
// units of 16 bytes); where there are none, keys and values [pages, planes * 32, D] into records [pages, RECORD], from
// `plane` on. Returns the largest absolute value, infinity for what is not a number.
extern "C" float pack(const int64_t* sources, const int64_t* places, const Number* keys, const Number* values,
                      uint16_t* records, int plane, int pages, int planes, int threads) {
  int32_t peak = 0;
  if ((int64_t)pages * planes * ROWS * D < 1 << 18) threads = 1;  // a fifth of a millisecond: not worth waking any
#pragma omp parallel for schedule(static) reduction(max : peak) num_threads(threads) if (threads > 1)
  for (int unit = 0; unit < 2 * pages; unit++) {
    const int64_t item = unit / 2;
    const int side = unit % 2, first = sources ? (int)places[item * 2 + 1] : plane;
    const Number* from[FIELDS];
    for (int j = 0; j < planes; j++)
      from[j] = sources ? (const Number*)(sources[(item * planes + j) * 2 + side] * 16)
                        : (side ? values : keys) + (item * planes + j) * ROWS * D;
    uint16_t* record = (sources ? (uint16_t*)(places[item * 2] * 16) : records + item * RECORD) + side * KEY_SIDE;
    // A row of scales: of keys a group's, of values a plane's.
    const int row = side ? ROWS * GROUPS : D, rows = side ? VALUE_SCALES : KEY_SCALES;
    uint16_t *scale = record + ROWS * D, *zero = scale + rows;

    alignas(64) uint16_t words[ROWS * D];
    const uint16_t kept = (uint16_t)((1 << BITS * first) - 1);
    for (int i = 0; i < ROWS * D; i++) words[i] = record[i] & kept;
    ints most{};
    for (int j = 0; j < planes; j += side ? 1 : SHARE) {
      const int at = (first + j) / (side ? 1 : SHARE) * row;
      if (side)
        pack_values(from[j], first + j, words, scale + at, zero + at, most);
      else
        pack_keys(from + j, first + j, words, scale + at, zero + at, most);
    }
    memcpy(record, words, sizeof words);
    if (!first) {
      const int done = planes / (side ? 1 : SHARE) * row;
      memset(scale + done, 0, (rows - done) * sizeof *scale), memset(zero + done, 0, (rows - done) * sizeof *zero);
    }
    for (int i = 0; i < W; i++) peak = std::max(peak, (int32_t)most[i]);
  }
  peak = std::min(peak, 0x7f800000);
  float out;
  memcpy(&out, &peak, sizeof out);
  return out;
}
