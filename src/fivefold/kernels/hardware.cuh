// What kernels over packed pages ask of the hardware, and small conversions; QUERIES is the dtype of the queries.
typedef unsigned int u32;
typedef unsigned long long u64;

// tests/cuda_on_cpu.h does the same on a CPU.
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
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8x8 matrices of 16-bit numbers, transposed; a lane names row lane % 8 of matrix lane / 8.
__device__ __forceinline__ void load_transposed(u32 (&a)[4], const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"((u32)__cvta_generic_to_shared(p)));
}
__device__ __forceinline__ void sync_pair(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }
// Keep a number in a register: the compiler would work it out again for every page.
__device__ __forceinline__ void keep(u32& x) { asm volatile("" : "+r"(x)); }
__device__ __forceinline__ float half_to_float(unsigned short x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ __forceinline__ u32 shared(const char* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void copy16(u32 to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
}
// The kernel behind this one may be made ready; it waits until all of this one is done.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Where this kernel was launched before the one in front of it was done: until it is.
__device__ __forceinline__ void wait_for_others() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
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
__device__ __forceinline__ uint2 load8(const char* p) { return *reinterpret_cast<const uint2*>(p); }

// The row that a program works for, `rows` if none; first(row): its first program, and of `rows` how many there are. A
// warp looks at 32 at a time: of thousands of rows, all of them would be more than a program's pages.
template <typename First>
__device__ __forceinline__ int row_of(First first, int rows, int part, int lane) {
  int row = 0, step;
  for (int left = rows; left > 0; left = min(step, rows - row)) {
    step = (left + 31) / 32;
    const int last = (lane + 1) * step;  // of its `step` rows
    row += step * __popc(__ballot_sync(~0u, last <= left && first(row + last) <= part));
    if (step == 1) break;
  }
  return row;
}
__device__ __forceinline__ int row_of(const int* starts, int rows, int part, int lane) {
  return row_of([=](int row) { return starts[row]; }, rows, part, lane);
}
