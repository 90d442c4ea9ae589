// architectures: 90a
// Attention for Hopper: what attention_forward.cu computes in 16 bits without a causal mask, by wgmma from boxes that the copy
// engine brings (after FlashAttention-3, Shah et al. 2024, section 3.2: the softmax of one tile runs beside the product of the
// one before it).
//
//   q [B, Tq, heads head_dim], k, v [B, Tk, heads head_dim]: columns of wider rows, storage T of 16 bits. out [B, Tq, heads
//   head_dim] of T, lse [B, heads, Tq] f32 as in attention_forward.cu. Nothing aliases; everything is overwritten. Scores,
//   softmax and sums are in f32; the probabilities, not yet divided by their sum, are rounded to T for their product with v.
//
// A block computes 128 queries of one head, two warpgroups 64 each; a third, which leaves them its registers, keeps two slots of
// keys and two of values filled. A tile has KEYS keys. head_dim, a multiple of 8, is padded with zeros to the next of 40, 64, 80,
// 128, 160 (scores to the next multiple of 16).
// Bytes: q and out once, k and v once per 128 queries, through L2. FLOPs: 4 Tq Tk head_dim per head; at head_dim 40 to 64 one
// exponential per 160 to 256 FLOPs limits as much as the tensor cores do. Limits: up to 160 accumulators a thread and 160 KiB
// of shared memory; one block a multiprocessor.
#include "attention.cuh"
#include "sm90.cuh"

// Matches `Sm90AttentionParams` in src/exec/cuda/attention.rs.
struct Sm90AttentionParams {
  TensorMap q, k, v;  // column of a head, head, token, sample
  void* out;
  void* lse;
  int32_t out_stride;  // elements from row to row
  int32_t head_dim, queries, keys;
  float scale;  // log2(e) / sqrt(head_dim)
  int32_t unused[23];
};
static_assert(sizeof(Sm90AttentionParams) == 512, "as in attention.rs");

template <class T, int DIM_>
struct AttentionTiles {
  typedef T Storage;
  static constexpr int DIM = DIM_, QUERIES = SM90_QUERIES, SLOTS = SM90_SLOTS;
  static constexpr int KEYS = FORWARD_SM90[row_of(FORWARD_SM90, DIM)][1];
  static constexpr int CONSUMERS = 8, THREADS = SM90_ATTENTION_THREADS;
  // A tile is boxes of 64 columns of the head.
  static constexpr int BOXES = (DIM + LINE - 1) / LINE, STEPS = (DIM + STEP - 1) / STEP;
  static constexpr int QUERY_BOX = QUERIES * LINE_BYTES, KEY_BOX = KEYS * LINE_BYTES, TILE = BOXES * KEY_BOX;
};

// Where shared memory holds what.
template <class A>
struct AttentionPlaces {
  uint32_t q, k, v, q_full, full, empty;

  DEVICE AttentionPlaces(const void* shared)
      : q(shared_address(shared)),
        k(q + A::BOXES * A::QUERY_BOX),
        v(k + A::SLOTS * A::TILE),
        q_full(v + A::SLOTS * A::TILE),
        full(q_full + 8),
        empty(full + 8 * 2 * A::SLOTS) {}

  // Keys and values come by turns: tile i / 2 of keys (even i) or values (odd i) lies in slot i / 2 % SLOTS of its ring.
  DEVICE uint32_t tile(int i) const { return (i % 2 ? v : k) + i / 2 % A::SLOTS * A::TILE; }
  DEVICE int barrier(int i) const { return 8 * (i / 2 % A::SLOTS * 2 + i % 2); }
  DEVICE int turn(int i) const { return i / 2 / A::SLOTS; }

  DEVICE void make_barriers() const {
    barrier_init(q_full, 1);
    for (int i = 0; i < 2 * A::SLOTS; i++) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, A::CONSUMERS);
    }
    fence_barriers();
  }

  DEVICE void wait(int i) const { barrier_wait(full + barrier(i), turn(i) & 1); }

  // A warp is done with tile i.
  DEVICE void release(int i) const {
    if (threadIdx.x % WARP_SIZE == 0) barrier_arrive(empty + barrier(i));
  }
};

