// The state of the emulated GPU. There is one, in one operating-system thread; emulated threads are fibers that take turns.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "../include/emulator.h"
#include "fiber.h"

namespace emu {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;

struct Block;
struct Warp;

// One memory access of one thread, logged until the accesses of its warp are grouped into requests.
enum class Kind : uint8_t { kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite };
struct Access {
  const void* site;  // the instruction, identified by the return address of the call
  uint64_t address;
  uint16_t buffer;
  uint8_t bytes;
  Kind kind;
};

// A cp.async in flight.
struct Copy {
  unsigned to;
  const void* from;
  int bytes;
  bool valid;
  int group;
};

// Registers of one thread that a wgmma.fence named, and what they held then.
struct FencedRegisters {
  const char* data;
  std::vector<char> contents;
};

// A product in flight. Its result is known, but the registers hold poison until the wait.
struct Product {
  int group, n;
  std::vector<float*> d;           // of each thread of the warpgroup
  std::vector<const uint32_t*> a;  // of each thread, if in registers
  std::vector<uint32_t> a_values;  // [thread][4]
  std::vector<float> result;       // [thread][n / 2]
  std::vector<unsigned> chunks;    // of shared memory, 16 bytes each, that it reads
};

// What other agents have done that a thread knows of: everything before known[agent], by Machine::clock. Agents are the threads
// of the cluster and, after them, the mbarriers, which stand for the copies that complete on them. Empty until it is needed.
using Knowledge = std::vector<uint32_t>;

struct Thread : Builtins {
  Fiber fiber;
  Block* block;
  Warp* warp;
  unsigned lane;  // in its warp
  uint16_t id;    // in its cluster
  bool finished = false;
  bool previous_ended = true;      // the kernel before this one: false in a dependent launch until the wait
  const char* waits_at = nullptr;  // while suspended: the operation, and its line if known
  int waits_line = 0;
  uint32_t met[kWarpSize] = {};  // the time of the last __syncwarp with each lane
  Knowledge known;               // through mbarriers and named barriers
  std::vector<uint32_t> fences;  // the times of its fence.proxy.async
  std::vector<Copy> copies;
  int groups = 0;  // committed cp.async groups
  std::vector<Access> log;
};

// Lanes that wait for each other at a warp-wide instruction.
struct Gathering {
  unsigned mask, arrived = 0;
  const char* what;
  void* arguments[kWarpSize];
};

struct Warp {
  std::vector<Thread*> lanes;
  std::vector<Gathering> gatherings;
  unsigned mask() const { return lanes.size() == kWarpSize ? ~0u : (1u << lanes.size()) - 1; }
};

constexpr unsigned kWarpgroupSize = 4 * kWarpSize;

struct Warpgroup {
  std::vector<Thread*> threads;
  const char* what = nullptr;  // the operation at which its threads gather
  std::vector<Thread*> arrived;
  void* arguments[kWarpgroupSize];
  std::vector<Product> products;                        // in flight
  int groups = 0;                                       // committed
  std::vector<FencedRegisters> fenced[kWarpgroupSize];  // by thread, until no product is in flight
  int registers = 0;                                    // of each thread
};

struct MBarrier {
  unsigned arrivals = 0;           // of each phase
  int64_t missing = 0, bytes = 0;  // until the phase completes: arrivals, and bytes of copies
  unsigned phase = 0;
  uint16_t agent = 0;  // its copies, in Knowledge
  uint16_t creator = 0;
  uint32_t created = 0, copied = 0;  // times of init and of the last copy
  Knowledge released;                // by those who have arrived
  Knowledge completed;               // `released` when the last phase completed
  std::vector<Thread*> waiting;
};

// A barrier of some warps (`barrier.cta`).
struct NamedBarrier {
  int threads = 0, arrived = 0;
  Knowledge released;
  std::vector<Thread*> waiting;
};

// Threads that wait for each other at a barrier of a block, a cluster or the grid.
struct Barrier {
  unsigned size = 0;
  int line = 0;
  const char* what = nullptr;
  std::vector<Thread*> waiting;
  int votes = 0, outcome = 0;
  unsigned finished = 0;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block*> blocks;
};

// The history of one byte of shared memory: threads by their id in the cluster, times by Machine::clock.
struct Shadow {
  enum State : uint8_t { kUnwritten, kWritten, kInFlight };
  enum Readers : uint8_t { kNone, kOneThread, kOneWarp, kOneBlock, kOneCluster };
  State state = kUnwritten;
  Readers readers = kNone;
  uint16_t writer = 0, reader = 0;  // with several readers, `reader` is one of their warp, block or cluster
  uint16_t proxy = 0;               // 1 if an ordinary store wrote it, 0 if a copy did
  uint32_t written = 0, read = 0;
  uint32_t reader_set = 0;  // in Block::reader_sets, if several threads read it in a block with mbarriers
};

// The wgmmas that read 16 bytes of shared memory, by warpgroup.
struct ProductReaders {
  uint8_t in_flight[8] = {};
  uint32_t read[8] = {};  // when a wait last completed one
};

// A TMA copy in flight.
struct BoxCopy {
  Block* block;
  unsigned to, bytes, barrier;
  TensorMap map;
  int from[4];
};

struct Block {
  unsigned rank;
  Cluster* cluster;
  Barrier barrier;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  std::vector<Shadow> shadow;
  uint32_t synced = 0, cluster_synced = 0;  // times of the last barriers of the block and of its cluster
  uint32_t used_remotely = 0;               // when another block last used its shared memory
  std::vector<Warpgroup> warpgroups;
  std::map<unsigned, MBarrier> mbarriers;  // by address
  NamedBarrier named_barriers[16];
  std::vector<std::array<uint32_t, kMaxThreads / kWarpSize>> reader_sets = {{}};  // when each warp last read a byte
  std::vector<ProductReaders> product_readers;  // by chunk of 16 bytes; empty until it is needed
  int spare_registers = 0;                      // that setmaxnreg may give to a warpgroup
  std::vector<Thread*> waits_for_registers;
};

struct Counters {
  uint64_t read_bytes = 0, written_bytes = 0;      // requested by threads
  uint64_t read_sectors = 0, written_sectors = 0;  // of 32 bytes, each counted once per request of a warp
  uint64_t read_requests = 0, write_requests = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0;
  uint64_t bank_conflicts = 0;  // wavefronts beyond the fewest possible
  unsigned worst_ways = 1;      // the most wavefronts of one phase of a request
  uint64_t mma = 0;
  uint64_t wgmma = 0, wgmma_flops = 0, wgmma_shared_bytes = 0;  // bytes of operands read from shared memory
  uint64_t tma = 0, tma_bytes = 0;                              // copies, and bytes that they write to shared memory
};

struct LaunchRecord {
  std::string kernel;
  Shape shape;
  Counters counters;
};

struct Buffer {
  std::string name;
  char* data;
  void* allocation;
  size_t bytes, allocated;
  bool writable;
  Counters counters;
};

struct Machine {
  // The current launch
  const std::function<void()>* body = nullptr;
  Thread* running = nullptr;
  Fiber host;
  std::deque<Thread*> ready;
  Barrier grid;
  std::vector<BoxCopy> copies;
  uint32_t clock = 1;  // counts synchronizations, which order the accesses before them and after them
  std::string failure;

