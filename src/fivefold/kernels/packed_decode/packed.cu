// One share of the packed pages of a row: see cuda.py.
//
// Compiled for one form of pages: BITS, GROUP, CHANNELS, D (head_dim); UNITS of shared memory, the dtype of the QUERIES,
// SPAN columns of a table of spans, RESIDENT programs on a processor.
// Two warps; each takes 16 of the 32 rows of every page and keeps a softmax of its own until the end. The sides of a
// page, keys and values, are copied into a ring of units ahead of their use.
//
// Products are mma.m16n8k16 with the codes on the left: a bit-field of a word, masked where it lies and read as
// float16, is the subnormal code * 2^(bit - 24). The order of channels within a product is free, so a thread takes the
// eight channels of 16 bytes as they lie. Scales go to the other side: of keys into the query, of values into the
// weights; zero points are products of their own. The powers of two are undone in float32.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int PLANES = BITS == 2 ? 8 : BITS == 3 ? 5 : BITS == 4 ? 4 : 2;
constexpr int TOKENS = PLANES * 32, KEY_GROUPS = TOKENS / GROUP, VALUE_GROUPS = D / CHANNELS;
constexpr int BLOCKS = D / 32;           // of 32 channels
constexpr int ROW = D * 2, WORDS = 32 * ROW;
constexpr int KEY_SIDE = WORDS + 2 * KEY_GROUPS * ROW, VALUE_SIDE = WORDS + 4 * TOKENS * VALUE_GROUPS;
constexpr int UNIT = KEY_SIDE > VALUE_SIDE ? KEY_SIDE : VALUE_SIDE;
constexpr int THREADS = 64;

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
constexpr int TOP = BITS == 2 ? 8 : BITS == 3 ? 6 : BITS == 4 ? 4 : 0;      // the highest of value_bit
constexpr int FOLD = BITS == 2 ? 3 : BITS == 3 ? 5 : BITS == 4 ? 5 : 13;    // weights are times 2^FOLD

