// Attention over pages of rotated keys and values: see cuda.py.
//
// Compiled for one form of pages: BITS, CHANNELS, D (head_dim), KV_HEADS, TEAM (heads whose keys are rotated together),
// SINKS, NEIGHBOURS (how RoPE pairs channels); EACH query heads of a row, a power of two; the dtype of the QUERIES, SPAN
// columns of a table of spans, FIELDS of a page; and for one of two kernels, SCORES or not, of PAIRS of warps.
//
// `scores`: a program makes the keys of a team again, 32 tokens (a plane of a page) at a time. Each thread takes rotated
// channels, in the order that they were sorted in, so that a warp shares scales; it leaves numbers where they belong
// before sorting. The Hadamard matrix over channels is a product of the tensor cores in blocks of 16, and sums over the
// blocks; that over heads becomes signs of scores. Keys are turned within the plane, by a table that
// all planes share; queries are turned back by the angle of its first token.
//
// `values`: as in packed.cu, with weights of the scores that were left. The rotation is undone once, on the sum. Tokens
// that are exact are left out there, and added behind it.

#include "../hardware.cuh"

// What the hardware does besides. (tests/rotated_on_cpu.h does the same on a CPU.)
#ifndef CUDA_ON_CPU
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 add2(u32 a, u32 b) {
  u32 c;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 sub2(u32 a, u32 b) {
  u32 c;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
// The product alone, rounded to float16.
__device__ __forceinline__ void mma_half(u32 (&c)[2], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0,%1}, {%2,%3,%4,%5}, {%6,%7}, {%8,%8};"
      : "=r"(c[0]), "=r"(c[1])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(0u));
}
// Of angles of at most pi, to 2**-20.
__device__ __forceinline__ float cos_(float x) {
  float y;
  asm("cos.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float sin_(float x) {
  float y;
  asm("sin.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
  unsigned short y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#endif

constexpr int PLANES = BITS == 2 ? 8 : BITS == 3 ? 5 : 4;
constexpr int TOKENS = PLANES * 32, GROUPS = D / CHANNELS, THREADS = 64 * PAIRS, WARPS = 2 * PAIRS;
constexpr int MARKS = SINKS > 0 ? SINKS : 1;

// Pages that a row sees something of.
__device__ __forceinline__ int pages_of(int low, int high) {
  return high > low ? (high + TOKENS - 1) / TOKENS - low / TOKENS : 0;
}

#if SCORES
static_assert(PAIRS == TEAM, "a warp for each head of a team and half of a plane");
constexpr int N = TEAM * D;                                   // rotated channels of a team
constexpr int TILES = D / 8, STEPS = D / 16;                  // of columns, and of channels, of a product
constexpr int COLUMNS = EACH * TEAM < 8 ? 8 : EACH * TEAM, PARTS = COLUMNS / 8;
constexpr int SCALES = KV_HEADS * GROUPS;                     // groups of a token
constexpr int XROW = 64;                                      // bytes of a channel's plane
constexpr int QUAD = (TILES / 4 + 1) * 16, QROW = 4 * QUAD;   // of what a thread of four needs, of queries and of angles
constexpr int PART_ROW = 36;
constexpr int AT_RAW = N * XROW, AT_SCALES = AT_RAW + N * 64, AT_QUERIES = AT_SCALES + 3 * SCALES * 128;
// Angles are read once; then parts of scores take their place.
constexpr int AT_TURNS = AT_QUERIES + COLUMNS * QROW, AT_PARTS = AT_TURNS;
constexpr int TURNS = 32 * QROW, SCORE_PARTS = 4 * TEAM * COLUMNS * PART_ROW;
constexpr int AT_LIST = AT_TURNS + (TURNS > SCORE_PARTS ? TURNS : SCORE_PARTS), AT_ENTRIES = AT_LIST + 4 * N;
constexpr int AT_FACTORS = AT_ENTRIES + 48 * KV_HEADS, AT_LINES = AT_FACTORS + 4 * COLUMNS;
constexpr int AT_MARKS = AT_LINES + 4 * COLUMNS;
constexpr int BYTES [[maybe_unused]] = AT_MARKS + 16 + 8 * TEAM * MARKS;
static_assert(8 * ((KV_HEADS * D + 31) / 32) <= N * XROW, "the bits of what is there fit where keys will be");

// Of two numbers of a pair p of channels: where the first is, the other two behind it. A thread of four has pairs t,
// t + 4, ...; what it has of two of them that follow each other is a word, so that no product wants them otherwise.
__device__ __forceinline__ int place_of(int p) { return p % 4 * QUAD + p / 8 * 8 + (p / 4 & 1) * 2; }

// Numbers of a plane, of a thread's channels, to where they belong: four threads have OWN channels in a row as they
// were sorted, eight tokens of each, so that most take the scales of the one before. Of the two fours of eight threads
// that read or store together, one has even channels and one odd ones: no two are in a bank (see `swapped`). A code in
// the last ten bits of a word, `bit` up behind the SHIFT, is the end of a float16 from 1024 on (`thousand`).
constexpr int OWN = 4 * N / THREADS, MINE = N / THREADS, WITHIN = 10 / BITS;
// Bytes behind a channel's row where 8 of its tokens are.
__device__ __forceinline__ u32 swapped(u32 channel, u32 q) { return (q ^ (channel >> 1 & 3)) * 16; }
template <int SHIFT>
__device__ __forceinline__ void dequantise(char* memory, int me, const u32 (&own)[OWN], const char* at_scales, int bit,
                                           u32 thousand) {
  const u32 mask = (((1u << BITS) - 1) << bit) * 0x10001u, down = half2_pow2(-bit);
  const u32 less = half2_pow2(10 - bit) ^ 0x80008000u;
  constexpr int HALF = OWN / 2;
  // All that is read first: the compiler cannot know that it is not what is written.
  uint4 words[OWN], steps[2], zeros[2];
#pragma unroll
  for (int c = 0; c < OWN; c++) words[c] = load16(memory + AT_RAW + (c * THREADS + me) * 16);
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const int n = i & 1, c = n * HALF + i / 2;  // two of them side by side
    if (i < 2 || (own[c] ^ own[i < 2 ? c : c - 1]) & 0xffff) {
      const char* const at = at_scales + (own[c] & 0xffff);
      steps[n] = load16(at), zeros[n] = load16(at + SCALES * 64);
    }
    const uint4 w = words[c], x = steps[n], z = zeros[n];
    words[c] = make_uint4(fma2(fma2((w.x >> SHIFT & mask) | thousand, down, less), x.x, z.x),
                          fma2(fma2((w.y >> SHIFT & mask) | thousand, down, less), x.y, z.y),
                          fma2(fma2((w.z >> SHIFT & mask) | thousand, down, less), x.z, z.z),
                          fma2(fma2((w.w >> SHIFT & mask) | thousand, down, less), x.w, z.w));
  }
#pragma unroll
  for (int c = 0; c < OWN; c++) *reinterpret_cast<uint4*>(memory + (own[c] >> 16)) = words[c];
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    scores(const Query* __restrict__ queries, const long long* __restrict__ order, const long long* __restrict__ table,
           const int* __restrict__ spans, const int* __restrict__ starts, const int* __restrict__ places,
           const long long* __restrict__ turns, const float* __restrict__ small, const Query* __restrict__ sink_keys,
           float* __restrict__ found, float scale, int rows, int columns, int heads, long long slots) {
  extern __shared__ __align__(128) char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, me = threadIdx.x;
  launch_dependents();
  // There may be more programs than parts. They are shared out among rows as parts are, and have planes of pages.
  const int parts_ = starts[rows];
  auto program_of = [&](int part) { return int((long long)part * gridDim.x / max(1, parts_)); };
  const int row = row_of([&](int row) { return program_of(starts[row]); }, rows, blockIdx.x, lane);
  int low = 0, high = 0, base = 0, begin = 0, end = 0;
  if (row < rows) {
    const int* const span = spans + row * SPAN;
    low = span[0], high = span[1], base = span[7];
    const int mine = program_of(starts[row]), programs = program_of(starts[row + 1]) - mine;
    const long long planes = pages_of(low, high) * PLANES;
    const int number = int(blockIdx.x) - mine;
    begin = int(planes * number / programs), end = int(planes * (number + 1) / programs);
  }
  if (begin >= end) {
    wait_for_others();  // so that this kernel is never done before the one in front of it
    return;
  }
  const int page_0 = low / TOKENS, first = page_0 + begin / PLANES, last = page_0 + (end + PLANES - 1) / PLANES;
  const int first_row = row / KV_HEADS * KV_HEADS;
  places += (row - first_row) * D;

  long long* const entries = reinterpret_cast<long long*>(memory + AT_ENTRIES);
  auto look_up = [&](int page) {
#pragma unroll 1
    for (int i = me; i < 3 * KV_HEADS; i += THREADS)
      entries[(page & 1) * 3 * KV_HEADS + i] =
          table[((long long)(first_row + i / 3) * columns + page) * FIELDS + i % 3] * 2;
  };
  u32* const list = reinterpret_cast<u32*>(memory + AT_LIST);
  u32* const bits = reinterpret_cast<u32*>(memory);  // the place of the keys, before there are any
  constexpr int MASKS = (KV_HEADS * D + 31) / 32;
  for (int i = me; i < 2 * MASKS; i += THREADS) bits[i] = 0;
  int* const marks = reinterpret_cast<int*>(memory + AT_MARKS);
  if (me == 0) marks[0] = 0;
  float* const factors = reinterpret_cast<float*>(memory + AT_FACTORS);  // by column, of its scores
  int* const lines = reinterpret_cast<int*>(memory + AT_LINES);          // its row of queries and scores, -1 for none
  int stands[MINE];  // where channels were sorted to
#pragma unroll
  for (int c = 0; c < MINE; c++) stands[c] = places[me + c * THREADS];
  look_up(first);
  if (first + 1 < last) look_up(first + 1);
  __syncthreads();
#pragma unroll
  for (int c = 0; c < MINE; c++) atomicOr(bits + me % 2 * MASKS + (stands[c] >> 5), 1u << (stands[c] & 31));
  __syncthreads();
#pragma unroll
  for (int c = 0; c < MINE; c++) {
    const u32* const mine = bits + me % 2 * MASKS;
    int rank = __popc(mine[stands[c] >> 5] & ((1u << (stands[c] & 31)) - 1));
    for (int i = 0; i < stands[c] >> 5; i++) rank += __popc(mine[i]);
    list[(rank / OWN * 2 + me % 2) * OWN + rank % OWN] = stands[c] | (me + c * THREADS) << 16;
  }
  __syncthreads();

  // Of this thread's numbers: where their scales are, and where they go.
  u32 own[OWN];
  static_assert(SCALES * 64 <= 1 << 16 && N * XROW <= 1 << 16, "each in 16 bits");
#pragma unroll
  for (int c = 0; c < OWN; c++) {
    const u32 mine = list[me / 4 * OWN + c], channel = mine >> 16;
    own[c] = ((mine & 0xffff) / CHANNELS * 64 + (me & 3) * 16) | (channel * XROW + swapped(channel, me & 3)) << 16;
    keep(own[c]);
  }
  auto fetch_words = [&](int page) {
#pragma unroll
    for (int c = 0; c < OWN; c++) {
      const u32 at = list[me / 4 * OWN + c] & 0xffff;
      const char* const from = reinterpret_cast<const char*>(entries[(page & 1) * 3 * KV_HEADS + at / D * 3]);
      copy16(shared(memory) + AT_RAW + (c * THREADS + me) * 16, from + at % D * 64 + me % 4 * 16);
    }
  };
  auto fetch_scales = [&](int page, int plane, int buffer) {
#pragma unroll
    for (int k = 0; k < (SCALES * 8 + THREADS - 1) / THREADS; k++) {
      const u32 i = me + k * THREADS, q = i & 3, field = i >> 2 & 1, group = i >> 3;
      if (SCALES * 8 % THREADS && i >= SCALES * 8) break;
      const char* from =
          reinterpret_cast<const char*>(entries[(page & 1) * 3 * KV_HEADS + group / GROUPS * 3 + 1 + field]);
      copy16(shared(memory) + AT_SCALES + ((buffer * 2 + field) * SCALES + group) * 64 + q * 16,
             from + (plane * GROUPS + group % GROUPS) * 64 + q * 16);
    }
  };
  // What is read of a page two planes ahead: its scales, into one of three buffers.
  auto fetch_ahead = [&](int page, int plane, int buffer) {
    fetch_scales(plane < PLANES ? page : page + 1, plane < PLANES ? plane : plane - PLANES, buffer);
  };
  fetch_words(first);
  fetch_scales(first, begin % PLANES, 0);
  commit();
  if (begin + 1 < end) fetch_ahead(first, begin % PLANES + 1, 1);
  commit();
  const float norm = rsqrtf(float(N));
  for (int i = me; i < 32 * (D / 2); i += THREADS) {
    const int token = i / (D / 2), p = i % (D / 2);
    unsigned short* const to = reinterpret_cast<unsigned short*>(memory + AT_TURNS + token * QROW + place_of(p));
    to[0] = float_to_half(small[token * (D / 2) + p] * norm);
    to[2] = float_to_half(small[(64 + token) * (D / 2) + p] * norm);
  }
  if (SINKS > 0)
    for (int i = me; i < (last - first) * TEAM * SINKS; i += THREADS) {
      const int k = i % MARKS, f = i / MARKS % TEAM, page = first + i / MARKS / TEAM;
      const int mark =
          reinterpret_cast<const short*>(table[((long long)(row + f) * columns + page) * FIELDS + 6] * 2)[k];
      const int slot = page * TOKENS + mark;
      const int plane = (page - page_0) * PLANES + mark / 32;
      if (mark >= 0 && slot >= low && slot < high && plane >= begin && plane < end) {
        const int place = atomicAdd(marks, 1);
        if (place < TEAM * SINKS) marks[2 + 2 * place] = f * SINKS + k, marks[3 + 2 * place] = slot;
      }
    }

  // All but the queries stands there since before the kernel in front of this one.
  const long long revolutions = turns[me % (D / 2)];
  wait_for_others();

  // Of a line of scores; its row's queries may stand in another place (`Packed.order`).
  auto query = [&](int line) {
    return queries + (order ? order[line / heads] * heads + line % heads : (long long)line) * D;
  };
  // This thread's part of the queries: a pair of channels of some of them.
  constexpr int HALF = D / 2, ASKED = COLUMNS * HALF / THREADS, APART = THREADS / HALF;
  const u32 mine = AT_QUERIES + me / HALF * QROW + place_of(me % HALF);
  float even[ASKED], odd[ASKED];
  auto line_of = [&](int column) {
    const int f = column / EACH, h = column % EACH;
    return f < TEAM && h < heads ? (row + f) * heads + h : -1;
  };
#pragma unroll
  for (int i = 0; i < ASKED; i++) {
    const int at = line_of(me / HALF + i * APART), p = me % HALF;
    const Query* const from = query(max(at, 0));
    const float x = number(from[NEIGHBOURS ? 2 * p : p]), y = number(from[NEIGHBOURS ? 2 * p + 1 : p + HALF]);
    even[i] = at >= 0 ? x : 0.f, odd[i] = at >= 0 ? y : 0.f;
  }
#pragma unroll
  for (int k = 0; k < (COLUMNS + WARPS - 1) / WARPS; k++) {
    const int column = warp + k * WARPS;
    if (COLUMNS % WARPS && column >= COLUMNS) break;
    const int at = line_of(column);
    const Query* const from = query(max(at, 0));
    float most = 0.f;
#pragma unroll
    for (int i = 0; i < D; i += 32) most = fmaxf(most, fabsf(number(from[i + lane])));
#pragma unroll
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    if (lane == 0) factors[column] = at >= 0 ? fmaxf(most, 1e-30f) : 1.f, lines[column] = at;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < ASKED; i++) {
    const float factor = factors[me / HALF + i * APART];
    even[i] /= factor, odd[i] /= factor;
  }

  // 16 x 8 entries of the matrix, of columns 0 to 7 and 8 to 15.
  u32 undo[2][2];
#pragma unroll
  for (int n = 0; n < 2; n++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const int column = n * 8 + g, at = 2 * t + 8 * k;
      undo[n][k] = 0x3c003c00u ^ u32(__popc(at & column) & 1) << 15 ^ u32(__popc((at + 1) & column) & 1) << 31;
    }
  const int head = warp >> 1, half = warp & 1;
  const char* const keys =
      memory + (head * D + (lane >> 4) * 8 + (lane & 7)) * XROW + swapped(lane & 7, half * 2 + (lane >> 3 & 1));
  const char* const asked = memory + AT_QUERIES + g * QROW + t * QUAD;
  // Of tokens g and g + 8 of this half of a plane, the same in all planes.
  uint4 angles[STEPS / 2][2];
#pragma unroll
  for (int i = 0; i < STEPS / 2; i++)
#pragma unroll
    for (int k = 0; k < 2; k++)
      angles[i][k] = load16(memory + AT_TURNS + (half * 16 + g + 8 * k) * QROW + t * QUAD + i * 16);
  float* const parts = reinterpret_cast<float*>(memory + AT_PARTS);

  // Scores of 32 tokens, from this slot on.
  auto leave = [&](int slot) {
    slot += lane;
    if (slot < low || slot >= high) return;
#pragma unroll
    for (int k = 0; k < (COLUMNS + WARPS - 1) / WARPS; k++) {
      const int column = warp + k * WARPS;
      if (COLUMNS % WARPS && column >= COLUMNS) break;
      float sum = 0.f;
#pragma unroll
      for (int f = 0; f < TEAM; f++) sum += parts[(f * COLUMNS + column) * PART_ROW + lane];
      if (lines[column] >= 0) found[lines[column] * slots + slot] = sum * scale * factors[column];
    }
  };

  u32 thousand = 0x64006400u;
  keep(thousand);  // an instruction takes one constant

  int buffer = 0, before = -1, page = first, j = begin % PLANES;
#pragma unroll 1
  for (int plane = begin; plane < end; plane++, buffer = buffer == 2 ? 0 : buffer + 1) {
    if (j == 0 && page > first)
      wait<0>();  // for the words of this page, which were asked for in the last turn
    else
      wait<1>();
    __syncthreads();
    const int slot = page * TOKENS + j * 32;
    if (before >= 0) leave(before);
    before = slot;
    const bool turn = plane + 1 < end && j + 1 == PLANES;  // the next one is of the next page
    if (j == 0 && page > first && page + 1 < last) look_up(page + 1);
    if (plane + 2 < end) fetch_ahead(page, j + 2, buffer == 0 ? 2 : buffer - 1);
    {
      // Parts of 2**64 of a revolution: what is beyond a whole one falls off by itself.
      const u64 position = (u64)((long long)base + slot);
      const float angle = float(int(((u64)revolutions * position) >> 32)) * 1.4629180792671596e-09f;
      const float c = cos_(angle), s_ = sin_(angle);
#pragma unroll
      for (int i = 0; i < ASKED; i++) {
        unsigned short* const to = reinterpret_cast<unsigned short*>(memory + mine + i * APART * QROW);
        to[0] = float_to_half(even[i] * c + odd[i] * s_), to[2] = float_to_half(odd[i] * c - even[i] * s_);
      }
    }
    const char* const at_scales = memory + AT_SCALES + buffer * SCALES * 128;
    if (j < WITHIN)
      dequantise<0>(memory, me, own, at_scales, j * BITS, thousand);
    else
      dequantise<WITHIN * BITS>(memory, me, own, at_scales, (j - WITHIN) * BITS, thousand);
    __syncthreads();
    if (turn) fetch_words(page + 1);
    commit();

    // The matrix over channels is one of 16 x 16 times one over the blocks of 16, which is sums and differences. (None
    // of them is larger than the largest that comes out.)
    u32 c[TILES][2];  // tokens g and g + 8, two channels each
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
      u32 a[4];
      load_transposed(a, keys + 16 * k * XROW);
#pragma unroll
      for (int n = 0; n < 2; n++) mma_half(c[2 * k + n], a[0], a[1], a[2], a[3], undo[n][0], undo[n][1]);
    }
#pragma unroll
    for (int step = 2; step < TILES; step *= 2)
#pragma unroll
      for (int n = 0; n < TILES; n++)
        if (!(n & step))
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const u32 x = c[n][k], y = c[n + step][k];
            c[n][k] = add2(x, y), c[n + step][k] = sub2(x, y);
          }
    // Keys turned, of tokens g and g + 8; even channels of two pairs, and odd ones, are operands as they are.
    float score[PARTS][4];
#pragma unroll
    for (int n = 0; n < PARTS; n++) score[n][0] = score[n][1] = score[n][2] = score[n][3] = 0.f;
#pragma unroll
    for (int i = 0; i < STEPS; i += 2) {
      u32 x[2][4];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const uint4 angle = angles[i / 2][k];
        const u32 cosine[2] = {angle.x, angle.z}, sine[2] = {angle.y, angle.w};
#pragma unroll
        for (int n = 0; n < 2; n++) {
          const u32 one = c[2 * (i + n)][k], two = c[2 * (i + n) + 1][k];
          const u32 even_ = __byte_perm(one, two, 0x5410), odd_ = __byte_perm(one, two, 0x7632);
          x[n][k] = fma2(odd_ ^ 0x80008000u, sine[n], mul2(even_, cosine[n]));
          x[n][2 + k] = fma2(even_, sine[n], mul2(odd_, cosine[n]));
        }
      }
#pragma unroll
      for (int n = 0; n < PARTS; n++) {
        const uint4 q = load16(asked + n * 8 * QROW + i * 8);
        mma(score[n], x[0][0], x[0][1], x[0][2], x[0][3], q.x, q.y);
        mma(score[n], x[1][0], x[1][1], x[1][2], x[1][3], q.z, q.w);
      }
    }
#pragma unroll
    for (int n = 0; n < PARTS; n++)
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const int column = n * 8 + 2 * t + (k & 1);
        parts[(head * COLUMNS + column) * PART_ROW + half * 16 + g + k / 2 * 8] =
            __popc(column / EACH & head) & 1 ? -score[n][k] : score[n][k];
      }
    if (++j == PLANES) j = 0, page++;
  }
  wait<0>();
  __syncthreads();
  if (before >= 0) leave(before);
  if (SINKS > 0) {
    __syncthreads();  // what is exact comes after what stands in its place
    const int count = min(marks[0], TEAM * SINKS);
    for (int i = warp; i < count * heads; i += WARPS) {
      const int which = marks[2 + 2 * (i / heads)], at = (row + which / MARKS) * heads + i % heads;
      const Query* const key = sink_keys + ((long long)(row + which / MARKS) * SINKS + which % MARKS) * D;
      const Query* const from = query(at);
      float sum = 0.f;
      for (int k = lane; k < D; k += 32) sum = fmaf(number(key[k]), number(from[k]), sum);
#pragma unroll
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) found[at * slots + marks[3 + 2 * (i / heads)]] = sum * scale;
    }
  }
}

