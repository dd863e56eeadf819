// One share of the pages of features of a team of rows: see cuda.py. What `triton._features` does, for Hopper.
//
// Compiled for one form: HEADS rows (kv heads) have features together, RK of keys and RV of values each, BITS a number
// (0: sixteen as they are, bfloat16 if KIND is 2, else float16), D (head_dim); M query heads a row, whose dtype is
// QUERIES; ROPE pairs of channels are turned, NEIGHBOURS or half a head apart; SPAN columns of a table of spans; BLOCKS
// teams have matrices of their own. A program makes the keys of GROUP heads, whose matrices stay in shared memory all
// along; SPLIT programs, one behind the other, share a team's heads out.
//
// Two groups of four warps take turns with units of 64 tokens; while one waits for products the other turns keys. A unit's
// features are copied ahead of their use: keys into registers first (the left operand), so that their place is free again
// at once. Keys come out of a product (wgmma, 64 channels of a head at a time) where the next one (mma, with the queries)
// wants them: they are turned and rounded in between, and never stored. The queries are turned back to where the unit
// begins, so that one table of 64 angles serves all.
// With SCORES it leaves these, float32 [teams, slots, HEADS * M], and that is all: where features are so many that there
// are no registers for sums of values, nor memory for two units of keys, of which the groups then have one in turn.
// Values are never made: features are summed by their weights, features as the rows of the product. That is done while
// the first products of the next unit are under way.
// Which tokens are rows g and g + 8 of a warp is free: every fourth, so that no two threads of a load meet in a bank,
// whatever odd number of words a row has. Rows that are a power of two are swapped in blocks of 16 bytes instead.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int NK = (HEADS * RK + 15) / 16 * 16, NV = (HEADS * RV + 15) / 16 * 16;
constexpr int WIDTH = 64;  // channels of keys that are made at a time
constexpr int KSTEPS = NK / 16, VSTEPS = NV / 16, CHUNKS = D / WIDTH;
constexpr int BUFFERS = WIDTH == 64 ? 2 : 1;  // of such keys
constexpr int PLANES = BITS ? 16 / (BITS ? BITS : 1) : 1, TOKENS = BITS ? 32 * PLANES : 128;
constexpr int UNIT = 64, UNITS = TOKENS / UNIT;
constexpr int SIDE_K = BITS ? (64 + 4 * PLANES) * RK : TOKENS * RK * 2;  // bytes of a page
constexpr int SIDE_V = BITS ? (64 + 4 * PLANES) * RV : TOKENS * RV * 2;
constexpr int COPY_K = BITS ? SIDE_K : UNIT * RK * 2, COPY_V = BITS ? SIDE_V : UNIT * RV * 2;  // of a unit, of a row
constexpr int SPLIT = HEADS / GROUP, COLUMNS = GROUP * M;
constexpr int WORKERS = 2, THREADS = 128 * WORKERS;
constexpr int UP = NK * D * 2;  // bytes of the matrix of a head
constexpr int QUERY_WORDS = D / 2 * 8;
// Blocks of 16 bytes of a row of features that are swapped among each other, less one.
__device__ constexpr int swapped(int rank) {
  const int blocks = rank / 8;
  return BITS || rank % 8 || (blocks & (blocks - 1)) || blocks < 2 ? 0 : blocks < 8 ? blocks - 1 : 7;
}
constexpr bool SWAP = swapped(RK) && swapped(RV);
// Shared memory: matrices; features of keys and of values of each worker; queries; queries turned of each; phases; barriers.
constexpr int AT_UNITS = GROUP * UP, WORKER = HEADS * (COPY_K + (SCORES ? 0 : COPY_V));
constexpr int AT_QUERIES = AT_UNITS + (SCORES ? 1 : WORKERS) * WORKER, AT_TURNED = AT_QUERIES + QUERY_WORDS * 8;
constexpr int AT_PHASES = AT_TURNED + WORKERS * GROUP * QUERY_WORDS * 4, AT_BARRIERS = AT_PHASES + D / 2 * 8;
static_assert(RK % 2 == 0 && RV % 2 == 0 && COLUMNS <= 8 && HEADS <= 32 && HEADS % GROUP == 0, "");
static_assert(COPY_K % 16 == 0 && COPY_V % 16 == 0 && SIDE_K % 16 == 0, "copies are of 16 bytes");

