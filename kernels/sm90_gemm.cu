// architectures: 90a
// Matrix products and convolutions for Hopper: what gemm.cu and conv2d.cu compute in 16 bits, by wgmma from boxes that the copy
// engine brings.
//
//   y [B, H, W, N] = epilogue(sum over (ky, kx, c) of x[b, y + down + dir ky, x + right + dir kx, c] w(ky kw + kx, c, n)),
//   x [B, Hx, Wx, C] and 0 outside of it. A convolution of stride 1 has (down, right) = (-top, -left) and dir = 1, its gradient
//   to the input (top, left) and -1; a product [M, K] [K, N] is a 1x1 convolution of an image of one row of M pixels.
//   w(tap, c, n): held in lines along c (`r`: [N, taps, C]) or along n (`a`: [C, taps, N]); for GEGLU 2 N columns, which the
//   tensor map brings in eights, in turn from the first and the second half.
//   Storage T of 16 bits, accumulated in f32 in order of (tap, c in sixteens); y is overwritten and may be the residual.
//
// A block computes 128 pixels, a box of a power of two along each of x, y and b, by 128 or 160 columns (320, 640, 1280 are
// multiples of 160): two warpgroups have 64 rows each, one warp more keeps a ring of stages of 64 reduced elements filled. The
// launch says of how many slots: two at least, for a slot is given back when the stage after its own is under way. Tiles go along
// blockIdx.x, those of the same pixels one after another.
// C, with several taps a multiple of 64, else of 8, and for lines along n also N a multiple of 8. Where the tiles are too few for
// the GPU the reduced dimension is split over blockIdx.z as in gemm.cu.
// Bytes: (128 + columns) C taps per block through L2; FLOPs: 2 B H W N C taps. Limits: 32 to 40 KiB of shared memory a slot, 80
// accumulators a thread; one block a multiprocessor. Limited by the tensor cores.
#include "sm90.cuh"
#include "gemm_mainloop.cuh"

// Matches `Sm90GemmParams` in src/exec/cuda/sm90_gemm.rs.
struct Sm90GemmParams {
  TensorMap left;   // c, x, y, b
  TensorMap right;  // r: c, n, tap; a: n, c, tap; GEGLU: c, n % 8, half, n / 8
  Epilogue epilogue;
  Split split;
  Divisor tiles_x, tiles_y, chunks, kernel_row;
  int32_t batch, height, width;  // of y
  int32_t shift_x, shift_y;      // log2 of a box's extents
  int32_t down, right_by, direction;
  int32_t columns;  // of w
  int32_t stages;   // of all taps
  int32_t slots;    // of the ring
  int32_t unused[19];
};
static_assert(sizeof(Sm90GemmParams) == 512, "as in sm90_gemm.rs");

template <class T, int COLUMNS_, Lines RIGHT_>
struct Sm90Tiles {
  typedef T Storage;
  static constexpr Lines RIGHT = RIGHT_;
  static constexpr int ROWS = SM90_ROWS, COLUMNS = COLUMNS_, DEPTH = LINE;
  static constexpr int THREADS = SM90_THREADS, CONSUMERS = THREADS / WARP_SIZE - 1;
  static constexpr int LEFT_BYTES = ROWS * LINE_BYTES;
  // Boxes of the right operand: one of all columns, or one for each 64 of them.
  static constexpr int BOXES = RIGHT == Lines::KMajor ? 1 : (COLUMNS + LINE - 1) / LINE;
  static constexpr int BOX_BYTES = (RIGHT == Lines::KMajor ? COLUMNS : DEPTH) * LINE_BYTES;
  static constexpr int STAGE_BYTES = LEFT_BYTES + BOXES * BOX_BYTES;
};

// The pixels of a block.
struct PixelBox {
  int x, y, b;

  DEVICE PixelBox(const Sm90GemmParams& p) {
    int tile = p.split.tile_down();
    int rest = divide(tile, p.tiles_x), tile_x = tile - rest * p.tiles_x.divisor;
    int tile_b = divide(rest, p.tiles_y), tile_y = rest - tile_b * p.tiles_y.divisor;
    x = tile_x << p.shift_x, y = tile_y << p.shift_y, b = tile_b * (SM90_ROWS >> p.shift_x >> p.shift_y);
  }

  // The row of y that is pixel `i` of the box, or -1.
  DEVICE int row(const Sm90GemmParams& p, int i) const {
    int at_x = x + (i & ((1 << p.shift_x) - 1)), at_y = y + (i >> p.shift_x & ((1 << p.shift_y) - 1));
    int at_b = b + (i >> p.shift_x >> p.shift_y);
    return at_x < p.width && at_y < p.height && at_b < p.batch ? (at_b * p.height + at_y) * p.width + at_x : -1;
  }
};

// The ring in shared memory: slots for stages, and for each a barrier that says it is full and one that says it is empty.
template <class H>
struct Ring {
  uint32_t stages;
  int slots;

  DEVICE uint32_t stage(int slot) const { return stages + slot * H::STAGE_BYTES; }
  DEVICE uint32_t full(int slot) const { return stages + slots * H::STAGE_BYTES + 8 * slot; }
  DEVICE uint32_t empty(int slot) const { return full(slots + slot); }

  DEVICE void make_barriers() const {
    for (int slot = 0; slot < slots; slot++) {
      barrier_init(full(slot), 1);
      barrier_init(empty(slot), H::CONSUMERS);
    }
    fence_barriers();
  }
};

// Where one is on the way around a ring: the slot, and the parity of the round.
struct Turn {
  int slot = 0, parity = 0;

  // By selects: beside a branch here ptxas takes the products' path for divergent and has them wait for each other.
  DEVICE void next(int slots) {
    slot = slot + 1 < slots ? slot + 1 : 0;
    parity ^= slot == 0;
  }
};

