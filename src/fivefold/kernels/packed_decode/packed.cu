// One share of the packed pages of a row: see cuda.py.
//
// Compiled for one form of pages: BITS, GROUP, CHANNELS, D (head_dim); UNITS of shared memory, the dtype of the QUERIES,
// SPAN columns of a table of spans, RESIDENT programs on a processor. Of other pages than KIVI's (`planar_decode`):
// BY_TOKEN, keys are quantised as values are; RECORD, a page's fields lie together (else the table has six addresses of
// each); UNBIAS and BALANCED, see `Planar`; RANK of what is added to keys and to values as a product, KEY_OUT and
// VALUE_OUT numbers of a channel and of a token that are added one by one, for up to HEADS query heads; FOUND and SCORED,
// scores of packed and of exact slots are wanted; ROOM, so many bits more than KIVI's have scales. Tables have addresses in
// units of 16 bytes, counted from base and exact_base.
// Two warps, a pair, work on a page; each takes 16 of its 32 rows and keeps a softmax of its own until the end. A program
// has PAIRS of them, which take turns with its pages. The sides of a page, keys and values, are copied into a ring of
// units ahead of their use.
//
// Products are mma.m16n8k16 with the codes on the left: a bit-field of a word, masked where it lies and read as
// float16, is the subnormal code * 2^(bit - 24). The order of channels within a product is free, so a thread takes the
// eight channels of 16 bytes as they lie. Scales go to the other side: of keys into the query, of values into the
// weights; zero points are products of their own, and so is the sum of weights: rows of ones beside the zero points. The
// powers of two are undone in float32. Rows of an operand that nobody reads the product of hold anything.
//
// The maximum of the softmax is that of the page before: only where a page has a larger one (seldom) is what was summed
// scaled down, and only there are pages masked.

#include "../hardware.cuh"

constexpr int PLANES = BITS == 2 ? 8 : BITS == 3 ? 5 : BITS == 4 ? 4 : 2;
constexpr int TOKENS = PLANES * 32, KEY_GROUPS = TOKENS / GROUP, VALUE_GROUPS = D / CHANNELS;
constexpr int BLOCKS = D / 32;           // of 32 channels
constexpr int ROW = D * 2, WORDS = 32 * ROW;
constexpr int SCALES = 2 * TOKENS * VALUE_GROUPS;  // bytes of scales of tokens, and of their zero points
constexpr int KEY_SIDE = WORDS + (BY_TOKEN ? 2 * SCALES : 2 * KEY_GROUPS * ROW), VALUE_SIDE = WORDS + 2 * SCALES;
// What lies behind a side in its unit: the left factor, the right one, outliers; then the places of these.
constexpr int KEY_MORE = 2 * (RANK * (TOKENS + D) + KEY_OUT * D), KEY_PLACES = KEY_OUT * D;
constexpr int VALUE_MORE = 2 * (RANK * (TOKENS + D) + VALUE_OUT * TOKENS), VALUE_PLACES = VALUE_OUT * TOKENS;
constexpr int LEFT = 2 * RANK * TOKENS, FACTORS = LEFT + RANK * ROW;
constexpr int MORE = KEY_SIDE + VALUE_SIDE, PLACES = MORE + KEY_MORE + VALUE_MORE;  // where they lie in a record
constexpr int KEY_UNIT = KEY_SIDE + KEY_MORE + KEY_PLACES, VALUE_UNIT = VALUE_SIDE + VALUE_MORE + VALUE_PLACES;
constexpr int UNIT = KEY_UNIT > VALUE_UNIT ? KEY_UNIT : VALUE_UNIT;
// Sums of what outliers add, in fixed point: of a pair for tokens, of each warp for channels; two heads side by side.
constexpr int TOKEN_ROW = 8 * (TOKENS + 2), CHANNEL_ROW = 8 * (D + 4);
constexpr int TOKEN_SUMS = KEY_OUT ? HEADS / 2 * TOKEN_ROW : 0, CHANNEL_SUMS = VALUE_OUT ? HEADS / 2 * CHANNEL_ROW : 0;
constexpr int SUMS = TOKEN_SUMS + 2 * CHANNEL_SUMS;
constexpr int PAIR = 64, THREADS = PAIR * PAIRS;
static_assert(VALUE_GROUPS <= (BY_TOKEN ? 4 : 8) && KEY_GROUPS <= 8, "groups are rows of an operand");
static_assert(RECORD || !(RANK || KEY_OUT || VALUE_OUT), "what is added is found by its record");

// Where the field of a plane lies after a shift to the right (negative: left). Of keys any bit will do; the bits of
// values are near each other, because the weights must make up for them in float16.
__device__ constexpr int key_shift(int j) {
  return BITS == 2 ? (j < 5 ? 0 : 10) : BITS == 3 ? (j < 3 ? 0 : 6) : BITS == 4 ? (j < 2 ? 0 : 8) : (j < 1 ? 0 : 8);
}
__device__ constexpr int value_shift(int j) {
  return BITS == 2 ? (j < 2 ? -4 : j < 5 ? 0 : 6) : BITS == 3 ? (j < 1 ? -3 : j < 3 ? 0 : 6) : key_shift(j);
}
__device__ constexpr int key_bit(int j) { return BITS * j - key_shift(j); }
__device__ constexpr int value_bit(int j) { return BITS * j - value_shift(j); }
// Planes whose values lie at the same bit are a class; their sums of weights and of zero points are kept apart.
constexpr int CLASSES = BITS == 2 ? 3 : BITS == 8 ? 1 : 2;
__device__ constexpr int class_bit(int c) { return BITS == 2 ? 4 + 2 * c : BITS == 3 ? 3 + 3 * c : 4 * c; }
__device__ constexpr int value_class(int j) {
  return BITS == 2 ? value_bit(j) / 2 - 2 : BITS == 3 ? value_bit(j) / 3 - 1 : value_bit(j) / 4;
}
constexpr int TOP = BITS == 2 ? 8 : BITS == 3 ? 6 : BITS == 4 ? 4 : 0;      // the highest of value_bit
constexpr int FOLD = (BITS == 2 ? 3 : BITS == 3 ? 5 : BITS == 4 ? 5 : 13) - ROOM;  // weights are times 2^FOLD

