// The launchers as plain loops over their arguments, which must be what csrc/kernels/*.h demand: the right strides, pointers,
// dtypes, device and stream.
#include "fake_cuda.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "kernels/attention.h"
#include "kernels/epilogue.h"
#include "kernels/shared_kv_attention.h"
#include "kernels/spatial_norm.h"
#include "kernels/upsampling.h"

namespace movq {
namespace {

constexpr size_t kWorkspace = 256;

void check_launch(cudaStream_t stream) {
  if (fake::guards != 1) throw std::runtime_error("launched without a device guard");
  if (static_cast<const void*>(stream) != fake::kStream) throw std::runtime_error("launched on another stream");
}

void check_workspace(const void* workspace) {
  if (!workspace) throw std::runtime_error("launched without a workspace");
}

float load(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(data)[index];
  if (dtype == DType::float16) return static_cast<const c10::Half*>(data)[index];
  return static_cast<const c10::BFloat16*>(data)[index];
}

void store(void* data, DType dtype, int64_t index, float value) {
  if (dtype == DType::float32) static_cast<float*>(data)[index] = value;
  else if (dtype == DType::float16) static_cast<c10::Half*>(data)[index] = value;
  else static_cast<c10::BFloat16*>(data)[index] = value;
}

// Where an element of a map is.
int64_t offset(bool channels_last, int64_t channels, int64_t pixels, int64_t image, int64_t channel, int64_t pixel) {
  return channels_last ? (image * pixels + pixel) * channels + channel : (image * channels + channel) * pixels + pixel;
}

}  // namespace

// Calls function(channel, pixel, part) for every element of a group, in the order of the statistics' parts.
template <class Function>
static void each_of_parts(const EpilogueProblem& p, int64_t group, Function function) {
  const int64_t channels = p.channels / p.groups, chunks = (p.pixels + p.chunk_pixels - 1) / p.chunk_pixels;
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t pixel = 0; pixel < p.pixels; ++pixel)
      function(group * channels + channel, pixel, pixel / p.chunk_pixels + (p.channels_last ? 0 : channel * chunks));
}

// Adds a value to mean, m2 and count.
static void add_moment(float* moments, float value) {
  const float delta = value - moments[0];
  moments[0] += delta / ++moments[2];
  moments[1] += delta * (value - moments[0]);
}

void add_bias_residual(const EpilogueProblem& p, const Epilogue& a, cudaStream_t stream) {
  check_launch(stream);
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t channel = 0; channel < p.channels; ++channel)
      for (int64_t pixel = 0; pixel < p.pixels; ++pixel) {
        const int64_t i = offset(p.channels_last, p.channels, p.pixels, image, channel, pixel);
        const float bias = a.bias ? load(a.bias, p.bias_dtype, channel) : 0;
        store(a.x, p.dtype, i, load(a.x, p.dtype, i) + bias + (a.residual ? load(a.residual, p.dtype, i) : 0));
      }
  if ((p.groups == 0) != (a.statistics == nullptr)) throw std::runtime_error("launched with groups or statistics alone");
  const int64_t parts = p.groups ? epilogue_parts(p) : 0;
  std::fill_n(a.statistics, p.batch * p.groups * parts * 4, 0.0f);
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t group = 0; group < p.groups; ++group)
      each_of_parts(p, group, [&](int64_t channel, int64_t pixel, int64_t part) {
        const int64_t i = offset(p.channels_last, p.channels, p.pixels, image, channel, pixel);
        add_moment(a.statistics + 4 * ((image * p.groups + group) * parts + part), load(a.x, p.dtype, i));
      });
}

// --- Spatial norm

