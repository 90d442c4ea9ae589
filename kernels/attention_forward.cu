// Attention: out = softmax(q k^T / sqrt(head_dim)) v per head, without the scores ever leaving the chip (FlashAttention-2).
//
//   q [B, Tq, heads head_dim], k, v [B, Tk, heads head_dim]: columns of wider rows, storage T. out [B, Tq, heads head_dim] of
//   T, lse [B, heads, Tq] f32: the natural logarithm of the sum of exp of the scaled scores, saved for the backward. Causal:
//   the last query sees the last key, so query i sees keys 0..=i + Tk - Tq, Tq <= Tk. Nothing aliases; everything is
//   overwritten. Scores, softmax and sums are in f32; in 16 bits the probabilities, not yet divided by their sum, are rounded
//   to T for their product with v.
//
// A block computes ROWS queries of one head: a warp has 16 of them (where head_dim is too large for its registers several warps
// have the same 16, each makes all scores and owns a slice of the output's columns). Tiles of keys and values come by turns
// through one ring in shared memory. Softmax is online, in powers of two. head_dim is padded with zeros to the next DIM.
// Limits: registers (DIM / 2 / COLUMN_WARPS accumulators) and 99 KiB of shared memory, what sm_86 and sm_89 have.
// Bytes: q and out once, k and v once per ROWS queries, through L2. FLOPs: 4 Tq Tk head_dim per head (causal: Tk - Tq / 2 for
// Tk).
#include "attention.cuh"

// Matches `AttentionParams` in src/exec/cuda/attention.rs.
struct AttentionParams {
  Columns q, k, v, out;
  void* lse;
  int32_t head_dim, queries, keys;
  int32_t ahead;  // query i sees keys 0..=i + ahead: Tk - Tq where causal, else Tk
  float scale;    // log2(e) / sqrt(head_dim)
  int32_t unused;
};
static_assert(sizeof(AttentionParams) == 96, "as in attention.rs");

// A number of a head dimension's row of the tables in constants.cuh.
template <class T, int DIM>
DEVICE constexpr int forward_number(int column) {
  return sizeof(T) == 2 ? FORWARD_HALF[row_of(FORWARD_HALF, DIM)][column]
                        : FORWARD_SINGLE[row_of(FORWARD_SINGLE, DIM)][column];
}

template <class T, int DIM_>
struct ForwardTiles {
  typedef T Storage;
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int DIM = DIM_;
  static constexpr int ROW_WARPS = forward_number<T, DIM>(1), COLUMN_WARPS = forward_number<T, DIM>(2);
  static constexpr int KEYS = forward_number<T, DIM>(3), SLOTS = forward_number<T, DIM>(4);
  static constexpr int ROWS = 16 * ROW_WARPS, THREADS = ROW_WARPS * COLUMN_WARPS * WARP_SIZE;
};

template <class A>
DEVICE void attention(const AttentionParams& p) {
  typedef typename A::Storage T;
  constexpr int DIM = A::DIM, KEYS = A::KEYS, LINE = pitch<T>(DIM), TILE = KEYS * LINE;
  // A tile of keys is taken in parts, so that few of the last one's scores are for nothing.
  constexpr int PART = KEYS < 32 ? KEYS : 32, PARTS = KEYS / PART, WIDE = DIM / A::COLUMN_WARPS / 8;
  DYNAMIC_SHARED(shared);
  unsigned char *q_tile = shared, *ring = q_tile + A::ROWS * LINE, *p_tile = ring + A::SLOTS * TILE;
  int warp = threadIdx.x / WARP_SIZE, g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
  int row = warp / A::COLUMN_WARPS * 16, column = warp % A::COLUMN_WARPS * (8 * WIDE), first = blockIdx.x * A::ROWS;
  HeadRows<T> q(p.q, p.queries, p.head_dim), k(p.k, p.keys, p.head_dim), v(p.v, p.keys, p.head_dim);
  // Keys that the first `rows` queries see.
  auto seen = [&](int rows) { return min(rows + p.ahead, p.keys); };
  int tiles = (seen(first + A::ROWS) + KEYS - 1) / KEYS;

  // Tile i / 2 of the keys (even i) or values (odd i) goes to slot i % SLOTS.
  auto fetch = [&](int i) {
    unsigned char* slot = ring + i % A::SLOTS * TILE;
    if (i < 2 * tiles && i % 2 == 0) k.template fetch<KEYS, DIM, A::THREADS>(slot, i / 2 * KEYS, 0);
    if (i < 2 * tiles && i % 2 == 1) v.template fetch<KEYS, DIM, A::THREADS>(slot, i / 2 * KEYS, 0);
    cp_async_commit();
  };
  // Waits for tile i and has the slot of the one before it filled again.
  auto next = [&](int i) {
    cp_async_wait<A::SLOTS - 2>();
    __syncthreads();
    fetch(i + A::SLOTS - 1);
    return ring + i % A::SLOTS * TILE;
  };

  q.template fetch<A::ROWS, DIM, A::THREADS>(q_tile, first, 0);
  for (int i = 0; i < A::SLOTS - 1; i++) fetch(i);
  Operand<T, Lines::KMajor, LINE> queries = {q_tile};

  // Of the thread's two rows: the largest score so far and the sum of 2^(score - largest).
  float largest[2] = {-INFINITY, -INFINITY}, total[2] = {0.0f, 0.0f};
  float out[1][WIDE][4];
  clear(out);
  for (int tile = 0; tile < tiles; tile++) {
    int visible = seen(first + row + 16) - tile * KEYS;  // to some row of the warp
    bool masked = seen(first + row + 1) - tile * KEYS < KEYS;
    float s[PARTS][1][PART / 8][4];
    Operand<T, Lines::KMajor, LINE> keys = {next(2 * tile)};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      clear(s[part]);
      if (part * PART >= visible) continue;
      warp_mma<DIM / STEP>(s[part], queries, row, 0, keys, part * PART, 0);
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      if (masked) {
        int limit = seen(first + row + 8 * h + g + 1) - tile * KEYS;
#pragma unroll
        for (int n = 0; n < KEYS / 4; n++) {
          float& score = s[n / (PART / 4)][0][n % (PART / 4) / 2][2 * h + n % 2];
          if (n / 2 * 8 + t + n % 2 >= limit) score = -INFINITY;
        }
      }
      float top = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int n = 0; n < KEYS / 4; n++) top = fmaxf(top, s[n / (PART / 4)][0][n % (PART / 4) / 2][2 * h + n % 2]);
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
      // Every row sees the first key, so this is a number from the first tile on.
      top = fmaxf(largest[h], top * p.scale);
      float fade = exp2_approx(largest[h] - top);
      largest[h] = top;
#pragma unroll
      for (int j = 0; j < KEYS / 8; j++) {
        float* pair = &s[j / (PART / 8)][0][j % (PART / 8)][2 * h];
        pair[0] = exp2_approx(pair[0] * p.scale - top), pair[1] = exp2_approx(pair[1] * p.scale - top);
        sum += pair[0] + pair[1];
      }
      total[h] = total[h] * fade + sum;
#pragma unroll
      for (int j = 0; j < WIDE; j++) out[0][j][2 * h] *= fade, out[0][j][2 * h + 1] *= fade;
    }
    // In 16 bits they are a left operand as they are; in f32 they become a tile, which the next barrier shows to all.
    uint32_t p_fragments[PARTS][PART / STEP][4];
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if constexpr (A::HALF) {
        pack_left<T>(p_fragments[part], s[part]);
      } else if (column == 0) {
        put<T, pitch<T>(KEYS)>(p_tile, s[part], row, part * PART, 1.0f);
      }
    }
    Operand<T, Lines::MNMajor, LINE> values = {next(2 * tile + 1)};