// What the hardware does besides. (tests/cuda_on_cpu.h does the same on a CPU.)
#ifndef CUDA_ON_CPU
__device__ __forceinline__ u32 transposed(u32 a) {
  u32 b;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}
__device__ __forceinline__ void mma8(float (&c)[4], u32 a0, u32 a1, u32 b) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b));
}
__device__ __forceinline__ void keep(const char*& x) { asm volatile("" : "+l"(x)); }
#if EXACT == 2  // exact pages of bfloat16
__device__ __forceinline__ u32 exact_pair(float low, float high) {
  u32 c;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
  return c;
}
__device__ __forceinline__ void exact_mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
#else
__device__ __forceinline__ u32 exact_pair(float low, float high) { return pair(low, high); }
__device__ __forceinline__ void exact_mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma(c, a0, a1, a2, a3, b0, b1);
}
#endif
// Where it is not seen nothing is read, and zeros are written.
__device__ __forceinline__ void copy16(u32 to, const char* from, bool seen) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(seen ? 16 : 0));
}
#endif

__device__ __forceinline__ u32 load4(const char* p) { return *reinterpret_cast<const u32*>(p); }
__device__ __forceinline__ u32 load2(const char* p) { return *reinterpret_cast<const unsigned short*>(p); }
__device__ __forceinline__ float load_half(const char* p) { return half_to_float(load2(p)); }

// Blocks of 16 bytes of a side's words are swapped so that no two threads of a load meet in a bank. (Exclusive or of
// bits of the row, so that the swap of a sum without carries is that of its parts together.)
__device__ constexpr int key_swap(int row) { return (row & 1) << 2; }
__device__ constexpr int value_swap(int row) { return (row & 1) | (row >> 1 & 6); }

template <int BYTES, bool KEYS>
__device__ __forceinline__ void copy(u32 to, const char* from, int thread) {
  constexpr int BLOCK = ROW / 16;  // 16 bytes of a row
  const u32 mine = to + (thread ^ (KEYS ? key_swap(thread / BLOCK) : value_swap(thread / BLOCK))) * 16;
#pragma unroll
  for (int first = 0; first < BYTES / 16; first += PAIR) {
    if (BYTES / 16 % PAIR && first + PAIR > BYTES / 16 && first + thread >= BYTES / 16) break;
    u32 at = to + thread * 16;
    if (first < WORDS / 16) at = mine ^ (KEYS ? key_swap(first / BLOCK) : value_swap(first / BLOCK)) * 16;
    copy16(at + first * 16, from + first * 16);
  }
}

template <int BYTES>
__device__ __forceinline__ void copy_more(u32 to, const char* from, int thread) {
#pragma unroll
  for (int first = 0; first < BYTES / 16; first += PAIR)
    if (first + PAIR <= BYTES / 16 || first + thread < BYTES / 16)
      copy16(to + (first + thread) * 16, from + (first + thread) * 16);
}