// One thread's work: brings the queries, then keys and values by turns.
template <class A>
DEVICE void bring(const Sm90AttentionParams& p, const AttentionPlaces<A>& at, int tiles) {
  int head = blockIdx.y, sample = blockIdx.z;
  barrier_expect(at.q_full, A::BOXES * A::QUERY_BOX);
  for (int box = 0; box < A::BOXES; box++) {
    copy_box(at.q + box * A::QUERY_BOX, p.q, box * LINE, head, blockIdx.x * A::QUERIES, sample, at.q_full);
  }
  for (int i = 0; i < 2 * tiles; i++) {
    uint32_t full = at.full + at.barrier(i);
    if (at.turn(i) > 0) barrier_wait(at.empty + at.barrier(i), (at.turn(i) - 1) & 1);
    barrier_expect(full, A::TILE);
    for (int box = 0; box < A::BOXES; box++) {
      const TensorMap& map = i % 2 ? p.v : p.k;
      copy_box(at.tile(i) + box * A::KEY_BOX, map, box * LINE, head, i / 2 * A::KEYS, sample, full);
    }
  }
}

// Starts s = q k^T of a warpgroup's queries and a tile of keys.
template <class A>
DEVICE void start_scores(float (&s)[A::KEYS / 8][4], uint32_t q, uint32_t k) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < A::STEPS; step++) {
    int box = step / (LINE / STEP), within = step % (LINE / STEP) * 32;
    wgmma<Lines::KMajor>(typename A::Storage(), s, advance(descriptor(q), box * A::QUERY_BOX + within),
                         advance(descriptor(k), box * A::KEY_BOX + within), step > 0);
  }
  wgmma_commit();
}

// Starts out += p v.
template <class A>
DEVICE void start_output(float (&out)[A::DIM / 8][4], const uint32_t (&p)[A::KEYS / STEP][4], uint32_t v, bool add) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < A::KEYS / STEP; step++) {
    wgmma<Lines::MNMajor>(typename A::Storage(), out, p[step], advance(descriptor(v, A::KEY_BOX), step * STEP * LINE_BYTES),
                          add || step > 0);
  }
  wgmma_commit();
}

// Of the thread's two rows: the largest score so far and the sum of 2^(score - largest).
struct Softmax {
  float largest[2], total[2];

  // Turns scores into probabilities, not yet divided, of which `left` keys are there; fade gets what earlier sums are to be
  // multiplied by.
  template <int EIGHTS>
  DEVICE void take(float (&s)[EIGHTS][4], int left, float scale, float (&fade)[2]) {
    int t = threadIdx.x % 4 * 2;
    if (left < 8 * EIGHTS) {
#pragma unroll
      for (int n = 0; n < 4 * EIGHTS; n++) {
        if (n / 4 * 8 + t + n % 2 >= left) s[n / 4][n % 4] = -INFINITY;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float top = -INFINITY, sum = 0.0f;
#pragma unroll
      for (int j = 0; j < EIGHTS; j++) top = fmaxf(top, fmaxf(s[j][2 * h], s[j][2 * h + 1]));
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
      top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
      // Every tile has a key, so this is a number.
      top = fmaxf(largest[h], top * scale);
      fade[h] = exp2_approx(largest[h] - top);
      largest[h] = top;
#pragma unroll
      for (int j = 0; j < EIGHTS; j++) {
        float* pair = &s[j][2 * h];
        pair[0] = exp2_approx(pair[0] * scale - top), pair[1] = exp2_approx(pair[1] * scale - top);
        sum += pair[0] + pair[1];
      }
      total[h] = total[h] * fade[h] + sum;
    }
  }
};

template <class T, int STEPS>
DEVICE void pack_probabilities(uint32_t (&p)[STEPS][4], const float (&s)[2 * STEPS][4]) {
#pragma unroll
  for (int i = 0; i < 4 * STEPS; i++) p[i / 4][i % 4] = pack<T>(s[i / 2][i % 2 * 2], s[i / 2][i % 2 * 2 + 1]);
}

// Divides by the sums and stores a warpgroup's 64 queries.
template <class A>
DEVICE void store_queries(const Sm90AttentionParams& p, float (&out)[A::DIM / 8][4], Softmax& softmax) {
  typedef typename A::Storage T;
  int warp = threadIdx.x / WARP_SIZE, g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = softmax.total[h];
    total += __shfl_xor_sync(ALL_LANES, total, 1);
    total += __shfl_xor_sync(ALL_LANES, total, 2);
    int query = blockIdx.x * A::QUERIES + warp * 16 + 8 * h + g;
    if (query >= p.queries) continue;
    if (t == 0) {
      float* lse = (float*)p.lse + ((int64_t)blockIdx.z * gridDim.y + blockIdx.y) * p.queries;
      lse[query] = (softmax.largest[h] + log2f(total)) * LN_2;
    }
    float inverse = 1.0f / total;
    T* row = (T*)p.out + ((int64_t)blockIdx.z * p.queries + query) * p.out_stride + (int64_t)blockIdx.y * p.head_dim;
#pragma unroll
    for (int j = 0; j < A::DIM / 8; j++) {
      if (8 * j >= p.head_dim) break;
      *(uint32_t*)(row + 8 * j + t) = pack<T>(out[j][2 * h] * inverse, out[j][2 * h + 1] * inverse);
    }
  }
}

