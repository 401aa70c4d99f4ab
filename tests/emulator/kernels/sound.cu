// Kernels that use each primitive correctly; test_emulator.py compares their results with numpy.
#include "device/convert.cuh"
#include "device/cp_async.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"
#include "export.h"
#include "unused_primitives.h"

using namespace movq;

// --- Conversions

template <class T>
__global__ void round_floats(const float* x, T* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    store(y + i, from_float<T>(load(x + i)));
}
template <class T>
__global__ void widen(const T* x, float* y, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) store(y + i, to_float(load(x + i)));
}
EXPORT(to_half, const float* x, void* y, int n) {
  launch(round_floats<__half>, "to_half", LaunchConfig{4, 256}, nullptr, x, static_cast<__half*>(y), n);
}
EXPORT(to_bfloat, const float* x, void* y, int n) {
  launch(round_floats<__nv_bfloat16>, "to_bfloat", LaunchConfig{4, 256}, nullptr, x, static_cast<__nv_bfloat16*>(y), n);
}
EXPORT(from_half, const void* x, float* y, int n) {
  launch(widen<__half>, "from_half", LaunchConfig{4, 256}, nullptr, static_cast<const __half*>(x), y, n);
}
EXPORT(from_bfloat, const void* x, float* y, int n) {
  launch(widen<__nv_bfloat16>, "from_bfloat", LaunchConfig{4, 256}, nullptr, static_cast<const __nv_bfloat16*>(x), y, n);
}

// --- Warps

// y[mode][lane]: each shuffle, in segments of `width` lanes.
__global__ void shuffles(const float* x, float* y, int argument, int width) {
  const float v = load(x + lane_id());
  store(y + lane_id(), __shfl_sync(kAllLanes, v, argument, width));
  store(y + 32 + lane_id(), __shfl_up_sync(kAllLanes, v, argument, width));
  store(y + 64 + lane_id(), __shfl_down_sync(kAllLanes, v, argument, width));
  store(y + 96 + lane_id(), __shfl_xor_sync(kAllLanes, v, argument, width));
}
EXPORT(shuffles, const float* x, float* y, int argument, int width) {
  launch(::shuffles, "shuffles", LaunchConfig{1, 32}, nullptr, x, y, argument, width);
}

// Votes of the whole warp, of its even and its odd lanes separately, and of the block.
__global__ void votes(const int* x, unsigned* y) {
  const int p = load(x + threadIdx.x);
  unsigned* mine = y + threadIdx.x * 8;
  store(mine, __ballot_sync(kAllLanes, p));
  store(mine + 1, unsigned(__any_sync(kAllLanes, p)));
  store(mine + 2, unsigned(__all_sync(kAllLanes, p)));
  const unsigned peers = lane_id() % 2 ? 0xaaaaaaaau : 0x55555555u;
  store(mine + 3, __ballot_sync(peers, p));
  store(mine + 4, unsigned(__syncthreads_count(p)));
  store(mine + 5, unsigned(__syncthreads_or(p)));
  store(mine + 6, unsigned(__syncthreads_and(p)));
  store(mine + 7, threadIdx.x);
}
EXPORT(votes, const int* x, unsigned* y, int threads) { launch(::votes, "votes", LaunchConfig{1, threads}, nullptr, x, y); }

// --- Reductions

__global__ void moments(const float* x, float* y, int n) {
  const Shared<Moments> scratch(0, blockDim.x / kWarpSize);
  Moments m = {};
  for (int i = threadIdx.x; i < n; i += blockDim.x) m = merge(m, {load(x + i), 0, 1});
  m = block_reduce(m, Merge(), scratch);
  const Shared<float> reused(0, blockDim.x / kWarpSize);  // block_reduce() leaves its scratch free
  const float maximum = block_reduce(load(x + threadIdx.x % n), Max(), reused);
  if (threadIdx.x == blockDim.x - 1) {
    store(y, m.mean);
    store(y + 1, m.m2 / m.count);
    store(y + 2, maximum);
  }
}
EXPORT(moments, const float* x, float* y, int n, int threads) {
  launch(::moments, "moments", LaunchConfig{1, threads, threads / 32 * sizeof(Moments)}, nullptr, x, y, n);
}

// --- Tensor cores

