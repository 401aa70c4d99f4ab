// Launches, scheduling and barriers.
#include "machine.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>
#include <sys/mman.h>
#include <tuple>

namespace emu {

Machine machine;
Builtins* builtins = nullptr;

// --- Errors

static std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

static std::string place(const char* what, int line) {
  return line ? std::string(what) + " in line " + std::to_string(line) : what;
}

std::string describe(const Thread& t) { return "block " + text(t.Builtins::block) + " thread " + text(t.thread); }

void fail(const std::string& message) {
  machine.failure = message + " [" + describe(*machine.running) + "]";
  leave(machine.running->fiber, machine.host);
}

// --- Stacks, reused by later launches

static struct Stacks {
  std::vector<char*> chunks;
  static constexpr size_t kPerChunk = 64;

  char* at(size_t i) {
    while (chunks.size() <= i / kPerChunk) {
      void* p =
          mmap(nullptr, kPerChunk * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (p == MAP_FAILED) throw std::runtime_error("out of memory for the stacks of the threads that run together");
      chunks.push_back(static_cast<char*>(p));
    }
    return chunks[i / kPerChunk] + i % kPerChunk * kStackBytes;
  }

  void scrub_all() {
    for (char* chunk : chunks) scrub(chunk, kPerChunk * kStackBytes);
  }
} stacks;

// --- Scheduling: seed 0 runs threads and blocks in order, other seeds shuffle both

// TMA copies complete at random times, or with seed 0 only when every thread waits.
static Thread* next_thread() {
  if (machine.seed && !machine.copies.empty() && machine.random() % 64 == 0) complete_copy();
  while (machine.ready.empty() && complete_copy()) {
  }
  if (machine.ready.empty()) return nullptr;
  if (machine.seed) std::swap(machine.ready.front(), machine.ready[machine.random() % machine.ready.size()]);
  Thread* next = machine.ready.front();
  machine.ready.pop_front();
  return next;
}

static void set_running(Thread* thread) {
  machine.running = thread;
  builtins = thread;
}

void wake(Thread* thread) { machine.ready.push_back(thread); }

void suspend(const char* waits_at, int line) {
  Thread* self = machine.running;
  if (!stack_is_whole(self->fiber)) fail("stack overflow: the emulator's threads have 256 KB");
  self->waits_at = waits_at;
  self->waits_line = line;
  Thread* next = next_thread();
  if (next) set_running(next);
  if (next != self) jump(self->fiber, next ? next->fiber : machine.host);
  set_running(self);
}

[[noreturn]] static void fail_divergent(const Barrier& barrier, const std::string& reason) {
  fail("divergent barrier: " + describe(*barrier.waiting.front()) + " waits at " + place(barrier.what, barrier.line) +
       ", which this thread does not reach: " + reason);
}

static void leave_barrier(Barrier& barrier) {  // a thread returns
  if (!barrier.waiting.empty()) fail_divergent(barrier, "it has returned");
  ++barrier.finished;
}

static void thread_main() {
  arrived();
  (*machine.body)();
  Thread* self = machine.running;
  if (!stack_is_whole(self->fiber)) fail("stack overflow: the emulator's threads have 256 KB");
  if (!self->previous_ended)
    fail("a thread of a dependent launch ends without wait_for_previous_kernel(): later kernels could overtake earlier ones");
  self->finished = true;
  for (const Gathering& g : self->warp->gatherings) {
    if (g.mask >> self->lane & 1) fail(std::string("divergent warp: ") + g.what + " names a lane that has returned");
  }
  if (self->block->used_remotely && self->block->used_remotely >= self->block->cluster_synced) {
    fail("this block ends while another block of its cluster may still use its shared memory: call cluster_sync() first");
  }
  if (self->id % kWarpgroupSize == 0 && !self->block->warpgroups.empty()) {
    for (const Warpgroup& warpgroup : self->block->warpgroups) {
      if (warpgroup.threads[0] == self && !warpgroup.products.empty())
        fail("a wgmma is in flight at the end: its wait is missing");
    }
  }
  leave_barrier(self->block->barrier);
  leave_barrier(self->block->cluster->barrier);
  leave_barrier(machine.grid);
  Thread* next = next_thread();
  if (next) set_running(next);
  leave(self->fiber, next ? next->fiber : machine.host);
}

// --- Barriers

// Returns true in the last thread to arrive, after it has woken the others. `wide` barriers span several blocks.
static bool arrive(Barrier& barrier, const char* what, int line, bool wide) {
  if (barrier.finished)
    fail(std::string("divergent barrier: this thread waits at ") + place(what, line) + ", but others have returned");
  if (barrier.waiting.empty()) {
    barrier.what = what;
    barrier.line = line;
  } else if (barrier.line != line || (barrier.what != what && std::strcmp(barrier.what, what))) {
    fail_divergent(barrier, "it is at " + place(what, line));
  }
  barrier.waiting.push_back(machine.running);
  if (barrier.waiting.size() < barrier.size) {
    suspend(what, line);
    return false;
  }
  ++machine.clock;
  acquire_from_all(barrier.waiting);
  for (Thread* t : barrier.waiting) {
    t->block->synced = machine.clock;
    if (wide) t->block->cluster_synced = machine.clock;
    if (t->lane == 0 && t->log.size() > 1024) count_accesses(*t->warp);  // all its lanes are here, so their logs match
    if (t != machine.running) wake(t);
  }
  barrier.waiting.clear();
  return true;
}

// Threads leave a barrier in any order: the last to arrive must not always be the first to go on.
static void yield() {
  wake(machine.running);
  suspend("its turn");
}

void block_sync(int line) {
  if (arrive(machine.running->block->barrier, "__syncthreads", line, false)) yield();
}

int block_vote(Vote vote, int predicate, int line) {
  static const char* const names[] = {"__syncthreads_or", "__syncthreads_and", "__syncthreads_count"};
  Barrier& barrier = machine.running->block->barrier;
  barrier.votes += predicate != 0;
  if (arrive(barrier, names[static_cast<int>(vote)], line, false)) {
    const bool every = barrier.votes == static_cast<int>(barrier.size);
    barrier.outcome = vote == Vote::kCount ? barrier.votes : vote == Vote::kOr ? barrier.votes > 0 : every;
    barrier.votes = 0;
    yield();
  }
  return barrier.outcome;
}

void cluster_sync() {
  if (arrive(machine.running->block->cluster->barrier, "cluster_sync", 0, true)) yield();
}

void grid_sync() {
  if (!machine.launches.back().shape.cooperative) fail("grid_sync() in a launch that is not cooperative");
  if (arrive(machine.grid, "grid_sync", 0, true)) yield();
}

Thread& thread_of(const Cluster& cluster, uint16_t id) {
  const size_t per_block = cluster.blocks[0]->threads.size();
  return cluster.blocks[id / per_block]->threads[id % per_block];
}

unsigned cluster_rank() { return machine.running->block->rank; }
unsigned cluster_size() { return machine.running->block->cluster->blocks.size(); }

// --- Warps

void gather(unsigned mask, const char* what, void* argument, void (*together)(Warp&, unsigned, Arguments)) {
  Thread* self = machine.running;
  Warp& warp = *self->warp;
  const unsigned mine = 1u << self->lane;
  if (!(mask & mine)) fail(std::string(what) + ": the calling lane is not in its own mask");
  mask &= warp.mask();
  auto it = std::find_if(warp.gatherings.begin(), warp.gatherings.end(), [&](auto& g) { return (g.mask & mask) != 0; });
  if (it == warp.gatherings.end()) {
    for (Thread* lane : warp.lanes) {
      if (mask >> lane->lane & 1 && lane->finished)
        fail(std::string("divergent warp: ") + what + " names a lane that has returned");
    }
    it = warp.gatherings.insert(it, Gathering());
    it->mask = mask;
    it->what = what;
  } else if (it->mask != mask || (it->what != what && std::strcmp(it->what, what))) {
    fail("divergent warp: this lane is at " + std::string(what) + ", others of its mask are at " + it->what);
  }
  it->arrived |= mine;
  it->arguments[self->lane] = argument;
  if (it->arrived != mask) {
    suspend(what);
    return;
  }
  const Gathering complete = *it;
  warp.gatherings.erase(it);
  together(warp, mask, complete.arguments);
  for (Thread* lane : warp.lanes) {
    if (mask >> lane->lane & 1 && lane != self) wake(lane);
  }
  yield();
}

void gather_warpgroup(const char* what, void* argument, void (*together)(Warpgroup&, WarpgroupArguments)) {
  Thread* self = machine.running;
  const unsigned linear = self - self->block->threads.data();
  if (linear / kWarpgroupSize >= self->block->warpgroups.size()) fail(std::string(what) + " needs a warpgroup of 128 threads");
  Warpgroup& group = self->block->warpgroups[linear / kWarpgroupSize];
  if (group.arrived.empty()) {
    group.what = what;
  } else if (std::strcmp(group.what, what)) {
    fail("divergent warpgroup: this thread is at " + std::string(what) + ", others are at " + group.what);
  }
  for (const Thread* t : group.threads) {
    if (t->finished) fail("divergent warpgroup: " + std::string(what) + " needs a thread that has returned");
  }
  group.arrived.push_back(self);
  group.arguments[linear % kWarpgroupSize] = argument;
  if (group.arrived.size() < kWarpgroupSize) {
    suspend(what);
    return;
  }
  const std::vector<Thread*> arrived = std::move(group.arrived);
  group.arrived.clear();
  together(group, group.arguments);
  for (Thread* t : arrived) {
    if (t != self) wake(t);
  }
  yield();
}

// --- Launches

// Blocks that run at the same time: one, a cluster, or a whole cooperative grid.
struct Residents {
  std::deque<Block> blocks;
  std::deque<Cluster> clusters;
};

static void add_block(Residents& residents, Cluster& cluster, const Shape& shape, unsigned linear, size_t& stack) {
  Block& block = residents.blocks.emplace_back();
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  block.rank = cluster.blocks.size();
  block.cluster = &cluster;
  block.barrier.size = threads;
  block.shared.assign(shape.shared_bytes, 0xff);  // NaN in every type
  block.shadow.assign(shape.shared_bytes, Shadow());
  block.threads.resize(threads);
  block.warps.resize((threads + kWarpSize - 1) / kWarpSize);
  block.warpgroups.resize(threads / kWarpgroupSize);
  // What ptxas gives a kernel that has __launch_bounds__(threads, 1) and setmaxnreg.
  const int registers = std::min<int>(65536 / threads / 8 * 8, 248);
  block.spare_registers = 0;
  for (Warpgroup& warpgroup : block.warpgroups) warpgroup.registers = registers;
  cluster.blocks.push_back(&block);
  cluster.barrier.size += threads;
  machine.grid.size += threads;
  for (unsigned i = 0; i < threads; ++i) {
    Thread& t = block.threads[i];
    t.thread = {i % shape.block.x, i / shape.block.x % shape.block.y, i / (shape.block.x * shape.block.y)};
    t.Builtins::block = {linear % shape.grid.x, linear / shape.grid.x % shape.grid.y, linear / (shape.grid.x * shape.grid.y)};
    t.block_size = shape.block;
    t.grid_size = shape.grid;
    t.block = &block;
    t.warp = &block.warps[i / kWarpSize];
    t.id = block.rank * threads + i;
    t.lane = i % kWarpSize;
    t.previous_ended = !shape.dependent;
    t.warp->lanes.push_back(&t);
    if (i / kWarpgroupSize < block.warpgroups.size()) block.warpgroups[i / kWarpgroupSize].threads.push_back(&t);
    prepare(t.fiber, stacks.at(stack++), thread_main);
    wake(&t);
  }
}

static void run_together(const Shape& shape, const std::vector<unsigned>& first_blocks) {
  Residents residents;
  size_t stack = 0;
  machine.ready.clear();
  machine.copies.clear();
  machine.grid = Barrier();
  for (unsigned first : first_blocks) {
    Cluster& cluster = residents.clusters.emplace_back();
    for (unsigned i = 0; i < shape.cluster; ++i) add_block(residents, cluster, shape, first + i, stack);
  }
  Thread* first = next_thread();
  set_running(first);
  jump(machine.host, first->fiber);

  if (machine.failure.empty()) {
    std::map<std::string, std::vector<const Thread*>> waiting;
    for (Block& block : residents.blocks) {
      for (Thread& t : block.threads) {
        if (!t.finished) waiting[place(t.waits_at, t.waits_line)].push_back(&t);
      }
      if (waiting.empty()) {
        for (Warp& warp : block.warps) count_accesses(warp);
      }
    }
    for (auto& [where, threads] : waiting) {
      machine.failure += (machine.failure.empty() ? "deadlock: " : "; ") + std::to_string(threads.size()) + " threads wait at " +
                         where + " [" + describe(*threads[0]) + "]";
    }
  }
  for (size_t i = 0; i < residents.blocks.size() && machine.failure.empty(); ++i)
    machine.failure = find_unawaited_copy(residents.blocks[i]);
  machine.copies.clear();
  if (!machine.failure.empty()) {
    stacks.scrub_all();  // their frames will never return
    std::string failure;
    failure.swap(machine.failure);
    throw std::runtime_error(machine.launches.back().kernel + ": " + failure);
  }
}

static size_t residents(size_t threads, size_t shared_bytes);

// An emulated device is identified by what it can do. Like CUDA's, the kernels' attributes last as long as the process.
int device() {
  static std::map<std::tuple<int, size_t, bool>, int> devices;
  const auto key = std::make_tuple(machine.multiprocessors, machine.shared_limit, machine.dependent_launches);
  return devices.try_emplace(key, devices.size()).first->second;
}

// The dynamic shared memory that each kernel has opted in to, by device.
static std::map<std::pair<int, const void*>, int> max_shared_memory;

// Another thread may be between setting the attribute and its launch, so a kernel's limit must never become lower.
void set_max_shared_memory(const void* function, int bytes) {
  int& allowed = max_shared_memory[{device(), function}];
  if (size_t(bytes) > machine.shared_limit) throw std::runtime_error("set_max_shared_memory: more than the device's limit");
  if (bytes < allowed) {
    throw std::runtime_error("a kernel's limit of dynamic shared memory is lowered from " + std::to_string(allowed) + " to " +
                             std::to_string(bytes) + " bytes, which would fail another thread's launch");
  }
  allowed = bytes;
}

static void check_opt_in(const Shape& s) {
  const auto found = max_shared_memory.find({device(), s.function});
  const size_t allowed = std::max(found == max_shared_memory.end() ? 0 : found->second, 48 << 10);
  if (s.shared_bytes > allowed) {
    throw std::runtime_error(machine.launches.back().kernel + ": invalid launch: " + std::to_string(s.shared_bytes) +
                             " bytes of dynamic shared memory, but the kernel has opted in to " + std::to_string(allowed));
  }
}

static void check_shape(const Shape& s) {
  auto refuse = [](const std::string& reason) {
    throw std::runtime_error(machine.launches.back().kernel + ": invalid launch: " + reason);
  };
  const uint64_t threads = uint64_t(s.block.x) * s.block.y * s.block.z;
  if (threads == 0 || threads > kMaxThreads) refuse(std::to_string(threads) + " threads in a block");
  if (s.block.z > 64) refuse("a block of more than 64 threads in z");
  if (!s.grid.x || !s.grid.y || !s.grid.z) refuse("an empty grid");
  if (s.grid.x > 0x7fffffffu || s.grid.y > 65535 || s.grid.z > 65535) refuse("a grid that is too large in one dimension");
  if (s.shared_bytes > machine.shared_limit) refuse(std::to_string(s.shared_bytes) + " bytes of shared memory in a block");
  if (s.cluster == 0 || s.cluster > 16 || s.grid.x % s.cluster) refuse("the grid is not whole clusters of at most 16 blocks");
  const uint64_t blocks = uint64_t(s.grid.x) * s.grid.y * s.grid.z;
  if (s.cooperative && blocks > machine.multiprocessors * uint64_t(residents(threads, s.shared_bytes))) {
    refuse("a cooperative grid of " + std::to_string(blocks) + " blocks, more than fit at once");
  }
}

// The kernels of a call are one chain, and other libraries' kernels run before it.
static void check_dependent(const Shape& s) {
  if (s.dependent && machine.launches.size() == 1) {
    throw std::runtime_error(machine.launches.back().kernel +
                             ": invalid launch: the first kernel of a call is a dependent one, "
                             "but the inputs may still be written by other kernels");
  }
}

void wait_for_previous_kernel() { machine.running->previous_ended = true; }

void launch(const char* kernel, const Shape& shape, const std::function<void()>& body) {
  machine.launches.push_back({kernel, shape, {}});
  check_shape(shape);
  check_opt_in(shape);
  check_dependent(shape);
  machine.host = host_fiber();
  machine.body = &body;
  std::vector<unsigned> first_blocks(shape.grid.x * shape.grid.y * shape.grid.z / shape.cluster);
  for (size_t i = 0; i < first_blocks.size(); ++i) first_blocks[i] = i * shape.cluster;
  if (const auto chosen = machine.chosen_blocks.find(kernel); chosen != machine.chosen_blocks.end()) {
    const auto [first, end] = chosen->second;
    first_blocks = {first_blocks.begin() + first, first_blocks.begin() + end};
  }
  if (machine.seed) std::shuffle(first_blocks.begin(), first_blocks.end(), machine.random);
  if (shape.cooperative) return run_together(shape, first_blocks);
  for (unsigned first : first_blocks) run_together(shape, {first});
}

int multiprocessors() {
  ++machine.device_queries;
  return machine.multiprocessors;
}

bool can_launch_dependent() { return machine.dependent_launches; }
int shared_memory_limit() { return static_cast<int>(machine.shared_limit); }

// Blocks that run on one multiprocessor at the same time. It holds at most 2048 threads and 32 blocks. Its shared memory is the
// largest size that one block may request, plus 1 KB. CUDA reserves 1 KB of it for every block.
static size_t residents(size_t threads, size_t shared_bytes) {
  return std::min<size_t>({(machine.shared_limit + 1024) / (shared_bytes + 1024), 2048 / threads, 32});
}

int blocks_per_multiprocessor(int threads, size_t shared_bytes) {
  ++machine.device_queries;
  return static_cast<int>(residents(threads, shared_bytes));
}

}  // namespace emu
