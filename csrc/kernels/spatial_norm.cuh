// Shared by the forward and backward kernels of SpatialNorm: sizes, the nearest resize, and which elements a thread owns.
//
// In both layouts a thread keeps its channels and walks over pixels, so it reads per-channel values once. An access is VecSize
// adjacent elements (16 bytes, or one element where alignment or sizes rule that out): pixels of one channel in NCHW, channels of
// one pixel in NHWC (ChannelsLast).
#pragma once

#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/reduce.cuh"

namespace movq {
namespace spatial_norm {

constexpr int kThreads = 256;

// Maps positions of f along one axis to positions of zq: by torch's nearest rule, or by cells where zq is bordered.
struct Axis {
  int size, zq_size;
  float scale;    // zq_size / size
  int cell_size;  // positions of f per cell where zq is bordered, otherwise 0
};

// Maps the frames of f to those of zq. `apart` (0 or 1) leading frames map one to one; the others are resized along `others`.
struct FrameAxis {
  int apart;
  Axis others;
};

struct Geometry {
  int64_t batch;
  int channels, groups, group_channels;
  int frames, height, width, pixels;              // (1, 1, pixels, pixels) where rows do not matter: see has_rows()
  int zq_frames, zq_height, zq_width, zq_pixels;  // all but zq_frames are 0 without zq
  FrameAxis frame_axis;
  Axis rows, columns;
  bool silu;
  bool float_params;  // weight and bias are float32, otherwise of f's type
  bool float_f_bias;
};

// How a pass over f is cut into blocks, numbered by channel tile (fastest), pixel chunk of a frame, frame and image. A block has
// threads_inner x threads_outer threads, over channels x pixels in NHWC and pixels x channels in NCHW: neighbours read adjacent
// memory.
struct Tiling {
  int threads_inner, threads_outer;
  int channel_tiles, frame_chunks, pixel_chunks;  // pixel_chunks = frames * frame_chunks
  int chunk_pixels;
  MOVQ_HOST_DEVICE int threads() const { return round_up(threads_inner * threads_outer, kWarpSize); }
};

// The channels and pixels of one thread.
template <int VecSize, bool ChannelsLast>
struct ThreadTile {
  static constexpr int kChannels = ChannelsLast ? VecSize : 1;      // owned by the thread
  static constexpr int kAccessPixels = ChannelsLast ? 1 : VecSize;  // pixels of one access
  int64_t image;
  int channel;
  int frame;
  int pixel, end_pixel, pixel_step;  // in the frame
  bool idle;

  MOVQ_DEVICE ThreadTile(const Geometry& geometry, const Tiling& tiling, int64_t block) {
    const int inner = threadIdx.x % tiling.threads_inner, outer = threadIdx.x / tiling.threads_inner;
    const int tile = block % tiling.channel_tiles, image_chunk = block / tiling.channel_tiles % tiling.pixel_chunks;
    image = block / tiling.channel_tiles / tiling.pixel_chunks;
    frame = image_chunk / tiling.frame_chunks;
    const int chunk = image_chunk - frame * tiling.frame_chunks;
    const int tile_channels = ChannelsLast ? tiling.threads_inner : tiling.threads_outer;
    channel = (tile * tile_channels + (ChannelsLast ? inner : outer)) * kChannels;
    pixel = chunk * tiling.chunk_pixels + (ChannelsLast ? outer : inner) * kAccessPixels;
    end_pixel = int(min(int64_t(geometry.height) * geometry.width, (chunk + 1) * int64_t(tiling.chunk_pixels)));
    pixel_step = (ChannelsLast ? tiling.threads_outer : tiling.threads_inner) * kAccessPixels;
    idle = outer >= tiling.threads_outer || channel >= geometry.channels;
  }
};

// The offset of an element in a tensor of f's layout that has `pixels` pixels per image.
template <bool ChannelsLast>
MOVQ_DEVICE int64_t element_offset(const Geometry& geometry, int64_t image, int channel, int pixel, int pixels) {
  return ChannelsLast ? (image * pixels + pixel) * geometry.channels + channel
                      : (image * geometry.channels + channel) * pixels + pixel;
}

// Which of the three rows or columns of a cell of a bordered zq.
MOVQ_DEVICE int part_of_cell(int inside, int cell_size) { return inside == 0 ? 0 : inside == cell_size - 1 ? 2 : 1; }

// The position of zq that a position of f reads by torch's nearest rule, rounded as there.
MOVQ_DEVICE int nearest_index(int position, const Axis& axis) {
  return min(int(floorf(__fmul_rn(float(position), axis.scale))), axis.zq_size - 1);
}

// The position of zq that a position of f reads. It never decreases along the axis.
MOVQ_DEVICE int source_index(int position, const Axis& axis) {
  if (axis.cell_size == 0) return nearest_index(position, axis);
  const int cell = unsigned(position) / unsigned(axis.cell_size), inside = position - cell * axis.cell_size;
  return 3 * cell + part_of_cell(inside, axis.cell_size);
}

// The first position of f whose source is `source` or later. The positions that read `source` are [first_position(source),
// first_position(source + 1)). The range is empty where the resize of a larger zq skips `source`, and for the inner part of a
// cell of two.
MOVQ_DEVICE int first_position(int source, const Axis& axis) {
  if (source >= axis.zq_size) return axis.size;
  if (axis.zq_size == axis.size) return source;
  if (axis.cell_size != 0) {
    const int cell = unsigned(source) / 3u, part = source - 3 * cell;
    return cell * axis.cell_size + (part == 2 ? axis.cell_size - 1 : part);
  }
  int position = min(int(ceilf(__fdividef(float(source), axis.scale))), axis.size);  // up to rounding, which the loops fix
  while (position > 0 && source_index(position - 1, axis) >= source) --position;
  while (position < axis.size && source_index(position, axis) < source) ++position;
  return position;
}

// The frame of zq that a frame of f reads.
MOVQ_DEVICE int source_frame(int frame, const FrameAxis& axis) {
  return frame < axis.apart ? frame : axis.apart + nearest_index(frame - axis.apart, axis.others);
}

// The first frame of f whose source is `source` or later, see first_position().
MOVQ_DEVICE int first_frame(int source, const FrameAxis& axis) {
  return source < axis.apart ? source : axis.apart + first_position(source - axis.apart, axis.others);
}

template <class T>
MOVQ_DEVICE float load_parameter(const void* pointer, int channel, bool is_float, float default_value) {
  if (!pointer) return default_value;
  return is_float ? load(static_cast<const float*>(pointer) + channel) : to_float(load(static_cast<const T*>(pointer) + channel));
}

MOVQ_DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
MOVQ_DEVICE float silu(float x) { return x * sigmoid(x); }
MOVQ_DEVICE float silu_derivative(float x) {
  const float s = sigmoid(x);
  return s * (1.0f + x * (1.0f - s));
}

}  // namespace spatial_norm
}  // namespace movq
