// The moments of the values that a kernel stores, for the norm that reads them next: the norm then needs no pass of its own for
// statistics (merge_statistics in spatial_norm_forward.cu reads these instead).
//
// A quad is four adjacent elements of one group: channels of a pixel in NHWC, pixels of a channel in NCHW. A thread keeps the
// moments of every quad of its accesses. The four values are summed around their own mean, and merged into the
// running mean with Chan's rule; so no large numbers cancel, whatever the mean. This takes 18 instructions per quad, with one
// reciprocal per access. At the end, teams of lanes merge the quads of each group through shared memory, in a fixed order, and
// store mean, m2 and count.
#pragma once

#include <algorithm>
#include <type_traits>

#include "device/convert.cuh"
#include "device/divisor.cuh"
#include "device/math.cuh"
#include "device/memory.cuh"
#include "device/reduce.cuh"

namespace movq {

constexpr int kQuad = 4;
constexpr int kMaxQuadBytes = 16 << 10;  // of shared memory: 4 blocks then fit on a multiprocessor of every GPU

// The moments of the quads of a thread's accesses, all of the same length.
template <int VecSize>
struct QuadMoments {
  static_assert(VecSize % kQuad == 0, "an access must consist of quads");
  static constexpr int kQuads = VecSize / kQuad;
  float accesses = 0;
  Vec<float, kQuads> mean = {}, m2 = {};

  // Adds an access as it was stored, that is, rounded.
  template <class T>
  MOVQ_DEVICE void add(const Vec<T, VecSize>& stored) {
    const Vec<float, VecSize> values = to_float(stored);
    const float weight = fast_reciprocal(accesses + 1), count = kQuad * accesses * weight;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const float* of_quad = &values[q * kQuad];
      const float centre = 0.25f * ((of_quad[0] + of_quad[1]) + (of_quad[2] + of_quad[3]));
#pragma unroll
      for (int i = 0; i < kQuad; ++i) {
        const float distance = of_quad[i] - centre;
        m2[q] += distance * distance;
      }
      const float delta = centre - mean[q];
      mean[q] += delta * weight;
      m2[q] += delta * delta * count;
    }
    accesses += 1;
  }
};

struct NoMoments {
  template <class Access> MOVQ_DEVICE void add(const Access&) {}
};

// For kernels that leave statistics on request. An access of one element has no quads.
template <bool WithStatistics, int VecSize>
using MomentsOrNone = std::conditional_t<WithStatistics, QuadMoments<WithStatistics ? VecSize : kQuad>, NoMoments>;

// How a block's quads belong to groups. The quads form a matrix of `rows` x `columns`, with those of one access side by side.
// A group has `group_rows` x `group_columns` of them.
struct QuadGroups {
  int rows, columns, group_rows, group_columns;
  int pitch;  // floats from one row to the next in shared memory
  int team;   // lanes that merge the quads of one group
  Divisor columns_divisor;
  int shared_bytes() const { return 3 * rows * pitch * int(sizeof(float)); }
};

inline QuadGroups plan_quad_groups(int rows, int columns, int group_rows, int group_columns, int threads) {
  QuadGroups plan = {rows, columns, group_rows, group_columns};
  const int groups = rows / group_rows * (columns / group_columns);
  const int lanes = std::min({kWarpSize, group_rows * group_columns, std::max(1, threads / groups)});
  for (plan.team = 1; 2 * plan.team <= lanes;) plan.team *= 2;
  // The banks from one row to the next: the teams of a warp, side by side or one below the other, then read different banks.
  const int banks = group_rows == 1 ? plan.team : kWarpSize / plan.team * group_columns;
  plan.pitch = round_up(columns + ((banks - columns) % kWarpSize + kWarpSize) % kWarpSize, 2);  // an access's quads are one Vec
  // With few columns that takes too much shared memory. Rows an odd number of pairs apart take little: two lanes share a bank.
  if (plan.shared_bytes() > kMaxQuadBytes) plan.pitch = round_up(columns, 2) | 2;
  plan.columns_divisor = Divisor(group_columns);
  return plan;
}

// Merges the moments of a block's threads and stores those of its first `groups` groups, numbered along the rows of quads first,
// to statistics[first_part + group * part_stride]. All threads of the block must call; `row` and `access` are the thread's place
// in the block, and threads outside of it (row >= plan.rows) hold nothing.
template <int VecSize>
MOVQ_DEVICE void store_group_moments(const QuadGroups& plan, int row, int access, const QuadMoments<VecSize>& moments, int groups,
                                     float* statistics, int64_t first_part, int64_t part_stride) {
  constexpr int kQuads = QuadMoments<VecSize>::kQuads;
  const unsigned size = plan.rows * plan.pitch;
  const Shared<float> means(0, size), m2s(means.end(), size), counts(m2s.end(), size);
  if (row < plan.rows) {
    const int slot = row * plan.pitch + access * kQuads;
    means.store_vec(slot, moments.mean);
    m2s.store_vec(slot, moments.m2);
    Vec<float, kQuads> count;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) count[q] = kQuad * moments.accesses;
    counts.store_vec(slot, count);
  }
  __syncthreads();
  const int quads = plan.group_rows * plan.group_columns, groups_across = plan.columns / plan.group_columns;
  const int teams = blockDim.x / plan.team, own = threadIdx.x / plan.team, lane = threadIdx.x - own * plan.team;
  for (int first = 0; first < groups; first += teams) {  // all lanes take part in the shuffles
    const int group = first + own;
    Moments total = {};
    if (group < groups) {
      const int down = group / groups_across, across = group - down * groups_across;
      const int corner = down * plan.group_rows * plan.pitch + across * plan.group_columns;
      for (int quad = lane; quad < quads; quad += plan.team) {
        const int quad_row = quad / plan.columns_divisor, column = quad - quad_row * plan.group_columns;
        const int slot = corner + quad_row * plan.pitch + column;
        total = merge(total, {means.load(slot), m2s.load(slot), counts.load(slot)});
      }
    }
    for (int offset = plan.team / 2; offset > 0; offset /= 2) total = merge(total, shuffle_down(total, offset));
    if (lane == 0 && group < groups) {
      store_vec(statistics + 4 * (first_part + group * part_stride), Vec<float, 4>{{total.mean, total.m2, total.count, 0}});
    }
  }
}

}  // namespace movq