namespace {

// One pixel of a norm's input and everything that the formula needs of it.
struct Element {
  int64_t f, zq, out;  // offsets
  float y, b, weight, bias;
};

int64_t source(int64_t position, int64_t size, int64_t zq_size, bool bordered) {
  if (!bordered) return std::min<int64_t>(std::floor(position * (static_cast<float>(zq_size) / size)), zq_size - 1);
  const int64_t cell = size / (zq_size / 3), inside = position % cell;
  return position / cell * 3 + (inside == 0 ? 0 : inside == cell - 1 ? 2 : 1);
}

int64_t source_frame(const SpatialNormProblem& p, int64_t frame) {
  if (!p.split_first_frame || p.frames == 1 || p.zq_frames == 1) return source(frame, p.frames, p.zq_frames, false);
  return frame == 0 ? 0 : 1 + source(frame - 1, p.frames - 1, p.zq_frames - 1, false);
}

template <class Arguments>
Element element(const SpatialNormProblem& p, const Arguments& a, int64_t image, int64_t channel, int64_t pixel) {
  Element e = {offset(p.channels_last, p.channels, p.pixels(), image, channel, pixel), 0, 0, 1, 0, 1, 0};
  const int64_t image_stride = p.out_image_stride ? p.out_image_stride : p.channels * p.pixels();
  const int64_t channel_stride = p.out_channel_stride ? p.out_channel_stride : p.pixels();
  e.out = image * image_stride + (p.channels_last ? pixel * p.channels + channel : channel * channel_stride + pixel);
  if (p.zq_height) {
    const int64_t frame_row = pixel / p.width;
    const int64_t frame = source_frame(p, frame_row / p.height);
    const int64_t row = source(frame_row % p.height, p.height, p.zq_height, p.bordered);
    const int64_t column = source(pixel % p.width, p.width, p.zq_width, p.bordered);
    e.zq = offset(p.channels_last, p.channels, p.zq_pixels(), image, channel, (frame * p.zq_height + row) * p.zq_width + column);
    e.y = load(a.zq_y, p.dtype, e.zq);
    e.b = load(a.zq_b, p.dtype, e.zq);
  }
  if (a.weight) e.weight = load(a.weight, p.param_dtype, channel);
  if (a.bias) e.bias = load(a.bias, p.param_dtype, channel);
  return e;
}

// Calls function(channel, pixel) for every element of a group.
template <class Function>
void each_of_group(const SpatialNormProblem& p, int64_t group, Function function) {
  const int64_t channels = p.channels / p.groups;
  for (int64_t channel = group * channels; channel < (group + 1) * channels; ++channel)
    for (int64_t pixel = 0; pixel < p.pixels(); ++pixel) function(channel, pixel);
}

}  // namespace

size_t spatial_norm_forward_workspace(const SpatialNormProblem&, const SpatialNormForward&) { return kWorkspace; }
size_t spatial_norm_backward_workspace(const SpatialNormProblem&, const SpatialNormBackward&) { return kWorkspace; }

void spatial_norm_forward(const SpatialNormProblem& p, const SpatialNormForward& a, cudaStream_t stream) {
  check_launch(stream);
  check_workspace(a.workspace);
  const double count = static_cast<double>(p.channels / p.groups) * p.pixels();
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t group = 0; group < p.groups; ++group) {
      auto value = [&](int64_t channel, int64_t pixel) {
        const float f_bias = a.f_bias ? load(a.f_bias, p.f_bias_dtype, channel) : 0;
        return load(a.f, p.dtype, element(p, a, image, channel, pixel).f) + f_bias;
      };
      double mean = 0, variance = 0;
      if (a.statistics) {
        const float* parts = a.statistics + 4 * a.parts * (image * p.groups + group);
        for (int64_t part = 0; part < a.parts; ++part) mean += parts[4 * part] * parts[4 * part + 2] / count;
        for (int64_t part = 0; part < a.parts; ++part) {
          const double distance = parts[4 * part] - mean;
          variance += (parts[4 * part + 1] + distance * distance * parts[4 * part + 2]) / count;
        }
      } else {
        each_of_group(p, group, [&](int64_t channel, int64_t pixel) { mean += value(channel, pixel) / count; });
        each_of_group(p, group, [&](int64_t channel, int64_t pixel) {
          variance += (value(channel, pixel) - mean) * (value(channel, pixel) - mean) / count;
        });
      }
      const double rstd = 1 / std::sqrt(variance + p.eps);
      each_of_group(p, group, [&](int64_t channel, int64_t pixel) {
        const Element e = element(p, a, image, channel, pixel);
        const double modulated = ((value(channel, pixel) - mean) * rstd * e.weight + e.bias) * e.y + e.b;
        store(a.out, p.dtype, e.out, p.silu ? modulated / (1 + std::exp(-modulated)) : modulated);
      });
      a.mean[image * p.groups + group] = mean;
      a.rstd[image * p.groups + group] = rstd;
    }
}

