// One decoding step over packed and exact pages where they lie, as `reference.py` has it: D (head_dim), QUERIES (of a
// row), EXACT (numbers of exact pages: 0 float32, 1 bfloat16, 2 float16), and of packed pages BITS (0: there are none),
// GROUP and CHANNELS.
//
// Rows are cut into units of some hundred tokens, which threads take one after the other, however long the rows are;
// what units leave of a row is merged at the end. A unit goes through its tokens 32 at a time: scores of all queries,
// their exponentials, values. Only what is seen is read.
#include "../cpu.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

constexpr int BLOCK = 32;  // tokens of a block, of a plane and of an exact page
constexpr float LOWEST = -1e30f;

#if BITS
constexpr int TOKENS = FIELDS * ROWS, KEY_GROUPS = TOKENS / GROUP, GROUPS = D / CHANNELS;
// Where the fields of a record begin, in numbers of 16 bits.
constexpr int KEY_SCALE = ROWS * D, KEY_ZERO = KEY_SCALE + KEY_GROUPS * D, VALUE_WORDS = KEY_ZERO + KEY_GROUPS * D;
constexpr int VALUE_SCALE = VALUE_WORDS + ROWS * D, VALUE_ZERO = VALUE_SCALE + TOKENS * GROUPS;
// Channels that share a scale must be whole vectors for planes to be read as they lie; else tokens are unpacked.
constexpr bool PLANAR = CHANNELS % 4 == 0;
constexpr int WHOLE = PLANAR ? CHANNELS : D;
#else
constexpr int WHOLE = D, TOKENS = BLOCK;
#endif

#include "../vectors.h"

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 24;
#else
constexpr int REGISTERS = 12;
#endif

constexpr int P = BLOCK / W;  // vectors of a block's scores
// Tokens whose keys are in registers together, and the queries and vectors whose sums of values are.
constexpr int TOGETHER = N >= 8 ? 1 : std::min(W, 8 / N);
constexpr int PASSES = (QUERIES + REGISTERS - 1) / REGISTERS, SHARE = (QUERIES + PASSES - 1) / PASSES;
constexpr int fitting(int most) { return N % most == 0 ? most : fitting(most - 1); }
constexpr int SIDE = fitting(std::max(1, std::min(N, REGISTERS / SHARE)));

// -- vectors -------------------------------------------------------------------------------------------------

using Lanes = std::make_integer_sequence<int, W>;
template <int... I>
static constexpr ints counted(std::integer_sequence<int, I...>) {
  return ints{I...};
}

// Of lanes that differ in bit S: those of a and b added up, a's where the bit is 0.
template <int S, class V, int... I>
static inline V fold(V a, V b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, (I & S ? I + W : I)...) + SHUFFLE(a, b, (I & S ? I - S + W : I + S)...);
}
template <int S, class V, int... I>
static inline V swapped(V a, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, a, (I ^ S)...);
}

// Lane i of the result is the sum of v[i].
template <int S = W / 2>
static inline vec across(vec* v) {
  for (int i = 0; i < S; i++) v[i] = fold<S>(v[i], v[i + S], Lanes());
  if constexpr (S > 1) return across<S / 2>(v);
  return v[0];
}
// The sum, or the largest number, of a vector in every lane.
template <int S = W / 2>
static inline vec sum(vec v) {
  v += swapped<S>(v, Lanes());
  if constexpr (S > 1) return sum<S / 2>(v);
  return v;
}
template <int S = W / 2>
static inline vec most(vec v) {
  v = more(v, swapped<S>(v, Lanes()));
  if constexpr (S > 1) return most<S / 2>(v);
  return v;
}

