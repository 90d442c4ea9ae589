// The matrix product that gemm and convolution share: a block computes ROWS x COLUMNS outputs, reading both operands through a
// ring of stages in shared memory, and ends with bias, shift, activation and residual (epilogue.cuh), or where blockIdx.z counts
// parts of the reduced dimension with its part of the sums (split_k_reduce.cu).
//
// A source of operands has `fetch(tile, k)`, which fills one stage with the elements from reduced index k on. A part adds its
// reduced elements in order, in steps of 16, and split_k_reduce.cu adds the parts in order: an output's bits depend on its
// own row and column and on where the reduced dimension is split, not on the tile that it lies in.
#pragma once
#include "epilogue.cuh"
#include "tile.cuh"

// Reduced elements of a stage.
template <class T>
constexpr int STAGE_DEPTH = STAGE_DEPTH_BYTES / sizeof(T);

// How many outputs a block computes and how its warps share them.
template <class T, int ROWS_, int COLUMNS_, int WARPS_DOWN_, int WARPS_ACROSS_>
struct TileShape {
  typedef T Storage;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int WARPS_DOWN = WARPS_DOWN_, WARPS_ACROSS = WARPS_ACROSS_;
  static constexpr int THREADS = WARPS_DOWN * WARPS_ACROSS * WARP_SIZE;
  // Fragments of a warp: 16 rows, 8 columns.
  static constexpr int HIGH = ROWS / WARPS_DOWN / 16, WIDE = COLUMNS / WARPS_ACROSS / 8;
  static constexpr int DEPTH = STAGE_DEPTH<T>;
};

// A tile of SIDE x SIDE outputs.
template <class T, int SIDE>
using SquareTile = TileShape<T, SIDE, SIDE, GEMM_TILES[row_of(GEMM_TILES, SIDE)][1], GEMM_TILES[row_of(GEMM_TILES, SIDE)][2]>;

// Bytes of one operand's stage: `extent` rows or columns.
template <class T, Lines LINES>
DEVICE constexpr int stage_bytes(int extent) {
  constexpr int DEPTH = STAGE_DEPTH<T>;
  return LINES == Lines::KMajor ? extent * pitch<T>(DEPTH) : DEPTH * pitch<T>(extent);
}

// A GEGLU has its columns in two halves, and a block needs both: its columns come in eights, in turn from the first and the
// second half, so that a thread holds both factors of an output. Column j of a block whose first is `first`:
DEVICE int paired_column(int first, int j, int half) { return j / 8 % 2 * half + first / 2 + j / 16 * 8 + j % 8; }

// A stage of a matrix of `extent` rows (or columns) of the output and `depth` reduced elements.
template <class T, Lines LINES, int EXTENT, int THREADS>
struct Matrix {
  const T* from;
  int first, extent, depth, stride, half;
  bool aligned;

  DEVICE int index(int i) const { return half ? paired_column(first, i, half) : first + i; }

  // How many rows (or columns) there are from i on, in its half.
  DEVICE int left_of(int i) const { return half ? half - (first / 2 + i / 16 * 8 + i % 8) : extent - first - i; }

  DEVICE void fetch(unsigned char* tile, int k) const {
    constexpr int DEPTH = STAGE_DEPTH<T>;
    if (LINES == Lines::KMajor) {
      fetch_tile<T, EXTENT, DEPTH, THREADS>(tile, aligned, [&](int line, int place, int& valid) {
        valid = left_of(line) > 0 ? depth - k - place : 0;
        return valid > 0 ? from + (int64_t)index(line) * stride + k + place : from;
      });
    } else {
      fetch_tile<T, DEPTH, EXTENT, THREADS>(tile, aligned, [&](int line, int place, int& valid) {
        valid = k + line < depth ? left_of(place) : 0;
        return valid > 0 ? from + (int64_t)(k + line) * stride + index(place) : from;
      });
    }
  }
};

// How a product is split over blocks: tiles of outputs along blockIdx.x, those of the same rows one after another, and along
// blockIdx.z parts of the reduced dimension. A block stores outputs, or where there are several parts its part of the sums, for
// split_k_reduce.cu. (Blocks along y could be 65535 at most, which rows pass.) Matches `Split` in src/exec/cuda/epilogue.rs.
struct Split {
  float* partial;  // [splits, rows, columns], or null where there is one part; a GEGLU's columns are values, then gates
  Divisor across;  // tiles of the same rows
  int32_t depth;   // reduced elements of a part: whole stages

  // This block's tile.
  DEVICE int tile_down() const { return divide(blockIdx.x, across); }
  DEVICE int tile_across() const { return blockIdx.x - tile_down() * across.divisor; }

  // This block's part.
  DEVICE int begin() const { return blockIdx.z * depth; }
  DEVICE int end(int of) const { return min(begin() + depth, of); }
};
static_assert(sizeof(Split) == 24, "as in epilogue.rs");

