// Updates of state: linear combinations, optimisers, noise. Storage T, computed in f32; scalars are f32 read from memory, so
// a captured graph replays with new ones. All are limited by memory: each operand and output is touched once.
//
//   combine   y = sum of coefficients[i] terms[i], terms with coefficient 0 not read; y may be the first term. Guidance and a
//             sampler's step are one of them: with y in f32, terms may be 16-bit predictions (combine_f16_f32, combine_bf16_f32)
//   adamw     scalars lr, 1 - beta1, 1 - beta2, eps, decay, c1, c2:
//             m' = m + (1 - beta1) (g - m), v' = v + (1 - beta2) (g g - v),
//             p' = p (1 - lr decay) - lr (m' / c1) / (sqrt(v' / c2) + eps)
//   rmsprop   scalars lr, alpha, momentum, eps, bound, low, high: g' = clip(g, +-bound), v' = alpha v + (1 - alpha) g' g',
//             b' = momentum b + g' / (sqrt(v') + eps), p' = clip(p - lr b', low, high)
//   nesterov  scalars lr, momentum: b' = momentum b + g, p' = p - lr (g + momentum b')
//   noise     y [B, .., C] in f32, standard normals numbered channels first (n = c positions + position, as latents are
//             drawn):
//             those of draw counter[b][2..4] (low, high) under seed counter[b][0..2], the same bits as src/exec/philox.rs
#include "math.cuh"
#include "vectorized.cuh"

// Matches `CombineParams` in src/exec/cuda/update.rs.
struct CombineParams {
  const void* terms[MOST_TERMS];
  const void* coefficients;
  void* y;
  int64_t elements;
  int32_t count;       // of terms
  int32_t accumulate;  // to what y holds
  int32_t aligned;
  uint32_t cast;  // bit n: term n holds N, not T
};
static_assert(sizeof(CombineParams) == 104, "as in update.rs");

template <class T, class N = T>
DEVICE void combine(const CombineParams& p) {
  over_elements<VECTOR<T>>(p.elements, p.aligned, [&](int64_t i, auto width) {
    float sum[width.value] = {};
    if (p.accumulate) load_piece(sum, (const T*)p.y + i);
    for (int n = 0; n < p.count; n++) {
      float coefficient = ((const float*)p.coefficients)[n], x[width.value];
      if (coefficient == 0.0f) continue;
      if (p.cast >> n & 1) {
        load_piece(x, (const N*)p.terms[n] + i);
      } else {
        load_piece(x, (const T*)p.terms[n] + i);
      }
#pragma unroll
      for (int e = 0; e < width.value; e++) sum[e] = fmaf(coefficient, x[e], sum[e]);
    }
    store_piece((T*)p.y + i, sum);
  });
}

// Kernels: combine_f16 combine_bf16 combine_f32
FOR_EACH_TYPE(combine, CombineParams)
KERNEL(combine_f16_f32, CombineParams, PLAIN_THREADS) { combine<float, f16>(p); }
KERNEL(combine_bf16_f32, CombineParams, PLAIN_THREADS) { combine<float, bf16>(p); }

// Matches `OptimiserParams` in src/exec/cuda/update.rs. No output overlaps an input.
struct OptimiserParams {
  const void* inputs[4];  // p, g, states
  const void* scalars;
  void* outputs[3];  // p, states
  int64_t elements;
  int64_t aligned;
};
static_assert(sizeof(OptimiserParams) == 80, "as in update.rs");

// Calls f(p, g, state, second state), which replaces all but g, for this thread's elements.
template <class T, int STATES, class F>
DEVICE void step(const OptimiserParams& p, F f) {
  over_elements<VECTOR<T>>(p.elements, p.aligned, [&](int64_t i, auto width) {
    float x[width.value], g[width.value], a[width.value], b[width.value] = {};
    load_piece(x, (const T*)p.inputs[0] + i);
    load_piece(g, (const T*)p.inputs[1] + i);
    load_piece(a, (const T*)p.inputs[2] + i);
    if (STATES > 1) load_piece(b, (const T*)p.inputs[3] + i);
#pragma unroll
    for (int e = 0; e < width.value; e++) f(x[e], g[e], a[e], b[e]);
    store_piece((T*)p.outputs[0] + i, x);
    store_piece((T*)p.outputs[1] + i, a);
    if (STATES > 1) store_piece((T*)p.outputs[2] + i, b);
  });
}

