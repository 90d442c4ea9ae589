// Rows to rows: softmax, unit vectors, cross-entropy, and their gradients.
//
//   softmax                 y = exp(x - max) / sum exp(x - max)                  x, y [rows, width]
//   softmax_backward        d_x = y (d_y - sum y d_y)
//   unit                    norm = |x|, y = x / max(norm, eps)                   norm [rows] f32
//   unit_backward           d_x = (d_y - y sum y d_y) / norm, or d_y / eps where norm < eps
//   cross_entropy           lse = log sum exp(x), loss = lse - x[target]         loss, lse [rows] f32, targets [rows] i32
//   cross_entropy_backward  d_x = d_loss (exp(x - lse) - onehot(target))         d_loss, lse [rows] f32
//
// x, y and their gradients are of storage T; all arithmetic is in f32. Outputs are overwritten; y may be x and d_x may be
// d_y (for cross-entropy: the logits). A negative target means a loss of 0 and a gradient of 0.
//
// A row belongs to a warp, where 5 vectors of 16 bytes per lane hold it, else to a block; it is read once while 5 vectors
// per thread hold it. The maximum and the sum of exponentials are found in one pass. Bytes: each operand once. FLOPs: some 5
// per element, an exponential or two. Limited by memory.
#include "rows.cuh"

// Matches `SoftmaxParams` in src/exec/cuda/rowwise.rs.
struct SoftmaxParams {
  Rows rows;
  const void* x;  // backward: y
  const void* d_y;
  void* y;  // backward: d_x
};
static_assert(sizeof(SoftmaxParams) == 48, "as in rowwise.rs");

// The largest element and the sum of exp(x - largest) over some elements.
struct LogSumExp {
  float top = -3.402823466e38f, sum = 0.0f;

  DEVICE void add(float x) {
    float ratio = expf(-fabsf(x - top));
    sum = x > top ? sum * ratio + 1.0f : sum + ratio;
    top = fmaxf(top, x);
  }
};

template <class T>
DEVICE LogSumExp row_log_sum_exp(const Rows& rows, const Row<T, 1>& row, float* scratch) {
  LogSumExp mine;
  row.visit([&](const float (&x)[1][VECTOR<T>], int, int count) {
#pragma unroll
    for (int e = 0; e < VECTOR<T>; e++) {
      if (e < count) mine.add(x[0][e]);
    }
  });
  LogSumExp all;
  all.top = team_max(rows, mine.top, scratch);
  all.sum = team_sum(rows, mine.sum * expf(mine.top - all.top), scratch);
  return all;
}

template <class T>
DEVICE void softmax(const SoftmaxParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 1> row = {{(const T*)p.x}};
  row.load(p.rows, index);
  LogSumExp all = row_log_sum_exp(p.rows, row, scratch);
  float scale = 1.0f / all.sum;
  row.write((T*)p.y + index * p.rows.width, [&](float (&y)[V], const float (&x)[1][V], int, int) {
#pragma unroll
    for (int e = 0; e < V; e++) y[e] = expf(x[0][e] - all.top) * scale;
  });
}

// Sum of the products of two rows; elements that are not there are 0.
template <class T>
DEVICE float row_dot(const Rows& rows, const Row<T, 2>& row, float* scratch) {
  float sum = 0.0f;
  row.visit([&](const float (&x)[2][VECTOR<T>], int, int) {
#pragma unroll
    for (int e = 0; e < VECTOR<T>; e++) sum += x[0][e] * x[1][e];
  });
  return team_sum(rows, sum, scratch);
}

template <class T>
DEVICE void softmax_backward(const SoftmaxParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 2> row = {{(const T*)p.x, (const T*)p.d_y}};
  row.load(p.rows, index);
  float along = row_dot(p.rows, row, scratch);
  row.write((T*)p.y + index * p.rows.width, [&](float (&d_x)[V], const float (&x)[2][V], int, int) {
#pragma unroll
    for (int e = 0; e < V; e++) d_x[e] = x[0][e] * (x[1][e] - along);
  });
}

// Matches `UnitParams` in src/exec/cuda/rowwise.rs.
struct UnitParams {
  Rows rows;
  const void* x;  // backward: y
  const void* d_y;
  void* y;  // backward: d_x
  void* norm;
  float eps;
  int32_t unused;
};
static_assert(sizeof(UnitParams) == 64, "as in rowwise.rs");

