// Replaces CUDA's header of this name: the launchers' headers only name the type.
#pragma once

struct __nv_bfloat16;
