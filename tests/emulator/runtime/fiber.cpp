#include "fiber.h"

#include <cstdint>
#include <cstdlib>
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#include <ucontext.h>

namespace emu {

static constexpr uint64_t kCanary = 0x5afe57ac5afe57acull;

#ifdef __x86_64__

// Pushes the callee-saved registers, switches stacks, and pops them. (swapcontext would make a system call.)
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");

static void* new_context(char* stack, void (*entry)()) {
  auto top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;                         // entry's return address
  *--top = reinterpret_cast<void*>(entry);  // the target of the first `ret`
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}

#else

static void emu_switch(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}

static void* new_context(char* stack, void (*entry)()) {
  auto context = reinterpret_cast<ucontext_t*>(stack + kStackBytes) - 1;
  getcontext(context);
  context->uc_stack.ss_sp = stack;
  context->uc_stack.ss_size = kStackBytes - sizeof(ucontext_t);
  makecontext(context, entry, 0);
  return context;
}

#endif

Fiber host_fiber() {
  pthread_attr_t attributes;
  void* stack;
  size_t bytes;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &bytes);
  pthread_attr_destroy(&attributes);
  Fiber fiber;
  fiber.stack = stack;
  fiber.stack_bytes = bytes;
  return fiber;
}

void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  *reinterpret_cast<uint64_t*>(stack) = kCanary;
  fiber.asan_state = nullptr;
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
  fiber.stack_pointer = new_context(stack, entry);
}

void arrived() { __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr); }

void jump(Fiber& from, Fiber& to) {
  __sanitizer_start_switch_fiber(&from.asan_state, to.stack, to.stack_bytes);
  emu_switch(&from.stack_pointer, to.stack_pointer);
  __sanitizer_finish_switch_fiber(from.asan_state, nullptr, nullptr);
}

void leave(Fiber& from, Fiber& to) {
  __sanitizer_start_switch_fiber(nullptr, to.stack, to.stack_bytes);
  emu_switch(&from.stack_pointer, to.stack_pointer);
  std::abort();
}

bool stack_is_whole(const Fiber& fiber) { return *static_cast<const uint64_t*>(fiber.stack) == kCanary; }

void scrub(char* stacks, size_t bytes) { __asan_unpoison_memory_region(stacks, bytes); }

}  // namespace emu
