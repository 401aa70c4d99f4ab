// Kernels with one bug each, which the argument `bug` turns on. test_emulator.py checks that each bug is reported, and that
// nothing is reported without it.
#include "device/barrier.cuh"
#include "device/cp_async.cuh"
#include "device/dependent_launch.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "export.h"
#include "unused_primitives.h"

using namespace movq;

// y[i] = x[n - 1 - i], through shared memory.
__global__ void missing_barrier(const float* x, float* y, bool bug) {
  const Shared<float> tile(0, blockDim.x);
  tile.store(threadIdx.x, load(x + threadIdx.x));
  if (!bug) __syncthreads();
  store(y + threadIdx.x, tile.load(blockDim.x - 1 - threadIdx.x));
}
EXPORT(missing_barrier, const float* x, float* y, int n, bool bug) {
  launch(::missing_barrier, "missing_barrier", LaunchConfig{1, n, n * 4u}, nullptr, x, y, bug);
}

// The second round overwrites values that other threads may still read.
__global__ void missing_second_barrier(const float* x, float* y, bool bug) {
  const Shared<float> tile(0, blockDim.x);
  for (int round = 0; round < 2; ++round) {
    if (!bug && round) __syncthreads();
    tile.store(threadIdx.x, load(x + threadIdx.x) + round);
    __syncthreads();
    store(y + threadIdx.x, tile.load((threadIdx.x + 1) % blockDim.x));
  }
}
EXPORT(missing_second_barrier, const float* x, float* y, int n, bool bug) {
  launch(::missing_second_barrier, "missing_second_barrier", LaunchConfig{1, n, n * 4u}, nullptr, x, y, bug);
}

// Within a warp __syncwarp orders accesses; a shuffle does not.
__global__ void missing_syncwarp(const float* x, float* y, bool bug) {
  const Shared<float> tile(0, kWarpSize);
  tile.store(lane_id(), load(x + lane_id()));
  if (!bug) __syncwarp();
  const float next = tile.load((lane_id() + 1) % kWarpSize);
  store(y + lane_id(), __shfl_xor_sync(kAllLanes, next, 1));
}
EXPORT(missing_syncwarp, const float* x, float* y, bool bug) {
  launch(::missing_syncwarp, "missing_syncwarp", LaunchConfig{1, kWarpSize, 128}, nullptr, x, y, bug);
}

// All threads write the same word.
__global__ void write_race(float* y, bool bug) {
  const Shared<float> word(0, 1);
  if (bug || threadIdx.x == 0) word.store(0, float(threadIdx.x));
  __syncthreads();
  store(y + threadIdx.x, word.load(0));
}
EXPORT(write_race, float* y, int n, bool bug) { launch(::write_race, "write_race", LaunchConfig{1, n, 4}, nullptr, y, bug); }

__global__ void global_bounds(const float* x, float* y, int n, bool bug) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (bug || i < n) store(y + i, load(x + (i < n ? i : 0)));
}
EXPORT(global_bounds, const float* x, float* y, int n, bool bug) {
  launch(::global_bounds, "global_bounds", LaunchConfig{ceil_div(n, 64), 64}, nullptr, x, y, n, bug);
}

__global__ void global_read_before(const float* x, float* y, bool bug) {
  store(y + threadIdx.x, load(x + int(threadIdx.x) - (bug ? 1 : 0)));
}
EXPORT(global_read_before, const float* x, float* y, int n, bool bug) {
  launch(::global_read_before, "global_read_before", LaunchConfig{1, n}, nullptr, x, y, bug);
}

__global__ void writes_const(const float* x, bool bug) {
  if (bug) store(const_cast<float*>(x), 0.f);
}
EXPORT(writes_const, const float* x, bool bug) { launch(::writes_const, "writes_const", LaunchConfig{1, 1}, nullptr, x, bug); }

__global__ void raw_pointer(const float* x, float* y, bool bug) { store(y, bug ? *x : load(x)); }
EXPORT(raw_pointer, const float* x, float* y, bool bug) {
  launch(::raw_pointer, "raw_pointer", LaunchConfig{1, 1}, nullptr, x, y, bug);
}

__global__ void misaligned(const float* x, float* y, bool bug) { store(y, load_vec<4>(x + (bug ? 1 : 0))[0]); }
EXPORT(misaligned, const float* x, float* y, bool bug) {
  launch(::misaligned, "misaligned", LaunchConfig{1, 1}, nullptr, x, y, bug);
}

__global__ void misaligned_shared(float* y, bool bug) {
  const Shared<float> tile(0, 8);
  for (int i = 0; i < 8; ++i) tile.store(i, float(i));
  const Shared<Vec<float, 4>> vector(bug ? 4 : 16, 1);
  store(y, vector.load(0)[0]);
}
EXPORT(misaligned_shared, float* y, bool bug) {
  launch(::misaligned_shared, "misaligned_shared", LaunchConfig{1, 1, 32}, nullptr, y, bug);
}

