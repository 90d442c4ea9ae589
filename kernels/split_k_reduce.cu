// The end of a product whose reduced dimension was split over blocks: adds the parts of every sum in order and stores the output.
//
//   y [M, N] = activation(sum over s of partial [S, M, N] + bias + shift) + residual, as epilogue.cuh says.
//   partial  f32, row-major, from either main loop. GEGLU: [S, M, 2 H], first all values, then all gates; y has H columns.
//   y, bias, shift and residual are T; y is overwritten and may be the residual.
//
// A thread has 4 neighbours of a row where N is a multiple of 4 (16 bytes of each part), else one. Bytes: 4 S M N read, which
// the product wrote just before and a large L2 still has, besides y and the residual; FLOPs: S M N. Limited by memory.
#include "epilogue.cuh"
#include "vectorized.cuh"

// Matches `SplitKReduceParams` in src/exec/cuda/epilogue.rs.
struct SplitKReduceParams {
  Epilogue epilogue;
  const float* partial;
  int64_t stride;   // elements from one part to the next
  int32_t columns;  // of partial
  int32_t splits;
  Pieces pieces;  // of y
  int32_t unused;
};
static_assert(sizeof(SplitKReduceParams) == 112, "as in epilogue.rs");

// The whole sums of N neighbours.
template <int N>
DEVICE void add_parts(float (&sum)[N], const SplitKReduceParams& p, const float* at) {
  load_piece(sum, at);
#pragma unroll 4
  for (int left = p.splits - 1; left; left--) {
    float part[N];
    at += p.stride;
    load_piece(part, at);
#pragma unroll
    for (int n = 0; n < N; n++) sum[n] += part[n];
  }
}

template <class T>
DEVICE void split_k_reduce(const SplitKReduceParams& p) {
  over_pieces<4>(p.pieces, [&](int row, int column, auto width) {
    constexpr int N = decltype(width)::value;
    const float* at = p.partial + (int64_t)row * p.columns + column;
    float sum[N], gate[N] = {};
    add_parts(sum, p, at);
    if (p.epilogue.activation == GEGLU) add_parts(gate, p, at + p.epilogue.columns);
    store_outputs<true>(p.epilogue, shift_of<T>(p.epilogue, row), row, column, sum, gate);
  });
}

// Kernels: split_k_reduce_f16 split_k_reduce_bf16 split_k_reduce_f32
FOR_EACH_TYPE(split_k_reduce, SplitKReduceParams)