// d += a b with a 16x16 and b 16x8, both row-major, through shared memory and ldmatrix.
template <class T>
__global__ void matmul(const T* a, const T* b, float* d) {
  const Shared<T> sa(0, 256), sb(sa.end(), 128);
  cp_async_16(sa, lane_id() * 8, a + lane_id() * 8, true);
  if (lane_id() < 16) cp_async_16(sb, lane_id() * 8, b + lane_id() * 8, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t fa[4], fb[2];
  ldmatrix_x4(fa, sa, lane_id() % 16 * 16 + lane_id() / 16 * 8);
  ldmatrix<true>(fb, sb, lane_id() % 16 * 8);
  float fd[4];
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
  for (int i = 0; i < 4; ++i) fd[i] = load(d + (row + i / 2 * 8) * 8 + column + i % 2);
  mma_m16n8k16<T>(fd, fa, fb);
  for (int i = 0; i < 4; ++i) store(d + (row + i / 2 * 8) * 8 + column + i % 2, fd[i]);
}
template <class T>
void launch_matmul(const void* a, const void* b, float* d) {
  launch(matmul<T>, "matmul", LaunchConfig{1, 32, 384 * 2}, nullptr, static_cast<const T*>(a), static_cast<const T*>(b), d);
}
EXPORT(matmul_half, const void* a, const void* b, float* d) { launch_matmul<__half>(a, b, d); }
EXPORT(matmul_bfloat, const void* a, const void* b, float* d) { launch_matmul<__nv_bfloat16>(a, b, d); }

__global__ void matmul_tf32(const float* a, const float* b, float* d) {  // 16x8 by 8x8
  const int row = lane_id() / 4, member = lane_id() % 4;
  auto a_at = [&](int r, int c) { return to_tf32(load(a + r * 8 + c)); };
  auto b_at = [&](int r) { return to_tf32(load(b + r * 8 + row)); };
  const uint32_t fa[4] = {a_at(row, member), a_at(row + 8, member), a_at(row, member + 4), a_at(row + 8, member + 4)};
  const uint32_t fb[2] = {b_at(member), b_at(member + 4)};
  float fd[4] = {};
  mma_m16n8k8_tf32(fd, fa, fb);
  for (int i = 0; i < 4; ++i) store(d + (row + i / 2 * 8) * 8 + member * 2 + i % 2, fd[i]);
}
EXPORT(matmul_tf32, const float* a, const float* b, float* d) {
  launch(::matmul_tf32, "matmul_tf32", LaunchConfig{1, 32}, nullptr, a, b, d);
}

// Row r of matrix m is x[m][r]; y[lane][m] is the register that the lane receives.
template <bool Transposed, int Count>
__global__ void matrices(const __half* x, uint32_t* y) {
  const Shared<__half> s(0, Count * 64);
  if (lane_id() < 8 * Count) s.store_vec(lane_id() * 8, load_vec<8>(x + lane_id() * 8));
  __syncwarp();
  uint32_t r[Count];
  if constexpr (Count == 4) ldmatrix_x4<Transposed>(r, s, lane_id() * 8);
  else ldmatrix<Transposed>(r, s, lane_id() * 8);
  for (int m = 0; m < Count; ++m) store(y + lane_id() * Count + m, r[m]);
}
EXPORT(matrices, const void* x, unsigned* y, int count, bool transposed) {
  auto go = [&](auto kernel) {
    launch(kernel, "matrices", LaunchConfig{1, 32, count * 128u}, nullptr, static_cast<const __half*>(x), y);
  };
  if (count == 1) transposed ? go(matrices<true, 1>) : go(matrices<false, 1>);
  if (count == 2) transposed ? go(matrices<true, 2>) : go(matrices<false, 2>);
  if (count == 4) transposed ? go(matrices<true, 4>) : go(matrices<false, 4>);
}

// --- Asynchronous copies

// Each thread copies N floats. Copies that start at or beyond element n are not valid: they must write zeros and read nothing.
template <int N>
__global__ void copy_valid(const float* x, float* y, int n) {
  const Shared<float> tile(0, N * blockDim.x);
  const int i = threadIdx.x * N;
  if constexpr (N == 4) cp_async_16(tile, i, x + i, i < n);
  else cp_async<4 * N>(tile, i, x + i, i < n);
  cp_async_commit();
  cp_async_wait<0>();
  for (int k = 0; k < N; ++k) store(y + i + k, tile.load(i + k));  // the thread's own copy needs no barrier
}
EXPORT(copy_valid, const float* x, float* y, int n, int width) {
  auto go = [&](auto kernel) { launch(kernel, "copy_valid", LaunchConfig{1, 64, 64u * width * 4}, nullptr, x, y, n); };
  if (width == 1) go(copy_valid<1>);
  if (width == 2) go(copy_valid<2>);
  if (width == 4) go(copy_valid<4>);
}

// --- Clusters and grids

// Each block of a cluster adds up the values of all its blocks.
__global__ void cluster_sum(const float* x, float* y) {
  const Shared<float> mine(0, blockDim.x);
  mine.store(threadIdx.x, load(x + blockIdx.x * blockDim.x + threadIdx.x));
  cluster_sync();
  float sum = 0;
  for (unsigned rank = 0; rank < cluster_size(); ++rank) sum += cluster_load(mine, threadIdx.x, rank);
  const Shared<Vec<float, 4>> vectors(0, blockDim.x / 4);
  sum += 0 * cluster_load(vectors, threadIdx.x / 4, cluster_rank() ^ 1)[3];  // a wide read must work too
  store(y + blockIdx.x * blockDim.x + threadIdx.x, sum);
  cluster_sync();
}
EXPORT(cluster_sum, const float* x, float* y, int blocks, int threads, int cluster) {
  launch_together(::cluster_sum, "cluster_sum", LaunchConfig{blocks, threads, threads * 4u}, cluster, false, x, y);
}

// Each block leaves a partial sum; after the barrier each adds up all of them.
__global__ void grid_sum(const float* x, float* parts, float* y) {
  const Shared<float> scratch(0, kWarpSize);
  const float part = block_reduce(load(x + blockIdx.x * blockDim.x + threadIdx.x), Sum(), scratch);
  if (threadIdx.x == 0) store(parts + blockIdx.x, part);
  grid_sync();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += load(parts + b);
  if (threadIdx.x == 0) store(y + blockIdx.x, sum);
}
EXPORT(grid_sum, const float* x, float* parts, float* y, int blocks, int threads) {
  launch_together(::grid_sum, "grid_sum", LaunchConfig{blocks, threads, 128}, 1, true, x, parts, y);
}

// The last block to finish adds up the parts of all; its ticket tells it that it is the last.
__global__ void last_block(const float* x, float* parts, unsigned* ticket, float* y) {
  const Shared<unsigned> mine(0, 1);
  if (threadIdx.x == 0) {
    store(parts + blockIdx.x, load(x + blockIdx.x));
    __threadfence();
    mine.store(0, atomic_add(ticket, 1u));
  }
  __syncthreads();
  if (mine.load(0) != gridDim.x - 1) return;
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += load(parts + b);
  if (threadIdx.x == 0) store(y, sum);
}
EXPORT(last_block, const float* x, float* parts, unsigned* ticket, float* y, int blocks) {
  launch(::last_block, "last_block", LaunchConfig{blocks, 64, 4}, nullptr, x, parts, ticket, y);
}

// --- Indices and counters

__global__ void where_am_i(unsigned* y) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned i = block * (blockDim.x * blockDim.y * blockDim.z) + thread;
  store(y + i, i);
}
EXPORT(where_am_i, unsigned* y) { launch(::where_am_i, "where_am_i", LaunchConfig{dim3(2, 3, 4), dim3(5, 6, 7)}, nullptr, y); }

