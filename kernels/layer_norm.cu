// Layer normalisation over rows [rows, width] and its gradients.
//
//   layer_norm                   mean = sum x / width, rstd = 1 / sqrt(sum (x - mean)^2 / width + eps),
//                                y = (x - mean) rstd gamma + beta
//   layer_norm_backward          with h = (x - mean) rstd, g = d_y gamma and means over the row:
//                                d_x = rstd (g - mean(g) - h mean(g h))
//   layer_norm_backward_affine   d_gamma = sum over rows of d_y h, d_beta = sum over rows of d_y
//
// x, y, d_y, d_x [rows, width] and gamma, beta [width] of storage T; mean, rstd [rows] f32 are outputs of the forward and
// saved for the gradients; all arithmetic is in f32. Outputs are overwritten; y may be x, d_x may be d_y.
//
// A row belongs to a warp, where 5 vectors of 16 bytes per lane hold it, else to a block, and stays in registers from the
// mean to the result; what is squared are deviations from the mean. The affine gradients are sums of chunks of
// rows, f32 [2, chunks, width] in the workspace, which `column_sums` adds up. Bytes: each operand once. Limited by memory.
#include "rows.cuh"

// Matches `LayerNormParams` in src/exec/cuda/norm.rs.
struct LayerNormParams {
  Rows rows;
  const void* x;
  const void* gamma;
  const void* beta;
  void* y;
  void* mean;
  void* rstd;
  float eps;
  int32_t unused;
};
static_assert(sizeof(LayerNormParams) == 80, "as in norm.rs");

template <class T>
DEVICE void layer_norm(const LayerNormParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 1> row = {{(const T*)p.x}};
  row.load(p.rows, index);
  float sum = 0.0f, shift = 0.0f, squares = 0.0f;
  row.visit([&](const float (&x)[1][V], int, int) {
#pragma unroll
    for (int e = 0; e < V; e++) sum += x[0][e];
  });
  float near = team_sum(p.rows, sum, scratch) / p.rows.width;
  row.visit([&](const float (&x)[1][V], int, int count) {
#pragma unroll
    for (int e = 0; e < V; e++) {
      float d = e < count ? x[0][e] - near : 0.0f;
      shift += d;
      squares += d * d;
    }
  });
  shift = team_sum(p.rows, shift, scratch) / p.rows.width;
  float variance = fmaxf(team_sum(p.rows, squares, scratch) / p.rows.width - shift * shift, 0.0f);
  float mean = corrected_mean(near, shift, variance), rstd = 1.0f / sqrtf(variance + p.eps);
  if (row.thread == 0) ((float*)p.mean)[index] = mean, ((float*)p.rstd)[index] = rstd;
  row.write((T*)p.y + index * p.rows.width, [&](float (&y)[V], const float (&x)[1][V], int column, int count) {
    float gamma[V], beta[V];
    read_floats(gamma, (const T*)p.gamma + column, count, p.rows.aligned);
    read_floats(beta, (const T*)p.beta + column, count, p.rows.aligned);
#pragma unroll
    for (int e = 0; e < V; e++) y[e] = (x[0][e] - mean) * rstd * gamma[e] + beta[e];
  });
}

// Matches `LayerNormBackwardParams` in src/exec/cuda/norm.rs.
struct LayerNormBackwardParams {
  Rows rows;
  const void* x;
  const void* d_y;
  const void* gamma;
  const void* mean;
  const void* rstd;
  void* d_x;
};
static_assert(sizeof(LayerNormBackwardParams) == 72, "as in norm.rs");