// One thread's work: fills stages in turn, each once the warps that computed with it are done.
template <class H>
DEVICE void fill_stages(const Sm90GemmParams& p, PixelBox box, int first, int count, const Ring<H>& ring) {
  int column = p.split.tile_across() * H::COLUMNS;
  bool geglu = p.epilogue.activation == GEGLU;
  int tap = divide(first, p.chunks), chunk = first - tap * p.chunks.divisor;
  Turn turn;
  for (int stage = 0; stage < count; stage++, turn.next(ring.slots)) {
    uint32_t to = ring.stage(turn.slot), barrier = ring.full(turn.slot);
    barrier_wait(ring.empty(turn.slot), turn.parity ^ 1);  // over from the beginning in the first round
    barrier_expect(barrier, H::STAGE_BYTES);
    int ky = divide(tap, p.kernel_row), kx = tap - ky * p.kernel_row.divisor, c = chunk * H::DEPTH;
    copy_box(to, p.left, c, box.x + p.right_by + p.direction * kx, box.y + p.down + p.direction * ky, box.b, barrier);
    if (H::RIGHT == Lines::KMajor) {
      copy_box(to + H::LEFT_BYTES, p.right, c, geglu ? 0 : column, geglu ? 0 : tap, geglu ? column / 16 : 0, barrier);
    } else {
#pragma unroll
      for (int i = 0; i < H::BOXES; i++) {
        copy_box(to + H::LEFT_BYTES + i * H::BOX_BYTES, p.right, column + i * LINE, c, tap, 0, barrier);
      }
    }
    if (++chunk == (int)p.chunks.divisor) chunk = 0, tap++;
  }
}

// acc = the sums of a warpgroup's 64 rows over the stages.
template <class H>
DEVICE void multiply_stages(float (&acc)[H::COLUMNS / 8][4], int count, const Ring<H>& ring) {
  // 16 reduced elements further: within the line, or sixteen lines on.
  constexpr int NEXT_RIGHT = H::RIGHT == Lines::KMajor ? 32 : 16 * LINE_BYTES;
  int group = threadIdx.x / WARPGROUP;
  bool signals = threadIdx.x % WARP_SIZE == 0;
  Turn turn;
  int before = 0;  // the slot of the stage before
  for (int stage = 0; stage < count; stage++) {
    uint32_t from = ring.stage(turn.slot);
    barrier_wait(ring.full(turn.slot), turn.parity);
    uint64_t left = descriptor(from + group * 64 * LINE_BYTES), right = descriptor(from + H::LEFT_BYTES, H::BOX_BYTES);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < H::DEPTH / STEP; k++) {
      wgmma<H::RIGHT>(typename H::Storage(), acc, advance(left, 32 * k), advance(right, NEXT_RIGHT * k), stage + k > 0);
    }
    wgmma_commit();
    wgmma_wait<1>();
    // The products of the stage before are done.
    if (signals && stage > 0) barrier_arrive(ring.empty(before));
    before = turn.slot;
    turn.next(ring.slots);
  }
  wgmma_wait<0>();
  fence_accumulators(acc);
}

template <class H>
DEVICE void sm90_gemm(const Sm90GemmParams& p) {
  typedef typename H::Storage T;
  DYNAMIC_BOXES(shared);
  Ring<H> ring = {shared_address(shared), p.slots};
  if (threadIdx.x == 0) ring.make_barriers();
  __syncthreads();
  PixelBox box(p);
  int first = p.split.begin() / H::DEPTH, count = min(p.split.depth / H::DEPTH, p.stages - first);
  if (threadIdx.x / WARP_SIZE == H::CONSUMERS) {
    if (threadIdx.x % WARP_SIZE == 0) fill_stages(p, box, first, count, ring);
    return;
  }
  float acc[1][H::COLUMNS / 8][4];
  multiply_stages(acc[0], count, ring);
  auto row = [&](int i) { return box.row(p, i); };
  int rows = p.batch * p.height * p.width, half = p.epilogue.activation == GEGLU ? p.epilogue.columns : 0;
  typedef TileShape<T, H::ROWS, H::COLUMNS, H::CONSUMERS, 1> B;
  end<B, true>(acc, p.epilogue, p.split, row, rows, p.split.tile_across() * H::COLUMNS, p.columns, half);
}

#define SM90_GEMM(NAME, RIGHT, COLUMNS)                                                                     \
  KERNEL(sm90_gemm_##NAME##_##COLUMNS##_f16, Sm90GemmParams, (Sm90Tiles<f16, COLUMNS, RIGHT>::THREADS)) {   \
    sm90_gemm<Sm90Tiles<f16, COLUMNS, RIGHT>>(p);                                                           \
  }                                                                                                         \
  KERNEL(sm90_gemm_##NAME##_##COLUMNS##_bf16, Sm90GemmParams, (Sm90Tiles<bf16, COLUMNS, RIGHT>::THREADS)) { \
    sm90_gemm<Sm90Tiles<bf16, COLUMNS, RIGHT>>(p);                                                          \
  }

// Kernels: sm90_gemm_r_128_f16 sm90_gemm_r_128_bf16 sm90_gemm_r_160_f16 sm90_gemm_r_160_bf16 sm90_gemm_a_128_f16
// Kernels: sm90_gemm_a_128_bf16 sm90_gemm_a_160_f16 sm90_gemm_a_160_bf16
SM90_GEMM(r, Lines::KMajor, 128)
SM90_GEMM(r, Lines::KMajor, 160)
SM90_GEMM(a, Lines::MNMajor, 128)
SM90_GEMM(a, Lines::MNMajor, 160)
