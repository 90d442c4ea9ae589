// Convolution and its gradient to the input, as products with an operand that is gathered while it is read (implicit gemm).
//
//   y [B, Ho, Wo, O] = conv(x [B, H, W, C], w) + bias [O] + shift [B or 1, O] + residual; storage T, accumulated in f32,
//   overwritten; y may be the residual. Row m of the product is an output pixel, column n a channel, k = (ky * kw + kx) * C + c.
//   x(m, k) = x[b, y stride + ky - top, x stride + kx - left, c], 0 outside the image.
//   w       r: [O, kh, kw, C] as weights are held     a: [kh, kw, C, O]
//
//   Backward: d_x [B, H, W, I] = sum over (ky, kx, o) of d_y[b, (y + top - ky) / stride, (x + left - kx) / stride, o] w, where
//   both divide; k = (ky * kw + kx) * O + o, n an input channel.
//   w       a: [O, kh, kw, I] as held                 r: [kh, kw, I, O]
//
// Blocks of 64x64 or 128x128, and parts of k over blockIdx.z, as in gemm.cu. Chunks of 16 bytes where the channels are a multiple
// of them, else element by element (the 3 or 4 channels of images and latents). Bytes: x is read kh kw times, from L2 but for the
// first; split, 4 S B Ho Wo O more are written and read again. FLOPs: 2 B Ho Wo O kh kw C. Limited by the tensor cores, at 8x8
// pixels by the weights' bytes.
#include "gemm_mainloop.cuh"

// Matches `ConvParams` in src/exec/cuda/conv2d.rs.
struct ConvParams {
  Epilogue epilogue;  // its `sample` divides by the output's pixels
  const void* x;      // what is gathered: x, or d_y
  const void* w;
  Divisor row;         // output pixels of a row
  Divisor channels;    // of x
  Divisor kernel_row;  // kw
  Divisor stride;
  int32_t rows, columns, depth;
  int32_t height, width;  // of x
  int32_t top, left;      // padding of the forward
  int32_t w_stride, tap_stride;
  int32_t x_aligned, w_aligned;
  int32_t unused;
  Split split;
};
static_assert(sizeof(ConvParams) == 200, "as in conv2d.rs");

// A stage of gathered pixels. Every thread fetches the same lines in every stage and keeps where they begin.
template <class B, bool BACKWARD>
struct Patches {
  typedef typename B::Storage T;
  static constexpr int CHUNKS = B::DEPTH / VECTOR<T>, LINES = B::ROWS * CHUNKS / B::THREADS;

  const ConvParams& p;
  const T* sample[LINES];  // null beyond the last row
  int y[LINES], x[LINES];

  DEVICE Patches(const ConvParams& params, int first) : p(params) {
#pragma unroll
    for (int i = 0; i < LINES; i++) {
      int m = first + (i * B::THREADS + threadIdx.x) / CHUNKS;
      int b = divide(m, p.epilogue.sample), pixel = m - b * p.epilogue.sample.divisor;
      int row = divide(pixel, p.row), column = pixel - row * p.row.divisor;
      sample[i] = m < p.rows ? (const T*)p.x + (int64_t)b * p.height * p.width * p.channels.divisor : nullptr;
      y[i] = BACKWARD ? row + p.top : row * (int)p.stride.divisor - p.top;
      x[i] = BACKWARD ? column + p.left : column * (int)p.stride.divisor - p.left;
    }
  }

  // Where a tap reads along one axis of `extent` pixels, or -1.
  DEVICE int place(int from, int tap, int extent) const {
    if (!BACKWARD) return (uint32_t)(from + tap) < (uint32_t)extent ? from + tap : -1;
    if (from < tap) return -1;
    int at = divide(from - tap, p.stride);
    return at * (int)p.stride.divisor == from - tap && at < extent ? at : -1;
  }

  // The element of line i at reduced index k, or null.
  DEVICE const T* element(int i, int k) const {
    int tap = divide(k, p.channels), c = k - tap * p.channels.divisor;
    int ky = divide(tap, p.kernel_row), kx = tap - ky * p.kernel_row.divisor;
    int at_y = place(y[i], ky, p.height), at_x = place(x[i], kx, p.width);
    if (!sample[i] || k >= p.depth || at_y < 0 || at_x < 0) return nullptr;
    return sample[i] + ((int64_t)at_y * p.width + at_x) * p.channels.divisor + c;
  }

  DEVICE void fetch(unsigned char* tile, int k) const {
    int at = k + threadIdx.x % CHUNKS * VECTOR<T>;
#pragma unroll
    for (int i = 0; i < LINES; i++) {
      int line = (i * B::THREADS + threadIdx.x) / CHUNKS;
      unsigned char* to = tile + line * pitch<T>(B::DEPTH) + threadIdx.x % CHUNKS * 16;
      if (p.x_aligned) {
        const T* from = element(i, at);
        cp_async_16(shared_address(to), from ? from : (const T*)p.x, from ? 16 : 0);
      } else {
#pragma unroll 1
        for (int e = 0; e < VECTOR<T>; e++) {
          const T* from = element(i, at + e);
          ((T*)to)[e] = from ? *from : from_float<T>(0.0f);
        }
      }
    }
  }
};

