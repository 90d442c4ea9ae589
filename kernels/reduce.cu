// Inner products and sums of columns.
//
//   dot          y[chunk of a sample] = sum a b over the chunk                 y f32
//   column_sums  y[set, chunk, c] = sum of x[set, r, c] over the rows of the chunk
//
// Operands are of storage T; all arithmetic is in f32. Outputs are overwritten.
//
// Long samples of `dot` and many rows of `column_sums` are cut into chunks by the shape of one sample (one set); a second
// launch of `column_sums` adds the chunks up. Bytes: each operand once. FLOPs: one or two per element. Limited by memory.
#include "rows.cuh"

// Matches `DotParams` in src/exec/cuda/reduce.rs. A block takes chunk blockIdx.x of sample blockIdx.y.
struct DotParams {
  const void* a;
  const void* b;
  void* y;
  int64_t size;    // elements of a sample
  int64_t length;  // of a chunk
  int32_t aligned;
  int32_t unused;
};
static_assert(sizeof(DotParams) == 48, "as in reduce.rs");

template <class T>
DEVICE void dot(const DotParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t sample = blockIdx.y * p.size, first = blockIdx.x * p.length, end = min(first + p.length, p.size);
  const T *a = (const T*)p.a + sample, *b = (const T*)p.b + sample;
  float sum = 0.0f;
#pragma unroll 2
  for (int64_t i = first + threadIdx.x * V; i < end; i += blockDim.x * V) {
    float x[V], y[V];
    int count = (int)min(end - i, (int64_t)V);
    read_floats(x, a + i, count, p.aligned);
    read_floats(y, b + i, count, p.aligned);
#pragma unroll
    for (int e = 0; e < V; e++) sum += x[e] * y[e];
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) ((float*)p.y)[(int64_t)blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// Matches `ColumnSumsParams` in src/exec/cuda/reduce.rs. A block takes columns blockIdx.x, chunk blockIdx.y, set blockIdx.z.
struct ColumnSumsParams {
  ColumnSum shape;  // of one set
  const void* x;
  void* y;
};
static_assert(sizeof(ColumnSumsParams) == 40, "as in reduce.rs");

template <class T, class Out>
DEVICE void column_sums(const ColumnSumsParams& p) {
  constexpr int V = VECTOR<T>;
  const ColumnSum& s = p.shape;
  SHARED_ARRAY(float, scratch, COLUMN_THREADS * V);
  int pitch = s.lanes * V, lane = threadIdx.x % s.lanes, row = threadIdx.x / s.lanes;
  int first = blockIdx.x * pitch, column = first + lane * V, count = s.columns - column;
  int begin = blockIdx.y * s.length, end = min(begin + s.length, s.rows);
  const T* x = (const T*)p.x + (int64_t)blockIdx.z * s.rows * s.columns;
  float sums[V] = {};
  if (row < s.side && count > 0) {
#pragma unroll 4
    for (int r = begin + row; r < end; r += s.side) {
      float values[V];
      read_floats(values, x + (int64_t)r * s.columns + column, count, s.aligned);
#pragma unroll
      for (int e = 0; e < V; e++) sums[e] += values[e];
    }
  }
  if (row < s.side) put_sums(scratch + threadIdx.x * V, sums);
  sum_rows(scratch, s.side, pitch);
  Out* y = (Out*)p.y + ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * s.columns + first;
  for (int c = threadIdx.x; c < min(pitch, s.columns - first); c += blockDim.x) y[c] = from_float<Out>(scratch[c]);
}

KERNEL(dot_f16, DotParams, PLAIN_THREADS) { dot<f16>(p); }
KERNEL(dot_bf16, DotParams, PLAIN_THREADS) { dot<bf16>(p); }
KERNEL(dot_f32, DotParams, PLAIN_THREADS) { dot<float>(p); }

// Of T to T, and in two stages by way of f32.
KERNEL(column_sums_f16_f16, ColumnSumsParams, COLUMN_THREADS) { column_sums<f16, f16>(p); }
KERNEL(column_sums_f16_f32, ColumnSumsParams, COLUMN_THREADS) { column_sums<f16, float>(p); }
KERNEL(column_sums_f32_f16, ColumnSumsParams, COLUMN_THREADS) { column_sums<float, f16>(p); }
KERNEL(column_sums_bf16_bf16, ColumnSumsParams, COLUMN_THREADS) { column_sums<bf16, bf16>(p); }
KERNEL(column_sums_bf16_f32, ColumnSumsParams, COLUMN_THREADS) { column_sums<bf16, float>(p); }
KERNEL(column_sums_f32_bf16, ColumnSumsParams, COLUMN_THREADS) { column_sums<float, bf16>(p); }
KERNEL(column_sums_f32_f32, ColumnSumsParams, COLUMN_THREADS) { column_sums<float, float>(p); }
