// Thread-block clusters: blocks that run at once and read each other's shared memory. sm_90 and up; launch with Launch::cluster.
#pragma once

#include "memory.cuh"
#include "shared.cuh"

namespace movq {

#if !defined(MOVQ_EMULATOR) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define MOVQ_NO_CLUSTERS  // the code compiles, and stops if it is run
#endif

MOVQ_DEVICE unsigned cluster_rank() {
#if defined(MOVQ_EMULATOR)
  return emu::cluster_rank();
#elif defined(MOVQ_NO_CLUSTERS)
  __trap();
  return 0;
#else
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#endif
}

MOVQ_DEVICE unsigned cluster_size() {
#if defined(MOVQ_EMULATOR)
  return emu::cluster_size();
#elif defined(MOVQ_NO_CLUSTERS)
  __trap();
  return 1;
#else
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#endif
}

// A barrier of all threads of all the cluster's blocks. A block must not end while others may still read its memory.
MOVQ_DEVICE void cluster_sync() {
#if defined(MOVQ_EMULATOR)
  emu::cluster_sync();
#elif defined(MOVQ_NO_CLUSTERS)
  __trap();
#else
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

namespace detail {

template <class V>
MOVQ_DEVICE V cluster_read(unsigned address, unsigned rank) {
  static_assert(sizeof(V) % 4 == 0 && sizeof(V) <= 16, "4, 8 or 16 bytes");
  union { V value; unsigned words[sizeof(V) / 4]; } u = {};
#if defined(MOVQ_EMULATOR)
  emu::cluster_read(address, rank, &u.value, sizeof(V));
#elif defined(MOVQ_NO_CLUSTERS)
  __trap();
#else
  unsigned from;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(address), "r"(rank));
  if constexpr (sizeof(V) == 4) {
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(u.words[0]) : "r"(from) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];" : "=r"(u.words[0]), "=r"(u.words[1]) : "r"(from) : "memory");
  } else {
    asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(u.words[0]), "=r"(u.words[1]), "=r"(u.words[2]), "=r"(u.words[3]) : "r"(from) : "memory");
  }
#endif
  return u.value;
}

}  // namespace detail

// Element i of the view as block `rank` of the cluster sees it.
template <class T>
MOVQ_DEVICE T cluster_load(const Shared<T>& s, unsigned i, unsigned rank) {
  return detail::cluster_read<T>(s.address(i, 1), rank);
}

template <int N, class T>
MOVQ_DEVICE Vec<T, N> cluster_load_vec(const Shared<T>& s, unsigned i, unsigned rank) {
  return detail::cluster_read<Vec<T, N>>(s.address(i, N), rank);
}

}  // namespace movq