// 2**x of x <= 0, with a relative error below 2e-7; 0 below 2**-126.
static inline vec exp2(vec x) {
  x = x < -127.0f ? all(-127.0f) : x;
  const ints whole = __builtin_convertvector(x - 0.5f, ints);
  const vec f = x - __builtin_convertvector(whole, vec);
  vec y = f * 0.000154615642f + 0.00133909821f;
  y = y * f + 0.00961805601f;
  y = y * f + 0.0555035695f;
  y = y * f + 0.240226507f;
  y = y * f + 0.693147182f;
  return (y * f + 1.0f) * (vec)((whole + 127) << 23);
}

// e**x of x <= 0. Scores stay natural until their maximum is off: rounding is then that of what is left, which is small
// where it counts.
static inline vec power(vec x) { return exp2(x * 1.44269504f); }

// -- numbers of memory ---------------------------------------------------------------------------------------

struct Single {
  typedef float Number;
  static vec read(const float* from) { return ::read<vec>(from); }
  static void write(float x, float* to) { *to = x; }
};
struct Brain {
  typedef uint16_t Number;
  static vec read(const uint16_t* from) { return widened(::read<shorts>(from)); }
  static void write(float x, uint16_t* to) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    *to = x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : 0x7fc0;
  }
};
struct Half {
  typedef uint16_t Number;
  static vec read(const uint16_t* from) { return halved(::read<shorts>(from)); }
  static void write(float x, uint16_t* to) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    uint32_t out;
    if (bits > 0x7f800000) {
      out = 0x7e00;
    } else if (bits >= 0x477ff000) {  // rounds to more than there is
      out = 0x7c00;
    } else if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded number in the low bits
      float y;
      memcpy(&y, &bits, sizeof y);
      y += 0.5f;
      memcpy(&out, &y, sizeof out);
      out -= 0x3f000000;
    } else {
      out = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
    }
    *to = sign | out;
  }
};
#if EXACT == 0
using Page = Single;
#elif EXACT == 1
using Page = Brain;
#else
using Page = Half;
#endif

// -- blocks --------------------------------------------------------------------------------------------------

// Tokens anywhere in memory. Where keys point beyond `count`, they repeat the last.
template <class Type>
struct Block {
  int count = 0;
  const typename Type::Number *keys[BLOCK], *values[BLOCK];

  vec key(int t, int c) const { return Type::read(keys[t] + c * W); }
  vec value(int t, int c) const { return Type::read(values[t] + c * W); }
  // Ask for the first `most` tokens, which are needed soon.
  void ask(int most) const {
    for (int t = 0; t < std::min(count, most); t++)
      for (int at = 0; at < D * (int)sizeof *keys[t]; at += 64)
        __builtin_prefetch((const char*)keys[t] + at, 0, 2), __builtin_prefetch((const char*)values[t] + at, 0, 2);
  }
  void finish() {
    for (int t = count; t % W; t++) keys[t] = keys[count - 1];
  }
};

// What a unit has gathered: the largest score, in every lane; sums of weights, lane by lane; weighted sums of values.
struct Sums {
  vec top[QUERIES], total[QUERIES], acc[QUERIES][N];
  // Where the scores of the tokens that come next are wanted, if they are: of a query `stride` numbers behind another's.
  float* wanted = nullptr;
  int64_t stride = 0;

  void keep(const float* scores, int q, int count) { memcpy(wanted + q * stride, scores, count * sizeof *scores); }
  Sums() {
    for (int q = 0; q < QUERIES; q++) {
      top[q] = all(LOWEST), total[q] = vec{};
      for (int c = 0; c < N; c++) acc[q][c] = vec{};
    }
  }
};
struct Scores {
  vec at[QUERIES][P], shrink[QUERIES];
  bool shrinks;
};

