// architectures: 90a
// The primitives of sm90.cuh alone, as conformance.cu has those of ptx.cuh: operands from memory, results to memory.
//
// One block of a warpgroup; a, b, c are operands, ma and mb tensor maps of a and b, `out` is 32-bit words:
//
//   sm90_boxes                   ma: any box; c: where it begins (4 i32), count: its words -> shared memory as it lies there
//   sm90_wgmma_boxes_r_N_T, …_a_N_T
//                                a: [64, 64] as boxes, b: [N, 64] (r) or [64, N] (a) as boxes, c: f32 [128][N / 2], registers
//                                as wgmma.m64nNk16 has them -> c + a b over four steps of 16, the same registers
//   sm90_wgmma_registers_…       the same with a: u32 [4][128][4], the left operand's registers at each step
#include "sm90.cuh"

// Matches `Sm90ConformanceParams` in tools/gpu/conformance.rs.
struct Sm90ConformanceParams {
  TensorMap ma, mb;
  const void* a;
  const void* b;
  const void* c;
  void* out;
  int64_t count;
  int64_t unused[11];
};
static_assert(sizeof(Sm90ConformanceParams) == 384, "as in conformance.rs");

// Brings boxes in and waits for them: `start(barrier)` starts copies of so many bytes.
template <class Start>
DEVICE void bring_boxes(int bytes, const Start& start) {
  SHARED_ARRAY(uint64_t, barrier, 1);
  uint32_t address = shared_address(barrier);
  if (threadIdx.x == 0) {
    barrier_init(address, 1);
    fence_barriers();
    barrier_expect(address, bytes);
    start(address);
  }
  __syncthreads();
  barrier_wait(address, 0);
}

DEVICE void copy_boxes(const Sm90ConformanceParams& p) {
  DYNAMIC_BOXES(shared);
  const int32_t* at = (const int32_t*)p.c;
  bring_boxes((int)p.count * 4, [&](uint32_t barrier) {
    copy_box(shared_address(shared), p.ma, at[0], at[1], at[2], at[3], barrier);
  });
  for (int64_t i = threadIdx.x; i < p.count; i += WARPGROUP) ((uint32_t*)p.out)[i] = ((const uint32_t*)shared)[i];
}

KERNEL(conformance_sm90_boxes, Sm90ConformanceParams, WARPGROUP) { copy_boxes(p); }

