// Hopper kernels with one bug each, which the argument `bug` turns on; 0 is the right kernel. test_hopper.py checks that each bug
// is reported.
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/swizzled_tile.cuh"
#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "export.h"
#include "unused_primitives.h"

using namespace movq;
using Tile64 = SwizzledTile<__half, 64, 64>;

template <int N>
MOVQ_DEVICE void store_sums(float* d, const float (&sums)[N / 2]) {
  const int thread = threadIdx.x % kWarpgroupSize, row = thread / kWarpSize * 16 + thread % kWarpSize / 4;
  for (int i = 0; i < N / 2; ++i) store(d + (row + i / 2 % 2 * 8) * N + i / 4 * 8 + thread % 4 * 2 + i % 2, sums[i]);
}

// d = a b^T for 64 x 64 matrices that ordinary stores bring to shared memory. Bugs: 1 no fence.proxy.async, 2 only after the
// barrier, 3 no wgmma.fence, 4 no wait, 5 no commit, 6 sums written in flight, 7 an operand overwritten in flight, 8 a descriptor
// in the middle of the swizzle pattern, 9 warps that pass different descriptors, 10 warps that do not take part, 11 sums read in
// flight, 12 a proxy fence by one thread for the stores of all.
__global__ void products(const __half* a, const __half* b, float* d, int bug) {
  const Tile64 left(0), right(left.kBytes);
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) {
    left.elements.store(left.index(i / 64, i % 64), load(a + i));
    right.elements.store(right.index(i / 64, i % 64), load(b + i));
  }
  if (bug != 1 && bug != 2 && (bug != 12 || threadIdx.x == 0)) fence_proxy_async();
  __syncthreads();
  if (bug == 2) fence_proxy_async();
  if (bug == 10 && threadIdx.x >= 64) return;
  float sums[32] = {};
  if (bug != 3) wgmma_fence(sums);
  for (int k = 0; k < 64; k += 16) {
    uint64_t operand = left.columns_are_k(k);
    if (bug == 8) operand += 128 / 16;
    if (bug == 9 && threadIdx.x >= 64) operand += 1;
    wgmma<__half, Major::kK>(sums, operand, right.columns_are_k(k), k > 0);
  }
  if (bug != 5) wgmma_commit();
  if (bug == 11) store_sums<64>(d, sums);
  if (bug == 6) sums[3] = 0;
  if (bug == 7) left.elements.store(0, load(a));
  if (bug != 4) wgmma_wait<0>(sums);
  if (bug != 11) store_sums<64>(d, sums);
}
EXPORT(products, const void* a, const void* b, float* d, int bug) {
  launch(::products, "products", LaunchConfig{1, 128, 2 * Tile64::kBytes}, nullptr, static_cast<const __half*>(a),
         static_cast<const __half*>(b), d, bug);
}

// d = a b^T as above, with a in registers and 32 columns in each of two sums. Bugs: 1 a or 2 sums written after the fence, 3 a
// fence that names one of the two sums, 4 a fence that does not name a, 5 a written in flight, 6 a wait that does not name a, 7 a
// wait that does not name the sums, 8 the two registers of a exchanged that are eight rows below and eight columns to the right.
__global__ void fragments(const __half* a, const __half* b, float* d, int bug) {
  const Tile64 right(0);
  for (int i = threadIdx.x; i < 64 * 64; i += blockDim.x) right.elements.store(right.index(i / 64, i % 64), load(b + i));
  fence_proxy_async();
  __syncthreads();
  float sums[2][16] = {};
  uint32_t registers[4][4];
  for (int i = 0; i < 16; ++i) {
    const __half* at = a + (warp_id() * 16 + lane_id() / 4 + i % 2 * 8) * 64 + i / 2 * 8 + lane_id() % 4 * 2;
    const int exchanged = bug == 8 && (i % 4 == 1 || i % 4 == 2) ? 3 - i % 4 : i % 4;
    registers[i / 4][exchanged] = pack<__half>(to_float(load(at)), to_float(load(at + 1)));
  }
  if (bug == 3) wgmma_fence(sums[0], registers);
  else if (bug == 4) wgmma_fence(sums);
  else wgmma_fence(sums, registers);
  if (bug == 1) registers[2][1] ^= 1;
  if (bug == 2) sums[1][3] = 1;
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 2; ++i) wgmma<__half, Major::kK>(sums[i], registers[k], right.columns_are_k(16 * k) + i * 32 * 128 / 16);
  }
  wgmma_commit();
  if (bug == 5) registers[3][0] ^= 1;
  if (bug == 6) wgmma_wait<0>(sums);
  else if (bug == 7) wgmma_wait<0>(registers);
  else wgmma_wait<0>(sums, registers);
  float all[32];
  for (int i = 0; i < 32; ++i) all[i] = sums[i / 16][i % 16];
  store_sums<64>(d, all);
}
EXPORT(fragments, const void* a, const void* b, float* d, int bug) {
  launch(::fragments, "fragments", LaunchConfig{1, 128, Tile64::kBytes}, nullptr, static_cast<const __half*>(a),
         static_cast<const __half*>(b), d, bug);
}