template <class From>
static inline void score(const vec (*queries)[N], const From& from, int count, Scores& s) {
  for (int part = 0; part < P; part++) {
    if (part * W >= count) {
      for (int q = 0; q < QUERIES; q++) s.at[q][part] = vec{};
      continue;
    }
    vec sums[QUERIES][W];
    for (int t = 0; t < W; t += TOGETHER) {
      vec x[TOGETHER][N];
      for (int i = 0; i < TOGETHER; i++)
        for (int c = 0; c < N; c++) x[i][c] = from.key(part * W + t + i, c);
      for (int q = 0; q < QUERIES; q++)
        for (int i = 0; i < TOGETHER; i++) {
          vec dot = x[i][0] * queries[q][0];
          for (int c = 1; c < N; c++) dot += x[i][c] * queries[q][c];
          sums[q][t + i] = dot;
        }
    }
    for (int q = 0; q < QUERIES; q++) s.at[q][part] = across(sums[q]);
  }
}

// Scores into weights, of tokens [low, high) of a block; those of others become 0.
static inline void soften(Sums& sums, Scores& s, int low, int high) {
  s.shrinks = false;
  for (int q = 0; q < QUERIES; q++) {
    if (low > 0 || high < BLOCK)
      for (int part = 0; part < P; part++) {
        const ints t = counted(Lanes()) + part * W;
        s.at[q][part] = ((t >= low) & (t < high)) ? s.at[q][part] : all(-INFINITY);
      }
    vec top = s.at[q][0];
    for (int part = 1; part < P; part++) top = more(s.at[q][part], top);
    top = more(most(top), sums.top[q]);
    if (top[0] > sums.top[q][0]) {
      s.shrink[q] = power(sums.top[q] - top), s.shrinks = true;
      sums.top[q] = top, sums.total[q] *= s.shrink[q];
    } else {
      s.shrink[q] = all(1);
    }
    for (int part = 0; part < P; part++) sums.total[q] += s.at[q][part] = power(s.at[q][part] - sums.top[q]);
  }
}

// weight(q, c): the weights of the block's tokens, for vector c.
template <int FIRST, int COUNT, class From, class Weight>
static inline void add(Sums& sums, const From& from, int count, const Weight& weight, const Scores& s) {
  for (int first = 0; first < N; first += SIDE) {
    vec acc[COUNT][SIDE];
    const float* weights[COUNT][SIDE];
    for (int q = 0; q < COUNT; q++) {
      for (int c = 0; c < SIDE; c++) {
        weights[q][c] = weight(FIRST + q, first + c);
        acc[q][c] = sums.acc[FIRST + q][first + c];
      }
      if (s.shrinks)
        for (int c = 0; c < SIDE; c++) acc[q][c] *= s.shrink[FIRST + q];
    }
    for (int t = 0; t < count; t++) {
      for (int c = 0; c < SIDE; c++) {
        const vec x = from.value(t, first + c);
        for (int q = 0; q < COUNT; q++) acc[q][c] += x * weights[q][c][t];
      }
    }
    for (int q = 0; q < COUNT; q++)
      for (int c = 0; c < SIDE; c++) sums.acc[FIRST + q][first + c] = acc[q][c];
  }
  if constexpr (FIRST + COUNT < QUERIES)
    add<FIRST + COUNT, std::min(COUNT, QUERIES - FIRST - COUNT)>(sums, from, count, weight, s);
}

template <class Type>
static inline void attend(Sums& sums, const vec (*queries)[N], const Block<Type>& block) {
  Scores s;
  score(queries, block, block.count, s);
  if (sums.wanted) {
    for (int q = 0; q < QUERIES; q++) sums.keep((const float*)s.at[q], q, block.count);
    sums.wanted += block.count;
  }
  soften(sums, s, 0, block.count);
  add<0, SHARE>(sums, block, block.count, [&](int q, int) { return (const float*)s.at[q]; }, s);
}

// -- exact tokens --------------------------------------------------------------------------------------------

struct Range {
  int first, stop;
  int count() const { return std::max(0, stop - first); }
};

// The exact slots of a row that are seen, one range behind the other.
struct Seen {
  Range ranges[3];

