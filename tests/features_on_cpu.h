// What `features.cu` asks of the hardware, on a CPU: copies with barriers that count bytes, and products of 128 threads.
// Define PAIRS=4 (256 threads) and EXACT (2 for bfloat16).

#include "cuda_on_cpu.h"

#include <map>

struct float2 { float x, y; };
static float half_low(uint32_t x) { return half_to_float(x & 0xffff); }
static float half_high(uint32_t x) { return half_to_float(x >> 16); }
static uint32_t sub2(uint32_t a, uint32_t b) { return pair(low(a) - low(b), high(a) - high(b)); }
static uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }
static uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  return pair(low(a) * low(b) + low(c), high(a) * high(b) + high(c));
}
static void turn(float angle, float* cosine, float* sine) { *cosine = cosf(angle), *sine = sinf(angle); }

struct Copy { uint32_t to; const char* from; uint32_t bytes; };
struct Barrier {
  long done = 0, missing = 0, left = 1, count = 1;
  bool arrived = false;
  std::vector<Copy> waiting;
};
static std::map<uint32_t, Barrier> coming;
static void barrier_init(uint32_t at, uint32_t count) { coming[at] = {}, coming[at].left = coming[at].count = count; }
static void barriers_ready() {}
static void before_copies() {}
static void settle(Barrier& barrier) {
  if (barrier.arrived && !barrier.missing) barrier.arrived = false, barrier.left = barrier.count, barrier.done++;
}
static void expect(uint32_t at, uint32_t bytes) {
  if (coming.at(at).arrived) abort();
  coming.at(at).arrived = true, coming.at(at).missing += bytes;
  settle(coming.at(at));
}
static void bring(Barrier& barrier, const Copy& copy) {
  memcpy(memory + copy.to, copy.from, copy.bytes);
  barrier.missing -= copy.bytes;
}
static void copy(uint32_t to, const char* from, uint32_t bytes, uint32_t at) {
  if (to % 16 || (uintptr_t)from % 16 || bytes % 16 || to + bytes > sizeof memory) abort();
  Barrier& barrier = coming.at(at);
  if (late) barrier.waiting.push_back({to, from, bytes});
  else bring(barrier, {to, from, bytes}), settle(barrier);
}
// `copy16` keeps what is late in `issued`.
static void arrive_copied(uint32_t at) {
  Barrier& barrier = coming.at(at);
  if (barrier.left-- <= 0) abort();
  for (auto [to, from] : issued[current]) barrier.waiting.push_back({shared(to), from, 16}), barrier.missing += 16;
  issued[current].clear();
  barrier.arrived = barrier.left == 0;
  settle(barrier);
}
static long long shuffled(long long x, int lane) {
  const int place = meet({(uint32_t)x, (uint32_t)(x >> 32)});
  return (long long)((uint64_t)of(place, lane)[1] << 32 | of(place, lane)[0]);
}
static void await(uint32_t at, uint32_t phase) {
  Barrier& barrier = coming.at(at);
  while ((barrier.done & 1) == phase) {
    long issued = 0;
    for (const Copy& one : barrier.waiting) issued += one.bytes;
    if (late && barrier.arrived && issued == barrier.missing) {
      for (const Copy& one : barrier.waiting) bring(barrier, one);
      barrier.waiting.clear(), settle(barrier);
    } else turn_over();
  }
}

static void sync_warp() { meet({0}); }
static uint4 again(const uint4* at) { return *at; }
static std::map<int, long> workers_synced;
static long worker_syncing[FIBERS];
static void sync_worker(int worker) {
  const int me = current;
  worker_syncing[me]++, workers_synced[worker]++;
  while (workers_synced[worker] < 128 * worker_syncing[me]) turn_over();
}

static void await_kernel() { wait_for_others(); }
static void products_begin() {}
static void products_commit() {}
template <int PENDING, int N>
static void products_wait(float (&)[N]) {}
static float number_of(uint32_t x) {
#if EXACT == 2
  return brain(x);
#else
  return half_to_float(x);
#endif
}
template <int N>
static void product(float (&c)[N], const uint32_t (&a)[4], uint64_t b, int add) {
  const long start = (b & 0x3fff) * 16, eight_deep = (b >> 16 & 0x3fff) * 16, eight_wide = (b >> 32 & 0x3fff) * 16;
  const bool swaps = b >> 62 == 3;
  const int place = meet({a[0], a[1], a[2], a[3]}), g = current % 32 / 4, t = current % 4;
  double rows[2][16];
  for (int k = 0; k < 16; k++)
    for (int below = 0; below < 2; below++)
      rows[below][k] = number_of(of(place, 4 * g + k % 8 / 2)[k / 8 * 2 + below] >> k % 2 * 16 & 0xffff);
  for (int i = 0; i < N; i += i % 2 ? 3 : 1) {
    const int column = i / 4 * 8 + 2 * t + i % 2;
    double sums[2] = {add ? c[i] : 0, add ? c[i + 2] : 0};
    for (int k = 0; k < 16; k++) {
      uint16_t y;
      long at = start + column / 8 * eight_wide;
      if (swaps) at += column % 8 * 32 + k * 2, at ^= at >> 3 & 16;
      else at += k / 8 * eight_deep + column % 8 * 16 + k % 8 * 2;
      memcpy(&y, memory + at, 2);
      const double number = number_of(y);
      sums[0] += rows[0][k] * number, sums[1] += rows[1][k] * number;
    }
    c[i] = sums[0], c[i + 2] = sums[1];
  }
}
#if EXACT == 2
#define pair exact_pair
#define mma exact_mma
#endif
