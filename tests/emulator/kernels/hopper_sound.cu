// Hopper primitives with operands that the test lays out; test_hopper.py compares the results with numpy.
#include "device/launch.cuh"
#include "device/memory.cuh"
#include "device/tma.cuh"
#include "device/warpgroup.cuh"
#include "device/wgmma.cuh"
#include "export.h"

using namespace movq;

// d (64 x N) = a b for operands in an image of shared memory. With a_rows, a is a row-major matrix of 64 x 16 in registers.
template <class T, int N, Major b_major>
__global__ void product(const uint4* image, int chunks, const T* a_rows, uint64_t a, uint64_t b, float* d) {
  const Shared<Vec<float, 4>> shared(0, chunks);
  for (int i = threadIdx.x; i < chunks; i += blockDim.x)
    shared.store(i, load_vec<4>(reinterpret_cast<const float*>(image) + 4 * i));
  fence_proxy_async();
  __syncthreads();
  const int row = warp_id() * 16 + lane_id() / 4, column = lane_id() % 4 * 2;
  float sums[N / 2];
  for (float& sum : sums) sum = 1e30f;
  uint32_t registers[4] = {};
  for (int i = 0; a_rows && i < 4; ++i) {
    const T* at = a_rows + (row + i % 2 * 8) * 16 + column + i / 2 * 8;
    registers[i] = pack<T>(to_float(load(at)), to_float(load(at + 1)));
  }
  wgmma_fence(sums, registers);
  if (a_rows) wgmma<T, b_major>(sums, registers, b, false);
  else wgmma<T, b_major>(sums, a, b, false);
  wgmma_commit();
  wgmma_wait<0>(sums, registers);
  for (int i = 0; i < N / 2; ++i) store(d + (row + i / 2 % 2 * 8) * N + i / 4 * 8 + column + i % 2, sums[i]);
}

template <class T, int N>
void run_product(const void* image, int chunks, const void* a_rows, int64_t a, int64_t b, bool b_mn_major, float* d) {
  launch(b_mn_major ? product<T, N, Major::kMN> : product<T, N, Major::kK>, "product", LaunchConfig{1, 128, size_t(chunks) * 16},
         nullptr, static_cast<const uint4*>(image), chunks, static_cast<const T*>(a_rows), uint64_t(a), uint64_t(b), d);
}
template <class T>
void run_product(int n, const void* image, int chunks, const void* a_rows, int64_t a, int64_t b, bool b_mn_major, float* d) {
  if (n == 32) run_product<T, 32>(image, chunks, a_rows, a, b, b_mn_major, d);
  if (n == 64) run_product<T, 64>(image, chunks, a_rows, a, b, b_mn_major, d);
  if (n == 128) run_product<T, 128>(image, chunks, a_rows, a, b, b_mn_major, d);
  if (n == 256) run_product<T, 256>(image, chunks, a_rows, a, b, b_mn_major, d);
}
EXPORT(product, const void* image, int chunks, const void* a_rows, int64_t a, int64_t b, bool b_mn_major, bool half, int n,
       float* d) {
  if (half) run_product<__half>(n, image, chunks, a_rows, a, b, b_mn_major, d);
  else run_product<__nv_bfloat16>(n, image, chunks, a_rows, a, b, b_mn_major, d);
}

// The shared memory that one copy writes.
__global__ void box(const __grid_constant__ TensorMap map, Coordinates from, int bytes, unsigned* y) {
  const Shared<unsigned> words(0, bytes / 4);
  const Shared<uint64_t> barriers(bytes, 1);
  const MBarrier full(barriers, 0);
  if (threadIdx.x == 0) {
    full.init(1);
    fence_proxy_async();
    full.arrive_expecting(bytes);
    tma_load(words, 0, map, from, full);
  }
  __syncthreads();
  full.wait(0);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) store(y + i, words.load(i));
}
EXPORT(box, const void* x, int s0, int s1, int s2, int s3, int64_t t1, int64_t t2, int64_t t3, int rows, int planes, int c0,
       int c1, int c2, int c3, unsigned* y) {
  const TensorShape shape = {{uint64_t(s0), uint64_t(s1), uint64_t(s2), uint64_t(s3)},
                             {uint64_t(t1), uint64_t(t2), uint64_t(t3)},
                             {64, uint32_t(rows), uint32_t(planes), 1}};
  const int bytes = rows * planes * 128;
  launch(::box, "box", LaunchConfig{1, 32, size_t(bytes) + 8}, nullptr, tensor_map(x, shape, "box"), Coordinates{c0, c1, c2, c3},
         bytes, y);
}
