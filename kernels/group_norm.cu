// Group normalisation, SiLU if asked, and the gradient to x.
//
//   group_norm            y = f((x - mean) rstd gamma + beta), mean and rstd = 1 / sqrt(variance + eps) over the pixels and
//                         channels of a group, f = SiLU or nothing
//   group_norm_backward   with h = (x - mean) rstd, d_z = d_y f'(h gamma + beta), g = d_z gamma and means over the group:
//                         d_x = rstd (g - mean(g) - h mean(g h))
//
// x, y, d_y, d_x [B, pixels, channels] and gamma, beta [channels] of storage T; mean, rstd [B, groups] f32 are outputs of
// the forward and saved for the gradient; all arithmetic is in f32. Outputs are overwritten; y may be x, d_x may be d_y.
//
// A sample is cut into chunks of pixels and ranges of whole groups, 128 bytes of channels or a little more, one block each:
// the cut depends on the sample's shape only. The first launch writes two numbers per chunk and group to the workspace: the
// mean and the sum of squared deviations, or the two sums of the gradient. In the second every block adds up those of its
// range, in order, and applies them. A thread keeps to one vector of channels. Deviations are taken from the mean of what a
// block holds in registers and put together by Chan's formula, so a mean far from 0 costs no digits. A group wider than a
// block counts as several equal parts.
//
// Bytes: forward 2 reads (the second through L2 as far as it holds x) and 1 write, backward 4 reads and 1 write. FLOPs:
// some 10 per element, 20 with SiLU. Limited by memory.
#include "activation.cuh"
#include "rows.cuh"

// How a sample is cut. Matches `Cut` in src/exec/cuda/group_norm.rs.
struct GroupCut {
  int32_t pixels, channels;
  int32_t parts, split;  // parts of a sample, of a group
  int32_t range;         // parts of a block
  int32_t lanes, side;   // vectors across a range, pixels side by side
  int32_t length;        // pixels of a chunk
  Divisor size;          // channels of a part
  int32_t aligned;       // ranges begin at multiples of 16 bytes and are whole vectors
};
static_assert(sizeof(GroupCut) == 48, "as in group_norm.rs");

// Matches `GroupNormParams` in src/exec/cuda/group_norm.rs.
struct GroupNormParams {
  GroupCut cut;
  const void* x;
  const void* d_y;
  const void* gamma;
  const void* beta;
  void* y;     // backward: d_x
  void* mean;  // outputs of the forward
  void* rstd;
  void* partial;  // [B, chunks, parts, 2] f32
  float eps;
  int32_t silu;
};
static_assert(sizeof(GroupNormParams) == 120, "as in group_norm.rs");

constexpr int GROUP_WARPS = GROUP_THREADS / WARP_SIZE;

// The order in which blocks take chunks, ranges and samples: the second launch begins with what the first one read last, which an
// L2 that cannot hold all still has.
enum class Walk { Forward, Backward };

// What a thread has to do: block (chunk, range, index of the sample), a vector of channels, every side-th pixel from `pixel` on.
template <class T>
struct GroupPlace {
  static constexpr int V = VECTOR<T>;
  int chunk, index;
  int first_part, parts;  // of the block
  int column, channel;    // in the range, in the sample
  int count;              // channels of the vector, 0 for a thread without work
  int begin, end, pixel;
  int64_t sample;         // its first element
  int part[V];            // of each channel, in the block

  DEVICE GroupPlace(const GroupCut& cut, Walk walk) {
    bool back = walk == Walk::Backward;
    int lane = threadIdx.x % cut.lanes, row = threadIdx.x / cut.lanes, size = cut.size.divisor;
    int range = back ? gridDim.y - 1 - blockIdx.y : blockIdx.y;
    chunk = back ? gridDim.x - 1 - blockIdx.x : blockIdx.x, index = back ? gridDim.z - 1 - blockIdx.z : blockIdx.z;
    first_part = range * cut.range, parts = min(cut.range, cut.parts - first_part);
    column = lane * V, channel = first_part * size + column;
    count = row < cut.side ? max(0, min(parts * size - column, V)) : 0;
    begin = chunk * cut.length, end = min(begin + cut.length, cut.pixels), pixel = begin + row;
    sample = (int64_t)index * cut.pixels * cut.channels;
#pragma unroll
    for (int e = 0; e < V; e++) part[e] = min((int)divide(column + e, cut.size), parts - 1);
  }

  DEVICE int64_t at(const GroupCut& cut, int pixel) const { return sample + (int64_t)pixel * cut.channels + channel; }
};

