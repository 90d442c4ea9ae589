// What happens to a sum before it is stored: y = activation(sum + bias + shift) + residual. The kernels that add everything up
// themselves end with it, and so does split_k_reduce.cu where parts of a sum were made by several blocks.
#pragma once
#include "activation.cuh"

// Absent operands are null. Matches `Epilogue` in src/exec/cuda/epilogue.rs.
struct Epilogue {
  void* y;
  const void* bias;      // [columns], for GEGLU [2 columns]
  const void* shift;     // of each sample [columns]
  const void* residual;  // like y, and may be y
  Divisor sample;        // rows of one sample
  int32_t shift_stride;  // elements from one sample's shift to the next's, 0 where all share it
  int32_t columns;       // of y [rows, columns]
  int32_t activation;
  int32_t together;  // neighbours of y and residual that can be accessed at once: 4, 2 or 1
  int32_t unused;
};
static_assert(sizeof(Epilogue) == 64, "as in epilogue.rs");

// The shift of a row's sample, or null.
template <class T>
DEVICE const T* shift_of(const Epilogue& e, int row) {
  return e.shift ? (const T*)e.shift + (int64_t)divide(row, e.sample) * e.shift_stride : nullptr;
}

// Stores N neighbours of a row from `column` on, a multiple of N, leaving out what lies beyond the last column. `gate` has the
// second factors of a GEGLU. Kernels of ops without an activation leave them out (not ACTIVATES): they would be most of the code.
template <bool ACTIVATES, class T, int N>
DEVICE void store_outputs(const Epilogue& e, const T* shift, int row, int column, const float (&sum)[N],
                          const float (&gate)[N]) {
  const T *bias = (const T*)e.bias, *residual = (const T*)e.residual;
  int64_t at = (int64_t)row * e.columns + column;
  float y[N];
#pragma unroll
  for (int n = 0; n < N; n++) {
    float x = sum[n];
    bool inside = column + n < e.columns;
    if (bias && inside) x += to_float(bias[column + n]);
    if (shift && inside) x += to_float(shift[column + n]);
    if (ACTIVATES && e.activation == GEGLU) {
      float g = gate[n];
      if (bias && inside) g += to_float(bias[e.columns + column + n]);
      y[n] = x * gelu(g);
    } else {
      y[n] = ACTIVATES ? activate(x, e.activation) : x;
    }
  }
  if (e.together >= N && column < e.columns) {
    if (residual) {
      Vector<T, N> r = *(const Vector<T, N>*)(residual + at);
#pragma unroll
      for (int n = 0; n < N; n++) y[n] += to_float(r.at[n]);
    }
    Vector<T, N> out;
#pragma unroll
    for (int n = 0; n < N; n++) out.at[n] = from_float<T>(y[n]);
    *(Vector<T, N>*)((T*)e.y + at) = out;
  } else {
    for (int n = 0; n < N && column + n < e.columns; n++) {
      if (residual) y[n] += to_float(residual[at + n]);
      ((T*)e.y)[at + n] = from_float<T>(y[n]);
    }
  }
}