// What the hardware does. (tests/features_on_cpu.h does the same on a CPU.)
#ifndef CUDA_ON_CPU
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
__device__ __forceinline__ float half_low(u32 x) {
  float y;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a;}" : "=f"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ float half_high(u32 x) {
  float y;
  asm("{.reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b;}" : "=f"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ u32 sub2(u32 a, u32 b) {
  u32 c;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
  return c;
}
__device__ __forceinline__ u32 and_or(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ u32 fma2(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
#if KIND == 2
#define NUMBERS "bf16"
#else
#define NUMBERS "f16"
#endif
__device__ __forceinline__ u32 pair(float low, float high) {
  u32 c;
  asm("cvt.rn." NUMBERS "x2.f32 %0, %1, %2;" : "=r"(c) : "f"(high), "f"(low));
  return c;
}
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBERS "." NUMBERS
      ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 shared(const char* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void barrier_init(u32 at, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void expect(u32 at, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
__device__ __forceinline__ void await(u32 at, u32 phase) {
  asm volatile(
      "{.reg .pred p;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
      "@p bra.uni done;\n"
      "bra.uni again;\n"
      "done:}" ::"r"(at), "r"(phase)
      : "memory");
}
__device__ __forceinline__ void copy(u32 to, const char* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void copy16(u32 to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
// This thread arrives once its copies of 16 bytes have.
__device__ __forceinline__ void arrive_copied(u32 barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ long long shuffled(long long x, int lane) { return __shfl_sync(~0u, x, lane); }
// What was written here comes before copies that are started later.
__device__ __forceinline__ void before_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void sync_worker(int worker) {
  asm volatile("bar.sync %0, 128;" ::"r"(worker + 1) : "memory");
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Four words that stay the same, but are not to stay in registers.
__device__ __forceinline__ uint4 again(const uint4* at) {
  uint4 x;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(at));
  return x;
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// The kernel in front of this one is done; the one behind it may be made ready.
__device__ __forceinline__ void await_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
template <int PENDING, int N>
__device__ __forceinline__ void products_wait(float (&c)[N]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(c[i])::"memory");  // nobody reads them before
}
// c [64, 64 or 128] = a [64, 16] b (+ c): a in registers, b in shared memory, 32 bytes a column, blocks of 16 bytes swapped in
// four of every eight.
__device__ __forceinline__ void product(float (&c)[32], const u32 (&a)[4], u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." NUMBERS "." NUMBERS
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;}\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&c)[64], const u32 (&a)[4], u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." NUMBERS "." NUMBERS
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
      "%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,"
      "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, {%64,%65,%66,%67}, %68, p, 1, 1, 0;}\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]),
        "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]),
        "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]),
        "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]),
        "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]),
        "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void product(float (&c)[4], const u32 (&a)[4], u64 b, int add) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ne.b32 p, %9, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32." NUMBERS "." NUMBERS
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, p, 1, 1, 0;}\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
__device__ __forceinline__ void turn(float angle, float* cosine, float* sine) {
  *cosine = __cosf(angle), *sine = __sinf(angle);
}
#endif

#if QUERIES == 0
typedef float Query;
__device__ __forceinline__ float number(Query x) { return x; }
#elif QUERIES == 1
typedef unsigned short Query;
__device__ __forceinline__ float number(Query x) { return half_low(x); }
#else
typedef unsigned short Query;  // bfloat16
__device__ __forceinline__ float number(Query x) { return __uint_as_float(u32(x) << 16); }
#endif
#if KIND == 2
__device__ __forceinline__ float first_of(u32 x) { return __uint_as_float(x << 16); }
__device__ __forceinline__ float second_of(u32 x) { return __uint_as_float(x & 0xffff0000u); }
#else
__device__ __forceinline__ float first_of(u32 x) { return half_low(x); }
__device__ __forceinline__ float second_of(u32 x) { return half_high(x); }
#endif

__device__ __forceinline__ u32 word(const char* p) { return *reinterpret_cast<const u32*>(p); }

// How many bytes further on than `own` features feature `first + own` of a token lies (own + 2 is at most MOST), where rows
// have RANK features and are COPY bytes apart. `first` is known beforehand, so little is left to do for each thread.
template <int RANK, int COPY, int MOST>
__device__ __forceinline__ int further(int first, int own) {
  if (RANK < MOST) {
    const int row = (first + own) / RANK;
    return row * (COPY - RANK * 2) + first * 2;
  }
  const int row = first / RANK, rest = first - row * RANK, next = rest + MOST > RANK && own >= RANK - rest;
  return row * COPY + rest * 2 + (next ? COPY - RANK * 2 : 0);
}
// A pair of features at p, of a token: of numbers; or of planes of words, of which `shift` takes one, scales and zero
// points.
template <int RANK>
__device__ __forceinline__ u32 feature(const char* p, int shift, u32 scale, u32 zero) {
  const u32 x = word(p);
  if (!BITS) return x;
  constexpr u32 MASK = ((1u << (BITS ? BITS : 1)) - 1) * 0x10001u;
  return fma2(sub2(and_or(x >> shift, MASK, 0x64006400u), 0x64006400u), scale, zero);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    features(const Query* __restrict__ queries, const long long* __restrict__ table, const int* __restrict__ spans,
             const int* __restrict__ starts, const char* __restrict__ ups, const uint4* __restrict__ waves,
             const double* __restrict__ angles, float* __restrict__ sums, float* __restrict__ sums_lse,
             float* __restrict__ scores, float scale, int rows, int columns, int processors) {
  extern __shared__ __align__(1024) char memory[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5 & 3, worker = threadIdx.x >> 7, thread = threadIdx.x & 127;
  const int g = lane >> 2, t = lane & 3;
  const int split = blockIdx.x % SPLIT;

  // A team's programs take what `each` of them would, together: so all fit on the device at a time.
  const int each = max(1, (starts[rows] * SPLIT + processors - 1) / processors), teams = rows / HEADS;
  int team = -1, share = 0, shares = 1, part = 0;
  for (int first = 0, left = blockIdx.x / SPLIT; first < teams && team < 0; first += 32) {
    int begin = 0, mine = 0;
    if (first + lane < teams) {
      begin = starts[(first + lane) * HEADS];
      const int count = starts[(first + lane + 1) * HEADS] - begin;
      mine = count ? max(1, count / each) : 0;
    }
    int sum = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_sync(~0u, sum, lane - step);
      if (lane >= step) sum += before;
    }
    const u32 found = __ballot_sync(~0u, left < sum);
    if (found) {
      const int who = __popc((found & (0u - found)) - 1);
      team = first + who, shares = __shfl_sync(~0u, mine, who), share = left - __shfl_sync(~0u, sum, who) + shares;
      part = __shfl_sync(~0u, begin, who) + share;
    }
    left -= __shfl_sync(~0u, sum, 31);
  }
  if (team < 0) {
    await_kernel();
    return;
  }

  const int* const span = spans + team * HEADS * SPAN;
  const int low_ = span[0], high_ = span[1], position = span[7];
  const int base = low_ / UNIT, all = high_ > low_ ? (high_ + UNIT - 1) / UNIT - base : 0;
  const int first = base + int((long long)share * all / shares), last = base + int((long long)(share + 1) * all / shares);

  char* const keys = memory + AT_UNITS + (SCORES ? 0 : worker * WORKER);
  char* const values = keys + HEADS * COPY_K;
  float2* const raw = reinterpret_cast<float2*>(memory + AT_QUERIES);
  u32* const turned = reinterpret_cast<u32*>(memory + AT_TURNED) + worker * GROUP * QUERY_WORDS;
  const u32 barriers = shared(memory + AT_BARRIERS), up_came = barriers + WORKERS * 16;
  const u32 keys_came = barriers + worker * 16, values_came = keys_came + 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * WORKERS + 1; i++) barrier_init(barriers + 8 * i, SWAP && i < 2 * WORKERS ? 128 : 1);
    barriers_ready();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(up_came, GROUP * UP);
    for (int i = 0; i < GROUP; i++)
      copy(shared(memory) + i * UP, ups + (long long)(team % BLOCKS * HEADS + split * GROUP + i) * UP, UP, up_came);
  }
  // The record of the row that this lane copies, in units of 16 bytes: a warp copies every fourth. Nothing is made of it
  // before it is used, so that nobody waits for it.
  const int mine = SWAP ? lane : 4 * lane + warp;
  auto record = [&](int unit) -> long long {
    return mine < HEADS && unit < last ? table[(long long)(team * HEADS + mine) * columns + unit / UNITS] : 0;
  };
  auto fetch = [&](bool is_keys, int unit, long long from, int whose) {
    if (unit >= last) return;
    const u32 to = shared(is_keys ? keys : values), came = barriers + whose * 16 + (is_keys ? 0 : 8);
    const int bytes = is_keys ? COPY_K : COPY_V, at = (is_keys ? 0 : SIDE_K) + (BITS ? 0 : unit % UNITS * bytes);
    if (SWAP) {
      const int rank = is_keys ? RK : RV, blocks = rank / 8;
#pragma unroll
      for (int row = 0; row < HEADS; row++) {
        const char* const source = reinterpret_cast<const char*>(shuffled(from, row) * 16) + at;
        for (int i = thread; i < UNIT * blocks; i += 128)
          copy16(to + row * bytes + (i ^ (i / blocks / 4 & swapped(rank))) * 16, source + i * 16);
      }
      arrive_copied(came);
    } else {
      if (thread == 0) expect(came, HEADS * bytes);
      if (mine < HEADS) copy(to + mine * bytes, reinterpret_cast<const char*>(from * 16) + at, bytes, came);
    }
  };
  // Of a unit's tokens rows g and g + 8 of this warp are own + 4 g and the next; they lie in one plane of 32.
  const int own = 32 * (warp >> 1) + 2 * (warp & 1);
  // Until here nothing was read that the kernel in front of this one may have written.
  await_kernel();
  constexpr int NEXT = SCORES ? 1 : WORKERS;  // the unit whose keys come next
  long long here = record(first + worker), ahead = record(first + worker + NEXT);
  if (!SCORES || worker == 0) fetch(true, first + worker, here, worker);
  if (!SCORES) fetch(false, first + worker, here, worker);

  // Queries as the right operand wants them: word i is of pair 4 * (i / 32) + i % 4 and query head i % 32 / 4.
  for (int i = threadIdx.x; i < QUERY_WORDS; i += THREADS) {
    const int pair_ = i / 32 * 4 + i % 4, column = i % 32 / 4;
    const int one = NEIGHBOURS || pair_ >= ROPE ? 2 * pair_ : pair_;
    const int other = NEIGHBOURS || pair_ >= ROPE ? one + 1 : one + ROPE;
    float2 x = {0.f, 0.f};
    if (column < COLUMNS) {
      const Query* const q = queries + ((long long)(team * HEADS + split * GROUP) * M + column) * D;
      x.x = number(q[one]) * scale, x.y = number(q[other]) * scale;
    }
    raw[i] = x;
  }
  // How far a pair of channels is turned where the first unit begins, and from a unit to the next, in turns / 2^32: of all
  // units of a program this is off by less than what an angle in float32 is.
  uint2* const phases = reinterpret_cast<uint2*>(memory + AT_PHASES);
  for (int i = threadIdx.x; i < D / 2; i += THREADS) {
    const double turns = angles[i] * 0.15915494309189535, from = double(position + first * UNIT) * turns;
    const double step = UNIT * turns;
    phases[i].x = u32((long long)((from - floor(from)) * 4294967296.0));
    phases[i].y = u32((long long)((step - floor(step)) * 4294967296.0 + 0.5));
  }
  __syncthreads();
  await(up_came, 0);

  // Queries turned back to where a unit begins, for its keys: of each head, where the columns of the others stay zero.
  for (int i = thread; i < GROUP * QUERY_WORDS; i += 128) turned[i] = 0;
  sync_worker(worker);
  auto turn_queries = [&](int unit) {
    u32* const to = turned + (COLUMNS > M && g / M < GROUP ? g / M * QUERY_WORDS : 0);
    u32 made[D / 32];  // all are on their way before the first is stored
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
      const uint2 phase = phases[16 * i + 4 * warp + t];
      float cosine, sine;
      turn(float(int(phase.x + u32(unit - first) * phase.y)) * 1.4629180792671596e-9f, &cosine, &sine);
      const float2 x = raw[128 * i + thread];
      made[i] = pair(x.x * cosine + x.y * sine, x.y * cosine - x.x * sine);
    }
#pragma unroll
    for (int i = 0; i < D / 32; i++)
      if (g < COLUMNS) to[128 * i + thread] = made[i];
  };

  // Columns of 32 bytes, so 256 bytes for eight; 16 features are D * 32 bytes apart.
  const u64 matrix = u64(shared(memory) >> 4 & 0x3fff) | u64(1) << 16 | u64(16) << 32 | u64(3) << 62;
  float sum[VSTEPS][4] = {}, m0 = -1e30f, m1 = -1e30f, total0 = 0, total1 = 0;
  u32 phase = 0, b0 = 0, b1 = 0;
  // Add the values of a unit, by the weights b0 and b1.
  auto add_values = [&](int unit, u32 phase) {
    const int token = unit * UNIT + own, slot = BITS ? token % 32 : own, plane = BITS ? token % TOKENS / 32 : 0;
    await(values_came, phase);
    if (unit * UNIT < low_ || unit * UNIT + UNIT > high_) {  // what is not seen may be anything
      if (BITS) {
        // The scales and zero points of a plane of which nothing is.
        if (token / 32 * 32 >= high_ || token / 32 * 32 + 32 <= low_)
          for (int i = lane; i < HEADS * 2; i += 32) {
            char* const side = values + i / 2 * COPY_V + 64 * RV + (plane + i % 2 * PLANES) * (RV * 2);
            for (int k = 0; k < RV / 2; k++) reinterpret_cast<u32*>(side)[k] = 0;
          }
      } else {
        for (int i = lane; i < HEADS * 16; i += 32) {
          const int one = i % 8 * 4 + i / 8 % 2;
          if (token + one >= low_ && token + one < high_) continue;
          u32* const to = reinterpret_cast<u32*>(values + i / 16 * COPY_V + (slot + one) * (RV * 2));
          for (int k = 0; k < RV / 2; k++) to[k] = 0;
        }
      }
      before_copies();
      sync_warp();
    }
    const char* const codes = values + (slot + 8 * t) * (RV * 2) + 4 * g;
    const char* const scales = values + 64 * RV + plane * (RV * 2) + 4 * g;
#pragma unroll
    for (int i = 0; i < VSTEPS; i++) {
      u32 x[4] = {};
      if (16 * i + 16 <= HEADS * RV || 16 * i + 2 * g < HEADS * RV) {
        const int at = further<RV, COPY_V, 16>(16 * i, 2 * g);
        u32 step = 0, zero = 0;
        if (BITS) step = word(scales + at), zero = word(scales + at + PLANES * (RV * 2));
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const int token = k % 2 * 4 + k / 2;
          x[k] = feature<RV>(SWAP ? values + i * 16 / RV * COPY_V + (slot + 8 * t + token) * (RV * 2) +
                                        ((i * 16 % RV * 2 + 4 * g) ^ ((slot + 8 * t + token) / 4 & swapped(RV)) << 4)
                                  : codes + at + token * (RV * 2),
                             plane * BITS, step, zero);
        }
      }
      // Of a pair of features the first is row g, the second row g + 8.
      mma(sum[i], __byte_perm(x[0], x[1], 0x5410), __byte_perm(x[0], x[1], 0x7632), __byte_perm(x[2], x[3], 0x5410),
          __byte_perm(x[2], x[3], 0x7632), b0, b1);
    }
  };
  int done = -1;  // the unit whose values come next
  for (int unit = first + worker; unit < last; unit += WORKERS, phase ^= 1) {
    const bool edge = unit * UNIT < low_ || unit * UNIT + UNIT > high_;
    const int token = unit * UNIT + own;  // of row 0
    const int plane = BITS ? token % TOKENS / 32 : 0, slot = BITS ? token % 32 : own;

    u32 a[KSTEPS][4];
    await(keys_came, phase);
    const char* const codes = keys + (slot + 4 * g) * (RK * 2) + 4 * t;
    const char* const scales = keys + 64 * RK + plane * (RK * 2) + 4 * t;
    const int swap = (slot / 4 + g & swapped(RK)) << 4;
#pragma unroll
    for (int i = 0; i < KSTEPS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int f = 16 * i + 8 * half;
        a[i][2 * half] = a[i][2 * half + 1] = 0;
        if (f + 8 <= HEADS * RK || f + 2 * t < HEADS * RK) {
          const int at = SWAP ? f / RK * COPY_K + (f % RK * 2 ^ swap) : further<RK, COPY_K, 8>(f, 2 * t);
          u32 step = 0, zero = 0;
          if (BITS) step = word(scales + at), zero = word(scales + at + PLANES * (RK * 2));
#pragma unroll
          for (int k = 0; k < 2; k++)
            a[i][2 * half + k] = feature<RK>(codes + at + k * (RK * 2), plane * BITS, step, zero);
        }
      }
    sync_worker(worker);

    float s[4] = {}, c[BUFFERS][WIDTH / 2];
    auto start = [&](int n) {
      products_begin();
#pragma unroll
      for (int i = 0; i < KSTEPS; i++)
        product(c[n % BUFFERS], a[i], matrix + (n % GROUP * UP + n / GROUP * WIDTH * 32 + i * D * 32) / 16, i > 0);
      products_commit();
    };
    start(0);
    fetch(true, unit + NEXT, ahead, SCORES ? 1 - worker : worker);
    turn_queries(unit);
    before_copies();
    if (!SCORES && done >= 0) add_values(done, phase ^ 1);
    sync_worker(worker);
    auto fetch_values = [&] {
      if (!SCORES && done >= 0) fetch(false, unit, here, worker);
      done = unit;
      here = ahead, ahead = record(unit + WORKERS + NEXT);
    };
#pragma unroll
    for (int n = 0; n < CHUNKS * GROUP; n++) {
      float(&x)[WIDTH / 2] = c[n % BUFFERS];
      const int chunk = n / GROUP;
      u32 wave[2][WIDTH / 8];  // cosine and sine of both tokens, and of pairs 4 i + t
#pragma unroll
      for (int i = 0; i < WIDTH / 32; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const uint4 w = again(waves + ((chunk * (WIDTH / 32) + i) * 2 + r) * 128 + thread);
          wave[r][4 * i] = w.x, wave[r][4 * i + 1] = w.y, wave[r][4 * i + 2] = w.z, wave[r][4 * i + 3] = w.w;
        }
      if (BUFFERS == 2 && n + 1 < CHUNKS * GROUP) {
        start(n + 1);
        if (n == 0) fetch_values();
        products_wait<1>(x);
      } else {
        if (n == 0) fetch_values();
        products_wait<0>(x);
      }
      u32 k[WIDTH / 16][4];
#pragma unroll
      for (int i = 0; i < WIDTH / 16; i++)
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
          for (int r = 0; r < 2; r++) {
            const u32 w = wave[r][2 * i + j];
            const float one = x[4 * (2 * i + j) + 2 * r], other = x[4 * (2 * i + j) + 2 * r + 1];
            const float cosine = first_of(w), sine = second_of(w);
            k[i][2 * j + r] = pair(one * cosine - other * sine, other * cosine + one * sine);
          }
      const u32* const query = turned + n % GROUP * QUERY_WORDS + WIDTH / 8 * chunk * 32;
      // 16 channels of queries are two blocks of 8x8 numbers, as these lie.
      const u64 queried = u64(shared(reinterpret_cast<const char*>(query)) >> 4) | u64(8) << 16 | u64(8) << 32;
      products_begin();
#pragma unroll
      for (int i = 0; i < WIDTH / 16; i++) product(s, k[i], queried + 16 * i, n + i > 0);
      products_commit();
      if (BUFFERS == 1 && n + 1 < CHUNKS * GROUP) start(n + 1);
    }

    products_wait<0>(s);

    // Tokens `token + 4 g` and the next, of query heads 2t and 2t + 1.
    if (SCORES) {
      const long long place = ((long long)team * columns * TOKENS + token + 4 * g) * (HEADS * M) + split * COLUMNS + 2 * t;
#pragma unroll
      for (int k = 0; k < 4; k++)
        if (2 * t + k % 2 < COLUMNS) scores[place + k / 2 * (HEADS * M) + k % 2] = s[k];
      continue;
    }
    bool seen0 = true, seen1 = true;
    if (edge) {
      const int one = token + 4 * g;
      seen0 = one >= low_ && one < high_, seen1 = one + 1 >= low_ && one + 1 < high_;
      if (!seen0) s[0] = s[1] = -1e30f;
      if (!seen1) s[2] = s[3] = -1e30f;
    }
    // Weights are up to 2^8: a maximum that is a little larger does not count.
    float above0 = fmaxf(s[0], s[2]), above1 = fmaxf(s[1], s[3]);
    if (__any_sync(~0u, above0 > m0 + 8 || above1 > m1 + 8)) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) {
        above0 = fmaxf(above0, __shfl_xor_sync(~0u, above0, step));
        above1 = fmaxf(above1, __shfl_xor_sync(~0u, above1, step));
      }
      above0 = fmaxf(above0, m0), above1 = fmaxf(above1, m1);
      const float shrink0 = exp2_(m0 - above0), shrink1 = exp2_(m1 - above1);
      m0 = above0, m1 = above1, total0 *= shrink0, total1 *= shrink1;
#pragma unroll
      for (int i = 0; i < VSTEPS; i++)
        sum[i][0] *= shrink0, sum[i][1] *= shrink1, sum[i][2] *= shrink0, sum[i][3] *= shrink1;
    }
    const float p0 = seen0 ? exp2_(s[0] - m0) : 0, p1 = seen0 ? exp2_(s[1] - m1) : 0;
    const float p2 = seen1 ? exp2_(s[2] - m0) : 0, p3 = seen1 ? exp2_(s[3] - m1) : 0;
    total0 += p0 + p2, total1 += p1 + p3;
    b0 = transposed(pair(p0, p1)), b1 = transposed(pair(p2, p3));
  }
  if (SCORES) return;
  if (done >= 0) add_values(done, phase ^ 1);

  launch_dependents();
  // Merge what the warps have, in the memory of what is no longer needed.
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    total0 += __shfl_xor_sync(~0u, total0, step);
    total1 += __shfl_xor_sync(~0u, total1, step);
  }
  __syncthreads();
  float* const most = reinterpret_cast<float*>(memory);        // [warps, 8]
  float* const totals = most + 4 * WORKERS * 8;                // [warps, 8]
  float* const parts = totals + 4 * WORKERS * 8;               // [warps, NV, 9]
  const int who = 4 * worker + warp;
  if (g == 0) {
    most[who * 8 + 2 * t] = m0, most[who * 8 + 2 * t + 1] = m1;
    totals[who * 8 + 2 * t] = total0, totals[who * 8 + 2 * t + 1] = total1;
  }
#pragma unroll
  for (int i = 0; i < VSTEPS; i++)
#pragma unroll
    for (int k = 0; k < 4; k++) parts[(who * NV + 16 * i + 2 * g + k / 2) * 9 + 2 * t + k % 2] = sum[i][k];
  __syncthreads();
  for (int i = threadIdx.x; i < COLUMNS * NV; i += THREADS) {
    const int column = i / NV, f = i % NV;
    float top = -1e30f, weight = 0, x = 0;
#pragma unroll
    for (int k = 0; k < 4 * WORKERS; k++) top = fmaxf(top, most[k * 8 + column]);
#pragma unroll
    for (int k = 0; k < 4 * WORKERS; k++) {
      const float shrink = exp2_(most[k * 8 + column] - top);
      weight += totals[k * 8 + column] * shrink;
      x += parts[(k * NV + f) * 9 + column] * shrink;
    }
    const long long place = (long long)part * (HEADS * M) + split * COLUMNS + column;
    sums[place * NV + f] = weight > 0 ? x / weight : 0;
    if (f == 0) sums_lse[place] = weight > 0 ? top + log2f(weight) : -1e30f;
  }
}
