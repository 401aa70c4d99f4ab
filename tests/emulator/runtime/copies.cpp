// Hopper's asynchronous copies and the barriers they complete on: mbarriers, TMA, named barriers and proxy fences.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <stdexcept>

namespace emu {

static const char* interned(const std::string& text) {
  static std::set<std::string> texts;
  return texts.insert(text).first->c_str();
}

// --- mbarriers

static constexpr int64_t kMaxArrivals = (1 << 20) - 1, kMaxBytes = (1 << 20) - 1;  // PTX ISA, "Contents of the mbarrier object"

static std::string name(unsigned address) { return "the mbarrier at byte " + std::to_string(address); }

void mbarrier_init(unsigned address, unsigned arrivals) {
  Thread& self = *machine.running;
  check_shared(*self.block, address, 8, 8, "mbarrier");
  if (arrivals < 1 || arrivals > kMaxArrivals) fail(name(address) + " expects " + std::to_string(arrivals) + " arrivals");
  if (self.block->mbarriers.count(address)) fail(name(address) + " is initialised twice");
  MBarrier& barrier = self.block->mbarriers[address];
  barrier.arrivals = arrivals;
  barrier.missing = arrivals;
  const size_t index = self.block->mbarriers.size() - 1;
  if (index >= kMaxMBarriers) fail("more than " + std::to_string(kMaxMBarriers) + " mbarriers in a block");
  barrier.agent = kFirstMBarrier + self.block->rank * kMaxMBarriers + index;
  barrier.creator = self.id;
  barrier.created = machine.clock;
}

static MBarrier& mbarrier_at(Block& block, unsigned address) {
  const Thread& self = *machine.running;
  const auto found = block.mbarriers.find(address);
  if (found == block.mbarriers.end()) fail("there is no initialised mbarrier at byte " + std::to_string(address));
  MBarrier& barrier = found->second;
  if (!ordered(self, barrier.creator, barrier.created)) fail("race: no barrier follows the initialisation of " + name(address));
  return barrier;
}

static void complete_phase_if_due(MBarrier& barrier) {
  if (barrier.missing || barrier.bytes) return;
  ++barrier.phase;
  barrier.completed = barrier.released;
  barrier.missing = barrier.arrivals;
  for (Thread* thread : barrier.waiting) wake(thread);
  barrier.waiting.clear();
}

static void arrive_at(Block& block, unsigned address, unsigned expected_bytes) {
  MBarrier& barrier = mbarrier_at(block, address);
  if (!barrier.missing) fail(name(address) + " has more arrivals than it expects in a phase");
  barrier.bytes += expected_bytes;
  if (barrier.bytes > kMaxBytes) fail(name(address) + " expects more than " + std::to_string(kMaxBytes) + " bytes");
  release(*machine.running, barrier.released);
  --barrier.missing;
  complete_phase_if_due(barrier);
}

void mbarrier_arrive(unsigned address, unsigned expected_bytes) { arrive_at(*machine.running->block, address, expected_bytes); }

void mbarrier_arrive_remote(unsigned address, unsigned rank) { arrive_at(block_of_cluster(rank), address, 0); }

void mbarrier_wait(unsigned address, unsigned parity) {
  MBarrier& barrier = mbarrier_at(*machine.running->block, address);
  if (parity > 1) fail("expected a parity of 0 or 1, got " + std::to_string(parity));
  const char* where = interned(name(address) + ", parity " + std::to_string(parity));
  while (barrier.phase % 2 == parity) {
    barrier.waiting.push_back(machine.running);
    suspend(where);
  }
  acquire(*machine.running, barrier.completed);
}

void fence_proxy_async() { machine.running->fences.push_back(++machine.clock); }

// --- Named barriers

void named_barrier(int id, int threads, bool wait) {
  Thread& self = *machine.running;
  const char* where = interned("named barrier " + std::to_string(id));
  if (id < 1 || id > 15) fail("expected a named barrier from 1 to 15, got " + std::to_string(id));
  NamedBarrier& barrier = self.block->named_barriers[id];
  if (threads < 1 || threads % kWarpSize || threads > int(self.block->threads.size()))
    fail(std::string(where) + " is of " + std::to_string(threads) + " threads, expected whole warps of the block");
  if (barrier.arrived && barrier.threads != threads) {
    fail(std::string(where) + " is of " + std::to_string(threads) + " threads here and of " + std::to_string(barrier.threads) +
         " elsewhere");
  }
  gather(~0u, wait ? where : interned(std::string("the arrival at ") + where), nullptr, [](Warp&, unsigned, Arguments) {});
  barrier.threads = threads;
  ++barrier.arrived;
  release(self, barrier.released);
  if (wait) barrier.waiting.push_back(&self);
  if (barrier.arrived == threads) {
    const std::vector<Thread*> waiting = std::move(barrier.waiting);
    for (Thread* thread : waiting) {
      acquire(*thread, barrier.released);
      wake(thread);
    }
    barrier = NamedBarrier();
  }
  if (wait) suspend(where);
}

// --- TMA

static void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(std::string("tensor map: ") + what);
}

TensorMap make_tensor_map(const void* data, int element_size, const uint64_t (&sizes)[4], const uint64_t (&strides)[3],
                          const uint32_t (&box)[4]) {
  ++machine.encoded_tensor_maps;
  for (uint64_t size : sizes) require(size >= 1 && size <= uint64_t(1) << 32, "expected sizes from 1 to 2^32");
  for (uint64_t stride : strides)
    require(stride % 16 == 0 && stride < uint64_t(1) << 40, "expected strides below 2^40 that are multiples of 16 bytes");
  for (uint32_t extent : box) require(extent >= 1 && extent <= 256, "expected a box of 1 to 256 elements in each dimension");
  require(box[0] * element_size == 128, "expected box rows of 128 bytes");  // fewer are allowed, but not used
  TensorMap map = {nullptr, element_size, {}, {}, {}};
  set_address(map, data);
  std::copy(sizes, sizes + 4, map.sizes);
  std::copy(strides, strides + 3, map.strides);
  std::copy(box, box + 4, map.box);
  return map;
}