// A side of an exact page: rows of 16-bit numbers, those that `seen(row)` says.
template <bool KEYS, typename Seen>
__device__ __forceinline__ void copy_exact(u32 to, const char* from, int thread, Seen seen) {
  constexpr int BLOCK = ROW / 16;
  for (int at = thread; at < WORDS / 16; at += PAIR) {
    const int row = at / BLOCK;
    copy16(to + (at ^ (KEYS ? key_swap(row) : value_swap(row))) * 16, from + at * 16, seen(row));
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    packed(const Query* __restrict__ queries, const long long* __restrict__ table, const long long* __restrict__ exact,
           const int* __restrict__ spans, const int* __restrict__ starts, const int* __restrict__ begins,
           float* __restrict__ out, float* __restrict__ lse, const float* __restrict__ balance,
           float* __restrict__ found, float* __restrict__ scored, const float given, int rows, int once, int columns,
           int exact_columns, int heads, int slots, int exact_slots, long long base, long long exact_base) {
  extern __shared__ __align__(128) char memory[];
  const int lane = threadIdx.x & 31, half = threadIdx.x >> 5 & 1, g = lane >> 2, t = lane & 3;
  const int pair_ = threadIdx.x / PAIR, thread = threadIdx.x % PAIR;

  // Rows that are taken in turn: this program's are those from its place on, for its length (`schedule.in_turn`).
  const int all = once ? begins[rows] : 0, length = all ? (all + once - 1) / once : 0;
  const int place_ = blockIdx.x * length, end = min(place_ + length, all);
  int row = row_of(length ? begins : starts, rows, length ? place_ : blockIdx.x, lane);
  if (row >= rows) {
    wait_for_others();  // where nothing is packed all programs are such: what comes behind waits for none but these
    return;
  }
  do {
    const int* const span = spans + row * SPAN;
    const int low = span[0], high = span[1];
    // Work is numbered: packed pages, then exact ones.
    const int pages = high > low ? (high + TOKENS - 1) / TOKENS - low / TOKENS : 0;
    const int stop = EXACT ? span[4] : 0, exact_pages = (stop + 31) / 32;
    int part = blockIdx.x, first, last_packed, first_exact, last;
    if (length) {
      const int before = begins[row];
      first = max(place_ - before, 0), last = min(end - before, pages + exact_pages);
      last_packed = max(first, min(last, pages)), first_exact = max(first - pages, 0);
      part += starts[row] - before / length;
      if (first >= last) {
        wait_for_others();
        continue;
      }
    } else {
      const int begin = starts[row], programs = starts[row + 1] - begin;
      const auto from = [&](int all, int n) { return int((long long)n * all / programs); };
      first = from(pages, part - begin), last_packed = from(pages, part - begin + 1);
      // Those that have a page more of one kind have one less of the other.
      const int other = programs - 1 - (part - begin);
      first_exact = from(exact_pages, other), last = last_packed + from(exact_pages, other + 1) - first_exact;
    }
    const long long* const addresses = table + ((long long)row * columns + low / TOKENS) * (RECORD ? 1 : 6);
#if EXACT
    const long long* const exact_addresses = exact + (long long)row * exact_columns * 2;
    const int sink = span[2], start = span[3], fading = span[5], faded = span[6];
    auto seen = [&](int slot) {
      return slot < stop & (slot < sink | slot >= start | (slot >= fading & slot < faded));
    };
#endif

    char* const own = memory + pair_ * UNITS * UNIT;
    const u32 ring = shared(own);
    // What is copied next: a side of a page.
    int ahead = first + pair_;
#if RECORD
    auto place = [&](int number) { return number < last_packed ? (base + addresses[number]) * 16 : 0; };
    long long address = place(ahead), next = place(ahead + PAIRS);
#else
    long long where[3];  // words, scales, zero points of the side that comes next
    auto look = [&](int page, int side) {
#pragma unroll
      for (int n = 0; n < 3; n++) where[n] = page < last_packed ? (base + addresses[6ll * page + side + n]) * 16 : 0;
    };
    look(ahead, 0);
#endif
    auto fetch = [&](bool keys, u32 unit) {
      if (ahead < last_packed) {
#if RECORD
        const char* record = reinterpret_cast<const char*>(address) + thread * 16;
        keep(record);
        if (keys)
          copy<KEY_SIDE, true>(ring + unit, record, thread);
        else
          copy<VALUE_SIDE, false>(ring + unit, record + KEY_SIDE, thread);
        record -= thread * 16;
        if (keys) {
          copy_more<KEY_MORE>(ring + unit + KEY_SIDE, record + MORE, thread);
          copy_more<KEY_PLACES>(ring + unit + KEY_SIDE + KEY_MORE, record + PLACES, thread);
        } else {
          copy_more<VALUE_MORE>(ring + unit + VALUE_SIDE, record + MORE + KEY_MORE, thread);
          copy_more<VALUE_PLACES>(ring + unit + VALUE_SIDE + VALUE_MORE, record + PLACES + KEY_PLACES, thread);
        }
#else
        const char* words = reinterpret_cast<const char*>(where[0]) + thread * 16;
        if (keys)
          copy<WORDS, true>(ring + unit, words, thread);
        else
          copy<WORDS, false>(ring + unit, words, thread);
        constexpr int EACH = BY_TOKEN ? SCALES : KEY_GROUPS * ROW;
        const char *scales = reinterpret_cast<const char*>(where[1]), *zeros = reinterpret_cast<const char*>(where[2]);
        if (keys) {
          copy_more<EACH>(ring + unit + WORDS, scales, thread);
          copy_more<EACH>(ring + unit + WORDS + EACH, zeros, thread);
        } else {
          copy_more<SCALES>(ring + unit + WORDS, scales, thread);
          copy_more<SCALES>(ring + unit + WORDS + SCALES, zeros, thread);
        }
#endif
      }
#if EXACT
      else if (ahead < last) {
        const int page = ahead - last_packed + first_exact;
        const char* from = reinterpret_cast<const char*>((exact_base + exact_addresses[2 * page + (keys ? 0 : 1)]) * 16);
        if (keys)
          copy_exact<true>(ring + unit, from, thread, [&](int r) { return seen(page * 32 + r); });
        else
          copy_exact<false>(ring + unit, from, thread, [&](int r) { return seen(page * 32 + r); });
      }
#endif
      commit();
#if RECORD
      if (!keys) {
        ahead += PAIRS;
        address = next;
        next = place(ahead + PAIRS);
      }
#else
      if (!keys) ahead += PAIRS;
      look(ahead, keys ? 3 : 0);
#endif
    };
    // Packed pages are none of what the kernel in front of this one writes, but queries and exact pages are.
    static_assert(UNITS <= 3, "what comes first is a page");
    if (first + PAIRS > last_packed) wait_for_others();
#pragma unroll
    for (int unit = 0; unit < UNITS - 1; unit++) fetch(unit % 2 == 0, unit * UNIT);
    wait_for_others();
    launch_dependents();  // what they are given by those in front of this kernel is there

    // The queries of head g, scaled by a power of two to be below 2^(6 - ROOM), and for channels 8t .. 8t + 7 of every
    // block.
    u32 q[BLOCKS][4];
#if BY_TOKEN
    u32 group_sums;           // of the queries of head g: group 2t, 2t + 1 of four; lanes t > 1 have what rounding took
    float off[VALUE_GROUPS][2];  // what UNBIAS takes off the scores of heads 2t, 2t + 1 for a squared scale
#endif
#if KEY_OUT
    float by_channel[D / PAIR][HEADS];  // queries of channels `thread`, `thread + PAIR`, in fixed point
#endif
    auto take = [&](bool balanced) {
      float x[BLOCKS][8], most = 0;
#pragma unroll
      for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int k = 0; k < 8; k++) {
          x[i][k] = g < heads ? number(queries[((long long)row * heads + g) * D + 32 * i + 8 * t + k]) : 0.f;
          if (balanced) x[i][k] /= balance[(long long)row * D + 32 * i + 8 * t + k];
          most = fmaxf(most, fabsf(x[i][k]));
        }
#pragma unroll
      for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
      const int e = max(-100, min(100, (__float_as_int(most) >> 23) - 127)) - 5 + ROOM;
#pragma unroll
      for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int k = 0; k < 4; k++) q[i][k] = pair(x[i][2 * k] * pow2(-e), x[i][2 * k + 1] * pow2(-e));
      return e;
    };
    float scale = given;
    {
      const int e = take(BALANCED);
      const float f = pow2(-e);
      scale *= pow2(e);
#if BY_TOKEN
      float sums_of[4] = {}, squares[4] = {};
#pragma unroll
      for (int i = 0; i < BLOCKS; i++)
#pragma unroll
        for (int k = 0; k < 8; k++) {
          const float y = half_to_float(q[i][k / 2] >> k % 2 * 16 & 0xffff);
          sums_of[i * 32 / CHANNELS] += y, squares[i * 32 / CHANNELS] = fmaf(y, y, squares[i * 32 / CHANNELS]);
        }
      float rest[4];
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int step = 1; step < 4; step *= 2) {
          sums_of[n] += __shfl_xor_sync(~0u, sums_of[n], step);
          squares[n] += __shfl_xor_sync(~0u, squares[n], step);
        }
        rest[n] = sums_of[n] - half_to_float(pair(sums_of[n], 0.f) & 0xffff);
      }
      group_sums = t == 0   ? pair(sums_of[0], sums_of[1])
                   : t == 1 ? pair(sums_of[2], sums_of[3])
                   : t == 2 ? pair(rest[0], rest[1])
                            : pair(rest[2], rest[3]);
#pragma unroll
      for (int n = 0; n < VALUE_GROUPS; n++)
#pragma unroll
        for (int k = 0; k < 2; k++)  // ln 2 / 24 of the square of what a score to the base 2 is multiplied with
          off[n][k] = __shfl_sync(~0u, squares[n], (2 * t + k) * 4) * scale * 0.02888113252333105f;
#endif
#if KEY_OUT
#pragma unroll
      for (int c = 0; c < D / PAIR; c++)
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
          const int channel = thread + c * PAIR;
          float y = h < heads ? number(queries[((long long)row * heads + h) * D + channel]) : 0.f;
          if (BALANCED) y /= balance[(long long)row * D + channel];
          by_channel[c][h] = y * f * 128.f;
        }
