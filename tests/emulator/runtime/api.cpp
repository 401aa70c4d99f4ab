// The functions that Python calls (../worker.py): start a call, pass buffers, read back results and counters.
#include <cstdlib>
#include <cstring>
#include <sanitizer/asan_interface.h>
#include <sstream>

#include "machine.h"

namespace emu {

void set_error(const char* message) { machine.error = message; }

static void write_json(std::ostream& out, const Counters& c) {
  out << "\"read_bytes\":" << c.read_bytes << ",\"written_bytes\":" << c.written_bytes << ",\"read_sectors\":" << c.read_sectors
      << ",\"written_sectors\":" << c.written_sectors << ",\"read_requests\":" << c.read_requests
      << ",\"write_requests\":" << c.write_requests << ",\"shared_requests\":" << c.shared_requests
      << ",\"shared_wavefronts\":" << c.shared_wavefronts << ",\"bank_conflicts\":" << c.bank_conflicts
      << ",\"worst_ways\":" << c.worst_ways << ",\"mma\":" << c.mma << ",\"wgmma\":" << c.wgmma
      << ",\"wgmma_flops\":" << c.wgmma_flops << ",\"wgmma_shared_bytes\":" << c.wgmma_shared_bytes << ",\"tma\":" << c.tma
      << ",\"tma_bytes\":" << c.tma_bytes;
}

static void write_json(std::ostream& out, const dim3& d) { out << "[" << d.x << "," << d.y << "," << d.z << "]"; }

extern "C" {

void emu_begin(uint64_t seed, int multiprocessors, size_t shared_limit, bool dependent_launches) {
  for (Buffer& b : machine.buffers) {
    __asan_unpoison_memory_region(b.allocation, b.allocated);
    std::free(b.allocation);
  }
  machine.buffers.clear();
  machine.chosen_blocks.clear();
  machine.launches.clear();
  machine.error.clear();
  machine.seed = seed;
  machine.random.seed(seed);
  machine.multiprocessors = multiprocessors;
  machine.shared_limit = shared_limit;
  machine.dependent_launches = dependent_launches;
  machine.device_queries = 0;
  machine.encoded_tensor_maps = 0;
}

// Run only the blocks from `first` to `end` - 1 of this kernel's launches.
void emu_choose_blocks(const char* kernel, size_t first, size_t end) { machine.chosen_blocks[kernel] = {first, end}; }

// Device memory that starts `offset` bytes after a multiple of 256, to which the device's allocator aligns.
void* emu_buffer(const char* name, const void* data, size_t bytes, size_t offset, int writable) {
  Buffer b;
  b.name = name;
  b.bytes = bytes;
  b.allocated = (offset + bytes + 511) / 256 * 256;
  b.allocation = std::aligned_alloc(256, b.allocated);
  b.data = static_cast<char*>(b.allocation) + offset;
  b.writable = writable;
  std::memcpy(b.data, data, bytes);
  __asan_poison_memory_region(b.allocation, b.allocated);
  machine.buffers.push_back(b);
  return b.data;
}

void emu_read(int buffer, void* to) {
  const Buffer& b = machine.buffers[buffer];
  __asan_unpoison_memory_region(b.allocation, b.allocated);
  std::memcpy(to, b.data, b.bytes);
}

const char* emu_error() { return machine.error.c_str(); }

// The counters, as JSON.
const char* emu_report() {
  static std::string report;
  std::ostringstream out;
  out << "{\"device_queries\":" << machine.device_queries << ",\"encoded_tensor_maps\":" << machine.encoded_tensor_maps
      << ",\"launches\":[";
  for (size_t i = 0; i < machine.launches.size(); ++i) {
    const LaunchRecord& l = machine.launches[i];
    out << (i ? "," : "") << "{\"kernel\":\"" << l.kernel << "\",\"grid\":";
    write_json(out, l.shape.grid);
    out << ",\"block\":";
    write_json(out, l.shape.block);
    out << ",\"shared_bytes\":" << l.shape.shared_bytes << ",\"cluster\":" << l.shape.cluster
        << ",\"cooperative\":" << (l.shape.cooperative ? "true" : "false")
        << ",\"dependent\":" << (l.shape.dependent ? "true" : "false") << ",";
    write_json(out, l.counters);
    out << "}";
  }
  out << "],\"buffers\":[";
  for (size_t i = 0; i < machine.buffers.size(); ++i) {
    out << (i ? "," : "") << "{";
    write_json(out, machine.buffers[i].counters);
    out << "}";
  }
  out << "]}";
  report = out.str();
  return report.c_str();
}

}  // extern "C"

}  // namespace emu
