"""The kernels of attention as functions of tensors (batch, heads, tokens, head size), on the emulator and on a GPU."""

import functools

import emulator
import torch

from . import on_gpu
from .spatial_norm import DTYPES, poisoned

PROBLEM = "int64_t batch, int64_t heads, int64_t queries, int64_t keys, int64_t head_size, int dtype, float scale"
TENSORS = {"forward": ("q", "k", "v", "out"), "backward": ("dout", "q", "k", "v", "out", "dq", "dk", "dv")}
WRITTEN = ("dq", "dk", "dv", "dkv")  # by backward; forward writes out


def export(prefix, name, tensors, setup=""):
    """Return a C function `name` that calls ``movq::{prefix}_{name}``, or returns its workspace's size if that is null."""

    def parameter(t):
        const = "" if t in WRITTEN or (t == "out" and name == "forward") else "const "
        return f"{const}void* {t}, int64_t {t}_batch, int64_t {t}_head, int64_t {t}_token"

    def tokens(t):
        return f"{{const_cast<void*>({t}), {t}_batch, {t}_head, {t}_token}}"

    fields = [tokens(t) for t in tensors]
    fields.insert(tensors.index("out") + 1, "lse")
    return f"""
EXPORT({name}, {PROBLEM}, {", ".join(map(parameter, tensors))}, {"" if name == "forward" else "const "}float* lse,
       void* workspace, int64_t* bytes) {{
  movq::AttentionProblem p = {{batch, heads, queries, keys, head_size, movq::DType(dtype), scale}};
  {setup}
  if (workspace) {{
    movq::{prefix}_{name}(p, {{{", ".join(fields)}, workspace}}, nullptr);
  }} else {{
    const int64_t value = movq::{prefix}_{name}_workspace(p);
    emu::copy_to_device(bytes, &value, sizeof value);
  }}
}}"""


@functools.cache
def library():
    setups = {"forward": "", "backward": "p.shared_kv = !dv;"}
    return emulator.build(
        *(emulator.KERNELS / f"attention_{name}.cu" for name in TENSORS),
        glue='#include "attention.h"\n' + "".join(export("attention", name, TENSORS[name], setups[name]) for name in TENSORS),
    )


def with_strides(tensors):
    strides = {
        f"{name}_{side}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, side in enumerate(("batch", "head", "token"))
    }
    return {**tensors, **strides}


class Emulator:
    """Runs the kernels' source on the CPU under several schedules, which must give the same bits."""

    library = staticmethod(library)

    def __init__(self, seeds=emulator.SEEDS, **device):
        self.seeds, self.device = seeds, device
        self.queries = []  # of the device, per call

    def forward(self, q, k, v, scale):
        out, lse = poisoned(q, q.shape), poisoned(q, q.shape[:3], torch.float32)
        self._call("forward", scale, lse, q=q, k=k, v=v, out=out)
        return out, lse

    def backward(self, dout, q, k, v, out, lse, scale):
        grads = [poisoned(x, x.shape) for x in (q, k, v)]
        self._call("backward", scale, lse, dout=dout, q=q, k=k, v=v, out=out, dq=grads[0], dk=grads[1], dv=grads[2])
        return grads

    def shared_kv_backward(self, dout, q, kv, out, lse, scale):
        grads = [poisoned(x, x.shape) for x in (q, kv)]
        self._call("backward", scale, lse, dout=dout, q=q, k=kv, v=kv, out=out, dq=grads[0], dk=grads[1], dv=None)
        return grads

    def _call(self, function, scale, lse, **tensors):
        batch, heads, queries, head_size = tensors["q"].shape
        given = dict(
            with_strides(tensors),
            batch=batch,
            heads=heads,
            queries=queries,
            keys=tensors["kv" if "kv" in tensors else "k"].shape[2],
            head_size=head_size,
            dtype=DTYPES.index(tensors["q"].dtype),
            scale=scale,
            lse=lse,
            bytes=torch.zeros(1, dtype=torch.int64),
        )
        sized = self.library().call(function, **given, workspace=None, seeds=(0,), **self.device)
        self.workspace = int(given["bytes"])
        workspace = torch.full((max(1, self.workspace),), 0xFF, dtype=torch.uint8)
        self.cost = self.library().call(function, **given, workspace=workspace, seeds=self.seeds, **self.device)
        self.queries += [sized.device_queries, self.cost.device_queries]


class Gpu:
    """Runs the operators of the extension three times, which must give the same bits."""

    def forward(self, q, k, v, scale):
        return self._repeat(torch.ops.movq_ext.attention_forward, q, k, v, scale)

    def backward(self, dout, q, k, v, out, lse, scale):
        return self._repeat(torch.ops.movq_ext.attention_backward, dout, q, k, v, out, lse, scale)

    def shared_kv_backward(self, dout, q, kv, out, lse, scale):
        return self._repeat(torch.ops.movq_ext.shared_kv_attention_backward, dout, q, kv, out, lse, scale)

    @staticmethod
    def _repeat(op, *arguments):
        copies = {id(x): on_gpu(x) for x in arguments if isinstance(x, torch.Tensor)}  # keys and values may be one tensor
        arguments = [copies.get(id(x), x) for x in arguments]
        first, *others = ([x.cpu() for x in op(*arguments)] for _ in range(3))
        for other in others:
            pairs = zip(first, other, strict=True)
            assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs), "not deterministic"
        return first


def case(batch, heads, queries, keys, head_size, dtype, seed=0):
    """Return normally distributed q, k, v and dout."""
    generator = torch.Generator().manual_seed(seed)
    counts = (queries, keys, keys, queries)
    return [torch.randn(batch, heads, tokens, head_size, generator=generator).to(dtype) for tokens in counts]
