// What kernels of every family use: storage types, 16-byte vectors, division by a constant, sums over warps and blocks.
#pragma once
#include "constants.cuh"
#include "ptx.cuh"

typedef __half f16;
typedef __nv_bfloat16 bf16;

// All arithmetic is in f32; storage is T.
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(f16 x) { return __half2float(x); }
DEVICE float to_float(bf16 x) { return __bfloat162float(x); }

template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}

// Elements in 16 bytes.
template <class T>
constexpr int VECTOR = 16 / sizeof(T);

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// Two neighbours, as a 32-bit register of mma operands.
template <class T>
DEVICE uint32_t pack(float low, float high) {
  Vector<T, 2> pair = {{from_float<T>(low), from_float<T>(high)}};
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

// Divides 31-bit numbers by a divisor known at launch (Granlund and Montgomery 1994): (n * multiplier >> 32) >> shift.
// A multiplier of 0 stands for a divisor of 1. Made by `Divisor::new` in src/exec/cuda/launch.rs.
struct Divisor {
  uint32_t divisor, multiplier, shift;
};

DEVICE uint32_t divide(uint32_t n, const Divisor& by) {
  return by.multiplier ? __umulhi(n, by.multiplier) >> by.shift : n;
}

// The number of the row of a table of constants.cuh that begins with `first`; none is an error of the compiler.
template <int ROWS, int N>
DEVICE constexpr int row_of(const int (&table)[ROWS][N], int first) {
  int row = 0;
  while (table[row][0] != first) row++;
  return row;
}

constexpr int WARP_SIZE = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

DEVICE float warp_sum(float x) {
#pragma unroll
  for (int flip = WARP_SIZE / 2; flip; flip /= 2) x += __shfl_xor_sync(ALL_LANES, x, flip);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int flip = WARP_SIZE / 2; flip; flip /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, flip));
  return x;
}

// The sum over a block of whole warps, in every thread; `scratch` holds 32 floats and may be used again after the next barrier.
DEVICE float block_sum(float x, float* scratch) {
  int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, warps = blockDim.x / WARP_SIZE;
  x = warp_sum(x);
  __syncthreads();  // a call before this one may still be read
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_sum(lane < warps ? scratch[lane] : 0.0f);
}

DEVICE float block_max(float x, float* scratch) {
  int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, warps = blockDim.x / WARP_SIZE;
  x = warp_max(x);
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  return warp_max(lane < warps ? scratch[lane] : -INFINITY);
}
