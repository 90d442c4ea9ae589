// The gradient of attention from its log-sum-exp: probabilities are made again, tile by tile (FlashAttention-2).
//
//   s = q k^T / sqrt(head_dim), p = exp(s - lse), delta = sum of out d_out over a head, d_s = p (d_out v^T - delta),
//   d_v = p^T d_out, d_k = d_s^T q / sqrt(head_dim), d_q = d_s k / sqrt(head_dim)
//
//   q, k, v and what queries see as in the forward; out, d_out [B, Tq, heads head_dim] of T; lse, delta [B, heads, Tq] f32;
//   d_q [B, Tq, ..], d_k, d_v [B, Tk, heads head_dim] of T, dense. Nothing aliases; everything is overwritten. Scores and sums
//   are in f32; p and d_s, without the factor 1 / sqrt(head_dim), are rounded to T for their products.
//
// One kernel makes delta, one d_k and d_v, one d_q; sums are in the order of queries (keys), no block adds to another's. The two
// latter are one: a block has rows of its own (keys or queries) with their two operands (k, v or q, d_out) and lets tiles of the
// others (q, d_out or k, v) pass. Its scores have its own rows down and the others across: so in both p and d_s are left
// operands, in 16 bits and where a warp has whole rows without leaving its registers, else through tiles in shared memory.
// Own rows stay in shared memory, 55 KiB (d = 64) to 97 KiB (d = 160), less than the 99 KiB that sm_86 and sm_89 have. Larger
// heads do not fit: theirs are streamed, scores made as in a gemm, gradients 128 columns at a time.
// FLOPs: d_k and d_v 8 Tq Tk head_dim per head, d_q 6 (causal: Tk - Tq / 2 for Tk). Bytes: others' rows once per 64 (streamed:
// 32) own rows, through L2.
#include "attention.cuh"
#include "gemm_mainloop.cuh"

// Matches `DeltaParams` in src/exec/cuda/attention.rs.
struct DeltaParams {
  const void* out;
  const void* d_out;
  void* delta;
  Divisor heads;
  int32_t head_dim, queries, aligned;
};
static_assert(sizeof(DeltaParams) == 48, "as in attention.rs");

// Eight lanes for each query and head.
template <class T>
DEVICE void attention_delta(const DeltaParams& p) {
  int heads = p.heads.divisor, count = p.queries * heads, n = blockIdx.x * DELTA_ROWS + threadIdx.x / 8, lane = threadIdx.x % 8;
  int64_t at = ((int64_t)blockIdx.y * count + n) * p.head_dim;
  const T *out = (const T*)p.out + at, *d_out = (const T*)p.d_out + at;
  float sum = 0.0f;
  if (n < count && p.aligned) {
    for (int i = lane * VECTOR<T>; i < p.head_dim; i += 8 * VECTOR<T>) {
      Vector<T, VECTOR<T>> x = *(const Vector<T, VECTOR<T>>*)(out + i), d = *(const Vector<T, VECTOR<T>>*)(d_out + i);
#pragma unroll
      for (int e = 0; e < VECTOR<T>; e++) sum += to_float(x.at[e]) * to_float(d.at[e]);
    }
  } else if (n < count) {
    for (int i = lane; i < p.head_dim; i += 8) sum += to_float(out[i]) * to_float(d_out[i]);
  }
#pragma unroll
  for (int flip = 4; flip; flip /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, flip);
  if (n < count && lane == 0) {
    int query = divide(n, p.heads), head = n - query * heads;
    ((float*)p.delta)[((int64_t)blockIdx.y * heads + head) * p.queries + query] = sum;
  }
}

KERNEL(attention_delta_f16, DeltaParams, 8 * DELTA_ROWS) { attention_delta<f16>(p); }
KERNEL(attention_delta_bf16, DeltaParams, 8 * DELTA_ROWS) { attention_delta<bf16>(p); }
KERNEL(attention_delta_f32, DeltaParams, 8 * DELTA_ROWS) { attention_delta<float>(p); }

// Matches `BackwardParams` in src/exec/cuda/attention.rs.
struct BackwardParams {
  Columns q, k, v, d_out;
  Columns d_first;   // d_k or d_q
  Columns d_second;  // d_v
  const void* lse;
  const void* delta;
  int32_t head_dim, queries, keys;
  int32_t ahead;  // query i sees keys 0..=i + ahead: Tk - Tq where causal, else Tk
  float scale;    // 1 / sqrt(head_dim)
  int32_t unused;
};
static_assert(sizeof(BackwardParams) == 136, "as in attention.rs");

