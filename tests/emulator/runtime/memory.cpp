// Global and shared memory: bounds, alignment, races, and the cost of each request.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

namespace emu {

// AddressSanitizer has device memory marked as poisoned, so that kernels cannot access it directly. This copy must not become a
// call of memcpy, which AddressSanitizer intercepts.
static void copy_bytes(void* to, const void* from, int bytes) {
  switch (bytes) {
    case 16: __builtin_memcpy(to, from, 16); break;
    case 8: __builtin_memcpy(to, from, 8); break;
    case 4: __builtin_memcpy(to, from, 4); break;
    case 2: __builtin_memcpy(to, from, 2); break;
    case 1: __builtin_memcpy(to, from, 1); break;
    default: fail("expected an access of 1, 2, 4, 8 or 16 bytes, got " + std::to_string(bytes));
  }
}

static Counters& counters() { return machine.launches.back().counters; }

static void log_access(const void* site, Kind kind, uint64_t address, int bytes, int buffer = 0) {
  machine.running->log.push_back({site, address, static_cast<uint16_t>(buffer), static_cast<uint8_t>(bytes), kind});
}

// --- Global memory

[[noreturn]] static void fail_out_of_bounds(const char* p, int bytes, const char* what) {
  const std::string access = std::string("global ") + what + " of " + std::to_string(bytes) + " bytes ";
  if (!p) fail(access + "through a null pointer");
  const Buffer* nearest = nullptr;
  size_t least = ~size_t(0);
  for (const Buffer& b : machine.buffers) {
    const size_t distance = p < b.data ? b.data - p : std::max<ptrdiff_t>(p - (b.data + b.bytes), 0);
    if (distance < least) least = distance, nearest = &b;
  }
  if (!nearest) fail(access + "out of bounds: there are no buffers");
  fail(access + "out of bounds: at byte " + std::to_string(p - nearest->data) + " of '" + nearest->name + "', which has " +
       std::to_string(nearest->bytes));
}

static int find_buffer(const void* pointer, int bytes, const char* what) {
  static size_t last = 0;
  auto p = static_cast<const char*>(pointer);
  auto holds = [&](const Buffer& b) { return p >= b.data && p + bytes <= b.data + b.bytes; };
  if (last >= machine.buffers.size() || !holds(machine.buffers[last])) {
    last = std::find_if(machine.buffers.begin(), machine.buffers.end(), holds) - machine.buffers.begin();
    if (last == machine.buffers.size()) fail_out_of_bounds(p, bytes, what);
  }
  if (!machine.running->previous_ended && machine.buffers[last].writable) {
    fail(std::string("global ") + what + " of '" + machine.buffers[last].name +
         "' before wait_for_previous_kernel(): the previous kernel may still use it");
  }
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    fail(std::string("misaligned global ") + what + " of " + std::to_string(bytes) + " bytes at byte " +
         std::to_string(p - machine.buffers[last].data) + " of '" + machine.buffers[last].name + "'");
  }
  return last;
}

static void check_global_read(const void* site, const void* from, int bytes) {
  const int buffer = find_buffer(from, bytes, "read");
  machine.buffers[buffer].counters.read_bytes += bytes;
  counters().read_bytes += bytes;
  log_access(site, Kind::kGlobalRead, reinterpret_cast<uint64_t>(from), bytes, buffer);
}

static void check_global_write(const void* site, const void* to, int bytes) {
  const int buffer = find_buffer(to, bytes, "write");
  if (!machine.buffers[buffer].writable) fail("global write to '" + machine.buffers[buffer].name + "', which is const");
  machine.buffers[buffer].counters.written_bytes += bytes;
  counters().written_bytes += bytes;
  log_access(site, Kind::kGlobalWrite, reinterpret_cast<uint64_t>(to), bytes, buffer);
}

void global_read(const void* from, void* to, int bytes) {
  check_global_read(__builtin_return_address(0), from, bytes);
  copy_bytes(to, from, bytes);
}

void global_write(void* to, const void* from, int bytes) {
  check_global_write(__builtin_return_address(0), to, bytes);
  copy_bytes(to, from, bytes);
}

unsigned global_atomic_add(unsigned* p, unsigned value) {
  check_global_write(__builtin_return_address(0), p, sizeof *p);
  unsigned old;
  copy_bytes(&old, p, sizeof old);
  value += old;
  copy_bytes(p, &value, sizeof value);
  return old;
}