// Reads past the view but inside the block's memory; shared_bounds goes past that too.
__global__ void shared_view(float* y, bool bug) {
  const Shared<float> mine(0, 4), other(mine.end(), 4);
  other.store(0, 1.f);
  store(y, bug ? mine.load(4) : other.load(0));
}
EXPORT(shared_view, float* y, bool bug) { launch(::shared_view, "shared_view", LaunchConfig{1, 1, 32}, nullptr, y, bug); }

__global__ void shared_bounds(float* y, bool bug) {
  const Shared<float> tile(0, 8);
  tile.store(bug ? 4 : 3, 1.f);
  store(y, 1.f);
}
EXPORT(shared_bounds, float* y, bool bug) { launch(::shared_bounds, "shared_bounds", LaunchConfig{1, 1, 16}, nullptr, y, bug); }

__global__ void unwritten_shared(float* y, bool bug) {
  const Shared<float> tile(0, 2);
  tile.store(0, 1.f);
  store(y, tile.load(bug ? 1 : 0));
}
EXPORT(unwritten_shared, float* y, bool bug) {
  launch(::unwritten_shared, "unwritten_shared", LaunchConfig{1, 1, 8}, nullptr, y, bug);
}

// bug 1: no wait. 2: a wait for one group too few. 3: reads another thread's copy after the wait, without a barrier.
__global__ void async_copy(const float* x, float* y, int bug) {
  const Shared<float> tile(0, 8 * blockDim.x);
  const int i = threadIdx.x * 4, half = 4 * blockDim.x;
  cp_async_16(tile, i, x + i, true);
  cp_async_commit();
  cp_async_16(tile, half + i, x + half + i, true);
  cp_async_commit();
  if (bug == 2) cp_async_wait<1>();
  else if (bug != 1) cp_async_wait<0>();
  if (bug != 3) __syncthreads();
  const int next = (i + 4) % half;
  const Shared<Vec<float, 4>> vectors(0, 2 * blockDim.x);
  store_vec(y + next, vectors.load(next / 4));
  store_vec(y + half + next, vectors.load((half + next) / 4));
}
EXPORT(async_copy, const float* x, float* y, int threads, int bug) {
  launch(::async_copy, "async_copy", LaunchConfig{1, threads, threads * 32u}, nullptr, x, y, bug);
}

// The copy of the next stage overwrites a stage that other threads still read.
__global__ void async_overwrite(const float* x, float* y, bool bug) {
  const Shared<float> tile(0, 4 * blockDim.x);
  const Shared<Vec<float, 4>> vectors(0, blockDim.x);
  const int i = threadIdx.x * 4, all = 4 * blockDim.x;
  for (int stage = 0; stage < 2; ++stage) {
    cp_async_16(tile, i, x + stage * all + i, true);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    store_vec(y + stage * all + i, vectors.load((i + 4) % all / 4));
    if (!bug) __syncthreads();
  }
}
EXPORT(async_overwrite, const float* x, float* y, int threads, bool bug) {
  launch(::async_overwrite, "async_overwrite", LaunchConfig{1, threads, threads * 16u}, nullptr, x, y, bug);
}

// bug 1: half of the block does not wait. 2: the halves wait at two different barriers. 3: some threads return first. 4: as 2,
// with block_barrier().
__global__ void divergent_barrier(float* y, int bug) {
  const bool low = threadIdx.x < blockDim.x / 2;
  if (bug == 3 && low) return;
  if (bug == 2 && low) {
    __syncthreads();
  } else if (bug == 4 && low) {
    (void)block_barrier();
  } else if (bug == 4) {
    (void)block_barrier();
  } else if (bug != 1 || low) {
    __syncthreads();
  }
  store(y + threadIdx.x, 1.f);
}
EXPORT(divergent_barrier, float* y, int n, int bug) {
  launch(::divergent_barrier, "divergent_barrier", LaunchConfig{1, n}, nullptr, y, bug);
}

// bug 1: lanes in the mask do not take part. 2: lanes of one mask are at different instructions.
__global__ void divergent_shuffle(float* y, int bug) {
  float v = lane_id();
  if (bug == 0 || lane_id() < 16) v = __shfl_xor_sync(kAllLanes, v, 1);
  else if (bug == 2) v = __shfl_down_sync(kAllLanes, v, 1);
  store(y + threadIdx.x, v);
}
EXPORT(divergent_shuffle, float* y, int bug) {
  launch(::divergent_shuffle, "divergent_shuffle", LaunchConfig{1, 32}, nullptr, y, bug);
}

// bug 1: reads before the cluster's barrier. 2: ends while other blocks may read its memory.
__global__ void cluster_barriers(float* y, int bug) {
  const Shared<float> mine(0, 1);
  mine.store(0, float(blockIdx.x));
  if (bug != 1) cluster_sync();
  store(y + blockIdx.x, cluster_load(mine, 0, cluster_rank() ^ 1));
  if (bug != 2) cluster_sync();
}
EXPORT(cluster_barriers, float* y, int blocks, int bug) {
  launch_together(::cluster_barriers, "cluster_barriers", LaunchConfig{blocks, 1, 4}, 2, false, y, bug);
}