void spatial_norm_backward(const SpatialNormProblem& p, const SpatialNormBackward& a, cudaStream_t stream) {
  check_launch(stream);
  check_workspace(a.workspace);
  const int64_t count = p.channels / p.groups * p.pixels();
  std::vector<double> dzq_y(p.batch * p.channels * p.zq_pixels()), dzq_b(dzq_y.size());
  std::vector<double> dweight(p.channels), dbias(p.channels);
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t group = 0; group < p.groups; ++group) {
      const double mean = a.mean[image * p.groups + group], rstd = a.rstd[image * p.groups + group];
      double sum = 0, sum_normalised = 0;
      auto gradient = [&](bool last) {  // first sums over the group, then writes df
        each_of_group(p, group, [&](int64_t channel, int64_t pixel) {
          const Element e = element(p, a, image, channel, pixel);
          const double normalised = (load(a.f, p.dtype, e.f) - mean) * rstd, affine = normalised * e.weight + e.bias;
          const double modulated = affine * e.y + e.b, gate = 1 / (1 + std::exp(-modulated));
          const double d = load(a.dout, p.dtype, e.f) * (p.silu ? gate * (1 + modulated * (1 - gate)) : 1);
          const double dnormalised = d * e.y * e.weight;
          if (last) {
            store(a.df, p.dtype, e.f, rstd * (dnormalised - sum / count - normalised * sum_normalised / count));
            return;
          }
          sum += dnormalised;
          sum_normalised += dnormalised * normalised;
          dweight[channel] += d * e.y * normalised;
          dbias[channel] += d * e.y;
          if (p.zq_height) dzq_y[e.zq] += d * affine, dzq_b[e.zq] += d;
        });
      };
      gradient(false);
      gradient(true);
    }
  for (size_t i = 0; i < dzq_y.size(); ++i) store(a.dzq_y, p.dtype, i, dzq_y[i]), store(a.dzq_b, p.dtype, i, dzq_b[i]);
  for (int64_t channel = 0; channel < p.channels; ++channel) {
    if (a.dweight) store(a.dweight, p.param_dtype, channel, dweight[channel]);
    if (a.dbias) store(a.dbias, p.param_dtype, channel, dbias[channel]);
  }
}

// --- Attention

namespace {

// Throws unless the tokens are as attention.h demands; returns where an element is.
class Elements {
 public:
  Elements(const Tokens& tokens, DType dtype, int64_t heads) : tokens_(tokens), dtype_(dtype), heads_(heads) {
    const int64_t step = 16 / bytes(dtype);
    if (reinterpret_cast<uintptr_t>(tokens.data) % 16 || tokens.batch_stride % step || tokens.head_stride % step ||
        tokens.token_stride % step)
      throw std::runtime_error("launched with unaligned tokens");
  }
  float operator()(int64_t head, int64_t token, int64_t i) const { return load(tokens_.data, dtype_, offset(head, token, i)); }
  void set(int64_t head, int64_t token, int64_t i, float value) { store(tokens_.data, dtype_, offset(head, token, i), value); }

 private:
  int64_t offset(int64_t head, int64_t token, int64_t i) const {  // of a head of all images
    return head / heads_ * tokens_.batch_stride + head % heads_ * tokens_.head_stride + token * tokens_.token_stride + i;
  }

  Tokens tokens_;
  DType dtype_;
  int64_t heads_;
};

double dot(const Elements& a, int64_t i, const Elements& b, int64_t j, int64_t head, int64_t size) {
  double sum = 0;
  for (int64_t element = 0; element < size; ++element) sum += a(head, i, element) * b(head, j, element);
  return sum;
}

}  // namespace

size_t attention_forward_workspace(const AttentionProblem&) { return kWorkspace; }
size_t attention_backward_workspace(const AttentionProblem&) { return kWorkspace; }