void copy_to_device(void* to, const void* from, size_t bytes) { copy_bytes(to, from, bytes); }

// --- Shared memory: which accesses are ordered

// `block` is the one whose shared memory it is.
static bool readers_ordered(const Shadow& s, const Block& block) {
  const Thread& self = *machine.running;
  switch (s.readers) {
    case Shadow::kNone: return true;
    case Shadow::kOneThread: return ordered(self, s.reader, s.read);
    case Shadow::kOneCluster: return s.read < self.block->cluster_synced;
    default: break;
  }
  if (s.reader_set) {
    const auto& times = block.reader_sets[s.reader_set];
    return std::all_of(block.threads.begin(), block.threads.end(), [&](const Thread& t) {
      const uint32_t time = times[t.warp - block.warps.data()];
      return !time || ordered(self, t.id, time);
    });
  }
  const Thread& one = thread_of(*self.block->cluster, s.reader);
  if (s.read < (one.block == self.block ? self.block->synced : self.block->cluster_synced)) return true;
  if (s.readers == Shadow::kOneBlock) return false;
  return std::all_of(one.warp->lanes.begin(), one.warp->lanes.end(),
                     [&](const Thread* lane) { return ordered(self, lane->id, s.read); });
}

static const char* copy_name(const Shadow& s) { return s.writer >= kFirstMBarrier ? "TMA copy" : "cp.async"; }

[[noreturn]] static void fail_race(const Shadow& s, unsigned address, const char* now, bool with_reader) {
  const std::string other = describe_agent(*machine.running->block->cluster, with_reader ? s.reader : s.writer);
  fail(std::string("race: shared byte ") + std::to_string(address) + " is " + now + " here and " +
       (with_reader ? "read" : "written") + " by " + other + " with no barrier in between");
}

// The readers of a byte with the running thread: barriers of some warps only order each of them at its own time.
static uint32_t add_to_set(const Shadow& s, Block& block) {
  auto warp_of = [&](uint16_t id) { return thread_of(*block.cluster, id).warp - block.warps.data(); };
  auto times = block.reader_sets[s.reader_set];
  if (!s.reader_set) times[warp_of(s.reader)] = s.read;
  times[warp_of(machine.running->id)] = machine.clock;
  if (times != block.reader_sets.back()) block.reader_sets.push_back(times);
  return block.reader_sets.size() - 1;
}

static void add_reader(Shadow& s, Block& block) {
  const Thread& self = *machine.running;
  if (s.readers == Shadow::kNone || (s.readers == Shadow::kOneThread && s.reader == self.id) || readers_ordered(s, block)) {
    s.readers = Shadow::kOneThread;
    s.reader_set = 0;
  } else {
    const bool all_local = self.block == &block && thread_of(*block.cluster, s.reader).block == &block;
    s.reader_set = all_local && !block.mbarriers.empty() ? add_to_set(s, block) : 0;
    const Thread& one = thread_of(*self.block->cluster, s.reader);
    const auto span = one.warp == self.warp     ? Shadow::kOneWarp
                      : one.block == self.block ? Shadow::kOneBlock
                                                : Shadow::kOneCluster;
    s.readers = std::max(s.readers, span);
  }
  s.reader = self.id;
  s.read = machine.clock;
}

static void check_read(const Thread& self, const Shadow& s, unsigned address) {
  if (s.state == Shadow::kUnwritten) fail("read of unwritten shared memory: byte " + std::to_string(address));
  if (s.state == Shadow::kInFlight) {
    fail("read of shared byte " + std::to_string(address) + ", to which a " + copy_name(s) + " by " +
         describe_agent(*self.block->cluster, s.writer) + " is still in flight: its wait is missing");
  }
  if (!ordered(self, s.writer, s.written)) fail_race(s, address, "read", false);
}

static void read_once(Shadow& s, unsigned address, Block& block) {
  check_read(*machine.running, s, address);
  add_reader(s, block);
}