template <class T>
DEVICE void layer_norm_backward(const LayerNormBackwardParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 2> row = {{(const T*)p.x, (const T*)p.d_y}};
  row.load(p.rows, index);
  float mean = ((const float*)p.mean)[index], rstd = ((const float*)p.rstd)[index], sum = 0.0f, along = 0.0f;
  // g is rounded the same both times, so that a row of equal g has no gradient.
  row.visit([&](const float (&x)[2][V], int column, int count) {
    float gamma[V];
    read_floats(gamma, (const T*)p.gamma + column, count, p.rows.aligned);
#pragma unroll
    for (int e = 0; e < V; e++) {
      float g = __fmul_rn(x[1][e], gamma[e]);
      sum += g;
      along += g * ((x[0][e] - mean) * rstd);
    }
  });
  sum = team_sum(p.rows, sum, scratch) / p.rows.width;
  along = team_sum(p.rows, along, scratch) / p.rows.width;
  row.write((T*)p.d_x + index * p.rows.width, [&](float (&d_x)[V], const float (&x)[2][V], int column, int count) {
    float gamma[V];
    read_floats(gamma, (const T*)p.gamma + column, count, p.rows.aligned);
#pragma unroll
    for (int e = 0; e < V; e++) d_x[e] = rstd * (__fmul_rn(x[1][e], gamma[e]) - sum - (x[0][e] - mean) * rstd * along);
  });
}

// Matches `LayerNormAffineParams` in src/exec/cuda/reduce.rs. A block takes columns blockIdx.x of chunk blockIdx.y.
struct LayerNormAffineParams {
  ColumnSum shape;
  const void* x;
  const void* d_y;
  const void* mean;
  const void* rstd;
  void* sums;  // [2, chunks, width] f32: for gamma, for beta
};
static_assert(sizeof(LayerNormAffineParams) == 64, "as in reduce.rs");

template <class T>
DEVICE void layer_norm_backward_affine(const LayerNormAffineParams& p) {
  constexpr int V = VECTOR<T>;
  const ColumnSum& s = p.shape;
  SHARED_ARRAY(float, scratch, COLUMN_THREADS * V);
  int pitch = s.lanes * V, lane = threadIdx.x % s.lanes, row = threadIdx.x / s.lanes;
  int first = blockIdx.x * pitch, column = first + lane * V, count = s.columns - column;
  int begin = blockIdx.y * s.length, end = min(begin + s.length, s.rows);
  float sums[2][V] = {};
  if (row < s.side && count > 0) {
#pragma unroll 2
    for (int r = begin + row; r < end; r += s.side) {
      float x[V], d_y[V], mean = ((const float*)p.mean)[r], rstd = ((const float*)p.rstd)[r];
      int64_t at = (int64_t)r * s.columns + column;
      read_floats(x, (const T*)p.x + at, count, s.aligned);
      read_floats(d_y, (const T*)p.d_y + at, count, s.aligned);
#pragma unroll
      for (int e = 0; e < V; e++) {
        sums[0][e] += d_y[e] * ((x[e] - mean) * rstd);
        sums[1][e] += d_y[e];
      }
    }
  }
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if (row < s.side) put_sums(scratch + threadIdx.x * V, sums[which]);
    sum_rows(scratch, s.side, pitch);
    float* y = (float*)p.sums + ((int64_t)which * gridDim.y + blockIdx.y) * s.columns + first;
    for (int c = threadIdx.x; c < min(pitch, s.columns - first); c += blockDim.x) y[c] = scratch[c];
    __syncthreads();  // before the scratch is written again
  }
}

KERNEL(layer_norm_f16, LayerNormParams, TEAM) { layer_norm<f16>(p); }
KERNEL(layer_norm_bf16, LayerNormParams, TEAM) { layer_norm<bf16>(p); }
KERNEL(layer_norm_f32, LayerNormParams, TEAM) { layer_norm<float>(p); }
KERNEL(layer_norm_backward_f16, LayerNormBackwardParams, TEAM) { layer_norm_backward<f16>(p); }
KERNEL(layer_norm_backward_bf16, LayerNormBackwardParams, TEAM) { layer_norm_backward<bf16>(p); }
KERNEL(layer_norm_backward_f32, LayerNormBackwardParams, TEAM) { layer_norm_backward<float>(p); }
KERNEL(layer_norm_backward_affine_f16, LayerNormAffineParams, COLUMN_THREADS) { layer_norm_backward_affine<f16>(p); }
KERNEL(layer_norm_backward_affine_bf16, LayerNormAffineParams, COLUMN_THREADS) { layer_norm_backward_affine<bf16>(p); }
KERNEL(layer_norm_backward_affine_f32, LayerNormAffineParams, COLUMN_THREADS) { layer_norm_backward_affine<float>(p); }
