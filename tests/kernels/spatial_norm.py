"""The kernels of SpatialNorm as functions of tensors, on the emulator and on a GPU."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import emulator
import torch

from . import on_gpu

PROBLEM = """int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t groups, int64_t zq_height, int64_t zq_width,
    int dtype, int param_dtype, bool channels_last, bool silu, float eps, int64_t frames, int64_t zq_frames,
    bool split_first_frame"""
# A call with a null `workspace` only returns its size.
GLUE = """
#include "spatial_norm.h"
#include "spatial_norm_statistics.cuh"

#define MAKE_PROBLEM {batch, channels, height, width, groups, zq_height, zq_width, movq::DType(dtype), movq::DType(param_dtype), \
                     channels_last, silu, eps, movq::DType::float32, false, frames, zq_frames, split_first_frame}

static void write_size(int64_t* size, int64_t value) { emu::copy_to_device(size, &value, sizeof value); }

EXPORT(max_map_pixels, int64_t* size) { write_size(size, movq::kMaxMapPixels); }

// The most shared memory that NHWC statistics need, over maps of these groups and pixels with up to 1,100 channels a group.
EXPORT(interleaved_statistics_shared_bytes, int groups, int pixels, int64_t* size) {
  int bytes = 0;
  for (int group_channels = 1; group_channels <= 1100; ++group_channels) {
    for (int dtype = 0; dtype < 2; ++dtype) {
      movq::SpatialNormProblem p = {1, int64_t(groups) * group_channels, 1, pixels, groups, 0, 0, movq::DType(dtype)};
      p.channels_last = true;
      const movq::spatial_norm::Geometry geometry = movq::spatial_norm::make_geometry(p);
      const int vec_size = movq::spatial_norm::choose_vec_size(p, geometry, {});
      bytes = std::max(bytes, movq::spatial_norm::plan_interleaved_groups(geometry, vec_size).shared_bytes(vec_size));
    }
  }
  write_size(size, bytes);
}

EXPORT(forward, PROBLEM, const void* f, const void* zq_y, const void* zq_b, const void* weight, const void* bias,
       const void* f_bias, int f_bias_dtype, bool bordered, const float* statistics, int64_t parts, void* out,
       int64_t out_offset, int64_t out_image_stride, int64_t out_channel_stride, float* mean, float* rstd, void* workspace,
       int64_t* size) {
  movq::SpatialNormProblem p = MAKE_PROBLEM;
  p.f_bias_dtype = movq::DType(f_bias_dtype);
  p.bordered = bordered;
  p.out_image_stride = out_image_stride;
  p.out_channel_stride = out_channel_stride;
  out = static_cast<char*>(out) + out_offset * movq::bytes(p.dtype);
  const movq::SpatialNormForward a = {f, zq_y, zq_b, weight, bias, f_bias, out, mean, rstd, workspace, statistics, parts};
  if (workspace) movq::spatial_norm_forward(p, a, nullptr);
  else write_size(size, movq::spatial_norm_forward_workspace(p, a));
}

EXPORT(backward, PROBLEM, const void* dout, const void* f, const void* zq_y, const void* zq_b, const void* weight,
       const void* bias, const float* mean, const float* rstd, void* df, void* dzq_y, void* dzq_b, void* dweight, void* dbias,
       void* workspace, int64_t* size) {
  const movq::SpatialNormProblem p = MAKE_PROBLEM;
  const movq::SpatialNormBackward a = {dout, f, zq_y, zq_b, weight, bias, mean, rstd,
                                       df, dzq_y, dzq_b, dweight, dbias, workspace};
  if (workspace) movq::spatial_norm_backward(p, a, nullptr);
  else write_size(size, movq::spatial_norm_backward_workspace(p, a));
}
""".replace("PROBLEM, ", PROBLEM + ", ")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def library():
    return emulator.build(*(emulator.KERNELS / f"spatial_norm_{name}.cu" for name in ("forward", "backward")), glue=GLUE)


class Clip(NamedTuple):
    """How the rows of f and zq divide into frames."""

    frames: int = 1
    latent_frames: int = 1
    split_first_frame: bool = False


IMAGE = Clip()


def poisoned(like, shape=None, dtype=None):
    """Return a tensor of NaN in like's memory format, in which elements that a kernel does not write stand out."""
    if shape is None:
        return torch.full_like(like, float("nan"), dtype=dtype)
    return torch.full(shape, float("nan"), dtype=dtype or like.dtype)