template <class T>
DEVICE void unit(const UnitParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 1> row = {{(const T*)p.x}};
  row.load(p.rows, index);
  float squares = 0.0f;
  row.visit([&](const float (&x)[1][V], int, int) {
#pragma unroll
    for (int e = 0; e < V; e++) squares += x[0][e] * x[0][e];
  });
  float norm = sqrtf(team_sum(p.rows, squares, scratch)), length = fmaxf(norm, p.eps);
  if (row.thread == 0) ((float*)p.norm)[index] = norm;
  row.write((T*)p.y + index * p.rows.width, [&](float (&y)[V], const float (&x)[1][V], int, int) {
#pragma unroll
    for (int e = 0; e < V; e++) y[e] = x[0][e] / length;
  });
}

template <class T>
DEVICE void unit_backward(const UnitParams& p) {
  constexpr int V = VECTOR<T>;
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 2> row = {{(const T*)p.x, (const T*)p.d_y}};
  row.load(p.rows, index);
  float along = row_dot(p.rows, row, scratch), norm = ((const float*)p.norm)[index], scale = 1.0f / fmaxf(norm, p.eps);
  if (norm < p.eps) along = 0.0f;
  row.write((T*)p.y + index * p.rows.width, [&](float (&d_x)[V], const float (&x)[2][V], int, int) {
#pragma unroll
    for (int e = 0; e < V; e++) d_x[e] = (x[1][e] - x[0][e] * along) * scale;
  });
}

// Matches `CrossEntropyParams` in src/exec/cuda/rowwise.rs.
struct CrossEntropyParams {
  Rows rows;
  const void* logits;
  const void* targets;
  void* loss;  // backward: d_loss
  void* lse;
  void* d_logits;
};
static_assert(sizeof(CrossEntropyParams) == 64, "as in rowwise.rs");

template <class T>
DEVICE void cross_entropy(const CrossEntropyParams& p) {
  SHARED_ARRAY(float, scratch, 32);
  int64_t index = team_row(p.rows);
  if (index >= p.rows.count) return;
  Row<T, 1> row = {{(const T*)p.logits}};
  row.load(p.rows, index);
  LogSumExp all = row_log_sum_exp(p.rows, row, scratch);
  if (row.thread) return;
  int target = ((const int32_t*)p.targets)[index];
  float log = logf(all.sum);
  ((float*)p.lse)[index] = all.top + log;
  // Grouped so that a likely target's small loss keeps its digits.
  ((float*)p.loss)[index] = target < 0 ? 0.0f : log + (all.top - to_float(row.from[0][target]));
}

// A block takes a stretch of one row: blockIdx.x is the row.
template <class T>
DEVICE void cross_entropy_backward(const CrossEntropyParams& p) {
  constexpr int V = VECTOR<T>;
  int64_t index = blockIdx.x;
  int column = (blockIdx.y * blockDim.x + threadIdx.x) * V, count = min(p.rows.width - column, V);
  if (count <= 0) return;
  int64_t at = index * p.rows.width + column;
  int target = ((const int32_t*)p.targets)[index];
  float lse = ((const float*)p.lse)[index], d_loss = ((const float*)p.loss)[index], x[V], d_x[V];
  read_floats(x, (const T*)p.logits + at, count, p.rows.aligned);
#pragma unroll
  for (int e = 0; e < V; e++) {
    float hit = column + e == target ? 1.0f : 0.0f;
    d_x[e] = target < 0 ? 0.0f : d_loss * (expf(x[e] - lse) - hit);
  }
  write_floats((T*)p.d_logits + at, d_x, count, p.rows.aligned);
}

#define ROWS(NAME, PARAMS, THREADS)                       \
  KERNEL(NAME##_f16, PARAMS, THREADS) { NAME<f16>(p); }   \
  KERNEL(NAME##_bf16, PARAMS, THREADS) { NAME<bf16>(p); } \
  KERNEL(NAME##_f32, PARAMS, THREADS) { NAME<float>(p); }

// Kernels: softmax_f16 softmax_bf16 softmax_f32 softmax_backward_f16 softmax_backward_bf16 softmax_backward_f32 unit_f16
// Kernels: unit_bf16 unit_f32 unit_backward_f16 unit_backward_bf16 unit_backward_f32 cross_entropy_f16 cross_entropy_bf16
// Kernels: cross_entropy_f32 cross_entropy_backward_f16 cross_entropy_backward_bf16 cross_entropy_backward_f32
ROWS(softmax, SoftmaxParams, TEAM)
ROWS(softmax_backward, SoftmaxParams, TEAM)
ROWS(unit, UnitParams, TEAM)
ROWS(unit_backward, UnitParams, TEAM)
ROWS(cross_entropy, CrossEntropyParams, TEAM)
ROWS(cross_entropy_backward, CrossEntropyParams, PLAIN_THREADS)
