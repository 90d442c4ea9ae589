// The primitives of ptx.cuh on the host, each with the lane layout that the PTX ISA gives it.
#pragma once
#include "warp.h"

static inline uint32_t shared_address(const void* pointer) {
  ptrdiff_t offset = (const uint8_t*)pointer - emulated::block->shared;
  if (offset < 0 || offset > (ptrdiff_t)emulated::block->shared_top) emulated::fail("not a pointer to shared memory");
  return (uint32_t)offset;
}

namespace emulated {

inline void land(const Copy& copy) {
  uint8_t line[16] = {};
  if (copy.bytes) memcpy(line, copy.from, copy.bytes);
  memcpy(shared_pointer(copy.to, 16), line, 16);
}

}  // namespace emulated

static inline void cp_async_16(uint32_t to, const void* from, uint32_t bytes) {
  using namespace emulated;
  if ((uintptr_t)from % 16) fail("cp.async from a misaligned address");
  if (bytes > 16) fail("cp.async of more than 16 bytes");
  shared_pointer(to, 16);
  Copy copy{to, from, bytes, self->group};
  Copies when = block->settings.copies;
  if (when == Copies::Early || (when == Copies::Either && (draw() & 1))) {
    land(copy);
  } else {
    self->copies.push_back(copy);
  }
}

static inline void cp_async_commit() { emulated::self->group++; }

template <int N>
static inline void cp_async_wait() {
  auto& copies = emulated::self->copies;
  size_t kept = 0;
  for (const emulated::Copy& copy : copies) {
    if (copy.group + N < emulated::self->group) {
      emulated::land(copy);
    } else {
      copies[kept++] = copy;
    }
  }
  copies.resize(kept);
}

namespace emulated {

struct Ldmatrix {
  uint16_t row[8];  // the row this lane's address names
  uint32_t* out;
};

// Matrix i has its rows at the addresses of lanes 8i to 8i + 7. Lane l gets elements (l / 4, 2 (l % 4)) and the one after it
// of each matrix, transposed if asked.
template <bool TRANSPOSED>
inline void ldmatrix(uint32_t (&out)[4], uint32_t address, const char* where) {
  Ldmatrix mine;
  memcpy(mine.row, shared_pointer(address, 16), 16);
  mine.out = out;
  meet(~0u, where, &mine, [](void** lanes, uint32_t present) {
    if (present != ~0u) fail("ldmatrix needs all 32 lanes");
    for (uint32_t l = 0; l < WARP; l++) {
      for (uint32_t i = 0; i < 4; i++) {
        uint32_t row = l / 4, column = l % 4 * 2;
        auto element = [&](uint32_t r, uint32_t c) -> uint32_t { return ((Ldmatrix*)lanes[8 * i + r])->row[c]; };
        uint32_t low = TRANSPOSED ? element(column, row) : element(row, column);
        uint32_t high = TRANSPOSED ? element(column + 1, row) : element(row, column + 1);
        ((Ldmatrix*)lanes[l])->out[i] = low | high << 16;
      }
    }
  });
}

struct Mma {
  const uint32_t* a;
  uint32_t b[2];
  float* d;
};

template <class T>
inline float low_half(uint32_t bits);
template <>
inline float low_half<__half>(uint32_t bits) {
  return __half2float({(uint16_t)bits});
}
template <>
inline float low_half<__nv_bfloat16>(uint32_t bits) {
  return __bfloat162float({(uint16_t)bits});
}

// d += a b, a 16x16 row by row, b 16x8 column by column, d 16x8 in f32. With g = lane / 4 and t = lane % 4:
// a[i] holds row g + 8 (i % 2), columns 2t + 8 (i / 2) and the next; b[i] column g, rows 2t + 8 i and the next;
// d[i] row g + 8 (i / 2), column 2t + i % 2.
template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const char* where) {
  Mma mine{a, {b0, b1}, d};
  meet(~0u, where, &mine, [](void** lanes, uint32_t present) {
    if (present != ~0u) fail("mma needs all 32 lanes");
    // Pairs along k as the lanes have them, and then all numbers at once: the compiler makes vectors of that.
    uint32_t a_pairs[16][8], b_pairs[8][8];
    float a[16][16], b[16][8], d[16][8];
    for (uint32_t l = 0; l < WARP; l++) {
      const Mma* lane = (const Mma*)lanes[l];
      uint32_t g = l / 4, t = l % 4;
      for (uint32_t i = 0; i < 4; i++) a_pairs[g + i % 2 * 8][t + i / 2 * 4] = lane->a[i];
      for (uint32_t i = 0; i < 2; i++) b_pairs[t + i * 4][g] = lane->b[i];
      for (uint32_t i = 0; i < 2; i++) memcpy(&d[g + i * 8][2 * t], lane->d + 2 * i, 2 * sizeof(float));
    }
    for (uint32_t row = 0; row < 16; row++) {
      for (uint32_t k = 0; k < 8; k++) a[row][2 * k] = low_half<T>(a_pairs[row][k]);
      for (uint32_t k = 0; k < 8; k++) a[row][2 * k + 1] = low_half<T>(a_pairs[row][k] >> 16);
    }
    for (uint32_t k = 0; k < 8; k++) {
      for (uint32_t column = 0; column < 8; column++) b[2 * k][column] = low_half<T>(b_pairs[k][column]);
      for (uint32_t column = 0; column < 8; column++) b[2 * k + 1][column] = low_half<T>(b_pairs[k][column] >> 16);
    }
    // Rows innermost: the sums of one row wait for each other, those of sixteen do not.
    for (uint32_t k = 0; k < 16; k++) {
      for (uint32_t row = 0; row < 16; row++) {
        for (uint32_t column = 0; column < 8; column++) d[row][column] += a[row][k] * b[k][column];
      }
    }
    for (uint32_t l = 0; l < WARP; l++) {
      uint32_t g = l / 4, t = l % 4;
      for (uint32_t i = 0; i < 2; i++) memcpy(((Mma*)lanes[l])->d + 2 * i, &d[g + i * 8][2 * t], 2 * sizeof(float));
    }
  });
}

}  // namespace emulated

static inline void ldmatrix_x4(uint32_t (&out)[4], uint32_t address) {
  emulated::ldmatrix<false>(out, address, "ldmatrix");
}

static inline void ldmatrix_x4_trans(uint32_t (&out)[4], uint32_t address) {
  emulated::ldmatrix<true>(out, address, "ldmatrix.trans");
}

static inline void mma_m16n8k16(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<__half>(d, a, b0, b1, "mma.f16");
}

static inline void mma_m16n8k16(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulated::mma<__nv_bfloat16>(d, a, b0, b1, "mma.bf16");
}

static inline float exp2_approx(float x) { return exp2f(x); }