template <class T, int COLUMNS, Lines RIGHT, bool REGISTERS>
DEVICE void multiply_boxes(const Sm90ConformanceParams& p) {
  constexpr int EIGHTS = COLUMNS / 8, STEPS = LINE / STEP, LEFT_BYTES = 64 * LINE_BYTES;
  constexpr bool ACROSS = RIGHT == Lines::MNMajor;
  constexpr int BOXES = ACROSS ? (COLUMNS + LINE - 1) / LINE : 1, BOX_BYTES = (ACROSS ? LINE : COLUMNS) * LINE_BYTES;
  DYNAMIC_BOXES(shared);
  uint32_t left = shared_address(shared), right = left + LEFT_BYTES;
  bring_boxes((REGISTERS ? 0 : LEFT_BYTES) + BOXES * BOX_BYTES, [&](uint32_t barrier) {
    if (!REGISTERS) copy_box(left, p.ma, 0, 0, 0, 0, barrier);
    for (int i = 0; i < BOXES; i++) copy_box(right + i * BOX_BYTES, p.mb, i * LINE, 0, 0, 0, barrier);
  });
  float d[EIGHTS][4];
  uint32_t a[STEPS][4];
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; i++) d[i / 4][i % 4] = ((const float*)p.c)[threadIdx.x * 4 * EIGHTS + i];
#pragma unroll
  for (int i = 0; i < 4 * STEPS; i++) {
    a[i / 4][i % 4] = REGISTERS ? ((const uint32_t*)p.a)[(i / 4 * WARPGROUP + threadIdx.x) * 4 + i % 4] : 0;
  }
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < STEPS; step++) {
    uint64_t b = advance(descriptor(right, BOX_BYTES), step * (ACROSS ? STEP * LINE_BYTES : 2 * STEP));
    if constexpr (REGISTERS) {
      wgmma<RIGHT>(T(), d, a[step], b, true);
    } else {
      wgmma<RIGHT>(T(), d, advance(descriptor(left), step * 2 * STEP), b, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  fence_accumulators(d);
#pragma unroll
  for (int i = 0; i < 4 * EIGHTS; i++) ((float*)p.out)[threadIdx.x * 4 * EIGHTS + i] = d[i / 4][i % 4];
}

#define WGMMA_TRIAL(NAME, COLUMNS, RIGHT, REGISTERS)                                           \
  KERNEL(conformance_sm90_wgmma_##NAME##_##COLUMNS##_f16, Sm90ConformanceParams, WARPGROUP) {  \
    multiply_boxes<f16, COLUMNS, RIGHT, REGISTERS>(p);                                         \
  }                                                                                            \
  KERNEL(conformance_sm90_wgmma_##NAME##_##COLUMNS##_bf16, Sm90ConformanceParams, WARPGROUP) { \
    multiply_boxes<bf16, COLUMNS, RIGHT, REGISTERS>(p);                                        \
  }

// Kernels: conformance_sm90_wgmma_boxes_r_64_f16 conformance_sm90_wgmma_boxes_r_64_bf16 conformance_sm90_wgmma_boxes_r_128_f16
// Kernels: conformance_sm90_wgmma_boxes_r_128_bf16 conformance_sm90_wgmma_boxes_r_160_f16
// Kernels: conformance_sm90_wgmma_boxes_r_160_bf16 conformance_sm90_wgmma_boxes_a_40_f16
// Kernels: conformance_sm90_wgmma_boxes_a_40_bf16 conformance_sm90_wgmma_boxes_a_80_f16 conformance_sm90_wgmma_boxes_a_80_bf16
// Kernels: conformance_sm90_wgmma_boxes_a_128_f16 conformance_sm90_wgmma_boxes_a_128_bf16
// Kernels: conformance_sm90_wgmma_boxes_a_160_f16 conformance_sm90_wgmma_boxes_a_160_bf16
// Kernels: conformance_sm90_wgmma_registers_a_40_f16 conformance_sm90_wgmma_registers_a_40_bf16
// Kernels: conformance_sm90_wgmma_registers_a_64_f16 conformance_sm90_wgmma_registers_a_64_bf16
// Kernels: conformance_sm90_wgmma_registers_a_80_f16 conformance_sm90_wgmma_registers_a_80_bf16
// Kernels: conformance_sm90_wgmma_registers_a_128_f16 conformance_sm90_wgmma_registers_a_128_bf16
// Kernels: conformance_sm90_wgmma_registers_a_160_f16 conformance_sm90_wgmma_registers_a_160_bf16
WGMMA_TRIAL(boxes_r, 64, Lines::KMajor, false)
WGMMA_TRIAL(boxes_r, 128, Lines::KMajor, false)
WGMMA_TRIAL(boxes_r, 160, Lines::KMajor, false)
WGMMA_TRIAL(boxes_a, 40, Lines::MNMajor, false)
WGMMA_TRIAL(boxes_a, 80, Lines::MNMajor, false)
WGMMA_TRIAL(boxes_a, 128, Lines::MNMajor, false)
WGMMA_TRIAL(boxes_a, 160, Lines::MNMajor, false)
WGMMA_TRIAL(registers_a, 40, Lines::MNMajor, true)
WGMMA_TRIAL(registers_a, 64, Lines::MNMajor, true)
WGMMA_TRIAL(registers_a, 80, Lines::MNMajor, true)
WGMMA_TRIAL(registers_a, 128, Lines::MNMajor, true)
WGMMA_TRIAL(registers_a, 160, Lines::MNMajor, true)
