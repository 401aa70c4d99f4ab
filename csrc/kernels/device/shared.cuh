// Shared memory: one dynamic array per block, seen through typed, bounded views. A kernel lays its views out by byte offset;
// static __shared__ variables are not used, because the emulator could not see them.
#pragma once

#include "common.cuh"

namespace movq {

#ifndef MOVQ_EMULATOR
extern __shared__ __align__(128) unsigned char shared_memory[];
#endif

template <class T>
class Shared {
 public:
  // `count` elements that start `offset` bytes into the block's shared memory.
  MOVQ_DEVICE Shared(unsigned offset, unsigned count) : offset_(offset), count_(count) {}

  MOVQ_DEVICE T load(unsigned i) const { return read<T>(i); }
  MOVQ_DEVICE void store(unsigned i, T v) const { write(i, v); }

  // The element i must lie on a multiple of N * sizeof(T) bytes, which is at most 16.
  template <int N>
  MOVQ_DEVICE Vec<T, N> load_vec(unsigned i) const {
    return read<Vec<T, N>>(i);
  }
  template <int N>
  MOVQ_DEVICE void store_vec(unsigned i, const Vec<T, N>& v) const {
    write(i, v);
  }

  MOVQ_DEVICE Shared slice(unsigned first, unsigned count) const { return {offset_ + first * unsigned(sizeof(T)), count}; }

  // Byte offset of the first byte behind this view: where the next one may start.
  MOVQ_DEVICE unsigned end() const { return offset_ + count_ * unsigned(sizeof(T)); }

  // Where element i lies, as ldmatrix, cp.async and mapa take it. `elements` are about to be touched from there on.
  MOVQ_DEVICE unsigned address(unsigned i, unsigned elements) const {
#ifdef MOVQ_EMULATOR
    emu::check_view(i, elements, count_);
    return offset_ + i * unsigned(sizeof(T));
#else
    return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory + offset_ + i * sizeof(T)));
#endif
  }

 private:
  template <class V>
  MOVQ_DEVICE V read(unsigned i) const {
#ifdef MOVQ_EMULATOR
    V v;
    const unsigned from = address(i, sizeof(V) / sizeof(T));
    for (unsigned k = 0; k < sizeof(V); k += alignof(V)) {  // a struct of floats is not one access, a Vec is
      emu::shared_read(from + k, reinterpret_cast<char*>(&v) + k, alignof(V));
    }
    return v;
#else
    return *reinterpret_cast<const V*>(shared_memory + offset_ + i * sizeof(T));
#endif
  }

  template <class V>
  MOVQ_DEVICE void write(unsigned i, const V& v) const {
#ifdef MOVQ_EMULATOR
    const unsigned to = address(i, sizeof(V) / sizeof(T));
    for (unsigned k = 0; k < sizeof(V); k += alignof(V)) {
      emu::shared_write(to + k, reinterpret_cast<const char*>(&v) + k, alignof(V));
    }
#else
    *reinterpret_cast<V*>(shared_memory + offset_ + i * sizeof(T)) = v;
#endif
  }

  unsigned offset_;
  unsigned count_;
};

}  // namespace movq