// acc = left right, over reduced elements `begin`, at the start of a stage, to `end`.
template <class B, Lines LEFT, Lines RIGHT, class Left, class Right>
DEVICE void gemm_mainloop(float (&acc)[B::HIGH][B::WIDE][4], const Left& left, const Right& right, int end, int begin = 0) {
  typedef typename B::Storage T;
  constexpr int LEFT_BYTES = stage_bytes<T, LEFT>(B::ROWS), RIGHT_BYTES = stage_bytes<T, RIGHT>(B::COLUMNS);
  DYNAMIC_SHARED(shared);
  int count = (end - begin + B::DEPTH - 1) / B::DEPTH, warp = threadIdx.x / WARP_SIZE;
  int row = warp / B::WARPS_ACROSS * (B::HIGH * 16), column = warp % B::WARPS_ACROSS * (B::WIDE * 8);
  auto fetch = [&](int stage) {
    if (stage < count) {
      unsigned char* tiles = shared + stage % STAGES * (LEFT_BYTES + RIGHT_BYTES);
      left.fetch(tiles, begin + stage * B::DEPTH);
      right.fetch(tiles + LEFT_BYTES, begin + stage * B::DEPTH);
    }
    cp_async_commit();
  };
  clear(acc);
  for (int stage = 0; stage < STAGES - 1; stage++) fetch(stage);
  for (int stage = 0; stage < count; stage++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this stage is here for all, and all are done with the one before it
    fetch(stage + STAGES - 1);
    unsigned char* tiles = shared + stage % STAGES * (LEFT_BYTES + RIGHT_BYTES);
    Operand<T, LEFT, pitch<T>(LEFT == Lines::KMajor ? B::DEPTH : B::ROWS)> x = {tiles};
    Operand<T, RIGHT, pitch<T>(RIGHT == Lines::KMajor ? B::DEPTH : B::COLUMNS)> y = {tiles + LEFT_BYTES};
    warp_mma<B::DEPTH / STEP>(acc, x, row, 0, y, column, 0);
  }
}

// Four neighbours of two eights of columns of a row, `a` of even lanes' and `b` of odd lanes': neighbours swap what they lack, so
// that a row's sixteen columns are stored at once, 32 bytes of 16-bit types.
DEVICE void swap_halves(float (&four)[4], const float* a, const float* b) {
  bool odd = threadIdx.x % 2;
  float x = __shfl_xor_sync(ALL_LANES, odd ? a[0] : b[0], 1), y = __shfl_xor_sync(ALL_LANES, odd ? a[1] : b[1], 1);
  four[0] = odd ? x : a[0], four[1] = odd ? y : a[1];
  four[2] = odd ? b[0] : x, four[3] = odd ? b[1] : y;
}

// Calls f(row, column, sums, gates) for each four of a thread's sums, places counted from the block's first. GATED: columns are
// those of a GEGLU's outputs, and eights of sums and gates come by turns.
template <class B, bool GATED, class F>
DEVICE void each_four(const float (&acc)[B::HIGH][B::WIDE][4], const F& f) {
  constexpr int NEXT = GATED ? 2 : 1;
  static_assert(B::WIDE % (2 * NEXT) == 0, "eights of outputs come in pairs");
  int warp = threadIdx.x / WARP_SIZE, g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4;
  int down = warp / B::WARPS_ACROSS * (B::HIGH * 16) + g, across = warp % B::WARPS_ACROSS * (B::WIDE * 8 / NEXT);
#pragma unroll
  for (int i = 0; i < 2 * B::HIGH; i++) {
#pragma unroll
    for (int j = 0; j < B::WIDE; j += 2 * NEXT) {
      const auto& row = acc[i / 2];
      constexpr int GATE = NEXT - 1;
      int h = i % 2 * 2;
      float sum[4], gate[4] = {};
      swap_halves(sum, &row[j][h], &row[j + NEXT][h]);
      if (GATED) swap_halves(gate, &row[j + GATE][h], &row[j + NEXT + GATE][h]);
      f(down + 8 * i, across + 8 * (j / NEXT + t % 2) + t / 2 * 4, sum, gate);
    }
  }
}

// Stores four neighbours of `to` from `column` on, of `end` columns; `whole` where it and all rows are multiples of four.
DEVICE void store_parts(float* to, int column, int end, bool whole, const float (&sum)[4]) {
  if (whole) {
    if (column < end) *(float4*)(to + column) = {sum[0], sum[1], sum[2], sum[3]};
  } else {
    for (int n = 0; n < 4 && column + n < end; n++) to[column + n] = sum[n];
  }
}

// What a block ends with whose first column is `first_column` of `columns`: outputs, or its part of the sums. row_of(i) is row i
// of the block among `rows`, or -1; `half` as in Matrix. Kernels of ops without an activation leave them out (not ACTIVATES).
template <class B, bool ACTIVATES, class Row>
DEVICE void end(const float (&acc)[B::HIGH][B::WIDE][4], const Epilogue& e, const Split& split, const Row& row_of, int rows,
                int first_column, int columns, int half) {
  typedef typename B::Storage T;
  auto outputs = [&](int first) {
    return [&, first](int i, int column, const float(&sum)[4], const float(&gate)[4]) {
      int row = row_of(i);
      if (row >= 0) store_outputs<ACTIVATES>(e, shift_of<T>(e, row), row, first + column, sum, gate);
    };
  };
  auto parts = [&](int first, int end) {
    return [&, first, end](int i, int column, const float(&sum)[4], const float(&gate)[4]) {
      int row = row_of(i);
      if (row < 0) return;
      float* to = split.partial + ((int64_t)blockIdx.z * rows + row) * columns;
      bool whole = columns % 4 == 0 && half % 4 == 0;
      store_parts(to, first + column, end, whole, sum);
      if (half) store_parts(to + half, first + column, end, whole, gate);
    };
  };
  bool gated = ACTIVATES && half > 0;
  if (gated && split.partial) {
    each_four<B, true>(acc, parts(first_column / 2, half));
  } else if (gated) {
    each_four<B, true>(acc, outputs(first_column / 2));
  } else if (split.partial) {
    each_four<B, false>(acc, parts(first_column, columns));
  } else {
    each_four<B, false>(acc, outputs(first_column));
  }
}

// Rows of a block from `first` on, for `end`.
struct RowsFrom {
  int first, rows;
  DEVICE int operator()(int i) const { return first + i < rows ? first + i : -1; }
};
