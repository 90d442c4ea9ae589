// What Hopper (sm_90a) adds to ptx.cuh: boxes of tensors copied into shared memory by a copy engine (TMA), barriers that count
// arrivals and bytes (mbarrier), and products of a warpgroup, 128 threads, with operands in shared memory (wgmma). Beside
// ptx.cuh the only file with inline PTX. A host compiler gets the same functions from host/sm90.h.
//
// Boxes lie in shared memory as lines of 64 elements of 16 bits, 128 bytes, and the eight 16-byte chunks of line i are permuted
// by exclusive or with i % 8 (CU_TENSOR_MAP_SWIZZLE_128B): eight lines are one atom of 1024 bytes, to which boxes are aligned.
#pragma once
#include "tile.cuh"

// Elements of a line of a box.
constexpr int LINE = LINE_BYTES / 2;
constexpr int WARPGROUP = 128;

#ifdef __CUDACC__
// The shared memory whose size the launch gives, for boxes.
#define DYNAMIC_BOXES(NAME) extern __shared__ __align__(1024) unsigned char NAME[]

// Sets the registers of each thread of a warpgroup, a multiple of 8: fewer, or as many more as others have given up. Only in
// kernels that say how many blocks a multiprocessor runs.
template <int N>
DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// A tensor of up to four dimensions and the box of it that one copy takes, as cuTensorMapEncodeTiled writes it.
struct alignas(128) TensorMap {
  uint64_t words[16];
};

// Makes a barrier of `count` arrivals a phase; `address` is that of 8 bytes of shared memory. One thread does it, and after
// fence_barriers() and __syncthreads() all may use it. A new barrier is in phase 0.
DEVICE void barrier_init(uint32_t address, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(count) : "memory");
}

DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void barrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}

// Arrives, and makes the phase wait for so many bytes of copies.
DEVICE void barrier_expect(uint32_t address, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes) : "memory");
}

// Waits until a phase of this parity is over.
DEVICE void barrier_wait(uint32_t address, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred over;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@over bra done;\n"
      "bra again;\n"
      "done:\n"
      "}" ::"r"(address), "r"(parity)
      : "memory");
}

// Starts the copy of the box at (x, y, z, w), counted in elements from the first dimension on; what lies outside the tensor is
// 0. All bytes of the box count for the barrier.
DEVICE void copy_box(uint32_t to, const TensorMap& map, int x, int y, int z, int w, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
          to),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(w), "r"(barrier)
      : "memory");
}

// Before the first product of a warpgroup and whenever its registers were written otherwise.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a group of products.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until all but the newest N groups of products are done.
template <int N>
DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Keeps what is done with accumulators behind the wait before it: the compiler takes them for results of the instruction that
// started the product.
template <int EIGHTS>
DEVICE void fence_accumulators(float (&d)[EIGHTS][4]) {
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; i++) asm volatile("" : "+f"(d[i / 4][i % 4])::"memory");
}

// Operands of the instruction for 8 n columns: registers by number, and what they are bound to.
#define WGMMA_D5 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19"
#define WGMMA_D8 WGMMA_D5 ",%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_D10 WGMMA_D8 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define WGMMA_D16                                                                                                           \
  WGMMA_D10 ",%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_D20 WGMMA_D16 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define WGMMA_EIGHT(J) "+f"(d[J][0]), "+f"(d[J][1]), "+f"(d[J][2]), "+f"(d[J][3])
#define WGMMA_BIND5 WGMMA_EIGHT(0), WGMMA_EIGHT(1), WGMMA_EIGHT(2), WGMMA_EIGHT(3), WGMMA_EIGHT(4)
#define WGMMA_BIND8 WGMMA_BIND5, WGMMA_EIGHT(5), WGMMA_EIGHT(6), WGMMA_EIGHT(7)
#define WGMMA_BIND10 WGMMA_BIND8, WGMMA_EIGHT(8), WGMMA_EIGHT(9)
#define WGMMA_BIND16                                                                                                  \
  WGMMA_BIND10, WGMMA_EIGHT(10), WGMMA_EIGHT(11), WGMMA_EIGHT(12), WGMMA_EIGHT(13), WGMMA_EIGHT(14), WGMMA_EIGHT(15)