// d = sum of x x^T over the 64 x 64 tiles x that one warpgroup loads through two stages and another multiplies. Bugs: 1 no wait
// for the copy, 2 too few and 3 too many bytes expected, 4 no wait for the stage to be empty, 5 the stage released before the
// wait for its products, 6 no fence.proxy.async and 7 no barrier after the barriers' initialisation, 8 a wrong parity, 9 more
// arrivals than expected, 10 a misaligned destination, 11 a copy that no thread waits for, 12 a copy that completes on the other
// stage's barrier, 13 an ordinary read before the copy is complete, 14 a copy over an ordinary store with no fence.proxy.async,
// 15 a store to an mbarrier, 16 a copy over an mbarrier, 17 a copy beyond its view, 18 an operand beyond its tile.
__global__ void pipeline(const __grid_constant__ TensorMap map, int tiles, float* d, int bug) {
  const Tile64 stages[2] = {Tile64(0), Tile64(Tile64::kBytes)};
  const Shared<uint64_t> barriers(2 * Tile64::kBytes, 4);
  auto full = [&](int i) { return MBarrier(barriers, i % 2); };
  auto empty = [&](int i) { return MBarrier(barriers, 2 + i % 2); };
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) full(i).init(1), empty(i).init(4);
    if (bug != 6) fence_proxy_async();
  }
  if (bug != 7) __syncthreads();
  if (warpgroup_id() == 0) {
    for (int i = 0; threadIdx.x == 0 && i < tiles + (bug == 11); ++i) {
      const unsigned parity = i / 2 % 2;
      if (bug != 4) empty(i).wait(bug == 8 ? parity : !parity);
      if (bug == 14 && i == 0) stages[0].elements.store(100, from_float<__half>(1));
      if (bug == 15 && i == 0) Shared<float>(2 * Tile64::kBytes, 1).store(0, 0);
      full(i).arrive_expecting(bug == 2 ? 0 : bug == 3 ? Tile64::kBytes + 16 : Tile64::kBytes);
      const Shared<__half> to(bug == 16 ? 2 * Tile64::kBytes : i % 2 * Tile64::kBytes, bug == 10 ? 128 * 64 : 64 * 64);
      tma_load(to, bug == 10 ? 64 : bug == 17 ? 32 * 64 : 0, map, {0, i * 64, 0, 0}, full(i + (bug == 12 && i == 0)));
    }
  } else {
    float sums[32] = {};
    for (int i = 0; i < tiles; ++i) {
      if (bug == 13 && threadIdx.x % 32 == 0) (void)stages[i % 2].elements.load(0);
      if (bug != 1) full(i).wait(i / 2 % 2);
      wgmma_fence(sums);
      for (int k = 0; k < 64; k += 16) {
        const uint64_t operand = stages[i % 2].columns_are_k(bug == 18 ? k + 8 : k);
        wgmma<__half, Major::kK>(sums, operand, operand);
      }
      wgmma_commit();
      if (bug == 5 && lane_id() == 0) empty(i).arrive();
      wgmma_wait<0>(sums);
      if ((bug != 5 && lane_id() == 0) || bug == 9) empty(i).arrive();
    }
    store_sums<64>(d, sums);
  }
}
EXPORT(pipeline, const void* x, int tiles, float* d, int bug) {
  const uint64_t rows = uint64_t(tiles) * 64;
  const TensorMap map = tensor_map(x, {{64, rows, 1, 1}, {128, rows * 128, rows * 128}, {64, 64, 1, 1}}, "pipeline");
  launch(::pipeline, "pipeline", LaunchConfig{1, 256, 2 * Tile64::kBytes + (bug == 16 ? Tile64::kBytes : 32)}, nullptr, map,
         tiles, d, bug);
}

