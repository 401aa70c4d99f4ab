// The last pass of SpatialNorm's backward: df = rstd * (w Y h - s1 - n s2), with the sums of the group from the passes before.
//
// Per channel of an image there are five numbers: mean, and the slopes and offsets of v and of rstd (s1 + n s2) as functions of
// f - mean. In NHWC they reach the threads through shared memory (BlockChannels).
// Bytes in flight: a thread requests two accesses of f, dout, zq_y and zq_b before it uses the first. With two blocks of 256
// threads at 128 registers these are 32 KB of f and dout per multiprocessor, what an H100 needs (see spatial_norm_cells.cuh), and
// up to 32 KB of zq.
#pragma once

#include "device/dependent_launch.cuh"
#include "spatial_norm_backward.cuh"

namespace movq {
namespace spatial_norm {

// The modulation of a thread's pixels, from one access to the next. Divides once at the start, not for each access.
template <int VecSize, bool ChannelsLast>
struct ModulationWalk {
  const Geometry& geometry;
  const int64_t base;  // of the image, frame and channel in zq
  int pixel, row, column;
  const int step, step_rows, step_columns;

  MOVQ_DEVICE ModulationWalk(const Geometry& geometry, const ThreadTile<VecSize, ChannelsLast>& thread)
      : geometry(geometry),
        base(element_offset<ChannelsLast>(
            geometry, thread.image, thread.channel,
            source_frame(thread.frame, geometry.frame_axis) * geometry.zq_height * geometry.zq_width, geometry.zq_pixels)),
        pixel(thread.pixel),
        row(pixel / geometry.width),
        column(pixel - row * geometry.width),
        step(thread.pixel_step),
        step_rows(step / geometry.width),
        step_columns(step - step_rows * geometry.width) {}

  // Y = 1 and B = 0 without zq.
  template <class T>
  MOVQ_DEVICE void load(const BackwardArrays<T>& arrays, Vec<T, VecSize>& y, Vec<T, VecSize>& b) const {
    if (geometry.zq_pixels == 0) {
#pragma unroll
      for (int i = 0; i < VecSize; ++i) y[i] = from_float<T>(1), b[i] = from_float<T>(0);
      return;
    }
    const bool same_grid = geometry.height == 1 && geometry.zq_height == 1 && geometry.zq_width == geometry.width;
    if (same_grid) return load_vecs(arrays, pixel, y, b);
    const int source_row = nearest_index(row, geometry.rows) * geometry.zq_width;
    if constexpr (ChannelsLast) {
      load_vecs(arrays, source_row + nearest_index(column, geometry.columns), y, b);
    } else {
      int previous = -1;
#pragma unroll
      for (int i = 0; i < VecSize; ++i) {  // adjacent pixels usually have the same source: load it once
        const int source = source_row + nearest_index(column + i, geometry.columns);
        if (i > 0) y[i] = y[i - 1], b[i] = b[i - 1];
        if (source == previous) continue;
        y[i] = movq::load(arrays.zq_y + base + source);
        b[i] = movq::load(arrays.zq_b + base + source);
        previous = source;
      }
    }
  }

  MOVQ_DEVICE void advance() {
    pixel += step;
    row += step_rows;
    column += step_columns;
    if (column >= geometry.width) column -= geometry.width, ++row;
  }

