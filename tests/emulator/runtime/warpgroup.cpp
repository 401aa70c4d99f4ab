// Warpgroup-wide operations: wgmma and setmaxnreg.
#include "machine.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../include/cuda_bf16.h"
#include "../include/cuda_fp16.h"

namespace emu {

// --- Operands in shared memory (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout")

struct Descriptor {
  unsigned address, leading, stride;  // bytes
  unsigned base_offset, swizzle;

  explicit Descriptor(uint64_t bits)
      : address((bits & 0x3fff) << 4),
        leading((bits >> 16 & 0x3fff) << 4),
        stride((bits >> 32 & 0x3fff) << 4),
        base_offset(bits >> 49 & 7),
        swizzle(bits >> 62) {}

  // The bytes that a swizzle permutes in units of 16; without swizzle a row has 16 bytes.
  unsigned row_bytes() const {
    constexpr unsigned bytes[] = {16, 128, 64, 32};
    return bytes[swizzle];
  }

  void check() const {
    if (base_offset) fail("wgmma descriptor: the emulator expects a base offset of 0, got " + std::to_string(base_offset));
    const unsigned pattern = 8 * row_bytes();
    if (swizzle && address % pattern >= row_bytes())
      fail("wgmma descriptor: byte " + std::to_string(address) + " is not in the first row of a swizzle pattern of " +
           std::to_string(pattern) + " bytes");
  }

