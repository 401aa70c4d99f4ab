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

EXPORT(interleave, int64_t batch, int64_t channels, int64_t height, int64_t width, int dtype, int bias_dtype, int64_t groups,
       int64_t chunk_columns, const void* pixels, const void* bias, void* out, float* statistics) {
  const movq::InterleaveProblem p = {batch,  channels,     height, width, movq::DType(dtype), movq::DType(bias_dtype),
                                     groups, chunk_columns};
  movq::interleave_windows(p, pixels, bias, out, statistics, nullptr);
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
        return self._interleave(windows, bias)

    def interleave_with_statistics(self, windows, bias, groups, chunk_columns):
        batch, _, height, width = windows.shape
        parts = (2 * height - 2) * -(-(2 * width - 2) // chunk_columns)
        statistics = poisoned(windows, (batch, groups, parts, 4), torch.float32)
        return self._interleave(windows, bias, groups, chunk_columns, statistics), statistics

    def _interleave(self, windows, bias, groups=0, chunk_columns=0, statistics=None):
        batch, phases, height, width = windows.shape
        problem = {
            "batch": batch,
            "channels": phases // 4,
            "height": height - 1,
            "width": width - 1,
            "dtype": DTYPES.index(windows.dtype),
            "bias_dtype": DTYPES.index(torch.float32 if bias is None else bias.dtype),
            "groups": groups,
            "chunk_columns": chunk_columns,
        }
        out = in_channels_last(batch, phases // 4, 2 * height - 2, 2 * width - 2, dtype=windows.dtype)
        tensors = {"pixels": windows, "bias": bias, "out": out, "statistics": statistics}
        self.cost = library().call("interleave", **problem, **tensors, seeds=self.seeds)
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

    def interleave_with_statistics(self, windows, bias, groups, chunk_columns):
        operator, given = torch.ops.movq_ext.interleave_windows_statistics, (on_gpu(windows), on_gpu(bias), groups, chunk_columns)
        first, *others = ([result.cpu() for result in operator(*given)] for _ in range(3))
        for other in others:
            pairs = zip(first, other, strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "not deterministic"
        return first

    @staticmethod
    def _run(name, x, argument):
        first, *others = (getattr(torch.ops.movq_ext, name)(on_gpu(x), argument) for _ in range(3))
        assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others), "not deterministic"
        return first.cpu()