#endif
    }
    char* const token_sums = memory + PAIRS * UNITS * UNIT + pair_ * SUMS;
    char* const channel_sums = token_sums + TOKEN_SUMS + half * CHANNEL_SUMS;
    for (int at = thread * 8; at < SUMS; at += PAIR * 8) *reinterpret_cast<uint2*>(token_sums + at) = uint2{0, 0};

    // [channels g and g + 8 of 16] x [heads 2t, 2t + 1]; [zero points of value group g, sum of weights] x the same heads.
    float acc[2 * BLOCKS][4] = {}, sums[CLASSES][4] = {};
    float m[2] = {0.f, 0.f};
    bool fresh = true;  // nothing was seen yet, and m is none

    // Row g of a product is this row of a page, row g + 8 the one two behind it: so tokens that a thread holds the weights
    // of are four in a row.
    const int mine = half * 16 + (g >> 1) * 4 + (g & 1);
    const int read = half * 16 + (lane >> 1 & 3) * 4 + (lane & 1) + (lane >> 4) * 2;  // this lane's row of load_transposed
    u32 key_at[2], value_at[4];  // of even and odd blocks; of 16 channels
#pragma unroll
    for (int i = 0; i < 2; i++) key_at[i] = mine * ROW + ((4 * i + t) ^ key_swap(mine)) * 16;
#pragma unroll
    for (int i = 0; i < 4; i++) value_at[i] = read * ROW + ((2 * i + (lane >> 3 & 1)) ^ value_swap(read)) * 16;
    keep(key_at[0]), keep(key_at[1]), keep(value_at[0]), keep(value_at[1]), keep(value_at[2]), keep(value_at[3]);
    u32 key_zero = WORDS + 16 * t + (KEY_GROUPS + g % KEY_GROUPS) * ROW, by_token = WORDS + 2 * (half * 16 + 4 * t);
    keep(key_zero), keep(by_token);
#if BY_TOKEN
    const u32 key_tokens = WORDS + 2 * mine;
#endif

    u32 here = 0, behind = (UNITS - 1) * UNIT;  // the unit that is read, and the one before
    auto turn = [&]() {
      wait<UNITS - 2>();
      sync_pair(pair_);
      return (const char*)own + here;
    };
    auto done = [&]() {
      behind = here;
      here = here == (UNITS - 1) * UNIT ? 0 : here + UNIT;
    };

    // Where the largest weights of rows, log2, are above what they are scaled by: scale down what was summed. Returns by
    // how much.
    float grown[2];
    auto rise = [&](float (&most)[2]) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
#pragma unroll
        for (int k = 0; k < 2; k++) most[k] = fmaxf(most[k], __shfl_xor_sync(~0u, most[k], step));