#else
constexpr int BLOCKS = D / 32, PAIR = 64, ROW = D * 2, WORDS = 32 * ROW;
constexpr int SIDE = WORDS + 4 * TOKENS * GROUPS;   // words, scales, zero points
constexpr int SCORE_ROW = 4 * TOKENS + 64;          // of a query head
constexpr int UNIT = SIDE + EACH * SCORE_ROW;
constexpr int AT_MARKS = PAIRS * UNITS * UNIT;
constexpr int BYTES [[maybe_unused]] = AT_MARKS + 16 + 8 * 32;

// As in packed.cu, which says why.
__device__ constexpr int value_shift(int j) {
  return BITS == 2 ? (j < 2 ? -4 : j < 5 ? 0 : 6) : BITS == 3 ? (j < 1 ? -3 : j < 3 ? 0 : 6) : (j < 2 ? 0 : 8);
}
__device__ constexpr int value_bit(int j) { return BITS * j - value_shift(j); }
constexpr int CLASSES = BITS == 2 ? 3 : 2;
__device__ constexpr int class_bit(int c) { return BITS == 2 ? 4 + 2 * c : BITS == 3 ? 3 + 3 * c : 4 * c; }
__device__ constexpr int value_class(int j) {
  return BITS == 2 ? value_bit(j) / 2 - 2 : BITS == 3 ? value_bit(j) / 3 - 1 : value_bit(j) / 4;
}
constexpr int TOP = BITS == 2 ? 8 : BITS == 3 ? 6 : 4, FOLD = BITS == 2 ? 3 : 5;
__device__ constexpr int value_swap(int row) { return (row & 1) | (row >> 1 & 6); }

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    values(const float* __restrict__ scores, const long long* __restrict__ table, const int* __restrict__ spans,
           const int* __restrict__ starts, const Query* __restrict__ sink_values, float* __restrict__ out,
           float* __restrict__ lse, int rows, int columns, int heads, long long slots) {
  extern __shared__ __align__(128) char memory[];
  const int lane = threadIdx.x & 31, half = threadIdx.x >> 5 & 1, g = lane >> 2, t = lane & 3;
  const int pair_ = threadIdx.x / PAIR, thread = threadIdx.x % PAIR;
  const int part = blockIdx.x / TEAM, member = blockIdx.x % TEAM;
  const int lead = row_of(starts, rows, part, lane);
  if (lead >= rows) {
    wait_for_others();  // so that this kernel is never done before the one in front of it
    return;
  }
  const int row = lead + member, low = spans[lead * SPAN], high = spans[lead * SPAN + 1], mine = part - starts[lead];
  const long long pages = pages_of(low, high), programs = starts[lead + 1] - starts[lead];
  const int page_0 = low / TOKENS;
  const int first = page_0 + int(pages * mine / programs), last = page_0 + int(pages * (mine + 1) / programs);
  table += (long long)row * columns * FIELDS;
  scores += (long long)row * heads * slots;

  char* const own = memory + pair_ * UNITS * UNIT;
  const u32 ring = shared(own);
  int ahead = first + pair_;
  long long next[3];
  auto look_up = [&]() {
#pragma unroll
    for (int i = 0; i < 3; i++) next[i] = ahead < last ? table[(long long)ahead * FIELDS + 3 + i] * 2 : 0;
  };
  look_up();
  auto fetch_page = [&](u32 unit) {
    if (ahead < last) {
      const char* words = reinterpret_cast<const char*>(next[0]) + thread * 16;
      constexpr int BLOCK = ROW / 16, SPREAD = 2 * TOKENS * GROUPS;
#pragma unroll
      for (int i = 0; i < WORDS / 16; i += PAIR)
        copy16(ring + unit + ((i + thread) ^ value_swap((i + thread) / BLOCK)) * 16, words + i * 16);
#pragma unroll
      for (int side = 0; side < 2; side++)
        for (int i = thread; i < SPREAD / 16; i += PAIR)
          copy16(ring + unit + WORDS + side * SPREAD + i * 16, reinterpret_cast<const char*>(next[1 + side]) + i * 16);
    }
    ahead += PAIRS;
    look_up();
  };
  auto fetch_scores = [&](u32 unit, int page) {
    if (page < last) {
      const char* from = reinterpret_cast<const char*>(scores + (long long)page * TOKENS);
      for (int h = 0; h < heads; h++)
        for (int i = thread; i < TOKENS / 4; i += PAIR)
          copy16(ring + unit + SIDE + h * SCORE_ROW + i * 16, from + (h * slots + i * 4) * 4);
    }
    commit();
  };
  // Pages stand there since before the kernel in front of this one.
#pragma unroll
  for (int unit = 0; unit < UNITS - 1; unit++) fetch_page(unit * UNIT);
  int* const marks = reinterpret_cast<int*>(memory + AT_MARKS);
  if (SINKS > 0) {
    if (threadIdx.x == 0) marks[0] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < (last - first) * SINKS; i += THREADS) {
      const int k = i % MARKS, page = first + i / MARKS;
      const int mark = reinterpret_cast<const short*>(table[(long long)page * FIELDS + 6] * 2)[k];
      const int slot = page * TOKENS + mark;
      if (mark >= 0 && slot >= low && slot < high) {
        const int place = atomicAdd(marks, 1);
        if (place < 32) marks[2 + 2 * place] = k, marks[3 + 2 * place] = slot;
      }
    }
    __syncthreads();
  }
  const int exact = SINKS > 0 ? min(marks[0], 32) : 0;
  wait_for_others();
  launch_dependents();  // what is in front of `scores` is done, too
