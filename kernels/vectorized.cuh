// How memory-bound kernels cut their work: a thread takes one piece, 16 bytes of neighbouring elements where addresses and
// widths allow it, one element where they do not.
#pragma once
#include "common.cuh"

// A number of elements, as a type.
template <int N>
struct Width {
  static constexpr int value = N;
};

// N neighbours at once; N > 1 needs them aligned to N elements.
template <int N, class T>
DEVICE void load_piece(float (&out)[N], const T* from) {
  Vector<T, N> held = *(const Vector<T, N>*)from;
#pragma unroll
  for (int e = 0; e < N; e++) out[e] = to_float(held.at[e]);
}

template <int N, class T>
DEVICE void store_piece(T* to, const float (&values)[N]) {
  Vector<T, N> held;
#pragma unroll
  for (int e = 0; e < N; e++) held.at[e] = from_float<T>(values[e]);
  *(Vector<T, N>*)to = held;
}

// Calls f(first element, width) for this thread's elements of `count`: N neighbours, or the last ones and those of unaligned
// operands one by one.
template <int N, class F>
DEVICE void over_elements(int64_t count, bool aligned, F f) {
  int64_t first = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
  if (aligned && first + N <= count) {
    f(first, Width<N>());
  } else {
    for (int64_t i = first; i < min(first + N, count); i++) f(i, Width<1>());
  }
}

// Rows of pieces. Matches `Pieces` in src/exec/cuda/elementwise.rs.
struct Pieces {
  Divisor per_row;
  uint32_t count;   // of all rows, below 2^31
  int32_t aligned;  // a piece is N neighbours, else one element
};

// Calls f(row, first element in it, width) for this thread's piece.
template <int N, class F>
DEVICE void over_pieces(const Pieces& pieces, F f) {
  uint32_t piece = blockIdx.x * blockDim.x + threadIdx.x;
  if (piece >= pieces.count) return;
  uint32_t row = divide(piece, pieces.per_row), column = piece - row * pieces.per_row.divisor;
  if (pieces.aligned) {
    f(row, column * N, Width<N>());
  } else {
    f(row, column, Width<1>());
  }
}

#define FOR_EACH_TYPE(NAME, PARAMS)                             \
  KERNEL(NAME##_f16, PARAMS, PLAIN_THREADS) { NAME<f16>(p); }   \
  KERNEL(NAME##_bf16, PARAMS, PLAIN_THREADS) { NAME<bf16>(p); } \
  KERNEL(NAME##_f32, PARAMS, PLAIN_THREADS) { NAME<float>(p); }