#pragma unroll
      for (int k = 0; k < 2; k++) {
        grown[k] = fresh ? (most[k] > -1e29f ? most[k] : 0.f) : fmaxf(most[k], 0.f);
        const float shrink = fresh ? 0.f : exp2_(-grown[k]);
        m[k] += grown[k];
#pragma unroll
        for (int c = 0; c < CLASSES; c++) sums[c][k] *= shrink, sums[c][k + 2] *= shrink;
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) acc[i][k] *= shrink, acc[i][k + 2] *= shrink;
      }
      fresh = fresh & !__any_sync(~0u, most[0] > -1e29f);
    };

    int number = first + pair_;
    for (; number < last_packed; number += PAIRS) {
      const int page = low / TOKENS + number;
      // Keys.
      const char* side = turn();
      fetch(UNITS % 2 == 0 ? false : true, behind);
#if KEY_OUT
#pragma unroll
      for (int c = 0; c < D / PAIR; c++) {
        const char* outliers = side + KEY_SIDE + FACTORS + (thread + c * PAIR) * 2 * KEY_OUT;
        const char* places = side + KEY_SIDE + KEY_MORE + (thread + c * PAIR) * KEY_OUT;
#pragma unroll
        for (int n = 0; n < KEY_OUT; n += 2) {
          const u32 two = load4(outliers + 2 * n), at = load2(places + n);
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const float outlier = half_to_float(k ? two >> 16 : two & 0xffff);
            char* to = token_sums + (k ? at >> 8 : at & 0xff) * 8;
#pragma unroll
            for (int h = 0; h < HEADS; h++)
              atomicAdd(reinterpret_cast<int*>(to + h / 2 * TOKEN_ROW + h % 2 * 4), __float2int_rn(outlier * by_channel[c][h]));
          }
        }
      }
#endif
      float s[PLANES][4];
      float z[2][4] = {};
#pragma unroll
      for (int j = 0; j < PLANES; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
#if RANK
      float r[2][4] = {};
#endif
#if BY_TOKEN
      float part[PLANES][4];  // of a group of channels
      const char* scales = side + key_tokens;
#else
      const char* scales = side + WORDS + 16 * t;
#endif
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        const char* at = side + key_at[i % 2] + i / 2 * 128;
        const uint4 w0 = load16(at), w1 = load16(at + 2 * ROW);
        const u32 w[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
        if (!BY_TOKEN) {
          // Of the first product rows g, of the second rows g + 8: so the four words stay in the registers they came to.
          const uint4 zero = load16(side + key_zero + 64 * i);
          mma(z[0], zero.x, zero.y, zero.z, zero.w, q[i][0], q[i][2]);
          mma(z[1], zero.x, zero.y, zero.z, zero.w, q[i][1], q[i][3]);
        }
#if RANK
        {
          const uint4 right = load16(side + KEY_SIDE + LEFT + g % RANK * ROW + 16 * t + 64 * i);
          mma(r[0], right.x, right.y, right.z, right.w, q[i][0], q[i][2]);
          mma(r[1], right.x, right.y, right.z, right.w, q[i][1], q[i][3]);
        }
#endif
        u32 v[2][4], b[4];
#pragma unroll
        for (int j = 0; j < PLANES; j++) {
          if (!BY_TOKEN && j * 32 % GROUP == 0) {
            const uint4 x = load16(scales + j * 32 / GROUP * ROW + 64 * i);
            b[0] = mul2(x.x, q[i][0]), b[1] = mul2(x.y, q[i][1]), b[2] = mul2(x.z, q[i][2]), b[3] = mul2(x.w, q[i][3]);
          }
          constexpr u32 ONES = (1u << BITS) - 1;
          const u32 mask = (ONES << key_bit(j)) * 0x10001u;
          if (j == 0 || key_shift(j) != key_shift(j - 1)) {
#pragma unroll
            for (int k = 0; k < 4; k++) v[0][k] = w[0][k] >> key_shift(j), v[1][k] = w[1][k] >> key_shift(j);
          }
#if BY_TOKEN
          if (i * 32 % CHANNELS == 0) part[j][0] = part[j][1] = part[j][2] = part[j][3] = 0.f;
          mma(part[j], v[0][0] & mask, v[1][0] & mask, v[0][1] & mask, v[1][1] & mask, q[i][0], q[i][1]);
          mma(part[j], v[0][2] & mask, v[1][2] & mask, v[0][3] & mask, v[1][3] & mask, q[i][2], q[i][3]);
          if ((i + 1) * 32 % CHANNELS == 0) {  // scales of tokens `mine` and `mine + 2`
            const int n = i * 32 / CHANNELS;
            const char* at = scales + (j * VALUE_GROUPS + n) * 64;
            const float step[2] = {load_half(at), load_half(at + 4)};
#pragma unroll
            for (int k = 0; k < 4; k++) {
              if (UNBIAS) part[j][k] = fmaf(-step[k / 2], off[n][k & 1] * pow2(key_bit(j) - 24), part[j][k]);
              s[j][k] = fmaf(step[k / 2], part[j][k], s[j][k]);
            }
          }
#else
          mma(s[j], v[0][0] & mask, v[1][0] & mask, v[0][1] & mask, v[1][1] & mask, b[0], b[1]);
          mma(s[j], v[0][2] & mask, v[1][2] & mask, v[0][3] & mask, v[1][3] & mask, b[2], b[3]);
#endif
        }
      }
      done();
#if RANK
      const u32 turned = transposed(pair((r[0][0] + r[1][2]) * scale, (r[0][1] + r[1][3]) * scale));
#endif
#if KEY_OUT
      sync_pair(pair_);  // until all outliers are there
#endif

      // Softmax: log2 of the weights of rows g and g + 8 of every plane, heads 2t and 2t + 1, as they will be multiplied.
      float top[CLASSES][2];
#pragma unroll
      for (int c = 0; c < CLASSES; c++) top[c][0] = top[c][1] = -1e30f;
      float zero[CLASSES][2];
#pragma unroll
      for (int j = 0; j < PLANES; j++) {
        if (!BY_TOKEN && j * 32 % GROUP == 0) {
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const float x = fmaf(__shfl_sync(~0u, z[0][k] + z[1][k + 2], j * 32 / GROUP * 4 + t), scale, -m[k]);
#pragma unroll
            for (int c = 0; c < CLASSES; c++) zero[c][k] = x + (FOLD + TOP - class_bit(c));
          }
        }
        const float f = scale * pow2(24 - key_bit(j));
        const int c = value_class(j);
#if BY_TOKEN
        float zeros[4] = {};
        {
          const char* at = scales + SCALES + j * VALUE_GROUPS * 64;  // of the groups that `group_sums` has
          const char *even = at + 2 * t % 4 % VALUE_GROUPS * 64, *odd = at + (2 * t + 1) % 4 % VALUE_GROUPS * 64;
          mma8(zeros, load2(even) | load2(odd) << 16, load2(even + 4) | load2(odd + 4) << 16, group_sums);
        }
#endif
#pragma unroll
        for (int k = 0; k < 4; k++) {
#if BY_TOKEN
          zero[c][k & 1] = fmaf(zeros[k], scale, -m[k & 1]) + (FOLD + TOP - class_bit(c));
#endif
          s[j][k] = fmaf(s[j][k], f, zero[c][k & 1]);
        }
#if RANK
        {
          const char* at = side + KEY_SIDE + (j * 32 + mine) * 2 * RANK + 4 * t;
          const bool there = 2 * t < RANK;
          mma8(s[j], there ? load4(at) : 0, there ? load4(at + 4 * RANK) : 0, turned);
        }
#endif
#if KEY_OUT
        if (2 * t < HEADS) {
#pragma unroll
          for (int k = 0; k < 4; k += 2) {
            uint2* at = reinterpret_cast<uint2*>(token_sums + t * TOKEN_ROW + (j * 32 + mine + k) * 8);
            const uint2 x = *at;
            s[j][k] = fmaf(float(int(x.x)), scale / 128.f, s[j][k]);
            s[j][k + 1] = fmaf(float(int(x.y)), scale / 128.f, s[j][k + 1]);
            *at = uint2{0, 0};
          }
        }
#endif
#if FOUND
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int token = page * TOKENS + j * 32 + mine + k / 2 * 2, head = 2 * t + (k & 1);
          if (head < heads & token >= low & token < high)
            found[((long long)row * heads + head) * slots + token] = s[j][k] + m[k & 1] - (FOLD + TOP - class_bit(c));
        }