// What a block works on: its own rows from `own` on, and tiles of OTHER other rows.
template <class T, bool TO_KV>
struct Sides {
  HeadRows<T> own_first, own_second, other_first, other_second;
  int own;

  DEVICE Sides(const BackwardParams& p, int own)
      : own_first(TO_KV ? p.k : p.q, TO_KV ? p.keys : p.queries, p.head_dim),
        own_second(TO_KV ? p.v : p.d_out, TO_KV ? p.keys : p.queries, p.head_dim),
        other_first(TO_KV ? p.q : p.k, TO_KV ? p.queries : p.keys, p.head_dim),
        other_second(TO_KV ? p.d_out : p.v, TO_KV ? p.queries : p.keys, p.head_dim),
        own(own) {}

  // The tiles that some own row has to do with.
  DEVICE int begin(const BackwardParams& p, int other) const { return TO_KV ? max(own - p.ahead, 0) / other : 0; }
  DEVICE int end(const BackwardParams& p, int rows, int other) const {
    int count = TO_KV ? p.queries : min(own + rows + p.ahead, p.keys);
    return (count + other - 1) / other;
  }
};

// lse (in powers of two) and delta for a thread's part of 16 own rows and 8 WIDE others.
template <bool TO_KV, int WIDE>
struct Statistics {
  static constexpr int COUNT = TO_KV ? 2 * WIDE : 2;
  float lse[COUNT], delta[COUNT];

  // Of the queries from `first` on, which are own or other rows.
  DEVICE void load(const BackwardParams& p, int first) {
    int g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
    int64_t head = ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * p.queries;
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      int query = first + (TO_KV ? n / 2 * 8 + t + n % 2 : n * 8 + g);
      lse[n] = query < p.queries ? ((const float*)p.lse)[head + query] * LOG2_E : 0.0f;
      delta[n] = query < p.queries ? ((const float*)p.delta)[head + query] : 0.0f;
    }
  }
};

// From scores s (without the scale) and d = d_out v^T to p and d_s (without the scale), in place. The first own and the first
// other row of the warp's part are given.
template <bool TO_KV, int WIDE>
DEVICE void differentiate(float (&s)[1][WIDE][4], float (&d)[1][WIDE][4], const Statistics<TO_KV, WIDE>& statistics,
                          const BackwardParams& p, int own, int other) {
  int g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
  // From the thread's first pair on: how many others there are, and by how much a key may go further than a query. Own rows
  // beyond the last are not stored, whatever becomes of them.
  int count = (TO_KV ? p.queries : p.keys) - (other + t), ahead = (other + t) - (own + g);
  ahead = p.ahead + (TO_KV ? ahead : -ahead);
  float scale = p.scale * LOG2_E;
#pragma unroll
  for (int j = 0; j < WIDE; j++) {
#pragma unroll
    for (int n = 0; n < 4; n++) {
      int i = TO_KV ? 2 * j + n % 2 : n / 2, down = n / 2 * 8, across = 8 * j + n % 2;
      bool seen = across < count && (TO_KV ? down - across : across - down) <= ahead;
      s[0][j][n] = seen ? exp2_approx(s[0][j][n] * scale - statistics.lse[i]) : 0.0f;
      d[0][j][n] = s[0][j][n] * (d[0][j][n] - statistics.delta[i]);
    }
  }
}

// A number of a head dimension's row of the tables in constants.cuh.
template <class T, int DIM>
DEVICE constexpr int backward_number(int column) {
  return sizeof(T) == 2 ? BACKWARD_HALF[row_of(BACKWARD_HALF, DIM)][column]
                        : BACKWARD_SINGLE[row_of(BACKWARD_SINGLE, DIM)][column];
}

// A warp has 16 of the own rows, and all or half of the others and of the gradients' columns.
template <class T, int DIM_>
struct BackwardTiles {
  typedef T Storage;
  static constexpr bool HALF = sizeof(T) == 2;
  static constexpr int DIM = DIM_;
  static constexpr int OWN = backward_number<T, DIM>(1), OTHER = backward_number<T, DIM>(2);
  static constexpr int WARPS_ACROSS = backward_number<T, DIM>(3);
  static constexpr int THREADS = OWN / 16 * WARPS_ACROSS * WARP_SIZE;
  static constexpr bool IN_REGISTERS = HALF && WARPS_ACROSS == 1;
};

