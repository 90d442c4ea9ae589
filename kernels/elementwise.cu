// Functions of the elements at a place, and what moves or adds up whole rows and columns. Storage T, computed in f32,
// rounded once. All are limited by memory: bytes are those of the operands and the output, each touched once.
//
//   map             y[i] = f(x[i])                              y may be x
//   binary          y[i] = f(a[i], b[i])                        y may be a
//   cast            y[i] = x[i], from one type to another
//   fill            y[i] = value
//   scale           y[s, i] = x[s, i] by[s], by in f32          y may be x
//   channel_affine  y[r, c] = x[r, c] scale[c] + shift[c]       y may be x
//   geglu           y[r, h] = x[r, h] gelu(x[r, H + h])
//   geglu_backward  d_x[r] = (d_y gelu(g), d_y a gelu'(g))      d_x may be x
//   strided_sum     y[r, c] = sum of the parts that cover it, in their order, 0 where none does
//
// x, y, a, b [n] or [rows, width], rows dense but for the parts of strided_sum. Functions go by their numbers in constants.cuh;
// in `binary` a function of one number stands for its gradient, a = d_y and b = x.
#include "activation.cuh"
#include "math.cuh"
#include "vectorized.cuh"

DEVICE float spherical(float x) {
  float angle = acosf(clip(x, -1.0f, 1.0f));  // rounding takes cosines a little beyond one
  return 0.5f * angle * angle;
}

// -angle / sin(angle): -1 at angle 0, and for angles close to pi what it is at cosine 1e-7 - 1.
DEVICE float spherical_derivative(float x) {
  if (x >= 1.0f) return -1.0f;
  if (1.0f + x <= 1e-7f) return -7023.8149f;
  return -acosf(x) / sqrtf((1.0f - x) * (1.0f + x));
}

// Matches `MapParams` in src/exec/cuda/elementwise.rs.
struct MapParams {
  const void* x;
  void* y;
  int64_t count;
  int32_t function;
  int32_t aligned;
  float a, b;  // scale and shift, low and high
};
static_assert(sizeof(MapParams) == 40, "as in elementwise.rs");

template <class T>
DEVICE void map(const MapParams& p) {
  auto each = [&](auto f) {
    over_elements<VECTOR<T>>(p.count, p.aligned, [&](int64_t i, auto width) {
      float x[width.value];
      load_piece(x, (const T*)p.x + i);
#pragma unroll
      for (float& v : x) v = f(v);
      store_piece((T*)p.y + i, x);
    });
  };
  switch (p.function) {
    case SILU:
      return each([](float x) { return activate(x, SILU); });
    case GELU:
      return each([](float x) { return activate(x, GELU); });
    case QUICK_GELU:
      return each([](float x) { return activate(x, QUICK_GELU); });
    case GELU_TANH:
      return each([](float x) { return activate(x, GELU_TANH); });
    case AFFINE:
      return each([&](float x) { return fmaf(x, p.a, p.b); });
    case CLAMP:
      return each([&](float x) { return clip(x, p.a, p.b); });
    case SQRT:
      return each([](float x) { return sqrtf(x); });
    case SQUARE:
      return each([](float x) { return x * x; });
    case LN:
      return each([](float x) { return logf(x); });
    case EXP:
      return each([](float x) { return expf(x); });
    case RECIPROCAL:
      return each([](float x) { return 1.0f / x; });
    case SPHERICAL:
      return each([](float x) { return spherical(x); });
    default:
      return each([](float x) { return x; });
  }
}

// Kernels: map_f16 map_bf16 map_f32
FOR_EACH_TYPE(map, MapParams)

// Matches `BinaryParams` in src/exec/cuda/elementwise.rs.
struct BinaryParams {
  const void* a;
  const void* b;
  void* y;
  int64_t count;
  int32_t function;
  int32_t aligned;
  float low, high;
};
static_assert(sizeof(BinaryParams) == 48, "as in elementwise.rs");