  Seen(const int* span, int columns, int slots) {
    const int stop = std::min(span[4], slots), start = std::max(0, span[3]);
    const int sinks = std::min(std::max(0, span[2]), stop);
    ranges[0] = {0, sinks};
    ranges[1] = columns > 6 ? Range{std::max(sinks, span[5]), std::min({span[6], start, stop})} : Range{0, 0};
    ranges[2] = {std::max(sinks, start), stop};
  }
  int count() const { return ranges[0].count() + ranges[1].count() + ranges[2].count(); }
};

template <class T>
static inline const T* address(int64_t of) {
  return (const T*)(of * 16);
}

// Goes through a unit's exact tokens, [first, stop) of those that are seen.
struct Walk {
  static constexpr int AHEAD = 8;  // the processor sees by itself that it goes on
  const int64_t* table;
  const Range* range;
  int slot, left;

  Walk(const int64_t* table, const Seen& seen, int first, int stop)
      : table(table), range(seen.ranges), left(stop - first) {
    while (first >= range->count()) first -= range++->count();
    slot = range->first + first;
  }
  void fill(Block<Page>& block) {
    block.count = std::min(left, BLOCK);
    left -= block.count;
    for (int t = 0; t < block.count;) {
      while (slot >= range->stop) slot = (++range)->first;
      const int inside = slot % BLOCK, run = std::min({block.count - t, BLOCK - inside, range->stop - slot});
      const int64_t* page = table + slot / BLOCK * 2;
      const Page::Number *keys = address<Page::Number>(page[0]), *values = address<Page::Number>(page[1]);
      for (int i = 0; i < run; i++) {
        block.keys[t + i] = keys + (inside + i) * D;
        block.values[t + i] = values + (inside + i) * D;
      }
      t += run, slot += run;
    }
    block.finish();
  }
};

// The same for slots that are named; negative ones, and such as there are none of, are left out.
struct Picked {
  static constexpr int AHEAD = BLOCK;
  const int64_t* table;
  const int* picks;
  int left, slots;

  void fill(Block<Page>& block) {
    block.count = 0;
    for (; left > 0 && block.count < BLOCK; left--) {
      const int slot = *picks++;
      if (slot < 0 || slot >= slots) continue;
      const int64_t* page = table + slot / BLOCK * 2;
      block.keys[block.count] = address<Page::Number>(page[0]) + slot % BLOCK * D;
      block.values[block.count++] = address<Page::Number>(page[1]) + slot % BLOCK * D;
    }
    block.finish();
  }
};

template <class Tokens>
static void attend_exact(Sums& sums, const vec (*queries)[N], Tokens tokens) {
  Block<Page> blocks[2];
  tokens.fill(blocks[0]);
  for (int turn = 0; blocks[turn].count; turn = 1 - turn) {
    tokens.fill(blocks[1 - turn]);
    blocks[1 - turn].ask(Tokens::AHEAD);
    attend(sums, queries, blocks[turn]);
  }
}

// -- packed tokens -------------------------------------------------------------------------------------------

#if BITS
// A packed token as it was.
static void unpack(const uint16_t* record, int inside, float* key, float* value) {
  const int plane = inside / ROWS, r = inside % ROWS;
  const uint16_t *words = record + r * D, *scale = record + KEY_SCALE + inside / GROUP * D;
  for (int c = 0; c < D; c++) key[c] = code(words[c], plane) * half(scale[c]) + half(scale[KEY_GROUPS * D + c]);
  words += VALUE_WORDS;
  for (int g = 0; g < GROUPS; g++) {
    const uint16_t* own = record + VALUE_SCALE + (plane * GROUPS + g) * ROWS + r;
    const float step = half(own[0]), low = half(own[TOKENS * GROUPS]);
    for (int c = g * CHANNELS; c < (g + 1) * CHANNELS; c++) value[c] = code(words[c], plane) * step + low;
  }
}