  // The address of element (i, k): row i of a, or column i of b. Elements have 2 bytes.
  unsigned at(unsigned i, unsigned k, bool mn_major) const {
    const unsigned row = row_bytes(), columns = row / 2;
    unsigned byte;
    if (mn_major) {
      // Rows of `columns` values of i, one row for each k; without swizzle the two offsets trade places.
      const unsigned across = swizzle ? leading : stride, along = swizzle ? stride : leading;
      byte = i / columns * across + i % columns * 2 + k / 8 * along + k % 8 * row;
    } else {
      byte = i / 8 * stride + i % 8 * row + (swizzle ? k * 2 : k / 8 * leading + k % 8 * 2);
    }
    byte += address;
    return byte ^ (byte >> 3 & (row - 16));  // bits 4 to 6 are xored with bits 7 to 9, as many as the row has
  }
};

// --- Products

struct WgmmaArguments {
  float* d;
  const uint32_t* a;
  uint64_t a_descriptor, b_descriptor;
  int n;
  bool b_mn_major, is_half, accumulate;
};

static constexpr int kRows = 64, kDepth = 16;
static constexpr int kFragment = 4;              // registers of a in each thread
static constexpr uint32_t kPoison = 0xffffdead;  // NaN

static float value_of(uint16_t bits, bool is_half) { return is_half ? __half2float({bits}) : __bfloat162float({bits}); }

// Where register i of thread t lies in d, and half i of its registers in a.
static int d_row(unsigned t, int i) { return t / kWarpSize * 16 + t % kWarpSize / 4 + i / 2 % 2 * 8; }
static int d_column(unsigned t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }
static int a_row(unsigned t, int i) { return t / kWarpSize * 16 + t % kWarpSize / 4 + i / 2 % 2 * 8; }
static int a_column(unsigned t, int i) { return i / 4 * 8 + t % 4 * 2 + i % 2; }

static Warpgroup& own_warpgroup() {
  Block& block = *machine.running->block;
  return block.warpgroups[(machine.running - block.threads.data()) / kWarpgroupSize];
}

// Loads a 16-bit operand of `count` rows (or columns) and checks that each warp may read it.
static void load_operand(const Warpgroup& warpgroup, Product& product, uint64_t bits, int count, bool mn_major, bool is_half,
                         float (*to)[kDepth]) {
  const Descriptor descriptor(bits);
  descriptor.check();
  Block& block = *machine.running->block;
  std::vector<unsigned> chunks;
  for (int i = 0; i < count; ++i) {
    for (int k = 0; k < kDepth; ++k) {
      const unsigned address = descriptor.at(i, k, mn_major);
      check_shared(block, address, 2, 2, "read by wgmma");
      chunks.push_back(address / 16);
      uint16_t value;
      std::memcpy(&value, &block.shared[address], 2);
      to[i][k] = value_of(value, is_half);
    }
  }
  std::sort(chunks.begin(), chunks.end());
  chunks.erase(std::unique(chunks.begin(), chunks.end()), chunks.end());
  for (unsigned chunk : chunks) {
    for (unsigned warp = 0; warp < 4; ++warp) check_product_operand(*warpgroup.threads[warp * kWarpSize], chunk * 16);
  }
  product.chunks.insert(product.chunks.end(), chunks.begin(), chunks.end());
  machine.launches.back().counters.wgmma_shared_bytes += count * kDepth * 2;
}

// A fence must name the registers of a wgmma, which must not change between the two.
static void check_fenced(const Warpgroup& warpgroup, unsigned t, const void* registers, size_t bytes, const std::string& name) {
  const auto* data = static_cast<const char*>(registers);
  const auto& fenced = warpgroup.fenced[t];
  const auto found = std::find_if(fenced.rbegin(), fenced.rend(), [&](const FencedRegisters& f) {
    return f.data <= data && data + bytes <= f.data + f.contents.size();
  });
  if (found == fenced.rend()) fail("wgmma.fence is missing, or does not name the registers of " + name);
  if (std::memcmp(data, &found->contents[data - found->data], bytes))
    fail("registers of " + name + " were written after the wgmma.fence");
}

static float truncated(double value) {
  const float nearest = static_cast<float>(value);
  return std::isfinite(nearest) && std::abs(double{nearest}) > std::abs(value) ? std::nextafterf(nearest, 0.0f) : nearest;
}

static uint32_t bits_of(float value) { return __float_as_uint(value); }

static void multiply(Warpgroup& warpgroup, WarpgroupArguments arguments) {
  auto of = [&](unsigned t) -> const WgmmaArguments& { return *static_cast<const WgmmaArguments*>(arguments[t]); };
  const WgmmaArguments& first = of(0);
  for (unsigned t = 1; t < kWarpgroupSize; ++t) {
    if (of(t).a_descriptor != first.a_descriptor || of(t).b_descriptor != first.b_descriptor)
      fail("wgmma: the threads of the warpgroup pass different descriptors");
  }
  Product product = {warpgroup.groups, first.n, {}, {}, {}, {}, {}};
  static float a[kRows][kDepth], b[256][kDepth];
  static double sums[kRows][256];
  load_operand(warpgroup, product, first.b_descriptor, first.n, first.b_mn_major, first.is_half, b);
  if (!first.a) {
    load_operand(warpgroup, product, first.a_descriptor, kRows, false, first.is_half, a);
  } else {
    for (unsigned t = 0; t < kWarpgroupSize; ++t) {
      check_fenced(warpgroup, t, of(t).a, kFragment * sizeof *first.a, "a");
      product.a.push_back(of(t).a);
      product.a_values.insert(product.a_values.end(), of(t).a, of(t).a + kFragment);
      for (int i = 0; i < 2 * kFragment; ++i)
        a[a_row(t, i)][a_column(t, i)] = value_of(static_cast<uint16_t>(of(t).a[i / 2] >> i % 2 * 16), first.is_half);
    }
  }
  // A sum that an earlier product still adds to is taken from that product.
  const auto earlier =
      std::find_if(warpgroup.products.rbegin(), warpgroup.products.rend(), [&](const Product& p) { return p.d[0] == first.d; });
  const bool chained = earlier != warpgroup.products.rend();
  if (chained && earlier->n != first.n) fail("wgmma: sums are in flight in a product of another shape");
  const int count = first.n / 2;
  for (unsigned t = 0; t < kWarpgroupSize; ++t) {
    product.d.push_back(of(t).d);
    if (!chained) check_fenced(warpgroup, t, of(t).d, count * sizeof *first.d, "d");
    for (int i = 0; i < count; ++i) {
      const float value = chained ? earlier->result[t * count + i] : of(t).d[i];
      sums[d_row(t, i)][d_column(t, i)] = first.accumulate ? value : 0;
      if (chained && bits_of(of(t).d[i]) != kPoison) fail("sums of a wgmma in flight were written: its wait is missing");
    }
  }
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < first.n; ++column) {
      double sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += double(a[row][k]) * b[column][k];
      sums[row][column] += sum;
    }
  }
  product.result.resize(kWarpgroupSize * count);
  Block& block = *machine.running->block;
  for (unsigned t = 0; t < kWarpgroupSize; ++t) {
    for (int i = 0; i < count; ++i) {
      product.result[t * count + i] = truncated(sums[d_row(t, i)][d_column(t, i)]);
      of(t).d[i] = __uint_as_float(kPoison);
    }
  }
  if (block.product_readers.empty()) block.product_readers.resize((block.shared.size() + 15) / 16);
  const size_t index = &warpgroup - block.warpgroups.data();
  for (unsigned chunk : product.chunks) ++block.product_readers[chunk].in_flight[index];
  warpgroup.products.push_back(std::move(product));
  Counters& counters = machine.launches.back().counters;
  ++counters.wgmma;
  counters.wgmma_flops += 2ull * kRows * first.n * kDepth;
}

void wgmma(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor, bool b_mn_major, bool is_half,
           bool accumulate) {
  WgmmaArguments mine = {d, a, a_descriptor, b_descriptor, n, b_mn_major, is_half, accumulate};
  gather_warpgroup("wgmma.mma_async", &mine, multiply);
}

void wgmma_fence(std::initializer_list<Registers> registers) {
  gather_warpgroup("wgmma.fence", &registers, [](Warpgroup& warpgroup, WarpgroupArguments arguments) {
    for (unsigned t = 0; t < kWarpgroupSize; ++t) {
      for (const Registers& r : *static_cast<const std::initializer_list<Registers>*>(arguments[t])) {
        const auto* data = static_cast<const char*>(r.data);
        auto& fenced = warpgroup.fenced[t];
        fenced.erase(std::remove_if(fenced.begin(), fenced.end(), [&](const FencedRegisters& f) { return f.data == data; }),
                     fenced.end());
        fenced.push_back({data, {data, data + r.bytes}});
      }
    }
  });
}