template <class B, bool TO_KV>
DEVICE void attention_backward(const BackwardParams& p) {
  typedef typename B::Storage T;
  constexpr int DIM = B::DIM, OTHER = B::OTHER, LINE = pitch<T>(DIM), TILE = OTHER * LINE, P_LINE = pitch<T>(OTHER);
  constexpr int S_WIDE = OTHER / B::WARPS_ACROSS / 8, WIDE = DIM / B::WARPS_ACROSS / 8;
  DYNAMIC_SHARED(shared);
  unsigned char *first_tile = shared, *second_tile = first_tile + B::OWN * LINE, *stages = second_tile + B::OWN * LINE;
  unsigned char *d_s_tile = stages + 4 * TILE, *p_tile = d_s_tile + B::OWN * P_LINE;  // not IN_REGISTERS; p TO_KV
  int warp = threadIdx.x / WARP_SIZE, row = warp / B::WARPS_ACROSS * 16, across = warp % B::WARPS_ACROSS;
  int s_column = across * (8 * S_WIDE), column = across * (8 * WIDE);
  Sides<T, TO_KV> sides(p, blockIdx.x * B::OWN);
  int end = sides.end(p, B::OWN, OTHER);

  auto fetch = [&](int tile) {
    unsigned char* stage = stages + tile % 2 * (2 * TILE);
    if (tile < end) {
      sides.other_first.template fetch<OTHER, DIM, B::THREADS>(stage, tile * OTHER, 0);
      sides.other_second.template fetch<OTHER, DIM, B::THREADS>(stage + TILE, tile * OTHER, 0);
    }
    cp_async_commit();
  };
  sides.own_first.template fetch<B::OWN, DIM, B::THREADS>(first_tile, sides.own, 0);
  sides.own_second.template fetch<B::OWN, DIM, B::THREADS>(second_tile, sides.own, 0);
  int tile = sides.begin(p, OTHER);
  fetch(tile);
  Operand<T, Lines::KMajor, LINE> own_first = {first_tile}, own_second = {second_tile};
  Operand<T, Lines::KMajor, P_LINE> d_scores = {d_s_tile}, probabilities = {p_tile};
  Statistics<TO_KV, S_WIDE> statistics;
  if (!TO_KV) statistics.load(p, sides.own + row);
  float d_first[1][WIDE][4], d_second[1][WIDE][4];
  clear(d_first);
  clear(d_second);
  for (; tile < end; tile++) {
    cp_async_wait<0>();
    __syncthreads();  // this tile is here for all, and all are done with the one before it
    fetch(tile + 1);
    int other = tile * OTHER + s_column;
    unsigned char* stage = stages + tile % 2 * (2 * TILE);
    float s[1][S_WIDE][4], d[1][S_WIDE][4];
    clear(s);
    clear(d);
    warp_mma<DIM / STEP>(s, own_first, row, 0, Operand<T, Lines::KMajor, LINE>{stage}, s_column, 0);
    warp_mma<DIM / STEP>(d, own_second, row, 0, Operand<T, Lines::KMajor, LINE>{stage + TILE}, s_column, 0);
    if (TO_KV) statistics.load(p, other);  // not before: no registers are left while the products run
    differentiate<TO_KV>(s, d, statistics, p, sides.own + row, other);
    Operand<T, Lines::MNMajor, LINE> first = {stage}, second = {stage + TILE};
    if constexpr (B::IN_REGISTERS) {
      uint32_t fragments[OTHER / STEP][4];
      pack_left<T>(fragments, d);
      warp_mma<OTHER / STEP>(d_first, fragments, first, column, 0);
      if constexpr (TO_KV) {
        pack_left<T>(fragments, s);
        warp_mma<OTHER / STEP>(d_second, fragments, second, column, 0);
      }
    } else {
      put<T, P_LINE>(d_s_tile, d, row, s_column, 1.0f);
      if constexpr (TO_KV) put<T, P_LINE>(p_tile, s, row, s_column, 1.0f);
      __syncthreads();
      warp_mma<OTHER / STEP>(d_first, d_scores, row, 0, first, column, 0);
      if constexpr (TO_KV) warp_mma<OTHER / STEP>(d_second, probabilities, row, 0, second, column, 0);
    }
  }

  __syncthreads();  // nobody reads own rows any more
  put<T, LINE>(first_tile, d_first, row, column, p.scale);
  if constexpr (TO_KV) put<T, LINE>(second_tile, d_second, row, column, 1.0f);
  __syncthreads();
  HeadRows<T> to_first(p.d_first, sides.own_first.count, p.head_dim);
  to_first.template store<B::OWN, DIM, B::THREADS>(first_tile, sides.own, 0);
  if constexpr (TO_KV) {
    HeadRows<T> to_second(p.d_second, sides.own_first.count, p.head_dim);
    to_second.template store<B::OWN, DIM, B::THREADS>(second_tile, sides.own, 0);
  }
}

