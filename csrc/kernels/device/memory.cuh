// Global memory. Kernels load and store through these functions only, so that the emulator can check bounds and alignment, and
// count bytes and 32-byte sectors.
#pragma once

#include "common.cuh"

namespace movq {

// kStream is for data that is read once: the cache evicts it first.
enum class Cache { kDefault, kStream };

namespace detail {

// The machine word of this many bytes.
template <int Bytes> struct Word;
template <> struct Word<2> { using type = unsigned short; };
template <> struct Word<4> { using type = unsigned; };
template <> struct Word<8> { using type = uint2; };
template <> struct Word<16> { using type = uint4; };

template <Cache cache, class V>
MOVQ_DEVICE V global_read(const void* p) {
#ifdef MOVQ_EMULATOR
  V v;
  emu::global_read(p, &v, sizeof(V));
  return v;
#else
  using W = typename Word<sizeof(V)>::type;
  union {
    W word;
    V value;
  } u;
  auto* word = static_cast<const W*>(p);
  u.word = cache == Cache::kStream ? __ldcs(word) : *word;
  return u.value;
#endif
}

template <class V>
MOVQ_DEVICE void global_write(void* p, const V& v) {
#ifdef MOVQ_EMULATOR
  emu::global_write(p, &v, sizeof(V));
#else
  using W = typename Word<sizeof(V)>::type;
  union {
    V value;
    W word;
  } u;
  u.value = v;
  *static_cast<W*>(p) = u.word;
#endif
}

}  // namespace detail

template <class T>
MOVQ_DEVICE T load(const T* p) {
  return detail::global_read<Cache::kDefault, T>(p);
}

template <class T>
MOVQ_DEVICE void store(T* p, T v) {
  detail::global_write(p, v);
}

// N elements in one access: sizeof(T) * N is at most 16 bytes, and `p` is aligned to that.
template <int N, Cache cache = Cache::kDefault, class T>
MOVQ_DEVICE Vec<T, N> load_vec(const T* p) {
  return detail::global_read<cache, Vec<T, N>>(p);
}

template <class T, int N>
MOVQ_DEVICE void store_vec(T* p, const Vec<T, N>& v) {
  detail::global_write(p, v);
}

}  // namespace movq
