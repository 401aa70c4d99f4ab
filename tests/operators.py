"""Arguments for the compiled operators, and a spatial norm by each path. CPU implementations stand in for a GPU's."""

import pytest
import torch
from kernels import attention as attention_kernels
from kernels.spatial_norm import case

import movq_ext
from movq_ext.ops import cuda, native
from movq_ext.ops.options import NormOptions

needs_extension = pytest.mark.skipif(movq_ext.build_info()["extension"] != "loaded", reason="needs the compiled extension")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICES = ["cpu", pytest.param("cuda", marks=needs_gpu)]
LAYOUTS = ("nchw", "channels_last")
GROUPS = 8


CLIP = (4, 2, True)  # frames of f and of zq, and whether the first is apart


def norm_arguments(dtype=torch.float32, layout="nchw", zq_size=(2, 4), affine=torch.float32, device="cpu", **options):
    """f, zq_y, zq_b, weight and bias, which require gradients, and dout."""
    c = case((2, 32, 8, 12), zq_size, dtype, layout, affine=affine, **options)
    inputs = [None if x is None else x.to(device).requires_grad_() for x in (c.f, c.zq_y, c.zq_b, c.weight, c.bias)]
    return inputs, c.dout.to(device)


def attention_arguments(dtype=torch.float32, size=32, device="cpu"):
    """q, k and v, which require gradients, and dout."""
    *inputs, dout = attention_kernels.case(2, 3, 10, 14, size, dtype)
    return [x.to(device).requires_grad_() for x in inputs], dout.to(device)


def shared_kv_arguments(dtype=torch.float32, size=32, device="cpu"):
    """q and kv, which require gradients, and dout."""
    (q, kv, _), dout = attention_arguments(dtype, size, device)
    return [q, kv], dout


def epilogue_arguments(dtype=torch.float32, layout="nchw", affine=torch.float32, device="cpu"):
    """x, bias and residual."""
    c = case((2, 32, 8, 12), None, dtype, layout, affine=affine)
    return [x.to(device) for x in (c.f, c.bias, c.dout)]


def detached(tensors):
    return [None if x is None else x.detach() for x in tensors]


def norm_options(weight, bias, groups, eps, silu, f_bias=None):
    return NormOptions(weight, bias, groups, eps, "silu" if silu else None, f_bias)


def native_norm(f, zq_y, zq_b, *options):
    return native.spatial_norm(f, zq_y, zq_b, norm_options(*options))


def compiled_norm(f, zq_y, zq_b, *options):
    return cuda.spatial_norm(f, zq_y, zq_b, norm_options(*options))
