// How the walks of attention divide their work among blocks.
//
// A unit of work is a row tile and a column tile. The units form one line, row tile by row tile, and each block takes an equal,
// contiguous share: any number of tokens fills the GPU. A block that has only some of a row tile's units writes a part, a float
// for each sum, and `combine` reads it again. So shorter shares keep more multiprocessors busy, and longer shares leave fewer
// parts. The schedule is the best of a model: a unit takes as long as its products, or as L2 takes to serve the columns of all
// blocks; the parts then pass through L2 twice.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/common.cuh"

namespace movq {

// Blocks take `share` units each, in order; the last block takes what is left.
struct Schedule {
  int units, share, blocks;

  MOVQ_HOST_DEVICE int first_unit(int block) const { return block < blocks ? block * share : units; }
};

// What a unit takes of one multiprocessor, and a part of L2.
struct UnitCost {
  double cycles;      // of its products
  double bytes;       // of columns from L2
  double part_bytes;  // of a part, written and read
};

// L2 bytes per cycle and multiprocessor: 5.5 TB/s (attention_tile.cuh) for the 132 of an H100 at 1.755 GHz.
constexpr double kL2Bytes = 24;

// Parts that blocks leave if each takes `share` units.
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
  const int64_t units = row_tiles * column_tiles, shortest = round_up<int64_t>(ceil_div<int64_t>(units, resident), step);
  const double l2 = kL2Bytes * resident;
  auto cycles = [&](int64_t share) {
    const double blocks = double(ceil_div(units, share));
    return double(share) * std::max(cost.cycles, blocks * cost.bytes / l2) +
           double(count_parts(units, column_tiles, share)) * cost.part_bytes / l2;
  };
  const int64_t longest = shortest + column_tiles * step;  // among these shares is one that leaves no parts
  double least = cycles(shortest);
  for (int64_t share = shortest; share <= longest; share += step) least = std::min(least, cycles(share));
  int64_t share = shortest;
  while (cycles(share) > 1.05 * least) share += step;  // rather busy multiprocessors than a small gain in the model
  return {int(units), int(share), int(ceil_div(units, share))};
}

// True if blocks share a row tile, whose parts must then be combined.
inline bool has_parts(const Schedule& schedule, int column_tiles) { return schedule.blocks > 1 && schedule.share % column_tiles; }

}  // namespace movq