// Packed slots one by one: those from `slot` on, or, if there are, `picks`.
static void attend_unpacked(Sums& sums, const vec (*queries)[N], const int64_t* table, int slot, const int* picks,
                            int left, int slots) {
  alignas(64) float keys[BLOCK][D], values[BLOCK][D];
  Block<Single> block;
  for (int t = 0; t < BLOCK; t++) block.keys[t] = keys[t], block.values[t] = values[t];
  while (left > 0) {
    block.count = 0;
    for (; left > 0 && block.count < BLOCK; left--) {
      const int at = picks ? *picks++ : slot++;
      if (at < 0 || at >= slots) continue;
      unpack(address<uint16_t>(table[at / TOKENS]), at % TOKENS, keys[block.count], values[block.count]);
      block.count++;
    }
    if (!block.count) return;
    for (int t = block.count; t % W; t++) memcpy(keys[t], keys[block.count - 1], sizeof keys[t]);
    attend(sums, queries, block);
  }
}

// A plane of a page, its codes where they lie: as whole numbers, 2**(BITS * plane) times too large.
struct Plane {
  const uint16_t* record;
  int mask;

  vec at(const uint16_t* words) const {
    return __builtin_convertvector(__builtin_convertvector(read<shorts>(words), ints) & mask, vec);
  }
  vec key(int t, int c) const { return at(record + t * D + c * W); }
  vec value(int t, int c) const { return at(record + VALUE_WORDS + t * D + c * W); }
};

// Packed slots [low, high), a plane at a time.
static void attend_planes(Sums& sums, const vec (*queries)[N], const int64_t* table, int low, int high) {
  vec lows[QUERIES][GROUPS];  // the values' zero points, weighted
  for (int q = 0; q < QUERIES; q++)
    for (int g = 0; g < GROUPS; g++) lows[q][g] = vec{};
  for (int first = low / ROWS * ROWS; first < high; first += ROWS) {
    const uint16_t* record = address<uint16_t>(table[first / TOKENS]);
    const int plane = first % TOKENS / ROWS;
    const int begin = std::max(0, low - first), end = std::min(ROWS, high - first);
    const Plane own{record, MASK << BITS * plane};
    const float unit = 1.0f / (1 << BITS * plane);
    if (first + TOKENS < high) {  // this share of the next page is needed soon
      constexpr int BYTES = 2 * (VALUE_ZERO + TOKENS * GROUPS) / FIELDS;
      const char* next = (const char*)address<uint16_t>(table[first / TOKENS + 1]) + plane * BYTES;
      for (int at = 0; at < BYTES; at += 64) __builtin_prefetch(next + at);
    }

    vec scaled[QUERIES][N], offset[QUERIES];
    for (int q = 0; q < QUERIES; q++) offset[q] = vec{};
    for (int c = 0; c < N; c++) {  // a channel's scale goes into the query
      const uint16_t* scale = record + KEY_SCALE + plane * ROWS / GROUP * D + c * W;
      const vec step = halved(read<shorts>(scale)) * unit, zero = halved(read<shorts>(scale + KEY_GROUPS * D));
      for (int q = 0; q < QUERIES; q++) scaled[q][c] = queries[q][c] * step, offset[q] += queries[q][c] * zero;
    }
    Scores s;
    score(scaled, own, ROWS, s);
    for (int q = 0; q < QUERIES; q++) {
      const vec added = sum(offset[q]);
      for (int part = 0; part < P; part++) s.at[q][part] += added;
    }
    if (sums.wanted) {
      for (int q = 0; q < QUERIES; q++) sums.keep((const float*)s.at[q] + begin, q, end - begin);
      sums.wanted += end - begin;
    }
    soften(sums, s, begin, end);

    // A token's scale goes into its weight.
    vec weights[QUERIES][GROUPS][P];
    if (s.shrinks)
      for (int q = 0; q < QUERIES; q++)
        for (int g = 0; g < GROUPS; g++) lows[q][g] *= s.shrink[q];
    for (int g = 0; g < GROUPS; g++)
      for (int part = 0; part < P; part++) {
        const uint16_t* scale = record + VALUE_SCALE + (plane * GROUPS + g) * ROWS + part * W;
        vec step = halved(read<shorts>(scale)) * unit, zero = halved(read<shorts>(scale + TOKENS * GROUPS));
        if (begin > 0 || end < ROWS) {  // what is not seen may be anything
          const ints t = counted(Lanes()) + part * W, seen = (t >= begin) & (t < end);
          step = seen ? step : vec{}, zero = seen ? zero : vec{};
        }
        for (int q = 0; q < QUERIES; q++)
          weights[q][g][part] = s.at[q][part] * step, lows[q][g] += s.at[q][part] * zero;
      }
    add<0, SHARE>(sums, own, ROWS, [&](int q, int c) { return (const float*)weights[q][c * W / CHANNELS]; }, s);
  }
  for (int q = 0; q < QUERIES; q++)
    for (int g = 0; g < GROUPS; g++) {
      const vec low = sum(lows[q][g]);
      for (int c = g * CHANNELS / W; c < (g + 1) * CHANNELS / W; c++) sums.acc[q][c] += low;
    }
}
#endif