// A warpgroup's 64 queries.
template <class A>
DEVICE void attend(const Sm90AttentionParams& p, const AttentionPlaces<A>& at, int tiles) {
  typedef typename A::Storage T;
  uint32_t q = at.q + threadIdx.x / WARPGROUP * 64 * LINE_BYTES;
  Softmax softmax = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float out[A::DIM / 8][4], s[A::KEYS / 8][4], fade[2];
  uint32_t probabilities[A::KEYS / STEP][4];
  barrier_wait(at.q_full, 0);
  at.wait(0);
  start_scores<A>(s, q, at.tile(0));
  wgmma_wait<0>();
  fence_accumulators(s);
  at.release(0);
  softmax.take(s, p.keys, p.scale, fade);
  pack_probabilities<T>(probabilities, s);
  for (int tile = 1; tile < tiles; tile++) {
    // The scores of this tile, then the output of the one before it; the softmax runs beside the latter.
    at.wait(2 * tile);
    start_scores<A>(s, q, at.tile(2 * tile));
    at.wait(2 * tile - 1);
    start_output<A>(out, probabilities, at.tile(2 * tile - 1), tile > 1);
    wgmma_wait<1>();
    fence_accumulators(s);
    at.release(2 * tile);
    softmax.take(s, p.keys - tile * A::KEYS, p.scale, fade);
    wgmma_wait<0>();
    fence_accumulators(out);
    at.release(2 * tile - 1);
#pragma unroll
    for (int n = 0; n < A::DIM / 2; n++) out[n / 4][n % 4] *= fade[n % 4 / 2];
    pack_probabilities<T>(probabilities, s);
  }
  at.wait(2 * tiles - 1);
  start_output<A>(out, probabilities, at.tile(2 * tiles - 1), tiles > 1);
  wgmma_wait<0>();
  fence_accumulators(out);
  store_queries<A>(p, out, softmax);
}

template <class A>
DEVICE void sm90_attention(const Sm90AttentionParams& p) {
  DYNAMIC_BOXES(shared);
  AttentionPlaces<A> at(shared);
  if (threadIdx.x == 0) at.make_barriers();
  __syncthreads();
  int tiles = (p.keys + A::KEYS - 1) / A::KEYS;
  if (threadIdx.x / WARPGROUP == 2) {
    setmaxnreg_dec<24>();
    if (threadIdx.x % WARPGROUP == 0) bring(p, at, tiles);
  } else {
    setmaxnreg_inc<240>();
    attend(p, at, tiles);
  }
}

#define SM90_ATTENTION(DIM)                                                                                    \
  KERNEL_RESIDENT(sm90_attention_##DIM##_f16, Sm90AttentionParams, (AttentionTiles<f16, DIM>::THREADS), 1) {   \
    sm90_attention<AttentionTiles<f16, DIM>>(p);                                                               \
  }                                                                                                            \
  KERNEL_RESIDENT(sm90_attention_##DIM##_bf16, Sm90AttentionParams, (AttentionTiles<bf16, DIM>::THREADS), 1) { \
    sm90_attention<AttentionTiles<bf16, DIM>>(p);                                                              \
  }

// Kernels: sm90_attention_40_f16 sm90_attention_40_bf16 sm90_attention_64_f16 sm90_attention_64_bf16 sm90_attention_80_f16
// Kernels: sm90_attention_80_bf16 sm90_attention_128_f16 sm90_attention_128_bf16 sm90_attention_160_f16
// Kernels: sm90_attention_160_bf16
SM90_ATTENTION(40)
SM90_ATTENTION(64)
SM90_ATTENTION(80)
SM90_ATTENTION(128)
SM90_ATTENTION(160)
