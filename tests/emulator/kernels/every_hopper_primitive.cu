// Uses each Hopper primitive of csrc/kernels/device once, so that nvcc compiles all of them for sm_90a.
#include "device/memory.cuh"
#include "device/swizzled_tile.cuh"
#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"

using namespace movq;

template <class T, int N>
MOVQ_DEVICE float products(const SwizzledTile<T, 64, 64>& a, const SwizzledTile<T, 64, N>& b, const SwizzledTile<T, N, 64>& c) {
  float d[N / 2];
  uint32_t registers[4] = {threadIdx.x, 1, 2, 3};
  wgmma_fence(d, registers);
  wgmma<T, Major::kMN>(d, a.columns_are_k(0), b.rows_are_k(0, 0), false);
  wgmma<T, Major::kK>(d, a.columns_are_k(16), c.columns_are_k(16));
  wgmma<T, Major::kMN>(d, registers, b.rows_are_k(16, 0));
  wgmma<T, Major::kK>(d, registers, c.columns_are_k(16));
  wgmma_commit();
  wgmma_wait<0>(d, registers);
  float sum = 0;
  for (float value : d) sum += value;
  return sum;
}

template <class T>
__global__ void __launch_bounds__(128, 1) multiply(float* out) {
#ifdef MOVQ_SM90A
  const SwizzledTile<T, 64, 64> a(0);
  float sum = products<T, 64>(a, SwizzledTile<T, 64, 64>(a.kBytes), SwizzledTile<T, 64, 64>(a.kBytes));
  sum += products<T, 128>(a, SwizzledTile<T, 64, 128>(a.kBytes), SwizzledTile<T, 128, 64>(a.kBytes));
  sum += products<T, 256>(a, SwizzledTile<T, 64, 256>(a.kBytes), SwizzledTile<T, 256, 64>(a.kBytes));
  float d[16] = {1.0f};
  uint32_t registers[4] = {1, 2, 3, 4};
  const SwizzledTile<T, 32, 64> few(a.kBytes);
  wgmma_fence(d, registers);
  wgmma<T, Major::kK>(d, a.columns_are_k(0), few.columns_are_k(0));
  wgmma<T, Major::kK>(d, registers, few.columns_are_k(0));
  wgmma_commit();
  wgmma_wait<0>(d, registers);
  store(out + threadIdx.x, sum + d[0] + d[15]);
#else
  (void)out;
  __trap();
#endif
}

__global__ void __launch_bounds__(256, 1) copy(const __grid_constant__ TensorMap map, float* out) {
#ifdef MOVQ_SM90A
  const SwizzledTile<__half, 64, 64> a(0);
  const Shared<uint64_t> barriers(a.kBytes, 2);
  const MBarrier full(barriers, 0), empty(barriers, 1);
  if (threadIdx.x == 0) {
    full.init(1);
    empty.init(128);
    a.elements.store(a.index(1, 2), from_float<__half>(1));
    fence_proxy_async();
  }
  __syncthreads();
  const NamedBarrier done(1, 256);
  if (warpgroup_id() == 0) {
    release_registers<40>();
    if (threadIdx.x == 0) {
      empty.wait(1);
      full.arrive_expecting(a.kBytes);
      tma_load(a.elements, 0, map, {0, 0, 0, 0}, full);
    }
    __syncwarp();
    done.arrive();
  } else {
    acquire_registers<248>();
    full.wait(0);
    empty.arrive();
    done.sync();
    store(out + threadIdx.x, to_float(a.elements.load(threadIdx.x)));
  }
#else
  (void)map, (void)out;
  __trap();
#endif
}

void launch_all(const void* data, float* out, cudaStream_t stream) {
  const TensorShape shape = {{64, 64, 1, 1}, {128, 128 * 64, 128 * 64}, {64, 64, 1, 1}};
  launch(multiply<__half>, "multiply", LaunchConfig{1, 128, 48 * 1024}, stream, out);
  launch(multiply<__nv_bfloat16>, "multiply", LaunchConfig{1, 128, 48 * 1024}, stream, out);
  launch(copy, "copy", LaunchConfig{1, 256, 48 * 1024}, stream, tensor_map(data, shape, "copy"), out);
}