#pragma unroll
  for (int unit = 0; unit < UNITS - 1; unit++) fetch_scores(unit * UNIT, first + pair_ + unit * PAIRS);

  // [channels g and g + 8 of 16] x [heads 2t, 2t + 1]; [zero points of value group g, sum of weights] x the same heads.
  float acc[2 * BLOCKS][4] = {}, sums[CLASSES][4] = {};
  float m = 0.f;  // of head g
  bool fresh = true;
  const int read = half * 16 + (lane >> 1 & 3) * 4 + (lane & 1) + (lane >> 4) * 2;  // this lane's row of load_transposed
  u32 value_at[4];
#pragma unroll
  for (int i = 0; i < 4; i++) value_at[i] = read * ROW + ((2 * i + (lane >> 3 & 1)) ^ value_swap(read)) * 16;
  const int by_token = WORDS + 2 * (half * 16 + 4 * t);

  u32 here = 0, behind = (UNITS - 1) * UNIT;
  for (int page = first + pair_; page < last; page += PAIRS) {
    wait<UNITS - 2>();
    sync_pair(pair_);
    const char* const side = own + here;
    fetch_page(behind);
    fetch_scores(behind, page + (UNITS - 1) * PAIRS);
    float s[PLANES][4];
    bool above = fresh;
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      const uint4 x = load16(side + SIDE + (g < heads ? g : 0) * SCORE_ROW + (j * 32 + half * 16 + 4 * t) * 4);
      const u32 y[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        s[j][k] = __uint_as_float(y[k]) - m;
        above |= !(s[j][k] <= 0.f);
      }
    }
    bool odd = page * TOKENS < low | page * TOKENS + TOKENS > high;
    for (int i = 0; i < exact; i++) odd |= marks[3 + 2 * i] / TOKENS == page;
    if (odd) {
#pragma unroll
      for (int j = 0; j < PLANES; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int token = page * TOKENS + j * 32 + half * 16 + 4 * t + k;
          bool out_ = token < low || token >= high;
          for (int i = 0; i < exact; i++) out_ |= marks[3 + 2 * i] == token;
          if (out_) s[j][k] = -__int_as_float(0x7f800000);
        }
    }
    if (__any_sync(~0u, above | odd)) {
      float most = -1e30f;
#pragma unroll
      for (int j = 0; j < PLANES; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) most = fmaxf(most, s[j][k]);
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
      most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
      const float grown = fresh ? (most > -1e29f ? most : 0.f) : fmaxf(most, 0.f);
      const float shrink = fresh ? 0.f : exp2_(-grown);
      m += grown;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float by = __shfl_sync(~0u, shrink, (2 * t + k) * 4);
#pragma unroll
        for (int c = 0; c < CLASSES; c++) sums[c][k] *= by, sums[c][k + 2] *= by;
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) acc[i][k] *= by, acc[i][k + 2] *= by;
      }
