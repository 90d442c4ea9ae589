// Every primitive that kernels are built from, alone: operands from memory, what each lane gets back to memory, as raw bits.
//
// `tools/gpu` runs these on a GPU and on the host emulation and holds both against what the PTX ISA says, so that a misreading of
// a lane layout cannot hide in the emulation and the kernels at once. No program launches them.
//
// One block; a, b, c are operands, `out` is 32-bit words; lane and thread count from 0, `count` is a number of elements:
//
//   cp_async         a: 128 lines of 16 bytes, b: bytes of each to copy (u32), c: 128 more lines, copied whole as a second group
//                    -> [128][4] of the first group after waiting for all but one, [128][4] of the second; a thread reads the
//                    line of thread 127 - t
//   ldmatrix(_trans) a: 32 rows of 16 bytes, b: the row whose address each lane gives -> [32][4]
//   mma_f16, _bf16   a: [32][4], b: [32][2], c: [32][4] of f32, registers as mma.m16n8k16 takes them -> [32][4]
//   exp2             a: f32 [count] -> f32 [count]
//   shuffle          a: u32 [32] -> [32][32], row f: x of lane ^ f; [32][32], row s: x of lane s
//   sums             a: f32 [256] -> [4][256]: warp_sum, warp_max, block_sum, block_max
//   narrow_f16, …    a: f32 [2 count] -> [count] of pack<T>(a[2 i], a[2 i + 1])
//   widen_f16, …     a: 16-bit [count] -> f32 [count]
//   divide           a: u32 [count], b: a Divisor for each -> u32 [count]
#include "common.cuh"

// Matches `Params` in tools/gpu/conformance.rs.
struct ConformanceParams {
  const void* a;
  const void* b;
  const void* c;
  void* out;
  int64_t count;
};
static_assert(sizeof(ConformanceParams) == 40, "as in conformance.rs");

KERNEL(conformance_cp_async, ConformanceParams, 128) {
  SHARED_ARRAY(uint4, first, 128);
  SHARED_ARRAY(uint4, second, 128);
  int t = threadIdx.x;
  cp_async_16(shared_address(first + t), (const uint4*)p.a + t, ((const uint32_t*)p.b)[t]);
  cp_async_commit();
  cp_async_16(shared_address(second + t), (const uint4*)p.c + t, 16);
  cp_async_commit();
  cp_async_wait<1>();
  __syncthreads();
  ((uint4*)p.out)[t] = first[127 - t];
  cp_async_wait<0>();
  __syncthreads();
  ((uint4*)p.out)[128 + t] = second[127 - t];
}

template <bool TRANSPOSED>
DEVICE void load_matrices(const ConformanceParams& p, uint4* rows) {
  int lane = threadIdx.x;
  rows[lane] = ((const uint4*)p.a)[lane];
  __syncthreads();
  uint32_t registers[4], address = shared_address(rows + ((const uint32_t*)p.b)[lane]);
  if (TRANSPOSED) {
    ldmatrix_x4_trans(registers, address);
  } else {
    ldmatrix_x4(registers, address);
  }
#pragma unroll
  for (int i = 0; i < 4; i++) ((uint32_t*)p.out)[4 * lane + i] = registers[i];
}

KERNEL(conformance_ldmatrix, ConformanceParams, 32) {
  SHARED_ARRAY(uint4, rows, 32);
  load_matrices<false>(p, rows);
}

KERNEL(conformance_ldmatrix_trans, ConformanceParams, 32) {
  SHARED_ARRAY(uint4, rows, 32);
  load_matrices<true>(p, rows);
}

template <class T>
DEVICE void multiply(const ConformanceParams& p) {
  int lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    a[i] = ((const uint32_t*)p.a)[4 * lane + i];
    d[i] = ((const float*)p.c)[4 * lane + i];
  }
  const uint32_t* b = (const uint32_t*)p.b + 2 * lane;
  mma_m16n8k16(T(), d, a, b[0], b[1]);
#pragma unroll
  for (int i = 0; i < 4; i++) ((float*)p.out)[4 * lane + i] = d[i];
}

KERNEL(conformance_mma_f16, ConformanceParams, 32) { multiply<f16>(p); }
KERNEL(conformance_mma_bf16, ConformanceParams, 32) { multiply<bf16>(p); }

KERNEL(conformance_exp2, ConformanceParams, 256) {
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) ((float*)p.out)[i] = exp2_approx(((const float*)p.a)[i]);
}

KERNEL(conformance_shuffle, ConformanceParams, 32) {
  int lane = threadIdx.x;
  uint32_t x = ((const uint32_t*)p.a)[lane], *out = (uint32_t*)p.out;
  for (int flip = 0; flip < WARP_SIZE; flip++) out[32 * flip + lane] = __shfl_xor_sync(ALL_LANES, x, flip);
  for (int from = 0; from < WARP_SIZE; from++) out[32 * (32 + from) + lane] = __shfl_sync(ALL_LANES, x, from);
}

KERNEL(conformance_sums, ConformanceParams, 256) {
  SHARED_ARRAY(float, scratch, 32);
  int t = threadIdx.x;
  float x = ((const float*)p.a)[t], *out = (float*)p.out;
  out[t] = warp_sum(x);
  out[256 + t] = warp_max(x);
  out[512 + t] = block_sum(x, scratch);
  out[768 + t] = block_max(x, scratch);
}

template <class T>
DEVICE void narrow(const ConformanceParams& p) {
  const float* x = (const float*)p.a;
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) ((uint32_t*)p.out)[i] = pack<T>(x[2 * i], x[2 * i + 1]);
}

template <class T>
DEVICE void widen(const ConformanceParams& p) {
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) ((float*)p.out)[i] = to_float(((const T*)p.a)[i]);
}

KERNEL(conformance_narrow_f16, ConformanceParams, 256) { narrow<f16>(p); }
KERNEL(conformance_narrow_bf16, ConformanceParams, 256) { narrow<bf16>(p); }
KERNEL(conformance_widen_f16, ConformanceParams, 256) { widen<f16>(p); }
KERNEL(conformance_widen_bf16, ConformanceParams, 256) { widen<bf16>(p); }

KERNEL(conformance_divide, ConformanceParams, 256) {
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) {
    ((uint32_t*)p.out)[i] = divide(((const uint32_t*)p.a)[i], ((const Divisor*)p.b)[i]);
  }
}
