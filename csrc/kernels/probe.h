// Tells whether this binary has machine code, or PTX to compile it from, for a device. Asked before the first launch, so that the
// user gets a sentence rather than a failed kernel.
#pragma once

namespace movq {

struct DeviceSupport {
  int device_capability;  // 90 for compute capability 9.0
  int binary_version;     // capability of the machine code that would run; 0 if there is none
  int ptx_version;        // capability of the PTX it came from
};

// Throws std::runtime_error with CUDA's reason if the device cannot be queried.
DeviceSupport probe_device(int device);

}  // namespace movq