template <class T>
DEVICE void adamw(const OptimiserParams& params) {
  const float* s = (const float*)params.scalars;
  float lr = s[0], gain1 = s[1], gain2 = s[2], eps = s[3], keep = 1.0f - lr * s[4];
  float step1 = lr / s[5], unbias2 = 1.0f / s[6];
  step<T, 2>(params, [&](float& p, float g, float& m, float& v) {
    m += gain1 * (g - m);
    v += gain2 * (g * g - v);
    p = p * keep - step1 * m / (sqrtf(v * unbias2) + eps);
  });
}

// Kernels: adamw_f16 adamw_bf16 adamw_f32
FOR_EACH_TYPE(adamw, OptimiserParams)

template <class T>
DEVICE void rmsprop(const OptimiserParams& params) {
  const float* s = (const float*)params.scalars;
  float lr = s[0], alpha = s[1], momentum = s[2], eps = s[3], bound = s[4], low = s[5], high = s[6];
  step<T, 2>(params, [&](float& p, float g, float& v, float& b) {
    g = clip(g, -bound, bound);
    v = alpha * v + (1.0f - alpha) * g * g;
    b = momentum * b + g / (sqrtf(v) + eps);
    p = clip(p - lr * b, low, high);
  });
}

// Kernels: rmsprop_f16 rmsprop_bf16 rmsprop_f32
FOR_EACH_TYPE(rmsprop, OptimiserParams)

template <class T>
DEVICE void nesterov(const OptimiserParams& params) {
  const float* s = (const float*)params.scalars;
  float lr = s[0], momentum = s[1];
  step<T, 1>(params, [&](float& p, float g, float& b, float&) {
    b = momentum * b + g;
    p -= lr * (g + momentum * b);
  });
}

// Kernels: nesterov_f16 nesterov_bf16 nesterov_f32
FOR_EACH_TYPE(nesterov, OptimiserParams)

// Philox4x32-10 (Salmon et al. 2011): replaces the counter by four random words.
DEVICE void philox(uint32_t (&c)[4], uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    uint32_t high0 = __umulhi(c[0], 0xD2511F53u), low0 = c[0] * 0xD2511F53u;
    uint32_t high2 = __umulhi(c[2], 0xCD9E8D57u), low2 = c[2] * 0xCD9E8D57u;
    c[0] = high2 ^ c[1] ^ key0, c[1] = low2, c[2] = high0 ^ c[3] ^ key1, c[3] = low0;
    key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
  }
}

// Two standard normals from two random words (Box and Muller 1958).
DEVICE void box_muller(uint32_t a, uint32_t b, float& x, float& y) {
  float u = __fmul_rn((float)((a >> 8) + 1), 5.9604645e-8f);                             // 2^-24
  float r = __fsqrt_rn(__fmul_rn(-2.0f, exact_log(u)));
  float t = __fmul_rn((float)((int)((b >> 7) & 0x7fffffu) - (1 << 22)), 1.8725352e-7f);  // pi/2 2^-23
  x = __fmul_rn(r, exact_cos(t)), y = __fmul_rn(r, exact_sin(t));
  turn(x, y, b >> 30);
}

// Matches `NoiseParams` in src/exec/cuda/update.rs.
struct NoiseParams {
  const void* counter;  // [B, 4]
  void* y;
  int64_t sample;  // elements of one, below 2^31
  Divisor positions;
  Pieces pieces;  // a row is a sample, a piece four numbers
  int32_t channels;
  int32_t unused;
};
static_assert(sizeof(NoiseParams) == 64, "as in update.rs");

KERNEL(noise_f32, NoiseParams, PLAIN_THREADS) {
  over_pieces<1>(p.pieces, [&](uint32_t sample, uint32_t quad, auto) {
    const uint32_t* counter = (const uint32_t*)p.counter + sample * 4;
    uint32_t words[4] = {quad, 0, counter[2], counter[3]};
    philox(words, counter[0], counter[1]);
    float normals[4];
    box_muller(words[0], words[1], normals[0], normals[1]);
    box_muller(words[2], words[3], normals[2], normals[3]);
    float* y = (float*)p.y + sample * p.sample;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      uint32_t n = quad * 4 + e;
      if (n >= p.sample) continue;
      uint32_t channel = divide(n, p.positions), position = n - channel * p.positions.divisor;
      y[(int64_t)position * p.channels + channel] = normals[e];
    }
  });
}