// -- the step ------------------------------------------------------------------------------------------------

template <class Type>
static void read_queries(const void* queries, int row, float scale, vec (*out)[N]) {
  const auto* from = (const typename Type::Number*)queries + (int64_t)row * QUERIES * D;
  for (int q = 0; q < QUERIES; q++)
    for (int c = 0; c < N; c++) out[q][c] = Type::read(from + q * D + c * W) * scale;
}

constexpr int MOST = 512;  // tokens of a unit

// A share of a row: tokens [first, stop) of those that are seen of a tier; planes of slots [first, stop) if packed.
struct Unit {
  int row, first, stop;
  bool packed;
};
// What it leaves: the largest score, and sums.
struct Part {
  float top, total, out[D];
};

template <class Type>
static void write_row(const Part* parts, int count, int q, void* out, float* lse, int64_t at) {
  float top = LOWEST, total = 0, sums[D] = {};
  for (int i = 0; i < count; i++) top = std::max(top, parts[i * QUERIES + q].top);
  for (int i = 0; i < count; i++) {
    const Part& part = parts[i * QUERIES + q];
    const float weight = power(all(part.top - top))[0];
    total += weight * part.total;
    for (int c = 0; c < D; c++) sums[c] += weight * part.out[c];
  }
  auto* to = (typename Type::Number*)out + at * D;
  const float inverse = total != 0 ? 1 / total : 0;
  for (int c = 0; c < D; c++) Type::write(sums[c] * inverse, to + c);
  if (lse) lse[at] = total != 0 ? top + std::log(total) : -INFINITY;
}

