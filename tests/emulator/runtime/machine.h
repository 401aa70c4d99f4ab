// The emulated GPU's state. One of it, in one operating-system thread: emulated threads are fibers that take turns.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../include/emulator.h"
#include "fiber.h"

namespace emu {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;

struct Block;
struct Warp;

// One access to memory by one thread, kept until its warp's accesses are grouped into requests.
enum class Kind : uint8_t { kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite };
struct Access {
  const void* site;  // the instruction, as the return address of the call
  uint64_t address;
  uint16_t buffer;
  uint8_t bytes;
  Kind kind;
};

// A cp.async on its way.
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
  unsigned lane;  // within its warp
  uint16_t id;    // within its cluster
  bool finished = false;
  const char* waits_at = nullptr;  // set while suspended, with the line it is in where known
  int waits_line = 0;
  uint32_t met[kWarp] = {};  // when this thread last was at a __syncwarp with each lane
  std::vector<Copy> copies;
  int groups = 0;  // cp.async groups committed so far
  std::vector<Access> log;
};

// Lanes that wait for one another at one warp-wide instruction.
struct Gathering {
  unsigned mask, arrived = 0;
  const char* what;
  void* arguments[kWarp];
};

struct Warp {
  std::vector<Thread*> lanes;
  std::vector<Gathering> gatherings;
  unsigned mask() const { return lanes.size() == kWarp ? ~0u : (1u << lanes.size()) - 1; }
};

// Threads that wait for one another at a barrier of a block, a cluster or the grid.
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

// What is known of one byte of shared memory. Threads by their id in the cluster; times by Machine::clock.
struct Shadow {
  enum State : uint8_t { kUnwritten, kWritten, kInFlight };
  enum Readers : uint8_t { kNone, kOne, kWarpful, kBlockful, kClusterful };
  State state = kUnwritten;
  Readers readers = kNone;
  uint16_t writer = 0, reader = 0;  // the reader stands for its warp, block or cluster where there were many
  uint16_t unused = 0;              // no padding: shadows are compared as bytes
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
  uint32_t synced = 0, cluster_synced = 0;  // when its threads last all met; when its cluster's did
  uint32_t read_from_afar = 0;              // when another block last read its shared memory
};

struct Counters {
  uint64_t read_bytes = 0, written_bytes = 0;      // as each thread asked
  uint64_t read_sectors = 0, written_sectors = 0;  // 32-byte sectors, each once per warp request
  uint64_t read_requests = 0, write_requests = 0;
  uint64_t shared_requests = 0, shared_wavefronts = 0;
  uint64_t bank_conflicts = 0;  // wavefronts more than the requests needed
  unsigned worst_ways = 1;      // most wavefronts that one phase of a request took
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
  // Of the launch under way
  const std::function<void()>* body = nullptr;
  Thread* running = nullptr;
  Fiber host;
  std::deque<Thread*> ready;
  Barrier grid;
  uint32_t clock = 1;  // counts synchronisations: what happened before one is ordered against what happens after it
  std::string failure;

  // Of the call
  uint64_t seed = 0;
  std::mt19937_64 random;
  int multiprocessors = 4;
  size_t shared_limit = 227 * 1024;  // of a block, on sm_90; sm_80 has 163 KB and sm_86 99 KB
  std::vector<Buffer> buffers;
  std::vector<LaunchRecord> launches;
  std::string error;
};
extern Machine machine;

// Ends the launch with an error that names the running thread.
[[noreturn]] void fail(const std::string& message);

// Lets others run until the running thread is woken.
void suspend(const char* waits_at, int line = 0);
void wake(Thread* thread);

// Waits until every lane in `mask` is at `what`; the last to arrive runs `together` with what each lane passed.
using Arguments = void* const (&)[kWarp];
void gather(unsigned mask, const char* what, void* argument, void (*together)(Warp& warp, unsigned mask, Arguments lanes));

std::string describe(const Thread& thread);
Thread& thread_of(Cluster& cluster, uint16_t id);

// Groups what the lanes of a warp accessed into requests, and counts those.
void count_accesses(Warp& warp);

}  // namespace emu
