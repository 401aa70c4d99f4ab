// A matrix of 16-bit elements in shared memory, in the layout that TMA writes and wgmma reads with 128-byte swizzle.
//
// The tile is cut into panels of 64 columns, one after the other. A panel has a row of 128 bytes for each row of the matrix.
// Within 8 rows, which are 1024 bytes, the eight 16-byte chunks of row r are permuted: chunk c lies at c ^ r. So eight chunks of
// one column and eight chunks of one row both lie in 32 different banks.
//
//   operand of wgmma         K runs along   16 values of k are    leading byte offset      stride byte offset
//   columns_are_k (K-major)  the columns    32 bytes of a row     unused                   8 rows: 1024
//   rows_are_k (MN-major)    the rows       16 rows               64 columns: one panel    8 rows: 1024
//
// (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout". The tile must start at a multiple of 1024 bytes.)
#pragma once

#include "shared.cuh"

namespace movq {

// A matrix descriptor of wgmma: bits 0-13 the address, 16-29 the leading and 32-45 the stride byte offset, all in units of 16
// bytes; bits 62-63 the swizzle, where 1 means 128 bytes.
MOVQ_DEVICE uint64_t swizzled_descriptor(unsigned address, unsigned leading_bytes, unsigned stride_bytes) {
  return uint64_t(address >> 4 & 0x3fff) | uint64_t(leading_bytes >> 4) << 16 | uint64_t(stride_bytes >> 4) << 32 |
         uint64_t(1) << 62;
}

template <class T, int Rows, int Columns>
class SwizzledTile {
  static_assert(sizeof(T) == 2 && Rows % 8 == 0 && Columns % 64 == 0, "expected whole swizzle atoms of 16-bit elements");

 public:
  static constexpr int kPanelColumns = 64, kPanels = Columns / kPanelColumns;
  static constexpr int kPanelElements = Rows * kPanelColumns;
  static constexpr unsigned kPanelBytes = kPanelElements * sizeof(T), kBytes = kPanels * kPanelBytes;

  MOVQ_DEVICE explicit SwizzledTile(unsigned offset) : elements(offset, Rows * Columns) {}

  // 16 columns from `column` on, for all rows.
  MOVQ_DEVICE uint64_t columns_are_k(int column) const {
    const unsigned first = column / kPanelColumns * kPanelElements + column % kPanelColumns;
    return swizzled_descriptor(elements.address(first, (Rows - 1) * kPanelColumns + 16), 16, 1024);
  }

  // 16 rows from `row` on, for the columns from `column` on, which is a multiple of 64.
  MOVQ_DEVICE uint64_t rows_are_k(int row, int column) const {
    const unsigned first = column / kPanelColumns * kPanelElements + row * kPanelColumns;
    return swizzled_descriptor(elements.address(first, 16 * kPanelColumns), kPanelBytes, 1024);
  }

  // The index of an element in `elements`. It and its neighbours up to the next multiple of 8 columns are adjacent.
  MOVQ_DEVICE static unsigned index(int row, int column) {
    const int chunk = column % kPanelColumns / 8 ^ row % 8;
    return column / kPanelColumns * kPanelElements + row * kPanelColumns + chunk * 8 + column % 8;
  }

  // Stores two elements from an even column on, the first in the low half.
  MOVQ_DEVICE void store_pair(int row, int column, uint32_t pair) const {
    union {
      uint32_t bits;
      Vec<T, 2> values;
    } packed = {pair};
    elements.template store_vec<2>(index(row, column), packed.values);
  }

  Shared<T> elements;
};

}  // namespace movq
