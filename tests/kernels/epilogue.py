"""The kernel of a convolution's epilogue as a function of tensors, on the emulator and on a GPU."""

import functools

import emulator
import torch

from . import on_gpu
from .spatial_norm import DTYPES, is_channels_last, poisoned

GLUE = """
#include "chunk_statistics.cuh"
#include "epilogue.h"

EXPORT(add, int64_t batch, int64_t channels, int64_t pixels, int dtype, int bias_dtype, bool channels_last, int64_t groups,
       int64_t chunk_pixels, void* x, const void* bias, const void* residual, float* statistics) {
  const movq::EpilogueProblem p = {batch,         channels, pixels,      movq::DType(dtype), movq::DType(bias_dtype),
                                   channels_last, groups,   chunk_pixels};
  movq::add_bias_residual(p, {x, bias, residual, statistics}, nullptr);
}

EXPORT(quad_bytes, int rows, int columns, int group_rows, int group_columns, int* bytes) {
  const int needed = movq::plan_quad_groups(rows, columns, group_rows, group_columns, 256).shared_bytes();
  emu::copy_to_device(bytes, &needed, sizeof(needed));
}
"""


@functools.cache
def library():
    return emulator.build(emulator.KERNELS / "epilogue.cu", glue=GLUE)


class Emulator:
    """Runs the kernel's source on the CPU under several schedules, which must give the same bits."""

    seeds = emulator.SEEDS

    def add_(self, x, bias, residual):
        """Add in place and return x. A residual must be in x's layout, to which the operator converts it."""
        return self._add(x, bias, residual)

    def add_with_statistics_(self, x, bias, residual, groups, chunk_pixels):
        """Add in place and return the statistics of chunks of x."""
        chunks = -(-x[0, 0].numel() // chunk_pixels)
        parts = chunks if is_channels_last(x) else chunks * (x.shape[1] // groups)
        statistics = poisoned(x, (x.shape[0], groups, parts, 4), torch.float32)
        self._add(x, bias, residual, groups, chunk_pixels, statistics)
        return statistics

    def _add(self, x, bias, residual, groups=0, chunk_pixels=0, statistics=None):
        batch, channels, height, width = x.shape
        problem = {
            "batch": batch,
            "channels": channels,
            "pixels": height * width,
            "dtype": DTYPES.index(x.dtype),
            "channels_last": is_channels_last(x),
            "bias_dtype": DTYPES.index(torch.float32 if bias is None else bias.dtype),
            "groups": groups,
            "chunk_pixels": chunk_pixels,
        }
        tensors = {"x": x, "bias": bias, "residual": residual, "statistics": statistics}
        self.cost = library().call("add", **problem, **tensors, seeds=self.seeds)
        return x


class Gpu:
    """Runs the operator of the extension three times, which must give the same bits."""

    def add_(self, x, bias, residual):
        first, *others = (self._run(x, bias, residual) for _ in range(3))
        assert all(torch.equal(first.nan_to_num(), other.nan_to_num()) for other in others), "not deterministic"
        return first

    def add_with_statistics_(self, x, bias, residual, groups, chunk_pixels):
        first, *others = (self._run_with_statistics(x, bias, residual, groups, chunk_pixels) for _ in range(3))
        for other in others:
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, other, strict=True)), (
                "not deterministic"
            )
        x.copy_(first[0])
        return first[1]

    @staticmethod
    def _run(x, bias, residual):
        out = on_gpu(x)
        torch.ops.movq_ext.add_bias_residual_(out, on_gpu(bias), out if residual is x else on_gpu(residual))
        return out.cpu()

    @staticmethod
    def _run_with_statistics(x, bias, residual, groups, chunk_pixels):
        out = on_gpu(x)
        given = out, on_gpu(bias), out if residual is x else on_gpu(residual)
        statistics = torch.ops.movq_ext.add_bias_residual_statistics_(*given, groups, chunk_pixels)
        return out.cpu(), statistics.cpu()
