// Shared memory: one dynamic array per block, accessed through typed views with bounds. A kernel places its views by byte offset.
// Static __shared__ variables are not used, because the emulator could not see them.
#pragma once

#include "common.cuh"

namespace movq {

#ifndef MOVQ_EMULATOR
extern __shared__ __align__(1024) unsigned char shared_memory[];
#endif

// A view of `count` elements that starts `offset` bytes into the block's shared memory.
template <class T>
class Shared {
 public:
  MOVQ_DEVICE Shared(unsigned offset, unsigned count) : offset_(offset), count_(count) {}

  MOVQ_DEVICE T load(unsigned i) const {
#ifdef MOVQ_EMULATOR
    T value;
    const unsigned from = address(i, 1);
    for (unsigned k = 0; k < sizeof(T); k += alignof(T)) {  // a Vec is one access, a struct of floats is several
      emu::shared_read(from + k, reinterpret_cast<char*>(&value) + k, alignof(T));
    }
    return value;
#else
    return *reinterpret_cast<const T*>(shared_memory + offset_ + i * sizeof(T));
#endif
  }

  MOVQ_DEVICE void store(unsigned i, T value) const { write(i, value); }

  // Stores N elements in one access of up to 16 bytes; element i must be aligned to its size.
  template <int N>
  MOVQ_DEVICE void store_vec(unsigned i, const Vec<T, N>& values) const {
    write(i, values);
  }

  // The byte offset of the end of this view, where the next view may start.
  MOVQ_DEVICE unsigned end() const { return offset_ + count_ * unsigned(sizeof(T)); }

  // The address of element i for PTX instructions; the emulator checks that the view holds `elements` from there on.
  MOVQ_DEVICE unsigned address(unsigned i, unsigned elements) const {
#ifdef MOVQ_EMULATOR
    emu::check_view(i, elements, count_);
    return offset_ + i * unsigned(sizeof(T));
#else
    return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory + offset_ + i * sizeof(T)));
#endif
  }

 private:
  template <class Value>
  MOVQ_DEVICE void write(unsigned i, const Value& value) const {
#ifdef MOVQ_EMULATOR
    const unsigned to = address(i, sizeof(Value) / sizeof(T));
    for (unsigned k = 0; k < sizeof(Value); k += alignof(Value)) {
      emu::shared_write(to + k, reinterpret_cast<const char*>(&value) + k, alignof(Value));
    }
#else
    *reinterpret_cast<Value*>(shared_memory + offset_ + i * sizeof(T)) = value;
#endif
  }

  unsigned offset_;
  unsigned count_;
};

}  // namespace movq