// Where the statistics of the group of a sample's part lie.
DEVICE int64_t group_index(const GroupCut& cut, int index, int part) {
  return (int64_t)index * (cut.parts / cut.split) + part / cut.split;
}

// Of scratch [side, lanes V] the sum over a part's channels and all pixels, in every lane of the calling warp.
DEVICE float part_sum(const GroupCut& cut, const float* scratch, int pitch, int part) {
  int size = cut.size.divisor, lane = threadIdx.x % WARP_SIZE;
  float sum = 0.0f;
  for (int i = lane; i < cut.side * size; i += WARP_SIZE) {
    int row = divide(i, cut.size);
    sum += scratch[row * pitch + part * size + i - row * size];
  }
  return warp_sum(sum);
}

// 1 or 2, known at compile time.
template <int N>
struct Powers {
  static constexpr int value = N;
};

// Writes mean and squared deviations of each part of a chunk.
template <class T>
DEVICE void group_norm_statistics(const GroupNormParams& p) {
  // Vectors of a thread in registers.
  constexpr int V = VECTOR<T>, HELD = 4;
  const GroupCut& cut = p.cut;
  SHARED_ARRAY(float, plain, GROUP_THREADS * V);
  SHARED_ARRAY(float, squared, GROUP_THREADS * V);
  SHARED_ARRAY(float, mean, PARTS);     // of the pixels so far
  SHARED_ARRAY(float, squares, PARTS);  // of their deviations from it
  SHARED_ARRAY(float, near, PARTS);     // about the mean of those in registers
  GroupPlace<T> place(cut, Walk::Forward);
  int warp = threadIdx.x / WARP_SIZE, lane = threadIdx.x % WARP_SIZE, size = cut.size.divisor, pitch = cut.lanes * V;
  if ((int)threadIdx.x < place.parts) mean[threadIdx.x] = squares[threadIdx.x] = 0.0f;
  __syncthreads();
  for (int done = place.begin; done < place.end; done += HELD * cut.side) {
    int first = place.pixel + done - place.begin;
    Vector<T, V> held[HELD];
#pragma unroll
    for (int i = 0; i < HELD; i++) {
      int pixel = first + i * cut.side;
      if (place.count && pixel < place.end) {
        held[i] = read_vector((const T*)p.x + place.at(cut, pixel), place.count, cut.aligned);
      }
    }
    // Per channel and thread the sum, or the sums of deviations from the mean and of their squares.
    auto deviations = [&](auto powers) {
      float sums[2][V] = {}, origin[V];
#pragma unroll
      for (int e = 0; e < V; e++) origin[e] = powers.value == 2 ? near[place.part[e]] : 0.0f;
#pragma unroll
      for (int i = 0; i < HELD; i++) {
        if (place.count && first + i * cut.side < place.end) {
#pragma unroll
          for (int e = 0; e < V; e++) {
            float d = to_float(held[i].at[e]) - origin[e];
            sums[0][e] += d;
            if (powers.value == 2) sums[1][e] += d * d;
          }
        }
      }
      if ((int)threadIdx.x < cut.side * cut.lanes) {
        put_sums(plain + threadIdx.x * V, sums[0]);
        if (powers.value == 2) put_sums(squared + threadIdx.x * V, sums[1]);
      }
      __syncthreads();
    };
    float before = (float)(done - place.begin) * size, now = (float)min(HELD * cut.side, place.end - done) * size;
    deviations(Powers<1>());
    for (int part = warp; part < place.parts; part += GROUP_WARPS) {
      float sum = part_sum(cut, plain, pitch, part);
      if (lane == 0) near[part] = sum / now;
    }
    __syncthreads();
    deviations(Powers<2>());
    for (int part = warp; part < place.parts; part += GROUP_WARPS) {
      float shift = part_sum(cut, plain, pitch, part) / now, squares_here = part_sum(cut, squared, pitch, part);
      if (lane == 0) {
        float sum = fmaxf(squares_here - now * shift * shift, 0.0f), here = corrected_mean(near[part], shift, sum / now);
        float apart = here - mean[part], fraction = now / (before + now);
        mean[part] = before > 0.0f ? mean[part] + apart * fraction : here;
        squares[part] += sum + apart * apart * before * fraction;
      }
    }
    __syncthreads();
  }
  if ((int)threadIdx.x < place.parts) {
    int64_t chunk = (int64_t)place.index * gridDim.x + place.chunk;
    Vector<float, 2> result = {{mean[threadIdx.x], squares[threadIdx.x]}};
    ((Vector<float, 2>*)p.partial)[chunk * cut.parts + place.first_part + threadIdx.x] = result;
  }
}