#pragma unroll
    for (int part = 0; part < PARTS; part++) {
      if (part * PART >= visible) continue;
      if constexpr (A::HALF) {
        warp_mma<PART / STEP>(out, p_fragments[part], values, column, part * PART);
      } else {
        Operand<T, Lines::KMajor, pitch<T>(KEYS)> probabilities = {p_tile};
        warp_mma<PART / STEP>(out, probabilities, row, part * PART, values, column, part * PART);
      }
    }
  }

#pragma unroll
  for (int h = 0; h < 2; h++) {
    total[h] += __shfl_xor_sync(ALL_LANES, total[h], 1);
    total[h] += __shfl_xor_sync(ALL_LANES, total[h], 2);
    int query = first + row + 8 * h + g;
    if (column == 0 && t == 0 && query < p.queries) {
      float* lse = (float*)p.lse + ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * p.queries;
      lse[query] = (largest[h] + log2f(total[h])) * LN_2;
    }
    float inverse = 1.0f / total[h];
#pragma unroll
    for (int j = 0; j < WIDE; j++) out[0][j][2 * h] *= inverse, out[0][j][2 * h + 1] *= inverse;
  }
  __syncthreads();  // nobody reads queries any more
  put<T, LINE>(q_tile, out, row, column, 1.0f);
  __syncthreads();
  HeadRows<T>(p.out, p.queries, p.head_dim).template store<A::ROWS, DIM, A::THREADS>(q_tile, first, 0);
}

#define ATTENTION(DIM)                                                                      \
  KERNEL(attention_##DIM##_f16, AttentionParams, (ForwardTiles<f16, DIM>::THREADS)) {       \
    attention<ForwardTiles<f16, DIM>>(p);                                                   \
  }                                                                                         \
  KERNEL(attention_##DIM##_bf16, AttentionParams, (ForwardTiles<bf16, DIM>::THREADS)) {     \
    attention<ForwardTiles<bf16, DIM>>(p);                                                  \
  }                                                                                         \
  KERNEL(attention_##DIM##_f32, AttentionParams, (ForwardTiles<float, DIM>::THREADS)) {     \
    attention<ForwardTiles<float, DIM>>(p);                                                 \
  }

// Kernels: attention_16_f16 attention_16_bf16 attention_16_f32 attention_32_f16 attention_32_bf16 attention_32_f32
// Kernels: attention_48_f16 attention_48_bf16 attention_48_f32 attention_64_f16 attention_64_bf16 attention_64_f32
// Kernels: attention_80_f16 attention_80_bf16 attention_80_f32 attention_128_f16 attention_128_bf16 attention_128_f32
// Kernels: attention_160_f16 attention_160_bf16 attention_160_f32 attention_512_f16 attention_512_bf16 attention_512_f32
ATTENTION(16)
ATTENTION(32)
ATTENTION(48)
ATTENTION(64)
ATTENTION(80)
ATTENTION(128)
ATTENTION(160)
ATTENTION(512)
