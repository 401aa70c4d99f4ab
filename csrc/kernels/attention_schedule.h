// How the walks of attention divide their work among blocks.
//
// A unit of work is one row tile and one column tile. The units form one line, row tile by row tile, and each block takes an
// equal, contiguous share, so any number of tokens fills the GPU. A block that has only some of a row tile's units writes a part,
// one float per sum, which `combine` reads. Shorter shares keep more multiprocessors busy; longer shares leave fewer parts.
// The schedule takes the shortest shares whose parts need at most 60% of the time, if products limit the units and L2 limits the
// parts. Longer shares certainly leave multiprocessors idle, while what they gain depends on the real rate of L2.
#pragma once

#include <cstdint>

#include "device/common.cuh"

namespace movq {

// Blocks take `share` units each, in order; the last block takes what is left.
struct Schedule {
  int units, share, blocks;

  MOVQ_HOST_DEVICE int first_unit(int block) const { return block < blocks ? block * share : units; }
};

// The cost of one unit and of one part.
struct UnitCost {
  double cycles;      // of a unit's products, on one multiprocessor
  double part_bytes;  // that a part moves through L2, written and read
};

// L2 bytes per cycle and multiprocessor: 5.5 TB/s (attention_tile.cuh) for the 132 of an H100 at 1.755 GHz.
constexpr double kL2Bytes = 24;
constexpr double kMaxPartTime = 0.6;  // of the time of units and parts

// The number of parts if each block takes `share` units.
inline int64_t count_parts(int64_t units, int64_t column_tiles, int64_t share) {
  int64_t parts = 0, last_tile = -1;
  for (int64_t unit = share; unit < units; unit += share) {
    if (unit % column_tiles == 0) continue;
    const int64_t tile = unit / column_tiles;
    parts += tile == last_tile ? 1 : 2;
    last_tile = tile;
  }
  return parts;
}

// Divides the units among at most `resident` blocks, which run at the same time. All shares but the last are multiples of `step`.
inline Schedule plan_schedule(int64_t row_tiles, int64_t column_tiles, int resident, const UnitCost& cost, int step = 1) {
  const int64_t units = row_tiles * column_tiles;
  auto parts_dominate = [&](int64_t share) {
    const double parts = double(count_parts(units, column_tiles, share)) * cost.part_bytes / (kL2Bytes * resident);
    return parts > kMaxPartTime * (parts + double(share) * cost.cycles);
  };
  int64_t share = round_up<int64_t>(ceil_div<int64_t>(units, resident), step);
  while (parts_dominate(share)) share += step;  // ends: a multiple of column_tiles leaves no parts
  return {int(units), int(share), int(ceil_div(units, share))};
}

// True if blocks share a row tile, whose parts must then be combined.
inline bool has_parts(const Schedule& schedule, int column_tiles) { return schedule.blocks > 1 && schedule.share % column_tiles; }

}  // namespace movq