def is_channels_last(f):
    return f.is_contiguous(memory_format=torch.channels_last) and not f.is_contiguous()


def in_layout_of(f, x):
    """Return x in f's layout. A copy may be needed even for a 1x1 f, which is NCHW and NHWC at once while its zq is not."""
    return x if x is None else x.contiguous(memory_format=torch.channels_last if is_channels_last(f) else torch.contiguous_format)


def problem(f, zq_y, parameter, groups, silu, eps=0.0, clip=IMAGE):
    batch, channels, rows, width = f.shape
    zq_rows, zq_width = (0, 0) if zq_y is None else zq_y.shape[2:]
    return {
        "batch": batch,
        "channels": channels,
        "frames": clip.frames,
        "zq_frames": clip.latent_frames,
        "split_first_frame": clip.split_first_frame,
        "height": rows // clip.frames,
        "width": width,
        "groups": groups,
        "zq_height": zq_rows // clip.latent_frames,
        "zq_width": zq_width,
        "dtype": DTYPES.index(f.dtype),
        "silu": silu,
        "eps": eps,
        "channels_last": is_channels_last(f),
        "param_dtype": DTYPES.index(torch.float32 if parameter is None else parameter.dtype),
    }


def behind_frames(f, padding_rows):
    """Return NaN in f's layout with so many rows more than f, and where out is in it: its offset and strides, for the kernels."""
    batch, channels, rows, width = f.shape
    storage = torch.full((batch, channels, padding_rows + rows, width), float("nan"), dtype=f.dtype)
    storage = in_layout_of(f, storage)
    out = storage[:, :, padding_rows:]
    channel_stride = 0 if is_channels_last(f) else out.stride(1)
    return storage, {
        "out_offset": out.storage_offset(),
        "out_image_stride": out.stride(0),
        "out_channel_stride": channel_stride,
    }


def call(function, seeds, dependent_launches, **arguments):
    """Ask for the size of the workspace, run the kernels, and return the emulator's counters."""
    size = torch.zeros(1, dtype=torch.int64)
    library().call(function, **arguments, workspace=None, size=size, seeds=(0,))
    workspace = torch.full((max(1, int(size)),), 0xFF, dtype=torch.uint8)
    device = {"dependent_launches": dependent_launches}
    return library().call(function, **arguments, **device, workspace=workspace, size=size, seeds=seeds)


class Emulator:
    """Runs the kernels' source on the CPU under several schedules, which must give the same bits."""

    seeds = emulator.SEEDS
    dependent_launches = True

    @staticmethod
    def max_map_pixels():
        size = torch.zeros(1, dtype=torch.int64)
        library().call("max_map_pixels", size=size)
        return int(size)

    @staticmethod
    def interleaved_statistics_shared_bytes(groups, pixels):
        size = torch.zeros(1, dtype=torch.int64)
        library().call("interleaved_statistics_shared_bytes", groups=groups, pixels=pixels, size=size)
        return int(size)

    def forward(
        self, f, zq_y, zq_b, weight, bias, groups, eps, silu, f_bias=None, bordered=False, statistics=None, clip=IMAGE,
        padding_rows=0,
    ):  # fmt: skip
        """Return out, mean and rstd. With padding_rows, out is the end of a larger tensor, which is returned."""
        zq_y, zq_b = in_layout_of(f, zq_y), in_layout_of(f, zq_b)
        mean, rstd = [poisoned(f, (f.shape[0], groups), torch.float32) for _ in range(2)]
        out, strides = poisoned(f), {"out_offset": 0, "out_image_stride": 0, "out_channel_stride": 0}
        if padding_rows:
            out, strides = behind_frames(f, padding_rows)
        self.cost = call(
            "forward",
            self.seeds,
            self.dependent_launches,
            **problem(f, zq_y, weight if weight is not None else bias, groups, silu, eps, clip),
            **strides,
            f=f,
            zq_y=zq_y,
            zq_b=zq_b,
            weight=weight,
            bias=bias,
            f_bias=f_bias,
            f_bias_dtype=DTYPES.index(torch.float32 if f_bias is None else f_bias.dtype),
            bordered=bordered,
            statistics=statistics,
            parts=0 if statistics is None else statistics.shape[2],
            out=out,
            mean=mean,
            rstd=rstd,
        )
        return out, mean, rstd

    def backward(self, dout, f, zq_y, zq_b, weight, bias, mean, rstd, groups, silu, clip=IMAGE):
        zq_y, zq_b = in_layout_of(f, zq_y), in_layout_of(f, zq_b)
        grads = [None if x is None else poisoned(x) for x in (f, zq_y, zq_b, weight, bias)]
        names = ("df", "dzq_y", "dzq_b", "dweight", "dbias")
        self.cost = call(
            "backward",
            self.seeds,
            self.dependent_launches,
            **problem(f, zq_y, weight if weight is not None else bias, groups, silu, clip=clip),
            dout=dout,
            f=f,
            zq_y=zq_y,
            zq_b=zq_b,
            weight=weight,
            bias=bias,
            mean=mean,
            rstd=rstd,
            **dict(zip(names, grads, strict=True)),
        )
        return grads


