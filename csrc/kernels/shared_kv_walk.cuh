// The Hopper kernel for attention whose keys are also its values: one block walks over its units of work. A Pass computes the
// weights. The tile and its budget are in shared_kv_tile.cuh.
#pragma once

#include "shared_kv_tile.cuh"

namespace movq {
namespace shared_kv {

// The tensors that the loading thread copies. A stage holds tokens of one tensor, or half as many of each of two.
struct Maps { TensorMap residents[2], sources[2]; };

// The loading thread.
template <class T, int Head, class Pass>
MOVQ_DEVICE void load_tiles(const Plan& plan, const Maps& maps) {
  using Memory = SharedMemory<T, Head, Pass::kResidents>;
  using Resident = typename Memory::Resident;
  using Stage = typename Memory::Stage;
  constexpr int kTokens = Memory::kStageRows / Pass::kSources;  // of each tensor in a stage
  const int end_unit = plan.schedule.first_unit(blockIdx.x + 1);
  int n = 0, segments = 0;
  for (int unit = plan.schedule.first_unit(blockIdx.x); unit < end_unit; ++segments) {
    const Segment segment(plan, unit);
    Memory::residents_empty().wait(segments % 2 == 0);
    Memory::residents_full().arrive_expecting(Pass::kResidents * Resident::kBytes);
    for (int i = 0; i < Pass::kResidents; ++i) {
      for (int panel = 0; panel < Resident::kPanels; ++panel) {
        const Coordinates from = {panel * Resident::kPanelColumns, segment.row_tile * kRows, segment.head, segment.image};
        tma_load(Memory::resident(i).elements, panel * Resident::kPanelElements, maps.residents[i], from,
                 Memory::residents_full());
      }
    }
    for (int tile = segment.first; tile < segment.end; ++tile, ++n) {
      Memory::stage_empty(n).wait(Memory::parity(n) ^ 1);
      for (int panel = 0; panel < Stage::kPanels; ++panel) {
        const MBarrier full = Memory::panel_full(n, panel);
        full.arrive_expecting(Stage::kPanelBytes);
        for (int source = 0; source < Pass::kSources; ++source) {
          const Coordinates from = {panel * Stage::kPanelColumns, tile * kTokens, segment.head, segment.image};
          const int to = panel * Stage::kPanelElements + source * kTokens * Stage::kPanelColumns;
          tma_load(Memory::stage(n).elements, to, maps.sources[source], from, full);
        }
      }
    }
    unit += segment.units();
  }
}

// One of the computing warpgroups; Side is its id. A Pass has these functions, for two rows of each thread:
//   Pass(plan, arguments, segment)
//   load_statistics(tile)          before the scores of an own stage are complete
//   weigh(tile, row_values, s)     turns the scores of an own stage into weights, in s[0]
//   follow(row_values)             reads what the other warpgroup's weigh() stored in row_values for its stage
//   rescale(sums)                  before the values of a stage are added
//   write(side, sums)              after the last stage
template <class T, int Head, class Pass, int Side>
class Computing {
  using Memory = SharedMemory<T, Head, Pass::kResidents>;
  static constexpr int kHalf = Head / 2, kStageRows = Memory::kStageRows, kSteps = kStageRows / 16;
  using Scores = float[Pass::kResidents][kStageRows / 2];
  using Sums = float[kHalf / 2];
  using Fragments = uint32_t[kSteps][4];

 public:
  MOVQ_DEVICE static void run(const Plan& plan, const typename Pass::Arguments& arguments) {
    const NamedBarrier own_weights(1 + Side, kComputeThreads), other_weights(2 - Side, kComputeThreads);
    const int end_unit = plan.schedule.first_unit(blockIdx.x + 1);
    int n = 0, segments = 0;
    for (int unit = plan.schedule.first_unit(blockIdx.x); unit < end_unit; ++segments) {
      const Segment segment(plan, unit);
      Pass pass(plan, arguments, segment);
      Sums sums = {};
      Memory::residents_full().wait(segments % 2);
      for (int tile = segment.first; tile < segment.end; tile += 2, n += 2) {
        const bool is_pair = tile + 1 < segment.end;
        Scores s;
        Fragments weights;
        if constexpr (Side == 0) {
          start_scores(s, n);
          pass.load_statistics(tile);
          wgmma_wait<0>(s);
          pass.weigh(tile, n, s);
          store_weights(s[0], weights, n);
          own_weights.arrive();
          pass.rescale(sums);
          start_own_values(sums, weights, n);
          wgmma_wait<0>(sums, weights);
          release_stage(n);
          if (is_pair) {
            other_weights.sync();
            pass.follow(n + 1);
            pass.rescale(sums);
            start_other_values(sums, n + 1);
            wgmma_wait<0>(sums);
            release_stage(n + 1);
          }
        } else {
          if (is_pair) {
            start_scores(s, n + 1);
            pass.load_statistics(tile + 1);
            wgmma_wait<0>(s);
          }
          other_weights.sync();
          pass.follow(n);
          pass.rescale(sums);
          start_other_values(sums, n);
          if (is_pair) {
            pass.weigh(tile + 1, n + 1, s);
            store_weights(s[0], weights, n + 1);
            own_weights.arrive();
          }
          wgmma_wait<0>(sums);
          release_stage(n);
          if (is_pair) {
            pass.rescale(sums);
            start_own_values(sums, weights, n + 1);
            wgmma_wait<0>(sums, weights);
            release_stage(n + 1);
          }
        }
      }
      n -= segment.units() % 2;
      pass.write(Side, sums);
      arrive(Memory::residents_empty());
      unit += segment.units();
    }
  }

