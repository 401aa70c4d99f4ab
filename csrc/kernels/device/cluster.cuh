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

// In pieces as wide as V is aligned: a Vec is one.
template <class V>
MOVQ_DEVICE V cluster_read(unsigned address, unsigned rank) {
  constexpr int words = alignof(V) / 4;
  static_assert(words == 1 || words == 2 || words == 4, "aligned to 4, 8 or 16 bytes");
  union {
    V value;
    unsigned word[sizeof(V) / 4];
  } u = {};
#if defined(MOVQ_EMULATOR)
  for (unsigned k = 0; k < sizeof(V); k += alignof(V)) emu::cluster_read(address + k, rank, &u.word[k / 4], alignof(V));
#elif defined(MOVQ_NO_CLUSTERS)
  __trap();
#else
  unsigned from;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(from) : "r"(address), "r"(rank));
#pragma unroll
  for (int k = 0; k < int(sizeof(V) / 4); k += words) {
    unsigned* to = &u.word[k];
    if constexpr (words == 1) {
      asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(to[0]) : "r"(from + 4 * k) : "memory");
    } else if constexpr (words == 2) {
      asm volatile("ld.shared::cluster.v2.u32 {%0,%1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(from + 4 * k) : "memory");
    } else {
      asm volatile("ld.shared::cluster.v4.u32 {%0,%1,%2,%3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "r"(from + 4 * k)
                   : "memory");
    }
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