class Gpu:
    """Runs the operators of the extension three times, which must give the same bits."""

    def forward(
        self, f, zq_y, zq_b, weight, bias, groups, eps, silu, f_bias=None, bordered=False, statistics=None, clip=IMAGE,
        padding_rows=0,
    ):  # fmt: skip
        op, arguments = torch.ops.movq_ext.spatial_norm_forward, (f, zq_y, zq_b, weight, bias, groups, eps, silu)
        out, mean, rstd = self._repeat(op, *arguments, f_bias, bordered, statistics, *clip)
        if not padding_rows:
            return out, mean, rstd
        storage = on_gpu(behind_frames(f, padding_rows)[0])
        arguments = [on_gpu(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        torch.ops.movq_ext.spatial_norm_into(storage[:, :, padding_rows:], *arguments, *clip)
        return storage.cpu(), mean, rstd

    def backward(self, dout, f, zq_y, zq_b, weight, bias, mean, rstd, groups, silu, clip=IMAGE):
        grads = self._repeat(
            torch.ops.movq_ext.spatial_norm_backward, dout, f, zq_y, zq_b, weight, bias, mean, rstd, groups, silu, *clip
        )
        given = (f, zq_y, zq_b, weight, bias)
        return [None if x is None else grad for x, grad in zip(given, grads, strict=True)]

    @staticmethod
    def _repeat(op, *arguments):
        arguments = [on_gpu(x) if isinstance(x, torch.Tensor) and not x.is_cuda else x for x in arguments]
        first, *others = ([x.cpu() for x in op(*arguments)] for _ in range(3))
        for other in others:
            pairs = zip(first, other, strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "not deterministic"
        return first


def case(shape, zq_size, dtype, layout, *, affine=torch.float32, offset=0, seed=0):
    """Return the inputs of one call. The large tensors start `offset` elements after a 16-byte boundary."""
    generator = torch.Generator().manual_seed(seed)

    def tensor(*size, scale=1.0, shift=0.0):
        values = torch.randn(size, generator=generator) * scale + shift
        if layout == "channels_last":
            values = values.permute(0, 2, 3, 1)
        storage = torch.empty(values.numel() + offset, dtype=dtype)[offset:]
        storage.copy_(values.flatten())
        view = storage.view(values.shape)
        return view.permute(0, 3, 1, 2) if layout == "channels_last" else view

    channels = shape[1]
    weight = bias = None
    if affine is not None:
        weight = (torch.randn(channels, generator=generator) * 0.3 + 1).to(affine)
        bias = (torch.randn(channels, generator=generator) * 0.3).to(affine)
    zq_shape = None if zq_size is None else (shape[0], channels, *zq_size)
    return SimpleNamespace(
        f=tensor(*shape, shift=0.5),
        zq_y=zq_shape and tensor(*zq_shape, scale=0.3, shift=1.0),
        zq_b=zq_shape and tensor(*zq_shape),
        weight=weight,
        bias=bias,
        dout=tensor(*shape),
    )
