// Clusters: blocks of a launch that run at the same time and read each other's shared memory (sm_90 and later; PTX ISA,
// "barrier.cluster", "mapa"). LaunchConfig::cluster asks for them, can_launch_clusters() says whether a device has them.
#pragma once

#include "shared.cuh"

namespace movq {

// Elsewhere kernels that use clusters trap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define MOVQ_CLUSTERS
#endif

// The number of this block in its cluster.
MOVQ_DEVICE unsigned cluster_rank() {
#if defined(MOVQ_EMULATOR)
  return emu::cluster_rank();
#elif defined(MOVQ_CLUSTERS)
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  __trap();
  return 0;
#endif
}

// All threads of the cluster wait for each other. What each did before is visible to all after it.
MOVQ_DEVICE void cluster_sync() {
#if defined(MOVQ_EMULATOR)
  emu::cluster_sync();
#elif defined(MOVQ_CLUSTERS)
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __trap();
#endif
}

// Element i of this view in the block of this rank. A cluster_sync() must follow before that block returns.
template <class T>
MOVQ_DEVICE T cluster_load(const Shared<T>& view, unsigned i, unsigned rank) {
  static_assert(sizeof(T) % 4 == 0, "expected whole words");
  const unsigned address = view.address(i, 1);
  union {
    T value;
    unsigned words[sizeof(T) / 4];
  } loaded = {};
#pragma unroll
  for (unsigned k = 0; k < sizeof(T) / 4; ++k) {
#if defined(MOVQ_EMULATOR)
    emu::cluster_read(address + 4 * k, rank, &loaded.words[k], 4);
#elif defined(MOVQ_CLUSTERS)
    unsigned remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address + 4 * k), "r"(rank));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(loaded.words[k]) : "r"(remote) : "memory");
#else
    __trap();
#endif
  }
  return loaded.value;
}

}  // namespace movq
