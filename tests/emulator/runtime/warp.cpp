// Warp-wide operations: each lane passes pointers to its values, and the last lane to arrive does the work for all.
#include "machine.h"

#include <cmath>
#include <cstring>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"

namespace emu {

static constexpr unsigned kAll = ~0u;

static bool has(unsigned mask, unsigned lane) { return mask >> lane & 1; }

void warp_sync(unsigned mask) {
  gather(mask, "__syncwarp", nullptr, [](Warp& warp, unsigned mask, Arguments) {
    ++machine.clock;
    std::vector<Thread*> met;
    for (Thread* lane : warp.lanes) {
      if (has(mask, lane->lane)) met.push_back(lane);
    }
    acquire_from_all(met);
    for (Thread* lane : warp.lanes) {
      for (unsigned other = 0; other < kWarpSize && has(mask, lane->lane); ++other) {
        if (has(mask, other)) lane->met[other] = machine.clock;
      }
    }
  });
}

// --- Shuffles and votes: they do not order memory accesses, so `clock` and `met` do not change

struct ShuffleArguments {
  Shuffle mode;
  void* value;
  int bytes, argument, width;
};

static unsigned source_lane(const ShuffleArguments& a, unsigned lane) {
  const int first = lane & ~(a.width - 1), last = first + a.width - 1, me = lane;
  int from = me;
  switch (a.mode) {
    case Shuffle::kIndex: from = first + (a.argument & (a.width - 1)); break;
    case Shuffle::kUp: from = me - a.argument < first ? me : me - a.argument; break;
    case Shuffle::kDown: from = me + a.argument > last ? me : me + a.argument; break;
    case Shuffle::kXor: from = (me ^ a.argument) > last ? me : me ^ a.argument; break;
  }
  return from;
}

void shuffle(unsigned mask, Shuffle mode, void* value, int bytes, int argument, int width) {
  static const char* const names[] = {"__shfl_sync", "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync"};
  ShuffleArguments mine = {mode, value, bytes, argument, width};
  gather(mask, names[static_cast<int>(mode)], &mine, [](Warp&, unsigned mask, Arguments lanes) {
    uint64_t values[kWarpSize];
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!has(mask, lane)) continue;
      auto& a = *static_cast<ShuffleArguments*>(lanes[lane]);
      std::memcpy(&values[lane], a.value, a.bytes);
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (!has(mask, lane)) continue;
      auto& a = *static_cast<ShuffleArguments*>(lanes[lane]);
      const unsigned from = source_lane(a, lane);
      if (!has(mask, from))
        fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(from) + ", which does not take part");
      std::memcpy(a.value, &values[from], a.bytes);
    }
  });
}

struct BallotArguments {
  bool predicate;
  unsigned result;
};

unsigned ballot(unsigned mask, bool predicate) {
  BallotArguments mine = {predicate, 0};
  gather(mask, "a vote", &mine, [](Warp&, unsigned mask, Arguments lanes) {
    unsigned result = 0;
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (has(mask, lane) && static_cast<BallotArguments*>(lanes[lane])->predicate) result |= 1u << lane;
    }
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      if (has(mask, lane)) static_cast<BallotArguments*>(lanes[lane])->result = result;
    }
  });
  return mine.result;
}

// --- ldmatrix

struct LdmatrixArguments {
  uint32_t* registers;
  int count;
  bool transposed;
  uint16_t row[8];
};

static void need_whole_warp(const char* what) {
  if (machine.running->warp->lanes.size() < kWarpSize) fail(std::string(what) + " needs all 32 lanes of a warp");
}

void ldmatrix(uint32_t* registers, int count, bool transposed, unsigned row_address) {
  static const char* const names[] = {"ldmatrix.x1", "ldmatrix.x2", "ldmatrix.x4"};
  need_whole_warp("ldmatrix");
  LdmatrixArguments mine = {registers, count, transposed, {}};
  if (machine.running->lane < 8u * count) shared_read(row_address, mine.row, sizeof mine.row);
  gather(kAll, names[count / 2], &mine, [](Warp&, unsigned, Arguments lanes) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      auto& a = *static_cast<LdmatrixArguments*>(lanes[lane]);
      for (int m = 0; m < a.count; ++m) {
        auto at = [&](int row, int column) -> uint32_t {
          return static_cast<LdmatrixArguments*>(lanes[8 * m + row])->row[column];
        };
        const int i = lane / 4, j = lane % 4 * 2;
        a.registers[m] = a.transposed ? at(j, i) | at(j + 1, i) << 16 : at(i, j) | at(i, j + 1) << 16;
      }
    }
  });
}

