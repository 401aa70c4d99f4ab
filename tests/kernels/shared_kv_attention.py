"""The Hopper kernels of attention with shared keys and values, as functions of tensors (batch, heads, tokens, head size)."""

import functools

import emulator
import torch

from . import attention
from .spatial_norm import poisoned

TENSORS = {"forward": ("q", "kv", "out"), "backward": ("dout", "q", "kv", "out", "dq", "dkv")}
H100 = dict(multiprocessors=132, shared_limit=227 << 10)


@functools.cache
def library():
    return emulator.build(
        *(emulator.KERNELS / f"shared_kv_{name}.cu" for name in TENSORS),
        glue='#include "shared_kv_attention.h"\n'
        + "".join(attention.export("shared_kv", name, TENSORS[name]) for name in TENSORS),
    )


class Emulator(attention.Emulator):
    """Runs the kernels' source on the CPU as an H100 would, under several schedules, which must give the same bits."""

    library = staticmethod(library)

    def __init__(self, seeds=(0, 1), **device):
        super().__init__(seeds, **{**H100, **device})

    def forward(self, q, kv, scale):
        out, lse = poisoned(q, q.shape), poisoned(q, q.shape[:3], torch.float32)
        self._call("forward", scale, lse, q=q, kv=kv, out=out)
        return out, lse

    def backward(self, dout, q, kv, out, lse, scale):
        grads = [poisoned(x, x.shape) for x in (q, kv)]
        self._call("backward", scale, lse, dout=dout, q=q, kv=kv, out=out, dq=grads[0], dkv=grads[1])
        return grads


def case(batch, heads, queries, keys, head_size, dtype, seed=0):
    """Return normally distributed q, kv and dout."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, head_size, generator=generator).to(dtype) for tokens in (queries, keys, queries)]