// queries, out: [rows, QUERIES, D] of numbers of `type` (as EXACT); spans: [rows, columns]. Pages' addresses are in
// units of 16 bytes: packed: [rows, packed_columns], exact: [rows, exact_columns, 2]; either may be null. picks:
// [rows, picked], or null. lse: [rows, QUERIES], or null. scores: [rows, QUERIES, stride], or null: of all tokens that
// are seen, packed ones first; only without picks.
extern "C" void decode(const void* queries, int type, float scale, const int* spans, int columns, const int64_t* packed,
                       int packed_columns, const int64_t* exact, int exact_columns, const int* picks, int picked,
                       void* out, float* lse, float* scores, int64_t stride, int rows, int threads) {
  static thread_local std::vector<Unit> units;
  static thread_local std::vector<int> starts;
  static thread_local std::vector<Part> parts;
  units.clear(), starts.assign(1, 0);
  const bool pick_packed = picks && packed, pick_exact = picks && !packed;
  const int packed_slots = packed_columns * TOKENS, exact_slots = exact_columns * BLOCK;

  int64_t tokens = 0;
  const auto counts = [&](int row, Range& packed_range, int& seen) {
    const int* span = spans + (int64_t)row * columns;
    packed_range = !packed       ? Range{0, 0}
                   : pick_packed ? Range{0, picked}
                                 : Range{std::max(0, span[0]), std::min(span[1], packed_slots)};
    seen = !exact ? 0 : pick_exact ? picked : Seen(span, columns, exact_slots).count();
  };
  for (int row = 0; row < rows; row++) {
    Range range;
    int seen;
    counts(row, range, seen);
    tokens += range.count() + seen;
  }
  // Few tokens are not worth waking threads for. Units are so small that sums keep their digits, and threads end
  // together.
  if (tokens * D * (QUERIES + 2) < 1 << 17) threads = 1;
  const int size = threads == 1 ? MOST : (int)std::min<int64_t>(MOST, std::max<int64_t>(64, tokens / (16 * threads)));
  const auto cut = [&](int row, Range range, bool packed) {
    const int count = range.count(), shares = (count + size - 1) / size;
    for (int i = 0, first = range.first; i < shares; i++) {
      int stop = range.first + (int)((int64_t)count * (i + 1) / shares);
      if (i + 1 < shares) stop -= stop % ROWS;
      if (stop > first) units.push_back({row, first, stop, packed}), first = stop;
    }
  };
  for (int row = 0; row < rows; row++) {
    Range range;
    int seen;
    counts(row, range, seen);
    cut(row, range, true), cut(row, {0, seen}, false);
    starts.push_back((int)units.size());
  }
  if (parts.size() < units.size() * QUERIES) parts.resize(units.size() * QUERIES);
  const Unit* unit = units.data();
  const int count = (int)units.size(), *start = starts.data();
  Part* part = parts.data();

#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(dynamic)
    for (int i = 0; i < count; i++) {
      const Unit own = unit[i];
      vec query[QUERIES][N];
      const auto reads = type == 0 ? read_queries<Single> : type == 1 ? read_queries<Brain> : read_queries<Half>;
      reads(queries, own.row, scale, query);
      const int* own_picks = picks ? picks + (int64_t)own.row * picked + own.first : nullptr;
      Sums sums;
      Range range;
      int seen;
      if (scores) {
        counts(own.row, range, seen);
        sums.stride = stride;
        sums.wanted = scores + own.row * QUERIES * stride + own.first + (own.packed ? -range.first : range.count());
      }
      if (own.packed) {
#if BITS
        const int64_t* table = packed + (int64_t)own.row * packed_columns;
        if (pick_packed || !PLANAR)
          attend_unpacked(sums, query, table, own.first, pick_packed ? own_picks : nullptr, own.stop - own.first,
                          packed_slots);
        else
          attend_planes(sums, query, table, own.first, own.stop);
#endif
      } else {
        const int64_t* table = exact + (int64_t)own.row * exact_columns * 2;
        if (pick_exact) {
          attend_exact(sums, query, Picked{table, own_picks, own.stop - own.first, exact_slots});
        } else {
          const Seen seen(spans + (int64_t)own.row * columns, columns, exact_slots);
          attend_exact(sums, query, Walk(table, seen, own.first, own.stop));
        }
      }
      for (int q = 0; q < QUERIES; q++) {
        Part& left = part[i * QUERIES + q];
        left.top = sums.top[q][0], left.total = sum(sums.total[q])[0];
        memcpy(left.out, sums.acc[q], sizeof left.out);
      }
    }
#pragma omp for schedule(static)
    for (int at = 0; at < rows * QUERIES; at++) {
      const int row = at / QUERIES, first = start[row];
      const auto write = type == 0 ? write_row<Single> : type == 1 ? write_row<Brain> : write_row<Half>;
      write(part + first * QUERIES, start[row + 1] - first, at % QUERIES, out, lse, at);
    }
  }
}
