// Doubling and resizing of images [B, H, W, C], and the transposed maps. Storage T, sums in f32. Cropping is a strided sum.
//
//   nearest_2x           y[b, i, j] = x[b, i / 2, j / 2]
//   nearest_2x_backward  d_x[b, i, j] = sum of the up to four pixels of d_y that it became
//   resize_tables        for every target pixel of a side the source pixels it reads and their weights, as
//                        torch.nn.functional.interpolate(align_corners=False) has them; computed in f64, rounded to f32
//                        once. Without antialias, pixels outside the image count to its border; with it they do not count.
//                        Transposed: targets are the pixels of x, sources those of y.
//   resize               y[b, i, j] = sum over the sources of i and j of their weights times x; forward, or with transposed
//                        tables
//
// A table has per target its first source and their number, then `most` weights. A thread takes one element of y and reads
// the few pixels it depends on, which its neighbours read too: limited by the first-level cache where the image shrinks a
// lot.
#include "vectorized.cuh"

// Matches `NearestParams` in src/exec/cuda/resample.rs.
struct NearestParams {
  const void* x;
  void* y;
  int64_t channels;
  Pieces pieces;          // a row is a pixel of y
  Divisor height, width;  // of y
  int32_t x_height, x_width;
  int32_t unused;
};
static_assert(sizeof(NearestParams) == 80, "as in resample.rs");

template <class T>
DEVICE void nearest_2x(const NearestParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t pixel, uint32_t channel, auto width) {
    uint32_t row = divide(pixel, p.width), j = pixel - row * p.width.divisor;
    uint32_t image = divide(row, p.height), i = row - image * p.height.divisor;
    int64_t from = ((int64_t)image * p.x_height + i / 2) * p.x_width + j / 2;
    float x[width.value];
    load_piece(x, (const T*)p.x + from * p.channels + channel);
    store_piece((T*)p.y + pixel * p.channels + channel, x);
  });
}

template <class T>
DEVICE void nearest_2x_backward(const NearestParams& p) {
  over_pieces<VECTOR<T>>(p.pieces, [&](uint32_t pixel, uint32_t channel, auto width) {
    uint32_t row = divide(pixel, p.width), j = 2 * (pixel - row * p.width.divisor);
    uint32_t image = divide(row, p.height), i = 2 * (row - image * p.height.divisor);
    const T* d_y = (const T*)p.x + (((int64_t)image * p.x_height + i) * p.x_width + j) * p.channels + channel;
    float sum[width.value] = {};
#pragma unroll
    for (int n = 0; n < 4; n++) {
      if (i + n / 2 >= (uint32_t)p.x_height || j + n % 2 >= (uint32_t)p.x_width) continue;
      float next[width.value];
      load_piece(next, d_y + (n / 2 * (int64_t)p.x_width + n % 2) * p.channels);
#pragma unroll
      for (int e = 0; e < width.value; e++) sum[e] += next[e];
    }
    store_piece((T*)p.y + pixel * p.channels + channel, sum);
  });
}

// Kernels: nearest_2x_f16 nearest_2x_bf16 nearest_2x_f32 nearest_2x_backward_f16 nearest_2x_backward_bf16
// Kernels: nearest_2x_backward_f32
FOR_EACH_TYPE(nearest_2x, NearestParams)
FOR_EACH_TYPE(nearest_2x_backward, NearestParams)

// One side of the images: the first source and the number of sources of every target, and the weights of each. Matches
// `Table` in src/exec/cuda/resample.rs.
struct ResizeTable {
  void* spans;    // [targets, 2] of i32
  void* weights;  // [targets, most] of f32
  int32_t most;
  int32_t targets;
  int32_t from, to;  // pixels before and after resizing forward
};

// Matches `TablesParams` in src/exec/cuda/resample.rs. Blocks: targets, sides.
struct TablesParams {
  ResizeTable sides[2];
  int32_t cubic, antialias, transposed;
  int32_t unused;
};
static_assert(sizeof(TablesParams) == 80, "as in resample.rs");

// The taps of a pixel after resizing: pixels first to end before it, some perhaps outside the image, and what their weights
// must be divided by.
struct ResizeTaps {
  double center, stretch, total;
  int first, end, from;
  bool cubic, antialias;

  DEVICE ResizeTaps(const TablesParams& p, const ResizeTable& side, int target)
      : from(side.from), cubic(p.cubic != 0), antialias(p.antialias != 0) {
    double ratio = (double)side.from / side.to;
    stretch = antialias && ratio > 1.0 ? ratio : 1.0;
    center = ratio * (target + 0.5);
    double reach = (cubic ? 2.0 : 1.0) * stretch;
    first = (int)floor(center - reach + 0.5), end = (int)floor(center + reach + 0.5);
    if (antialias) first = max(first, 0), end = min(end, from);
    total = 0.0;
    for (int tap = first; tap < end; tap++) total += weight(tap);
  }