// Rows of a head as an operand of a streamed product.
template <class T, int LENGTH, int THREADS>
struct Band {
  const HeadRows<T>& rows;
  int first;
  DEVICE void fetch(unsigned char* tile, int k) const {
    rows.template fetch<LENGTH, 64 / (int)sizeof(T), THREADS>(tile, first, k);
  }
};

// Heads of up to 512, some columns at a time.
template <class T, bool TO_KV>
DEVICE void attention_backward_streamed(const BackwardParams& p) {
  constexpr int OWN = STREAMED_OWN, OTHER = STREAMED_OTHER, CHUNK = STREAMED_COLUMNS, CHUNKS = 512 / CHUNK;
  constexpr int LINE = pitch<T>(CHUNK), SLOT = OTHER * LINE;
  constexpr int P_LINE = pitch<T>(OTHER), OUTPUTS = TO_KV ? 2 : 1;
  typedef TileShape<T, OWN, OTHER, 2, 4> Scores;
  constexpr int THREADS = STREAMED_THREADS, WIDE = CHUNK / 4 / 8;
  static_assert(THREADS == Scores::THREADS, "eight warps");
  static_assert(STAGES * stage_bytes<T, Lines::KMajor>(OWN + OTHER) <= 2 * SLOT, "stages of scores lie where chunks do");
  DYNAMIC_SHARED(shared);
  unsigned char *slots = shared, *d_s_tile = slots + 2 * SLOT, *p_tile = d_s_tile + OWN * P_LINE;
  int warp = threadIdx.x / WARP_SIZE, row = warp / 4 * 16, s_column = warp % 4 * 16, column = warp % 4 * (8 * WIDE);
  Sides<T, TO_KV> sides(p, blockIdx.x * OWN);
  Operand<T, Lines::KMajor, P_LINE> d_scores = {d_s_tile}, probabilities = {p_tile};
  Statistics<TO_KV, 2> statistics;
  if (!TO_KV) statistics.load(p, sides.own + row);
  float d_first[CHUNKS][1][WIDE][4], d_second[CHUNKS][1][WIDE][4];
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) clear(d_first[chunk]), clear(d_second[chunk]);

  int end = sides.end(p, OWN, OTHER), items = OUTPUTS * ((p.head_dim + CHUNK - 1) / CHUNK);
  for (int tile = sides.begin(p, OTHER); tile < end; tile++) {
    int other = tile * OTHER;
    if (TO_KV) statistics.load(p, other + s_column);
    float s[1][2][4], d[1][2][4];
    typedef Band<T, OWN, THREADS> Own;
    typedef Band<T, OTHER, THREADS> Other;
    __syncthreads();  // all are done with the tile before
    gemm_mainloop<Scores, Lines::KMajor, Lines::KMajor>(s, Own{sides.own_first, sides.own}, Other{sides.other_first, other},
                                                        p.head_dim);
    __syncthreads();
    gemm_mainloop<Scores, Lines::KMajor, Lines::KMajor>(d, Own{sides.own_second, sides.own}, Other{sides.other_second, other},
                                                        p.head_dim);
    differentiate<TO_KV>(s, d, statistics, p, sides.own + row, other + s_column);
    put<T, P_LINE>(d_s_tile, d, row, s_column, 1.0f);
    if constexpr (TO_KV) put<T, P_LINE>(p_tile, s, row, s_column, 1.0f);
    __syncthreads();

    // The others' chunks, by turns of the first and the second operand.
    auto fetch = [&](int item) {
      unsigned char* slot = slots + item % 2 * SLOT;
      int chunk = item / OUTPUTS * CHUNK;
      if (item < items && item % OUTPUTS == 0) {
        sides.other_first.template fetch<OTHER, CHUNK, THREADS>(slot, other, chunk);
      } else if (item < items) {
        sides.other_second.template fetch<OTHER, CHUNK, THREADS>(slot, other, chunk);
      }
      cp_async_commit();
    };
    fetch(0);
#pragma unroll
    for (int item = 0; item < OUTPUTS * CHUNKS; item++) {
      if (item >= items) continue;
      cp_async_wait<0>();
      __syncthreads();
      fetch(item + 1);
      Operand<T, Lines::MNMajor, LINE> chunk = {slots + item % 2 * SLOT};
      if (item % OUTPUTS == 0) {
        warp_mma<OTHER / STEP>(d_first[item / OUTPUTS], d_scores, row, 0, chunk, column, 0);
      } else {
        warp_mma<OTHER / STEP>(d_second[item / OUTPUTS], probabilities, row, 0, chunk, column, 0);
      }
    }
  }

  HeadRows<T> to_first(p.d_first, sides.own_first.count, p.head_dim);
  HeadRows<T> to_second(TO_KV ? p.d_second : p.d_first, sides.own_first.count, p.head_dim);
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    if (chunk * CHUNK >= p.head_dim) continue;
    __syncthreads();
    put<T, LINE>(slots, d_first[chunk], row, column, p.scale);
    if constexpr (TO_KV) put<T, LINE>(slots + SLOT, d_second[chunk], row, column, 1.0f);
    __syncthreads();
    to_first.template store<OWN, CHUNK, THREADS>(slots, sides.own, chunk * CHUNK);
    if constexpr (TO_KV) to_second.template store<OWN, CHUNK, THREADS>(slots + SLOT, sides.own, chunk * CHUNK);
  }
}

