// The matrix product that gemm and convolution share: a block computes ROWS x COLUMNS outputs, reading both operands through a
// ring of stages in shared memory, and ends with bias, shift, activation and residual (epilogue.cuh), or where blockIdx.z counts
// parts of the reduced dimension with its part of the sums (finish.cu).
//
// A source of operands has `fetch(tile, k)`, which fills one stage with the elements from reduced index k on. A part adds its
// reduced elements in order, in steps of 16, and finish.cu adds the parts in order: an output's bits depend on its own row and
// column and on where the reduced dimension is split, not on the tile that it lies in.
#pragma once
#include "epilogue.cuh"
#include "tile.cuh"

// How many outputs a block computes and how its warps share them.
template <class T, int ROWS_, int COLUMNS_, int WARPS_DOWN_, int WARPS_ACROSS_>
struct Blocking {
  typedef T Storage;
  static constexpr int ROWS = ROWS_, COLUMNS = COLUMNS_;
  static constexpr int WARPS_DOWN = WARPS_DOWN_, WARPS_ACROSS = WARPS_ACROSS_;
  static constexpr int THREADS = WARPS_DOWN * WARPS_ACROSS * WARP_SIZE;
  // Fragments of a warp: 16 rows, 8 columns.
  static constexpr int HIGH = ROWS / WARPS_DOWN / 16, WIDE = COLUMNS / WARPS_ACROSS / 8;
  // Reduced elements of a stage: 64 bytes.
  static constexpr int DEPTH = 64 / sizeof(T);
};

constexpr int STAGES = 3;

// Bytes of one operand's stage: `extent` rows or columns.
template <class T, Lines LINES>
DEVICE constexpr int stage_bytes(int extent) {
  constexpr int DEPTH = 64 / sizeof(T);
  return LINES == Lines::Reduced ? extent * pitch<T>(DEPTH) : DEPTH * pitch<T>(extent);
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
    constexpr int DEPTH = 64 / sizeof(T);
    if (LINES == Lines::Reduced) {
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

// What a block of a product does with its sums: it stores outputs, or where the reduced dimension is split over blocks its part of
// them, for finish.cu. Matches `Split` in src/exec/cuda/epilogue.rs.
struct Split {
  float* partial;  // [splits, rows, columns], or null where there is one part; a GEGLU's columns are values, then gates
  int32_t depth;   // reduced elements of a part: whole stages
  int32_t unused;

  // This block's part.
  DEVICE int begin() const { return blockIdx.z * depth; }
  DEVICE int end(int of) const { return min(begin() + depth, of); }
};
static_assert(sizeof(Split) == 16, "as in epilogue.rs");

// acc = left right, over reduced elements `begin`, at the start of a stage, to `end`.
template <class B, Lines LEFT, Lines RIGHT, class Left, class Right>
DEVICE void product(float (&acc)[B::HIGH][B::WIDE][4], const Left& left, const Right& right, int end, int begin = 0) {
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
    Operand<T, LEFT, pitch<T>(LEFT == Lines::Reduced ? B::DEPTH : B::ROWS)> x = {tiles};
    Operand<T, RIGHT, pitch<T>(RIGHT == Lines::Reduced ? B::DEPTH : B::COLUMNS)> y = {tiles + LEFT_BYTES};
    warp_product<B::DEPTH / STEP>(acc, x, row, 0, y, column, 0);
  }
}

// Stores a warp's part of the block at `first_row`, `first_column`.
template <class B, bool ACTIVATES>
DEVICE void store(const float (&acc)[B::HIGH][B::WIDE][4], const Epilogue& e, int first_row, int rows, int first_column) {
  typedef typename B::Storage T;
  int warp = threadIdx.x / WARP_SIZE, g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
  int down = warp / B::WARPS_ACROSS * (B::HIGH * 16), across = warp % B::WARPS_ACROSS * (B::WIDE * 8);
  bool geglu = ACTIVATES && e.activation == GEGLU;
#pragma unroll
  for (int i = 0; i < 2 * B::HIGH; i++) {
    int row = first_row + down + i * 8 + g;
    if (row >= rows) continue;
    const T* shift = shift_of<T>(e, row);
#pragma unroll
    for (int j = 0; j < B::WIDE; j++) {
      if (geglu && j % 2) continue;
      int column = geglu ? (first_column + across + 8 * j) / 2 + t : first_column + across + 8 * j + t;
      // WIDE is even, so the gate's fragment is the next one.
      const float *sum = &acc[i / 2][j][i % 2 * 2], *gate = &acc[i / 2][j | 1][i % 2 * 2];
      store_outputs<ACTIVATES>(e, shift, row, column, {sum[0], sum[1]}, {gate[0], gate[1]});
    }
  }
}

// Stores the same sums as the block's part of [rows, columns]; `half` as in Matrix.
template <class B>
DEVICE void store_part(const float (&acc)[B::HIGH][B::WIDE][4], float* partial, int first_row, int rows, int first_column,
                       int columns, int half) {
  int warp = threadIdx.x / WARP_SIZE, g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
  int down = warp / B::WARPS_ACROSS * (B::HIGH * 16), across = warp % B::WARPS_ACROSS * (B::WIDE * 8);
#pragma unroll
  for (int i = 0; i < 2 * B::HIGH; i++) {
    int row = first_row + down + i * 8 + g;
    if (row >= rows) continue;
    float* to = partial + ((int64_t)blockIdx.z * rows + row) * columns;
#pragma unroll
    for (int j = 0; j < B::WIDE; j++) {
      int place = across + 8 * j + t, column = half ? paired_column(first_column, place, half) : first_column + place;
      int end = half && j % 2 == 0 ? half : columns;
      float x = acc[i / 2][j][i % 2 * 2], y = acc[i / 2][j][i % 2 * 2 + 1];
      if (columns % 2 == 0 && half % 2 == 0 && column < end) {
        *(Vector<float, 2>*)(to + column) = {{x, y}};
      } else {
        if (column < end) to[column] = x;
        if (column + 1 < end) to[column + 1] = y;
      }
    }
  }
}

// What a block at `row`, `column` of `rows` and `columns` ends with.
template <class B, bool ACTIVATES>
DEVICE void end(const float (&acc)[B::HIGH][B::WIDE][4], const Epilogue& e, const Split& split, int row, int rows, int column,
                int columns, int half) {
  if (split.partial) {
    store_part<B>(acc, split.partial, row, rows, column, columns, half);
  } else {
    store<B, ACTIVATES>(acc, e, row, rows, column);
  }
}