#endif
#pragma unroll
        for (int k = 0; k < 4; k++) top[c][k & 1] = fmaxf(top[c][k & 1], s[j][k]);
      }
      bool above = fresh | (page * TOKENS < low) | (page * TOKENS + TOKENS > high);
#pragma unroll
      for (int c = 0; c < CLASSES; c++)
#pragma unroll
        for (int k = 0; k < 2; k++) above |= top[c][k] > float(FOLD + TOP - class_bit(c));
      if (__any_sync(~0u, above)) {
        float most[2] = {-1e30f, -1e30f};
#pragma unroll
        for (int j = 0; j < PLANES; j++)
#pragma unroll
          for (int k = 0; k < 4; k++) {
            const int token = page * TOKENS + j * 32 + mine + k / 2 * 2;
            if (token < low || token >= high) s[j][k] = -__int_as_float(0x7f800000);
            most[k & 1] = fmaxf(most[k & 1], s[j][k] - (FOLD + TOP - value_bit(j)));
          }
        rise(most);
#pragma unroll
        for (int j = 0; j < PLANES; j++)
#pragma unroll
          for (int k = 0; k < 4; k++) s[j][k] -= grown[k & 1];
      }
      u32 p[PLANES][2];  // tokens 4t .. 4t + 3 of head g
#pragma unroll
      for (int j = 0; j < PLANES; j++) {
#pragma unroll
        for (int k = 0; k < 4; k++) s[j][k] = exp2_(s[j][k]);
        p[j][0] = transposed(pair(s[j][0], s[j][1]));
        p[j][1] = transposed(pair(s[j][2], s[j][3]));
      }

      // Values.
      side = turn();
      fetch(UNITS % 2 == 0 ? true : false, behind);