// Each lane reads one float, `stride` floats from the next, and passes it through shared memory with the same stride.
__global__ void strided(const float* x, float* y, int stride) {
  const Shared<float> s(0, 32 * stride);
  s.store(lane_id() * stride, load(x + lane_id() * stride));
  store(y + lane_id(), s.load(lane_id() * stride));
}
EXPORT(strided, const float* x, float* y, int stride) {
  launch(::strided, "strided", LaunchConfig{1, 32, 128u * stride}, nullptr, x, y, stride);
}

// Rows of 16 bytes, `pitch` bytes apart, stored by wide accesses and loaded by ldmatrix.
__global__ void pitched(const __half* x, uint32_t* y, int pitch) {
  const Shared<__half> s(0, 8 * pitch / 2);
  if (lane_id() < 8) s.store_vec(lane_id() * pitch / 2, load_vec<8>(x + lane_id() * 8));
  __syncwarp();
  uint32_t r[1];
  ldmatrix<false>(r, s, lane_id() % 8 * pitch / 2);
  store(y + lane_id(), r[0]);
}
EXPORT(pitched, const void* x, unsigned* y, int pitch) {
  launch(::pitched, "pitched", LaunchConfig{1, 32, 8u * pitch}, nullptr, static_cast<const __half*>(x), y, pitch);
}

// Lanes loop different numbers of times, and their accesses must still be grouped into the right requests.
__global__ void ragged(const float* x, float* y, int n) {
  float sum = 0;
  for (int i = lane_id(); i < n; i += 32) sum += load(x + i);
  store(y + lane_id(), sum);
}
EXPORT(ragged, const float* x, float* y, int n) { launch(::ragged, "ragged", LaunchConfig{1, 32}, nullptr, x, y, n); }
