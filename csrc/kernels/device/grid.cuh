// A barrier of the whole grid; launch with Launch::cooperative. What was written to global memory before it is seen after it.
#pragma once

#include "common.cuh"

#ifndef MOVQ_EMULATOR
#include <cooperative_groups.h>
#endif

namespace movq {

MOVQ_DEVICE void grid_sync() {
#ifdef MOVQ_EMULATOR
  emu::grid_sync();
#else
  cooperative_groups::this_grid().sync();
#endif
}

}  // namespace movq
