// Global memory: every load, store and atomic of a kernel is one of these, so that the emulator can check its bounds and
// alignment and count its bytes and 32-byte sectors.
#pragma once

#include "common.cuh"

namespace movq {

// kStream is for data that is touched once: it is the first to leave the cache.
enum class Cache { kKeep, kStream };

namespace detail {

// The machine word that moves `Bytes` bytes.
template <int Bytes> struct Word;
template <> struct Word<1> { using type = unsigned char; };
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

template <Cache cache, class V>
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
  auto* word = static_cast<W*>(p);
  if (cache == Cache::kStream) __stcs(word, u.word);
  else *word = u.word;
#endif
}

}  // namespace detail

template <Cache cache = Cache::kKeep, class T>
MOVQ_DEVICE T load(const T* p) {
  return detail::global_read<cache, T>(p);
}

template <Cache cache = Cache::kKeep, class T>
MOVQ_DEVICE void store(T* p, T v) {
  detail::global_write<cache>(p, v);
}

// `p` must be aligned to sizeof(T) * N, which is at most 16 bytes.
template <int N, Cache cache = Cache::kKeep, class T>
MOVQ_DEVICE Vec<T, N> load_vec(const T* p) {
  return detail::global_read<cache, Vec<T, N>>(p);
}

template <Cache cache = Cache::kKeep, class T, int N>
MOVQ_DEVICE void store_vec(T* p, const Vec<T, N>& v) {
  detail::global_write<cache>(p, v);
}

// Returns the value before the addition. Integers only: float atomics would make results depend on the schedule.
MOVQ_DEVICE unsigned atomic_add(unsigned* p, unsigned v) {
#ifdef MOVQ_EMULATOR
  return emu::global_atomic_add(p, v);
#else
  return atomicAdd(p, v);
#endif
}

}  // namespace movq