// Calls f(partial, elements) for the partials of the whole group that `part` of a sample belongs to; a warp's lanes take chunks
// in turn.
template <class F>
DEVICE void for_each_partial(const GroupNormParams& p, int index, int part, const F& f) {
  const GroupCut& cut = p.cut;
  int chunks = gridDim.x, size = cut.size.divisor;
  int64_t sample = (int64_t)index * chunks;
  for (int chunk = threadIdx.x % WARP_SIZE; chunk < chunks; chunk += WARP_SIZE) {
    float elements = (float)min(cut.length, cut.pixels - chunk * cut.length) * size;
    const Vector<float, 2>* partial = (const Vector<float, 2>*)p.partial + (sample + chunk) * cut.parts;
    for (int i = 0; i < cut.split; i++) f(partial[part / cut.split * cut.split + i], elements);
  }
}

template <class T>
DEVICE void group_norm(const GroupNormParams& p) {
  constexpr int V = VECTOR<T>, AHEAD = 4;
  const GroupCut& cut = p.cut;
  SHARED_ARRAY(float, mean, PARTS);
  SHARED_ARRAY(float, rstd, PARTS);
  GroupPlace<T> place(cut, Walk::Backward);
  float elements = (float)cut.pixels * cut.size.divisor * cut.split;
  for (int i = threadIdx.x / WARP_SIZE; i < place.parts; i += GROUP_WARPS) {
    int part = place.first_part + i;
    int64_t sample = (int64_t)place.index * gridDim.x * cut.parts;
    float origin = ((const float*)p.partial)[2 * (sample + part / cut.split * cut.split)], sum = 0.0f, squares = 0.0f;
    for_each_partial(p, place.index, part, [&](const Vector<float, 2>& of, float count) { sum += count * (of.at[0] - origin); });
    float center = origin + warp_sum(sum) / elements;
    for_each_partial(p, place.index, part, [&](const Vector<float, 2>& of, float count) {
      squares += of.at[1] + count * (of.at[0] - center) * (of.at[0] - center);
    });
    float scale = 1.0f / sqrtf(warp_sum(squares) / elements + p.eps);
    if (threadIdx.x % WARP_SIZE == 0) {
      mean[i] = center, rstd[i] = scale;
      if (place.chunk == 0 && part % cut.split == 0) {
        int64_t group = group_index(cut, place.index, part);
        ((float*)p.mean)[group] = center, ((float*)p.rstd)[group] = scale;
      }
    }
  }
  __syncthreads();
  if (place.count == 0) return;
  float center[V], scale[V], shift[V];
  read_floats(scale, (const T*)p.gamma + place.channel, place.count, cut.aligned);
  read_floats(shift, (const T*)p.beta + place.channel, place.count, cut.aligned);
#pragma unroll
  for (int e = 0; e < V; e++) center[e] = mean[place.part[e]], scale[e] *= rstd[place.part[e]];
  for (int first = place.pixel; first < place.end; first += AHEAD * cut.side) {
    Vector<T, V> held[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int pixel = first + i * cut.side;
      if (pixel < place.end) held[i] = read_vector((const T*)p.x + place.at(cut, pixel), place.count, cut.aligned);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      int pixel = first + i * cut.side;
      if (pixel >= place.end) break;
      float y[V];
#pragma unroll
      for (int e = 0; e < V; e++) {
        float z = (to_float(held[i].at[e]) - center[e]) * scale[e] + shift[e];
        y[e] = p.silu ? z * sigmoid(z) : z;
      }
      write_floats((T*)p.y + place.at(cut, pixel), y, place.count, cut.aligned);
    }
  }
}

// What the gradient needs of a thread's channels.
template <class T>
struct GroupChannels {
  static constexpr int V = VECTOR<T>;
  float mean[V], rstd[V], gamma[V], beta[V];

  DEVICE GroupChannels(const GroupNormParams& p, const GroupPlace<T>& place) {
    read_floats(gamma, (const T*)p.gamma + place.channel, place.count, p.cut.aligned);
    read_floats(beta, (const T*)p.beta + place.channel, place.count, p.cut.aligned);
#pragma unroll
    for (int e = 0; e < V; e++) {
      int64_t group = group_index(p.cut, place.index, place.first_part + place.part[e]);
      mean[e] = ((const float*)p.mean)[group], rstd[e] = ((const float*)p.rstd)[group];
    }
  }

  // h, and the gradient to it, rounded the same in both kernels, so that a group of equal g has no gradient.
  DEVICE void element(float x, float d_y, int e, int silu, float& h, float& g) const {
    h = (x - mean[e]) * rstd[e];
    g = __fmul_rn(silu ? d_y * activate_derivative(h * gamma[e] + beta[e], SILU) : d_y, gamma[e]);
  }
};

