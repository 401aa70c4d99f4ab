// Which accesses come before which on every schedule, through barriers that only some threads take part in.
#include "machine.h"

#include <algorithm>

namespace emu {

static size_t index_of(const Block& block, uint16_t agent) {
  const size_t threads = block.cluster->blocks.size() * block.threads.size();
  return agent < kFirstMBarrier ? agent : threads + agent - kFirstMBarrier;
}

static void reserve(Knowledge& knowledge, const Block& block) {
  if (knowledge.empty()) knowledge.assign(block.cluster->blocks.size() * (block.threads.size() + kMaxMBarriers), 0);
}

static void merge(Knowledge& to, const Knowledge& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

void know(Knowledge& knowledge, const Block& block, uint16_t agent) {
  reserve(knowledge, block);
  knowledge[index_of(block, agent)] = ++machine.clock;
}

void release(const Thread& thread, Knowledge& to) {
  know(to, *thread.block, thread.id);
  merge(to, thread.known);
  for (const Thread* lane : thread.warp->lanes) to[lane->id] = std::max(to[lane->id], thread.met[lane->lane]);
}

void acquire(Thread& thread, const Knowledge& from) {
  reserve(thread.known, *thread.block);
  merge(thread.known, from);
}

void acquire_from_all(const std::vector<Thread*>& threads) {
  Knowledge all;
  for (Thread* thread : threads) {
    if (thread->known.empty()) continue;
    reserve(all, *thread->block);
    merge(all, thread->known);
  }
  if (all.empty()) return;
  for (Thread* thread : threads) acquire(*thread, all);
}

uint32_t known(const Thread& self, uint16_t agent) {
  uint32_t time = self.known.empty() ? 0 : self.known[index_of(*self.block, agent)];
  if (agent >= kFirstMBarrier) return time;
  const Thread& other = thread_of(*self.block->cluster, agent);
  if (other.block != self.block) return std::max(time, self.block->cluster_synced);
  if (other.warp == self.warp) time = std::max(time, self.met[other.lane]);
  return std::max(time, self.block->synced);
}

bool ordered(const Thread& self, uint16_t agent, uint32_t time) { return agent == self.id || time < known(self, agent); }

std::string describe_agent(const Cluster& cluster, uint16_t agent) {
  if (agent < kFirstMBarrier) return describe(thread_of(cluster, agent));
  for (const auto& [address, barrier] : cluster.blocks[(agent - kFirstMBarrier) / kMaxMBarriers]->mbarriers) {
    if (barrier.agent == agent) return "the mbarrier at byte " + std::to_string(address);
  }
  return "an mbarrier";
}

}  // namespace emu