// A stage of the filter for the backward: element (k = (tap, o), n = i) is at tap * tap_stride + o * w_stride + i of what is
// held (MNMajor), at tap * tap_stride + i * w_stride + o of [kh, kw, I, O] (KMajor).
template <class B, Lines LINES>
struct Filter {
  typedef typename B::Storage T;
  const ConvParams& p;
  int first;

  DEVICE const T* at(int tap, int line, int place) const {
    return (const T*)p.w + (int64_t)tap * p.tap_stride + (int64_t)line * p.w_stride + place;
  }

  DEVICE void fetch(unsigned char* tile, int k) const {
    const T* none = (const T*)p.w;
    if (LINES == Lines::MNMajor) {
      fetch_tile<T, B::DEPTH, B::COLUMNS, B::THREADS>(tile, p.w_aligned, [&](int line, int place, int& valid) {
        int tap = divide(k + line, p.channels), o = k + line - tap * p.channels.divisor;
        valid = k + line < p.depth ? p.columns - first - place : 0;
        return valid > 0 ? at(tap, o, first + place) : none;
      });
    } else {
      fetch_tile<T, B::COLUMNS, B::DEPTH, B::THREADS>(tile, p.w_aligned, [&](int line, int place, int& valid) {
        int tap = divide(k + place, p.channels), o = k + place - tap * p.channels.divisor;
        valid = first + line < p.columns && k + place < p.depth ? (int)p.channels.divisor - o : 0;
        return valid > 0 ? at(tap, first + line, o) : none;
      });
    }
  }
};

template <class B, Lines RIGHT>
DEVICE void conv2d(const ConvParams& p) {
  typedef typename B::Storage T;
  int row = p.split.tile_down() * B::ROWS, column = p.split.tile_across() * B::COLUMNS;
  Patches<B, false> left(p, row);
  Matrix<T, RIGHT, B::COLUMNS, B::THREADS> right = {(const T*)p.w, column, p.columns, p.depth, p.w_stride, 0,
                                                    p.w_aligned != 0};
  float acc[B::HIGH][B::WIDE][4];
  gemm_mainloop<B, Lines::KMajor, RIGHT>(acc, left, right, p.split.end(p.depth), p.split.begin());
  end<B, false>(acc, p.epilogue, p.split, RowsFrom{row, p.rows}, p.rows, column, p.columns, 0);
}

template <class B, Lines RIGHT>
DEVICE void conv2d_backward(const ConvParams& p) {
  int row = p.split.tile_down() * B::ROWS, column = p.split.tile_across() * B::COLUMNS;
  Patches<B, true> left(p, row);
  Filter<B, RIGHT> right = {p, column};
  float acc[B::HIGH][B::WIDE][4];
  gemm_mainloop<B, Lines::KMajor, RIGHT>(acc, left, right, p.split.end(p.depth), p.split.begin());
  end<B, false>(acc, p.epilogue, p.split, RowsFrom{row, p.rows}, p.rows, column, p.columns, 0);
}

#define CONV(KERNEL_NAME, FUNCTION, RIGHT)                                                 \
  KERNEL(KERNEL_NAME##_64_f16, ConvParams, (SquareTile<f16, 64>::THREADS)) {               \
    FUNCTION<SquareTile<f16, 64>, RIGHT>(p);                                               \
  }                                                                                        \
  KERNEL(KERNEL_NAME##_64_bf16, ConvParams, (SquareTile<bf16, 64>::THREADS)) {             \
    FUNCTION<SquareTile<bf16, 64>, RIGHT>(p);                                              \
  }                                                                                        \
  KERNEL_RESIDENT(KERNEL_NAME##_64_f32, ConvParams, (SquareTile<float, 64>::THREADS), 5) { \
    FUNCTION<SquareTile<float, 64>, RIGHT>(p);                                             \
  }                                                                                        \
  KERNEL(KERNEL_NAME##_128_f16, ConvParams, (SquareTile<f16, 128>::THREADS)) {             \
    FUNCTION<SquareTile<f16, 128>, RIGHT>(p);                                              \
  }                                                                                        \
  KERNEL(KERNEL_NAME##_128_bf16, ConvParams, (SquareTile<bf16, 128>::THREADS)) {           \
    FUNCTION<SquareTile<bf16, 128>, RIGHT>(p);                                             \
  }

// Kernels: conv2d_r_64_f16 conv2d_r_64_bf16 conv2d_r_64_f32 conv2d_r_128_f16 conv2d_r_128_bf16 conv2d_a_64_f16
// Kernels: conv2d_a_64_bf16 conv2d_a_64_f32 conv2d_a_128_f16 conv2d_a_128_bf16 conv2d_backward_r_64_f16
// Kernels: conv2d_backward_r_64_bf16 conv2d_backward_r_64_f32 conv2d_backward_r_128_f16 conv2d_backward_r_128_bf16
// Kernels: conv2d_backward_a_64_f16 conv2d_backward_a_64_bf16 conv2d_backward_a_64_f32 conv2d_backward_a_128_f16
// Kernels: conv2d_backward_a_128_bf16
CONV(conv2d_r, conv2d, Lines::KMajor)
CONV(conv2d_a, conv2d, Lines::MNMajor)
CONV(conv2d_backward_r, conv2d_backward, Lines::KMajor)
CONV(conv2d_backward_a, conv2d_backward, Lines::MNMajor)