void set_address(TensorMap& map, const void* data) {
  require(reinterpret_cast<uintptr_t>(data) % 16 == 0, "expected an address that is a multiple of 16");
  map.data = static_cast<const char*>(data);
}

// Calls f(offset in the box, global address or null if beyond the tensor, valid bytes) for each 16 bytes of the box.
template <class Function>
static void for_each_chunk(const BoxCopy& copy, Function f) {
  const TensorMap& map = copy.map;
  unsigned offset = 0;
  for (unsigned w = 0; w < map.box[3]; ++w) {
    for (unsigned z = 0; z < map.box[2]; ++z) {
      for (unsigned y = 0; y < map.box[1]; ++y) {
        const int64_t at[] = {copy.from[0], copy.from[1] + int64_t(y), copy.from[2] + int64_t(z), copy.from[3] + int64_t(w)};
        bool inside = true;
        int64_t address = 0;
        for (int i = 1; i < 4; ++i) {
          inside = inside && at[i] >= 0 && at[i] < int64_t(map.sizes[i]);
          address += at[i] * int64_t(map.strides[i - 1]);
        }
        for (unsigned byte = 0; byte < map.box[0] * map.element_size; byte += 16, offset += 16) {
          const int64_t first = at[0] * map.element_size + byte, end = int64_t(map.sizes[0]) * map.element_size;
          const int valid = inside && first >= 0 ? int(std::clamp<int64_t>(end - first, 0, 16)) : 0;
          f(offset, valid ? map.data + address + first : nullptr, valid);
        }
      }
    }
  }
}

// The part of a copy that one block of the cluster receives.
static void start_copy(Block& block, BoxCopy copy) {
  const Thread& self = *machine.running;
  MBarrier& barrier = mbarrier_at(block, copy.barrier);
  const Thread& creator = thread_of(*block.cluster, barrier.creator);
  const auto fence = std::upper_bound(creator.fences.begin(), creator.fences.end(), barrier.created);
  if (fence == creator.fences.end() || !ordered(self, creator.id, *fence - 1))
    fail("no fence.proxy.async follows the initialisation of " + name(copy.barrier));
  check_shared(block, copy.to, copy.bytes, 1024, "TMA write");
  start_copy_to(block, copy.to, copy.bytes);
  for (unsigned i = 0; i < copy.bytes; ++i) block.shadow[copy.to + i].writer = barrier.agent;
  machine.launches.back().counters.tma_bytes += copy.bytes;
  copy.block = &block;
  machine.copies.push_back(copy);
}

void tma_load(unsigned to, const TensorMap& map, const int (&from)[4], unsigned barrier, unsigned ranks) {
  BoxCopy copy = {nullptr, to, map.box_bytes(), barrier, map, {}};
  std::copy(from, from + 4, copy.from);
  // A rule of this project, not of the hardware: the emulator copies chunks of 16 bytes.
  if (copy.from[0] * map.element_size % 16) fail("expected a TMA copy to start at a multiple of 16 bytes of a row");
  for_each_chunk(copy, [](unsigned, const char* address, int valid) {
    for (int byte = 0; byte < valid; byte += valid == 16 ? 16 : 2) count_global_read(address + byte, valid == 16 ? 16 : 2);
  });
  ++machine.launches.back().counters.tma;
  if (!ranks) return start_copy(*machine.running->block, copy);
  for (unsigned rank = 0; ranks >> rank; ++rank) {
    if (ranks >> rank & 1) start_copy(block_of_cluster(rank), copy);
  }
}

bool complete_copy() {
  if (machine.copies.empty()) return false;
  const size_t i = machine.seed ? machine.random() % machine.copies.size() : 0;
  const BoxCopy copy = machine.copies[i];
  machine.copies.erase(machine.copies.begin() + i);
  Block& block = *copy.block;
  MBarrier& barrier = block.mbarriers[copy.barrier];
  for_each_chunk(copy, [&](unsigned offset, const char* address, int valid) {
    unsigned at = copy.to + offset;
    at ^= at >> 3 & 0x70;  // 128-byte swizzle: address bits 4 to 6 are xored with bits 7 to 9
    std::memset(&block.shared[at], 0, 16);
    for (int byte = 0; byte < valid; ++byte) block.shared[at + byte] = static_cast<const volatile char*>(address)[byte];
  });
  for (unsigned i = 0; i < copy.bytes; ++i) {
    Shadow& s = block.shadow[copy.to + i];
    s = Shadow();
    s.state = Shadow::kWritten;
    s.writer = barrier.agent;
    s.written = machine.clock;
  }
  barrier.copied = machine.clock;
  know(barrier.released, block, barrier.agent);
  barrier.bytes -= copy.bytes;
  complete_phase_if_due(barrier);
  return true;
}

std::string find_unawaited_copy(const Block& block) {
  for (const auto& [address, barrier] : block.mbarriers) {
    const bool awaited = std::any_of(block.threads.begin(), block.threads.end(),
                                     [&](const Thread& t) { return ordered(t, barrier.agent, barrier.copied); });
    if (barrier.copied && !awaited) return "no thread waited for a TMA copy that completes on " + name(address);
  }
  return "";
}

}  // namespace emu
