// Primitives that the emulator runs and no kernel uses yet, for the emulator's own tests. They have no CUDA version: a kernel
// that needs one adds it to csrc/kernels/device.
#pragma once

#include "device/launch.cuh"
#include "device/reduce.cuh"
#include "device/tma.cuh"

namespace movq {

// Clusters: blocks of a launch that run at the same time and read each other's shared memory. launch_together() starts them.
inline unsigned cluster_size() { return emu::cluster_size(); }
inline unsigned cluster_rank() { return emu::cluster_rank(); }  // the number of this block in its cluster

// All threads of the cluster wait for each other. What each did before is visible to all after it.
inline void cluster_sync() { emu::cluster_sync(); }

// Element i of this view in the block of this rank. A cluster_sync() must follow before that block returns.
template <class T>
T cluster_load(const Shared<T>& view, unsigned i, unsigned rank) {
  static_assert(sizeof(T) % 4 == 0, "expected whole words");
  T value;
  for (unsigned byte = 0; byte < sizeof(T); byte += 4)
    emu::cluster_read(view.address(i, 1) + byte, rank, reinterpret_cast<char*>(&value) + byte, 4);
  return value;
}

// Starts a copy that every block of the cluster whose bit in `ranks` is set receives, at the same place, and that completes on
// the barrier of each at the same address; see tma_load.
template <class T>
void tma_load_multicast(const Shared<T>& to, unsigned i, const TensorMap& map, const Coordinates& from, const MBarrier& barrier,
                        unsigned ranks) {
  const int coordinates[] = {from.x, from.y, from.z, from.w};
  emu::tma_load(to.address(i, map.box_bytes() / sizeof(T)), map, coordinates, barrier.address(), ranks);
}

// Arrives at the barrier at the same address in the block with the given rank.
inline void arrive_remote(const MBarrier& barrier, unsigned rank) { emu::mbarrier_arrive_remote(barrier.address(), rank); }

// A barrier of the whole grid, which must be cooperative.
inline void grid_sync() { emu::grid_sync(); }

// Launches clusters of this many blocks, or a cooperative grid, whose blocks all run at the same time.
template <class... Params, class... Args>
void launch_together(void (*kernel)(Params...), const char* name, const LaunchConfig& config, unsigned cluster, bool cooperative,
                     Args&&... args) {
  allow_shared_memory(kernel, name, config.shared_bytes);
  const auto* address = reinterpret_cast<const void*>(kernel);
  emu::launch(name, {config.grid, config.block, config.shared_bytes, cluster, cooperative, address}, [&] { kernel(args...); });
}

// Copies of 4, 8 or 16 bytes; see cp_async_16.
template <int Bytes, class T>
void cp_async(const Shared<T>& to, unsigned i, const T* from, bool valid) {
  emu::cp_async(to.address(i, Bytes / sizeof(T)), from, Bytes, valid);
}

// Loads one, two or four matrices; see ldmatrix_x4. Only the first 8 * Count lanes name a row.
template <bool Transposed, int Count, class T>
void ldmatrix(uint32_t (&registers)[Count], const Shared<T>& from, unsigned i) {
  emu::ldmatrix(registers, Count, Transposed, lane_id() < 8 * Count ? from.address(i, 8) : 0);
}

// Returns the value before the addition.
inline unsigned atomic_add(unsigned* counter, unsigned value) { return emu::global_atomic_add(counter, value); }

}  // namespace movq