template <class T>
DEVICE void binary(const BinaryParams& p) {
  auto each = [&](auto f) {
    over_elements<VECTOR<T>>(p.count, p.aligned, [&](int64_t i, auto width) {
      float a[width.value], b[width.value];
      load_piece(a, (const T*)p.a + i);
      load_piece(b, (const T*)p.b + i);
#pragma unroll
      for (int e = 0; e < width.value; e++) a[e] = f(a[e], b[e]);
      store_piece((T*)p.y + i, a);
    });
  };
  switch (p.function) {
    case SILU:
      return each([](float d, float x) { return d * activate_derivative(x, SILU); });
    case GELU:
      return each([](float d, float x) { return d * activate_derivative(x, GELU); });
    case QUICK_GELU:
      return each([](float d, float x) { return d * activate_derivative(x, QUICK_GELU); });
    case GELU_TANH:
      return each([](float d, float x) { return d * activate_derivative(x, GELU_TANH); });
    case CLAMP:
      return each([&](float d, float x) { return p.low <= x && x <= p.high ? d : 0.0f; });
    case SQRT:
      return each([](float d, float x) { return x == 0.0f ? d * 0.0f : d * (0.5f / sqrtf(x)); });
    case SQUARE:
      return each([](float d, float x) { return d * (2.0f * x); });
    case LN:
      return each([](float d, float x) { return d / x; });
    case EXP:
      return each([](float d, float x) { return d * expf(x); });
    case RECIPROCAL:
      return each([](float d, float x) { return d * (-1.0f / (x * x)); });
    case SPHERICAL:
      return each([](float d, float x) { return d * spherical_derivative(x); });
    case ADD:
      return each([](float a, float b) { return a + b; });
    case MUL:
      return each([](float a, float b) { return a * b; });
    default:
      return each([](float d, float) { return d; });
  }
}

// Kernels: binary_f16 binary_bf16 binary_f32
FOR_EACH_TYPE(binary, BinaryParams)

// Matches `CastParams` in src/exec/cuda/elementwise.rs.
struct CastParams {
  const void* x;
  void* y;
  int64_t count;
  int64_t aligned;
};
static_assert(sizeof(CastParams) == 32, "as in elementwise.rs");

// 16 bytes of the wider type.
template <class From, class To>
DEVICE void cast(const CastParams& p) {
  constexpr int N = VECTOR<From> < VECTOR<To> ? VECTOR<From> : VECTOR<To>;
  over_elements<N>(p.count, p.aligned, [&](int64_t i, auto width) {
    float x[width.value];
    load_piece(x, (const From*)p.x + i);
    store_piece((To*)p.y + i, x);
  });
}

KERNEL(cast_f16_bf16, CastParams, PLAIN_THREADS) { cast<f16, bf16>(p); }
KERNEL(cast_f16_f32, CastParams, PLAIN_THREADS) { cast<f16, float>(p); }
KERNEL(cast_bf16_f16, CastParams, PLAIN_THREADS) { cast<bf16, f16>(p); }
KERNEL(cast_bf16_f32, CastParams, PLAIN_THREADS) { cast<bf16, float>(p); }
KERNEL(cast_f32_f16, CastParams, PLAIN_THREADS) { cast<float, f16>(p); }
KERNEL(cast_f32_bf16, CastParams, PLAIN_THREADS) { cast<float, bf16>(p); }

// Matches `FillParams` in src/exec/cuda/elementwise.rs.
struct FillParams {
  void* y;
  int64_t count;
  float value;
  int32_t aligned;
};
static_assert(sizeof(FillParams) == 24, "as in elementwise.rs");

template <class T>
DEVICE void fill(const FillParams& p) {
  over_elements<VECTOR<T>>(p.count, p.aligned, [&](int64_t i, auto width) {
    float y[width.value];
#pragma unroll
    for (float& v : y) v = p.value;
    store_piece((T*)p.y + i, y);
  });
}

// Kernels: fill_f16 fill_bf16 fill_f32
FOR_EACH_TYPE(fill, FillParams)

// Matches `ScaleParams` in src/exec/cuda/elementwise.rs. A row is a sample.
struct ScaleParams {
  const void* x;
  const void* by;
  void* y;
  int64_t row;  // elements
  Pieces pieces;
  int32_t unused;
};
static_assert(sizeof(ScaleParams) == 56, "as in elementwise.rs");

template <class T>
DEVICE void scale(const ScaleParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t sample, uint32_t at, auto width) {
    int64_t i = sample * p.row + at;
    float x[width.value], by = ((const float*)p.by)[sample];
    load_piece(x, (const T*)p.x + i);
#pragma unroll
    for (float& v : x) v *= by;
    store_piece((T*)p.y + i, x);
  });
}

// Kernels: scale_f16 scale_bf16 scale_f32
FOR_EACH_TYPE(scale, ScaleParams)

// Matches `ChannelAffineParams` in src/exec/cuda/elementwise.rs. A row is the launch's channels of one.
struct ChannelAffineParams {
  const void* x;
  void* y;
  int64_t width;  // of a whole row
  Pieces pieces;
  int32_t first;  // channel
  float scale[MOST_CHANNELS], shift[MOST_CHANNELS];
};
static_assert(sizeof(ChannelAffineParams) == 176, "as in elementwise.rs");

