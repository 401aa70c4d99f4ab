"""The Hopper kernels of attention with shared keys and values, as functions of tensors (batch, heads, tokens, head size)."""

import functools

import emulator
import torch

from .attention import PROBLEM, with_strides
from .spatial_norm import DTYPES, poisoned

TENSORS = {"forward": ("q", "kv", "out"), "backward": ("dout", "q", "kv", "out", "dq", "dkv")}
WRITTEN = {"forward": ("out",), "backward": ("dq", "dkv")}
H100 = dict(multiprocessors=132, shared_limit=227 << 10)


def _export(name):
    def parameter(t):
        const = "" if t in WRITTEN[name] else "const "
        return f"{const}void* {t}, int64_t {t}_batch, int64_t {t}_head, int64_t {t}_token"

    def tokens(t):
        return f"{{const_cast<void*>({t}), {t}_batch, {t}_head, {t}_token}}"

    fields = [tokens(t) for t in TENSORS[name]]
    fields.insert({"forward": 3, "backward": 4}[name], "lse")
    return f"""
EXPORT({name}, {PROBLEM}, {", ".join(map(parameter, TENSORS[name]))}, {"" if name == "forward" else "const "}float* lse,
       void* workspace, int64_t* bytes) {{
  const movq::AttentionProblem p = {{batch, heads, queries, keys, head_size, movq::DType(dtype), scale}};
  if (workspace) {{
    movq::shared_kv_{name}(p, {{{", ".join(fields)}, workspace}}, nullptr);
  }} else {{
    const int64_t value = movq::shared_kv_{name}_workspace(p);
    emu::copy_to_device(bytes, &value, sizeof value);
  }}
}}"""


@functools.cache
def library():
    return emulator.build(
        *(emulator.KERNELS / f"shared_kv_{name}.cu" for name in TENSORS),
        glue='#include "shared_kv_attention.h"\n' + "".join(map(_export, TENSORS)),
    )


class Emulator:
    """Runs the kernels' source on the CPU under several schedules, which must give the same bits."""

    def __init__(self, seeds=(0, 1), **device):
        self.seeds, self.device = seeds, {**H100, **device}

    def forward(self, q, kv, scale):
        out, lse = poisoned(q, q.shape), poisoned(q, q.shape[:3], torch.float32)
        self._call("forward", scale, lse, q=q, kv=kv, out=out)
        return out, lse

    def backward(self, dout, q, kv, out, lse, scale):
        grads = [poisoned(x, x.shape) for x in (q, kv)]
        self._call("backward", scale, lse, dout=dout, q=q, kv=kv, out=out, dq=grads[0], dkv=grads[1])
        return grads

    def _call(self, function, scale, lse, **tensors):
        batch, heads, queries, head_size = tensors["q"].shape
        given = dict(
            with_strides(tensors),
            batch=batch,
            heads=heads,
            queries=queries,
            keys=tensors["kv"].shape[2],
            head_size=head_size,
            dtype=DTYPES.index(tensors["q"].dtype),
            scale=scale,
            lse=lse,
            bytes=torch.zeros(1, dtype=torch.int64),
        )
        library().call(function, **given, workspace=None, seeds=(0,), **self.device)
        self.workspace = int(given["bytes"])
        workspace = torch.full((max(1, self.workspace),), 0xFF, dtype=torch.uint8)
        self.cost = library().call(function, **given, workspace=workspace, seeds=self.seeds, **self.device)


def case(batch, heads, queries, keys, head_size, dtype, seed=0):
    """Return normally distributed q, kv and dout."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, tokens, head_size, generator=generator).to(dtype) for tokens in (queries, keys, queries)]
