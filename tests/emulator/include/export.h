// EXPORT(name, parameters) { body } defines a function that Python can call by name. It records the names and types of its
// parameters, and stores exceptions for Python to raise.
#pragma once

#include <cstdint>
#include <exception>
#include <type_traits>

namespace emu {

struct Export {
  const char* parameters;  // the source text: "const float* x, int64_t n"
  const char* types;       // one letter per parameter
  void* call;
};

void set_error(const char* message);

// A letter of Python's `struct` module; 'r' is a pointer to const (only read), 'P' any other pointer.
template <class T>
constexpr char letter() {
  if (std::is_pointer<T>::value) return std::is_const<std::remove_pointer_t<T>>::value ? 'r' : 'P';
  if (std::is_same<T, bool>::value) return '?';
  if (std::is_same<T, float>::value) return 'f';
  if (std::is_same<T, double>::value) return 'd';
  static_assert(std::is_pointer<T>::value || std::is_arithmetic<T>::value, "expected a pointer or a number");
  if (sizeof(T) == 8) return std::is_signed<T>::value ? 'q' : 'Q';
  static_assert(!std::is_integral<T>::value || std::is_same<T, bool>::value || sizeof(T) >= 4,
                "expected integers of at least 4 bytes");
  return std::is_signed<T>::value ? 'i' : 'I';
}

template <auto body> struct Guarded;
template <class... P, void (*body)(P...)>
struct Guarded<body> {
  static constexpr char types[] = {letter<P>()..., 0};
  static void call(P... p) {
    try {
      body(p...);
    } catch (const std::exception& e) {
      set_error(e.what());
    }
  }
};

}  // namespace emu

#define EXPORT(name, ...)                                                                             \
  static void name##_body(__VA_ARGS__);                                                               \
  extern "C" {                                                                                        \
  extern const emu::Export emu_export_##name;                                                         \
  const emu::Export emu_export_##name = {#__VA_ARGS__, emu::Guarded<&name##_body>::types,             \
                                         reinterpret_cast<void*>(&emu::Guarded<&name##_body>::call)}; \
  }                                                                                                   \
  static void name##_body(__VA_ARGS__)