template <class T>
DEVICE void channel_affine(const ChannelAffineParams& p) {
  over_pieces<1>(p.pieces, [&](uint32_t row, uint32_t c, auto) {
    int64_t i = row * p.width + p.first + c;
    ((T*)p.y)[i] = from_float<T>(fmaf(to_float(((const T*)p.x)[i]), p.scale[c], p.shift[c]));
  });
}

// Kernels: channel_affine_f16 channel_affine_bf16 channel_affine_f32
FOR_EACH_TYPE(channel_affine, ChannelAffineParams)

// Matches `GegluParams` in src/exec/cuda/elementwise.rs. A row of pieces is H wide.
struct GegluParams {
  const void* x;
  const void* d_y;  // backward
  void* y;          // backward: d_x
  int64_t half;     // H
  Pieces pieces;
  int32_t unused;
};
static_assert(sizeof(GegluParams) == 56, "as in elementwise.rs");

template <class T>
DEVICE void geglu(const GegluParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t row, uint32_t column, auto width) {
    const T* x = (const T*)p.x + 2 * row * p.half + column;
    float a[width.value], g[width.value];
    load_piece(a, x);
    load_piece(g, x + p.half);
#pragma unroll
    for (int e = 0; e < width.value; e++) a[e] *= gelu(g[e]);
    store_piece((T*)p.y + row * p.half + column, a);
  });
}

template <class T>
DEVICE void geglu_backward(const GegluParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t row, uint32_t column, auto width) {
    int64_t at = 2 * row * p.half + column;
    const T* x = (const T*)p.x + at;
    float a[width.value], g[width.value], d[width.value];
    load_piece(a, x);
    load_piece(g, x + p.half);
    load_piece(d, (const T*)p.d_y + row * p.half + column);
#pragma unroll
    for (int e = 0; e < width.value; e++) {
      float of_gate = d[e] * a[e] * gelu_derivative(g[e]);
      a[e] = d[e] * gelu(g[e]);
      g[e] = of_gate;
    }
    store_piece((T*)p.y + at, a);
    store_piece((T*)p.y + at + p.half, g);
  });
}

// Kernels: geglu_f16 geglu_bf16 geglu_f32 geglu_backward_f16 geglu_backward_bf16 geglu_backward_f32
FOR_EACH_TYPE(geglu, GegluParams)
FOR_EACH_TYPE(geglu_backward, GegluParams)

// Columns at .. at + width of y's rows r whose r % by lies in first .. first + count; there the element is the sum of
// `times` elements `step` apart, from x + (r / by) outer + (r % by - first) inner + (column - at) on. Matches `Part` in
// src/exec/cuda/elementwise.rs.
struct Part {
  const void* x;
  int64_t outer, inner, step;
  Divisor by;
  uint32_t first, count;
  uint32_t at, width;
  int32_t times;
};
static_assert(sizeof(Part) == 64, "as in elementwise.rs");

// Matches `StridedSumParams` in src/exec/cuda/elementwise.rs. The first part may be y itself.
struct StridedSumParams {
  Part parts[MOST_PARTS];
  void* y;
  int64_t width;
  Pieces pieces;
  int32_t count;  // of parts
};
static_assert(sizeof(StridedSumParams) == 552, "as in elementwise.rs");

template <class T>
DEVICE void strided_sum(const StridedSumParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t row, uint32_t column, auto width) {
    float sum[width.value] = {};
    bool covered = false;  // the first summand is copied, so that a copy keeps its bits
    for (int n = 0; n < p.count; n++) {
      const Part& part = p.parts[n];
      uint32_t outer = divide(row, part.by), inner = row - outer * part.by.divisor - part.first;
      if (column - part.at >= part.width || inner >= part.count) continue;
      const T* x = (const T*)part.x + outer * part.outer + inner * part.inner + (column - part.at);
#pragma unroll 4
      for (int time = 0; time < part.times; time++) {
        float next[width.value];
        load_piece(next, x + time * part.step);
#pragma unroll
        for (int e = 0; e < width.value; e++) sum[e] = covered ? sum[e] + next[e] : next[e];
        covered = true;
      }
    }
    store_piece((T*)p.y + row * p.width + column, sum);
  });
}

// Kernels: strided_sum_f16 strided_sum_bf16 strided_sum_f32
FOR_EACH_TYPE(strided_sum, StridedSumParams)
