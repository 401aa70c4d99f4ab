// Asynchronous tensor-core products of one warpgroup (sm_90a): d (64 x N) += a (64 x 16) * b (16 x N), for 16-bit a and b.
//
// Where each thread's values lie (PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16"), with warp = 0..3 in the warpgroup,
// row = 16 warp + lane / 4 and pair = lane % 4:
//   d     d[4 n], d[4 n + 1] at (row, 8 n + 2 pair) and the next column; d[4 n + 2], d[4 n + 3] eight rows below
//   a     a[0] at (row, 2 pair) and the next column; a[1] eight rows below; a[2], a[3] eight columns to the right
// So d[8 k .. 8 k + 7], rounded to 16 bits, is the fragment a of columns 16 k to 16 k + 15. b, and a if not in registers, come
// from shared memory by a descriptor (swizzled_tile.cuh).
//
// The order of calls: wgmma_fence(d, a), any number of wgmma(), wgmma_commit(), wgmma_wait(d, a). Fence and wait name every array
// of registers that the products use, so that the compiler moves no access past them. Between the two, no thread may touch these
// registers, or overwrite the shared memory of a and b. Products that add to the same d need no fence or wait in between.
#pragma once

#include <type_traits>

#include "convert.cuh"

namespace movq {

// Where the k of an operand in shared memory runs: along its columns (K-major) or its rows (MN-major); see SwizzledTile.
enum class Major { kK, kMN };

namespace detail {

// Tell the compiler that registers are read and written here.
MOVQ_DEVICE void pin(float& value) { asm volatile("" : "+f"(value)); }
MOVQ_DEVICE void pin(uint32_t& value) { asm volatile("" : "+r"(value)); }
template <class T, int Count>
MOVQ_DEVICE void pin(T (&registers)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) pin(registers[i]);
}

}  // namespace detail

