// What the forward and the backward of attention share: rows of one head, and tiles between registers and shared memory.
#pragma once
#include "tile.cuh"

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

// Columns of a matrix of rows [batch, rows, stride]: the element of the first row and head, elements from row to row, and
// whether every head's first element in a row lies at a multiple of 16 bytes. Matches `Columns` in src/exec/cuda/attention.rs.
struct Columns {
  const void* from;
  int32_t stride;
  int32_t aligned;
};

// The rows of one head of one sample: [count, width].
template <class T>
struct HeadRows {
  T* from;
  int stride, count, width;
  bool aligned;

  DEVICE HeadRows(const Columns& columns, int count, int width)
      : from((T*)columns.from + (int64_t)blockIdx.z * count * columns.stride + (int64_t)blockIdx.y * width),
        stride(columns.stride),
        count(count),
        width(width),
        aligned(columns.aligned != 0) {}

  // Fills a tile of LENGTH lines, beginning at `row`, with WIDTH elements each, beginning at `column`.
  template <int LENGTH, int WIDTH, int THREADS>
  DEVICE void fetch(unsigned char* tile, int row, int column) const {
    if (aligned) {
      fetch_tile<T, LENGTH, WIDTH, THREADS>(tile, true, [&](int line, int place, int& valid) {
        valid = row + line < count ? width - column - place : 0;
        return valid > 0 ? (const T*)from + (int64_t)(row + line) * stride + column + place : (const T*)from;
      });
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < LENGTH * WIDTH; i += THREADS) {
      int line = i / WIDTH, place = i % WIDTH;
      bool there = row + line < count && column + place < width;
      T x = there ? from[(int64_t)(row + line) * stride + column + place] : from_float<T>(0.0f);
      ((T*)(tile + line * pitch<T>(WIDTH)))[place] = x;
    }
  }

  // Stores what there is of such a tile. An aligned chunk is there as a whole or not at all.
  template <int LENGTH, int WIDTH, int THREADS>
  DEVICE void store(const unsigned char* tile, int row, int column) const {
    constexpr int CHUNKS = WIDTH / VECTOR<T>;
    for (int chunk = threadIdx.x; chunk < LENGTH * CHUNKS; chunk += THREADS) {
      int line = chunk / CHUNKS, place = chunk % CHUNKS * VECTOR<T>;
      if (row + line >= count) break;
      const T* values = (const T*)(tile + line * pitch<T>(WIDTH)) + place;
      T* to = from + (int64_t)(row + line) * stride + column + place;
      if (aligned) {
        if (column + place < width) *(uint4*)to = *(const uint4*)values;
      } else {
        for (int e = 0; e < min(VECTOR<T>, width - column - place); e++) to[e] = values[e];
      }
    }
  }
};

// Writes a warp's accumulators, times a factor, to a tile whose lines are PITCH bytes apart.
template <class T, int PITCH, int HIGH, int WIDE>
DEVICE void put(unsigned char* tile, const float (&acc)[HIGH][WIDE][4], int row, int column, float factor) {
  int g = threadIdx.x % WARP_SIZE / 4, t = threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2 * HIGH; i++) {
    T* line = (T*)(tile + (row + 8 * i + g) * PITCH) + column + t;
#pragma unroll
    for (int j = 0; j < WIDE; j++) {
      const float* pair = &acc[i / 2][j][i % 2 * 2];
      *(Vector<T, 2>*)(line + 8 * j) = {{from_float<T>(pair[0] * factor), from_float<T>(pair[1] * factor)}};
    }
  }
}

// Accumulators as fragments of a left operand of 16 rows: the tensor cores have both in the same lanes.
template <class T, int STEPS>
DEVICE void pack_left(uint32_t (&a)[STEPS][4], const float (&acc)[1][2 * STEPS][4]) {
#pragma unroll
  for (int i = 0; i < 4 * STEPS; i++) {
    const float* pair = &acc[0][i / 2][i % 2 * 2];
    a[i / 4][i % 4] = pack<T>(pair[0], pair[1]);
  }
}

// acc += a y with the left operand, 16 rows of STEPS steps, in registers.
template <int STEPS, class T, int WIDE, Lines LINES, int PITCH>
DEVICE void warp_mma(float (&acc)[1][WIDE][4], const uint32_t (&a)[STEPS][4], Operand<T, LINES, PITCH> y, int column,
                     int y_k) {
  static_assert(WIDE % 2 == 0, "fragments of the right operand come in pairs");
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
#pragma unroll
    for (int j = 0; j < WIDE; j += 2) {
      uint32_t b[4];
      right_fragments(b, y, column + 8 * j, y_k + step * STEP);
      mma_m16n8k16(T(), acc[0][j], a[step], b[0], b[1]);
      mma_m16n8k16(T(), acc[0][j + 1], a[step], b[2], b[3]);
    }
  }
}
