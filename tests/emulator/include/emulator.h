// The interface of the emulated GPU, implemented in ../runtime. The device headers of csrc/kernels call it in place of PTX, and
// the headers beside this file in place of CUDA's built-in functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>

struct uint2 { unsigned x, y; };
struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emu {

// threadIdx, blockIdx, blockDim and gridDim of the running thread.
struct Builtins {
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Builtins* builtins;

// launch.cuh
struct Shape {
  dim3 grid, block;
  size_t shared_bytes;
  unsigned cluster = 1;
  bool cooperative = false;
  const void* function = nullptr;  // identifies the kernel in set_max_shared_memory()
  bool dependent = false;          // may start while the previous kernel runs
};
void launch(const char* kernel, const Shape& shape, const std::function<void()>& body);
int device();  // the index of the emulated device
void set_max_shared_memory(const void* function, int bytes);
int blocks_per_multiprocessor(int threads, size_t shared_bytes);
int multiprocessors();
int shared_memory_limit();
bool can_launch_dependent();

void wait_for_previous_kernel();  // dependent_launch.cuh

// Barriers. `line` is the line of the caller, which identifies the barrier.
void block_sync(int line);
enum class Vote { kOr, kAnd, kCount };
int block_vote(Vote vote, int predicate, int line);
void cluster_sync();
void grid_sync();
unsigned cluster_rank();
unsigned cluster_size();

// Memory
void global_read(const void* from, void* to, int bytes);
void global_write(void* to, const void* from, int bytes);
unsigned global_atomic_add(unsigned* p, unsigned value);
void copy_to_device(void* to, const void* from, size_t bytes);  // for host code, which must not write device memory directly
void check_view(unsigned first, unsigned elements, unsigned count);
void shared_read(unsigned address, void* to, int bytes);
void shared_write(unsigned address, const void* from, int bytes);
void cluster_read(unsigned address, unsigned rank, void* to, int bytes);
void cp_async(unsigned to, const void* from, int bytes, bool valid);
void cp_async_commit();
void cp_async_wait(int pending);

// mbarrier.cuh, tma.cuh, warpgroup.cuh
struct TensorMap {
  const char* data;
  int element_size;
  uint64_t sizes[4], strides[3];
  uint32_t box[4];

  unsigned box_bytes() const { return box[0] * box[1] * box[2] * box[3] * element_size; }
};
TensorMap make_tensor_map(const void* data, int element_size, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                          const uint32_t (&box)[4]);
void set_address(TensorMap& map, const void* data);
// To this block, or to the same place in every block of the cluster whose bit in `ranks` is set.
void tma_load(unsigned to, const TensorMap& map, const int (&from)[4], unsigned barrier, unsigned ranks = 0);
void mbarrier_init(unsigned address, unsigned arrivals);
void mbarrier_arrive(unsigned address, unsigned expected_bytes);
void mbarrier_arrive_remote(unsigned address, unsigned rank);  // at the barrier of that block of the cluster
void mbarrier_wait(unsigned address, unsigned parity);
void fence_proxy_async();
void named_barrier(int id, int threads, bool wait);
void set_max_registers(int registers, bool increase);

// Warp-wide operations
void warp_sync(unsigned mask);
enum class Shuffle { kIndex, kUp, kDown, kXor };
void shuffle(unsigned mask, Shuffle mode, void* value, int bytes, int argument, int width);
unsigned ballot(unsigned mask, bool predicate);
void ldmatrix(uint32_t* registers, int count, bool transposed, unsigned row_address);
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool is_half);
void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b);
uint32_t to_tf32(float v);

// Warpgroup-wide operations, wgmma.cuh. `a` is in registers, or null and then in shared memory at a_descriptor.
struct Registers {
  const void* data;
  size_t bytes;
};
void wgmma_fence(std::initializer_list<Registers> registers);
void wgmma(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool b_mn_major, bool is_half,
           bool accumulate);
void wgmma_commit();
void wgmma_wait(int pending, std::initializer_list<Registers> registers);

}  // namespace emu
