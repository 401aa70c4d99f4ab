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
MOVQ_DEVICE V global_read(const void* from) {
#ifdef MOVQ_EMULATOR
  V value;
  emu::global_read(from, &value, sizeof(V));
  return value;
#else
  using W = typename Word<sizeof(V)>::type;
  union {
    W word;
    V value;
  } bits;
  auto* word = static_cast<const W*>(from);
  bits.word = cache == Cache::kStream ? __ldcs(word) : *word;
  return bits.value;
#endif
}

template <class V>
MOVQ_DEVICE void global_write(void* to, const V& value) {
#ifdef MOVQ_EMULATOR
  emu::global_write(to, &value, sizeof(V));
#else
  using W = typename Word<sizeof(V)>::type;
  union {
    V value;
    W word;
  } bits;
  bits.value = value;
  *static_cast<W*>(to) = bits.word;
#endif
}

}  // namespace detail

template <class T>
MOVQ_DEVICE T load(const T* from) {
  return detail::global_read<Cache::kDefault, T>(from);
}

template <class T>
MOVQ_DEVICE void store(T* to, T value) {
  detail::global_write(to, value);
}

// N elements in one access: sizeof(T) * N is at most 16 bytes, and the pointer is aligned to that.
template <int N, Cache cache = Cache::kDefault, class T>
MOVQ_DEVICE Vec<T, N> load_vec(const T* from) {
  return detail::global_read<cache, Vec<T, N>>(from);
}

template <class T, int N>
MOVQ_DEVICE void store_vec(T* to, const Vec<T, N>& values) {
  detail::global_write(to, values);
}

}  // namespace movq