#pragma unroll
      for (int j = 0; j < PLANES; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) s[j][k] -= grown;
      fresh = fresh & !__any_sync(~0u, most > -1e29f);
    }
    u32 p[PLANES][2];  // tokens 4t .. 4t + 3 of head g
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      const float fold = FOLD + TOP - class_bit(value_class(j));
      p[j][0] = pair(exp2_(s[j][0] + fold), exp2_(s[j][1] + fold));
      p[j][1] = pair(exp2_(s[j][2] + fold), exp2_(s[j][3] + fold));
    }
    constexpr int PLANE = GROUPS * 64;
    const char* value_scales = side + by_token;
    const char* zeros = value_scales + 2 * TOKENS * GROUPS + g % GROUPS * 64;
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      constexpr u32 ONE = 0x3c003c00u;
      const u32* a = reinterpret_cast<const u32*>(zeros + j * PLANE);
      mma(sums[value_class(j)], a[0], ONE, a[1], ONE, p[j][0], p[j][1]);
      if (GROUPS == 1) {
        const uint2 x = load8(value_scales + j * PLANE);
        p[j][0] = mul2(p[j][0], x.x), p[j][1] = mul2(p[j][1], x.y);
      }
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      u32 w[2][4];  // channels g and g + 8 of 16, tokens 4t .. 4t + 3
      load_transposed(w[0], side + value_at[i * 2 % 4] + i / 2 * 128);
      load_transposed(w[1], side + value_at[i * 2 % 4 + 1] + i / 2 * 128);
      u32 v[2][4];