void wgmma_commit() {
  gather_warpgroup("wgmma.commit_group", nullptr, [](Warpgroup& warpgroup, WarpgroupArguments) { ++warpgroup.groups; });
}

struct WaitArguments {
  int pending;
  std::initializer_list<Registers> registers;
};

static void check_named(const WaitArguments& wait, const void* registers, size_t bytes, const char* name) {
  const auto* data = static_cast<const char*>(registers);
  const bool found = std::any_of(wait.registers.begin(), wait.registers.end(), [&](const Registers& r) {
    const auto* first = static_cast<const char*>(r.data);
    return first <= data && data + bytes <= first + r.bytes;
  });
  if (!found) fail(std::string("wgmma.wait_group completes a wgmma, but does not name its registers of ") + name);
}

static void complete(Warpgroup& warpgroup, const Product& product, bool is_last, WarpgroupArguments arguments) {
  Block& block = *machine.running->block;
  const size_t index = &warpgroup - block.warpgroups.data();
  for (unsigned chunk : product.chunks) {
    ProductReaders& readers = block.product_readers[chunk];
    --readers.in_flight[index];
    readers.read[index] = machine.clock;
  }
  const int count = product.n / 2;
  for (unsigned t = 0; t < product.a.size(); ++t) {
    check_named(*static_cast<const WaitArguments*>(arguments[t]), product.a[t], kFragment * sizeof(uint32_t), "a");
    if (!std::equal(product.a[t], product.a[t] + kFragment, &product.a_values[t * kFragment]))
      fail("registers of a of a wgmma in flight were written: its wait is missing");
  }
  for (unsigned t = 0; is_last && t < kWarpgroupSize; ++t) {
    check_named(*static_cast<const WaitArguments*>(arguments[t]), product.d[t], count * sizeof(float), "d");
    for (int i = 0; i < count; ++i) {
      if (bits_of(product.d[t][i]) != kPoison) fail("sums of a wgmma in flight were written: its wait is missing");
      product.d[t][i] = product.result[t * count + i];
    }
  }
}

void wgmma_wait(int pending, std::initializer_list<Registers> registers) {
  WaitArguments mine = {pending, registers};
  gather_warpgroup("wgmma.wait_group", &mine, [](Warpgroup& warpgroup, WarpgroupArguments arguments) {
    const int pending = static_cast<const WaitArguments*>(arguments[0])->pending;
    auto& products = warpgroup.products;
    size_t done = 0;
    while (done < products.size() && products[done].group < warpgroup.groups - pending) ++done;
    for (size_t i = 0; i < done; ++i) {
      const bool is_last = std::none_of(products.begin() + i + 1, products.end(),
                                        [&](const Product& later) { return later.d[0] == products[i].d[0]; });
      complete(warpgroup, products[i], is_last, arguments);
    }
    products.erase(products.begin(), products.begin() + done);
    if (products.empty()) {
      for (auto& fenced : warpgroup.fenced) fenced.clear();
    }
  });
}

// --- setmaxnreg

struct RegistersArguments {
  int registers;
  bool increase;
};

static void change_registers(Warpgroup& warpgroup, WarpgroupArguments arguments) {
  const auto& wanted = *static_cast<const RegistersArguments*>(arguments[0]);
  const std::string what = "setmaxnreg from " + std::to_string(warpgroup.registers) + " to " + std::to_string(wanted.registers);
  if (wanted.registers < 24 || wanted.registers > 256 || wanted.registers % 8)
    fail(what + ": expected a multiple of 8 from 24 to 256");
  if (wanted.increase ? wanted.registers < warpgroup.registers : wanted.registers > warpgroup.registers)
    fail(what + (wanted.increase ? " is not an increase" : " is not a decrease"));
  Block& block = *machine.running->block;
  if (wanted.increase) return;
  block.spare_registers += (warpgroup.registers - wanted.registers) * int(kWarpgroupSize);
  warpgroup.registers = wanted.registers;
  for (Thread* thread : block.waits_for_registers) wake(thread);
  block.waits_for_registers.clear();
}

void set_max_registers(int registers, bool increase) {
  RegistersArguments mine = {registers, increase};
  gather_warpgroup(increase ? "setmaxnreg.inc" : "setmaxnreg.dec", &mine, change_registers);
  if (!increase) return;
  Warpgroup& warpgroup = own_warpgroup();
  Block& block = *machine.running->block;
  while (warpgroup.registers != registers) {
    const int missing = (registers - warpgroup.registers) * int(kWarpgroupSize);
    if (block.spare_registers >= missing) {
      block.spare_registers -= missing;
      warpgroup.registers = registers;
    } else {
      block.waits_for_registers.push_back(machine.running);
      suspend("setmaxnreg.inc, for registers that no warpgroup has returned");
    }
  }
}

}  // namespace emu