 private:
  // s = resident . stage^T
  MOVQ_DEVICE static void start_scores(Scores& s, int n) {
    const auto stage = Memory::stage(n);
    wgmma_fence(s);
#pragma unroll
    for (int panel = 0; panel < Memory::kPanels; ++panel) {
      Memory::panel_full(n, panel).wait(Memory::parity(n));
#pragma unroll
      for (int i = 0; i < Pass::kResidents; ++i) {
#pragma unroll
        for (int column = panel * 64; column < panel * 64 + 64; column += 16) {
          wgmma<T, Major::kK>(s[i], Memory::resident(i).columns_are_k(column), stage.columns_are_k(column), column > 0);
        }
      }
    }
    wgmma_commit();
  }

  // Rounds the weights and stores them for the other warpgroup.
  MOVQ_DEVICE static void store_weights(const float (&weights)[kStageRows / 2], Fragments& fragments, int n) {
    const auto tile = Memory::weights(n);
#pragma unroll
    for (int i = 0; i < kStageRows / 2; i += 2) {
      const uint32_t pair = pack<T>(weights[i], weights[i + 1]);
      fragments[i / 8][i / 2 % 4] = pair;
      tile.store_pair(register_row(i), register_column(i), pair);
    }
    fence_proxy_async();
  }

  // sums += weights . (this half of the stage)
  MOVQ_DEVICE static void start_own_values(Sums& sums, Fragments& weights, int n) {
    wgmma_fence(sums, weights);
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      wgmma<T, Major::kMN>(sums, weights[step], Memory::stage(n).rows_are_k(16 * step, Side * kHalf));
    wgmma_commit();
  }

  MOVQ_DEVICE static void start_other_values(Sums& sums, int n) {
#pragma unroll
    for (int panel = Side * Memory::kPanels / 2; panel < (Side + 1) * Memory::kPanels / 2; ++panel)
      Memory::panel_full(n, panel).wait(Memory::parity(n));
    wgmma_fence(sums);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma<T, Major::kMN>(sums, Memory::weights(n).columns_are_k(16 * step),
                           Memory::stage(n).rows_are_k(16 * step, Side * kHalf));
    }
    wgmma_commit();
  }

  MOVQ_DEVICE static void release_stage(int n) { arrive(Memory::stage_empty(n)); }

  // One lane arrives for its warp.
  MOVQ_DEVICE static void arrive(const MBarrier& barrier) {
    __syncwarp();
    if (lane_id() == 0) barrier.arrive();
  }
};

template <class T, int Head, class Pass>
__global__ void __launch_bounds__(kThreads, 1) walk(const __grid_constant__ Plan plan, const __grid_constant__ Maps maps,
                                                    const __grid_constant__ typename Pass::Arguments arguments) {
#ifdef MOVQ_SM90A
  if (threadIdx.x == 0) SharedMemory<T, Head, Pass::kResidents>::init_barriers();
  __syncthreads();
  if (warpgroup_id() == 2) {
    release_registers<24>();
    if (threadIdx.x == kComputeThreads) load_tiles<T, Head, Pass>(plan, maps);
  } else {
    acquire_registers<240>();
    if (warpgroup_id() == 0) Computing<T, Head, Pass, 0>::run(plan, arguments);
    else Computing<T, Head, Pass, 1>::run(plan, arguments);
  }
#else
  __trap();  // rather than leave the output unwritten
#endif
}

}  // namespace shared_kv
}  // namespace movq
