// Errors of the torch side. The stable ABI throws none of PyTorch's exceptions; pybind11, through which Python calls operators,
// translates the standard library's: std::invalid_argument becomes a ValueError, std::bad_alloc a MemoryError.
#pragma once

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace movq {

template <class... Parts>
std::string concatenated(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void throw_argument_error(const Parts&... message) {
  throw std::invalid_argument(concatenated(message...));
}

// Throws unless the condition holds; the message is built only then. Nothing becomes a TypeError, so a wrong dtype is a
// ValueError, too.
#define CHECK_ARGUMENT(condition, ...) ((condition) ? void() : movq::throw_argument_error(__VA_ARGS__))

// movq_ext/ops/cuda.py turns the MemoryError into torch.OutOfMemoryError.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string message) : message_(std::move(message)) {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

}  // namespace movq
