// A stack of its own for every emulated thread, and the jump from one to another. AddressSanitizer is told of each jump.
#pragma once

#include <cstddef>

namespace emu {

struct Fiber {
  void* stack_pointer = nullptr;
  void* asan_state = nullptr;
  const void* stack = nullptr;  // lowest address
  size_t stack_bytes = 0;
};

constexpr size_t kStackBytes = 256 * 1024;  // reserved; only what is touched is backed by memory

// The fiber this process started on.
Fiber host_fiber();

// Makes `fiber` start in `entry` (which never returns) when it is first jumped to.
void prepare(Fiber& fiber, char* stack, void (*entry)());

void jump(Fiber& from, Fiber& to);

// Leaves a fiber for good.
[[noreturn]] void leave(Fiber& from, Fiber& to);

// The first thing `entry` must call.
void arrived();

// False if the fiber ran over the end of its stack.
bool stack_is_whole(const Fiber& fiber);

// Forgets what the frames of abandoned fibers marked on their stacks.
void scrub(char* stacks, size_t bytes);

}  // namespace emu