// What the hardware does. (tests/cuda_on_cpu.h does the same on a CPU.)
#ifndef CUDA_ON_CPU
__device__ __forceinline__ u32 mul2(u32 a, u32 b) {
  u32 c;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 c;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
  return c;
}
__device__ __forceinline__ float exp2_(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ u32 transposed(u32 a) {
  u32 b;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(a));
  return b;
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ float half_to_float(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ u32 shared(const char* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(u32 to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;"); }
template <int PENDING>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
#endif

#if QUERIES == 0
typedef float Query;
__device__ __forceinline__ float number(Query x) { return x; }
#elif QUERIES == 1
typedef unsigned short Query;
__device__ __forceinline__ float number(Query x) { return half_to_float(x); }
#else
typedef unsigned short Query;  // bfloat16
__device__ __forceinline__ float number(Query x) { return __uint_as_float(u32(x) << 16); }
#endif

__device__ __forceinline__ float pow2(int e) { return __int_as_float((e + 127) << 23); }
__device__ __forceinline__ u32 half2_pow2(int e) { return u32((e + 15) << 10) * 0x10001u; }

__device__ __forceinline__ uint4 load16(const char* p) { return *reinterpret_cast<const uint4*>(p); }

// Blocks of 16 bytes of a side's words are swapped so that no two threads of a load meet in a bank.
__device__ __forceinline__ int key_swap(int row) { return (row & 1) << 2; }
__device__ __forceinline__ int value_swap(int row) { return row & 6; }

template <int BYTES, bool KEYS>
__device__ __forceinline__ void copy(u32 to, const char* from) {
#pragma unroll
  for (int first = 0; first < BYTES / 16; first += THREADS) {
    int at = first + threadIdx.x;
    if (BYTES / 16 % THREADS && first + THREADS > BYTES / 16 && at >= BYTES / 16) break;
    int row = at / (ROW / 16), place = at;
    if (first < WORDS / 16) place = at ^ (KEYS ? key_swap(row) : value_swap(row));
    copy16(to + place * 16, from + at * 16);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
    packed(const Query* __restrict__ queries, const long long* __restrict__ table, const int* __restrict__ spans,
           const int* __restrict__ starts, float* __restrict__ out, float* __restrict__ lse, float scale, int rows,
           int columns, int heads) {
  extern __shared__ __align__(128) char memory[];
  const int lane = threadIdx.x & 31, half = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int part = blockIdx.x;

  int row = 0;
  for (int first = 0; first < rows; first += 32)
    row += __popc(__ballot_sync(~0u, first + lane < rows && starts[1 + first + lane] <= part));
  if (row >= rows) return;
  const int begin = starts[row], programs = starts[row + 1] - begin;
  const int low = spans[row * SPAN], high = spans[row * SPAN + 1];
  const int pages = (high + TOKENS - 1) / TOKENS - low / TOKENS;
  const int first = low / TOKENS + int((long long)(part - begin) * pages / programs);
  const int last = low / TOKENS + int((long long)(part - begin + 1) * pages / programs);
  table += (long long)row * columns;

  const u32 ring = shared(memory);
  // What is copied next: a side of a page.
  int ahead = first;
  long long address = first < last ? table[first] * 16 : 0, next = first + 1 < last ? table[first + 1] * 16 : 0;
  auto fetch = [&](bool keys, int unit) {
    if (ahead < last) {
      const char* record = reinterpret_cast<const char*>(address);
      if (keys)
        copy<KEY_SIDE, true>(ring + unit * UNIT, record);
      else
        copy<VALUE_SIDE, false>(ring + unit * UNIT, record + KEY_SIDE);
    }
    commit();
    if (!keys) {
      ahead += 1;
      address = next;
      next = ahead + 1 < last ? table[ahead + 1] * 16 : 0;
    }
  };
#pragma unroll
  for (int unit = 0; unit < UNITS - 1; unit++) fetch(unit % 2 == 0, unit);

  // The queries of head g, scaled by a power of two to be below 64, and for channels 8t .. 8t + 7 of every block.
  u32 q[BLOCKS][4];
  {
    float x[BLOCKS][8], most = 0;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
      for (int k = 0; k < 8; k++) {
        x[i][k] = g < heads ? number(queries[((long long)row * heads + g) * D + 32 * i + 8 * t + k]) : 0.f;
        most = fmaxf(most, fabsf(x[i][k]));
      }
#pragma unroll
    for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    int e = (__float_as_int(most) >> 23) - 127;
    e = max(-100, min(100, e)) - 5;
    float f = pow2(-e);
#pragma unroll
    for (int i = 0; i < BLOCKS; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) q[i][k] = pair(x[i][2 * k] * f, x[i][2 * k + 1] * f);
    scale *= pow2(e);
  }

  float acc[2 * BLOCKS][4] = {}, shift[4] = {};  // [channels g and g + 8 of a block's half] x [heads 2t, 2t + 1]
  float m[2] = {-1e30f, -1e30f}, weight[2] = {0.f, 0.f};

  int unit = 0;
  auto turn = [&]() {
    wait<UNITS - 2>();
    __syncthreads();
    return (const char*)memory + unit * UNIT;
  };
  auto done = [&]() { unit = unit + 1 == UNITS ? 0 : unit + 1; };
  auto behind = [&]() { return unit == 0 ? UNITS - 1 : unit - 1; };

  for (int page = first; page < last; page++) {
    // Keys.
    const char* side = turn();
    fetch(UNITS % 2 == 0 ? false : true, behind());
    float s[PLANES][4];
    float z[4] = {};
#pragma unroll
    for (int j = 0; j < PLANES; j++) s[j][0] = s[j][1] = s[j][2] = s[j][3] = 0.f;
    const int mine = half * 16 + g;
    const char* scales = side + WORDS + 16 * t;
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      const int at = (4 * i + t) ^ key_swap(mine);
      const uint4 w0 = load16(side + mine * ROW + at * 16), w1 = load16(side + (mine + 8) * ROW + at * 16);
      const u32 w[2][4] = {{w0.x, w0.y, w0.z, w0.w}, {w1.x, w1.y, w1.z, w1.w}};
      {
        uint4 zero = make_uint4(0, 0, 0, 0);
        if (g < KEY_GROUPS) zero = load16(scales + KEY_GROUPS * ROW + g * ROW + 64 * i);
        mma(z, zero.x, 0, zero.y, 0, q[i][0], q[i][1]);
        mma(z, zero.z, 0, zero.w, 0, q[i][2], q[i][3]);
      }
      u32 v[2][4], b[4];
#pragma unroll
      for (int j = 0; j < PLANES; j++) {
        if (j * 32 % GROUP == 0) {
          const uint4 x = load16(scales + j * 32 / GROUP * ROW + 64 * i);
          b[0] = mul2(x.x, q[i][0]), b[1] = mul2(x.y, q[i][1]), b[2] = mul2(x.z, q[i][2]), b[3] = mul2(x.w, q[i][3]);
        }
        constexpr u32 ONES = (1u << BITS) - 1;
        const u32 mask = (ONES << key_bit(j)) * 0x10001u;
        if (j == 0 || key_shift(j) != key_shift(j - 1)) {
#pragma unroll
          for (int k = 0; k < 4; k++) v[0][k] = w[0][k] >> key_shift(j), v[1][k] = w[1][k] >> key_shift(j);
        }
        mma(s[j], v[0][0] & mask, v[1][0] & mask, v[0][1] & mask, v[1][1] & mask, b[0], b[1]);
        mma(s[j], v[0][2] & mask, v[1][2] & mask, v[0][3] & mask, v[1][3] & mask, b[2], b[3]);
      }
    }
    done();

    // Softmax: rows g and g + 8 of every plane, heads 2t and 2t + 1.
    float top[2] = {-1e30f, -1e30f};
    z[0] *= scale, z[1] *= scale;
    float zero[2];
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      if (j * 32 % GROUP == 0) {
        zero[0] = __shfl_sync(~0u, z[0], j * 32 / GROUP * 4 + t);
        zero[1] = __shfl_sync(~0u, z[1], j * 32 / GROUP * 4 + t);
      }
      const float f = scale * pow2(24 - key_bit(j));
#pragma unroll
      for (int k = 0; k < 4; k++) s[j][k] = fmaf(s[j][k], f, zero[k & 1]);
    }
    if (page * TOKENS < low || page * TOKENS + TOKENS > high) {
#pragma unroll
      for (int j = 0; j < PLANES; j++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int token = page * TOKENS + j * 32 + mine + k / 2 * 8;
          if (token < low || token >= high) s[j][k] = -__int_as_float(0x7f800000);
        }
    }
#pragma unroll
    for (int j = 0; j < PLANES; j++)
#pragma unroll
      for (int k = 0; k < 4; k++) top[k & 1] = fmaxf(top[k & 1], s[j][k]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
#pragma unroll
      for (int k = 0; k < 2; k++) top[k] = fmaxf(top[k], __shfl_xor_sync(~0u, top[k], step));
    if (__any_sync(~0u, top[0] > m[0] || top[1] > m[1])) {
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const float above = fmaxf(m[k], top[k]), shrink = exp2_(m[k] - above);
        m[k] = above;
        weight[k] *= shrink, shift[k] *= shrink;
#pragma unroll
        for (int i = 0; i < 2 * BLOCKS; i++) acc[i][k] *= shrink, acc[i][k + 2] *= shrink;
      }
    }
    u32 p[PLANES][2];  // tokens 2t, 2t + 1 and 2t + 8, 2t + 9 of head g
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      const int e = FOLD + TOP - value_bit(j);
#pragma unroll
      for (int k = 0; k < 4; k++) {
        s[j][k] = exp2_(s[j][k] - (m[k & 1] - e));
        weight[k & 1] = fmaf(s[j][k], pow2(value_bit(j) - TOP), weight[k & 1]);  // times 2^FOLD
      }
      p[j][0] = transposed(pair(s[j][0], s[j][1]));
      p[j][1] = transposed(pair(s[j][2], s[j][3]));
    }

    // Values.
    side = turn();
    fetch(UNITS % 2 == 0 ? true : false, behind());
    const int token = half * 16 + 2 * t;
    const char* by_token = side + WORDS + 2 * token;
    constexpr int PLANE = VALUE_GROUPS * 64;
#pragma unroll
    for (int j = 0; j < PLANES; j++) {
      // Zero points: groups are the rows.
      u32 a0 = 0, a2 = 0;
      if (g < VALUE_GROUPS) {
        const char* at = by_token + 2 * TOKENS * VALUE_GROUPS + j * PLANE + g * 64;
        const u32 f = half2_pow2(value_bit(j) - TOP);
        a0 = mul2(*reinterpret_cast<const u32*>(at), f), a2 = mul2(*reinterpret_cast<const u32*>(at + 16), f);
      }
      mma(shift, a0, 0, a2, 0, p[j][0], p[j][1]);
      if (VALUE_GROUPS == 1) {
        const char* at = by_token + j * PLANE;
        p[j][0] = mul2(p[j][0], *reinterpret_cast<const u32*>(at));
        p[j][1] = mul2(p[j][1], *reinterpret_cast<const u32*>(at + 16));
      }
    }
#pragma unroll
    for (int i = 0; i < BLOCKS; i++) {
      u32 w[2][4];  // of the two halves of a block: channels 4g + 2n, 4g + 2n + 1, two pairs of tokens
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int r = token + 8 * k, at = ((4 * i + g / 2) ^ value_swap(r)) * 16 + g % 2 * 8;
        const uint2 a = *reinterpret_cast<const uint2*>(side + r * ROW + at);
        const uint2 b = *reinterpret_cast<const uint2*>(side + (r + 1) * ROW + at);
        w[0][2 * k] = __byte_perm(a.x, b.x, 0x5410), w[0][2 * k + 1] = __byte_perm(a.x, b.x, 0x7632);
        w[1][2 * k] = __byte_perm(a.y, b.y, 0x5410), w[1][2 * k + 1] = __byte_perm(a.y, b.y, 0x7632);
      }
      u32 v[2][4];
#pragma unroll
      for (int j = 0; j < PLANES; j++) {
        u32 b0 = p[j][0], b1 = p[j][1];
        if (VALUE_GROUPS > 1) {
          const char* at = by_token + j * PLANE + i * 32 / CHANNELS * 64;
          b0 = mul2(b0, *reinterpret_cast<const u32*>(at)), b1 = mul2(b1, *reinterpret_cast<const u32*>(at + 16));
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
  wait<0>();
  __syncthreads();

  // The two warps' parts together. float [D][8], then maxima and sums [2][8].
  float* const sum = reinterpret_cast<float*>(memory);
  float* const ends = sum + D * 8;
#pragma unroll
  for (int k = 0; k < 2; k++)
#pragma unroll
    for (int step = 4; step < 32; step *= 2) weight[k] += __shfl_xor_sync(~0u, weight[k], step);
  // Zero points go to their channels.
#pragma unroll
  for (int i = 0; i < BLOCKS; i++)
#pragma unroll
    for (int k = 0; k < 2; k++) {
      const float zero = __shfl_sync(~0u, shift[k], i * 32 / CHANNELS * 4 + t);
#pragma unroll
      for (int n = 0; n < 2; n++) {
        acc[2 * i + n][k] = fmaf(acc[2 * i + n][k], pow2(24 - TOP), zero);
        acc[2 * i + n][k + 2] = fmaf(acc[2 * i + n][k + 2], pow2(24 - TOP), zero);
      }
    }
  auto channel = [&](int i, int k) { return 32 * (i / 2) + 4 * g + 2 * (i % 2) + k / 2; };
  if (half == 1) {
#pragma unroll
    for (int i = 0; i < 2 * BLOCKS; i++)
#pragma unroll
      for (int k = 0; k < 4; k++) sum[channel(i, k) * 8 + 2 * t + (k & 1)] = acc[i][k];
    if (g == 0)
#pragma unroll
      for (int k = 0; k < 2; k++) ends[2 * t + k] = m[k], ends[8 + 2 * t + k] = weight[k];
  }
  __syncthreads();
  if (half == 1) return;
  float mine_[2], other[2];
#pragma unroll
  for (int k = 0; k < 2; k++) {
    const float m1 = ends[2 * t + k], above = fmaxf(m[k], m1);
    const float f0 = exp2_(m[k] - above), f1 = exp2_(m1 - above);
    const float total = weight[k] * f0 + ends[8 + 2 * t + k] * f1;
    const float inverse = total > 0.f ? 1.f / total : 0.f;
    mine_[k] = f0 * inverse, other[k] = f1 * inverse;
    if (g == 0 && 2 * t + k < heads)
      lse[(long long)part * heads + 2 * t + k] = total > 0.f ? above + log2f(total) - FOLD : -1e30f;
  }
#pragma unroll
  for (int i = 0; i < 2 * BLOCKS; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const int head = 2 * t + (k & 1), c = channel(i, k);
      if (head < heads)
        out[((long long)part * heads + head) * D + c] = acc[i][k] * mine_[k & 1] + sum[c * 8 + head] * other[k & 1];
    }
}