void attention_forward(const AttentionProblem& p, const AttentionForward& a, cudaStream_t stream) {
  check_launch(stream);
  check_workspace(a.workspace);
  const Elements q(a.q, p.dtype, p.heads), k(a.k, p.dtype, p.heads), v(a.v, p.dtype, p.heads);
  Elements out(a.out, p.dtype, p.heads);
  for (int64_t head = 0; head < p.batch * p.heads; ++head)
    for (int64_t query = 0; query < p.queries; ++query) {
      double sum = 0;
      std::vector<double> values(p.head_size);
      for (int64_t key = 0; key < p.keys; ++key) {
        const double weight = std::exp(p.scale * dot(q, query, k, key, head, p.head_size));
        sum += weight;
        for (int64_t i = 0; i < p.head_size; ++i) values[i] += weight * v(head, key, i);
      }
      for (int64_t i = 0; i < p.head_size; ++i) out.set(head, query, i, values[i] / sum);
      a.lse[head * p.queries + query] = std::log(sum);
    }
}

void attention_backward(const AttentionProblem& p, const AttentionBackward& a, cudaStream_t stream) {
  check_launch(stream);
  check_workspace(a.workspace);
  const Elements q(a.q, p.dtype, p.heads), k(a.k, p.dtype, p.heads), v(a.v, p.dtype, p.heads);
  const Elements out(a.out, p.dtype, p.heads), dout(a.dout, p.dtype, p.heads);
  Elements dq(a.dq, p.dtype, p.heads), dk(a.dk, p.dtype, p.heads), dv(a.dv, p.dtype, p.heads);
  const int64_t size = p.head_size;
  for (int64_t head = 0; head < p.batch * p.heads; ++head) {
    std::vector<double> sum_q(p.queries * size), sum_k(p.keys * size), sum_v(p.keys * size);
    for (int64_t query = 0; query < p.queries; ++query)
      for (int64_t key = 0; key < p.keys; ++key) {
        const double weight = std::exp(p.scale * dot(q, query, k, key, head, size) - a.lse[head * p.queries + query]);
        const double dweight = dot(dout, query, v, key, head, size) - dot(dout, query, out, query, head, size);
        for (int64_t i = 0; i < size; ++i) {
          sum_q[query * size + i] += p.scale * weight * dweight * k(head, key, i);
          sum_k[key * size + i] += p.scale * weight * dweight * q(head, query, i);
          (p.shared_kv ? sum_k : sum_v)[key * size + i] += weight * dout(head, query, i);
        }
      }
    for (int64_t i = 0; i < p.queries * size; ++i) dq.set(head, i / size, i % size, sum_q[i]);
    for (int64_t i = 0; i < p.keys * size; ++i) dk.set(head, i / size, i % size, sum_k[i]);
    if (p.shared_kv) continue;
    for (int64_t i = 0; i < p.keys * size; ++i) dv.set(head, i / size, i % size, sum_v[i]);
  }
}

// The kernels for Hopper. fake::has_hopper says whether the device has them; they count their launches as events.

bool has_shared_kv_kernels(DType dtype, int64_t head_size) {
  return fake::has_hopper && dtype != DType::float32 && (head_size == 128 || head_size == 256 || head_size == 512);
}

size_t shared_kv_forward_workspace(const AttentionProblem&) { return kWorkspace; }
size_t shared_kv_backward_workspace(const AttentionProblem&) { return kWorkspace; }

void shared_kv_forward(const AttentionProblem& p, const SharedKvForward& a, cudaStream_t stream) {
  fake::events += "hopper_forward ";
  attention_forward(p, {a.q, a.kv, a.kv, a.out, a.lse, a.workspace}, stream);
}

void shared_kv_backward(const AttentionProblem& p, const SharedKvBackward& a, cudaStream_t stream) {
  fake::events += "hopper_backward ";
  if (!p.shared_kv) throw std::runtime_error("launched for keys that are not the values");
  attention_backward(p, {a.dout, a.q, a.kv, a.kv, a.out, a.lse, a.dq, a.dkv, {}, a.workspace}, stream);
}

