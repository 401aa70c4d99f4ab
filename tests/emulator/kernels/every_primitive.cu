// Uses each primitive of csrc/kernels/device once, so that nvcc compiles all of them for each target.
#include <type_traits>

#include "device/barrier.cuh"
#include "device/convert.cuh"
#include "device/cp_async.cuh"
#include "device/dependent_launch.cuh"
#include "device/fragment.cuh"
#include "device/launch.cuh"
#include "device/ldmatrix.cuh"
#include "device/math.cuh"
#include "device/memory.cuh"
#include "device/mma.cuh"
#include "device/reduce.cuh"

using namespace movq;

static_assert(!std::is_default_constructible<Synced>::value, "a Synced comes from a barrier");

template <class T>
__global__ void __launch_bounds__(128) halves(const T* in, T* out, float* sums) {
  const Shared<T> tile(0, 128 * 8);
  const Shared<float> scratch(tile.end(), 4);
  const Shared<Moments> moments(scratch.end(), 4);
  const unsigned i = threadIdx.x * 8;
  cp_async_16(tile, i, in + i, i < 512);
  cp_async_commit();
  cp_async_wait<0>();
  (void)block_barrier();

  uint32_t a[4], b[4];
  ldmatrix_x4(a, tile, lane_id() * 8);
  ldmatrix_x4<true>(b, tile, lane_id() * 8);
  b[0] ^= pack<T>(1.f, 2.f);
  float d[4] = {};
  multiply_add(d, Fragment<T, 4>(a), Fragment<T, 2>(b));
  (void)block_barrier();

  tile.template store_vec<8>(i, load_vec<8, Cache::kStream>(in + i));
  tile.store(i, load(in + i));
  store_vec(out + i, from_float<T>(to_float(load_vec<8>(in + i))));
  store(out + i, from_float<T>(fast_exp2(to_float(tile.load(i)))));
  Moments m = {};
  for (float x : d) m = merge(m, {x, 0, 1});
  m = block_reduce(m, Merge(), moments);
  const float total = block_reduce(warp_all_reduce<kWarpSize>(d[0], Max()), Sum(), scratch);
  if (threadIdx.x == 0) store(sums, total + m.mean);
}

__global__ void floats(const float* in, float* out) {
  allow_next_kernel();
  wait_for_previous_kernel();
  uint32_t a[4], b[2];
  for (uint32_t& x : a) x = to_tf32(load(in++));
  for (uint32_t& x : b) x = to_tf32(load(in++));
  float d[4] = {};
  multiply_add(d, Fragment<float, 4>(a), Fragment<float, 2>(b));
  store(out + threadIdx.x, d[0] + d[1] + d[2] + d[3]);
}

void launch_all(const void* in, void* out, float* sums, cudaStream_t stream) {
  const LaunchConfig config = {grid_size("halves", 1), 128, 128 * 16 + 64};
  launch(halves<__half>, "halves", config, stream, static_cast<const __half*>(in), static_cast<__half*>(out), sums);
  launch(halves<__nv_bfloat16>, "halves", config, stream, static_cast<const __nv_bfloat16*>(in), static_cast<__nv_bfloat16*>(out),
         sums);
  launch_dependent(floats, "floats", LaunchConfig{unsigned(resident_blocks(floats, "floats", 32, 0)), 32}, stream, sums, sums);
}
