// Every primitive that CUDA C++ has no word for, as a small function: the only file with inline PTX. A host compiler gets the
// same functions from host/ptx.h, with the same lane layouts.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#define DEVICE __device__ __forceinline__

// Declares a kernel of one parameter structure `p`, and of how many blocks a multiprocessor should have the registers.
#define KERNEL(NAME, PARAMS, THREADS) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(const __grid_constant__ PARAMS p)
#define KERNEL_RESIDENT(NAME, PARAMS, THREADS, BLOCKS) \
  extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) NAME(const __grid_constant__ PARAMS p)

// A shared array, and the shared memory whose size the launch gives.
#define SHARED_ARRAY(T, NAME, N) __shared__ __align__(16) T NAME[N]
#define DYNAMIC_SHARED(NAME) extern __shared__ __align__(128) unsigned char NAME[]

// The address of shared memory as ldmatrix and cp.async take it.
DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// Copies 16 bytes to shared memory asynchronously; beyond the first `bytes` (0 to 16) they are 0 and nothing is read. Both
// addresses are aligned to 16 bytes.
DEVICE void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of copies.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until all but the newest N groups of this thread's copies have landed.
template <int N>
DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and gets elements
// (l / 4, 2 (l % 4)) and the next of each.
DEVICE void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// The same, each matrix transposed.
DEVICE void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(address)
               : "memory");
}

// d += a b on the tensor cores, 16x16 by 16x8, accumulated in f32 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
DEVICE void mma_m16n8k16(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_m16n8k16(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 2^x, subnormal results as 0.
DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
#include "host/ptx.h"

#define DEVICE inline

// A parameter structure arrives as bytes; the kernel is found by its name.
#define KERNEL(NAME, PARAMS, THREADS)                                                                                 \
  static void NAME(const PARAMS& p);                                                                                  \
  static emulated::Registrar NAME##_registrar({#NAME, (uint32_t)sizeof(PARAMS), THREADS, [](const void* params) {     \
                                                 NAME(*(const PARAMS*)params);                                        \
                                               }});                                                                   \
  static void NAME(const PARAMS& p)

#define KERNEL_RESIDENT(NAME, PARAMS, THREADS, BLOCKS) KERNEL(NAME, PARAMS, THREADS)

#define SHARED_ARRAY(T, NAME, N) \
  T* const NAME = (T*)emulated::shared_array([] { static char key; return (const void*)&key; }(), sizeof(T) * (N))
#define DYNAMIC_SHARED(NAME) unsigned char* const NAME = emulated::block->shared
#endif
