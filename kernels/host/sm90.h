// The primitives of sm90.cuh on the host: copies of boxes land, and products are made, as late as they may be.
//
// Not modelled: fence.proxy.async, which only code needs that writes shared memory by ordinary stores before a copy or a product
// reads it; and wgmma.fence. A warp's part of a product needs no other warp, so warps of a warpgroup may drift apart.
#pragma once
#include "ptx.h"

#define DYNAMIC_BOXES DYNAMIC_SHARED

template <int N>
static inline void setmaxnreg_dec() {}
template <int N>
static inline void setmaxnreg_inc() {}

// Matches `HostTensorMap` in src/exec/cuda/emulated.rs.
struct TensorMap {
  const uint8_t* from;
  uint64_t extents[4];
  uint64_t strides[3];  // bytes, of the second dimension on
  uint32_t box[4];
  uint32_t element;  // bytes
  uint32_t unused[11];
};
static_assert(sizeof(TensorMap) == 128, "as the driver's");

namespace emulated {

// 8 bytes of shared memory.
struct Barrier {
  uint16_t expected, pending : 15, phase : 1;
  int32_t bytes;
};

inline Barrier* barrier_at(uint32_t address) { return (Barrier*)shared_pointer(address, 8); }

// Ends the phase if nothing is missing, and wakes who waits for it.
inline void settle(uint32_t address) {
  Barrier* barrier = barrier_at(address);
  if (barrier->pending || barrier->bytes) return;
  barrier->phase ^= 1;
  barrier->pending = barrier->expected;
  for (uint32_t i = 0; i < block->count; i++) {
    Thread& thread = block->threads[i];
    if (thread.wait == Wait::Phase && thread.mask == address) enqueue(thread);
  }
}

// 16-byte chunks of a line are permuted by its place among eight.
inline uint32_t permuted(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

inline void land_box(uint32_t to, const TensorMap& map, const int (&at)[4], uint32_t barrier) {
  uint32_t place = to;
  for (uint32_t w = 0; w < map.box[3]; w++) {
    for (uint32_t z = 0; z < map.box[2]; z++) {
      for (uint32_t y = 0; y < map.box[1]; y++) {
        for (uint32_t x = 0; x < map.box[0]; x++, place += map.element) {
          int64_t index[4] = {at[0] + (int64_t)x, at[1] + (int64_t)y, at[2] + (int64_t)z, at[3] + (int64_t)w};
          bool inside = true;
          for (int i = 0; i < 4; i++) inside = inside && index[i] >= 0 && index[i] < (int64_t)map.extents[i];
          uint8_t* element = shared_pointer(permuted(place), map.element);
          if (!inside) {
            memset(element, 0, map.element);
            continue;
          }
          const uint8_t* from = map.from + index[0] * map.element;
          for (int i = 1; i < 4; i++) from += index[i] * (int64_t)map.strides[i - 1];
          memcpy(element, from, map.element);
        }
      }
    }
  }
  barrier_at(barrier)->bytes -= (int32_t)(place - to);
  settle(barrier);
}

template <class T, int COLUMNS, bool ACROSS>
inline void multiply(Product** lanes) {
  float a[16][16], b[16][COLUMNS];
  auto load = [](uint32_t address) {
    uint16_t bits;
    memcpy(&bits, shared_pointer(permuted(address), 2), 2);
    return low_half<T>(bits);
  };
  const Product& first = *lanes[0];
  auto begin = [](uint64_t descriptor) {
    if (descriptor >> 62 != 1) fail("wgmma: only the permutation of 128 bytes is emulated");
    return (uint32_t)(descriptor & 0x3fff) << 4;
  };
  auto eight_lines = [](uint64_t descriptor) { return (uint32_t)(descriptor >> 32 & 0x3fff) << 4; };
  auto next_box = [](uint64_t descriptor) { return (uint32_t)(descriptor >> 16 & 0x3fff) << 4; };
  for (uint32_t l = 0; l < WARP; l++) {
    const Product& lane = *lanes[l];
    if (lane.run != first.run || lane.b != first.b || lane.left != first.left || lane.add != first.add) {
      fail("wgmma: the lanes of a warp bring different operands");
    }
    for (uint32_t i = 0; lane.registers && i < 4; i++) {
      uint32_t row = l / 4 + i % 2 * 8, k = l % 4 * 2 + i / 2 * 8;
      a[row][k] = low_half<T>((uint16_t)lane.registers[i]), a[row][k + 1] = low_half<T>(lane.registers[i] >> 16);
    }
  }
  for (uint32_t row = 0; !first.registers && row < 16; row++) {
    uint32_t line = first.warp * 16 + row;
    uint32_t from = begin(first.left) + line / 8 * eight_lines(first.left) + line % 8 * 128;
    for (uint32_t k = 0; k < 16; k++) a[row][k] = load(from + 2 * k);
  }
  for (uint32_t n = 0; n < COLUMNS; n++) {
    for (uint32_t k = 0; k < 16; k++) {
      uint32_t place = ACROSS ? n / 64 * next_box(first.b) + n % 64 * 2 + k / 8 * eight_lines(first.b) + k % 8 * 128
                              : n / 8 * eight_lines(first.b) + n % 8 * 128 + k * 2;
      b[k][n] = load(begin(first.b) + place);
    }
  }
  for (uint32_t row = 0; row < 16; row++) {
    float sum[COLUMNS];
    auto element = [&](uint32_t n) -> float& {
      return lanes[row % 8 * 4 + n % 8 / 2]->d[n / 8 * 4 + row / 8 * 2 + n % 2];
    };
    for (uint32_t n = 0; n < COLUMNS; n++) sum[n] = first.add ? element(n) : 0.0f;
    for (uint32_t k = 0; k < 16; k++) {
      for (uint32_t n = 0; n < COLUMNS; n++) sum[n] += a[row][k] * b[k][n];
    }
    for (uint32_t n = 0; n < COLUMNS; n++) element(n) = sum[n];
  }
}

// The lanes of a warp meet and its products are made, in order, up to a group.
inline void multiply_until(uint32_t group, const char* where) {
  Thread* me = self;
  me->product_limit = group;
  meet(~0u, where, me, [](void** lanes, uint32_t present) {
    if (present != ~0u) fail("wgmma needs all 32 lanes");
    Thread* first = (Thread*)lanes[0];
    size_t count = 0;
    while (count < first->products.size() && first->products[count].group < first->product_limit) count++;
    for (size_t i = 0; i < count; i++) {
      Product* products[WARP];
      for (uint32_t l = 0; l < WARP; l++) {
        Thread* lane = (Thread*)lanes[l];
        if (i >= lane->products.size()) fail("wgmma: the lanes of a warp bring different products");
        products[l] = &lane->products[i];
      }
      products[0]->run(products);
    }
    for (uint32_t l = 0; l < WARP; l++) {
      auto& products = ((Thread*)lanes[l])->products;
      products.erase(products.begin(), products.begin() + std::min(count, products.size()));
    }
  });
}

template <class T, int EIGHTS, bool ACROSS>
inline void start_product(float (&d)[EIGHTS][4], const uint32_t* registers, uint64_t left, uint64_t b, bool add) {
  if (self->number / 128 * 128 + 128 > block->count) fail("wgmma outside a whole warpgroup");
  uint32_t warp = self->number % 128 / WARP;
  self->products.push_back({&d[0][0], registers, left, b, add, warp, self->product_group, multiply<T, 8 * EIGHTS, ACROSS>});
  if (block->settings.copies == Copies::Early) multiply_until(~0u, "wgmma");
}

}  // namespace emulated

static inline void barrier_init(uint32_t address, int count) {
  *emulated::barrier_at(address) = {(uint16_t)count, (uint16_t)count, 0, 0};
}

static inline void fence_barriers() {}

static inline void barrier_arrive(uint32_t address) {
  emulated::Barrier* barrier = emulated::barrier_at(address);
  if (!barrier->pending) emulated::fail("more arrivals at a barrier than its count");
  barrier->pending--;
  emulated::settle(address);
  // Who waited for this may be ahead of what the caller does next.
  if (emulated::block->settings.order == emulated::Order::Random) emulated::yield();
}

static inline void barrier_expect(uint32_t address, int bytes) {
  emulated::barrier_at(address)->bytes += bytes;
  barrier_arrive(address);
}

static inline void barrier_wait(uint32_t address, int parity) {
  while (emulated::barrier_at(address)->phase == (parity & 1)) {
    emulated::self->mask = address, emulated::self->where = "a barrier's phase";
    emulated::self->wait = emulated::Wait::Phase;
    emulated::wait_here();
  }
}

static inline void copy_box(uint32_t to, const TensorMap& map, int x, int y, int z, int w, uint32_t barrier) {
  using namespace emulated;
  if (to % 1024) fail("a permuted box begins at a multiple of 1024 bytes");
  if (map.box[0] * map.element != 128) fail("a line of a box has 128 bytes");
  auto land = [=] { land_box(to, map, {x, y, z, w}, barrier); };
  Copies when = block->settings.copies;
  if (when == Copies::Early || (when == Copies::Either && (draw() & 1))) {
    land();
  } else {
    block->engine.push_back({barrier, land});
  }
}

static inline void wgmma_fence() {}
static inline void wgmma_commit() { emulated::self->product_group++; }

template <int N>
static inline void wgmma_wait() {
  uint32_t group = emulated::self->product_group;
  emulated::multiply_until(group > N ? group - N : 0, "wgmma.wait_group");
}

template <int EIGHTS>
static inline void fence_accumulators(float (&)[EIGHTS][4]) {}

template <Lines RIGHT, class T, int EIGHTS>
static inline void wgmma(T, float (&d)[EIGHTS][4], uint64_t a, uint64_t b, bool add) {
  emulated::start_product<T, EIGHTS, RIGHT == Lines::MNMajor>(d, nullptr, a, b, add);
}

template <Lines RIGHT, class T, int EIGHTS>
static inline void wgmma(T, float (&d)[EIGHTS][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  emulated::start_product<T, EIGHTS, RIGHT == Lines::MNMajor>(d, a, 0, b, add);
}