#define ATTENTION_BACKWARD(DIM, NAME, T)                                                                    \
  KERNEL(attention_to_kv_##DIM##_##NAME, BackwardParams, (BackwardTiles<T, DIM>::THREADS)) {                \
    attention_backward<BackwardTiles<T, DIM>, true>(p);                                                     \
  }                                                                                                         \
  KERNEL(attention_to_q_##DIM##_##NAME, BackwardParams, (BackwardTiles<T, DIM>::THREADS)) {                 \
    attention_backward<BackwardTiles<T, DIM>, false>(p);                                                    \
  }
#define OF_EVERY_TYPE(DIM)            \
  ATTENTION_BACKWARD(DIM, f16, f16)   \
  ATTENTION_BACKWARD(DIM, bf16, bf16) \
  ATTENTION_BACKWARD(DIM, f32, float)
#define OF_16_BITS(DIM)             \
  ATTENTION_BACKWARD(DIM, f16, f16) \
  ATTENTION_BACKWARD(DIM, bf16, bf16)
#define STREAMED(NAME, T)                                                                                           \
  KERNEL(attention_to_kv_512_##NAME, BackwardParams, STREAMED_THREADS) { attention_backward_streamed<T, true>(p); } \
  KERNEL(attention_to_q_512_##NAME, BackwardParams, STREAMED_THREADS) { attention_backward_streamed<T, false>(p); }

// Kernels: attention_to_kv_16_f16 attention_to_q_16_f16 attention_to_kv_16_bf16 attention_to_q_16_bf16 attention_to_kv_16_f32
// Kernels: attention_to_q_16_f32 attention_to_kv_32_f16 attention_to_q_32_f16 attention_to_kv_32_bf16 attention_to_q_32_bf16
// Kernels: attention_to_kv_32_f32 attention_to_q_32_f32 attention_to_kv_48_f16 attention_to_q_48_f16 attention_to_kv_48_bf16
// Kernels: attention_to_q_48_bf16 attention_to_kv_48_f32 attention_to_q_48_f32 attention_to_kv_64_f16 attention_to_q_64_f16
// Kernels: attention_to_kv_64_bf16 attention_to_q_64_bf16 attention_to_kv_64_f32 attention_to_q_64_f32 attention_to_kv_80_f16
// Kernels: attention_to_q_80_f16 attention_to_kv_80_bf16 attention_to_q_80_bf16 attention_to_kv_80_f32 attention_to_q_80_f32
// Kernels: attention_to_kv_128_f16 attention_to_q_128_f16 attention_to_kv_128_bf16 attention_to_q_128_bf16
// Kernels: attention_to_kv_160_f16 attention_to_q_160_f16 attention_to_kv_160_bf16 attention_to_q_160_bf16
// Kernels: attention_to_kv_512_f16 attention_to_q_512_f16 attention_to_kv_512_bf16 attention_to_q_512_bf16
// Kernels: attention_to_kv_512_f32 attention_to_q_512_f32
OF_EVERY_TYPE(16)
OF_EVERY_TYPE(32)
OF_EVERY_TYPE(48)
OF_EVERY_TYPE(64)
OF_EVERY_TYPE(80)
OF_16_BITS(128)
OF_16_BITS(160)
STREAMED(f16, f16)
STREAMED(bf16, bf16)
STREAMED(f32, float)