// Orders accesses to d, and to a if in registers, before the wgmmas that use them: call it before the first wgmma, and whenever
// this warpgroup has touched these registers. Takes arrays of float and uint32_t.
template <class... Registers>
MOVQ_DEVICE void wgmma_fence(Registers&... registers) {
  static_assert(sizeof...(registers) > 0, "expected the registers of d and a");
#ifdef MOVQ_EMULATOR
  emu::wgmma_fence({emu::Registers{&registers, sizeof registers}...});
#else
  (detail::pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

// Closes the current group of products.
MOVQ_DEVICE void wgmma_commit() {
#ifdef MOVQ_EMULATOR
  emu::wgmma_commit();
#else
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Waits until at most `Pending` groups are in flight. `registers` are d, and a if in registers, of the groups that are then
// complete.
template <int Pending, class... Registers>
MOVQ_DEVICE void wgmma_wait(Registers&... registers) {
  static_assert(0 <= Pending && Pending <= 7, "expected 0 to 7 pending groups");
#ifdef MOVQ_EMULATOR
  emu::wgmma_wait(Pending, {emu::Registers{&registers, sizeof registers}...});
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
  (detail::pin(registers), ...);
#endif
}

// "%t0, %t1, ..., %t9": ten operands of an asm statement.
#define MOVQ_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define MOVQ_NAMES_16 MOVQ_TEN() "%10,%11,%12,%13,%14,%15"
#define MOVQ_NAMES_32 MOVQ_TEN() MOVQ_TEN(1) MOVQ_TEN(2) "%30,%31"
#define MOVQ_SIXTY MOVQ_TEN() MOVQ_TEN(1) MOVQ_TEN(2) MOVQ_TEN(3) MOVQ_TEN(4) MOVQ_TEN(5)
#define MOVQ_NEXT_SIXTY MOVQ_TEN(6) MOVQ_TEN(7) MOVQ_TEN(8) MOVQ_TEN(9) MOVQ_TEN(10) MOVQ_TEN(11)
#define MOVQ_NAMES_64 MOVQ_SIXTY "%60,%61,%62,%63"
#define MOVQ_NAMES_128 MOVQ_SIXTY MOVQ_NEXT_SIXTY "%120,%121,%122,%123,%124,%125,%126,%127"

#define MOVQ_SUMS_4(d, i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define MOVQ_SUMS_16(d, i) MOVQ_SUMS_4(d, i), MOVQ_SUMS_4(d, (i) + 4), MOVQ_SUMS_4(d, (i) + 8), MOVQ_SUMS_4(d, (i) + 12)
#define MOVQ_SUMS_32(d, i) MOVQ_SUMS_16(d, i), MOVQ_SUMS_16(d, (i) + 16)
#define MOVQ_SUMS_64(d, i) MOVQ_SUMS_32(d, i), MOVQ_SUMS_32(d, (i) + 32)
#define MOVQ_SUMS_128(d, i) MOVQ_SUMS_64(d, i), MOVQ_SUMS_64(d, (i) + 64)

// The instruction for N columns, with `count` = N / 2 sums a thread. Operands after the sums: a, b, whether to add to d, and
// whether b is MN-major. first, second, ... are the numbers of those operands.
#define MOVQ_WGMMA_SHARED(n, type, count, first, second, third, fourth)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #third                                             \
               ", 0;\n"                                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MOVQ_NAMES_##count \
               "}, %" #first ", %" #second ", p, 1, 1, 0, %" #fourth ";\n}"                            \
               : MOVQ_SUMS_##count(d, 0)                                                               \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(b_major == Major::kMN)))
#define MOVQ_WGMMA_REGISTERS(n, type, count, first, second, third, fourth, fifth, sixth, seventh)                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #sixth                                                       \
               ", 0;\n"                                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MOVQ_NAMES_##count           \
               "}, {%" #first ",%" #second ",%" #third ",%" #fourth "}, %" #fifth ", p, 1, 1, %" #seventh ";\n}" \
               : MOVQ_SUMS_##count(d, 0)                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(b_major == Major::kMN)))

// Starts d += a * b, or d = a * b if not `accumulate`; both operands in shared memory, a K-major. T is __half or __nv_bfloat16.
template <class T, Major b_major, int Sums>
MOVQ_DEVICE void wgmma(float (&d)[Sums], uint64_t a, uint64_t b, bool accumulate = true) {
  static_assert(Sums == 16 || Sums == 32 || Sums == 64 || Sums == 128, "expected N of 32, 64, 128 or 256");
  constexpr bool kHalf = std::is_same<T, __half>::value;
#ifdef MOVQ_EMULATOR
  emu::wgmma(d, 2 * Sums, nullptr, a, b, b_major == Major::kMN, kHalf, accumulate);
#else
  static_assert(kHalf || std::is_same<T, __nv_bfloat16>::value, "float16 or bfloat16");
  if constexpr (kHalf && Sums == 16) MOVQ_WGMMA_SHARED(32, "f16", 16, 16, 17, 18, 19);
  if constexpr (kHalf && Sums == 32) MOVQ_WGMMA_SHARED(64, "f16", 32, 32, 33, 34, 35);
  if constexpr (kHalf && Sums == 64) MOVQ_WGMMA_SHARED(128, "f16", 64, 64, 65, 66, 67);
  if constexpr (kHalf && Sums == 128) MOVQ_WGMMA_SHARED(256, "f16", 128, 128, 129, 130, 131);
  if constexpr (!kHalf && Sums == 16) MOVQ_WGMMA_SHARED(32, "bf16", 16, 16, 17, 18, 19);
  if constexpr (!kHalf && Sums == 32) MOVQ_WGMMA_SHARED(64, "bf16", 32, 32, 33, 34, 35);
  if constexpr (!kHalf && Sums == 64) MOVQ_WGMMA_SHARED(128, "bf16", 64, 64, 65, 66, 67);
  if constexpr (!kHalf && Sums == 128) MOVQ_WGMMA_SHARED(256, "bf16", 128, 128, 129, 130, 131);
#endif
}

// The same with a in registers.
template <class T, Major b_major, int Sums>
MOVQ_DEVICE void wgmma(float (&d)[Sums], const uint32_t (&a)[4], uint64_t b, bool accumulate = true) {
  static_assert(Sums == 16 || Sums == 32 || Sums == 64 || Sums == 128, "expected N of 32, 64, 128 or 256");
  constexpr bool kHalf = std::is_same<T, __half>::value;
#ifdef MOVQ_EMULATOR
  emu::wgmma(d, 2 * Sums, a, 0, b, b_major == Major::kMN, kHalf, accumulate);
#else
  static_assert(kHalf || std::is_same<T, __nv_bfloat16>::value, "float16 or bfloat16");
  if constexpr (kHalf && Sums == 16) MOVQ_WGMMA_REGISTERS(32, "f16", 16, 16, 17, 18, 19, 20, 21, 22);
  if constexpr (kHalf && Sums == 32) MOVQ_WGMMA_REGISTERS(64, "f16", 32, 32, 33, 34, 35, 36, 37, 38);
  if constexpr (kHalf && Sums == 64) MOVQ_WGMMA_REGISTERS(128, "f16", 64, 64, 65, 66, 67, 68, 69, 70);
  if constexpr (kHalf && Sums == 128) MOVQ_WGMMA_REGISTERS(256, "f16", 128, 128, 129, 130, 131, 132, 133, 134);
  if constexpr (!kHalf && Sums == 16) MOVQ_WGMMA_REGISTERS(32, "bf16", 16, 16, 17, 18, 19, 20, 21, 22);
  if constexpr (!kHalf && Sums == 32) MOVQ_WGMMA_REGISTERS(64, "bf16", 32, 32, 33, 34, 35, 36, 37, 38);
  if constexpr (!kHalf && Sums == 64) MOVQ_WGMMA_REGISTERS(128, "bf16", 64, 64, 65, 66, 67, 68, 69, 70);
  if constexpr (!kHalf && Sums == 128) MOVQ_WGMMA_REGISTERS(256, "bf16", 128, 128, 129, 130, 131, 132, 133, 134);
#endif
}

#undef MOVQ_TEN
#undef MOVQ_SIXTY
#undef MOVQ_NEXT_SIXTY
#undef MOVQ_NAMES_16
#undef MOVQ_NAMES_32
#undef MOVQ_NAMES_64
#undef MOVQ_NAMES_128
#undef MOVQ_SUMS_4
#undef MOVQ_SUMS_16
#undef MOVQ_SUMS_32
#undef MOVQ_SUMS_64
#undef MOVQ_SUMS_128
#undef MOVQ_WGMMA_SHARED
#undef MOVQ_WGMMA_REGISTERS

}  // namespace movq
