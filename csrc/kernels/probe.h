// Tells whether this binary has machine code, or PTX to compile it from, for a device. Asked before the first launch, so that the
// user gets a sentence rather than a failed kernel. Both functions throw std::runtime_error with CUDA's reason if they fail.
#pragma once

namespace movq {

// 90 for compute capability 9.0. Creates no CUDA context.
int device_capability(int device);

struct CodeVersions {
  int binary = 0;  // capability of the machine code that would run; 0 if there is none
  int ptx = 0;     // capability of the PTX it came from
};

// The code for the current device. Creates a CUDA context on it if there is none.
CodeVersions code_versions();

}  // namespace movq
