// The state of the emulated GPU. There is one, in one operating-system thread; emulated threads are fibers that take turns.
#pragma once

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

struct Thread : Builtins {
  Fiber fiber;
  Block* block;
  Warp* warp;
  unsigned lane;  // in its warp
  uint16_t id;    // in its cluster
  bool finished = false;
  const char* waits_at = nullptr;  // while suspended: the operation, and its line if known
  int waits_line = 0;
  uint32_t met[kWarpSize] = {};  // the time of the last __syncwarp with each lane
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
  uint16_t unused = 0;              // instead of padding, because shadows are compared as bytes
  uint32_t written = 0, read = 0;
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
  uint32_t read_remotely = 0;               // when another block last read its shared memory
};

struct Counters {
  uint64_t read_bytes = 0, written_bytes = 0;      // requested by threads
  uint64_t read_sectors = 0, written_sectors = 0;  // of 32 bytes, each counted once per request of a warp
  uint64_t read_requests = 0, write_requests = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0;
  uint64_t bank_conflicts = 0;  // wavefronts beyond the fewest possible
  unsigned worst_ways = 1;      // the most wavefronts of one phase of a request
  uint64_t mma = 0;
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
  uint32_t clock = 1;  // counts synchronizations, which order the accesses before them and after them
  std::string failure;

  // The current call
  uint64_t seed = 0;
  std::mt19937_64 random;
  int multiprocessors = 4;
  size_t shared_limit = 227 * 1024;  // per block on sm_90; 163 KB on sm_80, 99 KB on sm_86
  int occupancy_queries = 0;
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

std::string describe(const Thread& thread);
Thread& thread_of(Cluster& cluster, uint16_t id);

// Groups the logged accesses of a warp's lanes into requests, and counts those.
void count_accesses(Warp& warp);

}  // namespace emu
