// Products of tiles on the tensor cores: how operands lie in shared memory, how a warp multiplies them, and the pipelined loop
// over the reduced dimension that gemm and convolution share.
//
// A tile is lines of elements, each line padded to an odd number of 16-byte chunks, so that the eight rows of a matrix that
// ldmatrix reads lie in different banks. A line runs along the reduced dimension (`Lines::KMajor`) or across it.
//
// Storage of 16 bits goes through mma.m16n8k16; f32 through fused multiply-adds with the same accumulator layout: with
// g = lane / 4 and t = lane % 4, acc[i][j][2h + e] is row 16i + 8h + g, column 8j + 2t + e of the warp's part.
#pragma once
#include "common.cuh"

// What the lines of a tile are.
enum class Lines {
  KMajor,  // rows of the operand as the product has it: each line holds one output row (or column), reduced elements in order
  MNMajor,   // each line holds one reduced element of many output rows (or columns)
};

// Bytes from one line of `elements` to the next.
template <class T>
DEVICE constexpr int pitch(int elements) {
  return (elements * (int)sizeof(T) / 16 | 1) * 16;
}

// Elements of the reduced dimension that one step of warp_mma takes.
constexpr int STEP = 16;

// One operand of warp_mma in shared memory.
template <class T, Lines LINES, int PITCH>
struct Operand {
  unsigned char* tile;

  // Element (i of the output dimension, k of the reduced one).
  DEVICE float at(int i, int k) const {
    int line = LINES == Lines::KMajor ? i : k, place = LINES == Lines::KMajor ? k : i;
    return to_float(*(const T*)(tile + line * PITCH + place * (int)sizeof(T)));
  }
};

// The 16x16 fragment of the left operand at row i, step k.
template <class T, Lines LINES, int PITCH>
DEVICE void left_fragment(uint32_t (&a)[4], Operand<T, LINES, PITCH> x, int i, int k) {
  int lane = threadIdx.x % WARP_SIZE;
  uint32_t base = shared_address(x.tile);
  if (LINES == Lines::KMajor) {
    ldmatrix_x4(a, base + (i + lane % 16) * PITCH + (k + lane / 16 * 8) * 2);
  } else {
    ldmatrix_x4_trans(a, base + (k + lane % 8 + lane / 16 * 8) * PITCH + (i + lane / 8 % 2 * 8) * 2);
  }
}

// Two neighbouring 16x8 fragments of the right operand at column i, step k: b[0], b[1] of the first and b[2], b[3] of the second.
template <class T, Lines LINES, int PITCH>
DEVICE void right_fragments(uint32_t (&b)[4], Operand<T, LINES, PITCH> x, int i, int k) {
  int lane = threadIdx.x % WARP_SIZE;
  uint32_t base = shared_address(x.tile);
  if (LINES == Lines::KMajor) {
    ldmatrix_x4(b, base + (i + lane % 8 + lane / 16 * 8) * PITCH + (k + lane / 8 % 2 * 8) * 2);
  } else {
    ldmatrix_x4_trans(b, base + (k + lane % 8 + lane / 8 % 2 * 8) * PITCH + (i + lane / 16 * 8) * 2);
  }
}

// acc += x y over `STEPS` steps: x from row `row`, y from column `column`, both from reduced element `k` on. COLUMNS is even.
template <int STEPS, class T, int ROWS, int COLUMNS, Lines LEFT, int LEFT_PITCH, Lines RIGHT, int RIGHT_PITCH>
DEVICE void warp_mma(float (&acc)[ROWS][COLUMNS][4], Operand<T, LEFT, LEFT_PITCH> x, int row, int x_k,
                     Operand<T, RIGHT, RIGHT_PITCH> y, int column, int y_k) {
  static_assert(COLUMNS % 2 == 0, "fragments of the right operand come in pairs");
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      uint32_t a[ROWS][4];
#pragma unroll
      for (int i = 0; i < ROWS; i++) left_fragment(a[i], x, row + 16 * i, x_k + step * STEP);
#pragma unroll
      for (int j = 0; j < COLUMNS; j += 2) {
        uint32_t b[4];
        right_fragments(b, y, column + 8 * j, y_k + step * STEP);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          mma_m16n8k16(T(), acc[i][j], a[i], b[0], b[1]);
          mma_m16n8k16(T(), acc[i][j + 1], a[i], b[2], b[3]);
        }
      }
    }
  } else {
    int g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
#pragma unroll 1
    for (int k = 0; k < STEPS * STEP; k++) {
      float a[ROWS][2];
#pragma unroll
      for (int i = 0; i < ROWS; i++) {
        a[i][0] = x.at(row + 16 * i + g, x_k + k);
        a[i][1] = x.at(row + 16 * i + 8 + g, x_k + k);
      }
#pragma unroll
      for (int j = 0; j < COLUMNS; j++) {
        float b0 = y.at(column + 8 * j + t, y_k + k), b1 = y.at(column + 8 * j + t + 1, y_k + k);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          acc[i][j][0] += a[i][0] * b0;
          acc[i][j][1] += a[i][0] * b1;
          acc[i][j][2] += a[i][1] * b0;
          acc[i][j][3] += a[i][1] * b1;
        }
      }
    }
  }
}

// Sets accumulators to zero.
template <int ROWS, int COLUMNS>
DEVICE void clear(float (&acc)[ROWS][COLUMNS][4]) {
#pragma unroll
  for (int i = 0; i < ROWS; i++) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
      for (int e = 0; e < 4; e++) acc[i][j][e] = 0.0f;
    }
  }
}

// Fills a tile of `LENGTH` lines of `WIDTH` elements from device memory, 16 bytes at a time. `source(line, place, valid)` gives
// the address of an element and how many from there on are there and lie one after another; what is not there is 0. Where
// `aligned`, the address of every chunk is a multiple of 16 and the copy is asynchronous; else elements go one by one,
// which is rare: unrolled further, it would cost registers and blocks of a multiprocessor. All threads of the block take part.
template <class T, int LENGTH, int WIDTH, int THREADS, class Source>
DEVICE void fetch_tile(unsigned char* tile, bool aligned, const Source& source) {
  constexpr int CHUNKS = WIDTH / VECTOR<T>;
#pragma unroll
  for (int first = 0; first < LENGTH * CHUNKS; first += THREADS) {
    int chunk = first + threadIdx.x, line = chunk / CHUNKS, place = chunk % CHUNKS * VECTOR<T>;
    if (LENGTH * CHUNKS % THREADS && chunk >= LENGTH * CHUNKS) break;
    unsigned char* to = tile + line * pitch<T>(WIDTH) + place * (int)sizeof(T);
    int valid = 0;
    if (aligned) {
      const T* from = source(line, place, valid);
      cp_async_16(shared_address(to), from, max(0, min(valid, VECTOR<T>)) * (int)sizeof(T));
    } else {
#pragma unroll 1
      for (int e = 0; e < VECTOR<T>; e++) {
        const T* from = source(line, place + e, valid);
        ((T*)to)[e] = valid > 0 ? *from : from_float<T>(0.0f);
      }
    }
  }
}