// --- mma: fragments as the PTX ISA lays them out ("Matrix Fragments for mma.m16n8k16" and "... m16n8k8")

struct MmaArguments {
  float* d;
  const uint32_t *a, *b;
};

// Value i of a lane's fragment, as float.
static float half_value(const uint32_t* r, int i) { return __half2float({static_cast<unsigned short>(r[i / 2] >> i % 2 * 16)}); }
static float bfloat_value(const uint32_t* r, int i) {
  return __bfloat162float({static_cast<unsigned short>(r[i / 2] >> i % 2 * 16)});
}
// The low bits are ignored.
static float tf32_value(const uint32_t* r, int i) { return __uint_as_float(r[i] & ~0x1fffu); }

// The row or column of value i of a lane.
struct K16 {
  static constexpr int k = 16, a_values = 8, b_values = 4;
  static int a_row(int group, int i) { return i / 2 % 2 ? group + 8 : group; }
  static int a_column(int member, int i) { return member * 2 + i % 2 + (i < 4 ? 0 : 8); }
  static int b_row(int member, int i) { return member * 2 + i % 2 + (i < 2 ? 0 : 8); }
};
struct K8Tf32 {
  static constexpr int k = 8, a_values = 4, b_values = 2;
  static int a_row(int group, int i) { return i % 2 ? group + 8 : group; }
  static int a_column(int member, int i) { return i < 2 ? member : member + 4; }
  static int b_row(int member, int i) { return i < 1 ? member : member + 4; }
};

// Rounds to float, towards zero.
static float truncated(double value) {
  const float nearest = static_cast<float>(value);
  return std::isfinite(nearest) && std::abs(double{nearest}) > std::abs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// Products are exact in double. The sum of a whole k-slice is truncated once, as tensor cores do (Fasi et al., "Numerical
// behavior of NVIDIA tensor cores", PeerJ CS 7:e330). Tensor cores also truncate partial sums, in an order that is not
// documented, so the last bits differ.
template <class Layout, float (*value)(const uint32_t*, int)>
static void multiply(Arguments lanes) {
  double a[16][Layout::k], b[Layout::k][8], sums[16][8];
  auto each_sum = [&](auto&& f) {
    for (unsigned lane = 0; lane < kWarpSize; ++lane) {
      float* d = static_cast<MmaArguments*>(lanes[lane])->d;
      for (int i = 0; i < 4; ++i) f(d[i], sums[lane / 4 + (i < 2 ? 0 : 8)][lane % 4 * 2 + i % 2]);
    }
  };
  for (unsigned lane = 0; lane < kWarpSize; ++lane) {
    const auto& mine = *static_cast<const MmaArguments*>(lanes[lane]);
    const int group = lane / 4, member = lane % 4;
    for (int i = 0; i < Layout::a_values; ++i) a[Layout::a_row(group, i)][Layout::a_column(member, i)] = value(mine.a, i);
    for (int i = 0; i < Layout::b_values; ++i) b[Layout::b_row(member, i)][group] = value(mine.b, i);
  }
  each_sum([](float d, double& sum) { sum = d; });
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < Layout::k; ++k) {
      for (int column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
    }
  }
  each_sum([](float& d, double sum) { d = truncated(sum); });
  ++machine.launches.back().counters.mma;
}

void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b, bool is_half) {
  need_whole_warp("mma");
  MmaArguments mine = {d, a, b};
  if (is_half)
    gather(kAll, "mma.m16n8k16 of halves", &mine, [](Warp&, unsigned, Arguments lanes) { multiply<K16, half_value>(lanes); });
  else
    gather(kAll, "mma.m16n8k16 of bfloats", &mine, [](Warp&, unsigned, Arguments lanes) { multiply<K16, bfloat_value>(lanes); });
}

void mma_m16n8k8_tf32(float* d, const uint32_t* a, const uint32_t* b) {
  need_whole_warp("mma");
  MmaArguments mine = {d, a, b};
  gather(kAll, "mma.m16n8k8 of tf32", &mine, [](Warp&, unsigned, Arguments lanes) { multiply<K8Tf32, tf32_value>(lanes); });
}

uint32_t to_tf32(float v) {
  const uint32_t bits = __float_as_uint(v);
  if (std::isnan(v)) return 0x7fffffff;
  if (std::isinf(v)) return bits;
  return (bits + 0x1000) & ~0x1fffu;
}

}  // namespace emu
