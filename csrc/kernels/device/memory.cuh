// Global memory. Kernels load and store through these functions only, so that the emulator can check bounds and alignment, and
// count bytes and 32-byte sectors.
#pragma once

#include "common.cuh"

namespace movq {

// kStream is for data that is read once: the cache evicts it first.
enum class Cache { kDefault, kStream };

namespace detail {

// The machine word of this many bytes.
template <int Bytes> struct WordOf;
template <> struct WordOf<2> { using type = unsigned short; };
template <> struct WordOf<4> { using type = unsigned; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<16> { using type = uint4; };

template <Cache cache, class Value>
MOVQ_DEVICE Value global_read(const void* from) {
#ifdef MOVQ_EMULATOR
  Value value;
  emu::global_read(from, &value, sizeof(Value));
  return value;
#else
  using Word = typename WordOf<sizeof(Value)>::type;
  union {
    Word word;
    Value value;
  } bits;
  auto* word = static_cast<const Word*>(from);
  bits.word = cache == Cache::kStream ? __ldcs(word) : *word;
  return bits.value;
#endif
}

template <class Value>
MOVQ_DEVICE void global_write(void* to, const Value& value) {
#ifdef MOVQ_EMULATOR
  emu::global_write(to, &value, sizeof(Value));
#else
  using Word = typename WordOf<sizeof(Value)>::type;
  union {
    Value value;
    Word word;
  } bits;
  bits.value = value;
  *static_cast<Word*>(to) = bits.word;
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
