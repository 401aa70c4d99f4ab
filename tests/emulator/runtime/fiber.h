// Fibers: each emulated thread has its own stack. AddressSanitizer is notified of every switch.
#pragma once

#include <cstddef>

namespace emu {

struct Fiber {
  void* stack_pointer = nullptr;
  void* asan_state = nullptr;
  const void* stack = nullptr;  // its lowest address
  size_t stack_bytes = 0;
};

constexpr size_t kStackBytes = 256 * 1024;  // reserved address space; only touched pages take memory

// The fiber of the process itself.
Fiber host_fiber();

// Prepares `fiber` to start in `entry`, which must not return, on the first jump to it.
void prepare(Fiber& fiber, char* stack, void (*entry)());

void jump(Fiber& from, Fiber& to);

// Jumps to `to` for the last time: `from` never runs again.
[[noreturn]] void leave(Fiber& from, Fiber& to);

// `entry` must call this first.
void arrived();

// False if the fiber overran its stack.
bool stack_is_whole(const Fiber& fiber);

// Clears AddressSanitizer's marks of frames on the stacks of abandoned fibers.
void scrub(char* stacks, size_t bytes);

}  // namespace emu
