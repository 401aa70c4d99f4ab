// Replaces CUDA's header of this name for the torch side of the operators: what it needs to compile, with a fake runtime.
#pragma once

#include <cstddef>

#include "cuda_runtime_api.h"

#define __global__
