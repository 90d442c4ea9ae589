// Rows looked up, mixed and pooled, the sinusoidal embedding, and their gradients. Storage T, computed in f32; indices are
// i32.
//
//   tokens               y[b, t] = row(ids[b, t]) + positions[t]; ids from V on are rows of `extra`
//   tokens_backward      y[id - first] = sum of d_y[n] over the positions n with ids[n] = id, in their order; y holds zeros
//                        before
//   mix                  y[s] = sum over j of weights[s, j] table[ids[s, j]], none where ids is negative
//   mix_backward         y[s, j] = <table[ids[s, j]], d_y[s]>, 0 where ids is negative
//   sinusoidal           y[n] = (sin x[n] f, cos x[n] f), f_i = 10000^(-i / (dim / 2 - shift)), or cosines first
//   sinusoidal_backward  y[n] = sum over i of f_i (cos x[n] f_i d_sin[n, i] - sin x[n] f_i d_cos[n, i])
//   pool                 y[b] = x[b, at[b]]
//   pool_backward        y[b, at[b]] = d_y[b], zeros elsewhere
//
// Frequencies are computed in f64 and angles in f32, each rounded to f32 once, as the reference's are. All are limited by
// memory: bytes are those of the output and of the rows read. Indices are checked on the host before a run.
#include "math.cuh"
#include "vectorized.cuh"

// Matches `TokensParams` in src/exec/cuda/embedding.rs.
struct TokensParams {
  const void* ids;
  const void* table;
  const void* extra;
  const void* positions;
  void* y;
  int64_t width;
  Divisor length;  // T
  Pieces pieces;   // a row is a position
  int32_t rows;    // V
  int32_t unused;
};
static_assert(sizeof(TokensParams) == 88, "as in embedding.rs");

template <class T>
DEVICE void tokens(const TokensParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t position, uint32_t column, auto width) {
    int id = ((const int32_t*)p.ids)[position];
    uint32_t t = position - divide(position, p.length) * p.length.divisor;
    const T* row = id < p.rows ? (const T*)p.table + id * p.width : (const T*)p.extra + (id - p.rows) * p.width;
    float x[width.value], shift[width.value];
    load_piece(x, row + column);
    load_piece(shift, (const T*)p.positions + t * p.width + column);
#pragma unroll
    for (int e = 0; e < width.value; e++) x[e] += shift[e];
    store_piece((T*)p.y + position * p.width + column, x);
  });
}

// Kernels: tokens_f16 tokens_bf16 tokens_f32
FOR_EACH_TYPE(tokens, TokensParams)

// Matches `TokensBackwardParams` in src/exec/cuda/embedding.rs. Blocks: positions, columns by threads.
struct TokensBackwardParams {
  const void* ids;
  const void* d_y;
  void* y;
  int32_t positions;  // B T
  int32_t width;
  int32_t first, rows;
};
static_assert(sizeof(TokensBackwardParams) == 40, "as in embedding.rs");

// The block of the first position of an id adds up all of them; the others have nothing to do.
template <class T>
DEVICE void tokens_backward(const TokensBackwardParams& p) {
  constexpr int AHEAD = 8;  // rows on their way at a time
  SHARED_ARRAY(float, scratch, WARP_SIZE);
  const int32_t* ids = (const int32_t*)p.ids;
  int own = blockIdx.x, id = ids[own], column = blockIdx.y * blockDim.x + threadIdx.x;
  if (id < p.first || id - p.first >= p.rows) return;  // all threads alike
  float before = 0.0f;
  for (int n = threadIdx.x; n < own; n += blockDim.x) {
    if (ids[n] == id) before = 1.0f;
  }
  if (block_max(before, scratch) > 0.0f || column >= p.width) return;
  const T* d_y = (const T*)p.d_y + column;
  float sum = 0.0f;
  for (int n = own; n < p.positions; n += AHEAD) {
    float next[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; k++) {
      bool same = n + k < p.positions && ids[min(n + k, p.positions - 1)] == id;
      next[k] = same ? to_float(d_y[(int64_t)(n + k) * p.width]) : 0.0f;
    }
#pragma unroll
    for (int k = 0; k < AHEAD; k++) sum += next[k];
  }
  ((T*)p.y)[(int64_t)(id - p.first) * p.width + column] = from_float<T>(sum);
}

// Kernels: tokens_backward_f16 tokens_backward_bf16 tokens_backward_f32
FOR_EACH_TYPE(tokens_backward, TokensBackwardParams)

// Matches `MixParams` in src/exec/cuda/embedding.rs.
struct MixParams {
  const void* weights;
  const void* ids;
  const void* table;
  const void* d_y;  // backward
  void* y;
  int64_t width;
  Pieces pieces;    // a row is a mixture
  int32_t choices;  // n
  int32_t dots;     // backward: S n
  int32_t unused;
};
static_assert(sizeof(MixParams) == 80, "as in embedding.rs");

template <class T>
DEVICE void mix(const MixParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t mixture, uint32_t column, auto width) {
    float sum[width.value] = {};
#pragma unroll 4
    for (int j = 0; j < p.choices; j++) {
      int64_t choice = (int64_t)mixture * p.choices + j;
      int id = ((const int32_t*)p.ids)[choice];
      if (id < 0) continue;
      float weight = to_float(((const T*)p.weights)[choice]), x[width.value];
      load_piece(x, (const T*)p.table + id * p.width + column);
#pragma unroll
      for (int e = 0; e < width.value; e++) sum[e] = fmaf(weight, x[e], sum[e]);
    }
    store_piece((T*)p.y + mixture * p.width + column, sum);
  });
}

