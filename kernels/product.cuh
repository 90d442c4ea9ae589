// The matrix product that gemm and convolution share: a block computes ROWS x COLUMNS outputs, reading both operands through a
// ring of stages in shared memory, and ends with bias, shift, activation and residual.
//
// A source of operands has `fetch(tile, k)`, which fills one stage with the elements from reduced index k on. Reduced elements
// are added in order and never split over blocks, so an output's bits depend on its own row and column only.
#pragma once
#include "activation.cuh"
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

// acc = left right, over `depth` reduced elements.
template <class B, Lines LEFT, Lines RIGHT, class Left, class Right>
DEVICE void product(float (&acc)[B::HIGH][B::WIDE][4], const Left& left, const Right& right, int depth) {
  typedef typename B::Storage T;
  constexpr int LEFT_BYTES = stage_bytes<T, LEFT>(B::ROWS), RIGHT_BYTES = stage_bytes<T, RIGHT>(B::COLUMNS);
  DYNAMIC_SHARED(shared);
  int count = (depth + B::DEPTH - 1) / B::DEPTH, warp = threadIdx.x / WARP_SIZE;
  int row = warp / B::WARPS_ACROSS * (B::HIGH * 16), column = warp % B::WARPS_ACROSS * (B::WIDE * 8);
  auto fetch = [&](int stage) {
    if (stage < count) {
      unsigned char* tiles = shared + stage % STAGES * (LEFT_BYTES + RIGHT_BYTES);
      left.fetch(tiles, stage * B::DEPTH);
      right.fetch(tiles + LEFT_BYTES, stage * B::DEPTH);
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

// What happens to a sum before it is stored: y = activation(sum + bias + shift) + residual. Absent operands are null.
// Matches `Epilogue` in src/exec/cuda/gemm.rs.
struct Epilogue {
  void* y;
  const void* bias;      // [columns], for GEGLU [2 columns]
  const void* shift;     // of each sample [columns]
  const void* residual;  // like y, and may be y
  Divisor sample;        // rows of one sample
  int32_t shift_stride;  // elements from one sample's shift to the next's, 0 where all share it
  int32_t columns;       // of y [rows, columns]
  int32_t activation;
  int32_t paired;        // y and residual can be accessed two elements at a time
  int32_t unused;
};
static_assert(sizeof(Epilogue) == 64, "as in gemm.rs");

// Stores a warp's part of the block at `first_row`, `first_column`. Kernels of ops without an activation leave them out (not
// ACTIVATES): they would be most of the code.
template <class B, bool ACTIVATES, class Row>
DEVICE void store(const float (&acc)[B::HIGH][B::WIDE][4], const Epilogue& e, const Row& row_of, int first_column) {
  typedef typename B::Storage T;
  int warp = threadIdx.x / WARP_SIZE, g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
  int down = warp / B::WARPS_ACROSS * (B::HIGH * 16), across = warp % B::WARPS_ACROSS * (B::WIDE * 8);
  const T *bias = (const T*)e.bias, *residual = (const T*)e.residual;
  bool geglu = ACTIVATES && e.activation == GEGLU;
#pragma unroll
  for (int i = 0; i < 2 * B::HIGH; i++) {
    int row = row_of(down + i * 8 + g);
    if (row < 0) continue;
    const T* shift = e.shift ? (const T*)e.shift + (int64_t)divide(row, e.sample) * e.shift_stride : nullptr;
#pragma unroll
    for (int j = 0; j < B::WIDE; j++) {
      if (geglu && j % 2) continue;
      int column = geglu ? (first_column + across + 8 * j) / 2 + t : first_column + across + 8 * j + t;
      int64_t at = (int64_t)row * e.columns + column;
      float y[2];
#pragma unroll
      for (int n = 0; n < 2; n++) {
        float sum = acc[i / 2][j][i % 2 * 2 + n];
        bool inside = column + n < e.columns;
        if (bias && inside) sum += to_float(bias[column + n]);
        if (shift && inside) sum += to_float(shift[column + n]);
        if (geglu) {
          // WIDE is even, so the gate's fragment is the next one.
          float gate = acc[i / 2][j | 1][i % 2 * 2 + n];
          if (bias && inside) gate += to_float(bias[e.columns + column + n]);
          y[n] = sum * gelu(gate);
        } else {
          y[n] = ACTIVATES ? activate(sum, e.activation) : sum;
        }
      }
      if (e.paired && column < e.columns) {
        if (residual) {
          Vector<T, 2> r = *(const Vector<T, 2>*)(residual + at);
          y[0] += to_float(r.at[0]), y[1] += to_float(r.at[1]);
        }
        *(Vector<T, 2>*)((T*)e.y + at) = {{from_float<T>(y[0]), from_float<T>(y[1])}};
      } else {
        for (int n = 0; n < 2 && column + n < e.columns; n++) {
          if (residual) y[n] += to_float(residual[at + n]);
          ((T*)e.y)[at + n] = from_float<T>(y[n]);
        }
      }
    }
  }
}
