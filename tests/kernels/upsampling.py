"""The kernels of upsampling as functions of tensors, on the emulator and on a GPU."""

import functools

import emulator
import torch

from . import on_gpu
from .spatial_norm import DTYPES, is_channels_last, poisoned

GLUE = """
#include "upsampling.h"

EXPORT(fold, int64_t out_channels, int64_t in_channels, int dtype, bool channels_last, bool to_windows, const void* weight,
       void* folded) {
  movq::fold_upsampling({out_channels, in_channels, movq::DType(dtype), channels_last, to_windows}, weight, folded, nullptr);
}

EXPORT(fold_backward, int64_t out_channels, int64_t in_channels, int dtype, bool channels_last, const void* dfolded,
       void* dweight) {
  movq::fold_upsampling_backward({out_channels, in_channels, movq::DType(dtype), channels_last}, dfolded, dweight, nullptr);
}

EXPORT(interleave, int64_t batch, int64_t channels, int64_t height, int64_t width, int dtype, int bias_dtype, const void* pixels,
       const void* bias, void* out) {
  movq::interleave_windows({batch, channels, height, width, movq::DType(dtype), movq::DType(bias_dtype)}, pixels, bias, out,
                           nullptr);
}
"""


@functools.cache
def library():
    return emulator.build(*(emulator.KERNELS / f"upsampling_{name}.cu" for name in ("fold", "interleave")), glue=GLUE)


def in_channels_last(*shape, dtype):
    """Return a tensor of NaN in channels_last, in which elements that a kernel does not write stand out."""
    return poisoned(torch.empty(shape, dtype=dtype, memory_format=torch.channels_last))


class Emulator:
    """Runs the kernels' source on the CPU under several schedules, which must give the same bits."""

    seeds = emulator.SEEDS

    def fold(self, weight, windows=False):
        out, in_ = weight.shape[:2]
        folded = in_channels_last(*((4 * out, in_, 2, 2) if windows else (in_, out, 4, 4)), dtype=weight.dtype)
        problem = self._problem(out, in_, weight.dtype, is_channels_last(weight))
        self.cost = library().call("fold", **problem, to_windows=windows, weight=weight, folded=folded, seeds=self.seeds)
        return folded

    def fold_backward(self, dfolded, channels_last):
        in_, out = dfolded.shape[:2]
        dweight = torch.full((out, in_, 3, 3), float("nan"), dtype=dfolded.dtype)
        dweight = dweight.contiguous(memory_format=torch.channels_last) if channels_last else dweight
        problem = self._problem(out, in_, dfolded.dtype, channels_last)
        self.cost = library().call("fold_backward", **problem, dfolded=dfolded, dweight=dweight, seeds=self.seeds)
        return dweight

    def interleave(self, windows, bias):
        batch, phases, height, width = windows.shape
        problem = {
            "batch": batch,
            "channels": phases // 4,
            "height": height - 1,
            "width": width - 1,
            "dtype": DTYPES.index(windows.dtype),
            "bias_dtype": DTYPES.index(torch.float32 if bias is None else bias.dtype),
        }
        out = in_channels_last(batch, phases // 4, 2 * height - 2, 2 * width - 2, dtype=windows.dtype)
        self.cost = library().call("interleave", **problem, pixels=windows, bias=bias, out=out, seeds=self.seeds)
        return out

    @staticmethod
    def _problem(out, in_, dtype, channels_last):
        return {"out_channels": out, "in_channels": in_, "dtype": DTYPES.index(dtype), "channels_last": channels_last}


class Gpu:
    """Runs the operators of the extension three times, which must give the same bits."""

    def fold(self, weight, windows=False):
        return self._run("fold_upsampling", weight, windows)

    def fold_backward(self, dfolded, channels_last):
        return self._run("fold_upsampling_backward", dfolded, channels_last)

    def interleave(self, windows, bias):
        return self._run("interleave_windows", windows, on_gpu(bias))

    @staticmethod
    def _run(name, x, argument):
        first, *others = (getattr(torch.ops.movq_ext, name)(on_gpu(x), argument) for _ in range(3))
        assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others), "not deterministic"
        return first.cpu()