// Each block changes what the previous one left in global memory, so the result depends on the order of the blocks.
__global__ void order_of_blocks(float* y, bool bug) {
  if (bug) store(y, load(y) * 2 + blockIdx.x);
}
EXPORT(order_of_blocks, float* y, bool bug) { launch(::order_of_blocks, "order_of_blocks", LaunchConfig{8, 1}, nullptr, y, bug); }

// The second kernel of a chain reads what the first one writes, and overwrites what it reads.
enum DependentBug { kNone, kReadsBeforeWait, kWritesBeforeWait, kDoesNotWait, kIsFirst };

__global__ void first_of_chain(const float* x, const float* y, float* between) {
  allow_next_kernel();
  store(between + threadIdx.x, load(x + threadIdx.x) + load(y + threadIdx.x));
}

__global__ void dependent_launch(const float* x, const float* between, float* y, DependentBug bug) {
  const int i = threadIdx.x;
  const float own = load(x + i);  // no kernel writes it
  if (bug == kReadsBeforeWait) load(between + i);
  if (bug == kWritesBeforeWait) store(y + i, own);
  if (bug == kDoesNotWait && i == int(blockDim.x) - 1) return;
  wait_for_previous_kernel();
  store(y + i, own + load(between + i));
}
EXPORT(dependent_launch, const float* x, float* between, float* y, int n, int bug) {
  if (bug != kIsFirst) launch(first_of_chain, "first_of_chain", LaunchConfig{1, n}, nullptr, x, y, between);
  launch_dependent(::dependent_launch, "dependent_launch", LaunchConfig{1, n}, nullptr, x, between, y, DependentBug(bug));
}

__global__ void local_array(const int* index, float* y) {
  float values[4] = {1, 2, 3, 4};
  float* p = values;
  asm volatile("" : "+r"(p));  // hides the array from the optimizer
  store(y, p[load(index)]);
}
EXPORT(local_array, const int* index, float* y) { launch(::local_array, "local_array", LaunchConfig{1, 1}, nullptr, index, y); }

__global__ void overflow(const int* x, int* y) { store(y, load(x) * 65536); }
EXPORT(overflow, const int* x, int* y) { launch(::overflow, "overflow", LaunchConfig{1, 1}, nullptr, x, y); }

// One 16x16 by 16x8 product; the bug swaps a's lower rows and its right columns.
__global__ void fragment(const __half* a, const __half* b, float* d, bool bug) {
  const int row = lane_id() / 4, pair = lane_id() % 4 * 2;
  auto two = [](__half low, __half high) { return pack<__half>(to_float(low), to_float(high)); };
  auto a_at = [&](int r, int c) { return two(load(a + r * 16 + c), load(a + r * 16 + c + 1)); };
  auto b_at = [&](int r) { return two(load(b + r * 8 + row), load(b + (r + 1) * 8 + row)); };
  uint32_t fa[4] = {a_at(row, pair), a_at(row + 8, pair), a_at(row, pair + 8), a_at(row + 8, pair + 8)};
  if (bug) {
    const uint32_t swapped = fa[1];
    fa[1] = fa[2];
    fa[2] = swapped;
  }
  const uint32_t fb[2] = {b_at(pair), b_at(pair + 8)};
  float fd[4] = {};
  mma_m16n8k16<__half>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) store(d + (row + i / 2 * 8) * 8 + pair + i % 2, fd[i]);
}
EXPORT(fragment, const void* a, const void* b, float* d, bool bug) {
  launch(::fragment, "fragment", LaunchConfig{1, 32}, nullptr, static_cast<const __half*>(a), static_cast<const __half*>(b), d,
         bug);
}

__global__ void spin(float* y) {
  while (load(y) != 1.f) {
  }
}
EXPORT(spin, float* y) { launch(::spin, "spin", LaunchConfig{1, 1}, nullptr, y); }

__global__ void nothing() {}

// Opts in to shared memory for this launch instead of for the device, or not at all.
EXPORT(opt_in, int64_t shared_bytes, int bug) {
  const auto* kernel = reinterpret_cast<const void*>(nothing);
  if (bug == 0) allow_shared_memory(nothing, "nothing", shared_bytes);
  if (bug == 1) emu::set_max_shared_memory(kernel, int(shared_bytes));
  emu::launch("nothing", {1, 32, size_t(shared_bytes), 1, false, kernel}, [] {});
}

EXPORT(shape, int grid, int threads, int64_t shared_bytes, int cluster, bool cooperative) {
  launch_together(nothing, "nothing", LaunchConfig{grid, threads, size_t(shared_bytes)}, cluster, cooperative);
}