  // The current call
  uint64_t seed = 0;
  std::mt19937_64 random;
  int multiprocessors = 4;
  size_t shared_limit = 227 * 1024;  // per block on sm_90; 163 KB on sm_80, 99 KB on sm_86
  bool dependent_launches = true;
  int device_queries = 0, encoded_tensor_maps = 0;
  std::vector<Buffer> buffers;
  std::map<std::string, std::pair<size_t, size_t>> chosen_blocks;  // by kernel: the first block to run and the end
  std::vector<LaunchRecord> launches;
  std::string error;
};
extern Machine machine;

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const std::string& message);

// Lets other threads run until wake() is called for the running thread.
void suspend(const char* waits_at, int line = 0);
void wake(Thread* thread);

// Waits until every lane in `mask` is at `what`. The last to arrive runs `together` with the arguments of all lanes.
using Arguments = void* const (&)[kWarpSize];
void gather(unsigned mask, const char* what, void* argument, void (*together)(Warp& warp, unsigned mask, Arguments lanes));

// Waits until every thread of the warpgroup is at `what`. The last to arrive runs `together`, with the arguments in the order of
// the threads.
using WarpgroupArguments = void* const (&)[kWarpgroupSize];
void gather_warpgroup(const char* what, void* argument, void (*together)(Warpgroup& warpgroup, WarpgroupArguments threads));

// Ordering (ordering.cpp): what a thread did before release() comes before what another does after acquire().
constexpr uint16_t kFirstMBarrier = 0x8000;  // ids of agents that are not threads
constexpr unsigned kMaxMBarriers = 64;       // of a block
void release(const Thread& thread, Knowledge& to);
void acquire(Thread& thread, const Knowledge& from);
void acquire_from_all(const std::vector<Thread*>& threads);  // each of the others' knowledge
void know(Knowledge& knowledge, const Block& block, uint16_t agent);
uint32_t known(const Thread& thread, uint16_t agent);  // everything that the agent did before this time
bool ordered(const Thread& thread, uint16_t agent, uint32_t time);
std::string describe_agent(const Cluster& cluster, uint16_t agent);

// Shared memory (memory.cpp).
void check_shared(const Block& block, unsigned address, int bytes, int alignment, const char* what);
Block& block_of_cluster(unsigned rank);                              // for an access to its shared memory
void start_copy_to(Block& block, unsigned address, int bytes);       // by TMA: marks shared memory as in flight
void check_product_operand(const Thread& thread, unsigned address);  // 16 bytes that wgmma reads
void count_global_read(const void* from, int bytes);                 // one access of at most 16 bytes, by a copy

// Copies in flight (copies.cpp). Completes one, or returns false if there is none.
bool complete_copy();
std::string find_unawaited_copy(const Block& block);  // a report at the end of a block, or ""

std::string describe(const Thread& thread);
Thread& thread_of(const Cluster& cluster, uint16_t id);

// Groups the logged accesses of a warp's lanes into requests, and counts those.
void count_accesses(Warp& warp);

}  // namespace emu