#if VALUE_OUT
      {
        // Their largest magnitude says what is the unit of the sums.
        const char* outliers = side + VALUE_SIDE + FACTORS + mine * 2 * VALUE_OUT;
        const char* places = side + VALUE_SIDE + VALUE_MORE + mine * VALUE_OUT;
        u32 largest = 0;
#pragma unroll
        for (int j = 0; j < PLANES; j++)
#pragma unroll
          for (int n = 0; n < 2 * VALUE_OUT; n += 2) {
            const int token = j * 32 + n / VALUE_OUT * 2;
            largest = __vmaxu2(largest, load4(outliers + (token * VALUE_OUT + n % VALUE_OUT) * 2) & 0x7fff7fffu);
          }
        largest = __reduce_max_sync(~0u, max(largest & 0xffff, largest >> 16));
        const int e = max(-24, (__float_as_int(half_to_float(largest)) >> 23) - 127);
        if (2 * t < HEADS) {
#pragma unroll
          for (int j = 0; j < PLANES; j++) {
            const float unit = pow2(22 - e) * pow2(value_bit(j) - TOP - FOLD);
#pragma unroll
            for (int n = 0; n < 2 * VALUE_OUT; n += 2) {
              const int later = n / VALUE_OUT, token = j * 32 + later * 2;
              const u32 two = load4(outliers + (token * VALUE_OUT + n % VALUE_OUT) * 2);
              const u32 at = load2(places + token * VALUE_OUT + n % VALUE_OUT);
#pragma unroll
              for (int o = 0; o < 2; o++) {
                const float outlier = half_to_float(o ? two >> 16 : two & 0xffff) * unit;
                int* to = reinterpret_cast<int*>(channel_sums + t * CHANNEL_ROW + (o ? at >> 8 : at & 0xff) * 8);
#pragma unroll
                for (int k = 0; k < 2; k++) atomicAdd(to + k, __float2int_rn(outlier * s[j][later * 2 + k]));
              }
            }
          }
        }
        __syncwarp();
        if (2 * t < HEADS) {
          const float back = pow2(e - 22) * pow2(FOLD + TOP - 24);
#pragma unroll
          for (int i = 0; i < 2 * BLOCKS; i++)
#pragma unroll
            for (int k = 0; k < 4; k += 2) {
              uint2* at = reinterpret_cast<uint2*>(channel_sums + t * CHANNEL_ROW + (16 * i + g + 4 * k) * 8);
              const uint2 x = *at;
              acc[i][k] = fmaf(float(int(x.x)), back, acc[i][k]);
              acc[i][k + 1] = fmaf(float(int(x.y)), back, acc[i][k + 1]);
              *at = uint2{0, 0};
            }
        }
      }
#endif
#if RANK
      float through[CLASSES][4] = {};
#endif
      constexpr int PLANE = VALUE_GROUPS * 64;
      const char* value_scales = side + by_token;
      const char* zeros = value_scales + 2 * TOKENS * VALUE_GROUPS + g % VALUE_GROUPS * 64;
#pragma unroll
      for (int j = 0; j < PLANES; j++) {
        constexpr u32 ONE = 0x3c003c00u;
        const u32* a = reinterpret_cast<const u32*>(zeros + j * PLANE);
        mma(sums[value_class(j)], a[0], ONE, a[1], ONE, p[j][0], p[j][1]);
#if RANK
        {  // row g is column g of the left factor
          const char* at = side + VALUE_SIDE + ((j * 32 + half * 16 + 4 * t) * RANK + g % RANK) * 2;
          const u32 x = load2(at) | load2(at + 2 * RANK) << 16, y = load2(at + 4 * RANK) | load2(at + 6 * RANK) << 16;
          mma(through[value_class(j)], x, 0, y, 0, p[j][0], p[j][1]);
        }
#endif
        if (VALUE_GROUPS == 1) {
          const uint2 x = load8(value_scales + j * PLANE);
          p[j][0] = mul2(p[j][0], x.x), p[j][1] = mul2(p[j][1], x.y);
        }
      }
#if RANK
      {
        float x[2] = {};
#pragma unroll
        for (int c = 0; c < CLASSES; c++)
#pragma unroll
          for (int k = 0; k < 2; k++) x[k] = fmaf(through[c][k], pow2(class_bit(c) - TOP), x[k]);
        u32 b = transposed(pair(x[0], x[1]));
        if (2 * t >= RANK) b = 0;
#pragma unroll
        for (int i = 0; i < BLOCKS; i++) {
          u32 right[4];
          load_transposed(right, side + VALUE_SIDE + LEFT + lane % 8 % RANK * ROW + lane / 8 * 16 + 64 * i);
#pragma unroll
          for (int n = 0; n < 2; n++) {
            float c[4] = {};
            mma8(c, right[2 * n], right[2 * n + 1], b);
#pragma unroll
            for (int k = 0; k < 4; k++) acc[2 * i + n][k] = fmaf(c[k], pow2(TOP - 24), acc[2 * i + n][k]);
          }
        }
      }
#endif
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        u32 w[2][4];  // channels g and g + 8 of 16, tokens 4t .. 4t + 3
        load_transposed(w[0], side + value_at[i * 2 % 4] + i / 2 * 128);
        load_transposed(w[1], side + value_at[i * 2 % 4 + 1] + i / 2 * 128);
        u32 v[2][4];
#pragma unroll
        for (int j = 0; j < PLANES; j++) {
          u32 b0 = p[j][0], b1 = p[j][1];
          if (VALUE_GROUPS > 1) {
            const uint2 x = load8(value_scales + j * PLANE + i * 32 / CHANNELS * 64);
            b0 = mul2(b0, x.x), b1 = mul2(b1, x.y);
          }
          constexpr u32 ONES = (1u << BITS) - 1;
          const u32 mask = (ONES << value_bit(j)) * 0x10001u;
          if (j == 0 || value_shift(j) != value_shift(j - 1)) {
#pragma unroll
            for (int n = 0; n < 2; n++)
#pragma unroll
              for (int k = 0; k < 4; k++)
                v[n][k] = value_shift(j) >= 0 ? w[n][k] >> value_shift(j) : w[n][k] << -value_shift(j);
          }
#pragma unroll
          for (int n = 0; n < 2; n++)
            mma(acc[2 * i + n], v[n][0] & mask, v[n][1] & mask, v[n][2] & mask, v[n][3] & mask, b0, b1);
        }
      }
      done();
    }

    // Values as they are, but times 2^FOLD, and weights too.
    float weight[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
      float shift = 0.f;
      weight[k] = 0.f;
#pragma unroll
      for (int c = 0; c < CLASSES; c++) {
        weight[k] = fmaf(sums[c][k + 2], pow2(class_bit(c) - TOP), weight[k]);
        shift = fmaf(sums[c][k], pow2(class_bit(c) - TOP), shift);
      }
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++) {
        const float zero = __shfl_sync(~0u, shift, i * 16 / CHANNELS * 4 + t);  // of the group to its channels
        acc[i][k] = fmaf(acc[i][k], pow2(24 - TOP), zero), acc[i][k + 2] = fmaf(acc[i][k + 2], pow2(24 - TOP), zero);
      }
    }
