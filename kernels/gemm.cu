// Matrix products: y = activation(x w + bias) + residual, and the gradients to x and to w, which are products too.
//
//   y [M, N] = sum over K of left (m, k) right (k, n); storage T, accumulated in f32, overwritten.
//   left    rr, ra: x or d_y [M, K], K contiguous            aa: x [K, M], M contiguous (the gradient to a weight)
//   right   rr: [N, K], K contiguous (weights as held, in a forward)     ra, aa: [K, N], N contiguous
//   GEGLU: right has 2 H columns, y has H: a * gelu(g) with a from the first and g from the second half.
//
// Blocks of 64x64 (4 warps of 32x32) or 128x128 (8 warps of 64x32), chosen by src/exec/cuda/tiles.rs, read stages of 64 bytes of
// K through a ring of three: 30 or 60 KiB of shared memory. Rows that are not multiples of 16 bytes are read element by element.
// Where the outputs' tiles are too few for the GPU, K is split into S parts over blockIdx.z: a block stores f32 sums to
// partial [S, M, N] (GEGLU: its 2 H columns in their order), and split_k_reduce.cu makes the outputs of them.
// Bytes: (M K + N K) per 64 (128) outputs read through L2, M N written; split, 4 S M N written and read again. FLOPs: 2 M N K.
// Limited by the tensor cores where M and N are in the hundreds, by the weights' bytes where M is small.
#include "gemm_mainloop.cuh"

// Matches `GemmParams` in src/exec/cuda/gemm.rs.
struct GemmParams {
  Epilogue epilogue;
  const void* left;
  const void* right;
  int32_t rows, columns, depth;  // columns of right: 2 H for GEGLU
  int32_t left_stride, right_stride;
  int32_t half;  // H for GEGLU, else 0
  int32_t left_aligned, right_aligned;
  Split split;
};
static_assert(sizeof(GemmParams) == 136, "as in gemm.rs");

template <class B, Lines LEFT, Lines RIGHT>
DEVICE void gemm(const GemmParams& p) {
  typedef typename B::Storage T;
  int row = p.split.tile_down() * B::ROWS, column = p.split.tile_across() * B::COLUMNS;
  Matrix<T, LEFT, B::ROWS, B::THREADS> left = {(const T*)p.left, row, p.rows, p.depth, p.left_stride, 0,
                                               p.left_aligned != 0};
  Matrix<T, RIGHT, B::COLUMNS, B::THREADS> right = {(const T*)p.right, column, p.columns, p.depth, p.right_stride, p.half,
                                                    p.right_aligned != 0};
  float acc[B::HIGH][B::WIDE][4];
  gemm_mainloop<B, LEFT, RIGHT>(acc, left, right, p.split.end(p.depth), p.split.begin());
  // The gradient to a weight has no activation.
  end<B, LEFT == Lines::KMajor>(acc, p.epilogue, p.split, RowsFrom{row, p.rows}, p.rows, column, p.columns, p.half);
}

#define GEMM(NAME, LEFT, RIGHT)                                                            \
  KERNEL_RESIDENT(gemm_##NAME##_64_f16, GemmParams, (SquareTile<f16, 64>::THREADS), 5) {   \
    gemm<SquareTile<f16, 64>, LEFT, RIGHT>(p);                                             \
  }                                                                                        \
  KERNEL_RESIDENT(gemm_##NAME##_64_bf16, GemmParams, (SquareTile<bf16, 64>::THREADS), 5) { \
    gemm<SquareTile<bf16, 64>, LEFT, RIGHT>(p);                                            \
  }                                                                                        \
  KERNEL_RESIDENT(gemm_##NAME##_64_f32, GemmParams, (SquareTile<float, 64>::THREADS), 5) { \
    gemm<SquareTile<float, 64>, LEFT, RIGHT>(p);                                           \
  }                                                                                        \
  KERNEL(gemm_##NAME##_128_f16, GemmParams, (SquareTile<f16, 128>::THREADS)) {             \
    gemm<SquareTile<f16, 128>, LEFT, RIGHT>(p);                                            \
  }                                                                                        \
  KERNEL(gemm_##NAME##_128_bf16, GemmParams, (SquareTile<bf16, 128>::THREADS)) {           \
    gemm<SquareTile<bf16, 128>, LEFT, RIGHT>(p);                                           \
  }

// Kernels: gemm_rr_64_f16 gemm_rr_64_bf16 gemm_rr_64_f32 gemm_rr_128_f16 gemm_rr_128_bf16 gemm_ra_64_f16 gemm_ra_64_bf16
// Kernels: gemm_ra_64_f32 gemm_ra_128_f16 gemm_ra_128_bf16 gemm_aa_64_f16 gemm_aa_64_bf16 gemm_aa_64_f32 gemm_aa_128_f16
// Kernels: gemm_aa_128_bf16
GEMM(rr, Lines::KMajor, Lines::KMajor)
GEMM(ra, Lines::KMajor, Lines::MNMajor)
GEMM(aa, Lines::MNMajor, Lines::MNMajor)