  // The filter at a tap: a triangle, or cubic convolution (Keys 1981) with torch's constants.
  DEVICE double weight(int tap) const {
    double x = fabs((tap + 0.5 - center) / stretch), a = antialias ? -0.5 : -0.75;
    if (!cubic) return x < 1.0 ? 1.0 - x : 0.0;
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
    return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * a : 0.0;
  }

  // What a pixel before resizing counts, with the taps outside that count to it.
  DEVICE double of(int pixel) const {
    int low = pixel == 0 ? first : max(first, pixel), high = pixel == from - 1 ? end : min(end, pixel + 1);
    double sum = 0.0;
    for (int tap = low; tap < high; tap++) sum += weight(tap);
    return sum / total;
  }
};

KERNEL(resize_tables, TablesParams, TABLE_THREADS) {
  const ResizeTable& side = p.sides[blockIdx.y];
  int target = blockIdx.x * blockDim.x + threadIdx.x;
  if (target >= side.targets) return;
  float* weights = (float*)side.weights + (int64_t)target * side.most;
  int start = 0, count = 0;
  if (!p.transposed) {
    ResizeTaps taps(p, side, target);
    start = min(max(taps.first, 0), side.from - 1);
    count = min(max(taps.end - 1, 0), side.from - 1) + 1 - start;
    for (int n = 0; n < count; n++) weights[n] = (float)taps.of(start + n);
  } else {
    // Pixels after resizing whose centres are near enough, and a little further for rounding.
    double ratio = (double)side.from / side.to, reach = p.cubic ? 2.0 : 1.0;
    if (p.antialias && ratio > 1.0) reach *= ratio;
    int low = max((int)floor((target - 0.5 - reach) / ratio - 0.5), 0);
    int high = min((int)ceil((target + 1.5 + reach) / ratio + 0.5), side.to);
    int last = -1;
    for (int source = low; source < high; source++) {
      float weight = (float)ResizeTaps(p, side, source).of(target);
      if (last < 0 && weight == 0.0f) continue;
      if (last < 0) start = source;
      weights[source - start] = weight;
      if (weight != 0.0f) last = source;
    }
    count = last < 0 ? 0 : last + 1 - start;
  }
  int32_t* span = (int32_t*)side.spans + 2 * target;
  span[0] = start, span[1] = count;
}

// Matches `ResizeParams` in src/exec/cuda/resample.rs.
struct ResizeParams {
  const void* x;
  void* y;
  ResizeTable vertical, horizontal;
  Divisor channels, height, width;  // of y
  uint32_t count;                   // elements of y, below 2^31
  int32_t x_height, x_width;
};
static_assert(sizeof(ResizeParams) == 128, "as in resample.rs");

template <class T>
DEVICE void resize(const ResizeParams& p) {
  uint32_t element = blockIdx.x * blockDim.x + threadIdx.x;
  if (element >= p.count) return;
  uint32_t channels = p.channels.divisor, pixel = divide(element, p.channels), channel = element - pixel * channels;
  uint32_t row = divide(pixel, p.width), j = pixel - row * p.width.divisor;
  uint32_t image = divide(row, p.height), i = row - image * p.height.divisor;
  const int32_t *down = (const int32_t*)p.vertical.spans + 2 * i, *across = (const int32_t*)p.horizontal.spans + 2 * j;
  const float* down_weights = (const float*)p.vertical.weights + (int64_t)i * p.vertical.most;
  const float* across_weights = (const float*)p.horizontal.weights + (int64_t)j * p.horizontal.most;
  int rows = down[1], columns = across[1];
  const T* x = (const T*)p.x + (((int64_t)image * p.x_height + down[0]) * p.x_width + across[0]) * channels + channel;
  float sum = 0.0f;
  for (int r = 0; r < rows; r++, x += (int64_t)p.x_width * channels) {
    float line = 0.0f;
#pragma unroll 4
    for (int c = 0; c < columns; c++) line = fmaf(across_weights[c], to_float(x[(int64_t)c * channels]), line);
    sum = fmaf(down_weights[r], line, sum);
  }
  ((T*)p.y)[element] = from_float<T>(sum);
}

// Kernels: resize_f16 resize_bf16 resize_f32
FOR_EACH_TYPE(resize, ResizeParams)