// Kernels: mix_f16 mix_bf16 mix_f32
FOR_EACH_TYPE(mix, MixParams)

// A warp for each weight.
template <class T>
DEVICE void mix_backward(const MixParams& p) {
  int choice = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  if (choice >= p.dots) return;  // whole warps
  int id = ((const int32_t*)p.ids)[choice];
  const T* row = (const T*)p.table + max(id, 0) * p.width;
  const T* d_y = (const T*)p.d_y + choice / p.choices * p.width;
  float sum = 0.0f;
  for (int c = lane; c < p.width; c += WARP_SIZE) sum = fmaf(to_float(row[c]), to_float(d_y[c]), sum);
  sum = warp_sum(sum);
  if (lane == 0) ((T*)p.y)[choice] = from_float<T>(id < 0 ? 0.0f : sum);
}

// Kernels: mix_backward_f16 mix_backward_bf16 mix_backward_f32
FOR_EACH_TYPE(mix_backward, MixParams)

// Matches `SinusoidalParams` in src/exec/cuda/embedding.rs.
struct SinusoidalParams {
  const void* x;
  const void* d_y;  // backward
  void* y;
  double log_ratio;  // of a frequency to the one before it
  Divisor half;      // dim / 2
  int32_t numbers;
  int32_t count;  // numbers dim / 2
  int32_t cosines_first;
};
static_assert(sizeof(SinusoidalParams) == 56, "as in embedding.rs");

DEVICE float frequency(const SinusoidalParams& p, int i) { return (float)exp(p.log_ratio * i); }

// Sine and cosine of an angle: of what is left of it within pi/4 of a quarter turn, taken off in three parts (Cody and Waite
// 1980), as exact as f32 up to 10^5, and without the table that sinf keeps for larger ones.
DEVICE void sine_cosine(float angle, float& sine, float& cosine) {
  float quarters = rintf(angle * 0.63661977f);
  float rest = fmaf(quarters, -1.5707960f, angle);
  rest = fmaf(quarters, -3.1391647e-7f, rest);
  rest = fmaf(quarters, -5.3903025e-15f, rest);
  cosine = exact_cos(rest), sine = exact_sin(rest);
  turn(cosine, sine, (uint32_t)(int)quarters);
}

template <class T>
DEVICE void sinusoidal(const SinusoidalParams& p) {
  uint32_t pair = blockIdx.x * blockDim.x + threadIdx.x;
  if (pair >= (uint32_t)p.count) return;
  uint32_t half = p.half.divisor, number = divide(pair, p.half), i = pair - number * half;
  float sine, cosine;
  sine_cosine(__fmul_rn(to_float(((const T*)p.x)[number]), frequency(p, i)), sine, cosine);
  T* y = (T*)p.y + (int64_t)number * 2 * half + i;
  y[0] = from_float<T>(p.cosines_first ? cosine : sine);
  y[half] = from_float<T>(p.cosines_first ? sine : cosine);
}

// Kernels: sinusoidal_f16 sinusoidal_bf16 sinusoidal_f32
FOR_EACH_TYPE(sinusoidal, SinusoidalParams)

// A warp for each number.
template <class T>
DEVICE void sinusoidal_backward(const SinusoidalParams& p) {
  int number = blockIdx.x * (blockDim.x / WARP_SIZE) + threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE;
  if (number >= p.numbers) return;  // whole warps
  int half = p.half.divisor;
  const T* first = (const T*)p.d_y + (int64_t)number * 2 * half;
  const T *of_sine = p.cosines_first ? first + half : first, *of_cosine = p.cosines_first ? first : first + half;
  float x = to_float(((const T*)p.x)[number]), sum = 0.0f;
  for (int i = lane; i < half; i += WARP_SIZE) {
    float f = frequency(p, i), sine, cosine;
    sine_cosine(__fmul_rn(x, f), sine, cosine);
    sum += f * (cosine * to_float(of_sine[i]) - sine * to_float(of_cosine[i]));
  }
  sum = warp_sum(sum);
  if (lane == 0) ((T*)p.y)[number] = from_float<T>(sum);
}

// Kernels: sinusoidal_backward_f16 sinusoidal_backward_bf16 sinusoidal_backward_f32
FOR_EACH_TYPE(sinusoidal_backward, SinusoidalParams)

// Matches `PoolParams` in src/exec/cuda/embedding.rs.
struct PoolParams {
  const void* x;
  const void* at;
  void* y;
  int64_t width;
  Pieces pieces;  // a row is one of y
  Divisor rows;   // of x in a sample; backward: of y
};
static_assert(sizeof(PoolParams) == 64, "as in embedding.rs");

template <class T>
DEVICE void pool(const PoolParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t sample, uint32_t column, auto width) {
    int64_t row = (int64_t)sample * p.rows.divisor + ((const int32_t*)p.at)[sample];
    float x[width.value];
    load_piece(x, (const T*)p.x + row * p.width + column);
    store_piece((T*)p.y + sample * p.width + column, x);
  });
}

template <class T>
DEVICE void pool_backward(const PoolParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t row, uint32_t column, auto width) {
    uint32_t sample = divide(row, p.rows);
    float d[width.value] = {};
    if (row - sample * p.rows.divisor == ((const uint32_t*)p.at)[sample]) {
      load_piece(d, (const T*)p.x + sample * p.width + column);
    }
    store_piece((T*)p.y + row * p.width + column, d);
  });
}

// Kernels: pool_f16 pool_bf16 pool_f32 pool_backward_f16 pool_backward_bf16 pool_backward_f32
FOR_EACH_TYPE(pool, PoolParams)
FOR_EACH_TYPE(pool_backward, PoolParams)