 private:
  template <class T>
  MOVQ_DEVICE void load_vecs(const BackwardArrays<T>& arrays, int source, Vec<T, VecSize>& y, Vec<T, VecSize>& b) const {
    const int64_t at = base + int64_t(source) * (ChannelsLast ? geometry.channels : 1);
    y = load_vec<VecSize>(arrays.zq_y + at);
    b = load_vec<VecSize>(arrays.zq_b + at);
  }
};

// Computes df for the values of one access.
template <bool Silu, class T, int VecSize, int Channels>
MOVQ_DEVICE Vec<T, VecSize> input_gradient(const Vec<T, VecSize>& f, const Vec<T, VecSize>& dout, const Vec<float, VecSize>& y,
                                           const Vec<float, VecSize>& b, const Vec<float, Channels> (&terms)[kGradientTerms]) {
  const Vec<float, VecSize> f_values = to_float(f), dout_values = to_float(dout);
  Vec<float, VecSize> df;
#pragma unroll
  for (int i = 0; i < VecSize; ++i) {
    const int channel = Channels == 1 ? 0 : i;
    const float centred = f_values[i] - terms[kMean][channel];
    const Affine modulated = Affine{terms[kSlope][channel], terms[kOffset][channel]}.modulated(y[i], b[i]);
    const float h = activation_gradient<Silu>(dout_values[i], centred, modulated);
    df[i] = modulated.slope * h - (centred * terms[kGroupSlope][channel] + terms[kGroupOffset][channel]);
  }
  return from_float<T>(df);
}

template <class T, int VecSize, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, 2) write_input_gradient(Geometry geometry, Tiling tiling, BackwardArrays<T> arrays) {
  constexpr int kLoadsInFlight = 2;  // of f, dout and zq
  using Thread = ThreadTile<VecSize, ChannelsLast>;
  // Backwards over the blocks, to start with what the first pass left in L2.
  const Thread thread(geometry, tiling, gridDim.x - 1 - int64_t(blockIdx.x));
  wait_for_previous_kernel();
  auto load_terms = [&](int channel, float (&terms)[kGradientTerms]) {
    const int64_t group = group_index(geometry, thread.image, channel);
    const GradientSums sums = load_sums(arrays.group_sums, group);
    const float rstd = load(arrays.rstd + group);
    const Affine affine = load_affine(geometry, arrays, thread.image, channel);
    terms[kMean] = load(arrays.mean + group);
    terms[kSlope] = affine.slope;
    terms[kOffset] = affine.offset;
    terms[kGroupSlope] = rstd * rstd * sums.q;
    terms[kGroupOffset] = rstd * sums.p;
  };
  Vec<float, Thread::kChannels> terms[kGradientTerms];
  const BlockChannels<VecSize, kGradientTerms> block_terms(0);
  const int inner = threadIdx.x % tiling.threads_inner;
  if constexpr (ChannelsLast) {
    const int block_channel = thread.channel - inner * VecSize;
    block_terms.fill(min(tiling.threads_inner * VecSize, geometry.channels - block_channel),
                     [&](int channel, auto& values) { load_terms(block_channel + channel, values); });
  }
  if (thread.idle) return;
  if constexpr (!ChannelsLast) {
    float values[kGradientTerms];
    load_terms(thread.channel, values);
#pragma unroll
    for (int i = 0; i < kGradientTerms; ++i) terms[i][0] = values[i];
  }

  const int64_t base = element_offset<ChannelsLast>(geometry, thread.image, thread.channel,
                                                    thread.frame * geometry.height * geometry.width, geometry.pixels);
  const int64_t pixel_stride = ChannelsLast ? geometry.channels : 1;
  ModulationWalk<VecSize, ChannelsLast> walk(geometry, thread);
  for (int pixel = thread.pixel; pixel < thread.end_pixel; pixel += kLoadsInFlight * thread.pixel_step) {
    Vec<T, VecSize> f[kLoadsInFlight], dout[kLoadsInFlight], zq_y[kLoadsInFlight], zq_b[kLoadsInFlight];
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      const int here = pixel + ahead * thread.pixel_step;
      if (here < thread.end_pixel) {
        const int64_t at = base + here * pixel_stride;
        f[ahead] = load_vec<VecSize, Cache::kStream>(arrays.f + at);
        dout[ahead] = load_vec<VecSize, Cache::kStream>(arrays.dout + at);
        walk.load(arrays, zq_y[ahead], zq_b[ahead]);
      }
      walk.advance();
    }
#pragma unroll
    for (int ahead = 0; ahead < kLoadsInFlight; ++ahead) {
      const int here = pixel + ahead * thread.pixel_step;
      if (here >= thread.end_pixel) break;
      if constexpr (ChannelsLast) {  // for every access: there are no registers for them
        asm volatile("" ::: "memory");
#pragma unroll
        for (int i = 0; i < kGradientTerms; ++i) terms[i] = block_terms.load_vec(i, inner);
      }
      const Vec<float, VecSize> y = to_float(zq_y[ahead]), b = to_float(zq_b[ahead]);
      with_silu(geometry.silu, [&](auto silu) {
        store_vec(arrays.df + base + here * pixel_stride, input_gradient<silu>(f[ahead], dout[ahead], y, b, terms));
      });
    }
  }
}

template <class T, int VecSize, bool ChannelsLast>
void launch_input_gradient(const Geometry& geometry, const Tiling& tiling, const BackwardArrays<T>& arrays, cudaStream_t stream) {
  const char* name = "spatial_norm write_input_gradient";
  const LaunchConfig config = {grid_size(name, geometry.batch * tiling.channel_tiles * tiling.pixel_chunks),
                               unsigned(tiling.threads()),
                               ChannelsLast ? BlockChannels<VecSize, kGradientTerms>::kSharedBytes : 0};
  launch_dependent(write_input_gradient<T, VecSize, ChannelsLast>, name, config, stream, geometry, tiling, arrays);
}

}  // namespace spatial_norm
}  // namespace movq