// Every warp of the warpgroup must be known to have waited for its wgmma.
static void check_product_readers(const Block& block, unsigned address) {
  if (block.product_readers.empty()) return;
  const ProductReaders& readers = block.product_readers[address / 16];
  const std::string written =
      "race: shared byte " + std::to_string(address) + " is written here and read by a wgmma of warpgroup ";
  for (size_t i = 0; i < block.warpgroups.size(); ++i) {
    if (readers.in_flight[i]) fail(written + std::to_string(i) + ", which is still in flight");
    for (unsigned first = 0; readers.read[i] && first < kWarpgroupSize; first += kWarpSize) {
      auto begin = block.warpgroups[i].threads.begin() + first;
      if (std::none_of(begin, begin + kWarpSize,
                       [&](const Thread* lane) { return ordered(*machine.running, lane->id, readers.read[i]); })) {
        fail(written + std::to_string(i) + ", with no barrier after its wait");
      }
    }
  }
}

static void write_once(Shadow& s, unsigned address, const Block& block, Shadow::State state) {
  if (s.state == Shadow::kInFlight)
    fail("write to shared byte " + std::to_string(address) + ", to which a " + copy_name(s) + " is still in flight");
  if (s.state == Shadow::kWritten && !ordered(*machine.running, s.writer, s.written)) fail_race(s, address, "written", false);
  if (!readers_ordered(s, block)) fail_race(s, address, "written", true);
  s = Shadow();
  s.state = state;
  s.proxy = 1;
  s.writer = machine.running->id;
  s.written = machine.clock;
}

static void check_no_mbarrier(const Block& block, unsigned address, unsigned bytes) {
  const auto next = block.mbarriers.lower_bound(address < 8 ? 0 : address - 7);
  if (next != block.mbarriers.end() && next->first < address + bytes)
    fail("write to shared byte " + std::to_string(std::max(address, next->first)) + ", which belongs to the mbarrier at byte " +
         std::to_string(next->first));
}

// What the generic proxy wrote needs a fence before the async proxy uses it in `thread`.
static void check_proxy(const Thread& thread, const Shadow& s, unsigned address, const char* user) {
  if (!s.proxy) return;
  const Thread& writer = thread_of(*thread.block->cluster, s.writer);
  const auto fence = std::upper_bound(writer.fences.begin(), writer.fences.end(), s.written);
  if (fence == writer.fences.end() || !ordered(thread, writer.id, *fence - 1)) {
    fail("shared byte " + std::to_string(address) + ", which " + user + ", was stored by " + describe(writer) +
         " with no fence.proxy.async before the barrier");
  }
}

// The bytes of one access usually share one history, which is then checked once.
template <class Check>
static void for_each_byte(Block& block, unsigned address, int bytes, Check check) {
  Shadow* s = &block.shadow[address];
  Shadow before = *s;
  check(*s, address);
  for (int i = 1; i < bytes; ++i) {
    if (!std::memcmp(&s[i], &before, sizeof before)) {
      s[i] = s[i - 1];
    } else {
      before = s[i];
      check(s[i], address + i);
    }
  }
}

void check_shared(const Block& block, unsigned address, int bytes, int alignment, const char* what) {
  if (size_t(address) + bytes > block.shared.size()) {
    fail(std::string("shared ") + what + " of " + std::to_string(bytes) + " bytes at byte " + std::to_string(address) +
         ": out of bounds of the block's " + std::to_string(block.shared.size()));
  }
  if (address % alignment)
    fail(std::string("misaligned shared ") + what + " of " + std::to_string(bytes) + " bytes at byte " + std::to_string(address));
}

void check_view(unsigned first, unsigned elements, unsigned count) {
  if (uint64_t(first) + elements > count) {
    fail("shared memory: elements " + std::to_string(first) + " to " + std::to_string(uint64_t(first) + elements - 1) +
         " are out of bounds of a view of " + std::to_string(count));
  }
}

// --- Shared memory: accesses

void shared_read(unsigned address, void* to, int bytes) {
  Block& block = *machine.running->block;
  check_shared(block, address, bytes, bytes, "read");
  for_each_byte(block, address, bytes, [&](Shadow& s, unsigned at) { read_once(s, at, block); });
  log_access(__builtin_return_address(0), Kind::kSharedRead, address, bytes);
  copy_bytes(to, &block.shared[address], bytes);
}