#pragma unroll
      for (int j = 0; j < PLANES; j++) {
        u32 b0 = p[j][0], b1 = p[j][1];
        if (GROUPS > 1) {
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
    behind = here;
    here = here == (UNITS - 1) * UNIT ? 0 : here + UNIT;
  }
  float weight[2], top[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    float shift = 0.f;
    weight[k] = 0.f;
    top[k] = __shfl_sync(~0u, m, (2 * t + k) * 4);
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
  wait<0>();
  __syncthreads();

  // The warps' parts together. float [warps][8 heads][WIDE], then maxima and sums [warps][2][8].
  constexpr int WIDE = D + 4;
  float* const parts = reinterpret_cast<float*>(memory);
  float* const ends = parts + WARPS * 8 * WIDE;
  static_assert(4 * WARPS * (8 * WIDE + 16) <= PAIRS * UNITS * UNIT, "they fit into the rings");
  const int warp = threadIdx.x >> 5;
  {
    float* const to = parts + warp * 8 * WIDE;
#pragma unroll
    for (int k = 0; k < 2; k++) {
      if (g == 0) ends[warp * 16 + 2 * t + k] = fresh ? -1e30f : top[k], ends[warp * 16 + 8 + 2 * t + k] = weight[k];
#pragma unroll
      for (int i = 0; i < 2 * BLOCKS; i++) {
        to[(2 * t + k) * WIDE + 16 * i + g] = acc[i][k];
        to[(2 * t + k) * WIDE + 16 * i + 8 + g] = acc[i][k + 2];
      }
    }
  }
  __syncthreads();
  constexpr int MINE = D / 32;  // channels of a lane, in a row
  for (int h = warp; h < heads; h += WARPS) {
    float above = -1e30f, total = 0.f, o[MINE] = {};
    for (int i = 0; i < WARPS; i++) above = fmaxf(above, ends[i * 16 + h]);
    for (int i = 0; i < WARPS; i++) {
      const float f = exp2_(ends[i * 16 + h] - above) * pow2(-FOLD);
      total = fmaf(ends[i * 16 + 8 + h], f, total);
#pragma unroll
      for (int k = 0; k < MINE; k++) o[k] = fmaf(parts[(i * 8 + h) * WIDE + lane * MINE + k], f, o[k]);
    }
    // The rotation is its own inverse.
#pragma unroll
    for (int step = 1; step < MINE; step *= 2)
#pragma unroll
      for (int k = 0; k < MINE; k++)
        if (!(k & step)) {
          const float x = o[k], y = o[k + step];
          o[k] = x + y, o[k + step] = x - y;
        }
#pragma unroll
    for (int step = 1; step < 32; step *= 2)
#pragma unroll
      for (int k = 0; k < MINE; k++) {
        const float other = __shfl_xor_sync(~0u, o[k], step);
        o[k] = lane & step ? other - o[k] : o[k] + other;
      }
    const float norm = rsqrtf(float(D));
#pragma unroll
    for (int k = 0; k < MINE; k++) o[k] *= norm;
    for (int i = 0; i < exact; i++) {
      const float score = scores[h * slots + marks[3 + 2 * i]], most = fmaxf(above, score);
      const float f = exp2_(above - most), p = exp2_(score - most);
      const Query* const value = sink_values + ((long long)row * SINKS + marks[2 + 2 * i]) * D + lane * MINE;
      above = most, total = fmaf(total, f, p);
#pragma unroll
      for (int k = 0; k < MINE; k++) o[k] = fmaf(o[k], f, p * number(value[k]));
    }
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    const long long at = (long long)blockIdx.x * heads + h;
#pragma unroll
    for (int k = 0; k < MINE; k++) out[at * D + lane * MINE + k] = o[k] * inverse;
    if (lane == 0) lse[at] = total > 0.f ? above + log2f(total) : -1e30f;
  }
}
#endif
