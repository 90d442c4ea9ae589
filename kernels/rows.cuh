// How reductions read memory: a row by a team of threads that keeps it in registers, the columns of many rows by a block.
#pragma once
#include "common.cuh"

// The elements at `from`, of which `count` are there; what is not there is 0. Where `aligned`, a whole vector is there and
// lies at a multiple of 16 bytes.
template <class T>
DEVICE Vector<T, VECTOR<T>> read_vector(const T* from, int count, bool aligned) {
  if (aligned) return *(const Vector<T, VECTOR<T>>*)from;
  Vector<T, VECTOR<T>> values;
#pragma unroll
  for (int e = 0; e < VECTOR<T>; e++) values.at[e] = e < count ? from[e] : from_float<T>(0.0f);
  return values;
}

template <class T>
DEVICE void read_floats(float (&values)[VECTOR<T>], const T* from, int count, bool aligned) {
  Vector<T, VECTOR<T>> raw = read_vector(from, count, aligned);
#pragma unroll
  for (int e = 0; e < VECTOR<T>; e++) values[e] = to_float(raw.at[e]);
}

// Writes the first `count` of the values.
template <class T>
DEVICE void write_floats(T* to, const float (&values)[VECTOR<T>], int count, bool aligned) {
  Vector<T, VECTOR<T>> raw;
#pragma unroll
  for (int e = 0; e < VECTOR<T>; e++) raw.at[e] = from_float<T>(values[e]);
  if (aligned) {
    *(Vector<T, VECTOR<T>>*)to = raw;
    return;
  }
#pragma unroll
  for (int e = 0; e < VECTOR<T>; e++) {
    if (e < count) to[e] = raw.at[e];
  }
}

// Rows [rows, width] and the threads of one: a warp, where the row fits its registers, or the block. Matches `Rows` in
// src/exec/cuda/rowwise.rs.
struct Rows {
  int64_t count;
  int32_t width;
  int32_t team;
  int32_t aligned;  // every row of every operand begins at a multiple of 16 bytes and is whole vectors
  int32_t unused;
};
static_assert(sizeof(Rows) == 24, "as in rowwise.rs");

// The row of this thread's team. A team is whole warps, and of a block that is one team every row exists: leaving a kernel
// where there is no row passes no barrier by.
DEVICE int64_t team_row(const Rows& rows) {
  return (int64_t)blockIdx.x * (blockDim.x / rows.team) + threadIdx.x / rows.team;
}

DEVICE float team_sum(const Rows& rows, float x, float* scratch) {
  return rows.team == WARP_SIZE ? warp_sum(x) : block_sum(x, scratch);
}

DEVICE float team_max(const Rows& rows, float x, float* scratch) {
  return rows.team == WARP_SIZE ? warp_max(x) : block_max(x, scratch);
}

// A thread's part of one row of each operand: every team-th vector. The first ones stay in registers, what a longer row has
// beyond is read again, by the thread that will overwrite it.
template <class T, int OPERANDS>
struct Row {
  static constexpr int V = VECTOR<T>;
  const T* from[OPERANDS];
  int width, team, thread;
  bool aligned;
  Vector<T, V> held[HELD][OPERANDS];

  // Reads row `row` of the operands in `from`.
  DEVICE void load(const Rows& rows, int64_t row) {
    width = rows.width, team = rows.team, thread = threadIdx.x % rows.team, aligned = rows.aligned;
#pragma unroll
    for (int o = 0; o < OPERANDS; o++) from[o] += row * width;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      int column = (i * team + thread) * V;
      if (column < width) fetch(held[i], column);
    }
  }

  DEVICE void fetch(Vector<T, V> (&vectors)[OPERANDS], int column) const {
#pragma unroll
    for (int o = 0; o < OPERANDS; o++) vectors[o] = read_vector(from[o] + column, width - column, aligned);
  }

  template <class F>
  DEVICE void call(const Vector<T, V> (&vectors)[OPERANDS], int column, const F& f) const {
    float x[OPERANDS][V];
#pragma unroll
    for (int o = 0; o < OPERANDS; o++) {
#pragma unroll
      for (int e = 0; e < V; e++) x[o][e] = to_float(vectors[o].at[e]);
    }
    f(x, column, min(width - column, V));
  }

  // Calls f(x, column, count) for each vector of each operand, in order; elements from `count` on are 0.
  template <class F>
  DEVICE void visit(const F& f) const {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      int column = (i * team + thread) * V;
      if (column < width) call(held[i], column, f);
    }
    for (int column = (HELD * team + thread) * V; column < width; column += team * V) {
      Vector<T, V> vectors[OPERANDS];
      fetch(vectors, column);
      call(vectors, column, f);
    }
  }

  // Writes the row y, which may be one of the operands: f(out, x, column, count) gives a vector of it.
  template <class F>
  DEVICE void write(T* y, const F& f) const {
    visit([&](const float (&x)[OPERANDS][V], int column, int count) {
      float out[V];
      f(out, x, column, count);
      write_floats(y + column, out, count, aligned);
    });
  }
};

// Many rows [rows, columns] cut into blocks: `lanes` vectors across, `side` rows at a time, `length` rows of a chunk.
// Matches `ColumnSum` in src/exec/cuda/reduce.rs.
struct ColumnSum {
  int32_t rows, columns;
  int32_t lanes, side;
  int32_t length;
  int32_t aligned;
};
static_assert(sizeof(ColumnSum) == 24, "as in reduce.rs");

// Adds up the rows of scratch [rows, pitch] into the first, in a fixed order. All threads of the block take part.
DEVICE void sum_rows(float* scratch, int rows, int pitch) {
  __syncthreads();
  while (rows > 1) {
    int half = (rows + 1) / 2;
    for (int i = threadIdx.x; i < (rows - half) * pitch; i += blockDim.x) scratch[i] += scratch[half * pitch + i];
    __syncthreads();
    rows = half;
  }
}

// Writes a thread's sums of one vector to its place in scratch.
template <int N>
DEVICE void put_sums(float* scratch, const float (&sums)[N]) {
#pragma unroll
  for (int e = 0; e < N; e += 4) *(Vector<float, 4>*)(scratch + e) = {{sums[e], sums[e + 1], sums[e + 2], sums[e + 3]}};
}

// The mean that a sum of elements gave, and the mean of the deviations from it, which is that sum's error where the mean is
// far from 0. Near 0 it is only the rounding of the deviations.
DEVICE float corrected_mean(float mean, float shift, float variance) {
  return mean * mean > variance ? mean + shift : mean;
}