void shared_write(unsigned address, const void* from, int bytes) {
  Block& block = *machine.running->block;
  check_shared(block, address, bytes, bytes, "write");
  check_product_readers(block, address);
  check_no_mbarrier(block, address, bytes);
  for_each_byte(block, address, bytes, [&](Shadow& s, unsigned at) { write_once(s, at, block, Shadow::kWritten); });
  log_access(__builtin_return_address(0), Kind::kSharedWrite, address, bytes);
  copy_bytes(&block.shared[address], from, bytes);
}

Block& block_of_cluster(unsigned rank) {
  const Cluster& cluster = *machine.running->block->cluster;
  if (rank >= cluster.blocks.size())
    fail("a cluster of " + std::to_string(cluster.blocks.size()) + " has no block " + std::to_string(rank));
  Block& block = *cluster.blocks[rank];
  if (&block != machine.running->block) {
    if (block.barrier.finished) fail("access to another block's shared memory after that block has begun to end");
    block.used_remotely = machine.clock;
  }
  return block;
}

void cluster_read(unsigned address, unsigned rank, void* to, int bytes) {
  Block& block = block_of_cluster(rank);
  check_shared(block, address, bytes, bytes, "read");
  for_each_byte(block, address, bytes, [&](Shadow& s, unsigned at) { read_once(s, at, block); });
  copy_bytes(to, &block.shared[address], bytes);
}

// --- Shared memory: what the async proxy does

void start_copy_to(Block& block, unsigned address, int bytes) {
  for (int i = 0; i < bytes; i += 16) check_product_readers(block, address + i);
  check_no_mbarrier(block, address, bytes);
  for_each_byte(block, address, bytes, [&](Shadow& s, unsigned at) {
    const Shadow before = s;
    write_once(s, at, block, Shadow::kInFlight);
    check_proxy(*machine.running, before, at, "a TMA copy overwrites");
  });
  std::memset(&block.shared[address], 0xff, bytes);
}

void check_product_operand(const Thread& thread, unsigned address) {
  for_each_byte(*thread.block, address, 16, [&](Shadow& s, unsigned at) {
    check_read(thread, s, at);
    check_proxy(thread, s, at, "wgmma reads");
  });
}

void count_global_read(const void* from, int bytes) {
  const int buffer = find_buffer(from, bytes, "read");
  for (Counters* c : {&machine.buffers[buffer].counters, &counters()}) {
    c->read_bytes += bytes;
    // A copy reads rows from left to right, so that the second half of a sector follows its first half.
    c->read_sectors += reinterpret_cast<uintptr_t>(from) % 32 == 0;
  }
}

// --- cp.async: the destination is poisoned until the wait, which reads the source

void cp_async(unsigned to, const void* from, int bytes, bool valid) {
  Thread& self = *machine.running;
  check_shared(*self.block, to, bytes, bytes, "write");
  if (valid) check_global_read(__builtin_return_address(0), from, bytes);
  else if (reinterpret_cast<uintptr_t>(from) % bytes)
    fail("misaligned source of a cp.async, which must be aligned even where it is not read");
  check_no_mbarrier(*self.block, to, bytes);
  for_each_byte(*self.block, to, bytes, [&](Shadow& s, unsigned at) { write_once(s, at, *self.block, Shadow::kInFlight); });
  log_access(__builtin_return_address(0), Kind::kSharedWrite, to, bytes);
  for (int i = 0; i < bytes; ++i) self.block->shared[to + i] = 0xff;
  self.copies.push_back({to, from, bytes, valid, self.groups});
}

void cp_async_commit() { ++machine.running->groups; }

void cp_async_wait(int pending) {
  Thread& self = *machine.running;
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.groups - pending; ++copy) {
    static const uint4 zeros = {0, 0, 0, 0};
    copy_bytes(&self.block->shared[copy->to], copy->valid ? copy->from : &zeros, copy->bytes);
    for (int i = 0; i < copy->bytes; ++i) {
      Shadow& s = self.block->shadow[copy->to + i];
      s.state = Shadow::kWritten;
      s.written = machine.clock;
    }
  }
  self.copies.erase(self.copies.begin(), copy);
}

// --- The cost of a warp's accesses: its lanes' accesses at one instruction are one request