#define WGMMA_BIND20 WGMMA_BIND16, WGMMA_EIGHT(16), WGMMA_EIGHT(17), WGMMA_EIGHT(18), WGMMA_EIGHT(19)

// Overloads for one type and width. A, B, ... are the numbers of the operands behind the accumulators.
#define WGMMA(T, NAME, COLUMNS, EIGHTS, A, B, C, D, E, F)                                                   \
  template <Lines RIGHT>                                                                                    \
  DEVICE void wgmma(T, float (&d)[EIGHTS][4], uint64_t a, uint64_t b, bool add) {                           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #C ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" WGMMA_D##EIGHTS \
                 "}, %" #A ", %" #B ", add, 1, 1, 0, %" #D ";\n}"                                           \
                 : WGMMA_BIND##EIGHTS                                                                       \
                 : "l"(a), "l"(b), "r"((int)add), "n"(RIGHT == Lines::MNMajor ? 1 : 0));                    \
  }                                                                                                         \
  template <Lines RIGHT>                                                                                    \
  DEVICE void wgmma(T, float (&d)[EIGHTS][4], const uint32_t (&a)[4], uint64_t b, bool add) {               \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #F ", 0;\n"                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." NAME "." NAME " {" WGMMA_D##EIGHTS \
                 "}, {%" #A ", %" #B ", %" #C ", %" #D "}, %" #E ", add, 1, 1, %" WGMMA_NEXT_##F ";\n}"     \
                 : WGMMA_BIND##EIGHTS                                                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add),                       \
                   "n"(RIGHT == Lines::MNMajor ? 1 : 0));                                                   \
  }

#define WGMMA_NEXT_25 "26"
#define WGMMA_NEXT_37 "38"
#define WGMMA_NEXT_45 "46"
#define WGMMA_NEXT_69 "70"
#define WGMMA_NEXT_85 "86"
#define WGMMA_TYPE(T, NAME)                          \
  WGMMA(T, NAME, 40, 5, 20, 21, 22, 23, 24, 25)      \
  WGMMA(T, NAME, 64, 8, 32, 33, 34, 35, 36, 37)      \
  WGMMA(T, NAME, 80, 10, 40, 41, 42, 43, 44, 45)     \
  WGMMA(T, NAME, 128, 16, 64, 65, 66, 67, 68, 69)    \
  WGMMA(T, NAME, 160, 20, 80, 81, 82, 83, 84, 85)

// d (+)= a b for 64 rows and 8 EIGHTS columns over 16 reduced elements; `add` false overwrites d. a: 16 rows of each warp as
// mma.m16n8k16 takes them, or a descriptor of 64 rows of boxes whose lines run along the reduced dimension; b: a descriptor of
// boxes whose lines run as RIGHT says. d is as mma.m16n8k16 gives it, d[j] columns 8 j to 8 j + 7 of the warp's 16 rows. Until
// it was waited for, neither d nor a of registers may be touched, nor the boxes overwritten.
WGMMA_TYPE(f16, "f16")
WGMMA_TYPE(bf16, "bf16")
#else
#include "host/sm90.h"
#endif

// What describes operands in boxes to wgmma (PTX ISA, "Matrix Descriptor Format"): where they begin, bytes from one box to the
// next where lines run across the reduced dimension, 1024 bytes from eight lines to the next eight, the permutation.
DEVICE uint64_t descriptor(uint32_t address, int box_bytes = 16) {
  return (uint64_t)(address >> 4 & 0x3fff) | (uint64_t)(box_bytes >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

// The descriptor `bytes` further on.
DEVICE uint64_t advance(uint64_t descriptor, int bytes) { return descriptor + (bytes >> 4); }
