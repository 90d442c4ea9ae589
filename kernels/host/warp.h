// Barriers, shuffles and votes of CUDA C++, as meetings of fibers.
#pragma once
#include "block.h"

static inline void __syncthreads() { emulated::barrier(); }

static inline void __syncwarp(uint32_t mask = ~0u) {
  emulated::meet(mask, "__syncwarp", nullptr, [](void**, uint32_t) {});
}

namespace emulated {

template <class V>
struct Shuffle {
  V in, out;
  uint32_t from;
};

// Every lane gets what lane `from` brought.
template <class V>
static inline V shuffle(uint32_t mask, V value, uint32_t from, const char* where) {
  Shuffle<V> mine{value, value, from};
  meet(mask, where, &mine, [](void** lanes, uint32_t present) {
    for (uint32_t rest = present; rest; rest &= rest - 1) {
      auto* lane = (Shuffle<V>*)lanes[__builtin_ctz(rest)];
      if (!lanes[lane->from]) fail("a shuffle from a lane that takes no part");
      lane->out = ((Shuffle<V>*)lanes[lane->from])->in;
    }
  });
  return mine.out;
}

}  // namespace emulated

template <class V>
static inline V __shfl_sync(uint32_t mask, V value, int from) {
  return emulated::shuffle(mask, value, from & 31, "__shfl_sync");
}

template <class V>
static inline V __shfl_xor_sync(uint32_t mask, V value, int flip) {
  return emulated::shuffle(mask, value, emulated::self->lane ^ flip, "__shfl_xor_sync");
}