static void count_global(const Access* const* lanes, int n) {
  std::pair<uint64_t, uint16_t> sectors[kWarpSize];  // accesses are aligned and at most 16 bytes, so each is in one sector
  for (int i = 0; i < n; ++i) sectors[i] = {lanes[i]->address / 32, lanes[i]->buffer};
  std::sort(sectors, sectors + n);
  const int distinct = std::unique(sectors, sectors + n) - sectors;
  const bool read = lanes[0]->kind == Kind::kGlobalRead;
  auto add = [&](Counters& c, int sectors) { (read ? c.read_sectors : c.written_sectors) += sectors; };
  auto add_request = [&](Counters& c) { ++(read ? c.read_requests : c.write_requests); };
  for (int i = 0; i < distinct; ++i) {
    Counters& buffer = machine.buffers[sectors[i].second].counters;
    add(buffer, 1);
    if (i == 0 || sectors[i].second != sectors[i - 1].second) add_request(buffer);
  }
  add(counters(), distinct);
  add_request(counters());
}

// 32 banks of 4 bytes. A phase serves 32, 16 or 8 lanes of 4, 8 or 16 bytes each; a bank delivers one word per wavefront.
static void count_shared(const Access* const* lanes, const unsigned* ids, int n) {
  const unsigned per_phase = kWarpSize / std::max(1, lanes[0]->bytes / 4);
  Counters& c = counters();
  ++c.shared_requests;
  for (int i = 0; i < n;) {
    const unsigned phase = ids[i] / per_phase;
    uint64_t words[kWarpSize];
    int count = 0;
    for (; i < n && ids[i] / per_phase == phase; ++i) {
      for (int w = 0; w < std::max(1, lanes[i]->bytes / 4); ++w) words[count++] = lanes[i]->address / 4 + w;
    }
    std::sort(words, words + count);
    count = std::unique(words, words + count) - words;
    unsigned ways[kWarpSize] = {}, wavefronts = 0;
    for (int w = 0; w < count; ++w) wavefronts = std::max(wavefronts, ++ways[words[w] % 32]);
    c.shared_wavefronts += wavefronts;
    c.bank_conflicts += wavefronts - 1;
    c.worst_ways = std::max(c.worst_ways, wavefronts);
  }
}

static void count_request(const Access* const* lanes, const unsigned* ids, int n) {
  if (lanes[0]->kind == Kind::kGlobalRead || lanes[0]->kind == Kind::kGlobalWrite) count_global(lanes, n);
  else count_shared(lanes, ids, n);
}

static bool same_instruction(const Access& a, const Access& b) {
  return a.site == b.site && a.kind == b.kind && a.bytes == b.bytes;
}

void count_accesses(Warp& warp) {
  const auto& first = warp.lanes[0]->log;
  const bool converged = std::all_of(warp.lanes.begin(), warp.lanes.end(), [&](const Thread* lane) {
    return lane->log.size() == first.size() && std::equal(first.begin(), first.end(), lane->log.begin(), same_instruction);
  });
  const Access* accesses[kWarpSize];
  unsigned ids[kWarpSize];
  if (converged) {
    const int n = warp.lanes.size();
    for (size_t i = 0; i < first.size(); ++i) {
      for (int lane = 0; lane < n; ++lane) accesses[lane] = &warp.lanes[lane]->log[i], ids[lane] = lane;
      count_request(accesses, ids, n);
    }
  } else {
    // Lanes took different paths: the k-th execution of an instruction is one request of the lanes that execute it k times.
    std::unordered_map<const void*, std::vector<std::vector<std::pair<const Access*, unsigned>>>> requests;
    for (const Thread* lane : warp.lanes) {
      std::unordered_map<const void*, size_t> times;
      for (const Access& access : lane->log) {
        // One call can both read and write (cp.async): keep these apart.
        const void* key = static_cast<const char*>(access.site) + static_cast<int>(access.kind) * (uint64_t(1) << 56);
        auto& of_site = requests[key];
        const size_t k = times[key]++;
        if (of_site.size() <= k) of_site.emplace_back();
        of_site[k].push_back({&access, lane->lane});
      }
    }
    for (const auto& [site, of_site] : requests) {
      for (const auto& request : of_site) {
        int n = 0;
        for (const auto& [access, lane] : request) accesses[n] = access, ids[n++] = lane;
        count_request(accesses, ids, n);
      }
    }
  }
  for (Thread* lane : warp.lanes) lane->log.clear();
}

}  // namespace emu
