// Every primitive of csrc/kernels/device, once, for nvcc: each must compile for each target, and mean the same on each.
#include "device/cluster.cuh"
#include "device/convert.cuh"
#include "device/cp_async.cuh"
#include "device/grid.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/math.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"

using namespace movq;

template <class T>
__global__ void __launch_bounds__(128) halves(const T* in, T* out, float* sums, unsigned* ticket) {
  const Shared<T> tile(0, 128 * 8);
  const Shared<float> scratch(tile.end(), 4);
  const Shared<Moments> moments(scratch.end(), 4);
  const unsigned i = threadIdx.x * 8;
  cp_async<8>(tile, i, in + i, i < 512);
  cp_async_commit();
  cp_async_wait<0>();
  cp_async<4>(tile, i, in + i);
  cp_async<2>(tile, i + 4, in + i + 4);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  uint32_t a[4], b[2], c[1];
  ldmatrix(a, tile, lane_id() * 8);
  ldmatrix<true>(a, tile, lane_id() * 8);
  ldmatrix(b, tile, lane_id() % 16 * 8);
  ldmatrix<true>(b, tile, lane_id() % 16 * 8);
  ldmatrix(c, tile, lane_id() % 8 * 8);
  ldmatrix<true>(c, tile, lane_id() % 8 * 8);
  b[0] ^= c[0] ^ pack<T>(1.f, 2.f);
  float d[4] = {};
  mma_m16n8k16<T>(d, a, b);
  __syncthreads();

  tile.store_vec(i, load_vec<8, Cache::kStream>(in + i));
  store_vec<Cache::kStream>(out + i, from_float<T>(to_float(tile.load_vec<8>(i))));
  store_vec(out + i, load_vec<8>(in + i));
  store(out + i, from_float<T>(fast_exp2(to_float(load(in + i)))));
  Moments m = {};
  for (float x : d) add(m, x);
  m = block_reduce(m, Merge(), moments);
  const float total = block_reduce(warp_all_reduce(d[0], Max()), Sum(), scratch);
  if (threadIdx.x == 0 && atomic_add(ticket, 1u) == 0) store(sums, total + m.mean + broadcast(m.m2));
}

__global__ void tf32(const float* in, float* out) {
  uint32_t a[4], b[2];
  for (uint32_t& x : a) x = to_tf32(load(in++));
  for (uint32_t& x : b) x = to_tf32(load(in++));
  float d[4] = {};
  mma_m16n8k8_tf32(d, a, b);
  store(out + threadIdx.x, d[0] + d[1] + d[2] + d[3]);
}

__global__ void neighbours(float* out) {
  const Shared<float> mine(0, 4);
  if (threadIdx.x < 4) mine.store(threadIdx.x, float(cluster_rank()));
  cluster_sync();
  const unsigned next = (cluster_rank() + 1) % cluster_size();
  const Shared<Moments> structs(0, 1);
  store(out, cluster_load(structs, 0, next).m2 + cluster_load(mine, 0, next) + cluster_load_vec<2>(mine, 0, next)[1] +
                 cluster_load_vec<4>(mine, 0, next)[3]);
  cluster_sync();
}

__global__ void whole_grid(float* out) {
  store(out + blockIdx.x, 1.f);
  grid_sync();
  store(out + blockIdx.x, load(out + (blockIdx.x + 1) % gridDim.x));
}

void launch_all(const void* in, void* out, float* sums, unsigned* ticket, cudaStream_t stream) {
  const Launch small = {1, 128, 128 * 16 + 64};
  launch(halves<__half>, "halves", small, stream, static_cast<const __half*>(in), static_cast<__half*>(out), sums, ticket);
  launch(halves<__nv_bfloat16>, "halves", small, stream, static_cast<const __nv_bfloat16*>(in), static_cast<__nv_bfloat16*>(out),
         sums, ticket);
  launch(tf32, "tf32", Launch{1, 32}, stream, sums, sums);
  launch(neighbours, "neighbours", Launch{4, 32, 16, 2}, stream, sums);
  launch(whole_grid, "whole_grid", Launch{resident_blocks(whole_grid, "whole_grid", 32, 0), 32, 0, 1, true}, stream, sums);
}