// d[rank] = sum of x x^T over the tiles, in each of two blocks. Each block loads one half of a tile for both. Bugs: 1 a stage of
// the other block overwritten before that has read it, 2 the bytes of one half expected, 3 no cluster barrier after the
// initialisation, 4 a half that only its own block receives, 5 a block that the cluster does not have, 6 no cluster barrier at
// the end, 7 the same half loaded by both.
__global__ void multicast(const __grid_constant__ TensorMap map, int tiles, float* d, int bug) {
  const Tile64 stages[2] = {Tile64(0), Tile64(Tile64::kBytes)};
  const Shared<uint64_t> barriers(2 * Tile64::kBytes, 4);
  auto full = [&](int i) { return MBarrier(barriers, i % 2); };
  auto empty = [&](int i) { return MBarrier(barriers, 2 + i % 2); };
  const int rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) full(i).init(1), empty(i).init(bug == 1 ? 4 : 8);
    fence_proxy_async();
  }
  if (bug == 3) __syncthreads();
  else cluster_sync();
  if (warpgroup_id() == 0) {
    for (int i = 0; threadIdx.x == 0 && i < tiles; ++i) {
      empty(i).wait(i / 2 % 2 ^ 1);
      full(i).arrive_expecting(bug == 2 ? Tile64::kBytes / 2 : Tile64::kBytes);
      const int half = bug == 7 ? 0 : rank;
      tma_load_multicast(stages[i % 2].elements, half * 32 * 64, map, {0, i * 64 + half * 32, 0, 0}, full(i),
                         bug == 4   ? 1u << rank
                         : bug == 5 ? 7
                                    : 3);
    }
  } else {
    float sums[32] = {};
    for (int i = 0; i < tiles; ++i) {
      full(i).wait(i / 2 % 2);
      wgmma_fence(sums);
      for (int k = 0; k < 64; k += 16) {
        const uint64_t operand = stages[i % 2].columns_are_k(k);
        wgmma<__half, Major::kK>(sums, operand, operand);
      }
      wgmma_commit();
      wgmma_wait<0>(sums);
      for (int to = 0; lane_id() == 0 && to < 2; ++to) {
        if (to == rank) empty(i).arrive();
        else if (bug != 1) arrive_remote(empty(i), to);
      }
    }
    store_sums<64>(d + rank * 64 * 64, sums);
  }
  if (bug != 6) cluster_sync();
}
EXPORT(multicast, const void* x, int tiles, float* d, int bug) {
  const uint64_t rows = uint64_t(tiles) * 64;
  const TensorMap map = tensor_map(x, {{64, rows, 1, 1}, {128, rows * 128, rows * 128}, {64, 32, 1, 1}}, "multicast");
  launch_together(::multicast, "multicast", LaunchConfig{2, 256, 2 * Tile64::kBytes + 32}, 2, false, map, tiles, d, bug);
}

// One thread waits for what another stored before an mbarrier's first phase. Bug: 1 it reads what comes with the second phase.
__global__ void phases(float* d, int bug) {
  const Shared<float> values(0, 2);
  const MBarrier stored(Shared<uint64_t>(8, 1), 0);
  if (threadIdx.x == 0) {
    stored.init(2);
    fence_proxy_async();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    values.store(0, 1);
    stored.arrive();
    stored.wait(0);
    values.store(1, 2);
    stored.arrive();
  }
  if (threadIdx.x == 32) stored.arrive();
  if (threadIdx.x == 64) {
    stored.wait(0);
    store(d, values.load(bug));
  }
}
EXPORT(phases, float* d, int bug) { launch(::phases, "phases", LaunchConfig{1, 96, 16}, nullptr, d, bug); }

// One warpgroup writes a number for each thread of another. Bugs: 1 more registers than the block has, 2 an increase that is a
// decrease, 3 a missing arrival, 4 different numbers of threads, 5 no barrier, 6 setmaxnreg in half of the warpgroup, 7 an
// arrival before the store, 8 a lane that waits while the others of its warp arrive.
__global__ void roles(float* d, int bug) {
  const Shared<float> values(0, 128);
  const NamedBarrier written(1, 256);
  if (warpgroup_id() == 0) {
    if (bug != 6 || threadIdx.x < 64) release_registers<24>();
    if (bug == 7) written.arrive();
    values.store(threadIdx.x, float(threadIdx.x));
    if (bug == 4) NamedBarrier(1, 384).arrive();
    else if (bug == 8 && threadIdx.x == 3) written.sync();
    else if (bug != 7 && (bug != 3 || threadIdx.x >= 32)) written.arrive();
  } else if (warpgroup_id() == 1) {
    if (bug == 2) acquire_registers<160>();
    else if (bug == 1) acquire_registers<248>();
    else acquire_registers<240>();
    if (bug != 5) written.sync();
    store(d + threadIdx.x % 128, values.load((threadIdx.x + 1) % 128));
  } else {
    acquire_registers<240>();
  }
}
EXPORT(roles, float* d, int bug) { launch(::roles, "roles", LaunchConfig{1, 384, 512}, nullptr, d, bug); }