// Writes the sums of g and of g h over each part of a chunk.
template <class T>
DEVICE void group_norm_backward_sums(const GroupNormParams& p) {
  constexpr int V = VECTOR<T>;
  const GroupCut& cut = p.cut;
  SHARED_ARRAY(float, scratch, GROUP_THREADS * V);
  GroupPlace<T> place(cut, Walk::Forward);
  float sums[2][V] = {};
  if (place.count) {
    GroupChannels<T> channels(p, place);
#pragma unroll 2
    for (int pixel = place.pixel; pixel < place.end; pixel += cut.side) {
      float x[V], d_y[V];
      read_floats(x, (const T*)p.x + place.at(cut, pixel), place.count, cut.aligned);
      read_floats(d_y, (const T*)p.d_y + place.at(cut, pixel), place.count, cut.aligned);
#pragma unroll
      for (int e = 0; e < V; e++) {
        float h, g;
        channels.element(x[e], d_y[e], e, p.silu, h, g);
        sums[0][e] += g;
        sums[1][e] += g * h;
      }
    }
  }
  int64_t chunk = (int64_t)place.index * gridDim.x + place.chunk;
  float* out = (float*)p.partial + 2 * (chunk * cut.parts + place.first_part);
#pragma unroll
  for (int which = 0; which < 2; which++) {
    if ((int)threadIdx.x < cut.side * cut.lanes) put_sums(scratch + threadIdx.x * V, sums[which]);
    __syncthreads();
    for (int part = threadIdx.x / WARP_SIZE; part < place.parts; part += GROUP_WARPS) {
      float sum = part_sum(cut, scratch, cut.lanes * V, part);
      if (threadIdx.x % WARP_SIZE == 0) out[2 * part + which] = sum;
    }
    __syncthreads();  // before the scratch is written again
  }
}

template <class T>
DEVICE void group_norm_backward(const GroupNormParams& p) {
  constexpr int V = VECTOR<T>;
  const GroupCut& cut = p.cut;
  SHARED_ARRAY(float, plain, PARTS);
  SHARED_ARRAY(float, along, PARTS);
  GroupPlace<T> place(cut, Walk::Backward);
  float elements = (float)cut.pixels * cut.size.divisor * cut.split;
  for (int part = threadIdx.x / WARP_SIZE; part < place.parts; part += GROUP_WARPS) {
    float sums[2] = {};
    for_each_partial(p, place.index, place.first_part + part, [&](const Vector<float, 2>& of, float) {
      sums[0] += of.at[0];
      sums[1] += of.at[1];
    });
    float mean_g = warp_sum(sums[0]) / elements, mean_gh = warp_sum(sums[1]) / elements;
    if (threadIdx.x % WARP_SIZE == 0) plain[part] = mean_g, along[part] = mean_gh;
  }
  __syncthreads();
  if (place.count == 0) return;
  GroupChannels<T> channels(p, place);
#pragma unroll 2
  for (int pixel = place.pixel; pixel < place.end; pixel += cut.side) {
    float x[V], d_y[V], d_x[V];
    read_floats(x, (const T*)p.x + place.at(cut, pixel), place.count, cut.aligned);
    read_floats(d_y, (const T*)p.d_y + place.at(cut, pixel), place.count, cut.aligned);
#pragma unroll
    for (int e = 0; e < V; e++) {
      float h, g;
      channels.element(x[e], d_y[e], e, p.silu, h, g);
      d_x[e] = channels.rstd[e] * (g - plain[place.part[e]] - h * along[place.part[e]]);
    }
    write_floats((T*)p.y + place.at(cut, pixel), d_x, place.count, cut.aligned);
  }
}

#define GROUP_NORM(NAME)                                                \
  KERNEL(NAME##_f16, GroupNormParams, GROUP_THREADS) { NAME<f16>(p); }   \
  KERNEL(NAME##_bf16, GroupNormParams, GROUP_THREADS) { NAME<bf16>(p); } \
  KERNEL(NAME##_f32, GroupNormParams, GROUP_THREADS) { NAME<float>(p); }

// Kernels: group_norm_statistics_f16 group_norm_statistics_bf16 group_norm_statistics_f32 group_norm_f16 group_norm_bf16
// Kernels: group_norm_f32 group_norm_backward_sums_f16 group_norm_backward_sums_bf16 group_norm_backward_sums_f32
// Kernels: group_norm_backward_f16 group_norm_backward_bf16 group_norm_backward_f32
GROUP_NORM(group_norm_statistics)
GROUP_NORM(group_norm)
GROUP_NORM(group_norm_backward_sums)
GROUP_NORM(group_norm_backward)