// --- Upsampling

// The four sums of neighbouring weights along one dimension, by their weights.
constexpr float kSums[4][3] = {{1, 0, 0}, {1, 1, 0}, {0, 1, 1}, {0, 0, 1}};

namespace {

int64_t weight_offset(const FoldProblem& p, int64_t out, int64_t in, int64_t row, int64_t column) {
  return offset(p.channels_last, p.in_channels, 9, out, in, 3 * row + column);
}

// Calls function(folded offset, weight offset, factor) for every weight that a folded one sums.
template <class Function>
void each_term(const FoldProblem& p, Function function) {
  for (int64_t out = 0; out < p.out_channels; ++out)
    for (int64_t in = 0; in < p.in_channels; ++in)
      for (int64_t i = 0; i < 4; ++i)
        for (int64_t j = 0; j < 4; ++j) {
          // A transposed convolution mirrors its kernel. Windows: sums 1 and 3 are the upper left pixel's, 0 and 2 the other's.
          const int64_t pixel = (i % 2 ? 0 : 2) + (j % 2 ? 0 : 1), channel = pixel * p.out_channels + out;
          const int64_t folded = p.windows ? (channel * 4 + i / 2 * 2 + j / 2) * p.in_channels + in
                                           : (in * 16 + (3 - i) * 4 + 3 - j) * p.out_channels + out;
          for (int64_t row = 0; row < 3; ++row)
            for (int64_t column = 0; column < 3; ++column)
              function(folded, weight_offset(p, out, in, row, column), kSums[i][row] * kSums[j][column]);
        }
}

}  // namespace

void fold_upsampling(const FoldProblem& p, const void* weight, void* folded, cudaStream_t stream) {
  check_launch(stream);
  std::vector<float> sums(16 * p.out_channels * p.in_channels);
  each_term(p, [&](int64_t to, int64_t from, float factor) { sums[to] += factor * load(weight, p.dtype, from); });
  for (size_t i = 0; i < sums.size(); ++i) store(folded, p.dtype, i, sums[i]);
}

void fold_upsampling_backward(const FoldProblem& p, const void* dfolded, void* dweight, cudaStream_t stream) {
  check_launch(stream);
  std::vector<float> sums(9 * p.out_channels * p.in_channels);
  each_term(p, [&](int64_t from, int64_t to, float factor) { sums[to] += factor * load(dfolded, p.dtype, from); });
  for (size_t i = 0; i < sums.size(); ++i) store(dweight, p.dtype, i, sums[i]);
}

void interleave_windows(const InterleaveProblem& p, const void* windows, const void* bias, void* out, float* statistics,
                        cudaStream_t stream) {
  check_launch(stream);
  if ((p.groups == 0) != (statistics == nullptr)) throw std::runtime_error("launched with groups or statistics alone");
  const int64_t parts = p.groups ? interleave_parts(p) : 0;
  std::fill_n(statistics, p.batch * p.groups * parts * 4, 0.0f);
  for (int64_t image = 0; image < p.batch; ++image)
    for (int64_t y = 0; y < 2 * p.height; ++y)
      for (int64_t x = 0; x < 2 * p.width; ++x)
        for (int64_t channel = 0; channel < p.channels; ++channel) {
          const int64_t window = (image * (p.height + 1) + (y + 1) / 2) * (p.width + 1) + (x + 1) / 2;
          const int64_t pixel = (y + 1) % 2 * 2 + (x + 1) % 2;
          const float value = load(windows, p.dtype, (window * 4 + pixel) * p.channels + channel);
          const int64_t to = ((image * 2 * p.height + y) * 2 * p.width + x) * p.channels + channel;
          store(out, p.dtype, to, value + (bias ? load(bias, p.bias_dtype, channel) : 0));
          if (!statistics) continue;
          const int64_t group = channel / (p.channels / p.groups), part = y * (parts / (2 * p.height)) + x / p.chunk_columns;
          add_moment(statistics + 4 * ((image * p.groups + group) * parts + part), load(out, p.dtype, to));
        }
}

}  // namespace movq