#if EXACT
#pragma unroll
    for (int k = 0; k < 2; k++) sums[0][k + 2] = weight[k];
    if (BALANCED) scale = given * pow2(take(false));  // exact keys are not balanced
    for (; number < last; number += PAIRS) {
      const char* side = turn();
      fetch(UNITS % 2 == 0 ? false : true, behind);
      float s[4] = {};
#pragma unroll
      for (int i = 0; i < BLOCKS; i++) {
        const char* at = side + key_at[i % 2] + i / 2 * 128;
        const uint4 w0 = load16(at), w1 = load16(at + 2 * ROW);
        u32 b[4];
#pragma unroll
        for (int k = 0; k < 4; k++)
          b[k] = EXACT == 1 ? q[i][k] : exact_pair(half_to_float(q[i][k] & 0xffff), half_to_float(q[i][k] >> 16));
        exact_mma(s, w0.x, w1.x, w0.y, w1.y, b[0], b[1]);
        exact_mma(s, w0.z, w1.z, w0.w, w1.w, b[2], b[3]);
      }
      done();
      float most[2] = {-1e30f, -1e30f};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int slot = (number - last_packed + first_exact) * 32 + mine + k / 2 * 2, head = 2 * t + (k & 1);
        const bool held = seen(slot);
        if (SCORED && slot < stop & head < heads)
          scored[((long long)row * heads + head) * exact_slots + slot] = held ? s[k] * scale * 0.6931471805599453f : -1e30f;
        s[k] = held ? fmaf(s[k], scale, -m[k & 1]) : -__int_as_float(0x7f800000);
        most[k & 1] = fmaxf(most[k & 1], s[k]);
      }
      rise(most);
#pragma unroll
      for (int k = 0; k < 4; k++) s[k] = exp2_(s[k] - grown[k & 1] + FOLD);
      const u32 p0 = transposed(exact_pair(s[0], s[1])), p1 = transposed(exact_pair(s[2], s[3]));

      side = turn();
      fetch(UNITS % 2 == 0 ? true : false, behind);
      constexpr u32 ONE = EXACT == 1 ? 0x3c003c00u : 0x3f803f80u;
      exact_mma(sums[0], ONE, ONE, ONE, ONE, p0, p1);
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++) {
        u32 w[4];
        load_transposed(w, side + value_at[i % 4] + i / 4 * 128);
        exact_mma(acc[i], w[0], w[1], w[2], w[3], p0, p1);
      }
      done();
    }
#pragma unroll
    for (int k = 0; k < 2; k++) weight[k] = sums[0][k + 2];
#endif
    wait<0>();
    __syncthreads();

    // The warps' parts together. float [warps][8 heads][WIDE], then maxima and sums [warps][2][8].
    constexpr int WARPS = 2 * PAIRS, WIDE = D + 4;
    float* const parts = reinterpret_cast<float*>(memory);
    float* const ends = parts + WARPS * 8 * WIDE;
    static_assert(4 * WARPS * (8 * WIDE + 16) <= PAIRS * UNITS * UNIT, "they fit into the rings");
    {
      const int warp = threadIdx.x >> 5;
      float* const to = parts + warp * 8 * WIDE;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        if (g == 0) ends[warp * 16 + 2 * t + k] = fresh ? -1e30f : m[k], ends[warp * 16 + 8 + 2 * t + k] = weight[k];
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) {
          to[(2 * t + k) * WIDE + 16 * i + g] = acc[i][k];
          to[(2 * t + k) * WIDE + 16 * i + 8 + g] = acc[i][k + 2];
        }
      }
    }
    __syncthreads();
    for (int at = threadIdx.x * 4; at < heads * D; at += THREADS * 4) {
      const int head = at / D, c = at % D;
      float above = -1e30f, total = 0.f, o[4] = {};
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) above = fmaxf(above, ends[warp * 16 + head]);
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) {
        const float f = exp2_(ends[warp * 16 + head] - above);
        total = fmaf(ends[warp * 16 + 8 + head], f, total);
        const float4 x = *reinterpret_cast<const float4*>(parts + (warp * 8 + head) * WIDE + c);
        o[0] = fmaf(x.x, f, o[0]), o[1] = fmaf(x.y, f, o[1]), o[2] = fmaf(x.z, f, o[2]), o[3] = fmaf(x.w, f, o[3]);
      }
      const float inverse = total > 0.f ? 1.f / total : 0.f;
      const long long place = (long long)part * heads + head;
      *reinterpret_cast<float4*>(out + place * D + c) =
          make_float4(o[0] * inverse, o[1] * inverse, o[2] * inverse, o[3] * inverse);
      if (c == 0) lse[place] = total > 0.f ? above + log2f(total) - FOLD : -1e30f;
    }
    if (length) __syncthreads();  // before what is next is copied over the parts
  } while (length && begins[++row] < end);
}
